"""Invariants 6 and 7: ten steps and ten steps are twenty, whatever stack or layout goes on, and whatever kills the run."""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_state, case, finished, launch_script, losses
from test_parity import DIVIDED, LOSS, NORM, farthest

from common import families
from tests import plain

LAYOUTS: dict[str, tuple[str, list[str]]] = {
    "baseline": ("baseline", []),
    "fsdp2": ("baseline", ["baseline.shard=full"]),
    "zero0": ("deepspeed", ["deepspeed.zero_stage=0"]),
    "zero1": ("deepspeed", ["deepspeed.zero_stage=1"]),
    "zero2": ("deepspeed", ["deepspeed.zero_stage=2"]),
    "zero3": ("deepspeed", ["deepspeed.zero_stage=3"]),
    "zero1_pp2": ("deepspeed", ["deepspeed.pp=2"]),
    "zero3_offload_all": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.offload=all", "deepspeed.micro_batch=4"]),
    "zero1_autotp2": ("deepspeed", ["deepspeed.zero_stage=1", "deepspeed.tp=2", "deepspeed.micro_batch=4"]),
    "zero3_ulysses2": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.sp=2"]),
    "tp2": ("megatron", ["megatron.tp=2", "megatron.micro_batch=4"]),
    "tp2_sp": ("megatron", ["megatron.tp=2", "megatron.sequence_parallel=true", "megatron.micro_batch=4"]),
    "pp2": ("megatron", ["megatron.pp=2"]),
    "cp2": ("megatron", ["megatron.cp=2", "megatron.distributed_optimizer=true", "megatron.micro_batch=4"]),
    "pp2_vpp2": ("megatron", ["megatron.pp=2", "megatron.vpp=2"]),
    "dp2_distributed_optimizer": ("megatron", ["megatron.distributed_optimizer=true"]),
}
DTYPES = {"fp32": "fp32", "zero1_bf16": "bf16"}
MOVES: list[tuple[str, list[str]]] = [
    ("baseline", []),
    ("deepspeed", ["deepspeed.zero_stage=1"]),
    ("deepspeed", ["deepspeed.zero_stage=3"]),
    ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.tp=2", "deepspeed.micro_batch=4"]),
    ("baseline", ["baseline.shard=full"]),
    ("megatron", ["megatron.tp=2", "megatron.micro_batch=4"]),
    ("deepspeed", ["deepspeed.zero_stage=1", "deepspeed.sp=2"]),
    ("megatron", ["megatron.pp=2"]),
    ("deepspeed", ["deepspeed.pp=2"]),
    ("megatron", ["megatron.cp=2"]),
    ("megatron", ["megatron.pp=2", "megatron.vpp=2"]),
    ("megatron", ["megatron.distributed_optimizer=true"]),
    ("baseline", []),
]


def moves_without(*refused: set[str]) -> list[tuple[str, list[str]]]:
    """MOVES without those that have all the keys of one of these sets, which a family refuses."""
    return [(stack, keys) for stack, keys in MOVES if not any(those <= {*keys} for those in refused)]


BF16 = ["zero1", "zero1_pp2", "zero3", "fsdp2", "baseline", "tp2_sp", "dp2_distributed_optimizer"]
IN_BACKGROUND = ["baseline", "zero3", "tp2_sp"]
EACH = 5  # steps on each stack
MOVED, SLOW_MOVED = ["tiny_llama"], ["tiny"]  # the layouts above resume the other architecture
SLOW_FOUR_RANKS = {
    "zero3_hpz2": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.hpz=2", "deepspeed.micro_batch=1", DIVIDED])
}


def halves_and_whole(name: str, layout: tuple[str, list[str]], out: Path, settings: list[str]) -> list[dict]:
    """20 steps with dropout in one run, and in two of 10."""
    stack, overrides = layout
    shared = [*settings, "model.dropout=0.1", "optim.decay_steps=20", *overrides]
    whole = case(stack, "tiny", out / "whole" / name, [*shared, "train.steps=20"])
    return [whole, *(case(stack, "tiny", out / "halves" / name, [*shared, f"train.steps={n}"]) for n in (10, 20))]


