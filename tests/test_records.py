"""docs/results: records say what the documents say, load with today's configs, and are credited to no other config."""

import json
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from test_check import CPU, command, run_folder

from common.checkpoints import run_record
from common.errors import BadInput
from common.screen import count
from scripts import check

RESULTS = ROOT / "docs/results"
RECORDS = sorted(path.parent for path in RESULTS.rglob("run.json"))
TABLES = sorted(RESULTS.rglob("table.md"))


def name_of(path: Path) -> str:
    return str(path.relative_to(RESULTS).parent if path.suffix else path.relative_to(RESULTS))


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_a_record_belongs_to_its_folder_and_config(record: Path) -> None:
    info = check.run_json(record)
    family, name, *rest = record.relative_to(RESULTS).parts
    assert info["family"] == family and info["stack"] in rest
    assert info["config"] == name or name == "finetune_minilm"
    check.unchanged(record, check.recipe_config(record, info, ROOT))
    cfg = check.recorded_config(record, info)
    assert check.record_of(record)["steps"] == cfg.last_step
    assert check.finished(record, cfg)
    assert {path.name for path in record.iterdir()} <= {"run.json", "record.yaml", "loss.tsv", "eval.json"}


@pytest.mark.parametrize("path", TABLES, ids=name_of)
def test_a_table_follows_from_its_records(path: Path) -> None:
    """Steps, largest difference, validation loss, speed and memory: all but the loss of the export."""
    lines = [line.strip("|").split("|") for line in path.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines[2:]]
    assert len(rows) >= 2
    losses, speeds = {}, {}
    for name, layout, steps, difference, valid, _, speed, ratio, memory in rows:
        logged, record = check.logged(path.parent / name), check.record_of(path.parent / name)
        losses[name] = {line["step"]: line["loss"] for line in logged if "loss" in line}
        speeds[name] = record["tokens_per_s"]
        first = rows[0][0]
        assert layout.startswith(check.run_json(path.parent / name)["stack"]) and int(steps.replace(",", "")) == record["steps"]
        gap, step = max((abs(losses[name][step] - losses[first][step]), step) for step in losses[name])
        assert difference == ("-" if name == first else f"{gap:.1e} at step {step:,}")
        assert valid == f"{[line['valid_loss'] for line in logged if 'valid_loss' in line][-1]:.5f}"
        assert speed == count(speeds[name]) and ratio == f"{speeds[name] / speeds[first]:.2f}"
        assert memory == f"{record['mem_bytes'] / 2**30:.2f} GiB"


def test_the_commit_of_a_run_says_whether_its_code_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr(run_record, "ROOT", tmp_path)
    task, copy, result = (tmp_path / name for name in ("recipes/gpt/task.py", "recipes/mine/task.py", "out/run/hf/config.json"))
    for path in (task, result):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    assert run_record.commit() == "unknown"
    git("init")
    git("add", "recipes")
    git("commit", "-m", "a recipe")
    assert re.fullmatch("[0-9a-f]{12}", run_record.commit()), "the untracked result is no code"
    copy.parent.mkdir()
    copy.write_text("1")
    assert re.fullmatch(r"[0-9a-f]{12}\+changes", run_record.commit()), "a copied recipe is not in the commit"
    copy.unlink()
    task.write_text("2")
    assert re.fullmatch(r"[0-9a-f]{12}\+changes", run_record.commit())


def test_the_documents_show_these_tables() -> None:
    for family in ("gpt", "bert", "t5"):
        assert (RESULTS / family / "quickstart/table.md").read_text() in (ROOT / f"recipes/{family}/README.md").read_text()


