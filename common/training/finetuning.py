"""What finetuning adds to a run: the best checkpoint, early stopping, predictions on the whole dev set, eval.json.

OUT/best/step_N/   the state after the evaluation with the best metric; OUT/hf is made of it
OUT/predictions/   its predictions, in the formats of the benchmarks
OUT/eval.json      its metrics: a list of {task, metric, value, n, protocol}
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config import Section
from common.contract import Family
from common.data import batches
from common.errors import BadInput
from common.evaluation import metrics
from common.huggingface import export, hf_folder
from common.json_files import read_object, write_json
from common.launch import heartbeat, processes
from common.launch.processes import Ranks
from common.preflight import Run, data_notes, find
from common.training import log, lora

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
        for line in log.read(run.out / "metrics.jsonl", run.resume.step) if run.resume else ():
            if f"valid_{metric}" in line:
                self.enter(line["step"], line[f"valid_{metric}"])

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


# ---- where it begins -------------------------------------------------------------------------------------------------


SHAPES = {"layers", "hidden", "heads"}


def with_shapes(
    values: Any, model_from_hf_config: Callable[[dict[str, Any]], Section], types: Sequence[str], own: set[str]
) -> Any:
    """A config's values with the shapes of init.from as its model, and init.from the folder of the weights. What the config
    says of the model counts more. types: that config.json may name; own: keys of the model that a folder does not decide.
    BadInput for a folder of another family, or for none where the config has no shapes."""
    begin, given = ((values.get(key) or {}) if isinstance(values, dict) else None for key in ("init", "model"))
    start = begin.get("from") if isinstance(begin, dict) and isinstance(given, dict) else None
    if not isinstance(start, str) or start == "scratch":
        return values
    if not find(start).exists() and SHAPES <= given.keys():  # a finished run's own config, its beginning no longer there
        return values
    folder = weights_folder(start)
    stored = read_object(folder / "config.json")
    if stored is None:
        if SHAPES <= given.keys():
            return values  # told by common/preflight.py with all else
        if folder.name == "hf" and (folder.parent / "run.json").is_file():
            raise BadInput(f"init.from={start}: the run has no export yet; finish it by its own command")
        wanted = "give a Hugging Face folder, a name on the hub (OWNER/NAME), or OUT of a finished run"
        raise BadInput(f"init.from={start}: no config.json there that can be read; {wanted}")
    if stored.get("model_type") not in types:
        raise BadInput(f"init.from={start}: is a {stored.get('model_type')!r} model; give one of {' or '.join(types)}")
    known = hf_folder.model_from_hf_config(stored, f"init.from={start}", model_from_hf_config)
    shapes = known.model_dump(exclude=own)
    return values | {"model": shapes | given, "init": begin | {"from": str(folder)}}


def weights_folder(start: str) -> Path:
    """Of init.from: the folder itself, the export of a run, or what the hub has under that name, fetched once."""
    folder = find(start)
    if (folder / "run.json").is_file():
        return folder / "hf"
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", start):
        return folder
    import huggingface_hub

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(start, allow_patterns=wanted))
    except Exception as error:  # no network, no such repository: each has a class of its own there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"init.from={start}: no such folder, and the hub does not give it: {reason}; give a folder") from None


# ---- predictions -----------------------------------------------------------------------------------------------------


def dev_size(run: Run) -> int:
    return min(run.cfg.train.eval_samples or len(run.valid), len(run.valid))


class Predictions:
    """What the model says of each dev example, gathered over all ranks. width: numbers that one prediction takes."""

    def __init__(self, run: Run, ranks: Ranks, width: int):
        import torch

        self.width = width
        # (3 + N x width,): the summed loss, its targets, the examples, each prediction. fp64: exact for class numbers
        self.totals = torch.zeros(3 + dev_size(run) * width, dtype=torch.float64, device=ranks.device)

    def add(self, rows: batches.MicroBatch, loss: "torch.Tensor", predictions: "torch.Tensor") -> None:
        """Enter one micro batch: its summed loss, and predictions (B, at most width). Repeated examples, which count nowhere,
        are left out."""
        import torch

        real = torch.from_numpy(rows["example_mask"]).to(self.totals.device)
        indices = torch.from_numpy(rows["indices"]).to(self.totals.device)[real]
        self.totals[0] += loss.double()
        self.totals[1] += batches.targets([rows])
        self.totals[2] += real.sum()
        self.totals[3:].view(-1, self.width)[indices, : predictions.shape[1]] = predictions[real].double()

    def gather(self) -> None:
        """Sum over the ranks, each of which has entered what none else has."""
        import torch.distributed as dist

        dist.all_reduce(self.totals)

    def read(self) -> tuple[float, np.ndarray]:
        """Mean loss, and predictions (N, width)."""
        values = self.totals.cpu().numpy()
        found = values[3:].reshape(-1, self.width)
        if int(values[2]) != len(found):
            raise RuntimeError(f"{int(values[2])} of {len(found)} dev examples were evaluated")
        return float(values[0] / values[1]), found


def write_results(
    run: Run, selection: Selection, values: dict[str, float], n: int, files: dict[str, str], counts: Mapping[str, int] = {}
) -> None:
    """Rank 0, of the best evaluation so far: eval.json, and files {name: text} in OUT/predictions. n: what the values are of;
    counts: in its place, for metrics that are of a part."""
    folder = run.out / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    size, used = len(run.valid), dev_size(run)
    part = "" if used == size else f", the first {used:,} of {size:,} {run.valid.unit}"
    notes = "".join(f"; {note}" for note in data_notes(run.train, run.valid))
    how = f"{run.cfg.task.name} dev{part}, step {selection.best}, the best by {selection.metric}{notes}"
    rows = [metrics.row(run.cfg.task.name, name, value, counts.get(name, n), how) for name, value in values.items()]
    write_json(run.out / "eval.json", rows)


def progress(number: int, size: int, ranks: Ranks) -> Callable[[int], bool]:
    """Of what the export writes, `number` texts in batches of `size`. Called before each batch: rank 0 says every 10 s how far
    it is; True where a signal has come: write no more (end_if_asked)."""
    begin = shown = time.monotonic()

    def tell(done_batches: int) -> bool:
        nonlocal shown
        heartbeat.beat("writing")
        now = time.monotonic()
        if ranks.rank == 0 and done_batches and now - shown >= 10:
            done, shown = done_batches * size, now
            print(f"  {done:>8,} of {number:,} written  eta {(now - begin) / done * (number - done):.0f} s", flush=True)
        return bool(processes.stop_asked())

    return tell


def end_if_asked(ranks: Ranks, step: int) -> None:
    """By every rank, when all have written their share: end the run, whose state is saved, if a signal has come to any."""
    import torch
    import torch.distributed as dist

    asked = torch.tensor(processes.stop_asked(), device=ranks.device)
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    if asked:
        raise processes.stopped(int(asked), step)


def finish(run: Run, task: Family, ranks: Ranks) -> None:
    """The export of the best checkpoint; where adapters were trained, these too, and the export is the merged model."""
    lora.export(run, task, ranks, best_folder(run))
    export.to_hf(run, task, ranks, best_folder(run), lora.merging(run.whole, task))


def best_folder(run: Run) -> Path:
    return run.out / "best"
