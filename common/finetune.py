"""What finetuning adds to a run: predictions on the whole dev set, the best checkpoint, early stopping, eval.json.

    OUT/best/step_N/         the state after the evaluation with the best first metric; OUT/hf is made of it
    OUT/predictions/dev.tsv  its predictions, in GLUE's format
    OUT/eval.json            its metrics: a list of {task, metric, value, n, protocol}
"""

import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from common import batches, export
from common.corpus import write_json
from common.ranks import Ranks
from common.run import Run

if TYPE_CHECKING:
    import torch


def empty(run: Run, ranks: Ranks) -> "torch.Tensor":
    """(2 + N,) float64: the summed loss, the examples, and a place for the prediction of each of N dev examples."""
    import torch

    return torch.zeros(2 + dev_size(run), dtype=torch.float64, device=ranks.device)


def dev_size(run: Run) -> int:
    return min(run.cfg.train.eval_samples or len(run.valid), len(run.valid))


def add(totals: "torch.Tensor", rows: batches.Rows, loss: "torch.Tensor", predictions: "torch.Tensor") -> None:
    """Enter one micro batch: its summed loss, and predictions (B,). Repeated examples, which count nowhere, are left out."""
    import torch

    real = torch.from_numpy(rows["loss_mask"]).to(totals.device)
    totals[0] += loss.double()
    totals[1] += real.sum()
    totals[2 + torch.from_numpy(rows["places"]).to(totals.device)[real]] = predictions[real]


BEST_KEPT = 2  # a resume may go back behind the last


class Selection:
    """Which evaluation of a run is the best so far, by the first metric. After a resume it is read from metrics.jsonl."""

    def __init__(self, run: Run, task: ModuleType):
        self.run, self.task = run, task
        self.metric = task.metric_names(run.cfg)[0]
        self.patience = run.cfg.task.patience
        self.values: dict[int, float] = {}
        log, last = run.out / "metrics.jsonl", run.resume.step if run.resume else 0
        for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() and last else ():
            found = json.loads(line)
            if found["step"] <= last and f"valid_{self.metric}" in found:
                self.values[found["step"]] = found[f"valid_{self.metric}"]

    @property
    def best(self) -> int | None:
        """Its step: of equal ones the first."""
        return max(self.values, key=lambda step: (self.values[step], -step)) if self.values else None

    @property
    def is_over(self) -> bool:
        """Have there been `task.patience` evaluations since the best?"""
        return bool(self.patience and self.values and sum(step > self.best for step in self.values) >= self.patience)

    def tell(self, step: int, totals: "torch.Tensor", log: Any) -> bool:
        """Enter an evaluation, alike on every rank; is it the best so far? totals: summed over the ranks."""
        values = totals.cpu().numpy()
        n = dev_size(self.run)
        if int(values[1]) != n:
            raise RuntimeError(f"{int(values[1])} of {n} dev examples were evaluated")
        found = self.task.metrics(self.run.cfg, values[2:], self.run.valid.labels[:n])
        log.valid(step, float(values[0] / values[1]), n, **found)
        self.values[step] = found[self.metric]
        if self.best != step:
            return False
        if log.first:
            rows = [{"metric": name, "value": value, "n": n} for name, value in found.items()]
            self._write(step, rows, values[2:])
        return True

    def _write(self, step: int, rows: list[dict[str, Any]], predictions: np.ndarray) -> None:
        cfg, folder = self.run.cfg, self.run.out / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["index\tprediction", *(f"{i}\t{text}" for i, text in enumerate(self.task.written(cfg, predictions)))]
        (folder / "dev.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        size = len(self.run.valid)
        whole = "" if len(predictions) == size else f", the first {len(predictions):,} of {size:,}"
        drawn = "".join(f"; {note}" for note in self.run.notes)
        how = f"GLUE dev{whole}, step {step}, the best by {self.metric}{drawn}"
        write_json(self.run.out / "eval.json", [{"task": cfg.task.name, **row, "protocol": how} for row in rows])


def finish(run: Run, task: ModuleType, ranks: Ranks) -> None:
    """The export of the best checkpoint."""
    export.to_hf(run, task, ranks, best_folder(run))


def best_folder(run: Run) -> Path:
    return run.out / "best"
