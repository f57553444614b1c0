"""The launcher: environment, ports, signals, exit codes, several nodes, SLURM. Stand-in ranks first, then real runs."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from conftest import launch_script

from common.errors import BadInput
from common.launch import heartbeat, launcher, watch

ROOT = Path(__file__).resolve().parent.parent
STANDIN = ROOT / "tests/launch_standin.py"
STACKS = [pytest.param(s, marks=pytest.mark.slow) if s != "baseline" else s for s in launcher.STACKS]
ELASTIC = ("MAX_RESTARTS", "REGROUP_SECONDS")
CLUSTER = (*ELASTIC, "NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def env_with(**given: object) -> dict[str, str]:
    """This environment with nothing of a cluster in it, plus what is given."""
    clean = {k: v for k, v in os.environ.items() if k not in CLUSTER and not k.startswith(("SLURM_", "GLOO_", "NCCL_"))}
    return clean | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | {k: str(v) for k, v in given.items()}


def start_standin(folder: Path, *words: object, **env: object) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    mode, *value = (str(w) for w in words)
    command = [sys.executable, str(STANDIN), mode, str(folder), *value]
    return subprocess.Popen(command, env=env_with(**({"NPROC": 2} | env)), stderr=subprocess.PIPE, text=True)


def wait_for(condition, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def wait_for_ready(folder: Path, ranks: int = 2) -> None:
    wait_for(lambda: len(list(folder.glob("ready_*"))) == ranks, "the ranks")


def rank_pids(folder: Path) -> list[int]:
    return [int(p.read_text()) for p in folder.glob("pid_*")]


# ---- what is asked for


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NPROC": "abc"}, "NPROC=abc: must be a whole number from 1"),
        ({"NPROC": "0"}, "NPROC=0: must be a whole number from 1"),
        ({"NPROC": "-1"}, "NPROC=-1"),
        ({"NNODES": "two"}, "NNODES=two"),
        ({"NNODES": "2", "MASTER_ADDR": "127.0.0.1"}, "NNODES=2 needs NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "127.0.0.1"}, "NODE_RANK=2: must be below NNODES=2"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 and NNODES is 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be a whole number from 1 to 65535"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "no.such.host.invalid"}, "no such host"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "16"}, "--ntasks-per-node=1"),
    ],
)
def test_bad_environment_is_told_in_one_line(env: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput) as error:
        launcher.nodes(env)
    assert [line for line in error.value.problems if message in line], error.value.problems


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "CONFIG and OUT are missing"),
        (["a.yaml"], "OUT is missing; type: bash recipes/gpt/baseline/pretrain.sh a.yaml out/a"),
        (["a.yaml", "train.steps=3"], "OUT is missing; type: bash recipes/gpt/baseline/pretrain.sh a.yaml out/a train.steps=3"),
        (["a.yaml", "out", "--dryrun"], "unknown option --dryrun"),
        (["no_such.yaml", "out"], "no such config"),
    ],
)
def test_bad_arguments_exit_2_and_start_nothing(arguments: list[str], message: str, tmp_path: Path) -> None:
    for kind in ("pretrain", "finetune"):
        script = launch_script("baseline", kind)
        done = subprocess.run(["bash", script, *arguments], env=env_with(), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert message.replace("pretrain", kind) in done.stderr and "Traceback" not in done.stderr
        assert not list(tmp_path.iterdir())


def test_every_bad_variable_is_told_at_once() -> None:
    script = launch_script("baseline")
    env = env_with(NPROC="x", MASTER_PORT="99999", NNODES=2)
    done = subprocess.run(["bash", script, "a.yaml", "out"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == len(done.stderr.splitlines()) == 4


def test_processes_default_to_the_gpus() -> None:
    assert launcher.nodes({"CUDA_VISIBLE_DEVICES": "0,1,2"}).nproc == 3
    assert launcher.nodes({"CUDA_VISIBLE_DEVICES": ""}).nproc == 1
    assert launcher.nodes({"CUDA_VISIBLE_DEVICES": "-1"}).nproc == 1
    assert launcher.nodes({"CUDA_VISIBLE_DEVICES": "0,1", "NPROC": "4"}).nproc == 4


def test_slurm_tells_the_nodes() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1"}
    on = launcher.nodes(step | {"SLURM_STEP_NODELIST": "localhost,other[1-3]", "SLURM_JOB_ID": "123", "NPROC": "8"})
    assert on == launcher.Nodes(8, 2, 1, "localhost", 20123)
    batch = {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_NODEID": "0"}  # without srun: one node
    assert launcher.nodes(batch | {"NPROC": "1"}).nnodes == 1


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("gpu[007-009,12],login1", "gpu007"),
        ("a,b", "a"),
        ("n1", "n1"),
        ("x[3,5]-ib", "x3-ib"),
        ("rack-2-[10-12]", "rack-2-10"),
    ],
)
def test_first_host_of_a_nodelist(nodelist: str, first: str) -> None:
    assert launcher.first_host(nodelist) == first


def test_what_the_user_has_set_stays() -> None:
    on = launcher.Nodes(2, 1, 0, None, None)
    assert launcher.environment(on, Path("x"), {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    threads = launcher.environment(on, Path("x"), {})["OMP_NUM_THREADS"]
    assert threads == str(max(1, launcher.cores() // 2))
    assert int(launcher.environment(on._replace(nproc=1000), Path("x"), {})["OMP_NUM_THREADS"]) == 1


def test_port_in_use_takes_another_on_one_node_and_is_refused_on_several(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert launcher.free_port(launcher.Nodes(1, 1, 0, None, port)).master_port is None
        assert f"MASTER_PORT={port} is in use" in capsys.readouterr().err
        with pytest.raises(BadInput, match=f"MASTER_PORT={port} is in use"):
            launcher.free_port(launcher.Nodes(1, 2, 0, "127.0.0.1", port))
        assert launcher.free_port(launcher.Nodes(1, 2, 1, "127.0.0.1", port)).master_port == port  # node 0's, not ours


# ---- mechanics, on stand-in ranks


@pytest.mark.parametrize(("words", "code"), [(("finish",), 0), (("code", 2), 2), (("code", 3), 3)])
def test_exit_code_of_the_ranks_passes_through_and_nothing_buries_their_words(words: tuple, code: int, tmp_path: Path) -> None:
    before = set(Path("/tmp").glob("torchelastic_*")) | set(Path("/tmp").glob("twinstack_*"))
    process = start_standin(tmp_path, *words)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (code, "")
    after = set(Path("/tmp").glob("torchelastic_*")) | set(Path("/tmp").glob("twinstack_*"))
    assert not [p for p in after - before if str(process.pid) in p.name]


def test_a_broken_rank_shows_its_traceback_and_one_line(tmp_path: Path) -> None:
    process = start_standin(tmp_path, "crash")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "RuntimeError: rank one is broken" in errors
    assert re.search(r"^error: rank 1 of node 0 \(.*, process \d+\) ended with exit code 1 at the start ", errors, re.M)
    assert errors.count("error: rank") == errors.count("Traceback") == 1
    assert "rank one is broken" in details(errors)
    assert errors.splitlines()[-1] == "failed with exit code 1: rank 1: RuntimeError: rank one is broken"


def details(errors: str) -> str:
    """What the file that these last words name holds."""
    return Path(
        re.search(r"^details: (.*)\n.*; the same command .*\nfailed with exit code .*\n\Z", errors, re.M)[1]
    ).read_text()


def stop(folder: Path, rank: int, number: int) -> float:
    """Send a rank a signal once all have run a step; the time at which it was sent."""
    wait_for_ready(folder)
    time.sleep(0.3)
    os.kill(int((folder / f"pid_{rank}").read_text()), number)
    return time.monotonic()


def test_a_killed_rank_is_the_first_line_and_ends_the_launch_soon(tmp_path: Path) -> None:
    process = start_standin(tmp_path, "steps")
    begin = stop(tmp_path, 1, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 137 and time.monotonic() - begin < 15
    first, second, third, last = errors.splitlines()
    where = rf"\({re.escape(socket.gethostname())}, process {(tmp_path / 'pid_1').read_text()}\)"
    assert re.match(rf"error: rank 1 of node 0 {where} was killed by SIGKILL \(out of memory\?\) at step \d+ \(", first)
    assert "Connection closed by peer" in details(errors) and second.startswith("details: ")
    assert (third, last) == ("no step was saved; the same command begins again", "failed with exit code 137")
    assert not any(psutil.pid_exists(p) for p in rank_pids(tmp_path))


def test_a_rank_that_takes_no_signal_does_not_delay_the_end(tmp_path: Path) -> None:
    """torchrun by itself waits half a minute for ranks that it has sent SIGTERM."""
    process = start_standin(tmp_path, "hang")
    wait_for_ready(tmp_path)
    os.kill(int((tmp_path / "pid_0").read_text()), signal.SIGSTOP)
    os.kill(int((tmp_path / "pid_1").read_text()), signal.SIGSEGV)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 139
    assert errors.startswith("error: rank 1 of node 0 (") and "was killed by SIGSEGV" in errors.splitlines()[0]
    assert "Fatal Python error: Segmentation fault" in details(errors)
    assert not any(psutil.pid_exists(p) for p in rank_pids(tmp_path))


def test_a_stopped_rank_is_named_within_the_limit(tmp_path: Path) -> None:
    process = start_standin(tmp_path, "steps", HANG_SECONDS=2)
    begin = stop(tmp_path, 1, signal.SIGSTOP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 4 and 1.5 < time.monotonic() - begin < 15
    first, second, _, third, last = errors.splitlines()
    assert (third, last) == ("no step was saved; the same command begins again", "failed with exit code 4")
    assert re.match(r"error: rank 1 of node 0 \(.*, process \d+\) hangs: stopped by a signal, at step \d+ \(.* since 20", first)
    assert "train.hang_seconds" in second and "ended without a save" in second
    assert re.search(r"rank 0: stacks\n(?:.*\n){1,9}.* in _meet", details(errors))  # where the other one waits
    assert not any(psutil.pid_exists(p) for p in rank_pids(tmp_path))


def test_what_is_slow_and_makes_progress_goes_on(tmp_path: Path) -> None:
    """One rank evaluates for longer than the limit while the other waits."""
    process = start_standin(tmp_path, "steps", 5, HANG_SECONDS=3)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert not (tmp_path / "out").exists()


def row(rank: int, step: int, beats: int, phase: str, state: str = "sleeping", waits: bool = False) -> watch.RankState:
    return watch.RankState(
        rank, rank // 2, f"h{rank // 2}", heartbeat.Record(100 + rank, step, beats, 0.0, phase), state, waits
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [  # of four ranks, two on each node, the first two wait
        ([row(2, 7, 3, "update"), row(3, 7, 4, "update", waits=True)], "rank 2 of node 1 (h1, process 102) hangs while others"),
        ([row(2, 7, 3, "data", "disk-sleep"), row(3, 7, 4, "data")], "rank 2 of node 1 (h1, process 102) hangs in the file"),
        ([row(2, 6, 9, "update"), row(3, 7, 1, "data")], "rank 2 of node 1 (h1, process 102) hangs while others"),
        ([row(2, 7, 3, "data", waits=True), row(3, 7, 4, "data", waits=True)], "rank 2 of node 1 (h1, process 102) is behind"),
        (
            [row(2, 7, 3, "data", "stopped"), row(3, 7, 3, "data", "stopped")],
            "ranks 2 to 3 of node 1 (h1), each of which hangs",
        ),
        ([row(2, 7, 3, "done"), row(3, 7, 4, "x", waits=True)], "ranks 0 to 1 of node 0 (h0), each of which stands at step 7"),
    ],
)
def test_which_rank_keeps_the_others_waiting(rows: list[watch.RankState], message: str) -> None:
    others = [row(rank, 7, 4, "waiting: sum of the loss", waits=True) for rank in (0, 1)]
    assert watch._culprits(others + rows)[0].startswith(message)


def test_a_stack_tells_whether_its_rank_waits(tmp_path: Path) -> None:
    """As faulthandler writes them: the main thread last, its innermost call first."""
    stack = """Thread 0x1 (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 359 in wait

Current thread 0x2 (most recent call first):
  File "{}", line 3028 in all_reduce
  File "/recipes/gpt/baseline/pretrain.py", line 100 in main
"""
    assert watch._waits(stack.format("/site-packages/torch/distributed/distributed_c10d.py"))
    assert not watch._waits(stack.format("/recipes/gpt/task.py"))
    assert not watch._waits("")


STOPS = "stops after this step and saves its state"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_ends_with_its_code(number: int, code: int, tmp_path: Path) -> None:
    process = start_standin(tmp_path, "save", 1)
    wait_for_ready(tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, f"{signal.Signals(number).name}: {STOPS}\n")
    assert (tmp_path / "saved").exists()


def test_signals_to_all_processes_of_a_job_are_one_stop(tmp_path: Path) -> None:
    """A scheduler signals launcher, torchrun and ranks alike, and may do it twice."""
    process = start_standin(tmp_path, "save", 2)
    wait_for_ready(tmp_path)
    for _ in range(2):
        for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            each.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (143, f"SIGTERM: {STOPS}\n")
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_save_longer_than_torchruns_patience_is_waited_for(tmp_path: Path) -> None:
    process = start_standin(tmp_path, "save", 40)
    wait_for_ready(tmp_path)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130 and (tmp_path / "saved").exists()
    assert time.monotonic() - begin > 39
    assert errors == f"SIGINT: {STOPS}\nstill saving; to end at once without it: kill -9 {process.pid}\n"


def test_a_signal_before_training_ends_at_once(tmp_path: Path) -> None:
    """Ranks that still start up have nothing to save."""
    process = start_standin(tmp_path, "hang")
    wait_for_ready(tmp_path)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143
    wait_for(lambda: not any(psutil.pid_exists(p) for p in rank_pids(tmp_path)), "the end of the ranks", 5)


def test_kill_9_of_the_launcher_leaves_no_process(tmp_path: Path) -> None:
    process = start_standin(tmp_path, "hang")
    wait_for_ready(tmp_path)
    all_pids = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
    assert len(all_pids) >= 3 and set(rank_pids(tmp_path)) < set(all_pids)  # torchrun and two ranks
    process.kill()
    process.communicate()
    wait_for(lambda: not any(psutil.pid_exists(p) for p in all_pids), "the end of torchrun and its ranks", 10)


# ---- real runs


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config of a few thousand parameters over a corpus of random ids."""
    from common.data.indexed_dataset import IndexedDatasetWriter, write_manifest

    ids = np.random.default_rng(0).integers(0, 128, (2, 8, 400))
    for name, documents in zip(("train", "valid"), ids, strict=True):
        writer = IndexedDatasetWriter(tmp_path / "corpus" / name, np.uint16)
        for document in documents:
            writer.add(document)
        writer.finish()
        write_manifest(tmp_path / "corpus" / name, {"tokenizer_size": 128})
    values = {
        "model": {"arch": "gpt2", "layers": 2, "hidden": 32, "heads": 4, "vocab_size": 128},
        "data": {"train": str(tmp_path / "corpus/train"), "valid": str(tmp_path / "corpus/valid"), "seq_len": 32},
        "optim": {"lr": 1e-3, "decay_steps": 100},
        "train": {"steps": 4, "global_batch": 8},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def pretrain(stack: str, config: Path, out: Path, *overrides: str) -> list[str]:
    return ["bash", str(launch_script(stack)), str(config), str(out), *overrides]


def training_lines(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_dry_run_starts_nothing_from_any_folder(config: Path, tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()  # a folder of the user's by the name of one of ours
    (tmp_path / "common/__init__.py").touch()
    command = pretrain("baseline", Path(config.name), Path("out"), "--dry-run", "train.steps=7")
    begin = time.monotonic()
    done = subprocess.run(command, env=env_with(NPROC=2), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 3  # under 1 s on an idle machine
    assert "torchrun --nproc-per-node=2" in done.stdout
    assert "-m recipes.gpt.baseline.pretrain config.yaml out train.steps=7" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stack", STACKS)
def test_sigterm_saves_and_the_same_command_continues(stack: str, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(pretrain(stack, config, out, "train.steps=1000000"), env=env_with(NPROC=2))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(training_lines(out)) > 2, "the first steps", 180)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    lines = training_lines(out)
    assert (out / f"step_{len(lines)}").is_dir()

    steps = f"train.steps={len(lines) + 2}"
    subprocess.run(pretrain(stack, config, out, steps), env=env_with(NPROC=2), check=True)
    again = training_lines(out)
    assert again[: len(lines)] == lines
    assert [line["step"] for line in again] == list(range(1, len(lines) + 3))


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("number", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_rank_that_stops_is_named_and_the_same_command_continues(
    stack: str, number: int, config: Path, tmp_path: Path
) -> None:
    """A hang or a loss, in a real run; what it had done after its checkpoint is done again, bit for bit."""
    out = tmp_path / "out"
    layout = {"baseline": [], "deepspeed": ["deepspeed.zero_stage=3"], "megatron": ["megatron.pp=2"]}[stack]
    settings = [*layout, "train.save_every=40", "train.hang_seconds=6"]
    env = env_with(NPROC=2, OMP_NUM_THREADS=1)
    command = pretrain(stack, config, out, *settings, "train.steps=1000000")
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(training_lines(out)) > 50, "some steps", 180)
    [victim] = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    victim.send_signal(number)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=120)
    how = "hangs: stopped by a signal," if number == signal.SIGSTOP else "was killed by SIGKILL"
    assert re.match(rf"error: rank 1 of node 0 \(.*, process {victim.pid}\) {how}.* at step \d+ ", errors), errors
    assert process.returncode == (4 if number == signal.SIGSTOP else 137) and time.monotonic() - begin < 40
    assert "Traceback" not in errors and len(errors.splitlines()) <= 5
    assert "Current thread" in details(errors) or "exception" in details(errors)  # of the other rank

    lines = training_lines(out)
    saved = max(int(p.name[5:]) for p in out.glob("step_*") if p.suffix != ".tmp")
    assert 40 <= saved < len(lines) and f"saved up to step {saved:,}; the same command continues from there\n" in errors
    subprocess.run(pretrain(stack, config, out, *settings, f"train.steps={len(lines)}"), env=env, check=True)
    again = training_lines(out)
    assert [(a["step"], a["loss"], a["grad_norm"]) for a in again] == [(b["step"], b["loss"], b["grad_norm"]) for b in lines]


@pytest.fixture
def two_nodes() -> Iterator[list[list[str]]]:
    """Two network namespaces joined by a cable: for each, how a command is run there. Addresses 10.77.0.1 and .2."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("two nodes on one machine need root and iproute2")
    names = [f"twin{i}_{os.getpid()}" for i in (1, 2)]
    cables = [f"tw{i}x{os.getpid() % 2**24}" for i in (1, 2)]

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)

    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for i, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def on_two_nodes(two_nodes: list[list[str]], command: list[str], **env: object) -> list[subprocess.Popen]:
    # threads decide the last bit of a sum, and the two nodes share this machine's cores
    cluster = {"NNODES": 2, "MASTER_ADDR": "10.77.0.1", "NPROC": 1, "OMP_NUM_THREADS": 1} | env
    return [
        subprocess.Popen(node + command, env=env_with(NODE_RANK=rank, **cluster), stderr=subprocess.PIPE, text=True)
        for rank, node in enumerate(two_nodes)
    ]


@pytest.mark.parametrize("stack", STACKS)
def test_two_nodes_give_the_losses_of_one(stack: str, config: Path, two_nodes: list[list[str]], tmp_path: Path) -> None:
    compare_nodes(stack, ["megatron.tp=2"] if stack == "megatron" else [], 1, config, two_nodes, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stack", "nproc", "layout"),
    [
        ("megatron", 1, ["megatron.pp=2", "megatron.vpp=2"]),
        ("megatron", 2, ["megatron.pp=2", "megatron.vpp=2", "megatron.tp=2"]),
        ("deepspeed", 1, ["deepspeed.pp=2"]),
        ("deepspeed", 2, ["deepspeed.pp=2"]),  # two replicas of each stage
    ],
)
def test_a_pipeline_over_two_nodes_gives_the_losses_of_one(
    stack: str, nproc: int, layout: list[str], config: Path, two_nodes: list[list[str]], tmp_path: Path
) -> None:
    compare_nodes(stack, ["model.layers=4", *layout], nproc, config, two_nodes, tmp_path)


def compare_nodes(stack: str, layout: list[str], nproc: int, config: Path, two_nodes: list[list[str]], tmp_path: Path) -> None:
    """The losses of two nodes with `nproc` ranks each are those of as many ranks on one."""
    one, two = tmp_path / "one", tmp_path / "two"
    processes = on_two_nodes(two_nodes, pretrain(stack, config, two, *layout), NPROC=nproc)
    errors = [p.communicate(timeout=300)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    subprocess.run(pretrain(stack, config, one, *layout), env=env_with(NPROC=2 * nproc, OMP_NUM_THREADS=1), check=True)
    losses = [[line["loss"] for line in training_lines(out)] for out in (one, two)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_sigterm_on_one_of_two_nodes_saves_on_both(config: Path, two_nodes: list[list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = on_two_nodes(two_nodes, pretrain("baseline", config, out, "train.steps=1000000"))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(training_lines(out)) > 2, "the first steps", 180)
    processes[1].send_signal(signal.SIGTERM)
    errors = [p.communicate(timeout=60)[1] for p in processes]
    assert [p.returncode for p in processes] == [143, 143], errors
    assert (out / f"step_{len(training_lines(out))}").is_dir()


def standin_on_two_nodes(two_nodes: list[list[str]], folder: Path, **env: object) -> list[subprocess.Popen]:
    return on_two_nodes(two_nodes, [sys.executable, str(STANDIN), "steps", str(folder)], **env)


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGSTOP, 4, r"error: rank 1 of node 1 \(.*, process \d+\) hangs: stopped by a signal, at step \d+"),
        (signal.SIGKILL, 137, r"error: rank 1 of node 1 \(.*, process \d+\) was killed by SIGKILL .* at step \d+"),
    ],
)
def test_a_rank_of_another_node_is_named_on_both(
    number: int, code: int, message: str, two_nodes: list[list[str]], tmp_path: Path
) -> None:
    processes = standin_on_two_nodes(two_nodes, tmp_path, HANG_SECONDS=2)
    stop(tmp_path, 1, number)
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert [p.returncode for p in processes] == [code, code], errors
    assert all(re.match(message, each) and "Traceback" not in each for each in errors), errors
    shown = details(errors[0])
    assert re.search(r"^ +0 +0 ", shown, re.M)  # a table of the ranks


def test_a_lost_node_is_named(two_nodes: list[list[str]], tmp_path: Path) -> None:
    processes = standin_on_two_nodes(two_nodes, tmp_path, HANG_SECONDS=2)
    wait_for_ready(tmp_path)
    wait_for(lambda: "sum of the loss" in (tmp_path / "out/logs/nodes/node_1.json").read_text(), "the second node's record")
    processes[1].kill()  # the launcher, with all that it started
    _, errors = processes[0].communicate(timeout=120)
    processes[1].communicate()
    assert processes[0].returncode == 5, errors
    lost = rf"error: node 1 \({re.escape(socket.gethostname())}, rank 1\) has not reported since 20.*; last seen at step "
    assert re.match(lost, errors) and "Traceback" not in errors
    assert "Connection closed by peer" in details(errors)


def test_srun_alone_tells_two_nodes_where_they_are(two_nodes: list[list[str]], tmp_path: Path) -> None:
    """What srun sets in the two tasks of a step; the node list stands for names that resolve."""
    step = {"SLURM_STEP_ID": 0, "SLURM_STEP_NUM_NODES": 2, "SLURM_STEP_NUM_TASKS": 2, "SLURM_JOB_ID": os.getpid()}
    step |= {"SLURM_STEP_NODELIST": "10.77.0.[1-2]", "NPROC": 1}
    command = [sys.executable, str(STANDIN), "finish", str(tmp_path)]
    processes = [
        subprocess.Popen(node + command, env=env_with(SLURM_NODEID=rank, **step)) for rank, node in enumerate(two_nodes)
    ]
    assert [p.wait(timeout=60) for p in processes] == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pid_0", "pid_1"]


# ---- SLURM


SLURM_CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmdSpoolDir={folder}/slurmd
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPidFile={folder}/slurmctld.pid
StateSaveLocation={folder}/slurmctld
SelectType=select/cons_tres
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment for sbatch: of a SLURM that is there, else of one started for this test."""
    if not shutil.which("sbatch"):
        pytest.skip("NO SLURM HERE: sbatch is missing (Debian, Ubuntu: apt install slurm-wlm munge)")
    if subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode == 0:
        yield {}
        return
    if os.geteuid() or not shutil.which("slurmctld") or not shutil.which("slurmd"):
        pytest.skip("NO SLURM HERE: sinfo fails, and starting one needs root, slurmctld and slurmd")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("slurmd", "slurmctld"):
        (folder / name).mkdir()
    with socket.socket() as a, socket.socket() as b:
        a.bind(("", 0))
        b.bind(("", 0))
        ports = [a.getsockname()[1], b.getsockname()[1]]
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(host=socket.gethostname().split(".")[0], ports=ports, folder=folder))
    env = {"SLURM_CONF": str(conf)}
    daemons = []
    if not Path("/run/munge/munge.socket.2").exists():
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        daemons.append(subprocess.Popen(["munged", "--foreground"], user="munge", group="munge", extra_groups=[]))
    for name in ("slurmctld", "slurmd"):
        with open(folder / f"{name}.log", "w") as log:
            daemons.append(subprocess.Popen([name, "-D"], env=os.environ | env, stdout=log, stderr=log))

    def idle() -> bool:
        return "idle" in subprocess.run(["sinfo"], env=os.environ | env, capture_output=True, text=True).stdout

    try:
        wait_for(idle, f"SLURM (logs in {folder})")
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def sbatch(slurm: dict[str, str], folder: Path, *words: object) -> str:
    command = ["sbatch", "--parsable", "--time=30", str(ROOT / "scripts/slurm.sh"), *map(str, words)]
    env = env_with(NPROC=2, **slurm)
    return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout.strip()


def slurm_field(slurm: dict[str, str], number: str, field: str) -> str:
    env = env_with(**slurm)
    shown = subprocess.run(["scontrol", "show", "job", number], env=env, check=True, capture_output=True, text=True)
    return re.search(rf"\b{field}=(\S*)", shown.stdout)[1]


def standin_script(folder: Path, *words: object) -> list[object]:
    """A launch script around the stand-in, and its arguments."""
    script = folder / "standin.sh"
    script.write_text(f'exec "{sys.executable}" "{STANDIN}" "$@"\n')
    mode, *value = words
    return [script, mode, folder, *value]


@pytest.mark.slurm
def test_slurm_runs_a_launch_script_to_the_end(slurm: dict[str, str], config: Path, tmp_path: Path) -> None:
    _, script, *arguments = pretrain("baseline", Path(config.name), Path("out"))
    number = sbatch(slurm, tmp_path, script, *arguments)  # relative paths mean the folder of sbatch
    wait_for(lambda: slurm_field(slurm, number, "JobState") in ("COMPLETED", "FAILED"), "the job", 200)
    assert slurm_field(slurm, number, "JobState") == "COMPLETED", (tmp_path / f"slurm-{number}.out").read_text()
    assert len(training_lines(tmp_path / "out")) == 4


@pytest.mark.slurm
def test_slurm_passes_a_failure_on(slurm: dict[str, str], tmp_path: Path) -> None:
    number = sbatch(slurm, tmp_path, *standin_script(tmp_path, "code", 3))
    wait_for(lambda: slurm_field(slurm, number, "JobState") in ("COMPLETED", "FAILED"), "the job", 100)
    assert slurm_field(slurm, number, "ExitCode") == "3:0"


@pytest.mark.slurm
def test_slurm_saves_and_requeues_on_the_signal_before_the_limit(slurm: dict[str, str], tmp_path: Path) -> None:
    number = sbatch(slurm, tmp_path, *standin_script(tmp_path, "save", 3))
    wait_for_ready(tmp_path)
    time.sleep(61)  # in the first minute it is taken for a mistake
    subprocess.run(["scancel", "--batch", "--signal=TERM", number], env=env_with(**slurm), check=True)
    wait_for(lambda: slurm_field(slurm, number, "JobState") == "PENDING", "the requeued job", 60)
    assert (tmp_path / "saved").exists()
    # SLURM lets a requeued job wait two minutes
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], env=env_with(**slurm), check=True)
    wait_for(lambda: slurm_field(slurm, number, "JobState") in ("COMPLETED", "FAILED"), "the job", 100)
    assert (slurm_field(slurm, number, "JobState"), slurm_field(slurm, number, "Restarts")) == ("COMPLETED", "1")


@pytest.mark.slurm
def test_slurm_saves_and_does_not_requeue_what_was_cancelled(slurm: dict[str, str], tmp_path: Path) -> None:
    number = sbatch(slurm, tmp_path, *standin_script(tmp_path, "save", 1))
    wait_for_ready(tmp_path)
    subprocess.run(["scancel", number], env=env_with(**slurm), check=True)
    wait_for((tmp_path / "saved").exists, "the save", 30)
    time.sleep(5)
    assert (slurm_field(slurm, number, "JobState"), slurm_field(slurm, number, "Restarts")) == ("CANCELLED", "0")
