"""The `transformers` classes that the baseline and DeepSpeed train, with two changes that do not change the results.

The MLM head is applied to the masked positions only, as in BERT's own code; this saves 85 % of the vocabulary logits. And
MegatronBert, which is eager in transformers, uses scaled_dot_product_attention. Parameter names and shapes are unchanged.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import BertForMaskedLM, BertForPreTraining, MegatronBertForMaskedLM, MegatronBertForPreTraining
from transformers.models.megatron_bert.modeling_megatron_bert import MegatronBertSelfAttention

Heads = tuple[torch.Tensor, torch.Tensor | None]


class OnMasked:
    """`forward` of both architectures, with or without a pair head."""

    bert: Any  # this and `cls` are modules of the transformers class
    cls: Any

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, attention_mask: torch.Tensor, predicted: torch.Tensor
    ) -> Heads:
        """input_ids, token_type_ids (B, T) int64, attention_mask (B, T) bool, True for tokens; predicted (N,) int64, indices
        into the flattened (B x T,) -> logits (N, V) and, where there is a pair head, (B, 2)."""
        out = self.bert(input_ids, token_type_ids=token_type_ids, attention_mask=attention_mask[:, None, None, :])
        return self.heads(out.last_hidden_state, out.pooler_output, predicted)

    def heads(self, hidden: torch.Tensor, pooled: torch.Tensor | None, predicted: torch.Tensor) -> Heads:
        """hidden (B, T, H), pooled (B, H) where there is a pair head, predicted as in forward -> the logits."""
        masked = hidden.flatten(0, 1).index_select(0, predicted)  # (N, H)
        pair_head = getattr(self.cls, "seq_relationship", None)
        return self.cls.predictions(masked), None if pair_head is None else pair_head(pooled)


class PairedBert(OnMasked, BertForPreTraining):
    pass


class SingleBert(OnMasked, BertForMaskedLM):
    pass


class PairedMegatronBert(OnMasked, MegatronBertForPreTraining):
    pass


class SingleMegatronBert(OnMasked, MegatronBertForMaskedLM):
    pass


class SdpaSelfAttention(MegatronBertSelfAttention):
    def forward(  # type: ignore[override]  # caches and attention weights are not used
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: object
    ) -> tuple[torch.Tensor, None]:
        """hidden_states (B, T, H), attention_mask (B, 1, 1, T) bool -> (B, T, H)"""
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)  # (B, heads, T, D)
            for project in (self.query, self.key, self.value)
        )
        p = self.dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=p)
        return out.transpose(1, 2).flatten(2), None


def use_sdpa[Net: torch.nn.Module](net: Net) -> Net:
    """Turn every attention module of a MegatronBert into SdpaSelfAttention."""
    for module in net.modules():
        if type(module) is MegatronBertSelfAttention:
            module.__class__ = SdpaSelfAttention
    return net
