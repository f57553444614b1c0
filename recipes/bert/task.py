"""The definition of BERT that all stacks share: shapes, parameter names, initial values, batch and loss.

Two architectures, with their names in transformers. `bert`: the original, with norms after the blocks (Devlin et al. 2018).
`megatron-bert`: Megatron-LM's, with a norm before each block and one at the end. Only this one stays stable at 1.3B
parameters and more (arXiv:1909.08053, section 5.3). Both have an MLM head tied to the embedding. Objectives with pairs add a
pair head.
Letters in shapes: B samples, T positions, H hidden, V vocabulary, N masked positions of a batch, P parts of the loss (1 or 2).
Functions import torch only when they need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from common import config
from common.config import Layers, Positive, Section, Share
from common.data import batches
from common.errors import BadInput
from common.layout import sequence_problems
from common.planning.memory import Traits
from common.planning.workload import Attention, Block, Workload
from common.stacks import pipeline, stages

from . import samples

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from common.paths import Blend
    from common.training.init import Source

FAMILY = Path(__file__).parent.name  # a copied recipe is another family
HF_MODEL_TYPES = ("bert", "megatron-bert")  # values of model_type in config.json


class Model(Section):
    """The architecture and its shapes."""

    arch: Literal["megatron-bert", "bert"] = Field(
        default="megatron-bert",
        description="Norms after the blocks (bert, arXiv:1810.04805) or before them (megatron-bert, arXiv:1909.08053).",
    )
    layers: Layers = Field(description="Transformer layers.")
    hidden: Positive = Field(description="Width of the residual stream.")
    heads: Positive = Field(description="Attention heads. The number must divide hidden.")
    ffn: Positive | None = Field(default=None, description="Width of the MLP. Default: 4 x hidden.")
    positions: Positive | None = Field(
        default=None, description="Rows of the position table: length of the longest sequence. Default: data.seq_len."
    )
    vocab_size: Positive | None = Field(
        default=None,
        description="Rows of the embedding. Default: the number of the tokenizer's ids, rounded up to a multiple of 128.",
    )
    pair_head: bool | None = Field(
        default=None, description="Pooler and head for pairs of sentences. Default: as objective.pair needs them."
    )
    dropout: Share = Field(default=0.0, description="Dropout of embedding, attention and residual.")
    norm_eps: Annotated[float, Field(gt=0)] = Field(default=1e-12, description="Epsilon of the norms.")
    init_std: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.02,
        description="Standard deviation of initial weights; megatron-bert: divided by sqrt(2 x layers) in residual outputs.",
    )

    def problems(self) -> Iterator[str]:
        if self.hidden % self.heads:
            yield f"model.hidden={self.hidden} is not a multiple of model.heads={self.heads}"

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
        yield from self.head_problems(cfg)
        if getattr(system, "transformer_engine", False) and self.arch == "bert":
            yield "megatron.transformer_engine=true with model.arch=bert: it has no post-norm layers; set it to false"
        if getattr(system, "transformer_engine", False) and system.cp > 1:
            yield (
                f"megatron.transformer_engine=true with megatron.cp={system.cp}: its ring has no mask of padding; set "
                "transformer_engine to false"
            )
        if stack == "deepspeed" and system.sp > 1:
            yield (
                f"deepspeed.sp={system.sp}: BERT's heads read the first token and the masked ones, which a rank that has a "
                "part of each sample may lack; use deepspeed.sp=1"
            )
        if getattr(system, "transformer_engine", False) and not find_spec("transformer_engine"):
            yield "megatron.transformer_engine=true: TransformerEngine is not installed; install it, or set it to false"
        tp = getattr(system, "tp", 1)
        if self.heads % tp:
            yield f"{stack}.tp={tp} does not divide model.heads={self.heads}"
        if self.resolved_ffn() % tp:
            yield f"{stack}.tp={tp} does not divide model.ffn={self.resolved_ffn()}"
        if stack == "megatron":
            yield from pipeline.problems(self.layers, system)
        if stack == "deepspeed":
            yield from stages.problems(self.layers, system)
        yield from sequence_problems(cfg, stack)

    def head_problems(self, cfg: Config) -> Iterator[str]:
        if self.pair_head is False and cfg.objective.pair != "none":
            yield f"model.pair_head=false with objective.pair={cfg.objective.pair}: they contradict each other; change one"
        if self.pair_head and cfg.objective.pair == "none":
            yield "model.pair_head=true with objective.pair=none: the head would get no gradient; give model.pair_head=false"

    @property
    def classifier(self) -> str:
        """The linear layer that Megatron calls binary_head. Here it is the pair head, in finetuning the head of the task."""
        return "cls.seq_relationship"

    def resolved_ffn(self) -> int:
        return self.ffn or 4 * self.hidden

    def filled(self, cfg: Config, tokenizer_size: int | None) -> dict[str, Any]:
        """All keys, with defaults where the config gives no value."""
        return self.model_dump() | {
            "ffn": self.resolved_ffn(),
            "positions": self.positions or cfg.data.seq_len,
            "vocab_size": config.vocabulary(self.vocab_size, tokenizer_size),
            "pair_head": cfg.objective.pair != "none" if self.pair_head is None else self.pair_head,
        }

    def resolve(self, cfg: Config, tokenizer_size: int | None) -> ResolvedModel:
        """This model with all defaults filled in. Raises BadInput if neither vocab_size nor a tokenizer is known."""
        return ResolvedModel(**self.filled(cfg, tokenizer_size))


class ResolvedModel(Model):
    """A model with all defaults filled in, as in the config.yaml of a run."""

    ffn: Positive
    positions: Positive
    vocab_size: Positive
    pair_head: bool

    def traits(self) -> Traits:
        """What takes memory in the layers (common/planning/memory.py)."""
        return Traits(biases=True)

    def workload(self, data: config.Data) -> Workload:
        """The shapes from which common/planning/step_time.py predicts the time of a step."""
        block = Block(
            count=self.layers, tokens=data.seq_len, hidden=self.hidden, heads=self.heads, inner=self.hidden,
            kv_inner=self.hidden, ffn=self.ffn, gated=False, attention=(Attention(data.seq_len, data.seq_len, causal=False),),
        )  # fmt: skip
        h, v = self.hidden, self.vocab_size
        embedding = (v + self.positions + 2) * h + (2 * h if self.arch == "bert" else 0)
        rest = self.parameter_count() - self.layers * self.layer_parameters() - embedding  # heads, pooler, norm
        return Workload((block,), v, MASK_SHARE * data.seq_len, head_matrices=h**2, ends=(embedding, rest + v * h))

    def layer_parameters(self) -> int:
        """Parameters of an encoder layer."""
        h, f = self.hidden, self.ffn
        return 4 * h * h + 4 * h + 2 * h * f + f + h + 4 * h  # attention + biases, MLP + biases, two LayerNorms

    def parameter_count(self) -> int:
        """Number of parameters; tied weights count once. Equals the count on the meta device (tests/test_configs.py)."""
        h, v = self.hidden, self.vocab_size
        tables_and_norm = (v + self.positions + 2) * h + 2 * h  # the norm of either architecture
        encoder = self.layers * self.layer_parameters() + tables_and_norm
        mlm_head = h * h + h + 2 * h + v
        pair_head = h * h + h + 2 * h + 2 if self.pair_head else 0
        return encoder + mlm_head + pair_head


MASK_SHARE = 0.15


class Objective(Section):
    """Masked language modelling, and the sentence-pair task."""

    pair: Literal["nsp", "sop", "none"] = Field(
        default="nsp",
        description="Next sentence (arXiv:1810.04805), sentence order (arXiv:1909.11942) or full sentences (arXiv:1907.11692).",
    )
    masking: Literal["token", "whole_word", "ngram"] = Field(
        default="token", description="What is masked together: single tokens, the tokens of a word, or up to three words."
    )
    masked_lm_prob: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=MASK_SHARE, description="Share of the tokens that are predicted (arXiv:1810.04805, section 3.1)."
    )
    short_seq_prob: Share = Field(
        default=0.1,
        description="Share of the samples with a random length of 2 tokens or more (BERT's create_pretraining_data.py).",
    )

    renamed: ClassVar[dict[str, str]] = {"mask_share": "masked_lm_prob", "short_share": "short_seq_prob"}

    @classmethod
    def phase_keys(cls) -> Set[str]:
        return cls.model_fields.keys()


class Config(config.Config):
    model: Model
    data: config.Data  # seq_len: tokens of a sample, with [CLS] and [SEP]
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
        raise BadInput(
            f"{corpus.prefix}: its tokenizer is not known, so [MASK] and [SEP] are not either; give data.tokenizer=DIR"
        )
    folder = find(str(folder)) if find(str(folder)).is_dir() else folder
    return samples.open_dataset(cfg, blend, shuffle, tokenizer.load(folder), corpus.prefix)


def hf_config(model: ResolvedModel) -> PreTrainedConfig:
    """The `transformers` configuration of a resolved model.

    pad_token_id is None. Otherwise the classes would drop the gradient of that id in the embedding, unlike Megatron. Nothing
    else changes, since the loss leaves out padding. An export has the id of its tokenizer.
    """
    from transformers import BertConfig, MegatronBertConfig

    return BertConfig(**_hf_shapes(model)) if model.arch == "bert" else MegatronBertConfig(**_hf_shapes(model))


def _hf_shapes(model: ResolvedModel) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size, "max_position_embeddings": model.positions, "hidden_size": model.hidden,
        "intermediate_size": model.ffn, "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
        "type_vocab_size": 2, "hidden_act": "gelu", "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout, "layer_norm_eps": model.norm_eps,
        "initializer_range": model.init_std, "pad_token_id": None,
    }  # fmt: skip


def hf_model(model: ResolvedModel) -> PreTrainedModel:
    """The model that the baseline and DeepSpeed train (modeling.py), whose MLM head is applied to masked positions only."""
    from transformers import BertConfig, MegatronBertConfig

    from . import modeling as m

    if model.arch == "bert":
        return (m.PairedBert if model.pair_head else m.SingleBert)(BertConfig(**_hf_shapes(model)))
    return m.use_sdpa(
        (m.PairedMegatronBert if model.pair_head else m.SingleMegatronBert)(MegatronBertConfig(**_hf_shapes(model)))
    )


def hf_model_type(model: ResolvedModel) -> str:
    """`model_type` in a folder's config.json."""
    return model.arch


