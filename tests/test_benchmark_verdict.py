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
    assert favoured([deepspeed, megatron], "Performance: GPT, fastest layout") == favour


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
    assert lines[2].endswith("| measured | - | 1.200 [1.100 .. 1.300] | 1.000 | DeepSpeed |")


def test_every_row_of_the_readme_is_one_of_the_verdict() -> None:
    assert verdict.IN_README.keys() <= {head.name for head in verdict.HEADS}


def cells(**answers: str) -> list[Figure]:
    """The table of choices; a keyword such as b13_64 is the cell of 13B on 64 GPUs."""
    models = {"b1": "1.3B", "b13": "13B", "b70": "70B (Llama)", "b175": "175B"}
    found = []
    for name, answer in answers.items():
        model, gpus = name.split("_")
        found.append(Figure(verdict.CHOICES, models[model], f"{int(gpus):,} GPUs", answer, "", "predicted", "x"))
    return found


EITHER = "either: deepspeed zero=2 micro=2, or megatron tp=2 sp dist-opt micro=4"
OFFLOAD = "deepspeed zero=3 offload=all recompute micro=2 (9 GB of host memory per node)"


def test_the_verdict_in_words_follows_the_cells() -> None:
    lines = verdict.in_words(cells(b1_8=OFFLOAD, b13_64=EITHER, b70_64="megatron pp=8", b70_1024="megatron tp=8"))
    offload = "deepspeed.zero_stage=3 deepspeed.offload=all deepspeed.recompute=true deepspeed.micro_batch=2"
    assert [line.partition("**: ")[2] for line in lines] == [
        f"DeepSpeed (`{offload}`). Its best layout is the fastest.",
        "DeepSpeed and Megatron Core are equally fast, within the error of the prediction. Take the simpler, DeepSpeed "
        "(`deepspeed.zero_stage=2 deepspeed.micro_batch=2`).",
        "Megatron Core. Its best layout is the fastest.",
    ]
    [line] = verdict.in_words(cells(b70_64="megatron pp=8", b175_64="does not fit: needs 3,143 GB of host memory per node"))
    assert "It depends" in line
    [line] = verdict.in_words(cells(b13_64="does not fit"))
    assert "No layout of these recipes fits" in line


def test_the_table_of_choices_names_stacks_alone() -> None:
    every = "either: baseline micro=4, or deepspeed zero=1 micro=8, or megatron micro=8"
    lines = verdict.table_of_choices(cells(b1_8=every, b1_64=EITHER, b13_8=OFFLOAD, b13_64="does not fit: needs 9 GB"))
    assert lines[0] == "| GPT | 8 H100 | 64 H100 |"
    assert lines[2:] == ["| 1.3B | any | DeepSpeed or Megatron |", "| 13B | DeepSpeed, offload | does not fit |"]


def test_the_largest_model_in_words_names_the_stack_that_has_it() -> None:
    rows = (("1 GPU: deepspeed zero=3", 4.0), ("1 GPU: megatron", 40.25))
    found = [Figure(verdict.LARGEST, row, "estimate", b, "billion parameters", "predicted", "x") for row, b in rows]
    [line] = verdict.in_words(found)
    assert "Megatron Core. On one GPU with 2 TB of CPU memory, a GPT of up to 40.2 billion parameters fits" in line
    assert line.endswith("against 4 billion with DeepSpeed.")
