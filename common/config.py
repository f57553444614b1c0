"""A run's configuration: the schema of its sections, and the rules between their keys. Torch-free, so it is checked at once.

`model`, `data`, `optim`, `train` and `init` are hyperparameters: they decide the loss. `baseline`, `deepspeed` and `megatron`
are systems: nothing in them may change it. All problems are reported together.
"""

import copy
import difflib
import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)

from common.errors import BadInput, shortened
from common.stacks import extra, pipeline
from common.yaml_files import apply_overrides, read_yaml, to_yaml

if TYPE_CHECKING:
    from common.training.lora import Adapters

STACKS = ("baseline", "deepspeed", "megatron")

Positive = Annotated[int, Field(gt=0, lt=2**31)]  # steps x samples, the largest product, is below 2^63
Count = Annotated[int, Field(ge=0, lt=2**31)]
Layers = Annotated[int, Field(gt=0, le=10_000)]  # each is a module that every rank builds; 10,000 take it 10 s
Share = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, Field(min_length=1)]


def _path(value: str) -> str:
    """A path that can be printed, and has no NUL. common/paths.py bounds its length."""
    if any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in value):
        raise ValueError("must be a path without control characters")
    return value


FilePath = Annotated[str, Field(min_length=1), AfterValidator(_path), WithJsonSchema({"format": "path"})]


def _line(value: str) -> str:
    """One line that can be printed."""
    if not value.isprintable():
        raise ValueError("must be one line without control characters")
    return value


def _corpus_command(value: str) -> str:
    """A command that builds a corpus: `python -m data.NAME FOLDER [options]`."""
    _line(value)
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise ValueError(f"is not a command: {error}") from None
    if words[:2] != ["python", "-m"] or len(words) < 4 or not re.fullmatch(r"data\.\w+", words[2]) or words[3].startswith("-"):
        raise ValueError("must be a command that makes a corpus: python -m data.NAME FOLDER [options]")
    return value


def _blend(value: Any) -> str | list[Any]:
    """A prefix, a list of prefixes, or a list of [weight, prefix]."""

    def prefix(entry: Any) -> bool:
        return isinstance(entry, str) and bool(entry)

    def weighted(entry: Any) -> bool:
        if not (isinstance(entry, list) and len(entry) == 2 and prefix(entry[1])):
            return False
        weight = entry[0]
        return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf

    if prefix(value) or isinstance(value, list) and value and (all(map(prefix, value)) or all(map(weighted, value))):
        for entry in value if isinstance(value, list) else [value]:
            _path(entry[1] if isinstance(entry, list) else entry)
        return value
    raise ValueError("must be a prefix, a list of prefixes, or a list of [weight above 0, prefix]")


CheckedBlend = Annotated[str | list[Any], PlainValidator(_blend), WithJsonSchema({"format": "prefix or blend"})]


def _partition(value: Any) -> str | list[int]:
    """`parameters`, `uniform`, or the layers of each stage."""
    if value in ("parameters", "uniform") or isinstance(value, list) and value and all(type(n) is int and n > 0 for n in value):
        return value
    raise ValueError("must be parameters, uniform, or a list of the layers of each stage, 1 or more")


Partition = Annotated[str | list[int], PlainValidator(_partition), WithJsonSchema({"format": "parameters, uniform or a list"})]


