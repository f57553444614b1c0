"""docs/errors.md has every message that the code can print, and messages that it does print."""

import re
from collections.abc import Iterator

import pytest
from conftest import ROOT

from common import config
from common.errors import BadInput
from common.launch import launcher
from common.layout import layout_for
from recipes.bert import task as bert
from recipes.gpt import task as gpt
from recipes.t5 import task as t5
from scripts import document_errors

PAGE = ROOT / "docs/errors.md"
TASKS = {"gpt": gpt, "bert": bert, "t5": t5}


def test_the_page_is_that_of_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == document_errors.page(), "type: python -m scripts.document_errors"


def test_every_message_says_what_to_type_or_the_page_does() -> None:
    assert document_errors.unexplained() == [], "let the message say what to type, or add it to REMEDIES"


def templates() -> Iterator[re.Pattern[str]]:
    """The messages of the page as patterns; those that are little more than values are left out."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("- "):
            text = re.split(r"(?<=`) (?=[A-Z])", line[2:])[0].strip("` ")  # without what the page adds
            parts = re.split(r"\{[\w.]+\}", text)
            if sum(map(len, parts)) >= 8:
                yield re.compile(".*".join(map(re.escape, parts)), re.S)


TEMPLATES = list(templates())
BAD = [
    ("gpt", ["model.layrs=3"]),
    ("gpt", ["model.hidden=100", "model.heads=3", "optim.betas=[1, 2]", "optim.min_lr=1", "data.seq_len=4096"]),
    ("gpt", ["train.dtype=fp16", "optim.schedule=wsd", "deepspeed.offload=all", "model.tied=false", "novalue"]),
    ("gpt", ["deepspeed.pp=2", "deepspeed.zero_stage=3", "deepspeed.extra={reduce_scatter: false}"]),
    ("gpt", ["megatron.vpp=2", "megatron.pipeline_layout=Ex|L", "megatron.extra={fp8: hybrid}"]),
    ("bert", ["objective.pair=none", "model.pair_head=true", "model.heads=5"]),
    ("t5", ["model.max_distance=3", "data.target_len=3"]),
]
LAYOUTS = [
    ("gpt", "megatron", 3, ["megatron.tp=2"]),
    ("gpt", "megatron", 1, ["megatron.tp=2", "megatron.pp=2"]),
    ("gpt", "deepspeed", 2, ["train.global_batch=7"]),
    ("gpt", "baseline", 2, ["optim.optimizer=lamb", "baseline.shard=full"]),
    ("bert", "deepspeed", 2, ["deepspeed.sp=2"]),
    ("t5", "megatron", 2, ["megatron.pp=2"]),
    ("t5", "megatron", 2, ["megatron.cp=2"]),
]
ENVIRONMENTS = [
    {"NPROC": "x", "NNODES": "2", "NODE_RANK": "5"},
    {"NNODES": "4:2"},
    {"NODE_RANK": "1"},
    {"MAX_RESTARTS": "2"},
]


def expect_documented(problems: list[str]) -> None:
    assert problems
    assert [p for p in problems if not any(template.search(p) for template in TEMPLATES)] == []


@pytest.mark.parametrize(("family", "overrides"), BAD)
def test_problems_of_a_config(family: str, overrides: list[str]) -> None:
    with pytest.raises(BadInput) as refused:
        config.load(ROOT / f"recipes/{family}/configs/tiny.yaml", overrides, TASKS[family].Config)
    expect_documented(refused.value.problems)


@pytest.mark.parametrize(("family", "stack", "world", "overrides"), LAYOUTS)
def test_problems_of_a_layout(family: str, stack: str, world: int, overrides: list[str]) -> None:
    cfg = config.load(ROOT / f"recipes/{family}/configs/tiny.yaml", overrides, TASKS[family].Config)
    with pytest.raises(BadInput) as refused:
        layout_for(cfg, stack, world)
    expect_documented(refused.value.problems)


@pytest.mark.parametrize("env", ENVIRONMENTS, ids=str)
def test_problems_of_the_environment(env: dict[str, str]) -> None:
    with pytest.raises(BadInput) as refused:
        launcher.nodes(env)
    expect_documented(refused.value.problems)


def test_a_new_message_is_seen(tmp_path) -> None:
    """The collector, on code of its own."""
    (tmp_path / "scripts").mkdir()
    code = """
def main():
    if a: raise BadInput(f"--x {args.x}: must be {1 + 1} or more" if b else "give --x")
def problems(cfg) -> Iterator[str]:
    yield f"model.x={cfg.model.x}: is no x"
def other() -> str:
    return "no message at all"
"""
    (tmp_path / "scripts/new.py").write_text(code, encoding="utf-8")
    assert [m.text for m in document_errors.messages(tmp_path)] == [
        "--x {x}: must be {...} or more", "give --x", "model.x={x}: is no x",
    ]  # fmt: skip
