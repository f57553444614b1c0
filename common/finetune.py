"""What finetuning adds to a run: the best checkpoint, early stopping, predictions on the whole dev set, eval.json.

    OUT/best/step_N/   the state after the evaluation with the best metric; OUT/hf is made of it
    OUT/predictions/   its predictions, in the formats of the benchmarks
    OUT/eval.json      its metrics: a list of {task, metric, value, n, protocol}
"""

import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from common import batches, export, lora
from common.corpus import write_json
from common.ranks import Ranks
from common.run import Run

if TYPE_CHECKING:
    import torch

BEST_KEPT = 2  # a resume may go back behind the last


class Selection:
    """Which evaluation of a run is the best so far. After a resume it is read from metrics.jsonl.

    metric: its name there, without `valid_`; of a `loss` the lowest is the best, of all else the highest.
    """

    def __init__(self, run: Run, metric: str):
        self.metric, self.sign = metric, -1 if metric == "loss" else 1
        self.patience = run.cfg.task.patience
        self.values: dict[int, float] = {}
        log, last = run.out / "metrics.jsonl", run.resume.step if run.resume else 0
        for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() and last else ():
            found = json.loads(line)
            if found["step"] <= last and f"valid_{metric}" in found:
                self.enter(found["step"], found[f"valid_{metric}"])

    def enter(self, step: int, value: float) -> bool:
        """An evaluation, alike on every rank; is it the best so far?"""
        self.values[step] = value
        return self.best == step

    @property
    def best(self) -> int | None:
        """Its step: of equal ones the first."""
        return max(self.values, key=lambda step: (self.sign * self.values[step], -step)) if self.values else None

    @property
    def is_over(self) -> bool:
        """Have there been `task.patience` evaluations since the best?"""
        return bool(self.patience and self.values and sum(step > self.best for step in self.values) >= self.patience)


# ---- predictions -----------------------------------------------------------------------------------------------------


def dev_size(run: Run) -> int:
    return min(run.cfg.train.eval_samples or len(run.valid), len(run.valid))


class Predictions:
    """What the model says of each dev example, gathered over all ranks. width: numbers that one prediction takes."""

    def __init__(self, run: Run, ranks: Ranks, width: int):
        import torch

        self.width = width
        # (2 + N x width,): the summed loss, the examples, and a place for each prediction. fp64: exact for class numbers
        self.totals = torch.zeros(2 + dev_size(run) * width, dtype=torch.float64, device=ranks.device)

    def add(self, rows: batches.Rows, loss: "torch.Tensor", predictions: "torch.Tensor") -> None:
        """Enter one micro batch: its summed loss, and predictions (B, width). Repeated examples, which count nowhere, are left
        out."""
        import torch

        real = torch.from_numpy(rows["example_mask"]).to(self.totals.device)
        places = torch.from_numpy(rows["places"]).to(self.totals.device)[real]
        self.totals[0] += loss.double()
        self.totals[1] += real.sum()
        self.totals[2:].view(-1, self.width)[places] = predictions[real].double()

    def gather(self) -> None:
        """Sum over the ranks, each of which has entered what none else has."""
        import torch.distributed as dist

        dist.all_reduce(self.totals)

    def read(self) -> tuple[float, np.ndarray]:
        """Mean loss, and predictions (N, width)."""
        values = self.totals.cpu().numpy()
        found = values[2:].reshape(-1, self.width)
        if int(values[1]) != len(found):
            raise RuntimeError(f"{int(values[1])} of {len(found)} dev examples were evaluated")
        return float(values[0] / values[1]), found


def write_results(run: Run, selection: Selection, values: dict[str, float], n: int, files: dict[str, str]) -> None:
    """Rank 0, of the best evaluation so far: eval.json, and files {name: text} in OUT/predictions."""
    folder = run.out / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    size, used = len(run.valid), dev_size(run)
    part = "" if used == size else f", the first {used:,} of {size:,}"
    notes = "".join(f"; {note}" for note in run.notes)
    how = f"{run.cfg.task.name} dev{part}, step {selection.best}, the best by {selection.metric}{notes}"
    rows = [{"task": run.cfg.task.name, "metric": name, "value": v, "n": n, "protocol": how} for name, v in values.items()]
    write_json(run.out / "eval.json", rows)


def finish(run: Run, task: ModuleType, ranks: Ranks) -> None:
    """The export of the best checkpoint; where adapters were trained, these too, and the export is the merged model."""
    lora.export(run, task, ranks, best_folder(run))
    export.to_hf(run, task, ranks, best_folder(run), lora.merging(run.whole, task))


def best_folder(run: Run) -> Path:
    return run.out / "best"