class Section(BaseModel):
    """The keys of one section. Unknown keys and silent conversions ('4' for 4) are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
    renamed: ClassVar[dict[str, str]] = {}  # keys of earlier versions -> their names now
    absent: ClassVar[dict[str, Any]] = {}  # keys that earlier versions lacked -> the value that is what they did

    @classmethod
    def resume_keys(cls) -> Set[str]:
        """The keys that a continued run may change: they do not make it another run."""
        return set()

    @classmethod
    def phase_keys(cls) -> Set[str]:
        """The keys that a phase may change."""
        return set()


class Data(Section):
    """What the run reads. A family may add keys of its own."""

    train: CheckedBlend = Field(
        description="Training corpus: the prefix of a .bin and an .idx file, a list of prefixes, or a list of "
        "[weight, prefix], where the weights are relative shares of the samples."
    )
    valid: FilePath | None = Field(default=None, description="Validation corpus, a prefix. Default: no validation.")
    seq_len: Positive = Field(description="Tokens per sample.")
    tokenizer: FilePath | None = Field(
        default=None,
        description="Tokenizer: a folder or a Hugging Face folder. Default: the tokenizer that the corpus was made with.",
    )

    @classmethod
    def resume_keys(cls) -> Set[str]:
        return {"train", "valid", "tokenizer"}  # paths: their contents are compared

    @classmethod
    def phase_keys(cls) -> Set[str]:
        return {"seq_len"}

    @property
    def sample_tokens(self) -> int:
        """Tokens that a full sample has."""
        return self.seq_len


class Lamb(Section):
    """The settings of optim.optimizer=lamb (You et al., arXiv:1904.00962)."""

    min_coeff: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Lower bound of the trust ratio.")
    max_coeff: Annotated[float, Field(gt=0)] = Field(default=10.0, description="Upper bound of the trust ratio.")
    bias_correction: bool = Field(default=True, description="Divide the moments by 1 - beta^step, as Adam does.")


class Optim(Section):
    """The optimizer and the learning rate of each step."""

    optimizer: Literal["adamw", "lamb", "adafactor"] = Field(
        default="adamw", description="AdamW (arXiv:1711.05101), LAMB (arXiv:1904.00962) or Adafactor (arXiv:1804.04235)."
    )
    lr: Annotated[float, Field(gt=0)] = Field(description="Highest learning rate.")
    min_lr: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Learning rate at the end of the decay.")
    warmup_steps: Count = Field(
        default=0, description="Steps in which the rate rises from 0 to lr, linearly (exponential: by the square)."
    )
    decay_steps: Positive | None = Field(
        default=None,
        description="Steps, warmup included, until the rate is min_lr. Default: all steps that the first start asks for.",
    )
    schedule: Literal["cosine", "linear", "constant", "exponential", "inverse_sqrt", "wsd"] = Field(
        default="cosine",
        description="Form of the decay: SGDR's cosine (arXiv:1608.03983), DeepSpeed's exponential (its BERT recipe), T5's "
        "inverse square root (arXiv:1910.10683), MiniCPM's warmup, stable, decay (wsd, arXiv:2404.06395), linear, or none.",
    )
    wsd_decay_steps: Positive | None = Field(
        default=None, description="wsd: the last of the decay_steps, in which the rate falls."
    )
    wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = Field(
        default="exponential", description="wsd: form of the fall, named as in Megatron-LM."
    )
    decay_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.9, description="exponential: factor of lr - min_lr per decay_interval."
    )
    decay_interval: Positive = Field(default=250, description="exponential: steps per factor of decay_rate.")
    begin_step: Count = Field(default=0, description="In a later phase: the step after which its schedule begins.")
    lamb: Lamb = Lamb()
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Decoupled weight decay of matrices and embeddings. Biases and norms have none."
    )
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.999], description="Decay rates of the two moments, each from 0 to below 1. Adafactor has none."
    )
    eps: Annotated[float, Field(gt=0)] = Field(
        default=1e-8, description="Added to the root of the second moment (AdamW, LAMB)."
    )
    grad_clip: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Largest global norm of the gradient; 0: no clipping."
    )

    @classmethod
    def phase_keys(cls) -> Set[str]:
        return cls.model_fields.keys() - {"optimizer"}


class Train(Section):
    """How long, in what batches, and how often the run is evaluated and saved."""

    steps: Positive = Field(description="Optimizer steps, of the first phase where there are phases.")
    global_batch: Positive = Field(description="Samples per step, over all ranks and gradient accumulation steps.")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Type of the computation. Master weights and optimizer state are fp32."
    )
    deterministic: bool = Field(
        default=False,
        description="On a GPU, use only kernels that add in a fixed order. They are slower, and a run repeats its bits, as it "
        "does on a CPU.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=1234, description="Of initial values, the order of samples, masks and dropout."
    )
    eval_every: Count = Field(default=0, description="Steps between evaluations; 0: after the last step only.")
    eval_samples: Positive | None = Field(default=None, description="Validation samples per evaluation. Default: all.")
    save_every: Count = Field(default=0, description="Steps between checkpoints; 0: after the last step only.")
    keep: Positive = Field(default=2, description="Checkpoints that are kept, the newest ones.")
    async_save: bool = Field(
        default=False,
        description="Copy each rank's share of the state to host memory, and write it while the training goes on, one "
        "checkpoint at a time. The last one is written before the run ends.",
    )
    log_every: Positive = Field(
        default=1,
        description="Steps between lines on the screen, which have the mean time of these steps; the last step has a line too. "
        "metrics.jsonl has every step.",
    )
    # NCCL by default ends every rank after 10 minutes and names none
    hang_seconds: Count = Field(
        default=540,
        description="Seconds without progress of any rank (a micro batch, a parameter read or written) after which the "
        "launcher names the rank that hangs and ends the run; 0: never.",
    )

    @classmethod
    def resume_keys(cls) -> Set[str]:
        return cls.model_fields.keys() - {"global_batch", "dtype", "seed"}

    @classmethod
    def phase_keys(cls) -> Set[str]:
        return {"steps", "global_batch"}


class Tracking(Section):
    """Where the curves of a run go beside metrics.jsonl and TensorBoard."""

    csv: bool = Field(
        default=False, description="Also write OUT/train.csv and OUT/valid.csv: a row per step, and one per evaluation."
    )
    wandb: NonEmpty | None = Field(
        default=None,
        description="Project of Weights & Biases (`bash scripts/setup.sh wandb`). With WANDB_MODE=offline in the environment "
        "the run stays in OUT/wandb.",
    )

    @classmethod
    def resume_keys(cls) -> Set[str]:
        return cls.model_fields.keys()


class Init(Section):
    """Where the weights come from."""

    from_: FilePath = Field(
        default="scratch",
        alias="from",
        description="`scratch` (drawn from train.seed) or a Hugging Face folder of the same shapes; in finetuning also OUT of "
        "a finished run, or a name on the hub, OWNER/NAME.",
    )

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class Expect(Section):
    """A published score, for scripts/check.py. Its name is TASK_METRIC, as common/evaluation/metrics.py lists them."""

    value: float = Field(description="The score, in the metric's unit: a fraction is 0.844, not 84.4.")
    tolerance: Annotated[float, Field(ge=0)] = Field(description="Largest difference that counts as the same result.")
    source: str = Field(description="Where it is published.")


class Quickstart(Section):
    """For scripts/quickstart.sh: the command that makes its corpus, and the text that its exports continue."""

    corpus: Annotated[str, AfterValidator(_corpus_command)] = Field(
        description="The command that makes the corpus: python -m data.NAME FOLDER [options]."
    )
    prompt: Annotated[str, AfterValidator(_line)] = Field(
        default="", description="The text that scripts/generate.py continues."
    )

    @classmethod
    def resume_keys(cls) -> Set[str]:
        return cls.model_fields.keys()

    @property
    def corpus_words(self) -> list[str]:
        """[data.NAME, FOLDER, options ...]"""
        return shlex.split(self.corpus)[2:]


class System(Section):
    """The settings of one stack. None of them changes the loss."""

    @classmethod
    def resume_keys(cls) -> Set[str]:
        return cls.model_fields.keys()

    @classmethod
    def phase_keys(cls) -> Set[str]:
        return cls.model_fields.keys()


MICRO_BATCH = "Samples per forward pass of a data-parallel rank; global_batch is a multiple of micro_batch x ranks."
RECOMPUTE = "Recompute the activations of each layer in the backward pass: less memory, a third more time."
COMPILE = "Compile each transformer layer by torch.compile, which fuses its pointwise operators."
# Earlier versions had false and true
Recompute = Annotated[
    Literal["none", "selective", "full"],
    BeforeValidator(lambda value: ("full" if value else "none") if isinstance(value, bool) else value),
]
Offload = Annotated[
    Literal["none", "optimizer", "all"],
    BeforeValidator(lambda value: ("optimizer" if value else "none") if isinstance(value, bool) else value),
]
ZEROPP = " Not exact, so not for published results (ZeRO++). Needs a GPU; was not run here."
TP = "Tensor-parallel ranks, which share each layer's matrices."
PP = "Pipeline stages, each with its share of the layers."


def _pipeline_layout(value: str) -> str:
    """even, embedding_and_loss, or a string of Megatron's."""
    _line(value)
    if len(value) > 1000:
        raise ValueError("must have at most 1,000 characters")
    if value not in (pipeline.EVEN, pipeline.EMBEDDING_AND_LOSS):
        pipeline.unrolled(value)
    return value


