"""Hugging Face <-> Megatron: which parameter is which. The table serves the training state, exports and imports alike.

python -m recipes.gpt.convert to-hf RUN HF_DIR      the last checkpoint of a run of any stack, in Hugging Face form
python -m recipes.gpt.convert from-hf HF_DIR OUT    a run's starting point from a Hugging Face folder, for any stack
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

import torch

from common.errors import exit_cleanly
from common.huggingface import interchange
from common.stacks.parameter_map import Rule, Rules

from . import task


def qkv(groups: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Rows of q, k, v -> linear_qkv's: for each query group its q heads, then its k, then its v."""
    return torch.cat([t.reshape(groups, -1, *t.shape[1:]) for t in (q, k, v)], 1).flatten(0, 1)


def split_qkv(groups: int, heads: int, mixed: torch.Tensor) -> Sequence[torch.Tensor]:
    """The inverse of qkv."""
    per_group = heads // groups
    size = mixed.shape[0] // (heads + 2 * groups)  # a head's rows
    grouped = mixed.reshape(groups, -1, *mixed.shape[1:])
    return [t.flatten(0, 1) for t in grouped.split([per_group * size, size, size], 1)]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _one(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    return lambda tensor: [change(tensor)]


def _copy(name: str, rows: int | None = None) -> Rule:
    return Rule((name,), _one(_same), _same, rows=rows)


def _transposed(name: str) -> Rule:
    """GPT-2's Conv1D keeps (in, out), Megatron's linear layers (out, in)."""
    return Rule((name,), _one(torch.t), torch.t)


def rules(model: task.Model) -> Rules:
    """The table for a resolved model: global Megatron name -> Rule. KeyError for a name that is not in it."""
    table = (_gpt2 if model.arch == "gpt2" else _llama)(model)

    def rule(name: str) -> Rule:
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        return table[match[2]](match[1]) if match else table[name]

    return rule


def _gpt2(m: task.Model) -> dict:
    def qkv_rule(name: str, back: Callable, forth: Callable) -> Rule:
        return Rule(
            (name,),
            lambda mixed: [back(torch.cat(list(split_qkv(m.heads, m.heads, mixed))))],
            lambda t: qkv(m.heads, *forth(t).chunk(3)),
        )

    h = "transformer.h.{}."
    layer: dict[str, Callable[[str], Rule]] = {
        "self_attention.linear_qkv.weight": lambda i: qkv_rule(h.format(i) + "attn.c_attn.weight", torch.t, torch.t),
        "self_attention.linear_qkv.bias": lambda i: qkv_rule(h.format(i) + "attn.c_attn.bias", _same, _same),
    }
    linear = {"self_attention.linear_proj": "attn.c_proj", "mlp.linear_fc1": "mlp.c_fc", "mlp.linear_fc2": "mlp.c_proj"}
    for ours, theirs in linear.items():
        layer[f"{ours}.weight"] = lambda i, n=theirs: _transposed(f"{h.format(i)}{n}.weight")
        layer[f"{ours}.bias"] = lambda i, n=theirs: _copy(f"{h.format(i)}{n}.bias")
    layer |= _norms(h, "ln_1", "ln_2", ("weight", "bias"))
    embedding = _copy("transformer.wte.weight", m.vocab_size)
    return layer | {
        "embedding.word_embeddings.weight": embedding,
        "output_layer.weight": embedding,  # the copy on the last pipeline stage
        "embedding.position_embeddings.weight": _copy("transformer.wpe.weight"),
        "decoder.final_layernorm.weight": _copy("transformer.ln_f.weight"),
        "decoder.final_layernorm.bias": _copy("transformer.ln_f.bias"),
    }


def _llama(m: task.Model) -> dict:
    h = "model.layers.{}."

    def names(i: str, part: str, *leaves: str) -> tuple[str, ...]:
        return tuple(f"{h.format(i)}{part}.{leaf}.weight" for leaf in leaves)

    layer: dict[str, Callable[[str], Rule]] = {
        "self_attention.linear_qkv.weight": lambda i: Rule(
            names(i, "self_attn", "q_proj", "k_proj", "v_proj"),
            partial(split_qkv, m.kv_heads, m.heads),
            partial(qkv, m.kv_heads),
        ),
        "self_attention.linear_proj.weight": lambda i: _copy(*names(i, "self_attn", "o_proj")),
        "mlp.linear_fc1.weight": lambda i: Rule(
            names(i, "mlp", "gate_proj", "up_proj"),
            lambda t: t.chunk(2),
            lambda gate, up: torch.cat([gate, up]),
            blocks=2,
        ),
        "mlp.linear_fc2.weight": lambda i: _copy(*names(i, "mlp", "down_proj")),
    } | _norms(h, "input_layernorm", "post_attention_layernorm", ("weight",))
    embedding = _copy("model.embed_tokens.weight", m.vocab_size)
    return layer | {
        "embedding.word_embeddings.weight": embedding,
        "output_layer.weight": embedding if m.tied else _copy("lm_head.weight", m.vocab_size),
        "decoder.final_layernorm.weight": _copy("model.norm.weight"),
    }


def _norms(h: str, first: str, second: str, leaves: Sequence[str]) -> dict[str, Callable[[str], Rule]]:
    """Both names of a layer's norms: as modules of their own, and fused into the next linear by TransformerEngine."""
    table: dict[str, Callable[[str], Rule]] = {}
    for leaf in leaves:
        for ours, fused, theirs in (
            ("input_layernorm", "self_attention.linear_qkv", first),
            ("pre_mlp_layernorm", "mlp.linear_fc1", second),
        ):
            table[f"{ours}.{leaf}"] = table[f"{fused}.layer_norm_{leaf}"] = lambda i, n=theirs, k=leaf: _copy(
                f"{h.format(i)}{n}.{k}"
            )
    return table


if __name__ == "__main__":
    exit_cleanly(partial(interchange.main, task))