@pytest.fixture(scope="module")
def runs(drive, settings, with_slow, tmp_path_factory) -> tuple[Path, str]:
    """(folder of the runs, what they printed)"""
    out = tmp_path_factory.mktemp("resume")
    cases = [one for name, layout in LAYOUTS.items() for one in halves_and_whole(name, layout, out, settings)]
    for name in BF16:
        stack, overrides = LAYOUTS[name]
        shared = [*settings, "train.dtype=bf16", "optim.decay_steps=8", *overrides]
        cases.append(case(stack, "tiny", out / "whole" / f"{name}_bf16", [*shared, "train.steps=8"]))
        cases += [case(stack, "tiny", out / "halves" / f"{name}_bf16", [*shared, f"train.steps={n}"]) for n in (4, 8)]
    for name in IN_BACKGROUND:
        stack, overrides = LAYOUTS[name]
        shared = [*settings, "model.dropout=0.1", "optim.decay_steps=20", "train.async_save=true", "train.save_every=3"]
        cases += [case(stack, "tiny", out / "background" / name, [*shared, *overrides, f"train.steps={n}"]) for n in (10, 20)]
    total = EACH * len(MOVES)
    for arch in MOVED + SLOW_MOVED * with_slow:
        moved = [*settings, f"optim.decay_steps={total}", "train.keep=100"]
        cases += [
            case(stack, arch, out / "moved" / arch, [*moved, f"train.steps={EACH * number}", *overrides])
            for number, (stack, overrides) in enumerate(MOVES, 1)
        ]
    log = drive(cases, 2)
    if with_slow:
        log += drive(
            [one for name, layout in SLOW_FOUR_RANKS.items() for one in halves_and_whole(name, layout, out, settings)], 4
        )
    return out, log


def slow(names: Iterable[str]) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def steps_on_disk(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in run.glob("step_*") if p.name[5:].isdigit())


@pytest.mark.parametrize("name", [*LAYOUTS, *(f"{n}_bf16" for n in BF16), *slow(SLOW_FOUR_RANKS)])
def test_two_halves_are_one_run_bit_for_bit(runs, name):
    out, _ = runs
    whole, halves = losses(out / "whole" / name), losses(out / "halves" / name)
    assert len(whole) in (8, 20)
    for step in whole:
        for key in ("loss", "grad_norm", "lr"):
            assert whole[step][key] == halves[step][key], (step, key)
    assert_same_state(out / "whole" / name, out / "halves" / name, max(whole))


@pytest.mark.parametrize("name", IN_BACKGROUND)
def test_a_save_in_the_background_is_of_its_step(runs, name):
    """Every third step, while the training changes the memory that was copied."""
    out, log = runs
    whole, written = losses(out / "whole" / name), losses(out / "background" / name)
    assert all(whole[step][key] == written[step][key] for step in whole for key in ("loss", "grad_norm"))
    assert_same_state(out / "whole" / name, out / "background" / name, 20)
    lines = [json.loads(line) for line in (out / "background" / name / "metrics.jsonl").read_text().splitlines()]
    stalls = {line["step"]: line["save_ms"] for line in lines if "save_ms" in line}
    on_disk = {line["step"]: line["saved_ms"] for line in lines if "saved_ms" in line}
    assert list(stalls) == list(on_disk) == [3, 6, 9, 10, 12, 15, 18, 20]
    assert all(0 < stalls[step] <= on_disk[step] for step in stalls)


def test_replicated_parameters_stay_equal_with_dropout(runs):
    _, log = runs
    lines = re.findall(r"REPLICATED (\d+) parameters, (\d+) wrong", log)
    assert len(lines) >= 11  # every save of a Megatron run, and of a DeepSpeed run with tp
    assert all(int(seen) > 0 and wrong == "0" for seen, wrong in lines), lines


def test_dropout_was_on(runs, settings):
    dropped = losses(runs[0] / "whole/baseline")[1]["loss"]
    without, _ = plain.losses(ROOT / "recipes/gpt/configs/tiny.yaml", [*settings, "train.steps=1"])[0]
    assert abs(dropped - without) > 10 * LOSS


