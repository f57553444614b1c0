"""BERT with the head of a task, as Megatron Core trains it in finetuning."""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel

from common.layout import Layout

from .. import finetune
from ..tasks.base import Head
from .model import Bert, build_stage


class HeadedBert(Bert):
    """Bert with transformers' head for a task in place of the pretraining heads."""

    task_head: Head

    def forward(self, tokens: torch.Tensor, token_types: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As Bert.forward; on the last stage logits (B, L) of a pooled head or (B, T, L), equal on every tp rank."""
        hidden = super().forward(tokens, token_types, mask, None)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        features = self.pooler(hidden, 0) if self.task_head.pooled else hidden.transpose(0, 1)  # (B, H) or (B, T, H)
        dropout = self.training and self.task_head.dropout
        return self.binary_head(F.dropout(features, self.config.hidden_dropout, dropout))

    def use_whole_positions(self) -> None:
        if self.pooler is not None:
            self.pooler.sequence_parallel = False


def build(cfg: finetune.Config, layout: Layout) -> HeadedBert:
    """This rank's stage and shards, with memory but without values: mcore.load_state gives them."""
    m = cfg.model
    net = build_stage(cfg, layout, HeadedBert, share_embeddings_and_output_weights=False, add_binary_head=True)
    if net.post_process:
        net.task_head = m.task_head
        net.lm_head = net.output_layer = None
        net.pooler = net.pooler if m.task_head.pooled else None
        net.binary_head = torch.nn.Linear(m.hidden, len(m.labels))
        net.use_whole_positions()
    return net


def forward(net: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A batch of finetune.make_batch on this pipeline stage -> what HeadedBert.forward gives."""
    mask = ~batch["attention_mask"][:, None, None]  # (B, 1, 1, T), True: masked out
    return net(batch["tokens"], batch["token_types"], mask)