class Baseline(System):
    """PyTorch's DDP by way of accelerate, or FSDP2."""

    micro_batch: Positive = Field(default=1, description=MICRO_BATCH)
    shard: Literal["none", "full"] = Field(
        default="none",
        description="What is divided among the ranks: nothing (DDP), or by FSDP2 the weights, gradients and optimizer state "
        "(full).",
    )
    recompute: bool = Field(default=False, description=RECOMPUTE)
    compile: bool = Field(default=False, description=COMPILE)


class DeepSpeed(System):
    """DeepSpeed: ZeRO (arXiv:1910.02054), AutoTP and Ulysses (arXiv:2309.14509)."""

    micro_batch: Positive = Field(default=1, description=MICRO_BATCH)
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        default=1,
        description="What ZeRO divides among the ranks: 1 optimizer state, 2 also gradients, 3 also weights; 0: nothing.",
    )
    tp: Positive = Field(default=1, description=TP)
    sp: Positive = Field(
        default=1,
        description="Ranks that share each sequence, by Ulysses (arXiv:2309.14509): each has its part of the positions, and in "
        "the attention all positions of its part of the heads. GPT only. Needs tp=1 and zero_stage 1, 2 or 3.",
    )
    pp: Positive = Field(default=1, description=PP + " Needs zero_stage 1.")
    partition: Partition = Field(
        default="parameters",
        description="With pp: stages of about as many parameters, embedding and output counted; of as many transformer "
        "layers; or a list of the transformer layers of each stage.",
    )
    offload: Offload = Field(
        default="none",
        description="What is kept in CPU memory: nothing (none), the optimizer state, which steps there (optimizer: zero_stage "
        "1, 2 or 3), or also the weights, of which a GPU has those that it computes with (all: zero_stage 3). false and true "
        "are read as none and optimizer.",
    )
    nvme: FilePath | None = Field(
        default=None,
        description="With zero_stage 3: a folder on each node's own disk where offloaded state is kept in place of CPU memory. "
        "Needs libaio and g++: before the first run DeepSpeed builds its aio operator, for minutes. Weights and optimizer "
        "state below 1 MiB stay in memory.",
    )
    hpz: Positive = Field(
        default=1,
        description="With zero_stage 3: ranks, neighbours of one node, that keep a second copy of the weights among them for "
        "the backward pass (ZeRO++, arXiv:2306.10209); 1: no copy.",
    )
    quantized_weights: bool = Field(default=False, description="With zero_stage 3, weights are gathered in 8 bits." + ZEROPP)
    quantized_gradients: bool = Field(
        default=False, description="With zero_stage 3, gradients are exchanged in 4 bits." + ZEROPP
    )
    recompute: bool = Field(default=False, description=RECOMPUTE)
    compile: bool = Field(default=False, description=COMPILE + " Needs tp=1 and zero_stage 0, 1 or 2.")
    extra: dict[str, Any] = Field(
        default={},
        description="Merged last into DeepSpeed's config: the keys of common/stacks/extra.py. Not for published results.",
    )

    @property
    def zero_plus_plus(self) -> str:
        """The keys of ZeRO++ that are used: 'deepspeed.hpz=2, deepspeed.quantized_weights=true'."""
        used = {
            "hpz": self.hpz > 1,
            "quantized_weights": self.quantized_weights,
            "quantized_gradients": self.quantized_gradients,
        }
        return ", ".join(f"deepspeed.{key}={written(getattr(self, key))}" for key, is_used in used.items() if is_used)


