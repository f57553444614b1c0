"""The whole product of small values of each stack's keys: every layout either runs or is refused in one line.

The runs are slow, so only layouts that together have every pair of values of two keys are run, and the fast suite runs part of
these.
"""

import itertools
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, case, losses
from test_parity import LOSS, NORM

from common import config, families
from common.comparison import refusals
from common.comparison.refusals import CONFIGS, RANKS, Keys, values_of
from common.config import Config
from common.errors import BadInput
from common.layout import layout_for
from tests import plain, plain_bert, plain_t5

pytestmark = pytest.mark.timeout(7200)  # the first test waits for all runs
STEPS = 3
TRIED = 200  # layouts of which one is chosen
FAST = 1  # of the layouts that are run, per family and stack
WORDS = 60  # of a message, at most


start = cache(refusals.start)


def product(family: str, stack: str) -> Iterator[tuple[Keys, list[str]]]:
    """(keys of the stack, reasons for which they are refused) of the whole product."""
    cfg, kind = start(family), config.sections(Config)[stack]
    options = {name: values_of(name, field.annotation) for name, field in kind.model_fields.items()}
    for combination in itertools.product(*options.values()):
        keys = dict(zip(options, combination, strict=True))
        if not is_walked(keys):
            continue
        one = cfg.model_copy(update={stack: kind.model_validate(keys)})
        problems = list(config._rules(one))
        try:
            layout_for(one, stack, RANKS)
        except BadInput as error:
            problems += str(error).splitlines()
        yield keys, problems


def is_walked(keys: Keys) -> bool:
    """ZeRO++'s keys are not combined with all values of the others: the product would have eight times as many layouts."""
    quantized = keys.get("quantized_weights") or keys.get("quantized_gradients")
    if (quantized or keys.get("hpz", 1) > 1) and keys["partition"] != "parameters":
        return False
    return not quantized or keys["micro_batch"] == keys["hpz"] == 1 and not keys["recompute"]


def covering(accepted: list[Keys]) -> list[Keys]:
    """Few of these layouts, which have together every pair of values that one of them has: each is the best of TRIED."""
    order, chosen = random.Random(1), []
    pairs = [set(itertools.combinations(((name, json.dumps(value)) for name, value in keys.items()), 2)) for keys in accepted]
    missing = set().union(*pairs)
    while missing:
        tried = [n for n in order.sample(range(len(accepted)), len(accepted)) if pairs[n] & missing][:TRIED]
        best = max(tried, key=lambda n: (len(pairs[n] & missing), not accepted[n].get("compile")))  # compiling takes longest
        chosen.append(accepted[best])
        missing -= pairs[best]
    return chosen


@cache
def chosen(family: str, stack: str) -> list[Keys]:
    """The layouts that are run."""
    return covering([keys for keys, problems in product(family, stack) if not problems])


STACKS = [(family, stack) for family in ("gpt", "bert", "t5") for stack in config.STACKS if stack in families.stacks(family)]


@pytest.mark.parametrize(("family", "stack"), STACKS)
def test_each_layout_is_accepted_or_refused_in_one_line(family, stack):
    rows = list(product(family, stack))
    accepted = [keys for keys, problems in rows if not problems]
    assert 0 < len(accepted)
    for keys, problems in rows:
        assert len(set(problems)) == len(problems), (keys, problems)
        for problem in problems:
            assert problem and problem.isprintable() and len(problem.split()) <= WORDS, (keys, problem)
            assert f"{stack}." in problem or "model." in problem or "optim." in problem, (keys, problem)


def overrides(stack: str, keys: Keys) -> list[str]:
    return [f"{stack}.{key}={config.written(value)}" for key, value in keys.items()]


@pytest.fixture(scope="module")
def runs(drive, settings, bert_settings, t5_settings, with_slow, tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """(folder of all runs: FAMILY/STACK/NUMBER, settings by family)"""
    out = tmp_path_factory.mktemp("product")
    data = {"gpt": settings, "bert": bert_settings, "t5": t5_settings}
    more = {family: [*words, f"train.steps={STEPS}", "optim.decay_steps=20"] for family, words in data.items()}
    for family, stack in STACKS:
        cases = [
            case(stack, CONFIGS[family], out / f"{family}/{stack}/{number}", more[family] + overrides(stack, keys), 0, family)
            for number, keys in enumerate(chosen(family, stack)[: None if with_slow else FAST])
        ]
        drive(cases, RANKS)
    return out, more


@pytest.fixture(scope="module")
def reference(runs) -> dict[str, list[tuple[float, float]]]:
    """{family: [(loss, norm) of each step]} of the plain loops."""
    loops = {"gpt": plain.losses, "bert": plain_bert.losses, "t5": plain_t5.losses}
    return {
        family: loop(ROOT / f"recipes/{family}/configs/{CONFIGS[family]}.yaml", runs[1][family])
        for family, loop in loops.items()
    }


@pytest.mark.parametrize("share", ["first", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "stack"), STACKS)
def test_accepted_layouts_run_and_follow_the_loop(runs, reference, family, stack, share):
    for number, keys in enumerate(chosen(family, stack)[: FAST if share == "first" else None]):
        lines = losses(runs[0] / f"{family}/{stack}/{number}")
        assert sorted(lines) == list(range(1, STEPS + 1)), keys
        for step, (loss, norm) in enumerate(reference[family], 1):
            assert abs(lines[step]["loss"] - loss) <= LOSS, (keys, step)
            assert abs(lines[step]["grad_norm"] - norm) <= NORM * norm, (keys, step)
