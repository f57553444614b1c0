"""The definition of T5 that all stacks share: shapes, parameter names, initial values, batch and loss.

Two architectures. `t5`: ReLU, output weights tied to the embedding and its logits scaled by hidden^-0.5 (Raffel et al.,
arXiv:1910.10683). `t5_v1_1`: gated GELU (Shazeer, arXiv:2002.05202), separate output weights, no scaling. Both:
relative position biases, RMSNorm before each block, no biases in linear layers, scores that are not scaled.
Letters in shapes: B samples, T input positions, S target positions, H hidden, V vocabulary. Functions import torch only when
they need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from common import config
from common.config import Layers, Positive, Section, Share
from common.data import batches
from common.errors import BadInput
from common.planning.memory import Traits
from common.planning.workload import Attention, Block, Workload

from . import samples

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedModel, T5Config

    from common.paths import Blend
    from common.training.init import Source

FAMILY = Path(__file__).parent.name  # a copied recipe is another family
HF_MODEL_TYPES = ("t5",)  # values of model_type in config.json


class Model(Section):
    """The architecture and its shapes."""

    arch: Literal["t5", "t5_v1_1"] = Field(
        default="t5_v1_1",
        description="T5 1.0: ReLU, tied output (arXiv:1910.10683). T5 1.1: gated GELU, untied output (arXiv:2002.05202).",
    )
    layers: Layers = Field(description="Layers of the encoder.")
    decoder_layers: Layers | None = Field(default=None, description="Layers of the decoder. Default: layers.")
    hidden: Positive = Field(description="Width of the residual stream.")
    heads: Positive = Field(description="Attention heads.")
    kv_channels: Positive | None = Field(default=None, description="Width of a head. Default: hidden / heads.")
    ffn: Positive | None = Field(
        default=None, description="Width of the MLP. Default: 4 x hidden; t5_v1_1: 8/3 x hidden rounded up to a multiple of 64."
    )
    vocab_size: Positive | None = Field(
        default=None,
        description="Rows of the embedding. Default: the number of the tokenizer's ids, rounded up to a multiple of 128.",
    )
    buckets: Annotated[int, Field(ge=4, lt=2**31)] = Field(default=32, description="Buckets of relative positions.")
    max_distance: Positive = Field(default=128, description="Distance in tokens beyond which all positions share a bucket.")
    dropout: Share = Field(default=0.0, description="Dropout of embedding, attention, MLP, residual and last norm.")
    norm_eps: Annotated[float, Field(gt=0)] = Field(default=1e-6, description="Epsilon of the norms.")

    def problems(self) -> Iterator[str]:
        if self.kv_channels is None and self.hidden % self.heads:
            yield f"model.hidden={self.hidden} is not a multiple of model.heads={self.heads}; give model.kv_channels"
        if self.max_distance <= self.buckets // 2:  # half of the buckets hold one distance each
            yield f"model.max_distance={self.max_distance}: must be above half of model.buckets={self.buckets}"

    def data_problems(self, data: config.Data) -> Iterator[str]:
        return iter(())  # relative positions have no table that could be too short

    def phase_problems(self, before: config.Data, after: config.Data) -> Iterator[str]:
        return iter(())

    def layout_problems(self, cfg: Config, stack: str) -> Iterator[str]:
        """Report each reason why the model cannot have the layout that the config gives for `stack`."""
        system = getattr(cfg, stack)
        tp, pp = getattr(system, "tp", 1), getattr(system, "pp", 1)
        if pp > 1 and stack == "deepspeed":
            yield (
                f"deepspeed.pp={pp}: a layer of DeepSpeed's pipeline sees only what the one before it returns, but every layer "
                "of T5's decoder reads the encoder's output, and every layer the first one's position bias; use "
                "deepspeed.pp=1 with deepspeed.zero_stage=2 or 3"
            )
        uneven = getattr(system, "pipeline_layout", "even") != "even"
        if stack == "megatron" and (pp > 1 or system.vpp > 1 or uneven):
            key = "pp" if pp > 1 else "vpp" if system.vpp > 1 else "pipeline_layout"
            yield (
                f"megatron.{key}={getattr(system, key)}: megatron-core no longer splits an encoder and a decoder over pipeline "
                "stages (removed from its schedules); use megatron.pp=1 and megatron.vpp=1 with megatron.tp, "
                "sequence_parallel and distributed_optimizer"
            )
        if getattr(system, "cp", 1) > 1:
            yield (
                f"megatron.cp={system.cp}: megatron-core's T5 cuts no sequence among ranks, and its relative biases are of "
                "whole sequences; use megatron.cp=1 with megatron.tp, sequence_parallel and distributed_optimizer"
            )
        if getattr(system, "transformer_engine", False):
            yield (
                "megatron.transformer_engine=true: T5's relative biases and norms are the recipe's own modules here; "
                "set it to false"
            )
        if stack == "deepspeed" and system.sp > 1:
            yield (
                f"deepspeed.sp={system.sp}: transformers computes T5's relative biases of all heads at one rank's positions, "
                "and Ulysses needs those of some heads at all positions; use deepspeed.sp=1"
            )
        if self.heads % tp:
            yield f"{stack}.tp={tp} does not divide model.heads={self.heads}"
        if self.resolved_ffn() % tp:
            yield f"{stack}.tp={tp} does not divide model.ffn={self.resolved_ffn()}"
        if getattr(system, "sequence_parallel", False):
            for name, length in (("seq_len", cfg.data.seq_len), ("target_len", cfg.data.target_len)):
                if length % tp:
                    yield f"{stack}.sequence_parallel=true: {stack}.tp={tp} does not divide data.{name}={length}"
        o, d = getattr(cfg, "objective", None), cfg.data  # finetuning has none
        if o and o.kind == "span" and not samples.too_short(o, d):
            raw = samples.raw_tokens(d.seq_len, o.noise_density, o.mean_noise_span_length)
            _, target = samples.lengths_of(raw, o.noise_density, o.mean_noise_span_length)
            if target > d.target_len:
                yield f"data.target_len={d.target_len}: spans of data.seq_len={d.seq_len} make {target} tokens; give {target}"

    def resolved_ffn(self) -> int:
        if self.ffn:
            return self.ffn
        return 4 * self.hidden if self.arch == "t5" else -(-8 * self.hidden // 3 // 64) * 64

    def filled(self, cfg: Config, tokenizer_size: int | None) -> dict[str, Any]:
        """All keys, with defaults where the config gives no value."""
        return self.model_dump() | {
            "decoder_layers": self.decoder_layers or self.layers,
            "kv_channels": self.kv_channels or self.hidden // self.heads,
            "ffn": self.resolved_ffn(),
            "vocab_size": config.vocabulary(self.vocab_size, tokenizer_size),
        }

    def resolve(self, cfg: Config, tokenizer_size: int | None) -> ResolvedModel:
        """This model with all defaults filled in. Raises BadInput if neither vocab_size nor a tokenizer is known."""
        return ResolvedModel(**self.filled(cfg, tokenizer_size))

    @property
    def gated(self) -> bool:
        return self.arch == "t5_v1_1"


class ResolvedModel(Model):
    """A model with all defaults filled in, as in the config.yaml of a run."""

    decoder_layers: Layers
    kv_channels: Positive
    ffn: Positive
    vocab_size: Positive

    def traits(self) -> Traits:
        """What takes memory in the layers (common/planning/memory.py)."""
        return Traits(rms_norm=True, relative_biases=True, inner_dropout=True, relu=not self.gated, python_gelu=self.gated)

    def workload(self, data: Data) -> Workload:
        """The shapes from which common/planning/step_time.py predicts the time of a step: encoder and decoder."""
        t, s, inner = data.seq_len, data.target_len, self.heads * self.kv_channels
        encoder = Block(
            count=self.layers, tokens=t, hidden=self.hidden, heads=self.heads, inner=inner, kv_inner=inner, ffn=self.ffn,
            gated=self.gated, attention=(Attention(t, t, causal=False),),
        )  # fmt: skip
        attention = (Attention(s, s, causal=True), Attention(s, t, causal=False))
        decoder = replace(encoder, count=self.decoder_layers, tokens=s, attention=attention)
        return Workload((encoder, decoder), self.vocab_size, s, tied=not self.gated)

    def _weights(self) -> tuple[int, int]:
        """Number of weights in the matrix products of an encoder layer and of a decoder layer."""
        attention = 4 * self.hidden * self.heads * self.kv_channels
        mlp = (3 if self.gated else 2) * self.hidden * self.ffn
        return attention + mlp, 2 * attention + mlp

    def parameter_count(self) -> int:
        """Number of parameters; tied weights count once. Equals the count on the meta device (tests/test_configs.py)."""
        encoder, decoder = self._weights()
        norms = 2 * self.layers + 3 * self.decoder_layers + 2
        tables = self.vocab_size * self.hidden * (2 if self.gated else 1)
        biases = 2 * self.buckets * self.heads  # one table for the encoder, one for the decoder
        return self.layers * encoder + self.decoder_layers * decoder + norms * self.hidden + tables + biases


class Data(config.Data):
    """Lengths, and how documents are turned into samples."""

    target_len: Positive = Field(description="Tokens of the target. Span corruption makes 114 of 512 input tokens.")
    pack: bool = Field(default=True, description="Running text: documents end to end. false: one document per sample.")

    @classmethod
    def phase_keys(cls) -> Set[str]:
        return {"seq_len", "target_len"}

    @property
    def sample_tokens(self) -> int:
        return self.seq_len + self.target_len


class Objective(Section):
    """How samples are made from running text. Corpora of pairs are used as they are (samples.py)."""

    kind: Literal["span", "prefix"] = Field(
        default="span", description="Span corruption, or prefix language modelling (arXiv:1910.10683, section 3)."
    )
    noise_density: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.15, description="span: share of the tokens that are replaced by sentinels."
    )
    mean_noise_span_length: Annotated[float, Field(ge=1)] = Field(
        default=3.0, description="span: mean length of a replaced span, in tokens."
    )

    renamed: ClassVar[dict[str, str]] = {"noise_share": "noise_density", "mean_span": "mean_noise_span_length"}

    @classmethod
    def phase_keys(cls) -> Set[str]:
        return cls.model_fields.keys()


class Config(config.Config):
    model: Model
    data: Data
    objective: Objective = Objective()


class ResolvedConfig(Config):
    """A config that has been checked, with its model resolved."""

    model: ResolvedModel


def dataset(cfg: Config, data: Blend, shuffle: bool, stack: str = "baseline") -> samples.Samples:
    """The samples of a blend of corpora, in the order of the run. With shuffle=False: in file order, for validation."""
    from common.data import tokenizer
    from common.data.indexed_dataset import IndexedDataset
    from common.paths import find, find_blend, first_prefix

    blend = find_blend(data)
    corpus = IndexedDataset(first_prefix(blend))
    folder = cfg.data.tokenizer or corpus.tokenizer_dir
    if folder is None:
        raise BadInput(f"{corpus.prefix}: its tokenizer is not known, so the sentinels are not either; give data.tokenizer=DIR")
    folder = find(str(folder)) if find(str(folder)).is_dir() else folder
    name = f"data.tokenizer={cfg.data.tokenizer}" if cfg.data.tokenizer else corpus.prefix
    return samples.open_dataset(cfg, blend, shuffle, tokenizer.load(folder), name)


def hf_config(model: ResolvedModel) -> T5Config:
    """The `transformers` configuration of a resolved model."""
    from transformers import T5Config

    base: dict[str, Any] = {"tie_word_embeddings": not model.gated, "decoder_start_token_id": 0}  # keys of PreTrainedConfig
    return T5Config(
        vocab_size=model.vocab_size, d_model=model.hidden, d_kv=model.kv_channels, d_ff=model.ffn, num_layers=model.layers,
        num_decoder_layers=model.decoder_layers, num_heads=model.heads, relative_attention_num_buckets=model.buckets,
        relative_attention_max_distance=model.max_distance, dropout_rate=model.dropout, layer_norm_epsilon=model.norm_eps,
        feed_forward_proj="gated-gelu" if model.gated else "relu", pad_token_id=0, eos_token_id=1, use_cache=False, **base,
    )  # fmt: skip


def hf_model(model: ResolvedModel) -> PreTrainedModel:
    """The `transformers` model that the baseline and DeepSpeed train, of the class that loads an export."""
    from . import modeling

    return (modeling.Untied if model.gated else modeling.Tied)(hf_config(model))


def hf_model_type(model: ResolvedModel) -> str:
    """`model_type` in a folder's config.json."""
    return "t5"


