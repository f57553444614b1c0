"""A run's configuration: YAML values, a pydantic schema, `a.b=c` overrides. Torch-free, so that it is checked in a moment.

`model`, `data`, `optim`, `train` and `init` are the science: they decide the loss. `baseline`, `deepspeed` and `megatron` are
the systems: nothing in them may change it. Every problem is found and reported at once.
"""

import copy
import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from common.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent
STACKS = ("baseline", "deepspeed", "megatron")

Positive = Annotated[int, Field(gt=0, lt=2**31)]  # steps x samples, the largest product, is below 2^63
Count = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, Field(min_length=1)]


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
        return value
    raise ValueError("must be a prefix, a list of prefixes, or a list of [weight above 0, prefix]")


class Section(BaseModel):
    """Values as written: unknown keys and silent conversions ('4' for 4) are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Data(Section):
    train: Annotated[str | list, PlainValidator(_blend)]  # prefix of a .bin/.idx, or a blend of them
    valid: NonEmpty | None = None
    seq_len: Positive  # tokens of a sample that are predicted (the block size)
    tokenizer: NonEmpty | None = None  # folder; default: the one that the corpus was made with
    pack: bool = True  # True: windows over the stream of documents. False: one document a sample, padded
    eod_mask_loss: bool = False  # do not learn to predict the first token of the next document
    reset_attention: bool = False  # attention and positions begin anew at each document


class Optim(Section):
    lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Count = 0
    decay_steps: Positive | None = None  # steps, warmup included, until min_lr; default: train.steps at the first start
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
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


class Init(Section):
    from_: Annotated[str, Field(alias="from", min_length=1)] = "scratch"  # or a Hugging Face folder of the same shape

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class Expect(Section):
    value: float
    tolerance: Annotated[float, Field(ge=0)]
    source: str


class Baseline(Section):
    micro_batch: Positive = 1
    recompute: bool = False


class DeepSpeed(Section):
    micro_batch: Positive = 1
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    tp: Positive = 1
    offload: bool = False  # optimizer state in CPU memory
    recompute: bool = False
    extra: dict[str, Any] = {}  # merged last into ds_config; not for published rows


class Megatron(Section):
    micro_batch: Positive = 1
    tp: Positive = 1
    pp: Positive = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: bool = False
    transformer_engine: bool = False
    extra: dict[str, Any] = {}  # merged last into TransformerConfig; not for published rows


class Config[M: Section](Section):
    model: M
    data: Data
    optim: Optim
    train: Train
    init: Init = Init()
    expect: dict[str, Expect] = {}
    baseline: Baseline = Baseline()
    deepspeed: DeepSpeed = DeepSpeed()
    megatron: Megatron = Megatron()

    def dump(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True)


# What a continued run may change without becoming another run. Paths under `data` are compared by content, not by name.
FREE = {
    "train": {"steps", "eval_every", "eval_samples", "save_every", "keep"},
    "data": {"train", "valid", "tokenizer"},
    "expect": ..., "baseline": ..., "deepspeed": ..., "megatron": ...,
}  # fmt: skip


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `6e-4` as a number and refuses a key that is given twice or is no word."""

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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        if not path.is_file():
            raise BadInput(no_such_config(path))
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, no such date
        told = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise BadInput(f"{path}: not YAML: {told}") from None
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
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            problems.append(f"override {text!r}: must be section.key=value, for example train.steps=100")
            continue
        *sections, last = key.split(".")
        node = values
        for name in sections:
            child = node.get(name)
            if child is None:
                child = node[name] = {}
            if not isinstance(child, dict):
                problems.append(f"override {text!r}: {name} is a value, not a section")
                break
            node = child
        else:
            try:
                node[last] = yaml.load(value, _Loader)
            except (yaml.YAMLError, ValueError, RecursionError):
                problems.append(f"override {text!r}: {value!r} is not a YAML value; quote it: {key}='\"{value}\"'")
    return problems


def load[M: Section](path: str | Path, overrides: Sequence[str], model: type[M]) -> Config[M]:
    """Read, override and validate; BadInput carries every problem, one line each, that this module can see.

    model: the family's section of the schema, with a method `problems() -> Iterator[str]` for rules of its own.
    """
    values = read_yaml(path)
    problems = apply_overrides(values, overrides)
    values = {k: ({} if v is None else v) for k, v in values.items()}  # an empty section holds its defaults
    try:
        cfg = Config[model].model_validate(values)
    except ValidationError as error:
        problems += [_explain(e, model) for e in error.errors(include_url=False)]
        cfg, bad = _without_bad_keys(values, model)
        told = list(_rules(cfg)) if cfg is not None else []
        problems += [rule for rule in told if not any(re.search(rf"\b{re.escape(key)}\b", rule) for key in bad)]
    else:
        problems += _rules(cfg)
    if problems:
        raise BadInput([f"{path}: {p}" if not p.startswith("override") else p for p in dict.fromkeys(problems)])
    return cfg


