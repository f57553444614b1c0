"""common/comparison/verdict.py: which stack a figure is in favour of, and what the README shows."""

import pytest

from common.comparison import verdict
from common.comparison.figures import Figure, tables


def ratio(stack: str, value: float, spread: tuple[float, float] | None = None, label: str = "GPT") -> Figure:
    return Figure(f"Performance / {label}, best", stack, "ratio", value, "of baseline", "measured", "python -m x", spread)


def favoured(found: list[Figure], name: str) -> object:
    [figure] = [f for f in verdict.figures(found) if f.metric == verdict.BETTER and f.subject.startswith(name)]
    return figure.value


@pytest.mark.parametrize(
    ("deepspeed", "megatron", "favour"),
    [
        (ratio("deepspeed", 0.9, (0.8, 1.0)), ratio("megatron", 1.1, (1.01, 1.2)), "megatron"),
        (ratio("deepspeed", 0.9, (0.8, 1.02)), ratio("megatron", 1.1, (1.01, 1.2)), verdict.UNCLEAR),
        (ratio("deepspeed", 1.2), ratio("megatron", 1.0), "deepspeed"),
        (ratio("deepspeed", 1.05), ratio("megatron", 1.0), verdict.UNCLEAR),
    ],
)
def test_a_figure_is_in_favour_of_a_stack_only_beyond_its_spread(deepspeed: Figure, megatron: Figure, favour: str) -> None:
    assert favoured([deepspeed, megatron], "Performance: GPT on the machine") == favour


def test_fewer_lines_are_better_and_a_missing_stack_decides_nothing() -> None:
    lines = [
        Figure("Ease of use / Change of architecture", stack, "added", count, "lines", "counted", "python -m x")
        for stack, count in (("deepspeed", 0), ("megatron", 6))
    ]
    assert favoured(lines, "Ease of use: lines for a change") == "deepspeed"
    assert favoured(lines[1:], "Ease of use: lines for a change") is None


def test_the_largest_model_is_that_of_the_best_layout() -> None:
    rows = (("1 GPU: deepspeed zero=1", 2.0), ("1 GPU: deepspeed zero=3 offload=all", 9.0), ("1 GPU: megatron", 3.0),
            ("16 GPUs: megatron", 99.0))  # fmt: skip
    unit = "billion parameters"
    found = [Figure("Scalability / Largest GPT per GPU", row, "H100 80 GB", b, unit, "counted", "x") for row, b in rows]
    cells = {f.metric: f.value for f in verdict.figures(found) if "largest GPT on 1 H100 80 GB, without" in f.subject}
    assert cells == {"baseline": None, "deepspeed": 9.0, "megatron": 3.0, verdict.BETTER: "deepspeed"}


def test_pros_of_one_are_cons_of_the_other_and_no_column_mixes_kinds() -> None:
    made = verdict.figures([ratio("deepspeed", 1.2), ratio("megatron", 1.0)])
    tables(made)
    cells = {f.subject: f.value for f in made if f.section.endswith("Pros and cons") and f.kind == "measured"}
    assert cells["deepspeed: pros"] == cells["megatron: cons"] and str(cells["deepspeed: pros"]).startswith("Performance: GPT")
    assert cells["megatron: pros"] == cells["deepspeed: cons"] == "none"
    assert not verdict.figures([])


def test_the_readme_table_names_the_kind_of_each_row() -> None:
    lines = verdict.shown_in_readme(verdict.figures([ratio("deepspeed", 1.2, (1.1, 1.3)), ratio("megatron", 1.0)]))
    assert lines[2].endswith("| measured | - | 1.200 [1.100 .. 1.300] | 1.000 | deepspeed |")
