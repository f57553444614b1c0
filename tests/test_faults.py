"""What goes wrong on a disk, or with a node, while a run saves: one line, the steps before are whole, and the same command
continues to the losses of a run in which nothing went wrong."""

import json
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from test_launch import STACKS, config, env_with, on_two_nodes, pretrain, training_lines, two_nodes, wait_for

from common.checkpoints import checkpoint

__all__ = ["config", "two_nodes"]  # fixtures
IN_BACKGROUND = pytest.mark.parametrize("in_background", [pytest.param("false", marks=pytest.mark.slow), "true"])


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library of tests/faulty_disk.c."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc): a slow and a failing disk are not tested")
    path = tmp_path_factory.mktemp("disk") / "faulty_disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, ROOT / "tests/faulty_disk.c", "-ldl"], check=True)
    return str(path)


def start(config: Path, out: Path, *overrides: str, **env: object) -> subprocess.Popen:
    """Two ranks of the first stack."""
    variables = env_with(**{"NPROC": 2, "OMP_NUM_THREADS": 1} | env)
    command = pretrain(STACKS[0], config, out, *overrides)
    return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def newest(out: Path) -> int:
    """The last finished step, 0 before the first."""
    return max([0, *(int(path.name[5:]) for path in checkpoint.finished(out))])


def after_a_save(config: Path, out: Path, fault: Callable[[subprocess.Popen], object], *overrides: str) -> str:
    """Begin a run, or go on with it, until it has saved; then the fault. Returns the only line on stderr."""
    before = newest(out)
    process = start(config, out, "train.steps=1000000", "train.save_every=2", *overrides)
    wait_for(lambda: newest(out) > before, "a step that is saved", 120)
    fault(process)
    errors = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 2 and len(errors) == 1, (process.returncode, errors)
    return errors[0]


def limit_files(process: subprocess.Popen, rank: int, size: int) -> None:
    """Let no file of this rank grow further: what a full disk or a quota does, to one rank alone."""
    [one] = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == str(rank)]
    resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (size, size))


def assert_goes_on(config: Path, out: Path, *overrides: str) -> None:
    """The same command continues from the last step to the losses of a run without faults."""
    last = newest(out) + 2
    whole = out.with_name("whole")
    for folder in (out, whole):
        process = start(config, folder, f"train.steps={last}", *overrides)
        assert process.wait(timeout=120) == 0, process.communicate()
    again, expected = training_lines(out), training_lines(whole)
    assert [line["step"] for line in again] == list(range(1, last + 1))
    assert [(line["loss"], line["grad_norm"]) for line in again] == [(line["loss"], line["grad_norm"]) for line in expected]


@pytest.mark.slow
@IN_BACKGROUND
def test_a_rank_that_cannot_write_and_a_folder_that_vanishes(in_background: str, config: Path, tmp_path: Path) -> None:
    overrides = [f"train.async_save={in_background}", "model.dropout=0.1"]
    disk, out = tmp_path / "disk", tmp_path / "disk/out"
    line = after_a_save(config, out, lambda process: limit_files(process, 1, 1000), *overrides)
    assert re.fullmatch(
        rf"error: {out}/step_\d+\.tmp/00001\.safetensors: cannot be written: File too large; the steps saved before are whole"
        r"(; .*)?", line
    ), line  # fmt: skip
    assert newest(out) and not list(out.glob("step_*.tmp"))
    line = after_a_save(config, out, lambda _: disk.rename(tmp_path / "away"), *overrides)
    gone = rf"error: {out}/step_\S*: cannot be (created|written|finished): No such file or directory; OUT is gone"
    assert re.match(gone, line), line
    assert not disk.exists()  # nothing is written elsewhere
    (tmp_path / "away").rename(disk)
    assert_goes_on(config, out, *overrides)


@IN_BACKGROUND
def test_a_slow_disk_is_waited_for(in_background: str, config: Path, disk: str, tmp_path: Path) -> None:
    """A save that takes longer than train.hang_seconds is no hang while it makes progress; in the background, training does
    not wait for it, except after the last step."""
    out = tmp_path / "out"
    overrides = ["train.steps=4", "train.save_every=2", "train.hang_seconds=2", f"train.async_save={in_background}"]
    process = start(config, out, *overrides, LD_PRELOAD=disk, DISK_DELAY_MS=100)
    assert process.wait(timeout=120) == 0, process.communicate()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    saved = {key: [line[key] for line in lines if key in line] for key in ("save_ms", "saved_ms")}
    assert min(saved["saved_ms"]) > 2000 and len(saved["saved_ms"]) == 2, saved
    assert (saved["save_ms"][0] < 1000) == (in_background == "true"), saved


@pytest.mark.slow
@IN_BACKGROUND
def test_a_disk_that_hangs_is_a_hang_with_its_name(in_background: str, config: Path, disk: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    overrides = ["train.steps=1000000", "train.save_every=2", f"train.async_save={in_background}"]
    process = start(config, out, *overrides, "train.hang_seconds=4", LD_PRELOAD=disk, DISK_DELAY_MS=10**6)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 4, errors
    assert re.match(r"error: ranks 0 to 1 of node 0 .*, each of which stands at step \d+ \(saving\) since ", errors), errors
    assert not newest(out)
    assert_goes_on(config, out, *overrides[1:])


@pytest.mark.slow
def test_a_read_that_fails_is_told_and_the_same_command_continues(config: Path, disk: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ["train.save_every=2", "optim.decay_steps=100"]
    assert start(config, out, "train.steps=4", *settings).wait(timeout=120) == 0
    process = start(config, out, "train.steps=6", *settings, LD_PRELOAD=disk, DISK_READS_FAIL=1)
    [line] = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 2
    assert re.match(rf"error: {out}/step_4/0000\d\.safetensors: cannot be read \(Input/output error\)", line), line
    assert_goes_on(config, out, *settings)


@pytest.mark.slow
def test_a_node_lost_during_a_save(config: Path, two_nodes: list[list[str]], disk: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ["train.save_every=2", "train.hang_seconds=4"]
    command = pretrain(STACKS[0], config, out, "train.steps=1000000", *settings)
    nodes = on_two_nodes(two_nodes, command, LD_PRELOAD=disk, DISK_DELAY_MS=20)
    wait_for(lambda: newest(out) and list(out.glob("step_*.tmp/*.safetensors")), "a save", 120)
    nodes[1].kill()
    errors = [node.communicate(timeout=120)[1] for node in nodes]
    assert nodes[0].returncode in (4, 5) and re.match("error: node 1 .* has not reported since", errors[0]), errors
    last = newest(out) + 2
    nodes = on_two_nodes(two_nodes, pretrain(STACKS[0], config, out, f"train.steps={last}", *settings))
    errors = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert [line["step"] for line in training_lines(out)] == list(range(1, last + 1))
