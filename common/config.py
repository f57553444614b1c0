"""A run's configuration: YAML values, a pydantic schema, `a.b=c` overrides. Torch-free, so that it is checked in a moment.

`model`, `data`, `optim`, `train` and `init` are the science: they decide the loss. `baseline`, `deepspeed` and `megatron` are
the systems: nothing in them may change it. Every problem is found and reported at once.
"""

import copy
import difflib
import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from common.errors import BadInput, shortened
from common.evaluation import metrics
from common.stacks import extra

ROOT = Path(__file__).resolve().parent.parent
STACKS = ("baseline", "deepspeed", "megatron")

Positive = Annotated[int, Field(gt=0, lt=2**31)]  # steps x samples, the largest product, is below 2^63
Count = Annotated[int, Field(ge=0, lt=2**31)]
Layers = Annotated[int, Field(gt=0, le=10_000)]  # each is a module that every rank builds; 10,000 take it 10 s
Share = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, Field(min_length=1)]


def _path(value: str) -> str:
    """A path that can be printed, and has no NUL. common/preflight.py bounds its length."""
    if any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in value):
        raise ValueError("must be a path without control characters")
    return value


FilePath = Annotated[str, Field(min_length=1), AfterValidator(_path)]


def _corpus_command(value: str) -> str:
    """`python -m data.NAME FOLDER [options]`, as one types it."""
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise ValueError(f"is not a command: {error}") from None
    if words[:2] != ["python", "-m"] or len(words) < 4 or not re.fullmatch(r"data\.\w+", words[2]) or words[3].startswith("-"):
        raise ValueError("must be a command that makes a corpus: python -m data.NAME FOLDER [options]")
    return value


def _blend(value: Any) -> str | list:
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


class Section(BaseModel):
    """Values as written: unknown keys and silent conversions ('4' for 4) are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Data(Section):
    """What every family reads; a family adds keys of its own in its task.py."""

    train: Annotated[str | list, PlainValidator(_blend)]  # prefix of a .bin/.idx, or a blend of them
    valid: FilePath | None = None
    seq_len: Positive  # tokens of a sample
    tokenizer: FilePath | None = None  # folder; default: the one that the corpus was made with

    @property
    def sample_tokens(self) -> int:
        """Tokens that a full sample has."""
        return self.seq_len


class Lamb(Section):
    """Of optim.optimizer=lamb: bounds of the trust ratio, and whether Adam's moments are corrected for their start."""

    min_coeff: Annotated[float, Field(ge=0)] = 0.0
    max_coeff: Annotated[float, Field(gt=0)] = 10.0
    bias_correction: bool = True


class Optim(Section):
    optimizer: Literal["adamw", "lamb", "adafactor"] = "adamw"
    lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Count = 0
    decay_steps: Positive | None = None  # steps, warmup included, until min_lr; default: train.steps at the first start
    schedule: Literal["cosine", "linear", "constant", "exponential", "inverse_sqrt", "wsd"] = "cosine"  # optim.lr_at
    wsd_decay_steps: Positive | None = None  # wsd: how many of the decay_steps, the last ones, lower the rate
    wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"  # wsd: how they lower it
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.9  # exponential: lr is multiplied by it ...
    decay_interval: Positive = 250  # ... every so many steps
    begin_step: Count = 0  # steps before the schedule begins: a later phase may begin a schedule of its own
    lamb: Lamb = Lamb()
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Annotated[float, Field(gt=0)] = 1e-8
    grad_clip: Annotated[float, Field(ge=0)] = 1.0  # global norm; 0: no clipping


class Train(Section):
    steps: Positive  # optimizer steps in all
    global_batch: Positive  # samples a step, over all ranks and micro batches
    dtype: Literal["fp32", "bf16"] = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    eval_every: Count = 0  # steps; 0: only after the last one
    eval_samples: Positive | None = None  # validation samples used; default: all
    save_every: Count = 0  # steps; 0: only after the last one
    keep: Positive = 2  # checkpoints kept
    # Seconds without progress of any rank (a micro batch, a parameter read or written) after which the launcher names the rank
    # and ends the run; 0: never. Below the 10 minutes after which NCCL by default ends every rank and names none.
    hang_seconds: Count = 540


