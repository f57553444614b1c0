"""Phases: later steps of one run under other settings. One command, one curve on every stack, no sample twice."""

import json
import os
import signal
import subprocess

import pytest
from conftest import ROOT, case, launch_script, losses

from common import config, preflight
from common.training import optim
from recipes.gpt import task

PHASES = [
    {"train.steps": 8, "data.seq_len": 96, "train.global_batch": 4, "deepspeed.micro_batch": 1, "megatron.micro_batch": 4},
    {"train.steps": 10, "optim.lr": 3e-3, "optim.begin_step": 8, "optim.schedule": "constant", "train.global_batch": 8},
]
SETTINGS = ["train.steps=4", "model.positions=96", "baseline.micro_batch=1", f"phases={json.dumps(PHASES)}"]


@pytest.fixture(scope="module")
def cfg() -> task.Config:
    return config.load(ROOT / "recipes/gpt/configs/tiny.yaml", [*SETTINGS, "optim.decay_steps=10"], task.Config)


def test_each_step_has_its_phase(cfg):
    assert cfg.last_step == 10
    shapes = [(v.train.steps, v.data.seq_len, v.train.global_batch, v.megatron.micro_batch) for v in config.views(cfg)]
    assert shapes == [(4, 64, 8, 2), (8, 96, 4, 4), (10, 96, 8, 4)]  # a phase builds on the one before
    assert [config.at_step(cfg, done).train.steps for done in (0, 3, 4, 7, 8, 9, 10, 99)] == [4, 4, 8, 8, 10, 10, 10, 10]


def test_no_sample_comes_twice_or_is_left_out(cfg):
    run = preflight.Run(cfg, cfg, "baseline", None, None, None, None, None, {}, None, [])
    numbers = [number for step in range(1, 11) for number in run.samples(step)]
    assert numbers == list(range(4 * 8 + 4 * 4 + 2 * 8))
    assert len(run.samples(11)) == 8  # train.steps of the last phase may grow


def test_a_schedule_may_go_on_or_begin_anew(cfg):
    views = config.views(cfg)
    whole = [optim.lr_at(step, cfg.optim) for step in range(1, 9)]
    assert [optim.lr_at(step, config.at_step(cfg, step - 1).optim) for step in range(1, 9)] == whole
    assert optim.lr_at(9, views[2].optim) == 1.5e-3 and optim.lr_at(10, views[2].optim) == 3e-3  # two steps of warmup again


def test_exponential_schedule_is_deepspeeds():
    """bing_bert's EE with lr_offset: base x (x / warmup)^2 while it rises, then base x 0.9^(steps / 250), plus the offset."""
    o = config.Optim(lr=12e-3, min_lr=1e-3, schedule="exponential", warmup_steps=450, decay_rate=0.9, decay_interval=250)
    assert optim.lr_at(225, o) == pytest.approx(11e-3 / 4 + 1e-3)
    assert optim.lr_at(450, o) == pytest.approx(12e-3)
    assert optim.lr_at(450 + 500, o) == pytest.approx(11e-3 * 0.81 + 1e-3)


@pytest.fixture(scope="module")
def out(drive, settings, tmp_path_factory):
    """The same run on three stacks: each phase is a start of its own, as the launch script makes them."""
    out = tmp_path_factory.mktemp("phases")
    stacks = {"baseline": [], "deepspeed": ["deepspeed.zero_stage=2"], "megatron": ["megatron.tp=2"]}
    drive([case(s, "tiny", out / s, [*settings, *SETTINGS, *more]) for s, more in stacks.items() for _ in range(3)], 2)
    return out


def test_one_curve_through_all_phases(out):
    expected = losses(out / "baseline")
    assert sorted(expected) == list(range(1, 11))
    for stack in ("deepspeed", "megatron"):
        lines = losses(out / stack)
        assert max(abs(lines[s]["loss"] - expected[s]["loss"]) for s in expected) <= 1e-5
        assert [lines[s]["lr"] for s in lines] == [expected[s]["lr"] for s in expected]
    state = json.loads((out / "megatron/step_10/state.json").read_text())
    assert (state["samples"], state["hyperparameters"]["train.steps"]) == (64, 4)


def test_one_command_goes_through_all_phases_and_exports_once(out, settings, tmp_path):
    config_path = ROOT / "recipes/gpt/configs/tiny.yaml"
    command = ["bash", str(launch_script("baseline")), str(config_path), str(tmp_path / "run")]
    env = os.environ | {"NPROC": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *settings, *SETTINGS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("export    ") == 1 and "step   10 100%" in done.stdout
    lines, expected = losses(tmp_path / "run"), losses(out / "baseline")
    assert max(abs(lines[s]["loss"] - expected[s]["loss"]) for s in expected) <= 1e-5
    again = subprocess.run([*command, *settings, *SETTINGS], env=env, capture_output=True, text=True)
    assert again.returncode == 0 and "step " not in again.stdout  # nothing is left to do
    other = [word.replace('"data.seq_len": 96', '"data.seq_len": 80') for word in SETTINGS]
    refused = subprocess.run([*command, *settings, *other], env=env, capture_output=True, text=True)
    assert refused.returncode == 2 and "has another run: phases was" in refused.stderr


def test_a_signal_at_the_end_of_a_phase_stops_the_run(settings, tmp_path):
    """It comes while the last step of a phase is validated or saved: the next phase must not begin."""
    config_path = ROOT / "recipes/gpt/configs/tiny.yaml"
    words = [*settings, "train.steps=2", "model.dropout=0.0", "phases=[{train.steps: 40}]", "train.eval_samples=400"]
    command = ["bash", str(launch_script("baseline")), str(config_path), str(tmp_path / "run"), *words]
    env = os.environ | {"NPROC": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step    2 "):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 143, rest
    assert max(losses(tmp_path / "run")) == 2 and (tmp_path / "run/step_2/state.json").is_file()
