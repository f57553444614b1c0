"""Every family, stack and layout on the null GPU (common/simulation): pretraining and finetuning make two steps on a CUDA
device, save and resume. The collectives and host syncs of a step are those of tests/simulated.json, so that a lost overlap, a
new sync or a doubled transfer is a difference.

`python -m tests.test_simulated_runs [LAYOUT ...]` writes tests/simulated.json again, or the rows of some layouts, after a
change that is meant to change it.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest

from common import config, families
from common.data import tokenizer
from common.preflight import task_module

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).with_name("simulated.json")
WORLD, STEPS = 4, 2
# ZeRO 3 keeps parameters of up to 100,000 elements whole, so all of a tiny model; of these hpz makes no second copy
DIVIDED = "deepspeed.extra={zero_optimization: {stage3_param_persistence_threshold: 1}}"
LAYOUTS = {
    "baseline": ("baseline", []),
    "baseline_recompute": ("baseline", ["baseline.recompute=true"]),
    "fsdp2": ("baseline", ["baseline.shard=full"]),
    "fsdp2_recompute": ("baseline", ["baseline.shard=full", "baseline.recompute=true"]),
    "fsdp2_compile": ("baseline", ["baseline.shard=full", "baseline.compile=true"]),
    "zero0": ("deepspeed", ["deepspeed.zero_stage=0"]),
    "zero1": ("deepspeed", ["deepspeed.zero_stage=1"]),
    "zero2": ("deepspeed", ["deepspeed.zero_stage=2"]),
    "zero3": ("deepspeed", ["deepspeed.zero_stage=3"]),
    "zero2_offload": ("deepspeed", ["deepspeed.zero_stage=2", "deepspeed.offload=optimizer"]),
    "zero3_recompute": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.recompute=true"]),
    "zero3_offload_all": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.offload=all"]),
    "zero3_hpz2": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.hpz=2", DIVIDED]),
    "zero1_tp2": ("deepspeed", ["deepspeed.zero_stage=1", "deepspeed.tp=2"]),
    "zero3_tp2": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.tp=2"]),
    "zero1_pp2": ("deepspeed", ["deepspeed.pp=2"]),
    "zero1_ulysses2": ("deepspeed", ["deepspeed.zero_stage=1", "deepspeed.sp=2"]),
    "zero3_ulysses2": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.sp=2"]),
    "megatron": ("megatron", []),
    "distributed_optimizer": ("megatron", ["megatron.distributed_optimizer=true"]),
    "tp2": ("megatron", ["megatron.tp=2"]),
    "tp2_sp": ("megatron", ["megatron.tp=2", "megatron.sequence_parallel=true", "megatron.distributed_optimizer=true"]),
    "pp2": ("megatron", ["megatron.pp=2"]),
    "cp2": ("megatron", ["megatron.cp=2", "megatron.distributed_optimizer=true"]),
    "tp2_cp2": ("megatron", ["megatron.tp=2", "megatron.cp=2", "megatron.recompute=full"]),
    "pp2_vpp2": ("megatron", ["megatron.pp=2", "megatron.vpp=2"]),
    "tp2_pp2": ("megatron", ["megatron.tp=2", "megatron.pp=2", "megatron.recompute=true"]),
}
FINETUNED = ("baseline", "fsdp2", "zero1", "zero3", "zero1_tp2", "distributed_optimizer", "tp2_sp", "pp2")
# T5 has no pipeline, and Ulysses is for GPT: refused before a run starts. AutoTP at ZeRO 3 is simulated for GPT alone.
REFUSED = {("t5", layout) for layout in ("zero1_pp2", "pp2", "pp2_vpp2", "tp2_pp2", "cp2", "tp2_cp2")}
REFUSED |= {(family, layout) for family in ("bert", "t5") for layout in ("zero1_ulysses2", "zero3_ulysses2", "zero3_tp2")}
# In the fast suite GPT has each mechanism in pretraining, BERT and T5 have what their models change of it, and each layout is
# finetuned by one family; the other cases are marked slow.
SLOW: dict[str, set[str]] = {
    "gpt": {"baseline_recompute", "fsdp2_compile", "zero0", "zero3_recompute", "zero3_hpz2", "tp2", "tp2_pp2"}
}
SLOW["bert"] = SLOW["t5"] = SLOW["gpt"] | {
    *("fsdp2_recompute", "zero1", "zero2", "zero2_offload", "zero3_offload_all", "megatron", "distributed_optimizer", "pp2"),
    "tp2_cp2",
}
FAST_FINETUNED = {
    "gpt": ("zero1", "tp2_sp", "pp2"), "bert": ("baseline", "zero1_tp2", "distributed_optimizer"), "t5": ("fsdp2", "zero3"),
}  # fmt: skip
MODEL = {"gpt": ["model.vocab_size=512"], "bert": ["model.vocab_size=640"], "t5": ["model.vocab_size=768"]}
TEXT = """\
init: {from: FOLDER}
task: {name: NAME, data: DATA}
data: {seq_len: 48}
optim: {lr: 5.0e-4, warmup_steps: 2, weight_decay: 0.01, betas: [0.9, 0.999], eps: 1.0e-6}
train: {steps: 20, global_batch: 16}
baseline: {micro_batch: 2}
deepspeed: {micro_batch: 2, zero_stage: 1}
megatron: {micro_batch: 2}
"""
pytestmark = pytest.mark.timeout(900)
Found = dict[str, Any]


def keys(family: str) -> list[str]:
    """The cases of a family, such as 'gpt pretrain pp2 rank 3': of a pipeline both the first and the last stage."""
    found = []
    for kind, layouts in (("pretrain", LAYOUTS), ("finetune", FINETUNED)):
        for layout in layouts:
            if (family, layout) not in REFUSED and LAYOUTS[layout][0] in families.stacks(family):
                ranks = (0, WORLD - 1) if "pp2" in layout else (0,)
                found += [f"{family} {kind} {layout} rank {rank}" for rank in ranks]
    return found


def case(key: str, folder: Path, steps: int) -> Found:
    """The fields of common/simulation/run.py's Case. folder: of the family's finetuning config and of the runs' OUT."""
    family, kind, layout, _, rank = key.split()
    stack, overrides = LAYOUTS[layout]
    path = (
        ROOT / f"recipes/{family}/configs/tiny.yaml"
        if kind == "pretrain"
        else folder / f"recipes/{family}/configs/finetune.yaml"
    )
    model = ["train.global_batch=16", *MODEL[family]] if kind == "pretrain" else []
    return {
        "config": str(path), "stack": stack, "world": WORLD, "rank": int(rank), "steps": steps, "fill": True, "save": True,
        "out": str(folder / key.replace(" ", "_")), "overrides": ["train.dtype=bf16", *model, *overrides], "roofline": False,
    }  # fmt: skip


