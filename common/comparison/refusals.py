"""Which layouts are refused before a run starts, and for how many reasons: a walk over the values of a stack's keys."""

import importlib
import itertools
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from common import config, families
from common.config import Config
from common.errors import BadInput
from common.layout import layout_for
from common.paths import ROOT

RANKS = 4
AT_ONCE = 3  # keys that differ from their defaults, at most: no rule of layout_for names more
OF_THE_MACHINE = ("transformer_engine", "quantized_weights", "quantized_gradients")  # need a package or a GPU: not walked
CONFIGS = {"gpt": "tiny_llama", "bert": "tiny", "t5": "tiny_v1_1"}
VALUES: dict[str, list[Any]] = {  # of keys whose values the schema does not list
    "micro_batch": [1, 2],
    "tp": [1, 2, 3],
    "pp": [1, 2, 3],
    "cp": [1, 2, 3],
    "sp": [1, 2, 3],
    "vpp": [1, 2, 3],
    "zero_stage": [0, 1, 2, 3],
    "partition": ["parameters", "uniform", [1, 3], [1, 2], [1, 1, 2]],
    "pipeline_layout": ["even", "embedding_and_loss", "Ettt|tL", "Et"],
    "nvme": [None],  # of which the folder and libaio decide
    "hpz": [1, 2],
    "extra": [{}],
    "fusions": [None],
    "transformer_engine": [False, True],
}
Keys = dict[str, Any]


class Walk(NamedTuple):
    tried: int  # layouts
    accepted: int
    reasons: set[str]  # the refusals, without their numbers and values


def compared() -> list[dict[str, Any]]:
    """The layouts that tests compared with a plain loop, as tests/layout_table.py records them."""
    path = ROOT / "tests/layouts.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return rows


def values_of(name: str, annotation: Any) -> list[Any]:
    """The values of a key that the walk has."""
    if name in VALUES:
        return VALUES[name]
    if annotation is bool:
        return [False, True]
    choices = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    if get_origin(choices) is Literal:
        return list(get_args(choices))
    raise AssertionError(f"{name}: add its values to VALUES")


def start(family: str) -> Config:
    """The family's tiny config."""
    configs = families.RECIPES / family / "configs"
    path = configs / f"{CONFIGS.get(family, 'tiny')}.yaml"
    task = importlib.import_module(f"recipes.{family}.task")
    return config.load(path, ["data.valid=null", "model.vocab_size=512"], task.Config)


def problems(cfg: Config, stack: str, keys: Keys, ranks: int = RANKS) -> list[str]:
    """The lines by which a layout is refused; none if it is accepted."""
    one = cfg.model_copy(update={stack: config.sections(Config)[stack].model_validate(keys)})
    found = list(config.problems(one))
    try:
        layout_for(one, stack, ranks)
    except BadInput as error:
        found += error.problems
    return found


def layouts(stack: str) -> Iterator[Keys]:
    """All layouts in which at most AT_ONCE keys differ from their defaults."""
    kind = config.sections(Config)[stack]
    defaults = kind.model_validate({}).model_dump()
    others = {
        name: [value for value in values_of(name, field.annotation) if value != defaults[name]]
        for name, field in kind.model_fields.items()
        if name not in OF_THE_MACHINE
    }
    for number in range(AT_ONCE + 1):
        for names in itertools.combinations(others, number):
            for values in itertools.product(*(others[name] for name in names)):
                yield dict(zip(names, values, strict=True))


def walk(family: str, stack: str) -> Walk:
    cfg, tried, accepted = start(family), 0, 0
    reasons: set[str] = set()
    for keys in layouts(stack):
        found = problems(cfg, stack, keys)
        tried, accepted = tried + 1, accepted + (not found)
        reasons |= set(map(reason, found))
    return Walk(tried, accepted, reasons)


def reason(problem: str) -> str:
    """A refusal without its numbers, values and advice: what is refused, whatever it was given."""
    text = problem.partition(";")[0]
    text = re.sub(r'=(\[[^\]]*\]|"[^"]*"|[^\s,:)]+)', "", text)
    text = re.sub(r"\b\d+\b", "N", text)
    text = re.sub(r"^[\w.]+( x [\w.]+)* needs N processes", "ranks need N processes", text)
    return re.sub(r"not a multiple of [\w.]+( x [\w.]+)*$", "not a multiple of the ranks", text)
