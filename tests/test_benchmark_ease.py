"""common/comparison/ease.py: what is counted is what is there, each trap has its test, each mistake is a line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common import config, families
from common.comparison import ease, mistakes, refusals
from common.comparison.figures import Options, tables
from common.comparison.traps import TRAPS
from common.errors import BadInput
from recipes.gpt import task

STACKS = ("baseline", "deepspeed", "megatron")
SOURCE = '''\
"""A docstring
of two lines."""

import os  # a comment


def double(x):
    """Twice."""
    # alone
    text = """not
a docstring"""  # behind
    return "#" * 2 * x
'''


def test_code_lines_have_no_comments_docstrings_and_blanks() -> None:
    expected = ["import os", "def double(x):", '    text = """not', 'a docstring"""', '    return "#" * 2 * x']
    assert ease.code_lines(SOURCE) == expected


def test_lines_that_differ() -> None:
    assert ease.difference(["a", "b", "c"], ["a", "x", "y", "c"]) == (2, 1)
    assert ease.difference(["--x"], ["++y"]) == (1, 1)


def test_the_changes_of_a_diff_are_counted_by_file() -> None:
    document = "# T\n\n## Other\n\n```diff\n--- a\n+++ b/z\n+no\n```\n\n## Architecture: norms\n\ntext\n```diff\n"
    document += "--- a/recipes/mine/task.py\n+++ b/recipes/mine/task.py\n@@ -1 +1,2 @@\n one\n-two\n+three\n+four\n"
    document += "--- /dev/null\n+++ b/recipes/mine/new.py\n@@ -0,0 +1 @@\n+five\n```\n"
    assert ease.changed_lines(document, "Architecture") == {"recipes/mine/task.py": (2, 1), "recipes/mine/new.py": (1, 0)}
    with pytest.raises(ValueError, match="no diff behind the heading Optimizer"):
        ease.changed_lines(document, "Optimizer")


def test_shared_modules_belong_to_the_stacks_that_import_them() -> None:
    of = {stack: {path.stem for path in ease.stack_modules(stack)} for stack in STACKS}
    assert {"mcore", "fusions", "cuda_stand_in"} <= of["megatron"] - of["deepspeed"]
    assert {"zero", "ds_pipeline", "attention"} <= of["deepspeed"] - of["megatron"]
    assert not of["baseline"]


def test_packages_are_those_that_the_distributions_ask_for() -> None:
    plain, deepspeed, megatron = (ease.closure(ease.DISTRIBUTIONS[stack]) for stack in STACKS)
    assert {"torch", "numpy", "safetensors", "tokenizers"} <= plain and not {"deepspeed", "pytest"} & plain
    assert "hjson" in deepspeed - plain and "megatron-core" in megatron - plain
    assert ease.installed_bytes("deepspeed") > 1_000_000


@pytest.mark.parametrize("stack", STACKS)
def test_a_layout_needs_all_the_keys_that_are_counted(stack: str) -> None:
    """By the way that a user goes: accepted as written, and refused or another layout without one of the keys."""
    tiny = ROOT / "recipes/gpt/configs/tiny_llama.yaml"
    cells = {figure.subject: figure.value for figure in ease.layouts([stack]) if figure.metric == "written"}

    def accepted(words: list[str]) -> bool:
        try:
            cfg = config.load(tiny, ["data.valid=null", "model.vocab_size=512", *words], task.Config)
            return bool(refusals.layout_for(cfg, stack, refusals.RANKS))
        except BadInput:
            return False

    for name, written in cells.items():
        words = [f"{stack}.{word}" for word in re.findall(r"(\w+=(?:\[.*?\]|\S+))", str(written))]
        assert accepted(words), (name, words)
        key = name.split()[1].partition("=")[0]
        for word in words:
            rest = [other for other in words if other != word]
            is_own = word.startswith(f"{stack}.{key}=") or key == "sequence_parallel"  # accepted without tp, and does nothing
            assert is_own or not accepted(rest), (name, word)
    known = {"deepspeed pp": "pp=2", "deepspeed hpz": "zero_stage=3 hpz=2", "megatron vpp": "pp=2 vpp=2"}
    known["megatron sequence_parallel"] = "tp=2 sequence_parallel=true"
    assert {name: cells[name] for name in known if name.startswith(stack)} == {
        name: written for name, written in known.items() if name.startswith(stack)
    }


def test_a_reason_has_no_numbers_and_no_values() -> None:
    one = refusals.reason("deepspeed.tp=3 does not divide model.heads=4 and model.kv_heads=2")
    assert one == refusals.reason("deepspeed.tp=2 does not divide model.heads=9 and model.kv_heads=1")
    needs = [
        refusals.reason(f"megatron.{keys} needs 8 processes and there are 4; set NPROC=8")
        for keys in ("tp=8", "tp=4 x megatron.pp=2")
    ]
    assert needs[0] == needs[1] != one
    assert refusals.reason("deepspeed.partition=[1, 2]: is read only") == "deepspeed.partition: is read only"


def test_every_layout_of_the_baseline_is_accepted_and_others_are_refused() -> None:
    walks = {stack: refusals.walk("gpt", stack) for stack in STACKS}
    assert walks["baseline"].tried == walks["baseline"].accepted and not walks["baseline"].reasons
    for stack in STACKS[1:]:
        assert 0 < walks[stack].accepted < walks[stack].tried and len(walks[stack].reasons) > 9


# ---- traps


def test_every_trap_has_a_test_and_a_place_where_it_is_avoided() -> None:
    assert len({trap.name for trap in TRAPS}) == len(TRAPS) > 20
    for trap in TRAPS:
        assert trap.owner in (*STACKS, "libraries") and "\n" not in trap.silent, trap
        path, _, name = trap.test.partition("::")
        name = name.partition("[")[0]
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), trap.test
        file, words = trap.guard
        assert words in (ROOT / file).read_text(encoding="utf-8"), trap.guard


def test_rows_of_parity_that_hold_a_trap_exist() -> None:
    import test_parity

    rows = {f"{layout}-{arch}" for arch, layout in test_parity.FP32_ROWS + test_parity.SLOW_FP32_ROWS}
    named = {found[1] for trap in TRAPS if (found := re.search(r"test_parity.*\[(.+)\]$", trap.test))}
    assert named and named <= rows


# ---- mistakes


def test_ten_mistakes_are_refused_here_before_a_rank_starts(tmp_path: Path) -> None:
    if "megatron" not in families.stacks("gpt"):
        pytest.skip("recipes/gpt has no megatron")
    rows = list(mistakes.by_launcher(["megatron"], tmp_path))
    assert len(mistakes.MISTAKES) == 10 and len(rows) == 8
    assert all(row["code"] == 2 and 1 <= row["lines"] <= 2 for row in rows), rows
    assert not (tmp_path / "refused").exists()


def test_the_figures_are_one_kind_and_unit_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"mistake": "key", "stack": "megatron", "where": "alone", "code": 1, "lines": 26, "does": "TypeError"}
    silent = row | {"mistake": "nan", "code": 0, "lines": 0, "does": "trains on, loss nan"}
    monkeypatch.setattr(mistakes, "by_launcher", lambda *_: [row | {"where": "here", "lines": 1}])
    monkeypatch.setattr(mistakes, "by_ranks", lambda *_: [row, silent])
    found = {table.section: table for table in tables(ease.run(Options(stacks=STACKS), tmp_path))}
    lines = found["Ease of use / Lines of ten mistakes"].cells
    assert lines["misspelt key", "megatron here"].value == 1 and lines["misspelt key", "megatron alone"].value == 26
    assert lines["NaN in the first weights", "megatron alone"].value is None
    figures = [figure for table in found.values() for figure in table.cells.values()]
    drawing = mistakes.draw(figures)
    assert drawing is not None and {text.get_text() for text in drawing.axes[0].texts} == {"trains on"}
    assert mistakes.draw([]) is None
    assert all(figure.source.strip() for table in found.values() for figure in table.cells.values())
    assert not any("baseline" in subject for subject in found["Ease of use / Silent traps"].rows)


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS[1:])
def test_what_the_stacks_do_alone(stack: str, tmp_path: Path) -> None:
    """The attempt without a mistake trains; each other one fails, or shows what it does in place of an error."""
    mistakes.make_inputs(tmp_path)
    command = [sys.executable, "-m", "common.comparison.alone", str(tmp_path), stack]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | mistakes.ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    alone = {row["mistake"]: row for row in rows if row["where"] == "alone"}
    here = {row["mistake"]: row for row in rows if row["where"] == "here"}
    assert alone.keys() == {"none", *(mistake.name for mistake in mistakes.MISTAKES)}
    assert here["none"]["code"] == alone["none"]["code"] == 0
    assert here["nan"]["code"] == here["byte"]["code"] == 2 and here["nan"]["lines"] == here["byte"]["lines"] == 1
    assert (
        alone["nan"]["does"].startswith("trains on, loss nan") and alone["byte"]["does"] == "trains on, from 1 changed weight"
    )
    assert all(row["lines"] > 9 for row in alone.values() if row["code"])
    silent = {"deepspeed": {"key", "heads", "folder", "nan", "byte"}, "megatron": {"ids", "nan", "byte"}}
    assert {name for name, row in alone.items() if not row["code"]} == {"none", *silent[stack]}
