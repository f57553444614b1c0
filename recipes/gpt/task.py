"""The definition of GPT that all stacks share: shapes, parameter names, initial values, batch and loss.

Two architectures. `gpt2`: learned positions, LayerNorm, tanh GELU, biases, tied by default (Radford et al. 2019).
`llama`: rotary positions, RMSNorm, SwiGLU, grouped queries, no biases, untied by default (Touvron et al. 2023).
Letters in shapes: B samples, T positions, H hidden, V vocabulary. Functions import torch only when they need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from common import config
from common.config import Layers, Positive, Section, Share
from common.data import batches
from common.layout import sequence_problems
from common.planning.memory import Traits
from common.planning.workload import Attention, Block, Workload
from common.stacks import pipeline, stages

from .samples import Samples

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

    from common.paths import Blend
    from common.training.init import Source

FAMILY = Path(__file__).parent.name  # a copied recipe is another family
HF_MODEL_TYPES = ("gpt2", "llama")  # values of model_type in config.json


class Model(Section):
    """The architecture and its shapes."""

    arch: Literal["gpt2", "llama"] = Field(
        default="gpt2", description="GPT-2 (Radford et al. 2019) or Llama (arXiv:2302.13971)."
    )
    layers: Layers = Field(description="Transformer layers.")
    hidden: Positive = Field(description="Width of the residual stream.")
    heads: Positive = Field(description="Attention heads. The number must divide hidden.")
    kv_heads: Positive | None = Field(
        default=None,
        description="llama: key and value heads. The number must divide heads (arXiv:2305.13245). Default: heads.",
    )
    ffn: Positive | None = Field(
        default=None, description="Width of the MLP. Default: 4 x hidden; llama: 8/3 x hidden rounded up to a multiple of 128."
    )
    positions: Positive | None = Field(
        default=None, description="Rows of the position table: length of the longest sequence. Default: data.seq_len."
    )
    vocab_size: Positive | None = Field(
        default=None,
        description="Rows of the embedding. Default: the number of the tokenizer's ids, rounded up to a multiple of 128.",
    )
    tied: bool | None = Field(default=None, description="Use the embedding as output weights. Default: gpt2 true, llama false.")
    dropout: Share = Field(default=0.0, description="Dropout of embedding, attention and residual. llama: 0.")
    norm_eps: Annotated[float, Field(gt=0)] = Field(default=1e-5, description="Epsilon of the norms.")
    rope_theta: Annotated[float, Field(gt=0)] = Field(
        default=10000.0, description="llama: base of the rotary positions' wavelengths (arXiv:2104.09864)."
    )
    init_std: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.02,
        description="Standard deviation of the initial weights; divided by sqrt(2 x layers) for residual projections.",
    )

    def problems(self) -> Iterator[str]:
        if self.hidden % self.heads:
            yield f"model.hidden={self.hidden} is not a multiple of model.heads={self.heads}"
        if self.kv_heads and self.heads % self.kv_heads:
            yield f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}"
        if self.arch == "gpt2" and self.kv_heads not in (None, self.heads):
            yield f"model.kv_heads={self.kv_heads}: grouped queries need model.arch=llama"
        if self.arch == "gpt2" and self.tied is False:
            yield "model.tied=false: GPT2LMHeadModel always ties its output to its embedding; use model.arch=llama"
        if self.arch == "llama" and self.dropout:
            yield f"model.dropout={self.dropout}: LlamaForCausalLM has attention dropout only; use 0, or model.arch=gpt2"
        if self.arch == "llama" and self.hidden % self.heads == 0 and self.hidden // self.heads % 2:
            yield f"model.hidden / model.heads = {self.hidden // self.heads} is odd: rotary positions rotate pairs"

    def data_problems(self, data: config.Data) -> Iterator[str]:
        if self.positions is not None and self.positions < data.seq_len:
            yield (
                f"model.positions={self.positions} is below data.seq_len={data.seq_len}; "
                f"give data.seq_len={self.positions} or less"
            )

    def phase_problems(self, before: config.Data, after: config.Data) -> Iterator[str]:
        if after.seq_len != before.seq_len and self.positions is None:
            yield "data.seq_len changes; give model.positions, which all phases share"

    def layout_problems(self, cfg: Config, stack: str) -> Iterator[str]:
        """Report each reason why the model cannot have the layout that the config gives for `stack`."""
        system = getattr(cfg, stack)
        if getattr(system, "transformer_engine", False) and not find_spec("transformer_engine"):
            yield "megatron.transformer_engine=true: TransformerEngine is not installed; install it, or set it to false"
        if getattr(system, "transformer_engine", False) and system.cp > 1 and self.has_mask(cfg):
            yield (
                f"megatron.transformer_engine=true with megatron.cp={system.cp} and attention that restarts at each document: "
                "its ring takes no mask; set transformer_engine or data.reset_attention to false"
            )
        tp, sp = getattr(system, "tp", 1), getattr(system, "sp", 1)
        kv = self.kv_heads or self.heads
        if self.heads % sp or kv % sp or cfg.data.seq_len % sp:
            yield (
                f"{stack}.sp={sp} does not divide model.heads={self.heads}, model.kv_heads={kv} and "
                f"data.seq_len={cfg.data.seq_len}"
            )
        if self.heads % tp or kv % tp:
            yield f"{stack}.tp={tp} does not divide model.heads={self.heads} and model.kv_heads={kv}"
        if self.resolved_ffn() % tp:
            yield f"{stack}.tp={tp} does not divide model.ffn={self.resolved_ffn()}"
        if stack == "megatron":
            yield from pipeline.problems(self.layers, system)
        if stack == "deepspeed":
            yield from stages.problems(self.layers, system)
        yield from sequence_problems(cfg, stack)

    def has_mask(self, cfg: Any) -> bool:
        """Does make_batch give an attention_mask?"""
        restarts: bool = cfg.data.reset_attention
        return restarts

    def resolved_ffn(self) -> int:
        if self.ffn:
            return self.ffn
        return 4 * self.hidden if self.arch == "gpt2" else -(-8 * self.hidden // 3 // 128) * 128

    def filled(self, cfg: Config, tokenizer_size: int | None) -> dict[str, Any]:
        """All keys, with defaults where the config gives no value."""
        return self.model_dump() | {
            "kv_heads": self.kv_heads or self.heads,
            "ffn": self.resolved_ffn(),
            "positions": self.positions or cfg.data.seq_len,
            "vocab_size": config.vocabulary(self.vocab_size, tokenizer_size),
            "tied": self.arch == "gpt2" if self.tied is None else self.tied,
        }

    def resolve(self, cfg: Config, tokenizer_size: int | None) -> ResolvedModel:
        """This model with all defaults filled in. Raises BadInput if neither vocab_size nor a tokenizer is known."""
        return ResolvedModel(**self.filled(cfg, tokenizer_size))


class ResolvedModel(Model):
    """A model with all defaults filled in, as in the config.yaml of a run."""

    kv_heads: Positive
    ffn: Positive
    positions: Positive
    vocab_size: Positive
    tied: bool

    def traits(self) -> Traits:
        """What takes memory in the layers (common/planning/memory.py)."""
        return Traits(fused_qkv=True, biases=True) if self.arch == "gpt2" else Traits(rms_norm=True, rotary=True)

    def workload(self, data: config.Data) -> Workload:
        """The shapes from which common/planning/step_time.py predicts the time of a step."""
        block = Block(
            count=self.layers, tokens=data.seq_len, hidden=self.hidden, heads=self.heads, inner=self.hidden,
            kv_inner=self.hidden * self.kv_heads // self.heads, ffn=self.ffn, gated=self.arch == "llama",
            attention=(Attention(data.seq_len, data.seq_len, causal=True),),
        )  # fmt: skip
        table, positions, norm = self.vocab_size * self.hidden, 0, self.hidden
        if self.arch == "gpt2":
            positions, norm = self.positions * self.hidden, 2 * self.hidden
        return Workload((block,), self.vocab_size, data.seq_len, tied=self.tied, ends=(table + positions, norm + table))

    def parameter_count(self) -> int:
        """Number of parameters; tied weights count once. Equals the count on the meta device (tests/test_configs.py)."""
        h, f, v = self.hidden, self.ffn, self.vocab_size
        if self.arch == "gpt2":
            layer = 4 * h * h + 4 * h + 2 * h * f + f + h + 4 * h  # attention + biases, MLP + biases, two LayerNorms
            return self.layers * layer + v * h + self.positions * h + 2 * h
        kv = h * self.kv_heads // self.heads
        layer = 2 * h * h + 2 * h * kv + 3 * h * f + 2 * h
        return self.layers * layer + v * h * (1 if self.tied else 2) + h


class Data(config.Data):
    """How documents are turned into samples."""

    pack: bool = Field(
        default=True, description="Samples are windows over the stream of documents. false: one document per sample, padded."
    )
    eod_mask_loss: bool = Field(default=False, description="Do not learn to predict the first token of the next document.")
    reset_attention: bool = Field(default=False, description="Attention and positions restart at each document of a sample.")


class Config(config.Config):
    model: Model
    data: Data


class ResolvedConfig(Config):
    """A config that has been checked, with its model resolved."""

    model: ResolvedModel


def dataset(cfg: Config, data: Blend, shuffle: bool, stack: str = "baseline") -> Samples:
    """The samples of a blend of corpora, in the order of the run. With shuffle=False: in file order, for validation."""
    from common.paths import find_blend

    d = cfg.data
    masks = {"eod_mask_loss": d.eod_mask_loss, "reset_attention": d.reset_attention}
    eod_id = _eod_id(d.tokenizer) if d.tokenizer and any(masks.values()) else None
    return Samples(find_blend(data), d.seq_len, pack=d.pack, seed=cfg.train.seed, shuffle=shuffle, eod_id=eod_id, **masks)


def _eod_id(name_or_dir: str) -> int | None:
    """The end-of-document id of data.tokenizer. Corpora built by Megatron's own tool need it, since they have no manifest."""
    from common.data import tokenizer
    from common.paths import find

    return tokenizer.load(find(name_or_dir) if find(name_or_dir).is_dir() else name_or_dir).eod_id