class Megatron(System):
    """Megatron Core (arXiv:1909.08053, arXiv:2205.05198)."""

    micro_batch: Positive = Field(default=1, description=MICRO_BATCH)
    tp: Positive = Field(default=1, description=TP)
    pp: Positive = Field(default=1, description=PP)
    vpp: Positive = Field(
        default=1,
        description="Chunks of layers per pipeline stage, which run interleaved: the stages idle vpp times less, and exchange "
        "vpp times as much. Needs pp above 1, and per step and replica a multiple of pp micro batches.",
    )
    pipeline_layout: Annotated[str, AfterValidator(_pipeline_layout)] = Field(
        default="even",
        description="Layers of each stage: even; embedding_and_loss, where each of the two counts as a layer; or Megatron's "
        "string, such as Et*3|t*5L: E embedding, t a layer, L loss, | next stage (with vpp, next chunk). Needs pp above 1.",
    )
    cp: Positive = Field(
        default=1,
        description="Context-parallel ranks, which share each sequence. seq_len is a multiple of 2 x cp, and of cp x tp with "
        "sequence_parallel.",
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Divide what tensor parallelism leaves whole (norms, dropout) along the sequence. Needs tp above 1.",
    )
    distributed_optimizer: bool = Field(default=False, description="Divide the optimizer state among the data-parallel ranks.")
    recompute: Recompute = Field(
        default="none",
        description="What of a layer is recomputed in the backward pass: none, full (all of it: less memory, a third more "
        "time) or selective (the attention alone; it saves memory where a kernel keeps scores or a mask for each layer: with "
        "masks or biases, and on a CPU; flash attention keeps neither). false and true are read as none and full.",
    )
    fusions: bool | None = Field(
        default=None,
        description="Fuse bias, activation, dropout, sum and loss by torch.compile, and weight gradients with their sum. "
        "Default: on a GPU.",
    )
    transformer_engine: bool = Field(default=False, description="Use TransformerEngine's layers, where it is installed.")
    extra: dict[str, Any] = Field(
        default={},
        description="Merged last into Megatron's TransformerConfig: the keys of common/stacks/extra.py. Not for published "
        "results.",
    )


class Config(Section):
    """What every family's config holds. task.py derives its own: its `model` and `data`, and sections of its own.

    `model` is a common.contract.Model, and in a run that was checked a common.contract.ResolvedModel.
    """

    model: Any
    data: Data
    optim: Optim
    train: Train
    phases: Annotated[list[dict[str, Any]], Field(max_length=100)] = Field(
        default=[],
        description="What changes for later steps of the same run: a list of {section.key: value}. Each phase gives "
        "train.steps, the step at which it ends.",
    )
    init: Init = Init()
    expect: dict[str, Expect] = Field(default={}, description="Published scores by name, TASK_METRIC.")
    quickstart: Quickstart | None = None
    log: Tracking = Tracking()
    baseline: Baseline = Baseline()
    deepspeed: DeepSpeed = DeepSpeed()
    megatron: Megatron = Megatron()

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values of a config, not yet validated, with those that a file decides, such as the shapes of the model in
        init.from. BadInput where the file cannot be used."""
        return values

    def dump(self) -> dict[str, Any]:
        """Plain values, a family's own sections beside its model and data: hyperparameters first, then the systems."""
        values = self.model_dump(by_alias=True)
        own = type(self).model_fields.keys() - Config.model_fields.keys()
        first = {key: values[key] for key in ("model", "data", *sorted(own))}
        return first | {key: value for key, value in values.items() if key not in ("phases", "quickstart") or value}

    @property
    def adapters(self) -> "Adapters | None":
        """The low-rank adapters that are trained in place of the weights; None in pretraining."""
        return None

    @property
    def last_step(self) -> int:
        """The step at which the run ends, after its last phase."""
        return self.phases[-1]["train.steps"] if self.phases else self.train.steps


