"""What tests share: the corpora, the shared data, and runs of many recipes in one process group."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from common import families
from common.checkpoints import checkpoint
from tests import layout_table, warm
from tests.drive import BEGIN, END

ROOT = Path(__file__).resolve().parent.parent
# A suite begun with `&` or nohup ignores SIGINT or SIGHUP, and so would every process that it starts
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--source", default=os.environ.get("SOURCE"), help="folder of shared texts and data sets")
    parser.addoption("--record-layouts", action="store_true", help="write tests/layouts.json again (tests/layout_table.py)")


def pytest_configure(config: pytest.Config) -> None:
    """One thread per pytest-xdist worker: the workers share the cores, and threads that wait for each other spin."""
    if hasattr(config, "workerinput"):
        import torch

        torch.set_num_threads(1)


# (OUT, differences of loss and gradient norm) of the comparisons in this test
COMPARED: list[tuple[Path, float, float]] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Each comparison of a run with a plain loop becomes a row of the test's report, and must be in the tables."""
    COMPARED.clear()
    yield
    rows = [layout_table.row_of(run, item.path.stem, loss, norm) for run, loss, norm in COMPARED]
    if item.config.getoption("--record-layouts"):
        item.user_properties.append(("layouts", rows))
        return
    known = {layout_table.identity(row) for row in layout_table.recorded()} if rows else set()
    for row in rows:
        slow = item.get_closest_marker("slow")
        assert slow or layout_table.identity(row) in known, (
            f"not in {layout_table.RECORD.name}: {row}; see tests/layout_table.py"
        )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--record-layouts"):
        properties = [p for report in terminalreporter.stats.get("passed", []) for p in report.user_properties]
        layout_table.record(row for name, rows in properties if name == "layouts" for row in rows)
        terminalreporter.write_line(f"wrote {layout_table.RECORD}")


