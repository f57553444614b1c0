"""The GPU that does nothing (common/simulation): what it counts against numbers that do not come from it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import BadInput
from common.simulation import build, corpus, trace
from tests.conftest import ROOT

TINY = "recipes/gpt/configs/tiny.yaml"
LAYERS, HIDDEN, VOCABULARY, SEQ_LEN, GLOBAL_BATCH = 4, 64, 512, 64, 8  # of that config; the vocabulary is the corpus's
PARAMETERS = VOCABULARY * HIDDEN + SEQ_LEN * HIDDEN + LAYERS * (12 * HIDDEN**2 + 13 * HIDDEN) + 2 * HIDDEN
BF16 = ["train.dtype=bf16"]
ZERO3 = ["deepspeed.zero_stage=3"]
SPLIT = ["megatron.tp=2", "megatron.distributed_optimizer=true", "megatron.micro_batch=4"]
STAGE = ["megatron.pp=2", "megatron.tp=2", "megatron.sequence_parallel=true"]
ON_CPU = ("baseline", "zero1", "zero2", "zero3", "bert", "t5", "megatron", "distributed")
# name -> case; `first` and `again` share OUT: the second resumes
CASES: dict[str, dict[str, Any]] = {
    "baseline": {"stack": "baseline"},
    "zero1": {"stack": "deepspeed"},
    "zero2": {"stack": "deepspeed", "overrides": ["deepspeed.zero_stage=2"]},
    "zero3": {"stack": "deepspeed", "overrides": ZERO3},
    "bert": {"family": "bert", "stack": "deepspeed"},
    "t5": {"family": "t5", "stack": "deepspeed"},
    "megatron": {"stack": "megatron"},
    "distributed": {"stack": "megatron", "overrides": ["megatron.distributed_optimizer=true"]},
    "dp8": {"stack": "baseline", "world": 8, "overrides": ["baseline.micro_batch=1"], "roofline": True, "steps": 3},
    "first": {"stack": "megatron", "world": 8, "rank": 7, "overrides": STAGE, "save": True, "fill": True},
    "again": {"stack": "megatron", "world": 8, "rank": 7, "overrides": STAGE, "save": True},
    "bad": {"stack": "megatron", "world": 3},
    **{f"zero3 {rank}": {"world": 2, "rank": rank, "stack": "deepspeed", "overrides": ZERO3, "state": True} for rank in (0, 1)},
    **{
        f"split {rank}": {"world": 4, "rank": rank, "stack": "megatron", "overrides": SPLIT, "state": True} for rank in range(4)
    },
}


def tiny(case: dict[str, Any]) -> str:
    return f"recipes/{case.get('family', 'gpt')}/configs/tiny.yaml"


@pytest.fixture(scope="module")
def preload() -> str:
    try:
        return build.preload()
    except build.CannotSimulate as error:
        pytest.skip(str(error))


def simulate(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.simulate", *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def found(preload: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of CASES."""
    folder = tmp_path_factory.mktemp("simulate")
    cases = []
    for case in CASES.values():
        out = str(folder / "saved") if case.get("save") else None
        both = {"config": tiny(case), "steps": 2, "roofline": False, "out": out} | case
        both.pop("family", None)
        cases.append(both | {"overrides": [*BF16, f"train.global_batch={GLOBAL_BATCH}", *case.get("overrides", [])]})
    (folder / "cases.json").write_text(json.dumps(cases))
    done = simulate("--cases", str(folder / "cases.json"), "--json", str(folder / "found.json"))
    assert (folder / "found.json").is_file(), done.stderr
    return dict(zip(CASES, json.loads((folder / "found.json").read_text()), strict=True))


# ---- against a CPU, whose memory is real -----------------------------------------------------------------------------

