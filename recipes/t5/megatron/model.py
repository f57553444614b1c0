"""Google's T5 on Megatron Core: Megatron's T5Model, corrected where it differs (checked with megatron-core 0.19.2).

Without TransformerEngine, Megatron's T5Model has no relative biases, no final norm, a bias in the tied head, no scaling of the
logits, and no dropout inside the MLP or after the last norm. Full recomputation fails with relative biases (DetachedBias).
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from common.layout import Layout
from common.stacks import fusions, mcore

if TYPE_CHECKING:
    from .. import finetune, task


class DetachedBias(torch.autograd.Function):
    """Passes the gradient that the layers accumulate in `leaf`, a detached copy of `bias`, on to `bias`.

    Megatron's recompute passes the biases to its layers by closure, not as an argument of the checkpoint. The backward pass of
    each recomputed layer therefore continues through the biases into their graph, which the first layer has already freed:
    "backward through the graph a second time". A leaf tensor stops it there and accumulates the gradients of all layers. This
    function is applied to the input of the block, whose gradient is computed last, when the leaf has all gradients.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, bias: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        ctx.leaf = leaf
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        return grad, ctx.leaf.grad, None


class DroppedMlp(fusions.Mlp):
    """An MLP with T5's dropout before the second linear layer (transformers: T5DenseActDense)."""

    def activated(self, x: torch.Tensor, bias: torch.Tensor | None, dropout: float = 0.0) -> torch.Tensor:
        p = self.config.hidden_dropout if self.training else dropout
        with forked_random_state(self.config) if p and not self.config.sequence_parallel else nullcontext():
            return super().activated(x, bias, p)


def forked_random_state(config: TransformerConfig) -> AbstractContextManager[None]:
    """A random state of its own for each tp rank, since each rank holds other units."""
    return tensor_parallel.get_cuda_rng_tracker().fork() if config.tensor_model_parallel_size > 1 else nullcontext()


class T5(T5Model):  # type: ignore[misc]  # megatron-core has no annotations
    unpadded_vocab: int

    def forward(
        self, inputs: torch.Tensor, decoder_inputs: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """inputs (B, T), decoder_inputs and labels (B, S), mask (B, 1, 1, T), True where an input is padding -> losses (B, S);
        without labels, logits (B, S, V / tp)."""
        hidden, bias = self._biased(self.embedding(inputs, None), self.encoder_relative_pos_emb, mask)
        encoded = self._dropped(self.encoder(hidden_states=hidden, attention_mask=None, attention_bias=bias))
        length = decoder_inputs.size(1)
        future = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)[None, None]  # (1, 1, S, S)
        hidden, bias = self._biased(self.embedding(decoder_inputs, None), self.decoder_relative_pos_emb, future)
        decoded = self.decoder(
            hidden_states=hidden, attention_mask=None, context=encoded, context_mask=mask, attention_bias=bias
        )
        decoded, weight = self._dropped(decoded), None
        if self.share_embeddings_and_output_weights:
            decoded, weight = decoded * self.config.hidden_size**-0.5, self.shared_embedding_or_output_weight()
        logits = self.lm_head(decoded, weight)  # (S, B, V / tp)
        padding = self.vocab_size - self.unpadded_vocab  # fewer than tp rows, all on the last rank
        if padding and parallel_state.get_tensor_model_parallel_rank() == self.config.tensor_model_parallel_size - 1:
            logits = logits.clone()
            logits[..., -padding:] = torch.finfo(logits.dtype).min
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        return fusions.cross_entropy(self.config, logits, labels.t().contiguous()).t().contiguous()

    def _biased(self, hidden: torch.Tensor, table: torch.nn.Module, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (T, B, H), and the relative biases of this rank's heads, -inf where the mask (B or 1, 1, 1 or T, T) is
        True: (B or 1, heads / tp, T, T). They are masked here once, not in each layer: B of them take B x heads x T x T."""
        length = mask.size(-1)
        bias = table(length, length).permute(0, 2, 3, 1)  # (1, T, T, heads)
        bias = tensor_parallel.scatter_to_tensor_model_parallel_region(bias).permute(0, 3, 1, 2)
        bias = bias.masked_fill(mask, -torch.inf)
        if self.training and self.config.recompute_granularity:  # full, or megatron.extra's selective
            leaf = bias.detach().requires_grad_()
            return DetachedBias.apply(hidden, bias, leaf), leaf
        return hidden, bias

    def _dropped(self, hidden: torch.Tensor) -> torch.Tensor:
        p = self.config.hidden_dropout if self.training else 0.0
        with forked_random_state(self.config) if p and self.config.sequence_parallel else nullcontext():
            return F.dropout(hidden, p, training=p > 0)


def transformer_config(cfg: "task.ResolvedConfig | finetune.ResolvedConfig", layout: Layout, layers: int) -> TransformerConfig:
    m = cfg.model
    return mcore.transformer_config(
        cfg, layout, num_layers=layers, hidden_size=m.hidden, num_attention_heads=m.heads, kv_channels=m.kv_channels,
        ffn_hidden_size=m.ffn, hidden_dropout=m.dropout, attention_dropout=m.dropout, layernorm_epsilon=m.norm_eps,
        normalization="RMSNorm", add_bias_linear=False, softmax_scale=1.0, gated_linear_unit=m.gated,
        activation_func=partial(F.gelu, approximate="tanh") if m.gated else F.relu,
    )  # fmt: skip


def build(cfg: "task.ResolvedConfig | finetune.ResolvedConfig", layout: Layout) -> list[T5]:
    """Build this rank's shards, in one chunk. Parameters are allocated but not initialized: mcore.load_state sets them."""
    m = cfg.model
    mcore.use_own_norms()
    encoder = mcore.layer_spec(AttnMaskType.padding, mlp=DroppedMlp)
    decoder = mcore.layer_spec(AttnMaskType.causal, cross=True, mlp=DroppedMlp)
    net = T5(
        config=transformer_config(cfg, layout, m.decoder_layers),
        encoder_config=transformer_config(cfg, layout, m.layers),
        transformer_encoder_layer_spec=TransformerBlockSubmodules([encoder] * m.layers, layer_norm=mcore.Norm),
        transformer_decoder_layer_spec=TransformerBlockSubmodules([decoder] * m.decoder_layers, layer_norm=mcore.Norm),
        vocab_size=-(-m.vocab_size // layout.tp) * layout.tp, max_sequence_length=cfg.data.seq_len,
        share_embeddings_and_output_weights=not m.gated, position_embedding_type="relative",
        relative_attention_num_buckets=m.buckets, relative_attention_max_distance=m.max_distance,
    )  # fmt: skip
    net.unpadded_vocab = m.vocab_size
    net.lm_head.output_layer.bias = None
    return [net]


def own_part(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What this rank computes of a batch of task.make_batch: all of it, as T5 has no context parallelism."""
    return batch


def forward(net: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A batch of own_part -> losses (B, S)."""
    mask = ~batch["attention_mask"][:, None, None]  # (B, 1, 1, T), True: masked out
    return net(batch["inputs"], batch["decoder_inputs"], mask, labels=batch["targets"])