class Init(Section):
    from_: Annotated[FilePath, Field(alias="from")] = "scratch"  # or a Hugging Face folder of the same shape

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class Expect(Section):
    """A published score. Its key is TASK_METRIC and its unit that of common/evaluation/metrics.py."""

    value: float
    tolerance: Annotated[float, Field(ge=0)]  # how far from it is still the same result, in the same unit
    source: str


class Quickstart(Section):
    """For scripts/quickstart.sh: the command that makes its corpus, and the text that its exports continue."""

    corpus: Annotated[str, AfterValidator(_corpus_command)]  # python -m data.NAME FOLDER [options]
    prompt: str = ""  # for scripts/generate.py

    @property
    def corpus_words(self) -> list[str]:
        """[data.NAME, FOLDER, options ...]"""
        return shlex.split(self.corpus)[2:]


class Baseline(Section):
    micro_batch: Positive = 1
    recompute: bool = False


class DeepSpeed(Section):
    micro_batch: Positive = 1
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    tp: Positive = 1
    offload: bool = False  # optimizer state in CPU memory
    recompute: bool = False
    extra: dict[str, Any] = {}  # merged last into ds_config: the keys of common/stacks/extra.py; not for published rows


class Megatron(Section):
    micro_batch: Positive = 1
    tp: Positive = 1
    pp: Positive = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: bool = False
    transformer_engine: bool = False
    extra: dict[str, Any] = {}  # merged last into TransformerConfig: the keys of common/stacks/extra.py; not for published rows


class Config(Section):
    """What every family's config holds. task.py derives its own: its `model` and `data`, and sections of its own.

    `model` has the methods problems, layout_problems, resolve and parameters (recipes/gpt/task.py says what they are for).
    """

    model: Any
    data: Data
    optim: Optim
    train: Train
    # What changes for later steps of the same run, as {a.b: value}; each gives train.steps, the step at which it ends.
    phases: Annotated[list[dict[str, Any]], Field(max_length=100)] = []  # each is a start of all ranks
    init: Init = Init()
    expect: dict[str, Expect] = {}
    quickstart: Quickstart | None = None
    baseline: Baseline = Baseline()
    deepspeed: DeepSpeed = DeepSpeed()
    megatron: Megatron = Megatron()

    def dump(self) -> dict[str, Any]:
        """Plain values, a family's own sections beside its model and data: the science above the systems."""
        values = self.model_dump(by_alias=True)
        own = type(self).model_fields.keys() - Config.model_fields.keys()
        first = {key: values[key] for key in ("model", "data", *sorted(own))}
        return first | {key: value for key, value in values.items() if key not in ("phases", "quickstart") or value}

    @property
    def last_step(self) -> int:
        """The step at which the run ends, after its last phase."""
        return self.phases[-1]["train.steps"] if self.phases else self.train.steps


# What a continued run may change without becoming another run. Paths under `data` are compared by content, not by name.
FREE = {
    "train": {"steps", "eval_every", "eval_samples", "save_every", "keep", "hang_seconds"},
    "data": {"train", "valid", "tokenizer"},
    "task": {"data", "patience", "split", "beams", "length_penalty", "generation_batch_size", "answers", "max_new_tokens"},
    "expect": ..., "quickstart": ..., "baseline": ..., "deepspeed": ..., "megatron": ...,
}  # fmt: skip


FILE_BYTES = 2**18  # of a config; the largest here has 3 KB
VALUES = 10_000  # of a config, keys counted too; PyYAML reads as many in half a second
DEPTH = 32  # of sections and lists in each other; the configs here have 4


