"""The estimate of memory (common/planning/memory.py) against published values, and against the peaks of simulated runs."""

import importlib
from dataclasses import replace
from typing import Any

import pytest

from common import config, families
from common.errors import BadInput
from common.planning import hardware, memory, simulated
from common.planning.memory import Training, Traits
from common.planning.workload import Attention, Block, Workload
from common.preflight import task_module
from common.simulation import build
from common.yaml_files import read_yaml

GPT = Traits(fused_qkv=True, biases=True)
LLAMA = Traits(rms_norm=True, rotary=True)


def model(layers: int, hidden: int, heads: int, length: int, vocab: int, **changed: Any) -> Workload:
    """A decoder with the shapes of GPT-3, or with `changed` ones."""
    block = Block(layers, length, hidden, heads, hidden, hidden, 4 * hidden, False, (Attention(length, length, causal=True),))
    return Workload((replace(block, **changed),), vocab, length, tied=not changed)


GPT_1_3B = model(24, 2048, 16, 2048, 50304)
N = 1_315_819_520  # its parameters


def training(stack: str, **changed: Any) -> Training:
    return Training(**({"stack": stack, "parameters": N, "micro_batch": 4} | changed))


def states(stack: str, **changed: Any) -> int:
    found = memory.estimate(GPT_1_3B, GPT, training(stack, **changed))
    return found["weights"] + found["gradients"] + found["optimizer"]


# ---- published values ------------------------------------------------------------------------------------------------


