"""Both BERTs on Megatron Core, built from the shapes in the config. Megatron Core itself has no post-norm BERT."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.bert import bert_lm_head
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from common.config import Config
from common.layout import Layout
from common.stacks import fusions, mcore
from common.training import compiling

from .. import task

Heads = tuple[torch.Tensor, torch.Tensor | None]  # logits of the masked positions, logits of the pairs
Output = torch.Tensor | Heads  # output of a pipeline stage: Heads on the last one, else hidden states


class Encoder(BertModel):  # type: ignore[misc]  # megatron-core has no annotations
    """The part of BertModel that pretraining and finetuning share."""

    def encode(self, tokens: torch.Tensor, token_types: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """tokens, token_types (B, T), mask (B, 1, 1, T), True where a key is masked out -> hidden states (T, B, H). On the last
        stage they have all positions, also with sequence and context parallelism."""
        embedded = None
        if self.pre_process:
            inputs = (tokens, self.bert_position_ids(tokens), token_types)
            embedded = self.embedding(*(mcore.own_positions(ids, 1) for ids in inputs))  # (T / cp, B, H)
        hidden = self.encoder(hidden_states=embedded, attention_mask=mask)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # every tp rank continues with all positions, so the gradient is split and not summed
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return mcore.whole_sequence(hidden)


class Bert(Encoder):
    """BertModel whose head is applied to masked positions only, and whose vocabulary need not be a multiple of tp."""

    unpadded_vocab: int

    def forward(self, tokens: torch.Tensor, token_types: torch.Tensor, mask: torch.Tensor, predicted: torch.Tensor) -> Output:
        """As `encode`, with predicted (N,), indices into the flattened (B x T,) -> on the last stage logits (N, V / tp) and
        (B, 2), on the others hidden states (T, B, H)."""
        hidden = self.encode(tokens, token_types, mask)
        if not self.post_process:
            return hidden
        picked = hidden.transpose(0, 1).flatten(0, 1).index_select(0, predicted)  # (N, H)
        logits, _ = self.output_layer(self.lm_head(picked), weight=self.shared_embedding_or_output_weight())
        padding = self.vocab_size - self.unpadded_vocab  # fewer than tp rows, all on the last rank
        if padding and parallel_state.get_tensor_model_parallel_rank() == self.config.tensor_model_parallel_size - 1:
            logits = logits.clone()
            logits[:, -padding:] = torch.finfo(logits.dtype).min
        return logits, None if self.binary_head is None else self.binary_head(self.pooler(hidden, 0))

    def use_whole_positions(self) -> None:
        """Configure the heads for sequence parallelism: their inputs are gathered, so they are equal on every tp rank."""
        for parameter in self.lm_head.parameters():
            parameter.sequence_parallel = False
        self.output_layer.sequence_parallel = False
        self.output_layer.allreduce_dgrad = self.config.tensor_model_parallel_size > 1
        if self.binary_head is not None:
            self.pooler.sequence_parallel = False


def dropped_sum_and_norm(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, norm: torch.Tensor, norm_bias: torch.Tensor,
    eps: float, dropout: float,
) -> torch.Tensor:  # fmt: skip
    """x, the output of attention or MLP, and residual (T, B, H) -> (T, B, H)"""
    x = x if bias is None else x + bias
    return F.layer_norm(residual + F.dropout(x, dropout), norm.shape, norm, norm_bias, eps)


class PostNorm(torch.nn.Module):
    """Megatron's bias-dropout-add, followed by a norm. Used twice in a layer without norms, it makes a post-norm layer. With
    megatron.fusions both are one kernel."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm = mcore.Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        if fused:
            function, norm = compiling.kernel(dropped_sum_and_norm), self.norm
            return lambda output_and_bias, residual, dropout: function(
                *output_and_bias, residual, norm.weight, norm.bias, norm.eps, dropout if training else 0.0
            )
        add = get_bias_dropout_add(training, fused)
        return lambda output_and_bias, residual, dropout: self.norm(add(output_and_bias, residual, dropout))


def transformer_config(cfg: Config, m: task.ResolvedModel, layout: Layout) -> TransformerConfig:
    return mcore.transformer_config(
        cfg, layout, num_layers=m.layers, hidden_size=m.hidden, num_attention_heads=m.heads, ffn_hidden_size=m.ffn,
        hidden_dropout=m.dropout, attention_dropout=m.dropout, layernorm_epsilon=m.norm_eps, activation_func=F.gelu,
    )  # fmt: skip