class _Loader(yaml.SafeLoader):
    """SafeLoader for plain values. A few bytes stay a few values: no anchors, tags or deep nesting, and numbers as YAML 1.2 has
    them (`010`, `1:30` and dates are text, `6e-4` is a number). A key that is given twice or is no word is refused."""

    depth = 0
    values = 0
    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"aliases (*{event.anchor}) are not read; write the value again"
        elif getattr(event, "anchor", None):
            problem = f"anchors (&{event.anchor}) are not read; write the value where it is used"
        elif getattr(event, "tag", None) not in (None, "!"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"tags ({tag}) are not read; write the value alone"
        elif self.depth == DEPTH:
            problem = f"nested more than {DEPTH} deep"
        elif self.values == VALUES:
            problem = f"more than {VALUES:,} values"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        self.values += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):  # `on` is true, `1` a number
                told = f"the key {key_node.value if isinstance(key_node, yaml.ScalarNode) else key!r} is no word"
                raise yaml.constructor.ConstructorError(None, None, told, key_node.start_mark)
            if key in seen:
                told = f"the key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, told, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(
    r"^([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
# 40 digits are more than any key takes, and few enough to be written in a message
_INT = re.compile(r"^([-+]?(0|[1-9][0-9_]{0,39})|0x[0-9a-fA-F]{1,16})$")
_BOOL = re.compile(r"^(yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$")
_NULL = re.compile(r"^(~|null|Null|NULL|)$")
for _tag, _pattern, _first in (
    ("bool", _BOOL, "yYnNtTfFoO"), ("float", _FLOAT, "-+0123456789."), ("int", _INT, "-+0123456789"), ("null", _NULL, "~nN"),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, [*_first, *([""] if _tag == "null" else [])])


class _Dumper(yaml.SafeDumper):
    """Quotes every text that _Loader or another reader would take for something else, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def to_yaml(values: Any, **style: Any) -> str:
    """The YAML of plain values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120, **style)


def _parse(text: str) -> Any:
    """The value of a YAML document. ValueError, in one line, if it is none that is read here."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ValueError(told) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        if not path.is_file():
            raise BadInput(no_such_config(path))
        with open(path, "rb") as file:
            content = file.read(FILE_BYTES + 1)
        if len(content) > FILE_BYTES:
            raise BadInput(f"{path}: more than {FILE_BYTES >> 10} KB; that is no config")
        values = _parse(content.decode("utf-8-sig"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        held = "nothing" if values is None else f"a {type(values).__name__}"
        raise BadInput(f"{path}: must hold sections (model, data, optim, train), holds {held}")
    return values


def no_such_config(path: Path) -> str:
    """One line that lists the configs beside `path`, else those of the repository."""
    what = "is a folder, not a config" if path.is_dir() else "no such config"
    folder = path if path.is_dir() else path.parent
    there = sorted(folder.glob("*.yaml")) or sorted(ROOT.glob("recipes/*/configs/*.yaml"))
    close = difflib.get_close_matches(path.name, [p.name for p in there], 1)
    hint = next((f"; did you mean {p}?" for p in there if p.name in close), ";")
    by_folder: dict[Path, list[str]] = {}
    for p in there:
        by_folder.setdefault(p.parent, []).append(p.name)
    listed = " ".join(f"{folder} has: {', '.join(names)}" for folder, names in by_folder.items())
    return f"{path}: {what}{hint} {listed}"


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set `a.b=c` in place, c read as YAML; returns the problems."""
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        named = f"override {shortened(text)!r}"
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key) or key.count(".") >= DEPTH:
            problems.append(f"{named}: must be section.key=value, for example train.steps=100")
            continue
        *sections, last = key.split(".")
        node = values
        for name in sections:
            child = node.get(name)
            if child is None:
                child = node[name] = {}
            if not isinstance(child, dict):
                problems.append(f"{named}: {shortened(name)} is a value, not a section")
                break
            node = child
        else:
            try:
                node[last] = _parse(value)
            except ValueError as error:
                told = str(error).partition(" at line ")[0]
                if told.startswith(
                    ("the key ", "aliases ", "anchors ", "tags ", "nested ", "more than ")
                ):  # _Loader says what to do
                    problems.append(f"{named}: {told}")
                    continue
                value = shortened(value)
                problems.append(f"{named}: {value!r} is not a YAML value; quote it: {shortened(key)}='\"{value}\"'")
    return problems