# Files whose first test makes all their runs, the longest first
LONGEST = [
    *("test_t5_parity.py", "test_bert_parity.py", "test_simulated_runs.py", "test_gpt_finetune.py", "test_parity.py"),
    *("test_bert_finetune.py", "test_t5_finetune.py", "test_launch.py", "test_resume.py"),
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest-xdist the longest files come first, so that no worker is left with one at the end. A slow test, which may
    make the runs of its whole file, has an hour at least."""
    for item in items:
        given = item.get_closest_marker("timeout")
        if item.get_closest_marker("slow") and (given is None or given.args[0] < 3600):
            item.add_marker(pytest.mark.timeout(3600), append=False)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def source(request: pytest.FixtureRequest) -> Path:
    """The shared data; tests that need it skip without."""
    given = request.config.getoption("--source")
    if not given:
        pytest.skip("needs shared data: run with --source DIR")
    return Path(given).resolve()


@pytest.fixture(scope="module")
def with_slow(request: pytest.FixtureRequest) -> bool:
    """Whether a test marked slow is selected in this module: only then do its fixtures run what such tests need."""
    items = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    return any(item.get_closest_marker("slow") for item in items)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, valid and tokenizer: 1 MB of Python's own library text, byte-level BPE of 512 ids."""
    folder = tmp_path_factory.mktemp("corpus") / "python"
    command = [sys.executable, "-m", "data.python_docs", str(folder), "--max-mb", "1", "--vocab-size", "512"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text for BERT: with bounds of sentences, WordPiece of 600 ids."""
    folder = tmp_path_factory.mktemp("corpus") / "sentences"
    words = ["--sentences", "--tokenizer-type", "wordpiece", "--vocab-size", "600", "--max-mb", "1"]
    command = [sys.executable, "-m", "data.python_docs", str(folder), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def spans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text for T5: SentencePiece of 700 ids, 100 of them sentinels."""
    folder = tmp_path_factory.mktemp("corpus") / "spans"
    words = ["--tokenizer-type", "sentencepiece", "--vocab-size", "700", "--max-mb", "1"]
    command = [sys.executable, "-m", "data.python_docs", str(folder), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def t5_settings(spans: Path) -> list[str]:
    """Overrides that point a tiny config of T5 at its test corpus."""
    return [f"data.train={spans}/train", f"data.valid={spans}/valid", "train.eval_samples=16"]


@pytest.fixture(scope="session")
def bert_settings(sentences: Path) -> list[str]:
    """Overrides that point a tiny config of BERT at its test corpus."""
    return [f"data.train={sentences}/train", f"data.valid={sentences}/valid", "train.eval_samples=16"]


@pytest.fixture(scope="session")
def settings(corpus: Path) -> list[str]:
    """Overrides that point a tiny config at the test corpus."""
    return [f"data.train={corpus}/train", f"data.valid={corpus}/valid", "train.eval_samples=16"]


def case(stack: str, config: str, out: Path, overrides: Sequence[str], expect: int = 0, family: str = "gpt") -> dict[str, Any]:
    """One run for `drive`."""
    return {
        "module": f"recipes.{family}.{stack}.pretrain", "config": str(ROOT / f"recipes/{family}/configs/{config}.yaml"),
        "out": str(out), "overrides": list(overrides), "expect": expect,
    }  # fmt: skip


def launch_script(stack: str, kind: str = "pretrain", family: str = "gpt") -> Path:
    """recipes/FAMILY/STACK/KIND.sh; the test is skipped where the recipe has no such stack."""
    if stack not in families.stacks(family):
        pytest.skip(f"recipes/{family} has no {stack}")
    return ROOT / f"recipes/{family}/{stack}/{kind}.sh"


Drive = Callable[..., str]
LEFT_OUT: dict[Path, str] = {}  # OUT of each run of `drive` whose stack the recipe does not have: why
FAILED: dict[Path, str] = {}  # OUT of each run of `drive` that did not end as expected: its error
REPORTED: set[Path] = set()  # those that a test has failed by


@pytest.fixture(scope="session")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drive]:
    """drive(cases, nproc) runs them one after the other in one process group and returns what they printed.

    A run that fails fails the tests that read it (`finished`); the runs after it go on in a new process group.
    """

    def run(cases: list[dict[str, Any]], nproc: int, cwd: Path = ROOT) -> str:
        path, output = tmp_path_factory.mktemp("cases") / "cases.json", ""
        for case in cases:
            if not (cwd / case["module"].replace(".", "/")).with_suffix(".py").is_file():
                LEFT_OUT[Path(case["out"])] = f"there is no {case['module']}"
        cases = [case for case in cases if Path(case["out"]) not in LEFT_OUT]
        while cases:
            path.write_text(json.dumps(cases), encoding="utf-8")
            printed = warm.run(["tests/drive.py", path], nproc, cwd, merged=True, timeout=3600).stdout
            output += printed
            ended = re.findall(rf"^{END}(.*) code (-?\d+) [\d.]+ s (.*)$", printed, re.M)
            for case, (out, code, message) in zip(cases, ended, strict=False):
                assert case["out"] == out
                if int(code) != case.get("expect", 0):
                    FAILED.setdefault(Path(out), f"exit code {code}: {message}")
            cases = cases[len(ended) :]
            if cases:
                FAILED.setdefault(Path(cases[0]["out"]), error_of(printed.rpartition(BEGIN)[2]))
                cases = cases[1:]
        return output

    yield run
    unread = {str(out): error for out, error in FAILED.items() if out not in REPORTED}
    assert not unread, "\n".join(f"{out}: {error}" for out, error in unread.items())


def error_of(printed: str) -> str:
    """What a failed run printed, without its lines of steps."""
    return "\n".join(line for line in printed.splitlines() if not line.startswith("step "))[-6000:]


def finished(out: Path) -> Path:
    """`out`, the folder of a run of `drive`; the test fails with the run's error where it has one, and is
    skipped where the recipe has no such stack."""
    if out in LEFT_OUT:
        pytest.skip(LEFT_OUT[out])
    if out in FAILED:
        REPORTED.add(out)
        pytest.fail(f"the run {out} failed:\n{FAILED[out]}", pytrace=False)
    return out


def losses(out: Path) -> dict[int, dict[str, float]]:
    """The training lines of a run by step."""
    lines = map(json.loads, (finished(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


def valid_loss(out: Path) -> float:
    """The last validation loss of a run."""
    lines = map(json.loads, (finished(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["valid_loss"] for line in lines if "valid_loss" in line][-1]


def step_of(run: Path, number: int) -> checkpoint.Checkpoint:
    """The checkpoint of a step."""
    saved = checkpoint.opened(run / f"step_{number}")
    assert isinstance(saved, checkpoint.Checkpoint), saved
    return saved


def assert_same_state(first: Path, second: Path, number: int) -> None:
    """Have two runs the same parameters and optimizer state at this step, bit for bit?"""
    a, b = step_of(first, number), step_of(second, number)
    assert a.names() == b.names() and a.names()
    for name in a.names():
        of_a, of_b = a.read(name), b.read(name)
        assert of_a.keys() == of_b.keys() and len(of_a) > 1, name
        assert all(of_a[part].equal(of_b[part]) for part in of_a), name