def hf_config(model: ResolvedModel) -> PreTrainedConfig:
    """The `transformers` configuration."""
    return _gpt2_config(model) if model.arch == "gpt2" else _llama_config(model)


def _gpt2_config(model: ResolvedModel) -> GPT2Config:
    from transformers import GPT2Config

    base: dict[str, Any] = {"loss_type": "ForCausalLMLoss"}  # a key of PreTrainedConfig
    return GPT2Config(
        vocab_size=model.vocab_size, n_positions=model.positions, n_embd=model.hidden, n_layer=model.layers,
        n_head=model.heads, n_inner=model.ffn, activation_function="gelu_new", layer_norm_epsilon=model.norm_eps,
        resid_pdrop=model.dropout, embd_pdrop=model.dropout, attn_pdrop=model.dropout, initializer_range=model.init_std,
        bos_token_id=None, eos_token_id=None, use_cache=False, **base,
    )  # fmt: skip


def _llama_config(model: ResolvedModel) -> LlamaConfig:
    from transformers import LlamaConfig

    base: dict[str, Any] = {"rope_theta": model.rope_theta}  # becomes rope_parameters
    return LlamaConfig(
        vocab_size=model.vocab_size, max_position_embeddings=model.positions, hidden_size=model.hidden,
        intermediate_size=model.ffn, num_hidden_layers=model.layers, num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads, rms_norm_eps=model.norm_eps, tie_word_embeddings=model.tied,
        initializer_range=model.init_std, attention_bias=False, mlp_bias=False, bos_token_id=None, eos_token_id=None,
        use_cache=False, **base,
    )  # fmt: skip


