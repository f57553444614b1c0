"""GPT as the stages of DeepSpeed's pipeline: the modules of the `transformers` class, called one by one as its forward does.

What is carried: the ids (B, T), then the hidden states (B, T, H), then the logits (B, T, V) of the last stage. With
data.reset_attention also the positions (B, T) and the mask (B, 1, T, T).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from common.config import Config
from common.contract import Family
from common.data import batches
from common.launch.processes import Ranks
from common.layout import Layout
from common.stacks import ds_pipeline
from common.stacks.ds_pipeline import Batch, Carried, Layer

from .. import task


def build(cfg: Config, layout: Layout, ranks: Ranks, family: Family = task) -> ds_pipeline.Stage:
    """This rank's stage of the model of a family module, as ds_pipeline.build."""
    layers_of = _gpt2_layers if cfg.model.arch == "gpt2" else _llama_layers
    return ds_pipeline.build(cfg, layout, ranks, family, lambda net: (layers_of(net), _loss_of))


def _loss_of(carried: Carried, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, V) -> weighted loss, and the summed loss."""
    total = task.loss_sum(carried[0], batch["targets"], batch["loss_mask"])
    return total * batch["weight"], total.detach()


def _gpt2_layers(model: PreTrainedModel) -> list[Layer]:
    net: Any = model
    body = net.transformer
    blocks = [Layer(_gpt2_block, block) for block in body.h]
    return [Layer(_gpt2_embed, body.wte, body.wpe, body.drop), *blocks, Layer(_output, body.ln_f, net.lm_head)]


def _gpt2_embed(carried: Carried, wte: torch.nn.Module, wpe: torch.nn.Module, drop: torch.nn.Module) -> Carried:
    ids, *rest = carried
    positions = rest[0] if rest else torch.arange(ids.shape[1], device=ids.device)[None]  # (B or 1, T)
    return drop(wte(ids) + wpe(positions)), *rest


def _gpt2_block(carried: Carried, block: torch.nn.Module) -> Carried:
    hidden, *rest = carried
    return block(hidden, attention_mask=rest[1] if rest else None, use_cache=False), *rest


def _llama_layers(model: PreTrainedModel) -> list[Layer]:
    net: Any = model
    body = net.model
    blocks = [Layer(_llama_block, block, body.rotary_emb) for block in body.layers]
    return [Layer(_llama_embed, body.embed_tokens), *blocks, Layer(_output, body.norm, net.lm_head)]


def _llama_embed(carried: Carried, embedding: torch.nn.Module) -> Carried:
    ids, *rest = carried
    return embedding(ids), *rest


def _llama_block(carried: Carried, block: torch.nn.Module, rotary: torch.nn.Module) -> Carried:
    hidden, *rest = carried
    positions = rest[0] if rest else torch.arange(hidden.shape[1], device=hidden.device)[None]  # (B or 1, T)
    mask = rest[1] if rest else None
    return block(hidden, attention_mask=mask, position_embeddings=rotary(hidden, position_ids=positions)), *rest


def _output(carried: Carried, norm: torch.nn.Module, head: torch.nn.Module) -> Carried:
    return (head(norm(carried[0])),)


def feed(
    micro_batches: Sequence[batches.MicroBatch], device: torch.device, weight: float, family: Family = task
) -> Iterator[tuple[Carried, Batch]]:
    """What the first stage reads of each micro batch, and what the loss function of the last stage gets: the batch, and the
    weight of its loss."""
    for micro_batch in micro_batches:
        batch = family.make_batch(micro_batch, device)
        rest = [batch[name] for name in ("position_ids", "attention_mask") if name in batch]
        yield (batch["inputs"], *rest), batch | {"weight": weight}