STAND_INS = ({}, 1, "-", True, [])  # for a required key of whatever type


def _without_bad_keys[M: Section](values: dict[str, Any], model: type[M]) -> tuple[Config[M] | None, set[str]]:
    """The config with its bad values dropped or, where one is required, replaced, so that the rules between keys are
    checked in the same go; and the names of those keys, of which the rules say nothing of worth."""
    values = copy.deepcopy(values)
    tried: dict[tuple[str, ...], int] = {}  # how many of STAND_INS
    while True:
        try:
            return Config[model].model_validate(values), {".".join(key) for key in tried}
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


def _rules(cfg: Config) -> Iterator[str]:
    yield from cfg.model.problems()
    positions = getattr(cfg.model, "positions", None)
    if positions is not None and positions < cfg.data.seq_len:
        yield f"model.positions={positions} is below data.seq_len={cfg.data.seq_len}"
    o, t = cfg.optim, cfg.train
    if o.min_lr > o.lr:
        yield f"optim.min_lr={o.min_lr} is above optim.lr={o.lr}"
    if o.decay_steps is not None and o.decay_steps < o.warmup_steps:
        yield f"optim.decay_steps={o.decay_steps} is below optim.warmup_steps={o.warmup_steps}"
    if not all(0 <= b < 1 for b in o.betas):
        yield f"optim.betas={o.betas}: each must be at least 0 and below 1"
    if t.dtype == "bf16" and cfg.deepspeed.zero_stage == 0:
        yield (
            "deepspeed.zero_stage=0 with train.dtype=bf16: DeepSpeed accumulates gradients in bf16 there, which changes the "
            "loss; use deepspeed.zero_stage=1, 2 or 3"
        )
    if cfg.deepspeed.offload and cfg.deepspeed.zero_stage == 0:
        yield "deepspeed.offload=true needs deepspeed.zero_stage=1, 2 or 3"


def _known_keys(loc: Sequence[str], model: type[BaseModel]) -> list[str]:
    """The keys of the section at `loc`."""
    node: Any = Config[model]
    for name in loc:
        if get_origin(node) is dict:  # expect: the names are the user's
            node = get_args(node)[1]
            continue
        field = getattr(node, "model_fields", {}).get(name)
        if field is None:
            return []
        node = field.annotation
    return [f.alias or n for n, f in getattr(node, "model_fields", {}).items()]


def _explain(error: Any, model: type[BaseModel]) -> str:
    *sections, last = _names(error)
    name = ".".join([*sections, last])
    if error["type"] == "extra_forbidden":
        known = _known_keys(sections, model)
        close = difflib.get_close_matches(last, known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        return f"{name}: unknown key{hint} {'.'.join(sections) or 'a config'} has: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{name}: is missing; add it, or give {name}=VALUE on the command line"
    message = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if error["type"] == "model_type":
        message = f"should be a section: {', '.join(_known_keys([*sections, last], model))}"
    return f"{name}={written(error.get('input'))}: {message}"


def written(value: Any) -> str:
    """A value as one would write it in a config."""
    return json.dumps(value, ensure_ascii=False, default=str)


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
    problems = list(cfg.model.layout_problems(cfg, stack))
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
            f"{stack}.micro_batch may be {_divisors(batch, dp) or 'none: change the number of processes'}"
        )
    if problems:
        raise BadInput(problems)
    return Layout(world=world, dp=dp, tp=tp, pp=pp, micro_batch=micro, accumulate=batch // (micro * dp))


def _divisors(batch: int, dp: int) -> str:
    """'1, 2 or 4': the micro batches that fit."""
    if batch % dp:
        return ""
    fit = [str(m) for m in range(1, batch // dp + 1) if batch // dp % m == 0]
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
    return keep


def write_yaml(cfg: Config, path: str | Path) -> None:
    """Write a config; a reader sees the old file or the new one, never half of it."""
    part = Path(f"{path}.tmp")
    part.write_text(yaml.safe_dump(cfg.dump(), sort_keys=False, width=120), encoding="utf-8")
    part.replace(path)


def write_section(path: str | Path, name: str, section: Section) -> None:
    """One section alone, to be put into a config."""
    text = yaml.safe_dump({name: section.model_dump(by_alias=True)}, sort_keys=False, width=120, default_flow_style=None)
    Path(path).write_text(text, encoding="utf-8")
