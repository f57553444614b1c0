"""docs/precision.md: the dtypes of its table are those of the tensors of a bf16 run (tests/precision.py)."""

import json
import re

import pytest
from conftest import ROOT

from tests import warm

PAGE = ROOT / "docs/precision.md"
LAYOUTS = {  # columns of the table
    "baseline": ("baseline", []),
    "baseline, FSDP2": ("baseline", ["baseline.shard=full"]),
    "ZeRO 0": ("deepspeed", ["deepspeed.zero_stage=0"]),
    "ZeRO 1": ("deepspeed", ["deepspeed.zero_stage=1"]),
    "ZeRO 2": ("deepspeed", ["deepspeed.zero_stage=2"]),
    "ZeRO 3": ("deepspeed", ["deepspeed.zero_stage=3"]),
    "Megatron": ("megatron", ["megatron.distributed_optimizer=false"]),
    "Megatron, distributed optimizer": ("megatron", ["megatron.distributed_optimizer=true"]),
}
ROWS = {  # rows of the table -> the operators, with the position of the argument, whose dtype they give
    "weights in the forward pass": r"embedding 0",
    "matrix products": r"(mm|addmm|bmm) [012]",
    "attention": r"_scaled_dot_product_\w+_attention\w* [012]",
    "softmax of the loss": r"(_log_softmax|exp_?) 0",
    "gradients, accumulated over micro batches": r"add_ 0",
    "gradients, summed over ranks": r"(allreduce|_?reduce_scatter)\w* 0",
    "weights, gathered from ranks": r"_?allgather\w* 0",
    "master weights": r"_fused_adamw_ 0",
    "gradients in the optimizer": r"_fused_adamw_ 1",
    "first moments": r"_fused_adamw_ 2",
    "second moments": r"_fused_adamw_ 3",
}
NAMES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16"}


@pytest.fixture(scope="module")
def observed(settings, tmp_path_factory) -> dict[str, dict[str, set[str]]]:
    """{column: {operator and position: names of dtypes}}"""
    out = tmp_path_factory.mktemp("precision")
    config = str(ROOT / "recipes/gpt/configs/tiny_llama.yaml")
    cases = [
        [f"recipes.gpt.{stack}.pretrain", [config, f"{out}/{n}", *settings, "train.steps=2", "train.dtype=bf16", *more]]
        for n, (stack, more) in enumerate(LAYOUTS.values())
    ]
    done = warm.run(["tests/precision.py", json.dumps(cases)], 2)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in re.findall(r"^DTYPES (.*)$", done.stdout, re.M)]
    named = [{key: {NAMES[kind] for kind in kinds} for key, kinds in line.items()} for line in lines]
    return dict(zip(LAYOUTS, named, strict=True))


def table() -> dict[tuple[str, str], str]:
    """{(row, column): cell} of the page."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if line[:1] == "|"]
    head, _, *rows = lines
    return {(row[0], column): cell for row in rows for column, cell in zip(head[1:], row[1:], strict=True)}


@pytest.mark.parametrize("column", LAYOUTS)
@pytest.mark.parametrize("row", ROWS)
def test_the_table_tells_the_dtypes(observed, row, column):
    found = [kinds for operator, kinds in observed[column].items() if re.fullmatch(ROWS[row], operator)]
    assert table()[row, column] == (", ".join(sorted(set().union(*found))) or "-")


def test_the_table_has_no_other_cells():
    assert set(table()) == {(row, column) for row in ROWS for column in LAYOUTS}
