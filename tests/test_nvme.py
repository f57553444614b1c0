"""deepspeed.nvme: what is refused, DeepSpeed's configuration, and runs where libaio is installed."""

from pathlib import Path

import pytest
from conftest import ROOT, case, losses

from common import config
from common.errors import BadInput
from common.layout import layout_for
from common.planning import memory, traffic
from common.stacks import host
from recipes.gpt import task

TINY = ROOT / "recipes/gpt/configs/tiny_llama.yaml"
NVME = ["deepspeed.zero_stage=3", "deepspeed.offload=all"]
# Shares above 1 MiB, which DeepSpeed keeps on the disk: of the embedding, and of a group of all parameters
LARGE = ["model.hidden=256", "model.vocab_size=4096", "model.layers=2", "train.steps=6", "optim.decay_steps=6"]


def loaded(*overrides: str) -> config.Config:
    cfg = config.load(TINY, ["data.valid=null", "model.vocab_size=512", *overrides], task.Config)
    return config.resolve(cfg, task.ResolvedConfig, 512)


def test_a_host_without_libaio_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "has_libaio", lambda: False)
    [line] = host.problems(loaded(*NVME, f"deepspeed.nvme={tmp_path}").deepspeed)
    assert line.startswith(f"deepspeed.nvme={tmp_path} needs libaio, ") and "apt install libaio-dev g++" in line
    monkeypatch.setattr(host, "has_libaio", lambda: True)
    assert not list(host.problems(loaded(*NVME, f"deepspeed.nvme={tmp_path}").deepspeed))
    [line] = host.problems(loaded(*NVME, f"deepspeed.nvme={tmp_path}/none").deepspeed)
    assert "must be a folder that can be written to" in line


def test_no_compiler_is_no_libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not host.has_libaio.__wrapped__()


@pytest.mark.parametrize("key", ["quantized_weights", "quantized_gradients"])
def test_quantization_needs_a_gpu(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    [line] = host.problems(loaded("deepspeed.zero_stage=3", f"deepspeed.{key}=true").deepspeed)
    assert line.startswith(f"deepspeed.{key}=true needs a GPU: DeepSpeed quantizes by CUDA kernels alone")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert not list(host.problems(loaded("deepspeed.zero_stage=3", f"deepspeed.{key}=true").deepspeed))


@pytest.mark.parametrize("words", [["deepspeed.hpz=2"], ["deepspeed.offload=all", "deepspeed.nvme=/tmp"]])
def test_memory_and_traffic_are_not_guessed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "has_libaio", lambda: True)
    cfg = loaded("deepspeed.zero_stage=3", *words)
    with pytest.raises(BadInput, match="is not estimated"):
        memory.estimate_for(cfg, cfg.model, "deepspeed", 4)
    if "hpz" in words[0]:
        with pytest.raises(BadInput, match="collectives of deepspeed.hpz=2 are not counted"):
            traffic.collectives(cfg, "deepspeed", 4)


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_deepspeed_reads_the_places(offload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    from common.stacks import zero

    monkeypatch.setattr(host, "has_libaio", lambda: True)
    cfg = loaded("deepspeed.zero_stage=3", f"deepspeed.offload={offload}", f"deepspeed.nvme={tmp_path}")
    values = zero.ds_config(cfg, layout_for(cfg, "deepspeed", 1))
    [folder] = tmp_path.iterdir()  # without a launcher, one for each rank
    read = DeepSpeedConfig(values).zero_config
    assert read.offload_optimizer.device == "nvme" and read.offload_optimizer.nvme_path == folder
    assert (read.offload_param is not None and read.offload_param.device == "nvme") == (offload == "all")
    assert read.sub_group_size == 100_000_000


@pytest.mark.slow
@pytest.mark.skipif(not host.has_libaio(), reason="DeepSpeed's aio operator needs libaio and a compiler")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_what_is_on_the_disk_has_the_losses_of_what_is_in_memory(offload: str, drive, settings, tmp_path: Path) -> None:
    disk, swap = tmp_path / "disk", tmp_path / "swap"
    swap.mkdir()
    layout = ["deepspeed.zero_stage=3", f"deepspeed.offload={offload}"]
    first = [*settings, *LARGE, *layout, "train.steps=3"]
    cases = [
        case("deepspeed", "tiny_llama", tmp_path / "memory", [*settings, *LARGE, *layout]),
        case("deepspeed", "tiny_llama", disk, [*first, f"deepspeed.nvme={swap}"]),
        case("deepspeed", "tiny_llama", disk, [*settings, *LARGE, *layout, f"deepspeed.nvme={swap}"]),  # continues
    ]
    drive(cases, 2)
    written = sum(path.stat().st_size for path in swap.rglob("*.swp"))
    assert written > 2**20
    assert losses(disk).keys() == losses(tmp_path / "memory").keys() == set(range(1, 7))
    for step, line in losses(tmp_path / "memory").items():
        assert losses(disk)[step]["loss"] == line["loss"] and losses(disk)[step]["grad_norm"] == line["grad_norm"], step
