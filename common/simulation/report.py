"""docs/simulation_report.md: every large config on the null GPU, one row per layout. Its numbers are in DATA."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from common.paths import ROOT
from common.simulation.run import Case, run_all
from common.yaml_files import read_yaml

DATA = ROOT / "docs/planner/simulation_report.json"
PAGE = ROOT / "docs/simulation_report.md"
GPU_MEMORY = 80e9  # bytes, H100


class Config(NamedTuple):
    """A config of the report."""

    name: str  # family/config
    world: int  # GPUs that its layouts are written for
    one_gpu: int = 0  # micro batch on one GPU; 0: does not fit
    replicas: bool = True  # do whole replicas of the baseline fit?


CONFIGS = (
    Config("gpt/gpt3_1.3b", 8, 4), Config("gpt/gpt3_2.7b", 8, 2), Config("gpt/gpt3_6.7b", 8, replicas=False),
    Config("gpt/gpt3_13b", 8, replicas=False), Config("gpt/gpt3_175b", 128, replicas=False), Config("gpt/llama_1b", 8, 4),
    Config("gpt/megatron_2.5b", 8, 2), Config("gpt/megatron_8.3b", 8, replicas=False),
    Config("bert/bert_large", 8, 128), Config("bert/megatron_1.3b", 8, 16), Config("bert/megatron_3.9b", 8, replicas=False),
    Config("t5/t5_large", 8, 32), Config("t5/t5_3b", 8, 4), Config("t5/t5_11b", 8, replicas=False),
    Config("t5/t5_v1_1_xl", 8, 4), Config("t5/t5_v1_1_xxl", 8, replicas=False),
)  # fmt: skip
# Adafactor needs whole parameters on every rank, with q, k and v apart: elsewhere NVIDIA's settings of AdamW
ADAMW = (
    "optim.optimizer=adamw", "optim.lr=1e-4", "optim.min_lr=1e-5", "optim.schedule=linear", "optim.weight_decay=0.01",
    "optim.grad_clip=1.0",
)  # fmt: skip
MICRO_BATCHES = 2  # of a rank in a step; of a pipeline, two per stage
STEPS = {"baseline": 3, "deepspeed": 2, "megatron": 2}  # the last one is counted; at its second step DDP orders its buckets


class Goal(NamedTuple):
    """What the bound of the MFU on one GPU is to reach."""

    config: str  # family/config
    stack: str
    words: tuple[str, ...]
    wanted: float
    first: float | None  # of the first simulation, before anything was fused


GOALS = (
    Goal("gpt/gpt3_1.3b", "megatron", ("train.global_batch=16", "megatron.micro_batch=4"), 0.54, 0.456),
    Goal(
        "gpt/gpt3_1.3b", "deepspeed",
        ("train.global_batch=16", "deepspeed.micro_batch=4", "deepspeed.compile=true"), 0.54, 0.474,
    ),
    Goal("gpt/gpt3_1.3b", "megatron", ("train.global_batch=64", "megatron.micro_batch=4"), 0.54, None),
    Goal(
        "gpt/gpt3_1.3b", "deepspeed",
        ("train.global_batch=64", "deepspeed.micro_batch=4", "deepspeed.compile=true"), 0.54, None,
    ),
    Goal("bert/bert_large", "megatron", ("megatron.micro_batch=256",), 0.48, None),
    Goal("bert/bert_large", "deepspeed", ("deepspeed.micro_batch=256", "deepspeed.compile=true"), 0.48, None),
    Goal("t5/t5_large", "megatron", ("train.global_batch=128", "megatron.micro_batch=32", *ADAMW), 0.48, None),
    Goal(
        "t5/t5_large", "deepspeed",
        ("train.global_batch=128", "deepspeed.micro_batch=32", "deepspeed.zero_stage=1", "deepspeed.compile=true", *ADAMW),
        0.48, None,
    ),
)  # fmt: skip


def path_of(name: str) -> str:
    family, config = name.split("/")
    return f"recipes/{family}/configs/{config}.yaml"


def cases() -> Iterator[Case]:
    """A case for every row of the page."""
    for goal in GOALS:
        yield Case(path_of(goal.config), goal.stack, 1, steps=STEPS[goal.stack], overrides=goal.words)
    for config in CONFIGS:
        yield from _cases_of(config)


def _cases_of(config: Config) -> Iterator[Case]:
    path = path_of(config.name)
    values = read_yaml(path)
    adamw = ADAMW if values["optim"].get("optimizer") == "adafactor" else ()
    ours, theirs = values["deepspeed"], values["megatron"]
    layouts: list[tuple[str, int, Sequence[str]]] = []  # stack, micro batch, words
    if config.replicas:
        layouts.append(("baseline", values["baseline"]["micro_batch"], ()))
    recompute = f"baseline.recompute={str(ours.get('recompute', False)).lower()}"
    micro_batch = ours["micro_batch"]
    layouts.append(("baseline", micro_batch, ("baseline.shard=full", f"baseline.micro_batch={micro_batch}", recompute, *adamw)))
    if ours["zero_stage"] < 3:
        layouts.append(("deepspeed", micro_batch, ()))
    layouts.append(("deepspeed", micro_batch, ("deepspeed.zero_stage=3", *adamw)))
    layouts.append(("megatron", theirs["micro_batch"], adamw))
    for stack, micro_batch, words in layouts:
        model_parallel = theirs["tp"] * theirs["pp"] if stack == "megatron" else 1
        stages = theirs["pp"] if stack == "megatron" else 1
        samples = micro_batch * config.world // model_parallel * MICRO_BATCHES * stages
        for rank in (0, config.world - 1) if stages > 1 else (0,):
            given = (f"train.global_batch={samples}", *words)
            yield Case(path, stack, config.world, rank, steps=STEPS[stack], overrides=given)
    for stack in ("baseline", "deepspeed", "megatron") if config.one_gpu else ():
        words = (f"{stack}.micro_batch={config.one_gpu}", f"train.global_batch={config.one_gpu * MICRO_BATCHES}")
        whole = ("deepspeed.zero_stage=1",) if stack == "deepspeed" and adamw else ()
        yield Case(path, stack, 1, steps=STEPS[stack], overrides=(*words, *whole, *adamw))


def key(case: Case | Mapping[str, Any]) -> str:
    """The fields that identify a row."""
    values = case._asdict() if isinstance(case, Case) else case
    return json.dumps([values["config"], values["stack"], values["world"], values["rank"], list(values["overrides"])])


# ---- the data --------------------------------------------------------------------------------------------------------

NAMED = ("config", "stack", "world", "rank", "overrides")
COUNTED = (
    "peak_bytes", "reserved_bytes", "estimate_bytes", "kernels", "host_syncs", "gemm_flops", "attention", "collectives",
)  # fmt: skip


def recorded() -> dict[str, dict[str, Any]]:
    """The rows that were simulated, by `key`."""
    if not DATA.is_file():
        return {}
    rows = json.loads(DATA.read_text(encoding="utf-8"))["rows"]
    return {key(row): row for row in rows}


def record() -> None:
    """Simulate the rows that DATA lacks, write each there as soon as it has run, and write the page. RuntimeError where a run
    fails otherwise than for want of memory."""
    import torch

    rows, wanted = recorded(), list(cases())
    missing = [case for case in wanted if key(case) not in rows]
    for case, found in zip(missing, run_all(missing), strict=True):
        print(f"{case.config} {case.stack} {case.world} {' '.join(case.overrides)}: {found['fault'] or 'ok'}", flush=True)
        if found["fault"] and not found["fault"].startswith("OutOfMemoryError"):
            raise RuntimeError(f"{key(case)}: {found['fault']}")
        rows[key(case)] = kept(found)
        lines = ",\n".join(json.dumps(rows[key(one)]) for one in wanted if key(one) in rows)
        DATA.write_text(f'{{"torch": "{torch.__version__}", "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


def kept(found: Mapping[str, Any]) -> dict[str, Any]:
    """What DATA holds of a result of run.py; of one that is out of memory the estimate alone."""
    if found["fault"]:
        return {name: found[name] for name in (*NAMED, "estimate_bytes")} | {"fault": "out of memory"}
    bound = found["roofline"]
    limits = {"seconds": round(bound["seconds"], 6)} | {name: bound[name] for name in ("mfu_full", "mfu_causal")}
    slowest = [[one["operator"], one["calls"], round(one["seconds"], 6)] for one in bound["operators"][:12]]
    return {name: found[name] for name in (*NAMED, *COUNTED)} | limits | {"operators": slowest}


# ---- the page --------------------------------------------------------------------------------------------------------

HEAD = """# Large configs on a simulated H100

