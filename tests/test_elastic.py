"""Elastic runs: a node is lost or joins, and the run goes on with the ranks that are there."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import launch_script
from test_launch import STANDIN, config, env_with, pretrain, training_lines, wait_for  # noqa: F401 (config: a fixture)

from common.errors import BadInput
from common.launch import elastic, launcher

NODES = {"NNODES": "1:2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


# ---- what is asked for


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NNODES": "3:2"}, "NNODES=3:2: MIN must not be above MAX; give NNODES=2:3"),
        ({"NNODES": "0:2"}, "NNODES=0:2: must be a whole number from 1, or MIN:MAX of two, for example 1:4"),
        ({"NNODES": "1:2:3"}, "NNODES=1:2:3: must be a whole number from 1, or MIN:MAX"),
        ({"NNODES": ":"}, "NNODES=:: must be"),
        ({"SLURM_STEP_ID": "0"}, "NNODES=1:2 under srun: SLURM ends a step that loses a node; leave NNODES out"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1: must be a whole number from 0"),
        ({"REGROUP_SECONDS": "0"}, "REGROUP_SECONDS=0: must be a whole number from 1"),
        ({"NNODES": "2", "MAX_RESTARTS": "3"}, "MAX_RESTARTS=3 needs an elastic run: NNODES=MIN:MAX, for example NNODES=1:2"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2: must be below NNODES=2"),
        ({"NODE_RANK": ""}, "NNODES=2 needs NODE_RANK"),
    ],
)
def test_bad_environment_is_told_in_one_line(env: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput) as error:
        launcher.nodes(NODES | env)
    [line] = error.value.problems
    assert message in line


def test_torchrun_gets_the_nodes_among_whose_ranks_the_batch_divides() -> None:
    """A third node of which the batch makes no use is a spare."""
    on = launcher.nodes(NODES | {"NNODES": "1:3", "NPROC": "2", "MASTER_PORT": "29511"})
    assert on.possible_worlds == [2, 4, 6] and (on.restarts, on.regroup_seconds) == (3, 30)
    options = launcher.torchrun(on._replace(worlds=(2, 4)))
    assert {"--nnodes=1:2", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29511"} < set(options)
    assert "--rdzv-conf=is_host=true,last_call_timeout=30" in options
    one = launcher.torchrun(launcher.nodes({"NNODES": "1:1", "MAX_RESTARTS": "5", "NPROC": "2"}))
    assert {"--standalone", "--max-restarts=5"} < set(one)


@pytest.mark.parametrize(
    ("nodes", "overrides", "lines"),
    [
        ("3:3", [], ["train.global_batch=8 is not a multiple of baseline.micro_batch=1 x 3 data-parallel ranks"]),
        ("1:3", [], []),
    ],
)
def test_a_batch_that_never_divides_starts_nothing(nodes, overrides, lines, config: Path, tmp_path: Path) -> None:  # noqa: F811
    env = env_with(**NODES | {"NNODES": nodes, "NPROC": "1"})
    command = pretrain("baseline", config, tmp_path / "out", "--dry-run", *overrides)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert len(done.stderr.splitlines()) == len(lines) and all(line in done.stderr for line in lines)
    assert done.returncode == (2 if lines else 0)
    if not lines:
        assert "note: NNODES=1:3: train.global_batch divides among 1 or 2 ranks" in done.stdout
        assert "layout            baseline: 2 ranks" in done.stdout and "--nnodes=1:2" in done.stdout


def test_help_tells_the_variables() -> None:
    done = subprocess.run(["bash", launch_script("baseline"), "--help"], env=env_with(), capture_output=True, text=True)
    assert "NNODES=MIN:MAX MAX_RESTARTS REGROUP_SECONDS" in done.stdout


def test_the_lines_that_tell_a_change(tmp_path: Path) -> None:
    two, one = elastic.Group(2, 4), elastic.Group(1, 2)
    again = "begins again, as there is no checkpoint yet"
    assert elastic._change(two, one, tmp_path) == f"1 node lost: 4 ranks on 2 nodes before, 2 ranks on 1 node now; {again}"
    assert elastic._change(one, two, tmp_path).startswith("1 node joined: 2 ranks on 1 node before, 4 ranks on 2 nodes now")
    assert elastic._change(one, one, tmp_path).startswith("the ranks start again: 2 ranks")
    line = elastic._too_few(elastic.Group(3, 3), elastic.Settings("out", 0, [1, 2, 4], "1:4"))
    assert "NNODES=1:4: train.global_batch does not divide among 3 ranks on 3 nodes; it does among 1, 2 or 4 ranks" in line


# ---- two nodes on this machine


@contextmanager
def nodes_of(command: list[str], **env: object) -> Iterator[list[subprocess.Popen]]:
    """Launchers; `start` adds one. All end with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running: list[subprocess.Popen] = []

    class Nodes(list[subprocess.Popen]):
        def start(self, rank: int) -> subprocess.Popen:
            cluster = NODES | {"NODE_RANK": rank, "MASTER_PORT": port, "NPROC": 1, "REGROUP_SECONDS": 2} | env
            self.append(subprocess.Popen(command, env=env_with(**cluster), stderr=subprocess.PIPE, text=True))
            return self[-1]

    running = Nodes()
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def rounds(folder: Path, ranks: int) -> int:
    """In how many rounds of so many ranks all have made a step."""
    return sum(len(list(each.glob("ready_*"))) == ranks for each in folder.glob("[0-9]*"))