def hf_class_name(model: ResolvedModel) -> str:
    """The `transformers` class that loads an export."""
    return ("Bert" if model.arch == "bert" else "MegatronBert") + ("ForPreTraining" if model.pair_head else "ForMaskedLM")


def hf_config_overrides(model: ResolvedModel) -> dict[str, Any]:
    """The keys of an export's config.json whose values differ from those of hf_config: none."""
    return {}


def parameter_shapes(model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: full shape}, shared weights once, read from the `transformers` class on the meta device."""
    import torch

    with torch.device("meta"):
        net = hf_model(model)
    return {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}


def _is_norm(name: str) -> bool:
    return "LayerNorm" in name or ".ln." in name


def initializer(model: ResolvedModel, name: str) -> float | str:
    """The initial value of a parameter: 'zeros', 'ones', or the standard deviation of a normal distribution.

    BERT's code truncates the normal distribution at two deviations. Here, as in transformers and Megatron, it is not truncated.
    megatron-bert: residual projections are scaled by 1/sqrt(2 x layers) (Megatron-LM, arXiv:1909.08053, section 5.1).
    """
    if name.endswith(".bias"):
        return "zeros"
    if _is_norm(name):
        return "ones"
    if model.arch == "megatron-bert" and ".layer." in name and name.endswith("output.dense.weight"):
        return model.init_std / (2 * model.layers) ** 0.5
    return model.init_std


def has_weight_decay(name: str) -> bool:
    """Whether a parameter has weight decay: matrices and embeddings do, biases and norms do not."""
    return not (name.endswith(".bias") or _is_norm(name))


def loss_names(cfg: Config) -> tuple[str, ...]:
    """Names of the parts of the loss (masked tokens, pairs). Each part is a mean over its own targets."""
    return ("mlm",) if cfg.objective.pair == "none" else ("mlm", cfg.objective.pair)


def counts(micro_batches: Sequence[batches.MicroBatch]) -> list[int]:
    """[number of targets of each part of the loss, ..., number of tokens without padding] in these micro batches."""
    masks = [mask for mask in ("mlm_mask", "pair_mask") if mask in micro_batches[0]]
    return [*(batches.targets(micro_batches, mask) for mask in masks), batches.tokens(micro_batches)]


def make_batch(micro_batch: batches.MicroBatch, device: str | torch.device) -> dict[str, torch.Tensor]:
    """A micro batch of `dataset` -> tokens, token_types (B, T), attention_mask (B, T) bool, predicted (N,) indices of the
    masked positions in the flattened batch, labels (N,). With pairs also pair_label (B,) and pair_mask (B,) bool."""
    predicted = np.flatnonzero(micro_batch["mlm_mask"])
    names = ("tokens", "token_types", "pair_label", "pair_mask")
    arrays: batches.MicroBatch = {name: micro_batch[name] for name in names if name in micro_batch}
    arrays["attention_mask"] = np.arange(micro_batch["tokens"].shape[1]) < micro_batch["lengths"][:, None]
    arrays |= {"predicted": predicted, "labels": micro_batch["labels"].reshape(-1)[predicted]}
    return batches.to_device(arrays, device)


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arguments of the classes in modeling.py."""
    same = {name: batch[name] for name in ("attention_mask", "predicted")}
    return {"input_ids": batch["tokens"], "token_type_ids": batch["token_types"]} | same