def sections(schema: type[Config]) -> dict[str, type[Section]]:
    """The sections of a family's config by name, those that may be left out included; not `expect` and `phases`."""
    by_name: dict[str, type[Section]] = {}
    for name, field in schema.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section) and get_origin(field.annotation) is not dict:
                by_name[field.alias or name] = kind
    return by_name


def name_now(key: str, schema: type[Config]) -> str:
    """The present name of a key: objective.mask_share, of an earlier version -> objective.masked_lm_prob."""
    section, dot, name = key.partition(".")
    kind = sections(schema).get(section)
    return f"{section}{dot}{kind.renamed.get(name, name)}" if kind else key


def under_names_now(values: dict[str, Any], schema: type[Config]) -> dict[str, Any]:
    """The values of a config.yaml, or the hyperparameters of a state.json, of an earlier version, under the keys' names now."""
    values = {name_now(key, schema): value for key, value in values.items()}
    for section, kind in sections(schema).items():
        if isinstance(values.get(section), dict):
            values[section] = kind.absent | {kind.renamed.get(key, key): value for key, value in values[section].items()}
    phases = values.get("phases")
    if isinstance(phases, list):
        values["phases"] = [
            {name_now(key, schema): value for key, value in phase.items()} if isinstance(phase, dict) else phase
            for phase in phases
        ]
    return values


def vocabulary(vocab_size: int | None, tokenizer_size: int | None) -> int:
    """model.vocab_size; by default the tokenizer's size rounded up to a multiple of 128. BadInput if both are unknown."""
    if vocab_size is None and tokenizer_size is None:
        raise BadInput("model.vocab_size: is missing, and no tokenizer is known to take it from; give model.vocab_size=N")
    return vocab_size or -(-(tokenizer_size or 1) // 128) * 128


def resolve[C: Config](cfg: Config, schema: type[C], tokenizer_size: int | None, **sections: Section) -> C:
    """`cfg` as a config of `schema`, a family's ResolvedConfig: with every key of its model, and these sections in place of its
    own. BadInput as `vocabulary`."""
    values = {name: getattr(cfg, name) for name in type(cfg).model_fields}
    model = cfg.model.resolve(cfg, tokenizer_size)
    return schema.model_construct(set(cfg.model_fields_set), **(values | {"model": model} | sections))


def load[C: Config](path: str | Path, overrides: Sequence[str], schema: type[C], recorded: bool = False) -> C:
    """Read a config, apply the overrides and validate it. BadInput carries all problems that this module can see, one per line.

    schema: the family's, `task.Config`. recorded: of a config.yaml in OUT, which an earlier version may have written.
    """
    values = under_names_now(read_yaml(path), schema) if recorded else read_yaml(path)
    problems = apply_overrides(values, overrides)
    if values.get("phases") is None:
        values.pop("phases", None)
    values = {k: ({} if v is None else v) for k, v in values.items()}  # an empty section holds its defaults
    if "task" in values and "task" not in schema.model_fields:
        raise BadInput(f"{path}: is a config of finetuning (it has a task); type finetune.sh in place of pretrain.sh")
    if "task" in schema.model_fields and "task" not in values:
        raise BadInput(f"{path}: has no task; give task.name=NAME, or type pretrain.sh in place of finetune.sh")
    values = schema.complete(values)
    cfg = None
    try:
        cfg = schema.model_validate(values)
        problems += [*_rules(cfg), *_phase_problems(cfg)]
    except ValidationError as error:
        problems += [_explain(e, schema) for e in error.errors(include_url=False)]
        rest, bad = _without_bad_keys(values, schema)
        rules = list(_rules(rest)) if rest is not None else []
        problems += [rule for rule in rules if not any(re.search(rf"\b{re.escape(key)}\b", rule) for key in bad)]
    if cfg is None or problems:
        problems = list(dict.fromkeys(problems))
        if len(problems) > MOST_PROBLEMS:
            problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS:,} more problems; correct these first"]
        raise BadInput([f"{path}: {p}" if not p.startswith("override") else p for p in problems])
    return cfg


MOST_PROBLEMS = 50  # reported at once


STAND_INS: tuple[Any, ...] = ({}, 1, "-", True, [])  # for a required key of whatever type


def _without_bad_keys[C: Config](values: dict[str, Any], schema: type[C]) -> tuple[C | None, set[str]]:
    """The config without its bad values (a required one is replaced), so that the rules between keys are checked at the same
    time; and the names of those keys, for which the rules mean nothing."""
    values = copy.deepcopy(values)
    tried: dict[tuple[str, ...], int] = {}  # how many of STAND_INS
    while True:
        try:
            return schema.model_validate(values), {".".join(key) for key in tried}
        except ValidationError as error:
            bad = {_names(e) for e in error.errors(include_url=False)}
        for *sections, last in bad:
            key = (*sections, last)
            number = tried[key] = tried.get(key, -1) + 1
            node = values
            for name in sections:
                node = node.setdefault(name, {})
            node.pop(last, None)
            if number > len(STAND_INS):
                return None, set()
            if number:  # dropping it was not enough
                node[last] = copy.deepcopy(STAND_INS[number - 1])


def _names(error: Any) -> tuple[str, ...]:
    """The keys down to a bad value, without positions in a list."""
    return tuple(name for name in error["loc"] if isinstance(name, str))


