"""One run at a time in OUT, and what a killed one leaves behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, launch_script, losses

from common.errors import BadInput
from common.launch import lock

HOLDER = (
    "import sys, time; from pathlib import Path; from common.launch import lock; "
    "lock.hold(Path(sys.argv[1])); print(1, flush=True)"
)


def holding(out: Path) -> subprocess.Popen:
    """A process that holds the lock of OUT until its input ends."""
    command = [sys.executable, "-c", f"{HOLDER}; sys.stdin.read(); lock.release()", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    return process


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    lock.release()


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    out = tmp_path / "a/out"
    process = holding(out)
    message = (
        rf"^{out}: another run writes there \(process {process.pid} on .+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\); wait for"
    )
    with pytest.raises(BadInput, match=message):
        lock.hold(out)
    process.communicate()
    assert not list(tmp_path.iterdir())  # no trace, of the folders neither
    process = holding(out)
    process.kill()
    process.wait()
    assert (out / lock.NAME).exists()
    lock.hold(out)  # at once
    lock.hold(out)  # it is ours
    with pytest.raises(BadInput, match=f"process {os.getpid()} on"):  # as another process sees it
        descriptors, lock._locks = lock._locks, {}
        try:
            lock.hold(out)
        finally:
            lock._locks = descriptors
    lock.release()
    assert not list(tmp_path.glob("a/out/*"))


def test_many_at_once_are_one_at_a_time(tmp_path: Path) -> None:
    """Eight processes each take the lock 20 times, and add 1 to a file while they have it."""
    counter, out = tmp_path / "counter", tmp_path / "out"
    counter.write_text("0")
    program = (
        "import sys, time; from pathlib import Path; from common.launch import lock; from common.errors import BadInput\n"
        "done = 0\n"
        "while done < 20:\n"
        "    try:\n"
        "        lock.hold(Path(sys.argv[1]))\n"
        "    except BadInput:\n"
        "        time.sleep(0.001); continue\n"
        "    counter = Path(sys.argv[2]); value = int(counter.read_text()); time.sleep(0.0005)\n"
        "    counter.write_text(str(value + 1)); lock.release(); done += 1\n"
    )
    many = [subprocess.Popen([sys.executable, "-c", program, str(out), str(counter)], cwd=ROOT) for _ in range(8)]
    assert [process.wait(timeout=300) for process in many] == [0] * 8
    assert counter.read_text() == "160" and not list(out.glob("*"))


def test_folders_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with lock.locked(tmp_path / "empty"), lock.locked(tmp_path / "empty/new"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_file_system_without_locks_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    lock.hold(tmp_path)
    assert capsys.readouterr().err == f"note: {tmp_path}: cannot be locked (No locks available); start no second run there\n"


def test_scratch_of_killed_launchers_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, alive, older = tmp_path / "twinstack_a", tmp_path / "twinstack_b", tmp_path / "twinstack_c"
    process = holding(alive)
    for folder in (killed, older):
        folder.mkdir()
        (folder / "exit_code").touch()
    (killed / lock.NAME).touch()
    with lock.scratch_folder() as folder:
        assert {alive, older, Path(folder)} == set(tmp_path.iterdir())
    process.communicate()
    assert list(tmp_path.iterdir()) == [older]  # a folder without a lock may be in use


# ---- with runs


def pretrain(out: Path, settings: list[str], *overrides: str) -> subprocess.Popen:
    command = ["bash", str(launch_script("baseline")), "recipes/gpt/configs/tiny.yaml", str(out), *settings, *overrides]
    env = os.environ | {"NPROC": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_run_is_refused_and_a_finished_one_says_so(settings: list[str], tmp_path: Path) -> None:
    """A run is killed while a second one is refused, goes on, ends; the same command again has nothing to do."""
    out, words = tmp_path / "run", ["train.steps=400", "train.save_every=20", "data.valid=null", "train.keep=50"]
    first = pretrain(out, settings, *words)
    deadline = time.monotonic() + 120
    while not (out / "step_20").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    second = pretrain(out, settings, *words)
    printed, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and len(printed.splitlines()) == 1, printed
    assert re.match(rf"error: {out}: another run writes there \(process {first.pid} on ", printed)
    bare = [sys.executable, "-m", "recipes.gpt.baseline.pretrain", "recipes/gpt/configs/tiny.yaml", str(out), *settings, *words]
    done = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True)  # without a launcher
    assert done.returncode == 2 and done.stderr.startswith(f"error: {out}: another run writes there"), done.stderr
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    for name in ("step_999.tmp", "hf.tmp", "tokenizer.tmp", "best/step_3.tmp"):
        (out / name).mkdir(parents=True)
    (out / "run.json.part").touch()
    (out / "mine.part").touch()

    last = max(int(p.name[5:]) for p in out.glob("step_*") if p.name[5:].isdigit()) + 20
    words[0] = f"train.steps={last}"
    third = pretrain(out, settings, *words, "optim.decay_steps=400")  # at once
    printed, _ = third.communicate(timeout=120)
    assert third.returncode == 0, printed
    assert max(losses(out)) == last and (out / "hf/config.json").exists()
    assert not list(out.glob("*.tmp")) and not list(out.glob("best/*")) and not (out / lock.NAME).exists()
    assert [p.name for p in out.glob("*.part")] == ["mine.part"]

    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    begin = time.monotonic()
    again = pretrain(out, settings, *words)
    printed, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and time.monotonic() - begin < 10
    assert printed == f"complete: {out} is at its last step, {last}; its export is {out}/hf\n"
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    shutil.rmtree(out / "hf")
    once_more = pretrain(out, settings, *words)  # the export is written again
    printed, _ = once_more.communicate(timeout=60)
    assert once_more.returncode == 0 and f"export    {out}/hf" in printed and printed.rstrip().endswith("/hf")
    assert json.loads((out / "run.json").read_text())["finished"]["step"] == last
