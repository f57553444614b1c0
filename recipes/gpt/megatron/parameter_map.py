"""How the Megatron Core parameters of GPT map to Hugging Face parameters, for training state, exports and imports."""

import re
from collections.abc import Callable, Sequence
from functools import partial

import torch

from common.stacks.parameter_map import Conversion, ParameterMap

from .. import task


def qkv(groups: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Rows of q, k, v -> rows of linear_qkv: for each query group its q heads, then its k, then its v."""
    return torch.cat([t.reshape(groups, -1, *t.shape[1:]) for t in (q, k, v)], 1).flatten(0, 1)


def split_qkv(groups: int, heads: int, mixed: torch.Tensor) -> Sequence[torch.Tensor]:
    """The inverse of qkv."""
    per_group = heads // groups
    size = mixed.shape[0] // (heads + 2 * groups)  # rows of a head
    grouped = mixed.reshape(groups, -1, *mixed.shape[1:])
    return [t.flatten(0, 1) for t in grouped.split([per_group * size, size, size], 1)]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Conversion:
    """One parameter corresponds to one parameter; `change` is its own inverse."""
    return Conversion((name,), lambda tensor: [change(tensor)], change)


def _unchanged(name: str, unpadded_rows: int | None = None) -> Conversion:
    return _changed(name, _same)._replace(unpadded_rows=unpadded_rows)


def parameter_map(model: task.ResolvedModel) -> ParameterMap:
    """The map of a resolved model: global Megatron name -> Conversion. It raises KeyError for an unknown name."""
    outer, layer = (_gpt2 if model.arch == "gpt2" else _llama)(model)

    def conversion(name: str) -> Conversion:
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        return layer[match[2]](match[1]) if match else outer[name]

    return conversion


Outer = dict[str, Conversion]  # parameters outside the layers, by Megatron name
Layer = dict[str, Callable[[str], Conversion]]  # {Megatron name within a layer: function of the layer number}


def _gpt2(m: task.ResolvedModel) -> tuple[Outer, Layer]:
    def named(name: str, convert: Callable[[str], Conversion]) -> Callable[[str], Conversion]:
        return lambda number: convert(f"transformer.h.{number}.{name}")

    def transposed(name: str) -> Conversion:
        """GPT-2's Conv1D holds (in, out), Megatron's linear layers (out, in)."""
        return _changed(name, torch.t)._replace(is_transposed=True)

    def mixed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Conversion:
        """c_attn holds all queries, then all keys, then all values."""
        return Conversion(
            (name,),
            lambda tensor: [change(torch.cat(list(split_qkv(m.heads, m.heads, tensor))))],
            lambda tensor: qkv(m.heads, *change(tensor).chunk(3)),
            is_transposed=change is torch.t,
        )

    layer: Layer = {
        "self_attention.linear_qkv.weight": named("attn.c_attn.weight", partial(mixed, change=torch.t)),
        "self_attention.linear_qkv.bias": named("attn.c_attn.bias", partial(mixed, change=_same)),
    }
    linear = {"self_attention.linear_proj": "attn.c_proj", "mlp.linear_fc1": "mlp.c_fc", "mlp.linear_fc2": "mlp.c_proj"}
    for megatron, hf in linear.items():
        layer[f"{megatron}.weight"] = named(f"{hf}.weight", transposed)
        layer[f"{megatron}.bias"] = named(f"{hf}.bias", _unchanged)
    for leaf in ("weight", "bias"):
        for megatron, hf in _norms("ln_1", "ln_2", leaf).items():
            layer[megatron] = named(hf, _unchanged)
    embedding = _unchanged("transformer.wte.weight", m.vocab_size)
    return {
        "embedding.word_embeddings.weight": embedding,
        "output_layer.weight": embedding._replace(is_copy=True),
        "embedding.position_embeddings.weight": _unchanged("transformer.wpe.weight"),
        "decoder.final_layernorm.weight": _unchanged("transformer.ln_f.weight"),
        "decoder.final_layernorm.bias": _unchanged("transformer.ln_f.bias"),
    }, layer


def _llama(m: task.ResolvedModel) -> tuple[Outer, Layer]:
    def named(name: str) -> Callable[[str], Conversion]:
        return lambda number: _unchanged(f"model.layers.{number}.{name}")

    def attention(number: str) -> Conversion:
        names = tuple(f"model.layers.{number}.self_attn.{part}_proj.weight" for part in "qkv")
        return Conversion(names, partial(split_qkv, m.kv_heads, m.heads), partial(qkv, m.kv_heads))

    def gated(number: str) -> Conversion:
        names = tuple(f"model.layers.{number}.mlp.{part}_proj.weight" for part in ("gate", "up"))
        return Conversion(names, lambda tensor: tensor.chunk(2), lambda gate, up: torch.cat([gate, up]), blocks=2)

    layer: Layer = {
        "self_attention.linear_qkv.weight": attention,
        "self_attention.linear_proj.weight": named("self_attn.o_proj.weight"),
        "mlp.linear_fc1.weight": gated,
        "mlp.linear_fc2.weight": named("mlp.down_proj.weight"),
    }
    for megatron, hf in _norms("input_layernorm", "post_attention_layernorm", "weight").items():
        layer[megatron] = named(hf)
    embedding = _unchanged("model.embed_tokens.weight", m.vocab_size)
    return {
        "embedding.word_embeddings.weight": embedding,
        "output_layer.weight": embedding._replace(is_copy=True) if m.tied else _unchanged("lm_head.weight", m.vocab_size),
        "decoder.final_layernorm.weight": _unchanged("model.norm.weight"),
    }, layer


def _norms(first: str, second: str, leaf: str) -> dict[str, str]:
    """{Megatron name: transformers name} of a layer's two norms. Megatron has two names for each: as a module, and fused into
    the next linear layer by TransformerEngine."""
    return {
        f"input_layernorm.{leaf}": f"{first}.{leaf}",
        f"self_attention.linear_qkv.layer_norm_{leaf}": f"{first}.{leaf}",
        f"pre_mlp_layernorm.{leaf}": f"{second}.{leaf}",
        f"mlp.linear_fc1.layer_norm_{leaf}": f"{second}.{leaf}",
    }