def test_a_node_is_lost_and_joins_again(tmp_path: Path) -> None:
    with nodes_of([sys.executable, str(STANDIN), "elastic", str(tmp_path)], OMP_NUM_THREADS=1) as nodes:
        first, second = nodes.start(0), nodes.start(1)
        wait_for(lambda: rounds(tmp_path, 2) == 1, "both nodes")
        second.kill()
        wait_for(lambda: rounds(tmp_path, 1) == 1, "the node that is left")
        third = nodes.start(1)
        wait_for(lambda: rounds(tmp_path, 2) == 2, "both nodes again")
        first.send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=60)[1] for process in (first, third)]
        assert [first.returncode, third.returncode] == [143, 143], errors
    again = "begins again, as there is no checkpoint yet"
    assert errors == [
        f"note: 1 node lost: 2 ranks on 2 nodes before, 1 rank on 1 node now; {again}\n"
        f"note: 1 node joined: 1 rank on 1 node before, 2 ranks on 2 nodes now; {again}\n"
        "SIGTERM: stops after this step and saves its state\n",
        "",
    ]


def pid(folder: Path, rank: int) -> int:
    """The process of a rank in the newest round."""
    newest = max(folder.glob("[0-9]*"), key=lambda each: each.stat().st_mtime_ns)
    return int((newest / f"pid_{rank}").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, r"error: rank 1 \(.*\) was killed by SIGKILL \(out of memory\?\)$"),
        (signal.SIGSTOP, r"error: rank 1 of node 1 \(.*\) hangs: stopped by a signal, at step .*\nno rank made progress for "),
    ],
)
def test_all_ranks_start_again_until_there_were_too_many_failures(number: int, message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(STANDIN), "elastic", str(tmp_path)]
    with nodes_of(command, OMP_NUM_THREADS=1, HANG_SECONDS=2, MAX_RESTARTS=1) as nodes:
        first, second = nodes.start(0), nodes.start(1)
        for time in (1, 2):
            wait_for(lambda time=time: rounds(tmp_path, 2) == time, "both nodes")
            os.kill(pid(tmp_path, 1), number)
        errors = [process.communicate(timeout=90)[1] for process in (first, second)]
    assert re.search(message, errors[1], re.M), errors
    assert errors[0].count("note: the ranks start again: 2 ranks on 2 nodes before, 2 ranks on 2 nodes now") == 1, errors
    assert {first.returncode, second.returncode} == {137 if number == signal.SIGKILL else 4}, errors


@pytest.mark.slow
def test_the_others_end_if_node_0_is_lost(tmp_path: Path) -> None:
    with nodes_of([sys.executable, str(STANDIN), "elastic", str(tmp_path)], OMP_NUM_THREADS=1, HANG_SECONDS=2) as nodes:
        first, second = nodes.start(0), nodes.start(1)
        wait_for(lambda: rounds(tmp_path, 2) == 1, "both nodes")
        first.kill()
        errors = second.communicate(timeout=60)[1]
    assert second.returncode == 5 and "Traceback" not in errors, errors
    assert re.match(r"error: node 0 \(.*\) has not reported since", errors), errors


@pytest.mark.slow
def test_a_number_of_nodes_among_which_the_batch_does_not_divide_ends_the_run(tmp_path: Path) -> None:
    command = [sys.executable, str(STANDIN), "elastic", str(tmp_path)]
    with nodes_of(command, OMP_NUM_THREADS=1, NNODES="1:3", WORLDS="1,3") as nodes:
        first, second = nodes.start(0), nodes.start(1)
        errors = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [2, 2], errors
    line = "error: NNODES=1:3: train.global_batch does not divide among 2 ranks on 2 nodes; it does among 1 or 3 ranks; "
    assert all(each.startswith(line) and len(each.splitlines()) == 1 for each in errors), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stack", "layout"),
    [
        ("baseline", []),
        ("baseline", ["baseline.shard=full"]),
        ("deepspeed", ["deepspeed.zero_stage=3"]),
        ("megatron", ["megatron.distributed_optimizer=true"]),
    ],
)
def test_the_losses_are_those_of_an_undisturbed_run(stack, layout, config: Path, tmp_path: Path) -> None:  # noqa: F811
    """The second node is lost and joins again."""
    out, settings = tmp_path / "out", [*layout, "train.global_batch=64", "train.save_every=4", "train.steps=60"]
    with nodes_of(pretrain(stack, config, out, *settings), OMP_NUM_THREADS=1) as nodes:
        first, second = nodes.start(0), nodes.start(1)
        wait_for(lambda: (out / "step_8").exists(), "some steps", 120)
        second.kill()
        wait_for(lambda: (out / "step_16").exists(), "steps of the node that is left", 120)
        third = nodes.start(1)
        errors = [process.communicate(timeout=200)[1] for process in (first, third)]
    assert [first.returncode, third.returncode] == [0, 0], errors
    pattern = r"^note: 1 node (\w+): (\d) ranks? .* (\d) ranks? on . nodes? now; continues from step (\d+)$"
    notes = re.findall(pattern, errors[0], re.M)
    assert [(what, int(before), int(now)) for what, before, now, _ in notes] == [("lost", 2, 1), ("joined", 1, 2)], errors
    assert 8 <= int(notes[0][3]) < int(notes[1][3]) < 60

    plain = tmp_path / "plain"
    subprocess.run(pretrain(stack, config, plain, *settings), env=env_with(NPROC=1, OMP_NUM_THREADS=1), check=True)
    for line, other in zip(training_lines(out), training_lines(plain), strict=True):
        assert line["step"] == other["step"] and abs(line["loss"] - other["loss"]) <= 1e-5, (line, other)
        assert abs(line["grad_norm"] - other["grad_norm"]) <= 1e-4 * other["grad_norm"], (line, other)