def hf_class_name(model: ResolvedModel) -> str:
    """The `transformers` class that loads an export."""
    return "T5ForConditionalGeneration"


def hf_config_overrides(model: ResolvedModel) -> dict[str, Any]:
    """The keys of an export's config.json whose values differ from those of hf_config: T5 has no bos token, and only 1.0 is
    tied. (transformers 5 would write that every T5 is tied, and other programs would believe it.)"""
    return {"bos_token_id": None, "tie_word_embeddings": not model.gated}


def parameter_shapes(model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: full shape}, shared weights once, read from the `transformers` class on the meta device."""
    import torch

    with torch.device("meta"):
        net = hf_model(model)
    return {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}


def initializer(model: ResolvedModel, name: str) -> float | str:
    """The initial value of a parameter: 'ones', or the standard deviation of a normal distribution.

    The values are those of Mesh TensorFlow's T5 and of transformers, except for the output weights of t5_v1_1, where they are
    those of t5x. (transformers uses the embedding's deviation of 1, with which the first loss is about sqrt(hidden) nats.)
    """
    if "layer_norm" in name:
        return "ones"
    if name == "shared.weight":
        return 1.0
    inner = model.heads * model.kv_channels
    if name.endswith("Attention.q.weight"):
        return (model.hidden * model.kv_channels) ** -0.5
    if name.endswith("Attention.o.weight"):
        return inner**-0.5
    if name.endswith("wo.weight"):
        return model.ffn**-0.5
    return model.hidden**-0.5  # k, v, wi, relative biases, lm_head


def has_weight_decay(name: str) -> bool:
    """Whether a parameter has weight decay: matrices and embeddings do, norms do not."""
    return "layer_norm" not in name


def make_batch(micro_batch: batches.MicroBatch, device: str | torch.device) -> dict[str, torch.Tensor]:
    """A micro batch of `dataset` -> inputs (B, T), targets (B, S), decoder_inputs (B, S), the padding id followed by the
    targets without the last one, attention_mask (B, T) bool, True for tokens, loss_mask (B, S)."""
    targets = micro_batch["targets"]
    start = np.zeros((len(targets), 1), np.int64)  # the decoder starts with the padding id, 0
    arrays = {name: micro_batch[name] for name in ("inputs", "targets", "loss_mask")}
    arrays["decoder_inputs"] = np.concatenate([start, targets[:, :-1]], 1)
    arrays["attention_mask"] = np.arange(micro_batch["inputs"].shape[1]) < micro_batch["input_lengths"][:, None]
    return batches.to_device(arrays, device)


def counts(micro_batches: Sequence[batches.MicroBatch]) -> list[int]:
    """[number of targets, number of input and target tokens without padding] in these micro batches."""
    return [batches.targets(micro_batches), batches.tokens(micro_batches)]


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arguments of the `transformers` class."""
    return {
        "input_ids": batch["inputs"], "attention_mask": batch["attention_mask"][:, None, None, :],
        "decoder_input_ids": batch["decoder_inputs"],
    }  # fmt: skip


def export_loss_sums(net: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss (1,) and number of targets (1,) of a batch, from an export in plain transformers. The loss has one part."""
    mask = batch["attention_mask"].long()
    logits = net(input_ids=batch["inputs"], attention_mask=mask, decoder_input_ids=batch["decoder_inputs"]).logits
    return loss_sum(logits, batch["targets"], batch["loss_mask"])[None], batch["loss_mask"].sum()[None]


def loss_sum(logits: torch.Tensor, targets: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Cross entropy in fp32, summed over the targets in loss_mask. logits (B, S, V) -> scalar."""
    from common.training.loss import cross_entropy

    losses = cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B x S,)
    return (losses * loss_mask.flatten()).sum()


def forward_backward_flops(model: ResolvedModel, data: Data) -> dict[str, float]:
    """FLOPs per token (of input and target together), forward and backward, without recomputation.

    Matrix products: 6 x the weights in them, for T tokens in the encoder, S in the decoder, and T in the decoder's keys
    and values of encoder positions. Attention: 12 x heads x kv_channels for each pair of positions: T x T, S x S and S x T
    (PaLM's count, arXiv:2204.02311, appendix B). causal: half of S x S.
    """
    t, s, inner = data.seq_len, data.target_len, model.heads * model.kv_channels
    encoder, decoder = model._weights()
    from_encoder = 2 * model.hidden * inner  # keys and values of the encoder's positions
    weights = model.layers * encoder * t + model.decoder_layers * ((decoder - from_encoder) * s + from_encoder * t)
    weights += model.vocab_size * model.hidden * s
    pairs = model.layers * t * t + model.decoder_layers * (s * s + s * t)
    half = model.decoder_layers * s * s / 2
    return {
        "full": (6.0 * weights + 12.0 * inner * pairs) / (t + s),
        "causal": (6.0 * weights + 12.0 * inner * (pairs - half)) / (t + s),
    }


def model_card(model: ResolvedModel) -> dict[str, Any]:
    """Entries of the model card that describe the architecture."""
    return {"architecture": model.arch, "parameters": f"{model.parameter_count():,}"}


# ---- Hugging Face folders that a run starts from (common/huggingface/hf_folder.py); nothing below imports torch

IGNORED_HF_KEYS = {  # keys of config.json that do not change the output -> why; hf_folder.NO_EFFECT has those of all families
    "dropout_rate": "the config gives model.dropout", "classifier_dropout": "for the head of T5ForSequenceClassification",
    "bos_token_id": "T5 uses decoder_start_token_id", "n_positions": "relative positions have no table",
}  # fmt: skip
IGNORED_HF_HEADS = ()  # prefixes of heads that a folder may contain, which are ignored
# patterns of tensors that are not parameters: a table of biases between encoder and decoder, which Mesh TensorFlow saved
HF_BUFFER_PATTERNS = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)