`python -m scripts.simulate --report` writes this page; it simulates what [the data](planner/simulation_report.json) lack
([simulation.md](simulation.md)). torch {torch}. All numbers are of one optimizer step of one rank, the first if none is named.

- *layout*: the config's own, with what differs from it; a micro batch per rank. On 8 or more GPUs, FSDP2 (`shard=full`) has
  DeepSpeed's micro batch. T5 uses AdamW (`adamw`) where Adafactor is refused.
- *peak* and *reserved*: of torch's allocator on a GPU of 80 GB; *estimate*: of `scripts.plan`, for the rank that needs the
  most. GB are 10^9 bytes.
- *syncs*: how often the host waits for the GPU. *collectives*: calls, and GB in them.
- *MFU*: a bound, not a prediction. Each operator runs at the speed of the memory or of the arithmetic of an H100 that limits
  it; communication, the host and the bubbles of pipelines take no time. *full* counts all of causal attention, *causal* half.
- A step has {micro} micro batches, with a pipeline that many per stage. Most configs have more, so that the optimizer weighs
  less in training.
- Every matrix product of these runs is in bf16. Without `compile`, the baseline and DeepSpeed run each operator of a layer by
  itself.

## On one GPU

{goals}
*first*: in the first simulation of these recipes, before pointwise operators were fused. Time of these steps in ms:

{parts}
BERT's attention has a mask of padding, and T5's a bias with a gradient: of torch's kernels only the memory-efficient one takes
them, for which the bound assumes half the speed of flash attention.
"""
COLUMNS = (
    "GPUs", "stack and layout", "micro batch", "peak", "reserved", "estimate", "kernels", "syncs", "collectives", "MFU full",
    "causal",
)  # fmt: skip
PARTS = ("products", "attention", "compiled", "Adam", "others")


def page() -> str:
    """The text of PAGE."""
    rows = recorded()
    version = json.loads(DATA.read_text(encoding="utf-8"))["torch"]
    of_goals = [(goal, rows[key(case)]) for goal, case in zip(GOALS, cases(), strict=False)]
    text = HEAD.format(torch=version, micro=MICRO_BATCHES, goals=_goals(of_goals), parts=_parts(of_goals))
    for config in CONFIGS:
        text += f"\n## {config.name}\n\n" + _table(COLUMNS, [_cells(rows[key(case)]) for case in _cases_of(config)])
    return text


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ["---"] * len(columns), *rows))


def _goals(rows: Sequence[tuple[Goal, Mapping[str, Any]]]) -> str:
    """Bounds on one GPU, beside what they are to be."""
    lines = []
    for goal, row in rows:
        shares = [_share(share) for share in (goal.first, row["mfu_full"], row["mfu_causal"], goal.wanted)]
        samples = dict(word.split("=") for word in row["overrides"]).get("train.global_batch")
        batches = [_micro_batch(row), samples or str(read_yaml(row["config"])["train"]["global_batch"])]
        lines.append([goal.config, f"{goal.stack} {_shown(row)}", *batches, f"{row['peak_bytes'] / 1e9:.1f}", *shares])
    return _table(("config", "stack and layout", "micro batch", "batch", "peak", "first", "MFU full", "causal", "goal"), lines)


def _parts(rows: Sequence[tuple[Goal, Mapping[str, Any]]]) -> str:
    """What the time of the goals' steps consists of."""
    lines = []
    for goal, row in rows:
        times = dict.fromkeys(PARTS, 0.0) | {"others": row["seconds"]}
        for operator, _, seconds in row["operators"]:
            part = _part(operator)
            if part != "others":
                times[part] += seconds
                times["others"] -= seconds
        lines.append([goal.config, goal.stack, *(f"{one * 1e3:.1f}" for one in (row["seconds"], *times.values()))])
    return _table(("config", "stack", "all", *PARTS), lines)


def _part(operator: str) -> str:
    starts = {"gemm": "products", "compiled": "compiled", "_fused_adam": "Adam", "_scaled_dot_product": "attention"}
    return next((name for start, name in starts.items() if operator.startswith(start)), "others")


def _shown(row: Mapping[str, Any]) -> str:
    """The layout of a row: every key that is not off or 1, without the micro batch."""
    stack, changed = row["stack"], dict(word.split("=") for word in row["overrides"])
    section = read_yaml(row["config"])[stack] | {
        name.partition(".")[2]: value for name, value in changed.items() if name.startswith(f"{stack}.")
    }
    shown = [
        name if str(value).lower() == "true" else f"{name}={value}"
        for name, value in section.items()
        if name != "micro_batch" and str(value).lower() not in ("1", "false") or name == "zero_stage"
    ]
    return " ".join([*shown, *(["adamw"] if "optim.optimizer" in changed else [])])


def _micro_batch(row: Mapping[str, Any]) -> str:
    changed = dict(word.split("=") for word in row["overrides"])
    return str(changed.get(f"{row['stack']}.micro_batch", read_yaml(row["config"])[row["stack"]]["micro_batch"]))


def _share(value: float | None) -> str:
    return f"{value:.1%}" if value else "-"


def _cells(row: Mapping[str, Any]) -> list[str]:
    rank = f", rank {row['rank']}" if row["rank"] else ""
    head = [str(row["world"]), f"{row['stack']} {_shown(row)}".strip() + rank, _micro_batch(row)]
    estimate = f"{row['estimate_bytes'] / 1e9:.1f}"
    if "fault" in row:
        return [*head, row["fault"], "-", estimate, *["-"] * 5]
    shared = [one for one in row["collectives"] if one["group_size"] > 1]
    calls, size = (sum(one[name] for one in shared) for name in ("calls", "bytes"))
    gb = [f"{row[name] / 1e9:.1f}" for name in ("peak_bytes", "reserved_bytes")]
    cells = [f"{row['kernels']:,}", str(row["host_syncs"]), f"{calls:,}, {size / 1e9:.1f} GB" if shared else "-"]
    return [*head, *gb, estimate, *cells, _share(row["mfu_full"]), _share(row["mfu_causal"])]
