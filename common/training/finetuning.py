"""What finetuning adds to a run: the best checkpoint, early stopping, predictions on the whole dev set, eval.json.

OUT/best/step_N/   the state after the evaluation with the best metric; OUT/hf is made of it
OUT/predictions/   its predictions, in the formats of the benchmarks
OUT/eval.json      its metrics: a list of {task, metric, value, n, protocol}
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from common import config, screen
from common.config import Count, Positive, Section
from common.contract import Dataset, FinetuningFamily
from common.data import batches
from common.errors import BadInput
from common.evaluation import metrics
from common.huggingface import export, hf_folder
from common.json_files import read_object, write_json
from common.launch import heartbeat, processes
from common.launch.processes import Ranks
from common.layout import sequence_multiple
from common.paths import find
from common.preflight import Run, data_notes
from common.training import lora
from common.training.log import Log, read

if TYPE_CHECKING:
    import torch

BEST_KEPT = 2  # number of best checkpoints to keep: a resumed run may go back to the last but one


class Task(Section):
    """The keys of the section `task` that every family has."""

    name: str
    patience: Positive | None = Field(
        default=None, description="Evaluations without a better one after which the run ends. Default: never."
    )


class Data(config.Data):
    """The keys of the section `data` that every family has."""

    length_window: Count = Field(
        default=50,
        description="Steps whose samples are drawn together and sorted by length, so that the samples of a step have similar "
        "lengths and little padding; the steps keep a random order. 0: every step has samples of any length.",
    )
    absent: ClassVar[dict[str, Any]] = {"length_window": 0}


class Config(config.Config):
    """The config of a finetuning run."""

    data: Data
    task: Task


def settings[C: Config](run: Run, schema: type[C]) -> C:
    """The config of a finetuning run, as the family's own type."""
    if not isinstance(run.cfg, schema):
        raise TypeError(f"a config of type {schema.__name__} is needed, not {type(run.cfg).__name__}")
    return run.cfg


def pad_multiple(cfg: Config, stack: str) -> int:
    """Of what the length of a micro batch is a multiple: of 8 for tensor cores (NVIDIA, "Train With Mixed Precision"), and of
    what ranks that share a sequence need. Without data.length_window always of 8, as in earlier versions."""
    multiple = 8 if cfg.train.dtype == "bf16" or not cfg.data.length_window else 1
    return math.lcm(multiple, sequence_multiple(cfg, stack))


def validation_set(run: Run) -> Dataset:
    """The validation set, which a finetuning run always has: a split of the task, or a share of train."""
    if run.valid is None:
        raise TypeError("finetuning needs a validation set")
    return run.valid


# ---- the best checkpoint ---------------------------------------------------------------------------------------------


class Results(NamedTuple):
    """What the best evaluation so far leaves in OUT."""

    scores: dict[str, float]  # for eval.json, by metric
    n: int  # number of examples, answers or targets that the scores are computed from
    counts: Mapping[str, int] = {}  # {metric: n} for scores that are computed from a part of them
    files: Mapping[str, str] = {}  # {name: text} in OUT/predictions


class Selection:
    """Which evaluation of a run is the best so far. After a resume it is read from metrics.jsonl.

    metric: task.selection_metric, without `valid_`; the best `loss` is the lowest, the best value of all others the highest.
    """

    def __init__(self, run: Run, task: FinetuningFamily, log: Log):
        self.run, self.task, self.log = run, task, log
        self.metric = task.selection_metric(run.cfg)
        self.sign = -1 if self.metric == "loss" else 1
        self.patience = settings(run, Config).task.patience
        self.values: dict[int, float] = {}  # by step
        for line in read(run.out / "metrics.jsonl", run.resume.step) if run.resume else ():
            if f"valid_{self.metric}" in line:
                self.values[line["step"]] = line[f"valid_{self.metric}"]

    def judge(self, step: int, loss: float, n: int, predictions: np.ndarray | None = None) -> bool:
        """Log an evaluation, and write its results if it is the best so far. Returns whether it is; the same on every rank.

        loss: mean over n targets. predictions: (n, width), where the task's metrics are computed from them.
        """
        values = self.task.validation_metrics(self.run, predictions)
        self.log.valid(step, loss, n, **values)
        self.values[step] = ({"loss": loss} | values)[self.metric]
        is_best = self.best == step
        if is_best and self.log.first:
            results = self.task.best_results(self.run, loss, n, predictions)
            if results:
                write_results(self.run, f"step {step}, the best by {self.metric}", results)
        return is_best

    @property
    def best(self) -> int | None:
        """The step of the best evaluation: the first of equal ones. None before the first evaluation."""
        return max(self.values, key=lambda step: (self.sign * self.values[step], -step)) if self.values else None

    @property
    def should_stop(self) -> bool:
        """Whether there have been `task.patience` evaluations since the best."""
        best = self.best
        return bool(self.patience and best is not None and sum(step > best for step in self.values) >= self.patience)


# ---- where it begins -------------------------------------------------------------------------------------------------


SHAPES = {"layers", "hidden", "heads"}


