"""What tests share: the corpus, the shared data, and runs of many recipes in one torchrun."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A suite begun with `&` or nohup ignores SIGINT or SIGHUP, and so would every process that it starts
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--source", default=os.environ.get("SOURCE"), help="folder of shared texts and data sets")


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
    """The same text for BERT: bounds of sentences kept, WordPiece of 600 ids."""
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


Drive = Callable[..., str]


@pytest.fixture(scope="session")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Drive:
    """drive(cases, nproc) runs them one after the other in one process group and returns what they printed."""

    def run(cases: list[dict[str, Any]], nproc: int) -> str:
        path = tmp_path_factory.mktemp("cases") / "cases.json"
        path.write_text(json.dumps(cases), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, str(ROOT / "tests/drive.py"), str(path)],
            cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        told = [line for line in done.stdout.splitlines() if not line.startswith("step ")]  # the steps say nothing of a fault
        assert done.returncode == 0, "\n".join(told)[-8000:]
        return done.stdout

    return run


def losses(out: Path) -> dict[int, dict[str, float]]:
    """The training lines of a run by step."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


def valid_loss(out: Path) -> float:
    """The last validation loss of a run."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["valid_loss"] for line in lines if "valid_loss" in line][-1]
