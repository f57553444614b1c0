"""How the Megatron Core parameters of T5 map to Hugging Face parameters, for training state, exports and imports."""

import re
from collections.abc import Sequence
from functools import partial

import torch

from common.stacks.parameter_map import Conversion, ParameterMap

from .. import task


def mixed(heads: int, *parts: torch.Tensor) -> torch.Tensor:
    """Rows of q, k, v (or k, v) -> rows of linear_qkv (linear_kv), which holds the parts of each head together."""
    return torch.stack([t.unflatten(0, (heads, -1)) for t in parts], 1).flatten(0, 2)


def split(heads: int, parts: int, whole: torch.Tensor) -> Sequence[torch.Tensor]:
    """The inverse of mixed."""
    return [t.flatten(0, 1) for t in whole.unflatten(0, (heads, parts, -1)).unbind(1)]


def _unchanged(name: str, unpadded_rows: int | None = None) -> Conversion:
    return Conversion((name,), lambda tensor: [tensor], lambda tensor: tensor, unpadded_rows=unpadded_rows)


def parameter_map(model: task.ResolvedModel) -> ParameterMap:
    """The map of a resolved model: global Megatron name -> Conversion. It raises KeyError for an unknown name."""
    outer = _outer(model)
    layers = {stack: _layer(model, stack) for stack in ("encoder", "decoder")}

    def conversion(name: str) -> Conversion:
        match = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)\.weight", name)
        if not match:
            return outer[name]
        stack, number, part = match.groups()
        names = tuple(f"{stack}.block.{number}.layer.{one}.weight" for one in layers[stack][part])
        if len(names) == 1:
            return _unchanged(names[0])
        if part == "mlp.linear_fc1":
            return Conversion(names, lambda t: t.chunk(2), lambda gate, up: torch.cat([gate, up]), blocks=2)
        return Conversion(names, partial(split, model.heads, len(names)), partial(mixed, model.heads))

    return conversion


def _layer(m: task.ResolvedModel, stack: str) -> dict[str, tuple[str, ...]]:
    """{part of a layer in Megatron: parts in transformers}. transformers numbers the blocks of a layer."""
    mlp = 1 if stack == "encoder" else 2
    table = {
        "input_layernorm": ("0.layer_norm",),
        "self_attention.linear_qkv": tuple(f"0.SelfAttention.{one}" for one in "qkv"),
        "self_attention.linear_proj": ("0.SelfAttention.o",),
        "pre_mlp_layernorm": (f"{mlp}.layer_norm",),
        "mlp.linear_fc1": tuple(f"{mlp}.DenseReluDense.{one}" for one in (("wi_0", "wi_1") if m.gated else ("wi",))),
        "mlp.linear_fc2": (f"{mlp}.DenseReluDense.wo",),
    }
    if stack == "encoder":
        return table
    return table | {
        "pre_cross_attn_layernorm": ("1.layer_norm",),
        "cross_attention.linear_q": ("1.EncDecAttention.q",),
        "cross_attention.linear_kv": ("1.EncDecAttention.k", "1.EncDecAttention.v"),
        "cross_attention.linear_proj": ("1.EncDecAttention.o",),
    }


def _outer(m: task.ResolvedModel) -> dict[str, Conversion]:
    """The parameters outside the layers."""
    table = {"embedding.word_embeddings.weight": _unchanged("shared.weight", m.vocab_size)}
    if m.gated:
        table["lm_head.output_layer.weight"] = _unchanged("lm_head.weight", m.vocab_size)
    for stack in ("encoder", "decoder"):
        table[f"{stack}.final_layernorm.weight"] = _unchanged(f"{stack}.final_layer_norm.weight")
        biases = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table[f"{stack}_relative_pos_emb.relative_attention_bias.weight"] = _unchanged(biases)
    return table
