"""What scripts/plan.py predicts, and how far off it may be: for the tables of predicted figures."""

from collections.abc import Sequence
from functools import cache

from common import config, families
from common.comparison.figures import Figure
from common.comparison.layouts import name_of
from common.config import Config
from common.planning import hardware, search, validation
from common.planning.hardware import Cluster
from common.preflight import task_module
from common.yaml_files import read_yaml

GPU = "H100"


def resolved(path: str, overrides: Sequence[str] = ()) -> Config:
    """A config with the value of every key. Its corpus need not be there."""
    task = task_module(families.of_config(path), read_yaml(path))
    return config.resolve(config.load(path, list(overrides), task.Config), task.ResolvedConfig, None)


def command(path: str, overrides: Sequence[str], gpus: int, stacks: Sequence[str]) -> str:
    """The line that yields the predictions again."""
    missing = [stack for stack in families.stacks(families.of_config(path)) if stack not in stacks]
    words = ["python -m scripts.plan", path, f"--gpus {gpus} --gpu {GPU}", *overrides]
    return " ".join([*words, *([f"--stack {' '.join(stacks)}"] if missing else [])])


@cache
def cluster() -> Cluster:
    return Cluster(hardware.gpu(GPU))


class Best:
    """The fastest predicted layout of each stack that fits, with its offloaded states in the memory of the host."""

    def __init__(self, cfg: Config, stacks: Sequence[str], gpus: int):
        self.cfg, self.gpus, self.stacks = cfg, gpus, stacks
        self.of: dict[str, search.Prediction] = {}
        self.none: dict[str, str] = {}  # why a stack has none
        for stack in stacks:
            found, _ = search.search(cfg, [stack], cluster(), gpus)
            best = next((one for one in found if one.fits), None)
            on_gpus = [one.host_memory for one in found if one.memory["required"] <= cluster().gpu.memory]
            if best:
                self.of[stack] = best
            elif on_gpus:
                least = min(on_gpus)
                self.none[stack] = f"does not fit: needs {least / 1e9:,.0f} GB of host memory per node"
            elif found:
                self.none[stack] = "does not fit"
            else:
                self.none[stack] = f"no layout: the global batch of {cfg.train.global_batch:,} does not divide"

    @property
    def fastest(self) -> search.Prediction | None:
        return min(self.of.values(), key=lambda one: one.seconds, default=None)


def words_of(one: search.Prediction) -> str:
    """'megatron tp=8 pp=8 sp dist-opt micro=1'"""
    return f"{name_of(one.cfg, one.stack)} micro={one.shared.micro_batch}"


# ---- the predictor's error -------------------------------------------------------------------------------------------


@cache
def errors_of_kinds() -> dict[str, float]:
    """The largest error of the predictor among the published rows of each kind, on any GPU and of any size."""
    largest: dict[str, float] = {}
    for row in validation.published():
        kind = validation.TABLES[row.table].kind
        largest[kind] = max(largest.get(kind, 0.0), abs(row.error()))
    return largest


def error_of(one: search.Prediction) -> float:
    """The largest error of the published rows that are near. Where none is near: of those of its kind; where its kind has none:
    of all but those of DeepSpeed's pipeline, which are predicted with Megatron's constants."""
    if one.near:
        return one.near[1]
    shared, work = one.shared, one.cfg.model.workload(one.cfg.data)
    kind = search.kind_of(one.stack, search.plan_of(one.cfg, one.stack, shared, work))
    known = errors_of_kinds()
    return known[kind] if kind in known else max(error for name, error in known.items() if name != "deepspeed pipeline")


def predicted(section: str, subject: str, metric: str, value: float, unit: str, source: str, error: float) -> Figure:
    """A predicted figure with its bounds, if the speed is off by `error`. A value in seconds falls with the speed."""
    is_time = "s/step" in (unit, metric.rpartition(" ")[2])
    bounds = (value * (1 - error), value * (1 + error)) if is_time else (value / (1 + error), value / (1 - error))
    return Figure(section, subject, metric, value, unit, "predicted", source, bounds)