FALLS_TO_MIN = ("cosine", "linear", "wsd")  # schedules that reach optim.min_lr at optim.decay_steps
STEP_TOKENS = 2**31  # 600 times those of the largest published batches


def _rules(cfg: Config) -> Iterator[str]:
    if cfg.train.async_save and "task" in type(cfg).model_fields:
        yield "train.async_save=true: a finetuning run reads the checkpoints that it has just written; leave it out"
    yield from cfg.model.problems()
    yield from cfg.model.data_problems(cfg.data)
    tokens = cfg.train.global_batch * cfg.data.sample_tokens
    if tokens > STEP_TOKENS:
        yield (
            f"train.global_batch={cfg.train.global_batch} of {cfg.data.sample_tokens} tokens each are {tokens:,} tokens per "
            f"step, which the ranks hold at once; {STEP_TOKENS:,} are allowed"
        )
    o = cfg.optim
    if o.lamb.min_coeff > o.lamb.max_coeff:
        yield f"optim.lamb.min_coeff={o.lamb.min_coeff} is above optim.lamb.max_coeff={o.lamb.max_coeff}"
    if o.min_lr > o.lr:
        yield f"optim.min_lr={o.min_lr} is above optim.lr={o.lr}"
    if o.decay_steps is not None and o.decay_steps < o.warmup_steps:
        yield f"optim.decay_steps={o.decay_steps} is below optim.warmup_steps={o.warmup_steps}"
    if o.schedule == "wsd" and o.wsd_decay_steps is None:
        yield "optim.schedule=wsd: give optim.wsd_decay_steps, the steps in which the rate falls, the last of optim.decay_steps"
    if o.schedule != "wsd" and o.wsd_decay_steps is not None:
        yield f"optim.wsd_decay_steps={o.wsd_decay_steps}: is for optim.schedule=wsd, and the schedule is {o.schedule}"
    if o.decay_steps is not None and o.warmup_steps <= o.decay_steps < o.warmup_steps + (o.wsd_decay_steps or 0):
        yield (
            f"optim.decay_steps={o.decay_steps} is below optim.warmup_steps={o.warmup_steps} + "
            f"optim.wsd_decay_steps={o.wsd_decay_steps}"
        )
    if not all(0 <= b < 1 for b in o.betas):
        yield f"optim.betas={o.betas}: each must be at least 0 and below 1"
    if cfg.deepspeed.offload == "optimizer" and cfg.deepspeed.zero_stage == 0:
        yield "deepspeed.offload=optimizer needs deepspeed.zero_stage=1, 2 or 3"
    if cfg.deepspeed.offload == "all" and cfg.deepspeed.zero_stage != 3:
        yield "deepspeed.offload=all needs deepspeed.zero_stage=3: at the other stages each GPU keeps all weights"
    d = cfg.deepspeed
    if d.sp > 1 and (d.zero_stage == 0 or d.tp > 1 or d.pp > 1 or d.compile):
        yield (
            f"deepspeed.sp={d.sp} needs deepspeed.zero_stage=1 to 3, deepspeed.tp=1, pp=1 and compile=false; "
            "other combinations have not been compared with the plain loop"
        )
    if cfg.deepspeed.compile and (cfg.deepspeed.zero_stage == 3 or cfg.deepspeed.tp > 1):
        yield (
            "deepspeed.compile=true needs deepspeed.tp=1 and deepspeed.zero_stage=0, 1 or 2: DeepSpeed gathers parameters and "
            "sums activations inside a layer, by code that torch.compile does not trace"
        )
    yield from _pipeline_rules(cfg.deepspeed)
    yield from _stage3_rules(cfg)
    if cfg.expect:
        from common.evaluation import metrics

        for name, expect in cfg.expect.items():
            yield from metrics.problems(name, expect.value)
    yield from extra.problems("deepspeed", cfg.deepspeed)
    yield from extra.problems("megatron", cfg.megatron)


def _pipeline_rules(system: DeepSpeed) -> Iterator[str]:
    given = f"deepspeed.pp={system.pp}"
    if system.pp == 1:
        if system.partition != "parameters":
            yield f"deepspeed.partition={written(system.partition)}: is read only with deepspeed.pp above 1; leave it out"
        return
    if system.zero_stage == 0:
        yield (
            f"{given} with deepspeed.zero_stage=0: DeepSpeed then counts a tied embedding twice in the norm that it clips; use "
            "deepspeed.zero_stage=1"
        )
    if system.zero_stage > 1:
        yield (
            f"{given} with deepspeed.zero_stage={system.zero_stage}: a pipeline adds up the gradients of all micro batches, "
            "and DeepSpeed refuses to divide them; use deepspeed.zero_stage=1"
        )
    if system.tp > 1:
        yield f"{given} with deepspeed.tp={system.tp}: AutoTP does not split the layers of a pipeline; use one of them"
    if system.offload != "none":
        yield f"{given} with deepspeed.offload={system.offload}: is not tested together; use one of them"
    if system.compile:
        yield f"{given} with deepspeed.compile=true: is not tested together; use one of them"


