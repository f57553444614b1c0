"""The layouts of a comparison and their runs: scripts/parity.py compares curves, performance.py what the layouts cost."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import config, families
from common.config import Config
from common.errors import BadInput
from common.layout import MODEL_PARALLEL, layout_for
from common.paths import ROOT
from common.preflight import task_module
from common.yaml_files import read_yaml

LOSS, NORM = 1e-5, 1e-4  # largest relative differences in fp32
BF16 = 2e-3  # bf16 against fp32: largest relative difference of loss; 7.6e-4 nats of 6 were measured for GPT and BERT on a CPU
VALID_SAMPLES = 64  # most samples of a validation


class Layout(NamedTuple):
    stack: str
    values: dict[str, str]  # of keys of its section, as written in an override


class Case(NamedTuple):
    """One run."""

    name: str
    module: str
    config: str
    out: str
    overrides: list[str]


# ---- which layouts ---------------------------------------------------------------------------------------------------


def usual_layouts(stacks: Sequence[str], nproc: int) -> list[Layout]:
    """The layouts that are compared by default, for this number of processes."""
    zero = {"tp": 1, "pp": 1, "offload": "none", "recompute": False}
    plain = {
        "tp": 1,
        "pp": 1,
        "vpp": 1,
        "cp": 1,
        "sequence_parallel": False,
        "distributed_optimizer": False,
        "recompute": "none",
    }
    usual: dict[str, list[dict[str, Any]]] = {
        "baseline": [{"recompute": False}, {"recompute": True}, {"shard": "full", "recompute": False}],
        "deepspeed": [zero | {"zero_stage": stage} for stage in range(4)],
        "megatron": [plain, plain | {"distributed_optimizer": True}],
    }
    if nproc % 2 == 0:
        usual["deepspeed"] += [zero | {"zero_stage": 1, "tp": 2}, zero | {"zero_stage": 1, "pp": 2}]
        usual["megatron"] += [
            plain | {"tp": 2},
            plain | {"tp": 2, "sequence_parallel": True, "recompute": "full"},
            plain | {"pp": 2},
            plain | {"cp": 2},
        ]
    if nproc % 4 == 0:
        usual["megatron"] += [
            plain | {"tp": 2, "sequence_parallel": True, "distributed_optimizer": True},
            plain | {"tp": 2, "pp": 2},
        ]
    return [Layout(stack, {key: config.written(v) for key, v in values.items()}) for stack in stacks for values in usual[stack]]


def parsed(words: Sequence[str], stacks: Sequence[str]) -> list[Layout]:
    """The layouts of --layouts: 'megatron:tp=2,sequence_parallel=true', or the name that tables have, 'megatron tp=2 sp'."""
    layouts, problems = [], []
    for word in words:
        stack, _, rest = word.partition(":")
        if " " in word.strip():
            stack, rest = word.split()[0], keys_of(word).replace(f"{word.split()[0]}.", "").replace(" ", ",")
        pairs = [part.partition("=") for part in rest.split(",")] if rest else []
        problems += [
            f"--layouts {word}: {''.join(pair)!r} must be key=value, for example {stack}:micro_batch=1"
            for pair in pairs
            if not all(pair)
        ]
        if stack not in stacks:
            problems.append(f"--layouts {word}: no stack {stack!r}; the recipe has {', '.join(stacks)}")
        layouts.append(Layout(stack, {key: value for key, _, value in pairs}))
    if problems:
        raise BadInput(problems)
    return layouts


def case_of(path: str, shared: Sequence[str], layout: Layout, script: str, nproc: int, out: Path) -> Case:
    """The run of a layout, with a micro batch that divides the batch. BadInput if the recipe or the number of processes does
    not allow the layout."""
    family, (stack, values) = families.of_config(path), layout
    schema = task_module(family, read_yaml(path)).Config
    overrides = [*shared, *(f"{stack}.{key}={value}" for key, value in values.items())]
    cfg = config.load(path, overrides, schema)
    system = getattr(cfg, stack)
    replicas = nproc // math.prod(getattr(system, key, 1) for key in MODEL_PARALLEL) or 1
    share, rest = divmod(cfg.train.global_batch, replicas)
    if "micro_batch" not in values and not rest:
        micro = next(size for size in range(min(system.micro_batch, share), 0, -1) if share % size == 0)
        overrides.append(f"{stack}.micro_batch={micro}")
        cfg = config.load(path, overrides, schema)
    layout_for(cfg, stack, nproc)
    name = name_of(cfg, stack) + (f" micro={values['micro_batch']}" if "micro_batch" in values else "")
    return Case(name, f"recipes.{family}.{stack}.{script}", path, str(out), overrides)


def shared_overrides(path: str, overrides: Sequence[str], steps: int) -> list[str]:
    """The overrides of every run: the first steps of the config's schedule, and a short validation. BadInput for dropout."""
    cfg = config.load(path, overrides, task_module(families.of_config(path), read_yaml(path)).Config)
    for key, value in config.flat(cfg.dump()).items():
        if key.endswith("dropout") and value:
            raise BadInput(f"{key}={value}: the layouts draw different masks, so that their curves differ; give {key}=0")
    decay = cfg.optim.decay_steps or max(cfg.last_step, cfg.optim.warmup_steps + (cfg.optim.wsd_decay_steps or 0))
    samples = min(cfg.train.eval_samples or VALID_SAMPLES, VALID_SAMPLES)
    return [
        *overrides, "phases=null", f"train.steps={steps}", f"optim.decay_steps={decay}", "train.eval_every=0",
        f"train.eval_samples={samples}", "train.save_every=0",
    ]  # fmt: skip