def with_shapes(
    values: dict[str, Any], model_from_hf_config: Callable[[dict[str, Any]], Section], types: Sequence[str], own: set[str]
) -> dict[str, Any]:
    """A config's values with the shapes in init.from as its model, and the folder of the weights as init.from. Shapes that the
    config gives count first. types: the model types that config.json may name; own: keys of the model that a folder does not
    decide. BadInput for a folder of another family, or for no folder where the config has no shapes."""
    init, model = (values.get(key) or {} for key in ("init", "model"))
    start = init.get("from") if isinstance(init, dict) and isinstance(model, dict) else None
    if not isinstance(start, str) or start == "scratch":
        return values
    if not find(start).exists() and SHAPES <= model.keys():  # the config of a finished run, whose init.from is gone
        return values
    folder = weights_folder(start)
    stored = read_object(folder / "config.json")
    if stored is None:
        if SHAPES <= model.keys():
            return values  # common/preflight.py reports it with all else
        if folder.name == "hf" and (folder.parent / "run.json").is_file():
            raise BadInput(f"init.from={start}: the run has no export yet; finish it by its own command")
        wanted = "give a Hugging Face folder, a name on the hub (OWNER/NAME), or OUT of a finished run"
        raise BadInput(f"init.from={start}: no config.json there that can be read; {wanted}")
    if stored.get("model_type") not in types:
        raise BadInput(f"init.from={start}: is a {stored.get('model_type')!r} model; give one of {' or '.join(types)}")
    known = hf_folder.model_from_hf_config(stored, f"init.from={start}", model_from_hf_config)
    return values | {"model": known.model_dump(exclude=own) | model, "init": init | {"from": str(folder)}}


def weights_folder(start: str) -> Path:
    """The folder that init.from means: itself, the export of a run, or what the hub has under that name, downloaded once."""
    folder = find(start)
    if (folder / "run.json").is_file():
        return folder / "hf"
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", start):
        return folder
    import huggingface_hub

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(start, allow_patterns=wanted))
    except Exception as error:  # no network, no such repository: each raises another class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"init.from={start}: no such folder, and not on the hub: {reason}; give a folder") from None


# ---- predictions -----------------------------------------------------------------------------------------------------


def validation_size(run: Run) -> int:
    size = len(validation_set(run))
    return min(run.cfg.train.eval_samples or size, size)


class Predictions:
    """What the model predicts for each validation example, gathered over all ranks. width: numbers per prediction."""

    def __init__(self, run: Run, ranks: Ranks, width: int):
        import torch

        self.width = width
        # (3 + N x width,): the summed loss, its targets, the examples, each prediction. fp64: exact for class numbers
        self.totals = torch.zeros(3 + validation_size(run) * width, dtype=torch.float64, device=ranks.device)

    def add(self, micro_batch: batches.MicroBatch, loss: "torch.Tensor", predictions: "torch.Tensor") -> None:
        """Add one micro batch: its summed loss, and predictions (B, at most width). Repeated examples, which count nowhere,
        are left out."""
        import torch

        real = np.flatnonzero(micro_batch["example_mask"])  # on the host: a mask on a GPU would have to be waited for
        indices = torch.from_numpy(micro_batch["indices"][real]).to(self.totals.device)
        self.totals[0] += loss.double()
        self.totals[1] += batches.targets([micro_batch])
        self.totals[2] += len(real)
        rows = predictions[torch.from_numpy(real).to(predictions.device)].double()
        self.totals[3:].view(-1, self.width)[indices, : predictions.shape[1]] = rows

    def gather(self, is_loss_rank: bool = True) -> tuple[float, int, np.ndarray]:
        """Mean loss, number of examples, and predictions (N, width), on every rank. is_loss_rank: whether this rank's part
        counts. Of the ranks with the same examples, it must be true for exactly one."""
        import torch.distributed as dist

        self.totals *= is_loss_rank
        dist.all_reduce(self.totals)
        values = self.totals.cpu().numpy()
        predictions = values[3:].reshape(-1, self.width)
        if int(values[2]) != len(predictions):
            raise RuntimeError(f"{int(values[2])} of {len(predictions)} validation examples were evaluated")
        return float(values[0] / values[1]), len(predictions), predictions


def write_results(run: Run, checkpoint: str, results: Results) -> None:
    """Write OUT/eval.json and the files of OUT/predictions, on rank 0. checkpoint: its description in the protocol."""
    folder = run.out / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in results.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    valid, used, name = validation_set(run), validation_size(run), settings(run, Config).task.name
    part = "" if used == len(valid) else f", the first {used:,} of {len(valid):,} {valid.unit}"
    notes = "".join(f"; {note}" for note in data_notes(run.train, valid))
    protocol = f"{name} dev{part}, {checkpoint}{notes}"
    rows = [
        metrics.row(name, metric, value, results.counts.get(metric, results.n), protocol)
        for metric, value in results.scores.items()
    ]
    write_json(run.out / "eval.json", rows)


# ---- after the last step ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress(number: int, size: int, ranks: Ranks) -> Iterator[Callable[[int], bool]]:
    """A function to call before each batch, with its number, while `number` texts are generated in batches of `size`. Rank 0
    shows the progress. It returns True after a signal: then no more texts must be generated (exit_if_signaled)."""
    with screen.progress("writing", number, "texts", ranks.rank == 0) as show:

        def report(done_batches: int) -> bool:
            heartbeat.beat("writing")
            show(min(done_batches * size, number))
            return bool(processes.stop_requested())

        yield report


def exit_if_signaled(ranks: Ranks, step: int) -> None:
    """End the run, whose state is saved, if any rank has received a signal. Every rank calls this after its share of the
    texts."""
    import torch
    import torch.distributed as dist

    number = torch.tensor(processes.stop_requested(), device=ranks.device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    if number:
        raise processes.stopped(int(number), step)


def finish(run: Run, task: FinetuningFamily, ranks: Ranks) -> None:
    """Export the best checkpoint. If adapters were trained, export them and the model merged with them."""
    lora.export(run, ranks, best_folder(run))
    export.to_hf(run, task, ranks, best_folder(run), lora.merging(run.whole, task))


def best_folder(run: Run) -> Path:
    """OUT/best, which is made if OUT is there (if it is not, its disk is gone, and the save says so)."""
    folder = run.out / "best"
    with contextlib.suppress(FileNotFoundError):
        folder.mkdir(exist_ok=True)
    return folder