def _stage3_rules(cfg: Config) -> Iterator[str]:
    """What DeepSpeed reads at stage 3 alone, and what has been compared with the plain loop there."""
    system, given = cfg.deepspeed, cfg.deepspeed.zero_plus_plus
    is_plain = system.zero_stage == 3 and system.tp == system.sp == 1 and not hasattr(cfg, "task")
    if system.nvme is not None and (not is_plain or system.offload == "none"):
        yield (
            f"deepspeed.nvme={written(system.nvme)}: needs deepspeed.zero_stage=3, offload=optimizer or all, tp=1, sp=1, and "
            "pretraining; other combinations have not been compared with the plain loop"
        )
    if given and (not is_plain or system.offload != "none"):
        yield (
            f"{given}: needs deepspeed.zero_stage=3, offload=none, tp=1, sp=1, and pretraining; other combinations have "
            "not been compared with the plain loop"
        )


def problems(cfg: Config) -> Iterator[str]:
    """The problems between the keys of a valid config: after keys were changed by other means than `load`."""
    yield from _rules(cfg)


def _phase_problems(cfg: Config) -> Iterator[str]:
    """The problems of the phases: keys that a phase may not change, the order in which they end, each phase's own config."""
    ends = cfg.train.steps
    if cfg.optim.begin_step:
        yield f"optim.begin_step={cfg.optim.begin_step}: the first schedule begins at 0; it is for a later phase"
    for number, changes in enumerate(cfg.phases):
        where = f"phases[{number}]"
        bad = [key for key in changes if _is_fixed(key, type(cfg))]
        if bad:
            allowed = ", ".join(_phase_keys(type(cfg)))
            yield f"{where}: {shortened(bad[0])} cannot change within a run; a phase may give {allowed}"
        steps = changes.get("train.steps")
        if not isinstance(steps, int) or steps <= ends:
            yield f"{where}: train.steps={written(steps)}: must be given, the step at which it ends, above {ends}"
            return
        begins, ends = ends, steps
        if bad:
            continue
        try:
            view = _changed(cfg, cfg.phases[: number + 1])
        except BadInput as error:
            yield f"{where}: {error}"
            continue
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                yield f"{where}: {_explain(problem, type(cfg))}"
            continue
        yield from (f"{where}: {rule}" for rule in sorted({*_rules(view)} - {*_rules(cfg)}))
        if view.optim.begin_step > begins:
            yield f"{where}: optim.begin_step={view.optim.begin_step} is above {begins}, the step after which it begins"
        falls_to_min = view.optim.schedule in FALLS_TO_MIN
        if "optim.begin_step" in changes and falls_to_min and "optim.decay_steps" not in changes:
            yield f"{where}: optim.begin_step begins a schedule; give its optim.decay_steps (counted from there)"
        yield from (f"{where}: {problem}" for problem in cfg.model.phase_problems(cfg.data, view.data))
        if getattr(cfg.data, "length_window", 0):  # a window may reach over the end of a phase
            for key in sorted({"train.global_batch", "data.seq_len", "data.target_len"} & changes.keys()):
                yield f"{where}: {key} changes, and with it the order that data.length_window gives; give data.length_window=0"


def _phase_keys(schema: type[Config]) -> list[str]:
    """['data.seq_len', 'optim.*', ...]: what a phase may change; `*` where most keys of a section are allowed."""
    names: list[str] = []
    for section, kind in sections(schema).items():
        keys = [key for key in kind.model_fields if key in kind.phase_keys()]
        names += [f"{section}.*"] if len(keys) > len(kind.model_fields) // 2 else [f"{section}.{key}" for key in keys]
    return names


def _is_fixed(key: str, schema: type[Config]) -> bool:
    """Is this a key that a phase may not change? False for an unknown key of a section that phases may change: the schema
    reports it."""
    section, _, names = key.partition(".")
    kind, name = sections(schema).get(section), names.partition(".")[0]
    return kind is None or not kind.phase_keys() or name in kind.model_fields.keys() - kind.phase_keys()


def _is_called(key: str, now: str, value: Any) -> str:
    return f"{shortened(key)}: this key is called {now} now; give {now}={written(value)}"


def _changed[C: Config](cfg: C, phases: Sequence[dict[str, Any]]) -> C:
    """`cfg` with the changes of these phases, applied in order. ValidationError or BadInput if they do not fit the schema."""
    values = cfg.dump()
    for changes in phases:
        for key, value in changes.items():
            node = values
            *sections, last = key.split(".")
            for name in sections:
                node = node.setdefault(name, {})
                if not isinstance(node, dict):
                    raise BadInput(f"{key}: {name} is a value, not a section")
            node[last] = value
    return type(cfg).model_validate(values)


def views[C: Config](cfg: C) -> list[C]:
    """The config of each phase, the first included; the train.steps of each is the step at which it ends."""
    return [cfg, *(_changed(cfg, cfg.phases[: number + 1]) for number in range(len(cfg.phases)))]


