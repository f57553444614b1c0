"""GPT on Megatron Core, built from the shapes in the config."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from common.layout import Layout
from common.stacks import fusions, mcore

if TYPE_CHECKING:
    from .. import finetune, task


class Gpt(GPTModel):  # type: ignore[misc]  # megatron-core has no annotations
    """GPTModel whose vocabulary need not be a multiple of tp: the softmax leaves out the padding rows."""

    unpadded_vocab: int

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels (B, T), logits (T, B, V / tp) -> losses (B, T)"""
        padding = self.vocab_size - self.unpadded_vocab  # fewer than tp rows, all on the last rank
        if padding and parallel_state.get_tensor_model_parallel_rank() == self.config.tensor_model_parallel_size - 1:
            logits = logits.clone()
            logits[..., -padding:] = torch.finfo(logits.dtype).min
        return fusions.cross_entropy(self.config, logits, labels.t().contiguous()).t().contiguous()


def transformer_config(cfg: "task.ResolvedConfig | finetune.ResolvedConfig", layout: Layout) -> TransformerConfig:
    m = cfg.model
    shapes: dict[str, Any] = {
        "num_layers": m.layers, "hidden_size": m.hidden, "num_attention_heads": m.heads, "ffn_hidden_size": m.ffn,
        "num_query_groups": m.kv_heads, "hidden_dropout": m.dropout, "attention_dropout": m.dropout,
        "layernorm_epsilon": m.norm_eps,
    }  # fmt: skip
    if m.arch == "gpt2":
        shapes |= {"activation_func": partial(F.gelu, approximate="tanh")}
    else:
        shapes |= {"activation_func": F.silu, "gated_linear_unit": True, "normalization": "RMSNorm", "add_bias_linear": False}
    return mcore.transformer_config(cfg, layout, **shapes)


def build(cfg: "task.ResolvedConfig | finetune.ResolvedConfig", layout: Layout) -> list[Gpt]:
    """Build this rank's chunks and shards. Parameters are allocated but not initialized: mcore.load_state sets them."""
    m = cfg.model
    config = transformer_config(cfg, layout)
    if cfg.megatron.transformer_engine:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        mcore.use_own_norms()
        spec = mcore.layer_spec(AttnMaskType.causal)
    nets = [
        Gpt(
            config=config, transformer_layer_spec=spec, vocab_size=-(-m.vocab_size // layout.tp) * layout.tp,
            max_sequence_length=m.positions, share_embeddings_and_output_weights=m.tied,
            position_embedding_type="learned_absolute" if m.arch == "gpt2" else "rope", rotary_base=m.rope_theta, **place,
        )
        for place in mcore.pre_and_post(layout)
    ]  # fmt: skip
    for net in nets:
        net.unpadded_vocab = m.vocab_size
    return nets


def own_part(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What this rank computes of a batch of task.make_batch: with context parallelism its positions, (B, T / cp), and of
    attention_mask, (B, 1, T / cp, T), its queries. Each rank has the targets of its positions."""
    tokens = batch["inputs"]
    positions = torch.arange(tokens.size(1), device=tokens.device).expand(len(tokens), -1)  # (B, T)
    batch = {"position_ids": positions} | batch
    return {name: mcore.own_positions(tensor, 2 if name == "attention_mask" else 1) for name, tensor in batch.items()}


def forward(net: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A batch of own_part on a chunk of layers -> losses (B, T / cp) on the last one, hidden states on the others."""
    mask = ~batch["attention_mask"] if "attention_mask" in batch else None  # (B, 1, T / cp, T), True: masked out
    return net(batch["inputs"], batch["position_ids"], mask, labels=batch["targets"])
