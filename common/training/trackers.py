"""Where the values of a run go beside OUT/metrics.jsonl: to trackers, which get them a step at a time."""

import csv
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TextIO

from common.errors import BadInput
from common.preflight import Run

Values = dict[str, float]  # a line of metrics.jsonl without its step

# The groups in which TensorBoard and Weights & Biases show the curves
GROUPS = {
    "loss": "loss/train", "valid_loss": "loss/valid", "lr": "optimizer/lr", "grad_norm": "optimizer/grad_norm",
    "ms": "speed/ms", "tokens_per_s": "speed/tokens_per_s", "padding": "speed/padding", "mem_bytes": "memory/peak_bytes",
    "valid_tokens": "valid/tokens",
}  # fmt: skip


def grouped(name: str) -> str:
    """valid_f1 -> 'valid/f1'; any other name that is not in GROUPS is a part of the loss: 'loss/NAME'."""
    return GROUPS.get(name) or (f"valid/{name[6:]}" if name.startswith("valid_") else f"loss/{name}")


class Tracker(Protocol):
    def write(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`, where the events after `step`, of a run that is continued there, no longer count."""

    def __init__(self, folder: Path, step: int, texts: dict[str, str]):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _report_thread
        self.event, self.summary = Event, Summary
        self.events: list[tuple[Any, int, float]] = []  # event, step, time: not yet given to the writer
        self.given = time.monotonic()
        self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10, max_queue=1000)
        for name, text in texts.items():
            self.writer.add_text(f"run/{name}", text, step)

    def write(self, step: int, values: Values) -> None:
        # One event for all values, and those of a second together: the writer's thread computes checksums in Python, and would
        # hold up each step. add_scalar takes 20 times as long.
        scalars = [self.summary.Value(tag=grouped(name), simple_value=value) for name, value in values.items()]
        self.events.append((self.event(summary=self.summary(value=scalars)), step, time.time()))
        if time.monotonic() - self.given >= 1:
            self._give()

    def _give(self) -> None:
        events, self.events, self.given = self.events, [], time.monotonic()
        for event, step, when in events:
            self.writer.file_writer.add_event(event, step, when)

    def close(self) -> None:
        self._give()
        self.writer.close()


def _report_thread(args: "threading.ExceptHookArgs") -> None:
    """Report any exception of a thread except OSError: TensorBoard's thread stores a failed write (a full disk) and raises it
    at the next call, so one report is enough."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


class Csv:
    """OUT/train.csv, with a row per step, and OUT/valid.csv, with one per evaluation. Both are written again at every start,
    from `before`: the steps and values of metrics.jsonl so far."""

    def __init__(self, folder: Path, before: Iterable[dict[str, Any]]):
        self.folder = folder
        self.files: dict[str, tuple[TextIO, csv.DictWriter[str]]] = {}
        for name in ("train.csv", "valid.csv"):
            (folder / name).unlink(missing_ok=True)
        for line in before:
            self.write(line["step"], {key: value for key, value in line.items() if key != "step"})

    def write(self, step: int, values: Values) -> None:
        name = "valid.csv" if "valid_loss" in values else "train.csv"
        row = {"step": step, **values}
        if name not in self.files:
            file: TextIO = open(self.folder / name, "w", encoding="utf-8", newline="")  # noqa: SIM115  open until the run ends
            self.files[name] = file, csv.DictWriter(file, list(row), restval="")
            self.files[name][1].writeheader()
        file, writer = self.files[name]
        writer.writerow({key: row.get(key, "") for key in writer.fieldnames})
        file.flush()

    def close(self) -> None:
        for file, _ in self.files.values():
            file.close()


class WandB:
    """A run of Weights & Biases, which a continued run goes on with. Steps that it has already, from after the checkpoint, it
    leaves as they are. Texts and config are those of the last start."""

    def __init__(self, run: Run, texts: dict[str, str]):
        import wandb

        try:
            self.run = wandb.init(
                project=run.cfg.log.wandb, dir=str(run.out), name=run.out.name, id=run.record["id"], resume="allow",
                config={"config": run.whole.dump(), "run": run.record}, notes=texts["model"],
                settings=wandb.Settings(console="off", quiet=True),
            )  # fmt: skip
        except (wandb.Error, OSError) as error:  # no key, no network
            reason = " ".join(str(error).split())
            raise BadInput(f"log.wandb={run.cfg.log.wandb}: {reason}; WANDB_MODE=offline keeps the run on this disk") from None

    def write(self, step: int, values: Values) -> None:
        self.run.log({grouped(name): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self.run.finish()


def started(run: Run, step: int, texts: dict[str, str], before: Iterable[dict[str, Any]]) -> list[Tracker]:
    """The trackers of a run that begins after `step`. texts: Markdown by name; before: the lines of metrics.jsonl so far."""
    trackers: list[Tracker] = [TensorBoard(run.out / "tensorboard", step, texts)]
    trackers += [Csv(run.out, before)] if run.cfg.log.csv else []
    trackers += [WandB(run, texts)] if run.cfg.log.wandb else []
    return trackers
