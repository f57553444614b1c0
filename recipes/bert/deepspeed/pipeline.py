"""BERT as the stages of DeepSpeed's pipeline: the modules of the `transformers` class, called one by one as its forward does.

What is carried: the ids and types (B, T), then the hidden states (B, T, H); and the mask (B, T) bool, True for tokens. The loss
functions apply the heads, because they know the masked positions.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from common.config import Config
from common.contract import Family
from common.data import batches
from common.launch.processes import Ranks
from common.layout import Layout
from common.stacks import ds_pipeline
from common.stacks.ds_pipeline import Batch, Carried, Layer, LossFunction

from .. import task

if TYPE_CHECKING:  # pretraining imports no code of the tasks
    from .. import finetune
    from ..tasks.base import Head


def build(cfg: Config, layout: Layout, ranks: Ranks) -> ds_pipeline.Stage:
    """This rank's stage of the pretraining model, as ds_pipeline.build. Its results are the summed losses and hits (2, P)."""
    return ds_pipeline.build(cfg, layout, ranks, task, _with_pretraining_heads)


def build_headed(cfg: "finetune.ResolvedConfig", layout: Layout, ranks: Ranks) -> ds_pipeline.Stage:
    """This rank's stage of the model with a task head. Its results are the summed loss, and predictions (B, width)."""
    from .. import finetune

    return ds_pipeline.build(cfg, layout, ranks, finetune, partial(_with_task_head, cfg.model.task_head))


def _with_pretraining_heads(model: PreTrainedModel) -> tuple[list[Layer], LossFunction]:
    net: Any = model

    def loss_of(carried: Carried, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        [hidden] = carried
        pooled = None if net.bert.pooler is None else net.bert.pooler(hidden)
        mlm, pairs = net.heads(hidden, pooled, batch["predicted"])  # (N, V), (B, 2)
        sums = task.loss_sums(mlm, pairs, batch)
        return (sums[0] * batch["weight"]).sum(), sums.detach()

    return _layers(net, net.cls), loss_of


def _with_task_head(head: "Head", model: PreTrainedModel) -> tuple[list[Layer], LossFunction]:
    net: Any = model
    classifier = getattr(net, head.parameter)
    dropout = net.dropout if head.dropout else torch.nn.Identity()

    def loss_of(carried: Carried, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        [hidden] = carried
        features = net.bert.pooler(hidden) if head.pooled else hidden  # (B x C, H) or (B, T, H)
        logits = classifier(dropout(features))
        total = head.loss_sum(logits, batch)
        return total * batch["weight"], (total.detach(), head.predictions(logits.detach(), batch))

    return _layers(net, dropout, classifier), loss_of


def _layers(net: Any, *heads: torch.nn.Module) -> list[Layer]:
    bert = net.bert
    held = [module for module in (getattr(bert.encoder, "ln", None), bert.pooler) if module is not None]
    output = Layer(_final_norm if hasattr(bert.encoder, "ln") else _hidden, *held, *heads)
    return [Layer(_embed, bert.embeddings), *(Layer(_block, block) for block in bert.encoder.layer), output]


def _embed(carried: Carried, embeddings: torch.nn.Module) -> Carried:
    ids, types, mask = carried
    return embeddings(ids, token_type_ids=types), mask


def _block(carried: Carried, block: torch.nn.Module) -> Carried:
    hidden, mask = carried
    output = block(hidden, mask[:, None, None, :])
    return (output if isinstance(output, torch.Tensor) else output[0]), mask  # MegatronBert returns a tuple


def _final_norm(carried: Carried, norm: torch.nn.Module, *_: torch.nn.Module) -> Carried:
    return (norm(carried[0]),)


def _hidden(carried: Carried, *_: torch.nn.Module) -> Carried:
    return (carried[0],)


def feed(
    micro_batches: Sequence[batches.MicroBatch], device: torch.device, weight: Any, family: Family = task
) -> Iterator[tuple[Carried, Batch]]:
    """What the first stage reads of each micro batch, and what the loss function of the last stage gets: the batch, and the
    weight of its loss, in pretraining (P,)."""
    for micro_batch in micro_batches:
        batch = family.make_batch(micro_batch, device)
        yield (batch["tokens"], batch["token_types"], batch["attention_mask"]), batch | {"weight": weight}