def load[C: Config](path: str | Path, overrides: Sequence[str], schema: type[C]) -> C:
    """Read, override and validate; BadInput carries every problem, one line each, that this module can see.

    schema: the family's, `task.Config`.
    """
    values = read_yaml(path)
    problems = apply_overrides(values, overrides)
    if values.get("phases") is None:
        values.pop("phases", None)
    values = {k: ({} if v is None else v) for k, v in values.items()}  # an empty section holds its defaults
    if "task" in values and "task" not in schema.model_fields:
        raise BadInput(f"{path}: is a config of finetuning (it has a task); type finetune.sh in place of pretrain.sh")
    if "task" in schema.model_fields and "task" not in values:
        raise BadInput(f"{path}: has no task; give task.name=NAME, or type pretrain.sh in place of finetune.sh")
    try:
        cfg = schema.model_validate(values)
    except ValidationError as error:
        problems += [_explain(e, schema) for e in error.errors(include_url=False)]
        cfg, bad = _without_bad_keys(values, schema)
        told = list(_rules(cfg)) if cfg is not None else []
        problems += [rule for rule in told if not any(re.search(rf"\b{re.escape(key)}\b", rule) for key in bad)]
    else:
        problems += _rules(cfg)
        problems += _phase_problems(cfg)
    if problems:
        problems = list(dict.fromkeys(problems))
        if len(problems) > MOST_PROBLEMS:
            problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS:,} more problems; mend these first"]
        raise BadInput([f"{path}: {p}" if not p.startswith("override") else p for p in problems])
    return cfg


MOST_PROBLEMS = 50  # reported at once


STAND_INS = ({}, 1, "-", True, [])  # for a required key of whatever type


def _without_bad_keys[C: Config](values: dict[str, Any], schema: type[C]) -> tuple[C | None, set[str]]:
    """The config with its bad values dropped or, where one is required, replaced, so that the rules between keys are
    checked in the same go; and the names of those keys, of which the rules say nothing of worth."""
    values = copy.deepcopy(values)
    tried: dict[tuple[str, ...], int] = {}  # how many of STAND_INS
    while True:
        try:
            return schema.model_validate(values), {".".join(key) for key in tried}
        except ValidationError as error:
            found = {_names(e) for e in error.errors(include_url=False)}
        for *sections, last in found:
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
    """The keys down to a bad value, without places in a list."""
    return tuple(name for name in error["loc"] if isinstance(name, str))


FALLS_TO_MIN = ("cosine", "linear", "wsd")  # schedules that reach optim.min_lr at optim.decay_steps
STEP_TOKENS = 2**31  # 600 times those of the largest published batches


