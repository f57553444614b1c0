"""How the Megatron Core parameters of BERT map to Hugging Face parameters, for training state, exports and imports."""

import re
from collections.abc import Sequence
from functools import partial

import torch

from common.stacks.parameter_map import Conversion, ParameterMap

from .. import task


def qkv(heads: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Rows of q, k, v -> rows of linear_qkv: for each head its q, its k, its v."""
    return torch.stack([t.unflatten(0, (heads, -1)) for t in (q, k, v)], 1).flatten(0, 2)


def split_qkv(heads: int, mixed: torch.Tensor) -> Sequence[torch.Tensor]:
    """The inverse of qkv."""
    return [t.flatten(0, 1) for t in mixed.unflatten(0, (heads, 3, -1)).unbind(1)]


def _unchanged(name: str, unpadded_rows: int | None = None) -> Conversion:
    return Conversion((name,), lambda tensor: [tensor], lambda tensor: tensor, unpadded_rows=unpadded_rows)


def parameter_map(model: task.ResolvedModel) -> ParameterMap:
    """The map of a resolved model: global Megatron name -> Conversion. It raises KeyError for an unknown name."""
    outer, layer = _outer(model), _layer(model)

    def conversion(name: str) -> Conversion:
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)[._](weight|bias)", name)
        if not match:
            return outer[name]
        number, part, leaf = match.groups()
        names = [f"bert.encoder.layer.{number}.{one}.{leaf}" for one in layer[part]]
        if len(names) == 1:
            return _unchanged(names[0])
        return Conversion(tuple(names), partial(split_qkv, model.heads), partial(qkv, model.heads))

    return conversion


def _layer(m: task.ResolvedModel) -> dict[str, tuple[str, ...]]:
    """{part of a layer in Megatron: parts in transformers}. Each part has a weight and a bias."""
    table = {
        "self_attention.linear_qkv": tuple(f"attention.self.{one}" for one in ("query", "key", "value")),
        "self_attention.linear_proj": ("attention.output.dense",),
        "mlp.linear_fc1": ("intermediate.dense",),
        "mlp.linear_fc2": ("output.dense",),
    }
    if m.arch == "bert":
        return table | {"self_attn_bda.norm": ("attention.output.LayerNorm",), "mlp_bda.norm": ("output.LayerNorm",)}
    norms = {"input_layernorm": ("attention.ln",), "pre_mlp_layernorm": ("ln",)}
    # TransformerEngine's names, since it fuses a norm into the linear layer after it
    fused = {"self_attention.linear_qkv.layer_norm": ("attention.ln",), "mlp.linear_fc1.layer_norm": ("ln",)}
    return table | norms | fused


def _outer(m: task.ResolvedModel) -> dict[str, Conversion]:
    """The parameters outside the layers."""
    embedding = _unchanged("bert.embeddings.word_embeddings.weight", m.vocab_size)
    table = {
        "embedding.word_embeddings.weight": embedding,
        "output_layer.weight": embedding._replace(is_copy=True),
        "output_layer.bias": _unchanged("cls.predictions.bias", m.vocab_size),
        "embedding.position_embeddings.weight": _unchanged("bert.embeddings.position_embeddings.weight"),
        "embedding.tokentype_embeddings.weight": _unchanged("bert.embeddings.token_type_embeddings.weight"),
    }
    modules = {"lm_head.dense": "cls.predictions.transform.dense", "lm_head.layer_norm": "cls.predictions.transform.LayerNorm"}
    modules |= {"pooler.dense": "bert.pooler.dense", "binary_head": m.classifier}
    if m.arch == "bert":
        modules["embedding.embedding_dropout.0"] = "bert.embeddings.LayerNorm"
    else:
        modules["encoder.final_layernorm"] = "bert.encoder.ln"
    for megatron, hf in modules.items():
        table |= {f"{megatron}.{leaf}": _unchanged(f"{hf}.{leaf}") for leaf in ("weight", "bias")}
    return table