def layer_spec(cfg: Config, m: task.ResolvedModel, config: TransformerConfig) -> ModuleSpec:
    if cfg.megatron.transformer_engine and m.arch == "megatron-bert":
        from megatron.core.models.bert.bert_layer_specs import get_bert_layer_with_transformer_engine_spec

        return get_bert_layer_with_transformer_engine_spec()
    mcore.use_own_norms()
    spec = mcore.layer_spec(AttnMaskType.padding)
    if m.arch == "bert":
        layer = spec.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
        layer.self_attn_bda = layer.mlp_bda = ModuleSpec(module=PostNorm, params={"config": config})
    return spec


def build(cfg: task.ResolvedConfig, layout: Layout) -> list[Bert]:
    """Build this rank's chunks and shards. Parameters are allocated but not initialized: mcore.load_state sets them."""
    m = cfg.model
    nets = encoders(Bert, cfg, m, layout, share_embeddings_and_output_weights=True, add_binary_head=m.pair_head)
    for net in nets:
        net.unpadded_vocab = m.vocab_size
    if nets[-1].post_process:
        nets[-1].use_whole_positions()
    return nets


def encoders[Net: Encoder](
    net_class: type[Net], cfg: Config, m: task.ResolvedModel, layout: Layout, **heads: bool
) -> list[Net]:
    """Build this rank's chunks of a model of this class. heads: the arguments of BertModel that select its heads."""
    config = transformer_config(cfg, m, layout)
    bert_lm_head.LNImpl = mcore.Norm
    return [_encoder(net_class, cfg, m, layout, config, **heads, **place) for place in mcore.pre_and_post(layout)]


def _encoder[Net: Encoder](
    net_class: type[Net], cfg: Config, m: task.ResolvedModel, layout: Layout, config: TransformerConfig, **more: Any
) -> Net:
    net = net_class(
        config=config, num_tokentypes=2, transformer_layer_spec=layer_spec(cfg, m, config),
        vocab_size=-(-m.vocab_size // layout.tp) * layout.tp, max_sequence_length=m.positions,
        **more,
    )  # fmt: skip
    if m.arch == "bert":
        net.encoder.final_layernorm = None
        if net.pre_process:  # the norm comes before the dropout
            norm = mcore.Norm(config, m.hidden, m.norm_eps)
            net.embedding.embedding_dropout = torch.nn.Sequential(norm, net.embedding.embedding_dropout)
    return net


def own_part(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What this rank computes of a batch of task.make_batch. With context parallelism, which gathers the hidden states after
    the last layer, each rank has a share of the N masked positions, and the first one has the pairs."""
    group = parallel_state.get_context_parallel_group()
    rank, size, masked = group.rank(), group.size(), len(batch["labels"])
    share = slice(rank * masked // size, (rank + 1) * masked // size)
    own = {name: batch[name][share] for name in ("predicted", "labels")}
    if "pair_mask" in batch and rank > 0:
        own["pair_mask"] = torch.zeros_like(batch["pair_mask"])
    return batch | own


def forward(net: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Output:
    """A batch of own_part on a chunk of layers -> the output of Bert.forward."""
    mask = ~batch["attention_mask"][:, None, None]  # (B, 1, 1, T), True: masked out
    return net(batch["tokens"], batch["token_types"], mask, batch["predicted"])


def loss_sums(config: TransformerConfig, output: Output, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As task.loss_sums, from logits (N, V / tp) that are split over the tensor-parallel ranks -> (2, P), equal on each."""
    (mlm, pairs), labels = output, batch["labels"]
    if not len(labels):  # validation beyond the last sample
        mlm = torch.cat([mlm, mlm.new_zeros(1, mlm.size(1))])
        labels = labels.new_zeros(1)
    losses = fusions.cross_entropy(config, mlm, labels)  # (N,)
    has_targets = len(batch["labels"]) > 0
    loss, right = losses.sum() * has_targets, (_highest(mlm.detach()) == labels).sum() * has_targets
    sums = torch.stack([loss, right.to(loss)])[:, None]  # (2, 1)
    return sums if pairs is None else torch.cat([sums, task.pair_sums(pairs, batch)[:, None]], 1)


def _highest(logits: torch.Tensor) -> torch.Tensor:
    """logits (N, V / tp) -> (N,) id of the highest logit over all shards. Of equal logits, the first counts."""
    group = parallel_state.get_tensor_model_parallel_group()
    best, index = logits.max(-1)
    top = best.clone()
    torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=group)
    ids = torch.where(best == top, index + group.rank() * logits.size(1), torch.iinfo(torch.int64).max)
    torch.distributed.all_reduce(ids, torch.distributed.ReduceOp.MIN, group=group)
    return ids