def hf_model(model: ResolvedModel) -> PreTrainedModel:
    """The `transformers` model that the baseline and DeepSpeed train, of the class that loads an export."""
    from transformers import GPT2LMHeadModel, LlamaForCausalLM, masking_utils

    # looks for packed sequences in the positions of a batch without a mask, and waits for the GPU in every micro batch; here a
    # packed batch has a mask (model_inputs)
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    if model.arch != "gpt2":
        return LlamaForCausalLM(_llama_config(model))
    shapes = _gpt2_config(model)
    # computes gelu_new with one kernel instead of eight, and saves one tensor instead of four
    shapes.activation_function = "gelu_pytorch_tanh"
    return GPT2LMHeadModel(shapes)


def hf_config_overrides(model: ResolvedModel) -> dict[str, Any]:
    """The keys of an export's config.json whose values differ from those of hf_config: none."""
    return {}


def parameter_shapes(model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: full shape}, shared weights once, read from the `transformers` class on the meta device."""
    import torch

    with torch.device("meta"):
        net = hf_model(model)
    return {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}


def initializer(model: ResolvedModel, name: str) -> float | str:
    """The initial value of a parameter: 'zeros', 'ones', or the standard deviation of a normal distribution.

    GPT-2 section 2.3 and Megatron-LM (arXiv:1909.08053 section 5.1): residual projections are scaled by 1/sqrt(2 x layers).
    """
    if name.endswith(".bias"):
        return "zeros"
    if any(part in name for part in ("ln_", "norm")):
        return "ones"
    if name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight")):
        return model.init_std / (2 * model.layers) ** 0.5
    return model.init_std


def has_weight_decay(name: str) -> bool:
    """Whether a parameter has weight decay: matrices and embeddings do, biases and norms do not."""
    return not (name.endswith(".bias") or any(part in name for part in ("ln_", "norm")))


def make_batch(micro_batch: batches.MicroBatch, device: str | torch.device) -> dict[str, torch.Tensor]:
    """A micro batch of `dataset` -> inputs (B, T), targets (B, T), loss_mask (B, T). With data.reset_attention also
    position_ids (B, T) and attention_mask (B, 1, T, T), which is True where a query may see a key. With deepspeed.sp all but
    attention_mask are of T / sp positions, and position_ids are there."""
    names = ("tokens", "loss_mask", "segment", "position")
    on_device = batches.to_device({name: micro_batch[name] for name in names if name in micro_batch}, device)
    tokens = on_device["tokens"]
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": on_device["loss_mask"]}
    if "position" in on_device:
        batch["position_ids"] = on_device["position"]
    if "segment" in on_device:
        segment = on_device["segment"]
        same_document = segment[:, :, None] == segment[:, None, :]  # (B, T, T)
        batch["attention_mask"] = same_document.tril()[:, None]
    return batch


def counts(micro_batches: Sequence[batches.MicroBatch]) -> list[int]:
    """[number of targets, number of tokens without padding] in these micro batches."""
    return [batches.targets(micro_batches), batches.tokens(micro_batches)]


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The keyword arguments of the `transformers` class."""
    inputs = {"input_ids": batch["inputs"]}
    return inputs | {k: batch[k] for k in ("position_ids", "attention_mask") if k in batch}


