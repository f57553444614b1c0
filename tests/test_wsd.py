"""The schedule wsd (warmup, stable, decay): its formula written out, transformers' own, and what a config may say of it."""

import math

import pytest
import torch
from conftest import ROOT
from transformers import get_wsd_schedule

from common import config, preflight
from common.errors import BadInput
from common.training import optim
from recipes.gpt import task

LR, MIN, WARMUP, DECAY, TOTAL = 8e-3, 2e-3, 10, 40, 200
WSD = ["optim.schedule=wsd", "optim.wsd_decay_steps=8"]


def rate(step: int, style: str) -> float:
    """MiniCPM (arXiv:2404.06395, section 4) with the annealing forms of Megatron-LM's --lr-wsd-decay-style."""
    if step < WARMUP:
        return step / WARMUP * LR
    stable = TOTAL - DECAY
    if step < stable:
        return LR
    if step >= TOTAL:
        return MIN
    passed = (step - stable) / DECAY
    if style == "exponential":
        left = (2 ** (1 - passed)) - 1
    elif style == "linear":
        left = (TOTAL - step) / DECAY
    elif style == "cosine":
        left = math.cos(math.pi / 2 * passed) ** 2  # half of 1 + cos(pi x)
    else:
        left = 1 - passed**0.5
    return MIN + left * (LR - MIN)


def of_config(style: str) -> config.Optim:
    return config.Optim(
        lr=LR, min_lr=MIN, schedule="wsd", warmup_steps=WARMUP, decay_steps=TOTAL, wsd_decay_steps=DECAY, wsd_decay_style=style
    )


@pytest.mark.parametrize("style", ["exponential", "linear", "cosine", "minus_sqrt"])
def test_every_step_has_the_rate_of_the_formula(style: str) -> None:
    o = of_config(style)
    rates = [optim.lr_at(step, o) for step in range(1, TOTAL + 21)]
    assert rates == pytest.approx([rate(step, style) for step in range(1, TOTAL + 21)], rel=1e-12)
    assert set(rates[WARMUP - 1 : TOTAL - DECAY]) == {LR} and rates[TOTAL - DECAY] < LR
    assert set(rates[TOTAL - 1 :]) == {MIN}


@pytest.mark.parametrize(("style", "name"), [("linear", "linear"), ("cosine", "cosine"), ("minus_sqrt", "1-sqrt")])
def test_it_is_the_schedule_of_transformers(style: str, name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = get_wsd_schedule(optimizer, WARMUP, DECAY, num_training_steps=TOTAL, decay_type=name, min_lr_ratio=MIN / LR)
    for step in range(WARMUP, TOTAL + 10):  # its warmup begins at min_lr, ours and Megatron's at 0
        (expected,) = (base * schedule.lr_lambdas[0](step) for base in schedule.base_lrs)
        assert optim.lr_at(step, of_config(style)) == pytest.approx(expected, rel=1e-12)


def load(*overrides: str) -> task.Config:
    return config.load(ROOT / "recipes/gpt/configs/tiny.yaml", overrides, task.Config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.schedule=wsd"], "optim.schedule=wsd: give optim.wsd_decay_steps"),
        (["optim.wsd_decay_steps=8"], "optim.wsd_decay_steps=8: is for optim.schedule=wsd, and the schedule is cosine"),
        (
            [*WSD, "optim.decay_steps=9"],
            "optim.decay_steps=9 is below optim.warmup_steps=2 + optim.wsd_decay_steps=8",
        ),
        (
            [*WSD, "optim.decay_steps=20", "phases=[{train.steps: 40, optim.begin_step: 20}]"],
            "phases[0]: optim.begin_step begins a schedule; give its optim.decay_steps",
        ),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput) as refused:
        load(*overrides)
    assert len(refused.value.problems) == 1 and message in refused.value.problems[0]


def test_a_later_phase_may_begin_a_wsd_of_its_own() -> None:
    cfg = load(*WSD, "optim.decay_steps=20", "phases=[{train.steps: 60, optim.begin_step: 20, optim.decay_steps: 40}]")
    second = config.views(cfg)[1].optim
    assert [optim.lr_at(step, second) for step in (21, 22, 52, 60)] == [5e-4, 1e-3, 1e-3, 1e-4]


def test_a_short_trial_is_told_that_it_ends_before_the_decay(settings: list[str], tmp_path) -> None:
    path = str(ROOT / "recipes/gpt/configs/tiny.yaml")
    given = [*settings, *WSD, "train.steps=3"]
    run = preflight.prepare(path, str(tmp_path / "out"), given, "baseline", task, 1)
    assert run.cfg.optim.decay_steps == 10
    assert "the run ends at step 3, and optim.schedule=wsd reaches optim.min_lr at step 10" in run.notes
    run = preflight.prepare(path, str(tmp_path / "out"), [*settings, *WSD], "baseline", task, 1)
    assert run.cfg.optim.decay_steps == 20 and not any("wsd" in note for note in run.notes)