def loss_sums(mlm: torch.Tensor, pairs: torch.Tensor | None, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (N, V) of the masked positions and (B, 2) of the pairs -> (2, P): summed cross entropies in fp32, and numbers of
    correct predictions."""
    import torch

    from common.training.loss import cross_entropy

    labels = batch["labels"]
    loss, right = cross_entropy(mlm, labels).sum(), (mlm.argmax(-1) == labels).sum()
    sums = torch.stack([loss, right.to(loss)])[:, None]  # (2, 1)
    return sums if pairs is None else torch.cat([sums, pair_sums(pairs, batch)[:, None]], 1)


def pair_sums(pairs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (B, 2) of the pairs -> (2,): summed cross entropy, and number of correct predictions."""
    import torch
    import torch.nn.functional as F

    label, mask = batch["pair_label"], batch["pair_mask"]
    loss = (F.cross_entropy(pairs.float(), label, reduction="none") * mask).sum()
    return torch.stack([loss, ((pairs.argmax(-1) == label) & mask).sum().to(loss)])


def export_loss_sums(net: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed losses (P,) and numbers of targets (P,) of a batch, from an export in plain transformers."""
    import torch

    out = net(batch["tokens"], token_type_ids=batch["token_types"], attention_mask=batch["attention_mask"].long())
    logits = out.prediction_logits if "prediction_logits" in out else out.logits  # (B, T, V)
    pairs = out.seq_relationship_logits if "seq_relationship_logits" in out else None
    sums = loss_sums(logits.flatten(0, 1)[batch["predicted"]], pairs, batch)[0]
    targets = [len(batch["labels"])] + ([int(batch["pair_mask"].sum())] if "pair_mask" in batch else [])
    return sums, torch.tensor(targets, device=sums.device)


def named_losses(cfg: Config, values: list[float]) -> tuple[float, dict[str, float]]:
    """The 2 x P means of `loss_sums`, flattened -> the loss, and losses and accuracies by their names in the log."""
    names = loss_names(cfg)
    losses, right = values[: len(names)], values[len(names) :]
    named = {f"{name}_loss": value for name, value in zip(names, losses, strict=True)}
    return sum(losses), named | {f"{name}_accuracy": value for name, value in zip(names, right, strict=True)}


def forward_backward_flops(model: ResolvedModel, data: config.Data) -> dict[str, float]:
    """FLOPs per token, forward and backward, without recomputation: 6 x weights in matrix products + 12 x layers x hidden x T
    for attention (Megatron-LM, arXiv:2205.05198, appendix A). The MLM head counts only for the masked positions (15 %)."""
    h = model.hidden
    weights = model.layers * (4 * h * h + 2 * h * model.ffn) + MASK_SHARE * (h * h + model.vocab_size * h)
    return {"full": 6.0 * weights + 12.0 * model.layers * h * data.seq_len}


def model_card(model: ResolvedModel) -> dict[str, Any]:
    """Entries of the model card that describe the architecture."""
    return {"architecture": model.arch, "parameters": f"{model.parameter_count():,}"}


# ---- Hugging Face folders that a run starts from (common/huggingface/hf_folder.py); nothing below imports torch

_BY_DROPOUT = "the config gives model.dropout"
_ID = "the tokenizer knows which ids are special"
_TENSORFLOW = "from the first release, in TensorFlow; transformers never read it"
IGNORED_HF_KEYS = {  # keys of config.json that do not change the output -> why; hf_folder.NO_EFFECT has those of all families
    "bos_token_id": _ID, "eos_token_id": _ID, "pad_token_id": _ID, "sep_token_id": _ID, "cls_token_id": _ID,
    "hidden_dropout_prob": _BY_DROPOUT, "attention_probs_dropout_prob": _BY_DROPOUT, "classifier_dropout": _BY_DROPOUT,
    "directionality": _TENSORFLOW, "pooler_fc_size": _TENSORFLOW, "pooler_num_attention_heads": _TENSORFLOW,
    "pooler_num_fc_layers": _TENSORFLOW, "pooler_size_per_head": _TENSORFLOW, "pooler_type": _TENSORFLOW,
}  # fmt: skip
# prefixes of heads that a folder may contain, which are ignored: of pretraining, and of finetuned models
IGNORED_HF_HEADS = ("cls.predictions.", "cls.seq_relationship.", "bert.pooler.", "pooler.", "classifier.", "qa_outputs.")
# patterns of tensors that are not parameters: the numbers 0, 1, 2, ...
HF_BUFFER_PATTERNS = (r"(bert\.)?embeddings\.(position_ids|token_type_ids)",)


def normalized_hf_config(values: dict[str, Any]) -> dict[str, Any]:
    """A transformers configuration in which values with the same meaning are spelled alike."""
    return {"position_embedding_type": "absolute", **values}  # the only value that the classes still support


def parameter_patterns(model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    """As parameter_shapes, but without torch and with `*` in place of the layer number: {Hugging Face name: full shape}."""
    h = model.hidden
    patterns = encoder_tensors(model, pooled=bool(model.pair_head))
    patterns |= named_linear("cls.predictions.transform.dense", h, h) | named_norm("cls.predictions.transform.LayerNorm", h)
    patterns["cls.predictions.bias"] = (model.vocab_size,)
    return patterns | (named_linear("cls.seq_relationship", h, 2) if model.pair_head else {})


def encoder_tensors(model: ResolvedModel, pooled: bool) -> dict[str, tuple[int, ...]]:
    """As parameter_patterns, without the heads."""
    h, f = model.hidden, model.ffn
    tables = {"word_embeddings": model.vocab_size, "position_embeddings": model.positions, "token_type_embeddings": 2}
    patterns: dict[str, tuple[int, ...]] = {f"bert.embeddings.{name}.weight": (size, h) for name, size in tables.items()}
    layer = "bert.encoder.layer.*."
    for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
        patterns |= named_linear(layer + part, h, h)
    patterns |= named_linear(f"{layer}intermediate.dense", h, f) | named_linear(f"{layer}output.dense", f, h)
    norms = {"bert": ("bert.embeddings.LayerNorm", f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"),
             "megatron-bert": (f"{layer}attention.ln", f"{layer}ln", "bert.encoder.ln")}  # fmt: skip
    for norm in norms[model.arch]:
        patterns |= named_norm(norm, h)
    return patterns | (named_linear("bert.pooler.dense", h, h) if pooled else {})


def named_linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def named_norm(name: str, hidden: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}


def layer_count(model: ResolvedModel, pattern: str) -> int:
    """Number of layers that the `*` of a name in parameter_patterns stands for."""
    return model.layers


def duplicate_names(model: ResolvedModel) -> dict[str, str]:
    """Names under which a folder may store a parameter a second time -> the name of that parameter."""
    decoder = {"weight": "bert.embeddings.word_embeddings.weight", "bias": "cls.predictions.bias"}
    return {f"cls.predictions.decoder.{leaf}": name for leaf, name in decoder.items()}


def model_from_hf_config(config: dict[str, Any]) -> ResolvedModel:
    """The `model` section for the config.json of a folder. Raises KeyError if a shape is missing."""
    return ResolvedModel(
        arch=config["model_type"], layers=config["num_hidden_layers"], hidden=config["hidden_size"],
        heads=config["num_attention_heads"], ffn=config["intermediate_size"], positions=config["max_position_embeddings"],
        vocab_size=config["vocab_size"], norm_eps=config.get("layer_norm_eps", 1e-12),
        pair_head=not str(config.get("architectures")).endswith("ForMaskedLM']"),
    )  # fmt: skip


def optional_prefixes(model: ResolvedModel) -> tuple[str, ...]:
    """Prefixes of heads that may be missing in the folder that a run starts from. They are initialized from the seed."""
    return "cls.predictions.", *(("cls.seq_relationship.", "bert.pooler.") if model.pair_head else ())


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
    """The names under which a folder may store a parameter: its own, its name in an encoder saved without heads, and both with
    TensorFlow's names of norms (google-bert/bert-base-uncased)."""
    known = [name, name.removeprefix("bert.")]
    older = [n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for n in known]
    return known + older