def test_model_states_are_the_published_bytes_per_parameter():
    assert states("baseline") == states("baseline", dtype="fp32") == 16 * N  # ZeRO paper, section 3.1
    assert states("baseline", dp=8) == 16 * N
    assert states("megatron") == 18 * N  # Megatron Core user guide, distributed optimizer
    assert states("megatron", dtype="fp32") == 16 * N
    assert states("megatron", dp=8, distributed_optimizer=True) == 6 * N + 12 * N // 8
    assert states("megatron", dp=8, distributed_optimizer=True, dtype="fp32") == 8 * N + 8 * N // 8
    assert states("megatron", tp=2) == 18 * (N // 2)
    # ZeRO paper, section 3.1, with Megatron's K of 12
    assert states("deepspeed", zero_stage=1, dp=8) == pytest.approx(2 * N + 2 * N + 12 * N / 8, rel=1e-9)
    assert states("deepspeed", zero_stage=2, dp=8) == pytest.approx(2 * N + (2 + 12) * N / 8, rel=1e-9)
    assert states("deepspeed", zero_stage=3, dp=64) == pytest.approx(16 * N / 64, rel=1e-9)


def test_the_optimizer_needs_what_deepspeeds_own_estimator_counts():
    """It counts the gradients of a rank in fp32; here they are there in bf16 too."""
    zero2 = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2").estimate_zero2_model_states_mem_needs
    for gpus in (1, 8, 64):
        _, expected = zero2(N, gpus, 1, cpu_offload=False)
        found = memory.optimizer_moment(GPT_1_3B, training("deepspeed", zero_stage=2, dp=gpus), N)
        assert expected <= found <= expected + 2 * N / gpus + 8
    _, expected = zero2(N, 8, 1, cpu_offload=True)
    offloaded = memory.estimate(GPT_1_3B, GPT, training("deepspeed", zero_stage=2, dp=8, offload="optimizer"))
    assert offloaded["weights"] == expected and offloaded["host"] == 2 * N and offloaded["optimizer"] == 0


def test_a_layer_keeps_what_the_paper_says():
    """arXiv:2205.05198, table 2 without 5as/h; 34 has two dropout masks of a byte. Ours has the softmax's sums too."""
    block, sbh = GPT_1_3B.blocks[0], 2048 * 4 * 2048

    def kept(**changed: Any) -> float:
        return memory.layer(block, GPT, training("megatron", dropout=True, **changed)) / sbh

    assert kept() == pytest.approx(34, rel=0.001)
    assert kept(tp=2) == pytest.approx(10 + 24 / 2, rel=0.001)
    assert kept(tp=4, sequence_parallel=True) == pytest.approx(34 / 4, rel=0.001)


# arXiv:2205.05198, figure 1: activations per GPU in GiB, by Calculon's reading (github.com/calculon-ai/calculon). The models
# are those of table 3, with t = 8 and sequence parallelism; p, and v of the interleaved schedule, as in table 3.
KORTHIKANTI = [
    # layers, hidden, heads, micro batch, p, v, GiB
    (48, 6144, 64, 4, 1, 1, 9.56),  # 22B
    (96, 12288, 96, 1, 8, 3, 12.35),  # 175B
    (105, 20480, 128, 1, 35, 3, 23.08),  # 530B
    (128, 25600, 160, 1, 64, 1, 26.56),  # 1T
]


@pytest.mark.parametrize("layers, hidden, heads, micro_batch, p, v, published", KORTHIKANTI)
def test_activations_are_those_of_the_paper(layers, hidden, heads, micro_batch, p, v, published):
    work = model(layers, hidden, heads, 2048, 51200)
    run = training(
        "megatron", micro_batch=micro_batch, dropout=True, tp=8, pp=p, vpp=v, sequence_parallel=True, accumulate=p * 8
    )
    chunks = memory.chunks_in_flight(run, 0)
    kept = memory.layer(work.blocks[0], GPT, run) * layers * chunks / (p * v)
    assert kept / 2**30 == pytest.approx(published, rel=0.01)


# github.com/MooreThreads/SimuMax, docs/b200/b200_release_v1.2_summary.md: max_memory_allocated in GiB, the highest of 8 B200,
# Megatron with TransformerEngine 2.11, 4,096 tokens, micro batch 1, distributed optimizer, sequence parallelism, no recompute.
LLAMA_70B = (12, 8192, 64, 8, 28672)  # layers of 80, hidden, heads, heads of keys and values, ffn
LLAMA_405B = (4, 16384, 128, 16, 53248)
SIMUMAX = [
    # model, tp, pp, dp, GiB
    (LLAMA_70B, 1, 2, 4, 66.55),
    (LLAMA_70B, 2, 1, 4, 60.68),
    (LLAMA_70B, 4, 1, 2, 39.07),
    (LLAMA_70B, 8, 1, 1, 28.29),
    (LLAMA_405B, 1, 2, 4, 87.08),
    (LLAMA_405B, 2, 1, 4, 81.59),
    (LLAMA_405B, 4, 1, 2, 52.89),
    (LLAMA_405B, 8, 1, 1, 38.57),
]


@pytest.mark.parametrize("shapes, tp, pp, dp, published", SIMUMAX)
def test_peaks_that_were_measured(shapes, tp, pp, dp, published):
    layers, hidden, heads, kv_heads, ffn = shapes
    work = model(layers, hidden, heads, 4096, 128256, kv_inner=kv_heads * 128, ffn=ffn, gated=True)
    run = Training(
        stack="megatron", parameters=work.parameters + (2 * layers + 1) * hidden, micro_batch=1, accumulate=8, tp=tp, pp=pp,
        dp=dp, sequence_parallel=tp > 1, distributed_optimizer=True, transformer_engine=True,
    )  # fmt: skip
    assert memory.estimate(work, LLAMA, run)["total"] / 2**30 == pytest.approx(published, rel=0.03)


# ---- simulated runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", simulated.rows(), ids=simulated.label)
def test_peaks_of_simulated_runs(case):
    assert simulated.estimate_of(case)["total"] == pytest.approx(case["peak_bytes"], rel=0.03)


STAGES = [case for case in simulated.recorded()["cases"] if any(word.startswith("deepspeed.pp=") for word in case["overrides"])]


@pytest.mark.parametrize("case", STAGES, ids=lambda case: f"{simulated.label(case)} rank {case['rank']}")
def test_peaks_of_the_stages_of_deepspeeds_pipeline(case):
    [pp] = [int(word.partition("=")[2]) for word in case["overrides"] if word.startswith("deepspeed.pp=")]
    found = simulated.estimate_of(case, case["rank"] * pp // case["world"])
    assert found["total"] == pytest.approx(case["peak_bytes"], rel=0.03)


@pytest.mark.parametrize(
    "path, words, reason",
    [
        ("gpt/configs/gpt3_1.3b", "baseline.compile=true baseline.recompute=true", "baseline.recompute=true is not estimated"),
        ("t5/configs/t5_large", "baseline.compile=true baseline.recompute=false", "RMSNorm is not estimated"),
    ],
)
def test_compiled_layers_that_are_not_estimated(path, words, reason):
    case = {"config": f"recipes/{path}.yaml", "stack": "baseline", "world": 8, "overrides": words.split()}
    with pytest.raises(BadInput, match=reason):
        simulated.estimate_of(case)


# (config, GPUs, overrides, those without a section of megatron; peak of scripts.simulate in bytes; torch 2.15)
CONTEXT_PARALLEL = [
    ("gpt/gpt3_1.3b", 4, "cp=2 micro_batch=2 train.global_batch=8", 16_717_122_048),
    ("gpt/gpt3_1.3b", 4, "cp=2 micro_batch=2 recompute=full train.global_batch=8", 12_518_461_952),
    ("gpt/gpt3_1.3b", 4, "cp=2 micro_batch=2 recompute=selective train.global_batch=8", 15_707_294_208),
    ("gpt/gpt3_1.3b", 8, "cp=4 tp=2 sequence_parallel=true micro_batch=8 train.global_batch=16", 11_629_950_976),
    ("gpt/llama_1b", 4, "cp=2 micro_batch=8 recompute=none train.global_batch=16", 22_679_406_592),
    ("gpt/llama_1b", 8, "cp=4 tp=2 sequence_parallel=true micro_batch=8 recompute=none train.global_batch=16", 8_257_495_552),
    ("bert/megatron_1.3b", 4, "cp=2 micro_batch=32 recompute=none train.global_batch=64", 28_940_739_584),
    (
        "bert/megatron_1.3b",
        8,
        "cp=2 tp=2 sequence_parallel=true micro_batch=32 recompute=none train.global_batch=64",
        14_663_607_296,
    ),
    ("gpt/llama_1b", 8, "cp=2 pp=2 micro_batch=4 recompute=none train.global_batch=32", 10_930_296_832),
    ("gpt/gpt3_1.3b", 8, "cp=8 micro_batch=1 recompute=none data.seq_len=16384 train.global_batch=2", 17_379_512_320),
]


@pytest.mark.parametrize(("name", "world", "overrides", "peak"), CONTEXT_PARALLEL)
def test_peaks_of_context_parallelism(name: str, world: int, overrides: str, peak: int) -> None:
    family, config_name = name.split("/")
    case = {"config": f"recipes/{family}/configs/{config_name}.yaml", "stack": "megatron", "world": world}
    words = [word if "." in word else f"megatron.{word}" for word in overrides.split()]
    estimate = simulated.estimate_of(case | {"overrides": words})
    assert estimate["total"] == pytest.approx(peak, rel=0.03)


# As above, on the rank that needs the most. Of ZeRO 1 that is the last one with accumulated gradients, as its share of the
# reduced ones is allocated first, and rank 0 without, if the gradients are larger than a bucket.
DISTRIBUTED = "distributed_optimizer=true tp=1 sequence_parallel=false"
RECOMPUTED = "micro_batch=1 recompute=true"
DIVIDED_OPTIMIZER = [
    ("gpt/gpt3_1.3b", "deepspeed", f"{RECOMPUTED} zero_stage=1 train.global_batch=16", 8_282_835_968),
    ("gpt/gpt3_1.3b", "deepspeed", "micro_batch=1 recompute=false zero_stage=1 train.global_batch=16", 11_298_576_384),
    ("gpt/gpt3_6.7b", "deepspeed", f"{RECOMPUTED} zero_stage=1 train.global_batch=16", 39_971_780_096),
    ("gpt/gpt3_6.7b", "deepspeed", f"{RECOMPUTED} zero_stage=1 train.global_batch=8", 37_042_490_880),
    ("gpt/gpt3_6.7b", "deepspeed", f"{RECOMPUTED} zero_stage=2 train.global_batch=16", 30_035_681_792),
    ("gpt/gpt3_13b", "deepspeed", f"{RECOMPUTED} zero_stage=1 train.global_batch=16 model.layers=20", 39_486_778_368),
    ("gpt/llama_1b", "deepspeed", f"{RECOMPUTED} zero_stage=1 train.global_batch=16", 6_819_304_448),
    ("bert/megatron_1.3b", "deepspeed", f"{RECOMPUTED} zero_stage=1 train.global_batch=16", 7_725_859_840),
    (
        "t5/t5_3b",
        "deepspeed",
        "micro_batch=2 recompute=true zero_stage=1 train.global_batch=32 optim.optimizer=adamw",
        16_753_119_232,
    ),
    ("gpt/gpt3_6.7b", "megatron", f"{RECOMPUTED} {DISTRIBUTED} train.global_batch=16", 53_268_774_912),
    ("gpt/gpt3_13b", "megatron", f"{RECOMPUTED} {DISTRIBUTED} train.global_batch=16 model.layers=20", 52_486_717_440),
    ("gpt/gpt3_1.3b", "megatron", f"micro_batch=4 recompute=none {DISTRIBUTED}", 24_722_510_848),
]


@pytest.mark.parametrize(("name", "stack", "overrides", "peak"), DIVIDED_OPTIMIZER)
def test_peaks_where_the_optimizer_is_divided(name: str, stack: str, overrides: str, peak: int) -> None:
    """On 8 GPUs."""
    family, config_name = name.split("/")
    words = [word if "." in word else f"{stack}.{word}" for word in overrides.split()]
    case = {"config": f"recipes/{family}/configs/{config_name}.yaml", "stack": stack, "world": 8, "overrides": words}
    assert simulated.estimate_of(case)["total"] == pytest.approx(peak, rel=0.03)


def test_the_page_is_the_one_that_validate_writes():
    assert simulated.PAGE.read_text(encoding="utf-8") == simulated.page()


@pytest.mark.slow
def test_the_recorded_peaks_are_those_of_this_version():
    """If this fails because a stack allocates something else now: python -m scripts.plan --simulate, and see what the estimate
    says."""
    try:
        build.preload()
    except build.CannotSimulate as error:
        pytest.skip(str(error))
    recorded = simulated.recorded()["cases"]
    for before, now in zip(recorded, simulated.simulate(recorded), strict=True):
        assert now["peak_bytes"] == pytest.approx(before["peak_bytes"], rel=0.002), before


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_estimates_grow_and_shrink_as_they_must():
    def total(stack: str = "deepspeed", work: Workload = GPT_1_3B, **changed: Any) -> int:
        return memory.estimate(work, GPT, training(stack, **({"zero_stage": 1, "dp": 8, "dropout": True} | changed)))["total"]

    assert total() > total(zero_stage=2) > total(zero_stage=3) > total(zero_stage=3, dp=64)
    assert total(offload="optimizer") < total()
    assert total(recompute=True) < total()
    assert total("megatron", recompute=True) < total("megatron", recompute_attention=True) < total("megatron")
    assert total(micro_batch=8) > total() and total(parameters=2 * N) > total()
    assert total(work=model(24, 2048, 16, 4096, 50304)) > total() < total(work=model(24, 2048, 16, 2048, 100608))
    assert total("megatron", distributed_optimizer=True) < total("megatron")
    assert total("megatron", tp=2, sequence_parallel=True) < total("megatron", tp=2) < total("megatron")
    assert (
        total("megatron", pp=2, accumulate=8)
        < total("megatron", accumulate=8)
        < total("megatron", pp=2, vpp=2, accumulate=8) * 2
    )
    assert total("baseline", optimizer="adafactor") < total("baseline") < total("baseline", micro_batch=5)


def test_the_parts_add_up():
    found = memory.estimate(GPT_1_3B, GPT, training("megatron", dp=4, tp=2))
    assert found["total"] == sum(found[part] for part in memory.PARTS)
    assert found["required"] == found["total"] + sum(found[part] for part in memory.BESIDE)
    assert found["nccl"] == 3 * memory.NCCL  # all ranks; those of dp; those of tp
    assert memory.estimate(GPT_1_3B, GPT, training("baseline"))["nccl"] == 0


# ---- the layouts of the published configs ----------------------------------------------------------------------------

FITTING = ("gpt3_1.3b", "gpt3_2.7b", "gpt3_6.7b", "gpt3_13b", "gpt3_175b", "llama_1b", "megatron_2.5b", "megatron_8.3b")
LARGE = [f"recipes/gpt/configs/{name}.yaml" for name in FITTING]
LARGE += [f"recipes/bert/configs/{name}.yaml" for name in ("megatron_1.3b", "megatron_3.9b")]
LARGE += [f"recipes/t5/configs/{name}.yaml" for name in ("t5_3b", "t5_11b", "t5_v1_1_xl", "t5_v1_1_xxl")]


@pytest.mark.parametrize("path", LARGE)
def test_a_large_config_recomputes_and_splits_only_where_it_must(path: str):
    """On 8 GPUs of 80 GB (64 for 175B), with the config's optimizer, or AdamW on a stack that refuses it."""
    task = task_module(families.of_config(path), read_yaml(path))
    configs = [
        config.resolve(config.load(path, overrides, task.Config), task.ResolvedConfig, None)
        for overrides in ([], ["optim.optimizer=adamw"])
    ]
    gpus = 64 if "175b" in path else 8

    def fits(cfg: config.Config, stack: str, **changed: Any) -> bool:
        system = getattr(cfg, stack).model_copy(update=changed)
        needed = memory.estimate_for(cfg.model_copy(update={stack: system}), cfg.model, stack, gpus)["required"]
        return needed <= hardware.gpu("A100").memory

    for stack in families.stacks(families.of_config(path)):
        try:
            cfg, can = configs[0], fits(configs[0], stack)
        except BadInput:  # Adafactor
            cfg, can = configs[1], fits(configs[1], stack)
        assert stack == "baseline" or can
        system = getattr(cfg, stack)
        if system.recompute not in (False, "none"):
            assert not fits(cfg, stack, recompute="none" if stack == "megatron" else False)
        if stack == "megatron" and system.tp > 1:
            half = system.tp // 2
            assert not fits(cfg, stack, tp=half, sequence_parallel=system.sequence_parallel and half > 1)