def export_loss_sums(net: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss (1,) and number of targets (1,) of a batch, from an export in plain transformers. The loss has one part."""
    logits = net(**model_inputs(batch)).logits  # (B, T, V)
    return loss_sum(logits, batch["targets"], batch["loss_mask"])[None], batch["loss_mask"].sum()[None]


def loss_sum(logits: torch.Tensor, targets: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Cross entropy in fp32, summed over the targets in loss_mask. logits (B, T, V) -> scalar."""
    from common.training.loss import cross_entropy

    losses = cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B x T,)
    return (losses * loss_mask.flatten()).sum()


def forward_backward_flops(model: ResolvedModel, data: config.Data) -> dict[str, float]:
    """FLOPs per token, forward and backward, without recomputation, under both conventions for attention.

    Matrix products: 6 x the weights in them. Attention scores and values: 12 x layers x hidden x T when every pair is
    computed (PaLM, arXiv:2204.02311 appendix B; Megatron-LM, arXiv:2205.05198 appendix A), half of that when only the causal
    half is counted (as Megatron-LM's training.py does today).
    """
    h, kv = model.hidden, model.hidden * model.kv_heads // model.heads
    mlp = (2 if model.arch == "gpt2" else 3) * h * model.ffn
    weights = model.layers * (2 * h * h + 2 * h * kv + mlp) + model.vocab_size * h
    attention = 12.0 * model.layers * h * data.seq_len
    return {"full": 6.0 * weights + attention, "causal": 6.0 * weights + attention / 2}


def model_card(model: ResolvedModel) -> dict[str, Any]:
    """Entries of the model card that describe the architecture."""
    return {"architecture": model.arch, "parameters": f"{model.parameter_count():,}"}


# ---- Hugging Face folders that a run starts from (common/huggingface/hf_folder.py); nothing below imports torch

