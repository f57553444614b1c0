"""Which GPU a rank takes, what its environment says, and train.deterministic: as far as they show without a GPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from conftest import ROOT

from common.checkpoints import run_record
from common.config import Train
from common.errors import BadInput
from common.launch import launcher, processes


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes torch see so many GPUs, and this process local rank `local` of `world` ranks."""
    import torch

    def see(count: int, local: int, world: int, **env: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        for name, value in {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(world), **env}.items():
            monkeypatch.setenv(name, value)

    return see


@pytest.mark.parametrize(("count", "local", "taken"), [(8, 3, 3), (1, 3, 0), (2, 3, 1)])
def test_a_rank_takes_its_gpu_among_those_that_it_sees(gpus, count, local, taken):
    gpus(count, local, 8)
    assert processes._device().index == taken
    assert os.environ["LOCAL_RANK"] == str(taken)  # DeepSpeed, accelerate and torch read it


def test_two_ranks_of_torchrun_on_one_gpu_are_refused(gpus):
    gpus(1, 1, 2, TORCHELASTIC_RUN_ID="x")
    with pytest.raises(BadInput) as refused:
        processes._device()
    line = "NPROC=2 and this node shows 1 GPU: NCCL refuses two ranks on one GPU; type NPROC=1"
    assert refused.value.problems == [line]
    gpus(1, 1, 2, TORCHELASTIC_RUN_ID="x", NCCL_MULTI_RANK_GPU_ENABLE="1")
    assert processes._device().index == 0


@pytest.mark.parametrize(
    ("stack", "tp", "cp", "transformer_engine", "deterministic", "expected"),
    [
        ("megatron", 2, 1, False, False, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        ("megatron", 1, 2, True, False, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        ("megatron", 1, 2, False, False, {}),
        ("megatron", 1, 1, True, False, {}),
        ("deepspeed", 2, 1, False, False, {}),
        ("baseline", 1, 1, False, True, {"NCCL_ALGO": "^NVLS"}),
    ],
)
def test_the_launcher_sets_what_cuda_and_nccl_read_first(stack, tp, cp, transformer_engine, deterministic, expected):
    megatron = SimpleNamespace(transformer_engine=transformer_engine)
    cfg = SimpleNamespace(train=SimpleNamespace(deterministic=deterministic), megatron=megatron)
    run = SimpleNamespace(stack=stack, layout=SimpleNamespace(tp=tp, cp=cp), cfg=cfg)
    assert launcher.variables_of(run, launcher.Nodes(1, 1, 0, None, None)) == expected


def test_segments_grow_in_place_unless_the_user_says_otherwise(tmp_path):
    code = "import os; from common.launch import processes; processes.quiet(); print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    base = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}

    def seen(**env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=base | env, text=True, capture_output=True, check=True
        )
        return done.stdout.strip()

    assert seen() == "expandable_segments:True"
    assert seen(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64") == "None"
    assert seen(PYTORCH_ALLOC_CONF="max_split_size_mb:64") == "max_split_size_mb:64"


@pytest.mark.parametrize(("rank", "expected"), [("0", ["no input requires a gradient", "overflow"]), ("1", [])])
def test_the_first_rank_prints_each_warning_about_the_run_once(rank, expected):
    code = """if True:
        import warnings
        from common.launch import processes
        processes.quiet()
        warnings.warn("of an import")
        processes._show_warnings()
        for _ in range(2):
            warnings.warn("no input requires a gradient")
            warnings.warn("overflow", RuntimeWarning)
            warnings.warn("goes in version 9", DeprecationWarning)
            warnings.warn("full scope is deprecated. Use empty", UserWarning)
    """
    env = os.environ | {"RANK": rank}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True, check=True)
    assert [line.rpartition(": ")[2] for line in done.stderr.splitlines()] == expected
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())


def test_determinism_is_of_gpus(monkeypatch):
    import torch

    settings = Train(steps=1, global_batch=1, deterministic=True)
    processes.set_numerics(settings, processes.Ranks(0, 2, torch.device("cpu")))
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    with pytest.raises(BadInput, match=r"set NCCL_ALGO=\^NVLS in the environment of all 2 ranks"):
        processes.set_numerics(settings, processes.Ranks(0, 2, torch.device("cuda", 0)))
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_versions_of_packages_that_are_not_installed_are_none():
    modules = {"torch": "torch", "transformer-engine": "transformer_engine", "apex": "apex", "flash-attn": "flash_attn"}
    versions = run_record.versions()
    assert {name: versions[name] is not None for name in modules} == {n: find_spec(m) is not None for n, m in modules.items()}


@pytest.mark.parametrize("deterministic", ["false", "true"])
def test_a_simulated_run_records_its_gpu_and_takes_the_kernels_of_train_deterministic(tmp_path, deterministic):
    words = ["recipes/gpt/configs/tiny.yaml", "--stack", "megatron", "--save", "--steps", "1", "--out", str(tmp_path / "out")]
    words += ["--top", "500", "train.dtype=bf16", f"train.deterministic={deterministic}"]
    done = subprocess.run([sys.executable, "-m", "scripts.simulate", *words], cwd=ROOT, text=True, capture_output=True)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    # Megatron's deterministic_mode indexes the table of words in place of torch's embedding
    assert ("indexing_backward_kernel" in done.stdout) == (deterministic == "true")
    gpu = json.loads((tmp_path / "out/run.json").read_text())["gpu"]
    assert gpu["name"] == "NVIDIA H100 80GB HBM3" and gpu["cuda"] and gpu["nccl"].count(".") == 2