def at_step[C: Config](cfg: C, done: int) -> C:
    """The config of the phase that a run continues after `done` steps; its train.steps is the step at which that phase ends."""
    ends = [cfg.train.steps, *(changes["train.steps"] for changes in cfg.phases)]
    number = next((n for n, end in enumerate(ends) if done < end), len(cfg.phases))
    return _changed(cfg, cfg.phases[:number]) if number else cfg


def _known_keys(loc: Sequence[str], schema: type[BaseModel]) -> list[str]:
    """The keys of the section at `loc`."""
    node: Any = schema
    for name in loc:
        if get_origin(node) is dict:  # expect: the names are the user's
            node = get_args(node)[1]
            continue
        field = getattr(node, "model_fields", {}).get(name)
        if field is None:
            return []
        node = field.annotation
        if type(None) in get_args(node):  # a section that may be left out
            node = get_args(node)[0]
    return [f.alias or n for n, f in getattr(node, "model_fields", {}).items()]


OTHER_NAMES = {  # what a key is called elsewhere, and in the tables here -> its name
    "sp": "sequence_parallel", "zero": "zero_stage", "stage": "zero_stage", "dist_opt": "distributed_optimizer",
    "tensor_parallel": "tp", "pipeline_parallel": "pp", "context_parallel": "cp", "micro": "micro_batch",
    "learning_rate": "lr", "min_learning_rate": "min_lr", "warmup": "warmup_steps", "grad_clipping": "grad_clip",
    "batch_size": "global_batch", "max_steps": "steps", "num_steps": "steps", "precision": "dtype",
    "path": "train", "num_layers": "layers", "hidden_size": "hidden", "num_heads": "heads", "seq_length": "seq_len",
    "sequence_length": "seq_len", "gradient_checkpointing": "recompute", "activation_checkpointing": "recompute",
}  # fmt: skip


def _explain(error: Any, schema: type[Config]) -> str:
    *parents, last = _names(error)
    name = ".".join(shortened(part) for part in [*parents, last])
    if error["type"] == "extra_forbidden":
        now = name_now(".".join([*parents, last]), schema)
        if now != ".".join([*parents, last]):
            return _is_called(name, now, error.get("input"))
        keys = _known_keys(parents, schema)
        elsewhere = [f"{name}.{last}" for name in sections(schema) if len(parents) < 2 and last in _known_keys([name], schema)]
        meant = [repr(OTHER_NAMES[last])] if OTHER_NAMES.get(last) in keys else []
        close = meant or elsewhere or [repr(key) for key in difflib.get_close_matches(last, keys, 1)]
        hint = f"; did you mean {' or '.join(close)}?" if close else ";"
        return f"{name}: unknown key{hint} {name.rpartition('.')[0] or 'a config'} has: {', '.join(keys)}"
    if error["type"] == "missing":
        return f"{name}: is missing; add it, or give {name}=VALUE on the command line"
    message = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if error["type"] == "model_type":
        message = f"should be a section: {', '.join(_known_keys([*parents, last], schema))}"
    return f"{name}={written(error.get('input'))}: {message}"


def written(value: Any) -> str:
    """A value as it is written in a config; the middle of a long value is left out."""
    return shortened(json.dumps(value, ensure_ascii=False, default=str))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'model': {'layers': 4}} -> {'model.layers': 4}"""
    values_by_key: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value and prefix.count(".") < 1:
            values_by_key |= flat(value, f"{prefix}{key}.")
        else:
            values_by_key[prefix + key] = value
    return values_by_key


def may_change_on_resume(key: str, schema: type[Config]) -> bool:
    """Is `section.key` one of the resume_keys of its section?"""
    section, _, name = key.partition(".")
    kind = sections(schema).get(section)
    return kind is not None and name in kind.resume_keys()


def hyperparameters(cfg: Config) -> dict[str, Any]:
    """{'optim.lr': 6e-4, ...}: the values that a continued run may not change."""
    keep = {}
    for key, value in flat(cfg.dump()).items():
        if key.partition(".")[0] != "expect" and not may_change_on_resume(key, type(cfg)):
            keep[key] = value
    keep["phases"] = [{k: v for k, v in phase.items() if not k.startswith(STACKS)} for phase in cfg.phases]
    if cfg.phases:  # where one phase gives way to the next decides the loss; only where the last one ends does not
        keep["train.steps"] = cfg.train.steps
        keep["phases"][-1].pop("train.steps", None)
    return keep


def recorded[C: Config](path: Path, schema: type[C]) -> C:
    """The config that a run has written to OUT. BadInput if it is not YAML, ValidationError if it is not such a config."""
    return schema.model_validate(under_names_now(read_yaml(path), schema))


def write_yaml(cfg: Config, path: str | Path) -> None:
    """Write a config. A reader sees either the old file or the new one, never half of it."""
    part = Path(f"{path}.tmp")
    part.write_text(to_yaml(cfg.dump()), encoding="utf-8")
    part.replace(path)


def write_section(path: str | Path, name: str, section: Section) -> None:
    """The YAML of one section, to be put into a config."""
    text = to_yaml({name: section.model_dump(by_alias=True)}, default_flow_style=None)
    Path(path).write_text(text, encoding="utf-8")