def _rules(cfg: Config) -> Iterator[str]:
    yield from cfg.model.problems()
    positions = getattr(cfg.model, "positions", None)
    if positions is not None and positions < cfg.data.seq_len:
        yield f"model.positions={positions} is below data.seq_len={cfg.data.seq_len}; give data.seq_len={positions} or less"
    tokens = cfg.train.global_batch * cfg.data.sample_tokens
    if tokens > STEP_TOKENS:
        yield (
            f"train.global_batch={cfg.train.global_batch} of {cfg.data.sample_tokens} tokens each are {tokens:,} tokens a "
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
    if cfg.deepspeed.offload and cfg.deepspeed.zero_stage == 0:
        yield "deepspeed.offload=true needs deepspeed.zero_stage=1, 2 or 3"
    for name, expect in cfg.expect.items():
        yield from metrics.problems(name, expect.value)
    yield from extra.problems("deepspeed", cfg.deepspeed)
    yield from extra.problems("megatron", cfg.megatron)


def _phase_problems(cfg: Config) -> Iterator[str]:
    """Of the phases: what they may change, in which order they end, and what each one's own config has wrong."""
    ends = cfg.train.steps
    if cfg.optim.begin_step:
        yield f"optim.begin_step={cfg.optim.begin_step}: the first schedule begins at 0; it is for a later phase"
    for number, changes in enumerate(cfg.phases):
        where = f"phases[{number}]"
        bad = [key for key in changes if not key.startswith(PHASE_KEYS) or key == "optim.optimizer"]
        if bad:
            yield f"{where}: {bad[0]} does not change within a run; a phase may give {', '.join(PHASE_KEYS)} keys"
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
            for told in error.errors(include_url=False):
                yield f"{where}: {_explain(told, type(cfg))}"
            continue
        told = {f"{where}: {rule}" for rule in _rules(view)} - {f"{where}: {rule}" for rule in _rules(cfg)}
        yield from sorted(told)
        if view.optim.begin_step > begins:
            yield f"{where}: optim.begin_step={view.optim.begin_step} is above {begins}, the step after which it begins"
        falls_to_min = view.optim.schedule in FALLS_TO_MIN
        if "optim.begin_step" in changes and falls_to_min and "optim.decay_steps" not in changes:
            yield f"{where}: optim.begin_step begins a schedule; give its optim.decay_steps (counted from there)"
        if view.data.seq_len != cfg.data.seq_len and getattr(cfg.model, "positions", 0) is None:
            yield f"{where}: data.seq_len changes; give model.positions, which all phases share"


PHASE_KEYS = (
    "data.seq_len", "data.target_len", "optim.", "train.steps", "train.global_batch", "objective.", "baseline.", "deepspeed.",
    "megatron.",
)  # fmt: skip


def _changed[C: Config](cfg: C, phases: Sequence[dict[str, Any]]) -> C:
    """`cfg` with the changes of these phases, one upon the other. ValidationError, BadInput if they do not fit the schema."""
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
    """The config of each phase in turn, the first included; the train.steps of each is where it ends."""
    return [cfg, *(_changed(cfg, cfg.phases[: number + 1]) for number in range(len(cfg.phases)))]


def at_step[C: Config](cfg: C, done: int) -> C:
    """The config of the phase that goes on after `done` steps; its train.steps is where that phase ends."""
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


def _explain(error: Any, schema: type[BaseModel]) -> str:
    *sections, last = _names(error)
    name = ".".join(shortened(part) for part in [*sections, last])
    if error["type"] == "extra_forbidden":
        known = _known_keys(sections, schema)
        close = difflib.get_close_matches(last, known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        return f"{name}: unknown key{hint} {name.rpartition('.')[0] or 'a config'} has: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{name}: is missing; add it, or give {name}=VALUE on the command line"
    message = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if error["type"] == "model_type":
        message = f"should be a section: {', '.join(_known_keys([*sections, last], schema))}"
    return f"{name}={written(error.get('input'))}: {message}"


def written(value: Any) -> str:
    """A value as one would write it in a config; the middle of a long one is left out."""
    return shortened(json.dumps(value, ensure_ascii=False, default=str))


class Layout(Section):
    """How `world` ranks share one step."""

    world: int
    dp: int  # data-parallel replicas
    tp: int
    pp: int
    micro_batch: int  # samples
    accumulate: int  # micro batches a step and a replica


def layout(cfg: Config, stack: str, world: int) -> Layout:
    """The layout of `stack` on `world` ranks; BadInput if the batch or the ranks do not divide. Torch-free."""
    system = getattr(cfg, stack)
    tp, pp = getattr(system, "tp", 1), getattr(system, "pp", 1)
    problems = [*cfg.model.layout_problems(cfg, stack), *_optimizer_problems(cfg, stack)]
    if tp * pp > world:
        problems.append(
            f"{stack}.tp={tp} x {stack}.pp={pp} needs {tp * pp} processes and there are {world}; "
            f"set NPROC={tp * pp} (or more nodes), or lower tp or pp"
        )
    elif world % (tp * pp):
        problems.append(f"{world} processes are not a multiple of {stack}.tp={tp} x {stack}.pp={pp}")
    dp = max(1, world // (tp * pp))
    batch, micro = cfg.train.global_batch, system.micro_batch
    if batch % (micro * dp):
        problems.append(
            f"train.global_batch={batch} is not a multiple of {stack}.micro_batch={micro} x {dp} data-parallel ranks; "
            + (f"{stack}.micro_batch may be {fit}" if (fit := _divisors(batch, dp)) else "change the number of processes")
        )
    if problems:
        raise BadInput(problems)
    return Layout(world=world, dp=dp, tp=tp, pp=pp, micro_batch=micro, accumulate=batch // (micro * dp))


# Optimizers that look at a whole parameter: layouts that hold parts of one cannot step it exactly.
WHOLE = {
    "lamb": "scales each parameter's update by the norms of the whole parameter",
    "adafactor": "keeps the mean squares of the rows and columns of the whole parameter, and scales by its root mean square",
}


def _optimizer_problems(cfg: Config, stack: str) -> Iterator[str]:
    name, system = cfg.optim.optimizer, getattr(cfg, stack)
    if name not in WHOLE:
        return
    instead = "use deepspeed.zero_stage=0, the baseline, or optim.optimizer=adamw"
    if stack == "megatron":
        yield (
            f"optim.optimizer={name} on megatron: it {WHOLE[name]}, and Megatron's layers fuse query, key and value into one "
            f"parameter and tensor parallelism splits it; {instead}"
        )
    elif stack == "deepspeed" and system.zero_stage:
        yield (
            f"optim.optimizer={name} with deepspeed.zero_stage={system.zero_stage}: it {WHOLE[name]}, and ZeRO steps flat "
            f"partitions; {instead}"
        )
    elif stack == "deepspeed" and system.tp > 1:
        yield f"optim.optimizer={name} with deepspeed.tp={system.tp}: it {WHOLE[name]}; use deepspeed.tp=1"


def _divisors(batch: int, dp: int) -> str:
    """'1, 2 or 4': the micro batches that fit, the smallest 16 and the largest."""
    share, rest = divmod(batch, dp)
    if rest:
        return ""
    small = [m for m in range(1, math.isqrt(share) + 1) if share % m == 0]
    fit = [str(m) for m in sorted({*small, *(share // m for m in small)})]
    if len(fit) > 17:
        fit[16:-1] = ["..."]
    return " or ".join([", ".join(fit[:-1]), fit[-1]]) if len(fit) > 1 else fit[0]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'model': {'layers': 4}} -> {'model.layers': 4}"""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value and prefix.count(".") < 1:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def science(cfg: Config) -> dict[str, Any]:
    """{'optim.lr': 6e-4, ...}: the keys that a continued run may not change."""
    keep = {}
    for key, value in flat(cfg.dump()).items():
        section, _, name = key.partition(".")
        free = FREE.get(section, ())
        if free is not ... and name not in free:
            keep[key] = value
    keep["phases"] = [{k: v for k, v in phase.items() if not k.startswith(STACKS)} for phase in cfg.phases]
    if cfg.phases:  # where one phase gives way to the next decides the loss; only where the last one ends does not
        keep["train.steps"] = cfg.train.steps
        keep["phases"][-1].pop("train.steps", None)
    return keep


def write_yaml(cfg: Config, path: str | Path) -> None:
    """Write a config; a reader sees the old file or the new one, never half of it."""
    part = Path(f"{path}.tmp")
    part.write_text(as_yaml(cfg), encoding="utf-8")
    part.replace(path)


def as_yaml(cfg: Config) -> str:
    return to_yaml(cfg.dump())


def write_section(path: str | Path, name: str, section: Section) -> None:
    """One section alone, to be put into a config."""
    text = to_yaml({name: section.model_dump(by_alias=True)}, default_flow_style=None)
    Path(path).write_text(text, encoding="utf-8")
