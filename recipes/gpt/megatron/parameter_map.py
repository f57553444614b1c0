"""Which Megatron Core parameter of GPT stands for which Hugging Face one. Training state, exports and imports go by it."""

import re
from collections.abc import Callable, Sequence
from functools import partial

import torch

from common.stacks.parameter_map import Conversion, ParameterMap

from .. import task


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


def _unchanged(name: str, unpadded_rows: int | None = None) -> Conversion:
    return Conversion((name,), _one(_same), _same, unpadded_rows=unpadded_rows)


def _transposed(name: str) -> Conversion:
    """GPT-2's Conv1D keeps (in, out), Megatron's linear layers (out, in)."""
    return Conversion((name,), _one(torch.t), torch.t)


def parameter_map(model: task.Model) -> ParameterMap:
    """The map of a resolved model: global Megatron name -> Conversion. KeyError for a name that is not in it."""
    table = (_gpt2 if model.arch == "gpt2" else _llama)(model)

    def rule(name: str) -> Conversion:
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        return table[match[2]](match[1]) if match else table[name]

    return rule


def _gpt2(m: task.Model) -> dict:
    def qkv_rule(name: str, back: Callable, forth: Callable) -> Conversion:
        return Conversion(
            (name,),
            lambda mixed: [back(torch.cat(list(split_qkv(m.heads, m.heads, mixed))))],
            lambda t: qkv(m.heads, *forth(t).chunk(3)),
        )

    h = "transformer.h.{}."
    layer: dict[str, Callable[[str], Conversion]] = {
        "self_attention.linear_qkv.weight": lambda i: qkv_rule(h.format(i) + "attn.c_attn.weight", torch.t, torch.t),
        "self_attention.linear_qkv.bias": lambda i: qkv_rule(h.format(i) + "attn.c_attn.bias", _same, _same),
    }
    linear = {"self_attention.linear_proj": "attn.c_proj", "mlp.linear_fc1": "mlp.c_fc", "mlp.linear_fc2": "mlp.c_proj"}
    for ours, theirs in linear.items():
        layer[f"{ours}.weight"] = lambda i, n=theirs: _transposed(f"{h.format(i)}{n}.weight")
        layer[f"{ours}.bias"] = lambda i, n=theirs: _unchanged(f"{h.format(i)}{n}.bias")
    layer |= _norms(h, "ln_1", "ln_2", ("weight", "bias"))
    embedding = _unchanged("transformer.wte.weight", m.vocab_size)
    return layer | {
        "embedding.word_embeddings.weight": embedding,
        "output_layer.weight": embedding._replace(is_copy=True),
        "embedding.position_embeddings.weight": _unchanged("transformer.wpe.weight"),
        "decoder.final_layernorm.weight": _unchanged("transformer.ln_f.weight"),
        "decoder.final_layernorm.bias": _unchanged("transformer.ln_f.bias"),
    }


def _llama(m: task.Model) -> dict:
    h = "model.layers.{}."

    def names(i: str, part: str, *leaves: str) -> tuple[str, ...]:
        return tuple(f"{h.format(i)}{part}.{leaf}.weight" for leaf in leaves)

    layer: dict[str, Callable[[str], Conversion]] = {
        "self_attention.linear_qkv.weight": lambda i: Conversion(
            names(i, "self_attn", "q_proj", "k_proj", "v_proj"),
            partial(split_qkv, m.kv_heads, m.heads),
            partial(qkv, m.kv_heads),
        ),
        "self_attention.linear_proj.weight": lambda i: _unchanged(*names(i, "self_attn", "o_proj")),
        "mlp.linear_fc1.weight": lambda i: Conversion(
            names(i, "mlp", "gate_proj", "up_proj"),
            lambda t: t.chunk(2),
            lambda gate, up: torch.cat([gate, up]),
            blocks=2,
        ),
        "mlp.linear_fc2.weight": lambda i: _unchanged(*names(i, "mlp", "down_proj")),
    } | _norms(h, "input_layernorm", "post_attention_layernorm", ("weight",))
    embedding = _unchanged("model.embed_tokens.weight", m.vocab_size)
    return layer | {
        "embedding.word_embeddings.weight": embedding,
        "output_layer.weight": embedding._replace(is_copy=True) if m.tied else _unchanged("lm_head.weight", m.vocab_size),
        "decoder.final_layernorm.weight": _unchanged("model.norm.weight"),
    }


def _norms(h: str, first: str, second: str, leaves: Sequence[str]) -> dict[str, Callable[[str], Conversion]]:
    """Both names of a layer's norms: as modules of their own, and fused into the next linear by TransformerEngine."""
    table: dict[str, Callable[[str], Conversion]] = {}
    for leaf in leaves:
        for ours, fused, theirs in (
            ("input_layernorm", "self_attention.linear_qkv", first),
            ("pre_mlp_layernorm", "mlp.linear_fc1", second),
        ):
            table[f"{ours}.{leaf}"] = table[f"{fused}.layer_norm_{leaf}"] = lambda i, n=theirs, k=leaf: _unchanged(
                f"{h.format(i)}{n}.{k}"
            )
    return table