def normalized_hf_config(values: dict[str, Any]) -> dict[str, Any]:
    """A transformers configuration in which values with the same meaning are spelled alike."""
    return {"decoder_start_token_id": values.get("pad_token_id"), **values}


def parameter_patterns(model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    """As parameter_shapes, but without torch and with `*` in place of the layer number: {Hugging Face name: full shape}."""
    h, f, inner, table = model.hidden, model.ffn, model.heads * model.kv_channels, (model.vocab_size, model.hidden)
    patterns: dict[str, tuple[int, ...]] = {"shared.weight": table}
    if model.gated:
        patterns["lm_head.weight"] = table
    for stack, attentions in {"encoder": ("SelfAttention",), "decoder": ("SelfAttention", "EncDecAttention")}.items():
        patterns[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (model.buckets, model.heads)
        patterns[f"{stack}.final_layer_norm.weight"] = (h,)
        block = f"{stack}.block.*.layer"
        for number, attention in enumerate(attentions):
            patterns |= {f"{block}.{number}.{attention}.{one}.weight": (inner, h) for one in "qkv"}
            patterns[f"{block}.{number}.{attention}.o.weight"] = (h, inner)
        mlp = f"{block}.{len(attentions)}.DenseReluDense"
        patterns |= {f"{mlp}.{one}.weight": (f, h) for one in (("wi_0", "wi_1") if model.gated else ("wi",))}
        patterns[f"{mlp}.wo.weight"] = (h, f)
        patterns |= {f"{block}.{number}.layer_norm.weight": (h,) for number in range(len(attentions) + 1)}
    return patterns


def layer_count(model: ResolvedModel, pattern: str) -> int:
    """Number of layers that the `*` of a name in parameter_patterns stands for."""
    return model.decoder_layers if pattern.startswith("decoder.") else model.layers


def duplicate_names(model: ResolvedModel) -> dict[str, str]:
    """Names under which a folder may store a parameter a second time -> the name of that parameter."""
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *([] if model.gated else ["lm_head.weight"])]
    return dict.fromkeys(names, "shared.weight")


def model_from_hf_config(config: dict[str, Any]) -> ResolvedModel:
    """The `model` section for the config.json of a folder. Raises KeyError if a shape is missing."""
    return ResolvedModel(
        arch="t5_v1_1" if config.get("feed_forward_proj") == "gated-gelu" else "t5", layers=config["num_layers"],
        decoder_layers=config.get("num_decoder_layers") or config["num_layers"], hidden=config["d_model"],
        heads=config["num_heads"], kv_channels=config["d_kv"], ffn=config["d_ff"], vocab_size=config["vocab_size"],
        buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128), norm_eps=config.get("layer_norm_epsilon", 1e-6),
    )  # fmt: skip


def optional_prefixes(model: ResolvedModel) -> tuple[str, ...]:
    """Prefixes of heads that may be missing in the folder that a run starts from: none."""
    return ()


def new_head_prefixes(model: ResolvedModel) -> tuple[str, ...]:
    """Prefixes of heads that are always initialized from the seed: none in pretraining."""
    return ()


def head_problems(cfg: Config, shapes: Mapping[str, Sequence[int]], stored: dict[str, Any]) -> Iterator[str]:
    """Report problems with the task head in a folder: none, since pretraining has no task head."""
    return iter(())


def head_notes(cfg: Config, shapes: Mapping[str, Sequence[int]], stored: dict[str, Any]) -> Iterator[str]:
    """Notes for the user about the task head in a folder: none, since pretraining has no task head."""
    return iter(())


def reorder_labels(cfg: Config, folder: Path, source: Source) -> Source:
    """Return `source` unchanged: pretraining has no task head whose outputs could be in another order."""
    return source


def stored_names(name: str) -> list[str]:
    """The names under which a folder may store a parameter: its own, and for the embedding also its name in the encoder."""
    return [name, "encoder.embed_tokens.weight"] if name == "shared.weight" else [name]