CPU = """
import importlib, json, os, sys, traceback
from common.launch import in_process, processes
from common.simulation import trace
processes.quiet()

class Done(Exception):
    pass

def live(module, config, out, overrides):
    recipe, steps = importlib.import_module(module), []

    class Watch(recipe.Log):
        def step(self, *_, **__):
            steps.append(sum(trace.live_storages("cpu").values()))
            if len(steps) == 2:
                raise Done

    recipe.Log = Watch
    try:
        in_process.run(module, [config, out, *overrides])
    except Done:
        return steps[-1]

results = {}
for name, (module, config, overrides) in json.loads(sys.argv[1]).items():
    read, write = os.pipe()
    if not os.fork():
        try:
            os.write(write, str(live(module, config, f"{sys.argv[2]}/{name}", overrides)).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)  # a normal exit would wait for threads of the stacks
    os.close(write)  # so that the end of a child that failed is seen
    results[name] = int(os.read(read, 100) or -1)
print("LIVE", json.dumps(results))
"""


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Bytes of all live tensors after two steps on the CPU, of the cases on one rank."""
    folder = tmp_path_factory.mktemp("cpu")
    runs = {}
    for name in ON_CPU:
        family = CASES[name].get("family", "gpt")
        prefix = corpus.write(folder / "corpora" / family, VOCABULARY, SEQ_LEN, sentences=family == "bert")
        shared = [f"data.train={prefix}", "data.valid=null", f"model.vocab_size={VOCABULARY}", "train.steps=3", *BF16]
        module = f"recipes.{family}.{CASES[name]['stack']}.pretrain"
        runs[name] = (module, tiny(CASES[name]), [*shared, *CASES[name].get("overrides", [])])
    command = [sys.executable, "-c", CPU, json.dumps(runs), str(folder)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("LIVE ")), "")
    assert line, done.stderr
    return json.loads(line.removeprefix("LIVE "))


@pytest.mark.parametrize("name", ON_CPU)
def test_live_bytes_after_two_steps_are_those_of_a_cpu(found: dict[str, Any], on_cpu: dict[str, int], name: str) -> None:
    assert found[name]["fault"] is None
    clip = 0 if name == "zero3" else 4  # on a GPU the optimizer keeps the factor that clips, in fp32 (common/training/optim.py)
    # Megatron keeps the states of three generators as tensors on the CPU, those of a GPU's generator too, which are not counted
    # here (megatron/core/tensor_parallel/random.py, CudaRNGStatesTracker)
    generators = 3 * torch.get_rng_state().nbytes if CASES[name]["stack"] == "megatron" else 0
    assert found[name]["live_bytes"] == on_cpu[name] + clip - generators


# ---- against arithmetic ----------------------------------------------------------------------------------------------


def test_weights_gradients_and_moments_take_4_4_and_8_bytes_per_parameter(found: dict[str, Any]) -> None:
    """On the baseline; each tensor is rounded up to 512 bytes, and there are 52."""
    kinds = found["baseline"]["memory_kinds"]
    for kind, width in (("weights", 4), ("optimizer", 8)):
        assert width * PARAMETERS <= kinds[kind] <= width * PARAMETERS + 52 * 3 * 512, kind
    assert set(kinds) == set(trace.KINDS)
    assert sum(kinds.values()) == pytest.approx(found["baseline"]["phases"]["step"]["peak_bytes"], rel=0.01)


def test_matrix_products_are_6_flops_per_weight_and_token(found: dict[str, Any]) -> None:
    weights = LAYERS * 12 * HIDDEN**2 + VOCABULARY * HIDDEN
    for name, ranks in (("baseline", 1), ("zero1", 1), ("zero3", 1), ("dp8", 8)):
        assert found[name]["gemm_flops"] == {"bf16": 6 * weights * GLOBAL_BATCH * SEQ_LEN // ranks}, name


def test_ddp_reduces_each_gradient_once(found: dict[str, Any]) -> None:
    reduced = [c for c in found["dp8"]["collectives"] if c["op"] == "all_reduce" and c["dtype"] == "fp32"]
    assert sum(c["bytes"] for c in reduced) == 4 * PARAMETERS
    assert {c["group_size"] for c in reduced} == {8}


def test_attention_runs_once_per_layer_and_micro_batch(found: dict[str, Any]) -> None:
    assert found["dp8"]["attention"] == {"flash": LAYERS}


# ---- what is reported ------------------------------------------------------------------------------------------------


def test_the_keys_of_the_json(found: dict[str, Any]) -> None:
    one = found["dp8"]
    numbers = ("peak_bytes", "reserved_bytes", "estimate_bytes", "kernels", "host_syncs")
    assert one["fault"] is None and all(isinstance(one[key], int) and one[key] > 0 for key in numbers)
    assert {"op", "calls", "bytes", "group_size"} <= one["collectives"][0].keys()
    assert one["roofline"]["seconds"] > 0
    assert 0 < one["roofline"]["mfu_causal"] < one["roofline"]["mfu_full"] < 1
    assert one["host_syncs"] == sum(one["sync_places"].values())
    assert not any(result.get("faults") for result in found.values())


def test_any_rank_saves_and_resumes(found: dict[str, Any]) -> None:
    first, again = found["first"], found["again"]
    assert first["fault"] is None and again["fault"] is None
    assert (first["step"], again["step"]) == (2, 4)
    assert {"load state", "save"} <= again["phases"].keys()
    assert [c for c in again["collectives"] if c["op"] in ("send", "recv")]  # it is a stage of a pipeline


@pytest.mark.parametrize(("layout", "ranks"), [("zero3", 2), ("split", 4)])
def test_the_ranks_write_each_element_of_the_state_once(found: dict[str, Any], layout: str, ranks: int) -> None:
    """Weights and both moments in fp32, as many bytes on each rank: within a share of the embedding."""
    states = [found[f"{layout} {rank}"]["state"] for rank in range(ranks)]
    written = [state["bytes_written"] for state in states]
    assert sum(written) == 12 * PARAMETERS
    assert max(written) - min(written) <= 12 * VOCABULARY * HIDDEN / ranks
    assert all(30 * state["pieces"] < state["index_bytes"] < 80 * state["pieces"] for state in states)


def test_a_layout_that_cannot_be_is_said_in_one_line(found: dict[str, Any]) -> None:
    assert found["bad"]["bad_input"] and "train.global_batch=8" in found["bad"]["fault"]


# ---- commands --------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_real(preload: str, tmp_path: Path) -> None:
    done = simulate(TINY, "--stack", "baseline", "--memory", "0.02", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "torch.OutOfMemoryError: CUDA out of memory" in done.stderr
    assert json.loads((tmp_path / "found.json").read_text())["fault"].startswith("OutOfMemoryError")
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    "words, environment, message",
    [
        ([TINY, "--stack", "baseline", "--world", "8", "--rank", "8"], {}, "--rank 8: must be from 0 to 7"),
        ([TINY, "--stack", "baseline", "train.dtype=fp8"], {}, "train.dtype"),
        ([TINY, "--stack", "baseline"], {"PATH": ""}, "needs g++ and nm"),
    ],
)
def test_bad_input_is_one_line(preload: str, words: list[str], environment: dict[str, str], message: str) -> None:
    done = simulate(*words, **environment)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize("cuda, message", [(None, "built without CUDA"), ("14.0", "knows CUDA 12 and 13")])
def test_a_torch_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch, cuda: str | None, message: str) -> None:
    monkeypatch.setattr(build.runpy, "run_path", lambda _: {"__version__": "9.9", "cuda": cuda})
    with pytest.raises(BadInput, match=message):
        build.preload()


def test_two_processes_build_at_the_same_time(preload: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from common.simulation import build; print(build.preload())"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate()[0].strip() for process in both}
    assert len(printed) == 1 and all(Path(path).is_file() for path in printed.pop().split(":"))
    assert len(list(tmp_path.glob("twinstack/null_gpu_*"))) == 1


# ---- regions that would be compiled ----------------------------------------------------------------------------------

REGION = """
from common.simulation import null_gpu, regions
regions.install()
import torch
import torch.nn.functional as F

