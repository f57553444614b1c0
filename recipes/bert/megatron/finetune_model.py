"""BERT with a task head on Megatron Core."""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from common.layout import Layout

from .. import finetune
from ..tasks.base import Head
from . import model as megatron_model


class HeadedBert(megatron_model.Encoder):
    """Encoder with the task head of transformers in place of the pretraining heads."""

    head: Head

    def forward(self, tokens: torch.Tensor, token_types: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As `encode`, but on the last stage logits, equal on every tp rank: (B, L) of a pooled head, or (B, T, L)."""
        hidden = self.encode(tokens, token_types, mask)
        if not self.post_process:
            return hidden
        pooled = self.pooler(hidden, 0) if self.head.pooled else hidden.transpose(0, 1)  # (B, H) or (B, T, H)
        return self.binary_head(F.dropout(pooled, self.config.hidden_dropout, self.training and self.head.dropout))


def build(cfg: finetune.ResolvedConfig, layout: Layout) -> list[HeadedBert]:
    """Build this rank's chunks and shards. Parameters are allocated but not initialized: mcore.load_state sets them."""
    m = cfg.model
    nets = megatron_model.encoders(HeadedBert, cfg, m, layout, share_embeddings_and_output_weights=False, add_binary_head=True)
    net = nets[-1]
    if net.post_process:
        net.head = m.task_head
        net.lm_head = net.output_layer = None
        net.pooler = net.pooler if m.task_head.pooled else None
        net.binary_head = torch.nn.Linear(m.hidden, len(m.labels))
        if net.pooler is not None:
            net.pooler.sequence_parallel = False
    return nets


def own_part(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What this rank computes of a batch of finetune.make_batch. With context parallelism, which gathers the hidden states
    after the last layer, the first rank alone has targets."""
    if parallel_state.get_context_parallel_rank() == 0:
        return batch
    return batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])}


def forward(net: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A batch of own_part on a chunk of layers -> the output of HeadedBert.forward."""
    mask = ~batch["attention_mask"][:, None, None]  # (B, 1, 1, T), True: masked out
    return net(batch["tokens"], batch["token_types"], mask)