@pytest.mark.parametrize("arch", [*MOVED, *slow(SLOW_MOVED)])
def test_one_run_moves_between_stacks(runs, settings, arch):
    """Through all stacks it follows the reference loop, which stays."""
    out, total = runs[0], EACH * len(MOVES)
    more = [f"optim.decay_steps={total}", f"train.steps={total}"]
    expected = plain.losses(ROOT / f"recipes/gpt/configs/{arch}.yaml", settings + more)
    loss, norm = farthest(out / "moved" / arch, expected)
    assert len(expected) == total and loss <= LOSS and norm <= NORM
    stacks = [
        json.loads((out / "moved" / arch / f"step_{n}" / "state.json").read_text())["stack"]
        for n in range(EACH, total + 1, EACH)
    ]
    assert stacks == [stack for stack, _ in MOVES]


def test_every_move_reads_back_bit_for_bit(runs):
    _, log = runs
    lines = re.findall(r"READBACK (\d+) parameters, (\d+) wrong", log)
    moves = len(LAYOUTS) + len(BF16) + len(MOVED) * (len(MOVES) - 1)
    assert len(lines) >= moves
    assert all(int(seen) > 0 and wrong == "0" for seen, wrong in lines), lines


# ---- killed while it saves


def start(out: Path, stack: str, settings: list[str], *overrides: str, nproc: int = 1) -> subprocess.Popen:
    command = ["bash", str(launch_script(stack)), "recipes/gpt/configs/tiny.yaml", str(out), *settings, *overrides]
    env = os.environ | {"NPROC": str(nproc), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_during_a_save(out: Path, process: subprocess.Popen, after: int, rng: random.Random) -> None:
    """kill -9 the launcher at a random moment of a save that follows step `after`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        saving = [p for p in out.glob("step_*.tmp") if int(p.stem[5:]) > after]
        if saving:
            time.sleep(rng.random() * 0.03)  # a save of this model takes about as long
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.001)
    process.kill()
    raise AssertionError(f"no save seen; {process.stdout.read()[-2000:]}")


def kill_at_any_moment(process: subprocess.Popen, rng: random.Random) -> None:
    """kill -9 the launcher at a random moment: mostly while the run starts, and reads its last step."""
    time.sleep(rng.random() * 8)
    process.send_signal(signal.SIGKILL)
    process.wait()


def check_kills(out: Path, stack: str, settings: list[str], kills: int, nproc: int, *overrides: str) -> None:
    rng = random.Random(stack)
    total = 4 * kills + 8
    run = [f"train.steps={total}", "train.save_every=1", "model.dropout=0.1", *overrides]
    finished = 0
    for number in range(kills):
        process = start(out, stack, settings, *run, nproc=nproc)
        if number % 2:
            kill_at_any_moment(process, rng)
        else:
            kill_during_a_save(out, process, finished + rng.randrange(3), rng)
        time.sleep(0.5)  # the ranks follow their launcher
        done = steps_on_disk(out)
        finished = done[-1] if done else 0
    process = start(out, stack, settings, *run, nproc=nproc)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-3000:]
    assert finished == 0 or f"{out}/step_{finished}" in printed  # it went on from the last finished step
    assert steps_on_disk(out)[-1] == total
    whole = start(out.with_name(out.name + "_whole"), stack, settings, *run, "train.save_every=0", nproc=nproc)
    printed, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, printed[-3000:]
    expected, lines_of = losses(out.with_name(out.name + "_whole")), losses(out)
    assert [lines_of[s]["loss"] for s in expected] == [line["loss"] for line in expected.values()]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if '"loss"' in line]) == total  # each step once


def test_killed_while_saving(settings, tmp_path):
    check_kills(tmp_path / "run", families.stacks("gpt")[0], settings, kills=3, nproc=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("in_background", ["false", "true"])
@pytest.mark.parametrize("stack", ["baseline", "deepspeed", "megatron"])
def test_killed_ten_times_while_saving(settings, tmp_path, stack, in_background):
    check_kills(tmp_path / "run", stack, settings, 10, 2, f"train.async_save={in_background}")


def test_earlier_lines_of_the_log_stay_byte_for_byte(drive, settings, tmp_path):
    out = tmp_path / "run"
    drive([case("baseline", "tiny", out, [*settings, "train.steps=6", "train.save_every=4", "optim.decay_steps=9"])], 1)
    before = (finished(out) / "metrics.jsonl").read_bytes()
    drive([case("baseline", "tiny", out, [*settings, "train.steps=9", "train.save_every=4"])], 1)  # decay_steps is recorded
    after = (out / "metrics.jsonl").read_bytes()
    assert after.startswith(before) and len(losses(out)) == 9
