"""Where the values of a run go beside OUT/metrics.jsonl: to trackers, which get them a step at a time."""

import threading
from pathlib import Path
from typing import Any, Protocol

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
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _report_thread
        self.summary = Summary
        self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10, max_queue=100)
        for name, text in texts.items():
            self.writer.add_text(f"run/{name}", text, step)

    def write(self, step: int, values: Values) -> None:
        # one event for all values: add_scalar would take five times as long
        scalars = [self.summary.Value(tag=grouped(name), simple_value=value) for name, value in values.items()]
        self.writer.file_writer.add_summary(self.summary(value=scalars), step)

    def close(self) -> None:
        self.writer.close()


def _report_thread(args: "threading.ExceptHookArgs") -> None:
    """Report any exception of a thread except OSError: TensorBoard's thread stores a failed write (a full disk) and raises it
    at the next call, so one report is enough."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def started(folder: Path, step: int, texts: dict[str, str]) -> list[Any]:
    """The trackers of a run that begins after `step`. texts: Markdown by name, such as its config."""
    return [TensorBoard(folder / "tensorboard", step, texts)]