def cases_of(
    path: str, overrides: Sequence[str], layouts: Sequence[Layout], steps: int, nproc: int, out: Path, optional: bool
) -> tuple[list[Case], list[str]]:
    """The runs, the reference first, and one line per layout that is left out. BadInput if nothing can be compared.

    optional: leave out a layout that the recipe refuses, instead of raising BadInput.
    """
    script = "finetune" if "task" in read_yaml(path) else "pretrain"
    shared = shared_overrides(path, overrides, steps)
    cases: list[Case] = []
    refused: list[str] = []
    for layout in layouts:
        try:
            cases.append(case_of(path, shared, layout, script, nproc, out / str(len(cases))))
        except BadInput as error:
            name = ":".join([layout.stack, ",".join(f"{key}={value}" for key, value in layout.values.items())])
            refused.append(f"{name}: {error.problems[0]}")
    if refused and not (optional and cases):
        raise BadInput(refused)
    if config.load(path, shared, task_module(families.of_config(path), read_yaml(path)).Config).train.dtype != "fp32":
        first = cases[0]
        reference = first._replace(name=f"{first.name}, fp32", out=str(out / "reference"))
        cases = [reference._replace(overrides=[*first.overrides, "train.dtype=fp32"]), *cases]
    return cases, refused


SHORT = {"sequence_parallel": "sp", "distributed_optimizer": "dist-opt", "zero_stage": "zero", "recompute": "recompute"}


def name_of(cfg: Config, stack: str) -> str:
    """'megatron tp=2 sp dist-opt'"""
    values = getattr(cfg, stack).model_dump(exclude={"micro_batch", "extra"})
    words = []
    for key, value in values.items():
        if value is True:
            words.append(SHORT.get(key, key))
        elif key == "zero_stage" or value not in (None, False, 1, "none", "even", "parameters"):  # defaults, whatever the key
            words.append(f"{SHORT.get(key, key)}={value}")
    return " ".join([stack, *words])


def keys_of(name: str) -> str:
    """What to type for a name: 'megatron.tp=2 megatron.sequence_parallel=true' for 'megatron tp=2 sp'."""
    stack, *words = name.split()
    long = {short: key for key, short in SHORT.items()} | {"micro": "micro_batch"}
    pairs = [(long.get(key, key), value or "true") for key, _, value in (word.partition("=") for word in words)]
    return " ".join(f"{stack}.{key}={value}" for key, value in pairs)


# ---- their runs ------------------------------------------------------------------------------------------------------


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def metrics(out: Path) -> dict[int, dict[str, float]]:
    """The logged values by step."""
    values: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        values.setdefault(line["step"], {}).update(line)
    return values


def farthest(run: dict[int, dict[str, float]], first: dict[int, dict[str, float]], key: str) -> tuple[float | None, int | None]:
    """The largest relative difference of a value, and its step; None if a run lacks the value. NaN counts as infinite."""
    steps = [step for step, values in first.items() if key in values]
    if not steps or any(key not in run.get(step, {}) for step in steps):
        return None, None
    differences = {step: abs(run[step][key] / first[step][key] - 1) if first[step][key] else math.inf for step in steps}
    step = max(differences, key=lambda step: math.inf if math.isnan(differences[step]) else differences[step])
    return (math.inf if math.isnan(differences[step]) else differences[step]), step


def torchrun(nproc: int, arguments: Sequence[str], log: Path) -> int:
    """Run torchrun with these arguments and return its exit code. Standard error goes to `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT), "NVIDIA_TF32_OVERRIDE": "0"}
    env.setdefault("OMP_NUM_THREADS", "1")
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=file)
        try:
            return process.wait()
        except BaseException:  # for example Ctrl-C: end the ranks too
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