def test_the_medians_in_the_table_of_minilm() -> None:
    text = (ROOT / "recipes/bert/README.md").read_text()
    for task, metric in (("mrpc", "f1"), ("mrpc", "accuracy"), ("stsb", "pearson"), ("stsb", "spearman"), ("rte", "accuracy")):
        cells = []
        for stack in ("baseline", "deepspeed", "megatron"):
            folders = (RESULTS / f"bert/finetune_minilm/{task}/{stack}").glob("seed_*")
            scores = [row for folder in folders for row in json.loads((folder / "eval.json").read_text())]
            values = [100 * row["value"] for row in scores if row["metric"] == metric]
            assert len(values) == 3
            cells.append(f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        assert f"| {' | '.join(cells)} |" in text, (task, metric)


# ---- publishing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    changes = ["deepspeed.zero_stage=2", "train.eval_every=100"]
    return run_folder(tmp_path / "run", CPU, changes, {250: 2.4231, 2000: 1.8857412338256836}, 2000, "deepspeed")


def test_a_record_says_what_its_run_says(run: Path, tmp_path: Path) -> None:
    done = command("scripts.publish", str(run), str(tmp_path / "record"), "--also", "grad_norm")
    assert done.returncode == 0, done.stderr
    record = check.record_of(tmp_path / "record")
    assert sorted(record["overrides"]) == ["deepspeed.zero_stage=2", "train.eval_every=100"]
    assert (record["steps"], record["tokens_per_s"], record["mem_bytes"]) == (2000, 35888.0, 612368384)
    assert check.run_rows([tmp_path / "record"]) == check.run_rows([run])
    assert check.logged(tmp_path / "record")[-1]["grad_norm"] == pytest.approx(0.71346128)
    assert sum(path.stat().st_size for path in (tmp_path / "record").iterdir()) < (run / "metrics.jsonl").stat().st_size / 4


def test_publish_bad_input(run: Path, tmp_path: Path) -> None:
    cases = {
        f"{run}: is not empty": [run, run],
        "--also nosuch: no such column; there are step, loss, grad_norm": [run, tmp_path / "record", "--also", "nosuch"],
        "run.json: not there": [tmp_path / "missing", tmp_path / "record"],
    }
    for message, words in cases.items():
        done = command("scripts.publish", *map(str, words))
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "record").exists()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository of one config with a published number, and its records."""
    folder = tmp_path / "recipes/gpt"
    (folder / "configs").mkdir(parents=True)
    shutil.copy(CPU, folder / "configs")
    for stack in ("baseline", "deepspeed", "megatron"):
        (folder / stack).mkdir()
        (folder / stack / "pretrain.py").touch()
    shutil.copytree(RESULTS / "gpt", tmp_path / "docs/results/gpt")
    return tmp_path


def verdicts(root: Path) -> list[tuple[str, str, str]]:
    return [(row.config, row.stack, row.verdict) for row in check.all_rows(root)]


def test_a_copy_or_a_deleted_stack_is_not_credited(tree: Path) -> None:
    name = "gpt/shakespeare_char_cpu"
    assert verdicts(tree) == [(name, stack, "pass") for stack in ("baseline", "deepspeed", "megatron")]
    shutil.copytree(tree / "recipes/gpt", tree / "recipes/mine")
    shutil.rmtree(tree / "recipes/gpt/megatron")
    copy = [("mine/shakespeare_char_cpu", stack, "not-run") for stack in ("baseline", "deepspeed", "megatron")]
    assert verdicts(tree) == [(name, "baseline", "pass"), (name, "deepspeed", "pass"), *copy]
    shutil.copytree(tree / "docs/results/gpt", tree / "docs/results/mine")
    assert verdicts(tree)[2:] == copy
    assert "its run.json says shakespeare_char_cpu of gpt on baseline" in check.all_rows(tree)[2].reason


def test_a_record_does_not_count_for_a_config_that_changed(tree: Path) -> None:
    path = tree / "recipes/gpt/configs" / CPU.name
    text = path.read_text().replace("# Character-level", "# Character-level, with another comment")
    path.write_text(text.replace("zero_stage: 1", "zero_stage: 2"))
    assert {row.verdict for row in check.all_rows(tree)} == {"pass"}
    path.write_text(re.sub(r"lr: 1.0e-3", "lr: 2.0e-3", path.read_text()))
    rows = check.all_rows(tree)
    assert {row.verdict for row in rows} == {"not-run"} and "has changed since this run" in rows[0].reason


@pytest.mark.parametrize("name, text, message", [
    ("record.yaml", "overrides: 3", "record.yaml: must hold overrides (a list of a.b=c) and config_sha256"),
    ("loss.tsv", "step\tloss\n1\t4.1\n2\tx\n", "loss.tsv:3: not a row of numbers under step, loss"),
    ("loss.tsv", "step\tloss\n1\n", "loss.tsv:2: not a row of numbers under step, loss"),
])  # fmt: skip
def test_a_damaged_record_is_named(tree: Path, name: str, text: str, message: str) -> None:
    record = tree / "docs/results/gpt/shakespeare_char_cpu/baseline"
    (record / name).write_text(text)
    with pytest.raises(BadInput, match=re.escape(message)):
        check.all_rows(tree)