_BY_DROPOUT = "the config gives model.dropout"
_ID = "the tokenizer knows which ids are special"
IGNORED_HF_KEYS = {  # keys of config.json that do not change the output -> why; hf_folder.NO_EFFECT has those of all families
    "bos_token_id": _ID, "eos_token_id": _ID, "pad_token_id": _ID, "attn_pdrop": _BY_DROPOUT, "embd_pdrop": _BY_DROPOUT,
    "resid_pdrop": _BY_DROPOUT, "attention_dropout": _BY_DROPOUT, "summary_activation": "for the head of GPT2DoubleHeadsModel",
    "summary_first_dropout": "as summary_activation", "summary_proj_to_labels": "as summary_activation",
    "summary_type": "as summary_activation", "summary_use_proj": "as summary_activation",
    "n_ctx": "an older name of n_positions, which is there too", "max_sequence_length": "older max_position_embeddings",
    "max_position_embeddings": "rotary positions have no table; gpt2 has n_positions", "is_llama_config": "repeats model_type",
    "pretraining_tp": "older versions split a product into this many parts; the result is the same",
}  # fmt: skip
IGNORED_HF_HEADS = ()  # prefixes of heads that a folder may contain, which are ignored
HF_BUFFER_PATTERNS = (  # patterns of tensors that are not parameters: masks and tables that older versions saved
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)


def normalized_hf_config(values: dict[str, Any]) -> dict[str, Any]:
    """A transformers configuration in which values with the same meaning are spelled alike."""
    if "n_embd" in values:
        values["n_inner"] = 4 * values["n_embd"] if values["n_inner"] is None else values["n_inner"]
        if values["activation_function"] == "gelu_pytorch_tanh":
            values["activation_function"] = "gelu_new"
    # a key of SmolLM, which transformers does not read
    return values | {"rope_interleaved": values.get("rope_interleaved", False)}


def parameter_patterns(model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    """As parameter_shapes, but without torch and with `*` in place of the layer number: {Hugging Face name: full shape}."""
    h, f, v = model.hidden, model.ffn, model.vocab_size
    patterns: dict[str, tuple[int, ...]]
    if model.arch == "gpt2":
        patterns = {"transformer.wte.weight": (v, h), "transformer.wpe.weight": (model.positions, h)}
        products = {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h), "mlp.c_fc": (h, f), "mlp.c_proj": (f, h)}
        for part, shape in products.items():  # Conv1D: (in, out)
            patterns |= {f"transformer.h.*.{part}.weight": shape, f"transformer.h.*.{part}.bias": shape[1:]}
        norms = ("transformer.h.*.ln_1", "transformer.h.*.ln_2", "transformer.ln_f")
        return patterns | {f"{norm}.{leaf}": (h,) for norm in norms for leaf in ("weight", "bias")}
    kv = h * model.kv_heads // model.heads
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f),
        "input_layernorm": (h,), "post_attention_layernorm": (h,),
    }  # fmt: skip
    patterns = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    patterns |= {f"model.layers.*.{part}.weight": shape for part, shape in layer.items()}
    return patterns if model.tied else patterns | {"lm_head.weight": (v, h)}


def layer_count(model: ResolvedModel, pattern: str) -> int:
    """Number of layers that the `*` of a name in parameter_patterns stands for."""
    return model.layers


def duplicate_names(model: ResolvedModel) -> dict[str, str]:
    """Names under which a folder may store a parameter a second time -> the name of that parameter."""
    embedding = "transformer.wte.weight" if model.arch == "gpt2" else "model.embed_tokens.weight"
    return {"lm_head.weight": embedding} if model.tied else {}


def model_from_hf_config(config: dict[str, Any]) -> ResolvedModel:
    """The `model` section for the config.json of a folder. Raises KeyError if a shape is missing."""
    if config["model_type"] == "gpt2":
        hidden = config["n_embd"]
        return ResolvedModel(
            arch="gpt2", layers=config["n_layer"], hidden=hidden, heads=config["n_head"], kv_heads=config["n_head"],
            ffn=config.get("n_inner") or 4 * hidden, positions=config["n_positions"], vocab_size=config["vocab_size"],
            tied=True, norm_eps=config.get("layer_norm_epsilon", 1e-5),
        )  # fmt: skip
    rope = config.get("rope_parameters") or {}
    heads = config["num_attention_heads"]
    return ResolvedModel(
        arch="llama", layers=config["num_hidden_layers"], hidden=config["hidden_size"], heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads, ffn=config["intermediate_size"],
        positions=config["max_position_embeddings"], vocab_size=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False), norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
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
    """The names under which a folder may store a parameter: its own, and its name in a model saved without a head."""
    return [name, name.removeprefix("transformer.").removeprefix("model.")]


def hf_model_type(model: ResolvedModel) -> str:
    """`model_type` in a folder's config.json."""
    return model.arch


def hf_class_name(model: ResolvedModel) -> str:
    """The `transformers` class that loads an export."""
    return "GPT2LMHeadModel" if model.arch == "gpt2" else "LlamaForCausalLM"