def write_finetuning(family: str, corpus: Path, folder: Path) -> None:
    """An untrained model with the corpus's tokenizer, a dataset of a few examples, and the config that names both."""
    task = task_module(family, {})
    more = ["objective.pair=none", "model.pair_head=false"] if family == "bert" else ["model.positions=64"] * (family == "gpt")
    cfg = config.load(ROOT / f"recipes/{family}/configs/tiny.yaml", [*MODEL[family], *more], task.Config)
    task.hf_model(cfg.model.resolve(cfg, None)).save_pretrained(folder / "hf" / family)
    tokenizer.load(corpus / "tokenizer").save(folder / "hf" / family)
    data = folder / "data" / family
    data.mkdir(parents=True)
    texts = [("the value of a list " * (1 + i % 5), "is returned " * (1 + i % 3)) for i in range(48)]
    for split in ("train", "dev", "valid"):
        if family == "bert":
            lines = ["index\tsentence1\tsentence2\tlabel"]
            lines += [f"{i}\t{a}\t{b}\t{('not_entailment', 'entailment')[i % 2]}" for i, (a, b) in enumerate(texts)]
            (data / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            fields = ("prompt", "response") if family == "gpt" else ("input", "target")
            lines = [json.dumps(dict(zip(fields, pair, strict=True))) for pair in texts]
            (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    name = {"gpt": "sft", "bert": "rte", "t5": "pairs"}[family]
    text = TEXT.replace("FOLDER", str(folder / "hf" / family)).replace("NAME", name).replace("DATA", str(data))
    if family == "gpt":
        text = text.replace("name: sft", "name: sft, answers: 2, max_new_tokens: 4")
    if family == "t5":
        text = text.replace("name: pairs", "name: pairs, split: dev").replace("seq_len: 48", "seq_len: 48, target_len: 8")
    path = folder / f"recipes/{family}/configs/finetune.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")


def simulate(cases: Sequence[Found], folder: Path) -> list[Found]:
    """The results of scripts.simulate, all in one process that imports the stacks once. Skips where there is no null GPU."""
    cases_file, result = folder / "cases.json", folder / "result.json"
    cases_file.write_text(json.dumps(list(cases)), encoding="utf-8")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "scripts.simulate", "--cases", str(cases_file), "--json", str(result)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 2 and "null GPU" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert result.is_file(), done.stderr[-4000:]
    simulated: list[Found] = json.loads(result.read_text(encoding="utf-8"))
    return simulated


def is_slow(key: str) -> bool:
    family, kind, layout, *_ = key.split()
    return layout in SLOW[family] if kind == "pretrain" else layout not in FAST_FINETUNED[family]


def of_family(family: str, corpus: Path, folder: Path, names: Sequence[str]) -> dict[str, tuple[Found, Found]]:
    """{case: (its first two steps, the two steps after it has resumed)} for the cases `names` of a family."""
    write_finetuning(family, corpus, folder)
    both = simulate([case(key, folder, STEPS) for key in names] + [case(key, folder, STEPS) for key in names], folder)
    return {key: (both[i], both[i + len(names)]) for i, key in enumerate(names)}


def counted(found: Found) -> Found:
    """What GOLDEN holds of a step: '{op} {dtype} of {ranks}': [calls, bytes], and the number of host syncs."""
    collectives = {f"{c['op']} {c['dtype']} of {c['group_size']}": [c["calls"], c["bytes"]] for c in found["collectives"]}
    return {"collectives": collectives, "host_syncs": found["host_syncs"]}


@pytest.fixture(scope="module")
def results(tmp_path_factory, corpus, sentences, spans, with_slow) -> dict[str, tuple[Found, Found]]:
    found: dict[str, tuple[Found, Found]] = {}
    for family, prefix in (("gpt", corpus), ("bert", sentences), ("t5", spans)):
        names = [key for key in keys(family) if with_slow or not is_slow(key)]
        found |= of_family(family, prefix, tmp_path_factory.mktemp(family), names)
    return found


KEYS = [key for family in ("gpt", "bert", "t5") for key in keys(family)]
CASES = [pytest.param(key, marks=[pytest.mark.slow] * is_slow(key)) for key in KEYS]


@pytest.mark.parametrize("key", CASES)
def test_runs_saves_and_resumes_on_the_device(results, key):
    first, resumed = results[key]
    assert first["fault"] is None, first.get("traceback")
    assert resumed["fault"] is None, resumed.get("traceback")
    assert (first["step"], resumed["step"]) == (STEPS, 2 * STEPS)


@pytest.mark.parametrize("key", CASES)
def test_collectives_and_host_syncs_of_a_step(results, key):
    first, resumed = (counted(step) for step in results[key])
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[key]
    assert first == golden, "if the change is meant: python -m tests.test_simulated_runs"
    if "finetune" in key or key.startswith("bert"):
        # the lengths of the samples, or the number of masked positions, and so the bytes, change from step to step
        first, resumed = ({op: calls for op, (calls, _) in step["collectives"].items()} for step in (first, resumed))
    assert resumed == first


@pytest.mark.parametrize(("layout", "dp", "tp", "forwards"), [("cp2", 2, 1, 1), ("tp2_cp2", 1, 2, 2)])
def test_context_parallel_ranks_gather_keys_and_values_once_per_layer(results, layout: str, dp: int, tp: int, forwards: int):
    """In each forward pass, the recomputed one included; one sum of their gradients. Both chunks by the flash kernel."""
    found = results[f"gpt pretrain {layout} rank 0"][0]
    layers, micro_batches, size = 4, 16 // 2 // dp, 2 * 2 * 64 * 64 // tp * 2  # keys, values x samples x tokens x width, bf16
    calls = layers * micro_batches
    collectives = counted(found)["collectives"]
    assert collectives["all_gather bf16 of 2"] == [forwards * calls, forwards * calls * size]
    assert collectives["reduce_scatter bf16 of 2"] == [calls, calls * size]
    assert found["attention"] == {"flash": 2 * forwards * calls}


@pytest.mark.parametrize("family", ("gpt", "bert", "t5"))
def test_fsdp2_gathers_layers_twice_and_reduces_all_once(results, family):
    """Per micro batch, of which a step has two: layers for the forward and for the backward pass, what is outside them for
    both, in bf16; gradients in fp32. A shared embedding counts once. Rows are padded to a multiple of the ranks."""
    for kind in ("fsdp2", "fsdp2_recompute") if family == "gpt" else ("fsdp2",):
        collectives = results[f"{family} pretrain {kind} rank 0"][0]["collectives"]
        moved = {c["op"]: c["bytes"] for c in collectives if c["op"] in ("all_gather", "reduce_scatter")}
        assert moved == fsdp2_bytes(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ("gpt", "bert", "t5"))
def test_compiled_fsdp2_moves_the_same_bytes(results, family):
    plain, compiled = (results[f"{family} pretrain {layout} rank 0"][0] for layout in ("fsdp2", "fsdp2_compile"))
    assert counted(compiled)["collectives"] == counted(plain)["collectives"]
    assert sum(compiled["compiled_regions"].values()) > 0 == len(plain["compiled_regions"])
    assert compiled["kernels"] < plain["kernels"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ("gpt", "bert", "t5"))
def test_hpz_gathers_between_nodes_once_per_step(results, family):
    """Weights change once in a step: all ranks gather them for the first forward pass, which leaves a copy in each pair of
    ranks. From it they are gathered for what comes after, if they were freed between."""
    collectives = counted(results[f"{family} pretrain zero3_hpz2 rank 0"][0])["collectives"]
    [_, between], [_, within] = collectives["all_gather bf16 of 4"], collectives["all_gather bf16 of 2"]
    task = task_module(family, {})
    cfg = config.load(ROOT / f"recipes/{family}/configs/tiny.yaml", MODEL[family], task.Config)
    weights = sum(map(prod, task.parameter_shapes(cfg.model.resolve(cfg, None)).values())) * 2
    assert weights == pytest.approx(between, rel=0.01) and between <= within  # each weight is padded to the ranks


def fsdp2_bytes(family: str) -> dict[str, int]:
    task = task_module(family, {})
    cfg = config.load(ROOT / f"recipes/{family}/configs/tiny.yaml", MODEL[family], task.Config)
    shapes = task.parameter_shapes(cfg.model.resolve(cfg, None))
    sizes = {name: -(-shape[0] // WORLD) * WORLD * prod(shape[1:]) for name, shape in shapes.items()}
    layers, everything = sum(size for name, size in sizes.items() if re.search(r"\.\d+\.", name)), sum(sizes.values())
    return {"all_gather": 2 * 2 * (layers + everything), "reduce_scatter": 2 * 4 * everything}


@pytest.mark.parametrize("key", CASES)
def test_a_bf16_run_has_no_product_in_fp32(results, key):
    products = results[key][0]["gemm_flops"]
    assert set(products) == {"bf16"} and products["bf16"] > 0


def main(layouts: Sequence[str]) -> None:
    makers = {
        "gpt": ["--vocab-size", "512"],
        "bert": ["--sentences", "--tokenizer-type", "wordpiece", "--vocab-size", "600"],
        "t5": ["--tokenizer-type", "sentencepiece", "--vocab-size", "700"],
    }
    golden: Found = json.loads(GOLDEN.read_text(encoding="utf-8")) if layouts else {}
    for family, words in makers.items():
        with tempfile.TemporaryDirectory() as name:
            corpus = Path(name) / "corpus"
            command = [sys.executable, "-m", "data.python_docs", str(corpus), "--max-mb", "1", *words]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            names = [key for key in keys(family) if not layouts or key.split()[2] in layouts]
            for key, (first, _) in of_family(family, corpus, Path(name), names).items():
                print(f"{key}: {first['fault'] or 'ok'}", flush=True)
                golden[key] = None if first["fault"] else counted(first)
    lines = [f"{json.dumps(key)}: {json.dumps(golden[key])}" for key in KEYS if key in golden]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