@torch.compile
def bias_dropout_add(x, bias, residual):
    return residual + F.dropout(x + bias, 0.1, True)

x, residual = (torch.empty(64, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
bias = torch.empty(1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
before = torch.cuda.memory_allocated()
null_gpu.record(True)
y = bias_dropout_add(x, bias, residual)
print("SAVED", torch.cuda.memory_allocated() - before)
y.backward(y.detach())
print("REGIONS", [count.calls for count in null_gpu.counts() if count.kind == "region"], x.grad.shape == x.shape)

@torch.compile
def double_(x):
    x.copy_(x.float().exp() * 2)

before = torch.cuda.memory_allocated()
torch.cuda.reset_peak_memory_stats()
null_gpu.clear()
double_(x.detach())
print("IN PLACE", torch.cuda.max_memory_allocated() - before, [c.amount for c in null_gpu.counts() if c.kind == "region"])
"""


def test_a_compiled_region_is_one_kernel_and_keeps_what_inductor_keeps(preload: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REGION], cwd=ROOT, env=os.environ | {"LD_PRELOAD": preload}, capture_output=True, text=True
    )
    output_and_mask = 64 * 1024 * (2 + 1)  # neither the sum nor what dropout leaves of it
    assert f"SAVED {output_and_mask}\nREGIONS [2] True" in done.stdout, done.stderr
    assert f"IN PLACE 0 [{2.0 * 64 * 1024 * 2}]" in done.stdout  # it reads its input once and writes it once
