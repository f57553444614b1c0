"""The `transformers` classes that baseline and DeepSpeed train, with two changes that change no value:

the head sees the masked positions only (BERT's own code gathers them too: 85 % of the vocabulary's logits are not computed),
and MegatronBert, eager in transformers, attends by scaled_dot_product_attention. Names and shapes are the classes' own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import BertForMaskedLM, BertForPreTraining, MegatronBertForMaskedLM, MegatronBertForPreTraining
from transformers.models.megatron_bert.modeling_megatron_bert import MegatronBertSelfAttention

Heads = tuple[torch.Tensor, torch.Tensor | None]


class OnMasked:
    """forward for both architectures, with or without a head for pairs."""

    bert: Any  # these two are the transformers class's
    cls: Any

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, attention_mask: torch.Tensor, predicted: torch.Tensor
    ) -> Heads:
        """input_ids, token_type_ids (B, T) int64, attention_mask (B, T) bool, True for tokens; predicted (N,) int64, indices
        in the flat (B x T,) -> logits (N, V) and, where there is a pair head, (B, 2)."""
        out = self.bert(input_ids, token_type_ids=token_type_ids, attention_mask=attention_mask[:, None, None, :])
        hidden = out.last_hidden_state.flatten(0, 1).index_select(0, predicted)  # (N, H)
        pair_head = getattr(self.cls, "seq_relationship", None)
        return self.cls.predictions(hidden), None if pair_head is None else pair_head(out.pooler_output)


class PairedBert(OnMasked, BertForPreTraining):
    pass


class SingleBert(OnMasked, BertForMaskedLM):
    pass


class PairedMegatronBert(OnMasked, MegatronBertForPreTraining):
    pass


class SingleMegatronBert(OnMasked, MegatronBertForMaskedLM):
    pass


class SdpaSelfAttention(MegatronBertSelfAttention):
    def forward(  # type: ignore[override]  # the caches and the attention weights of the class are not used
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
    """Let every attention of a MegatronBert be SdpaSelfAttention."""
    for module in net.modules():
        if type(module) is MegatronBertSelfAttention:
            module.__class__ = SdpaSelfAttention
    return net
