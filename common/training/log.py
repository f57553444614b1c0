"""What a run reports, on rank 0 only: a header, one aligned line per step, OUT/metrics.jsonl and TensorBoard."""

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from common.contract import Family
from common.json_files import is_count
from common.launch import heartbeat
from common.launch.processes import Ranks
from common.planning import flops
from common.preflight import Run


class Log:
    """The log of a run. It starts at the step of the checkpoint that the run resumes from, and cuts off later lines of
    metrics.jsonl."""

    def __init__(self, run: Run, task: Family, ranks: Ranks):
        self.first = ranks.rank == 0
        self.run, self.device = run, ranks.device
        self.start = self.step_start = time.perf_counter()
        self.first_step = self.current = run.resume.step if run.resume else 0
        self.flops_per_token = task.forward_backward_flops(run.cfg.model, run.cfg.data)["full"]
        self.gpu = _gpu_name(ranks)
        if not self.first:
            return
        self.file = _open_metrics(run.out / "metrics.jsonl", self.first_step)
        self.board = _tensorboard(run.out / "tensorboard", self.first_step)
        print(header(run, self.gpu), flush=True)

    def begin_step(self) -> None:
        self.current += 1
        heartbeat.beat("data", self.current)
        self.step_start = time.perf_counter()

    def step(self, step: int, loss: float, grad_norm: float, lr: float, tokens: int, **parts: float) -> None:
        """Log one optimizer step. loss: mean over the targets of the global batch; grad_norm: before clipping; tokens: tokens
        in the global batch without padding; parts: further values for the line, such as the parts of the loss."""
        if not self.first:
            return
        seconds = time.perf_counter() - self.step_start
        rate = tokens / seconds
        parts |= {"padding": 1 - tokens / self.run.tokens_per_step}
        memory = peak_memory(self.device)
        values = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, **parts, "ms": seconds * 1e3,
                  "tokens_per_s": rate, "mem_bytes": memory}  # fmt: skip
        mfu = flops.mfu(self.flops_per_token, rate, self.gpu, self.run.layout.world)
        shown = "" if mfu is None else f"  mfu {mfu:.0%}"
        total = self.run.whole.last_step
        eta = (time.perf_counter() - self.start) / max(1, step - self.first_step) * (total - step)
        width = len(str(total))
        print(
            f"step  {step:>{width}}/{total}  loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.2f}  {seconds * 1e3:.0f} ms  "
            f"{count(rate)} tok/s{shown}  mem {memory / 2**30:.1f} GiB  eta {duration(eta)}",
            flush=True,
        )
        self._write(values)

    def valid(self, step: int, loss: float, tokens: int, **parts: float) -> None:
        """Log the validation loss (mean over `tokens` targets) after `step`, with the perplexity if the loss has one part."""
        if not self.first:
            return
        width = len(str(self.run.whole.last_step))
        more = [f"{name} {value:.4f}" for name, value in parts.items()] or [f"ppl {_perplexity(loss):.4g}"]
        print("  ".join([f"valid {step:>{width}}  loss {loss:.4f}", *more]), flush=True)
        named = {f"valid_{name}": value for name, value in parts.items()}
        self._write({"step": step, "valid_loss": loss, "valid_tokens": tokens, **named})

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def _write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        for name, value in values.items():
            if name != "step":
                self.board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        if self.first:
            self.file.close()
            self.board.close()


def _open_metrics(path: Path, step: int) -> TextIO:
    """Open metrics.jsonl to append after the lines of steps up to `step`; those lines keep their bytes. Damaged lines are
    removed, with a note: a disk may change a byte in the middle of the file, and a killed run leaves half a line at its end."""
    end = place = damaged = 0  # end of the last line to keep; current offset; damaged lines before `end`
    damaged_spans: list[tuple[int, int]] = []  # (begin, end) of each damaged line, in bytes
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                values = parsed(line)
                if values is None:
                    damaged_spans.append((place, place + len(line)))
                elif values["step"] <= step:
                    end, damaged = place + len(line), len(damaged_spans)
                place += len(line)
        os.truncate(path, end)
        if damaged:
            _cut_out(path, damaged_spans[:damaged])
            print(
                f"note: {path}: {damaged} damaged line{'s are' if damaged > 1 else ' is'} left out", file=sys.stderr, flush=True
            )
    return open(path, "a", encoding="utf-8")


def _cut_out(path: Path, spans: list[tuple[int, int]]) -> None:
    """Rewrite a file without these spans of bytes; a reader sees either the old file or the new one."""
    content = path.read_bytes()
    starts, ends = [0, *(end for _, end in spans)], [*(begin for begin, _ in spans), len(content)]
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(b"".join(content[begin:end] for begin, end in zip(starts, ends, strict=True)))
    part.replace(path)


def parsed(line: bytes | str) -> dict[str, Any] | None:
    """The values of a whole line of metrics.jsonl: an object with a step, whose losses are numbers. None for a damaged line."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not is_count(values.get("step")) or line[-1:] not in (b"\n", "\n"):
        return None
    losses = [value for key, value in values.items() if key == "loss" or key.startswith("valid_")]
    numbers = (isinstance(v, float) or (isinstance(v, int) and not isinstance(v, bool) and abs(v) < 2**63) for v in losses)
    return values if all(numbers) else None


def read(path: Path, last_step: int) -> Iterator[dict[str, Any]]:
    """The undamaged lines of metrics.jsonl up to `last_step`; none if there is no such file."""
    if path.is_file():
        with open(path, "rb") as file:
            yield from (values for line in file if (values := parsed(line)) and values["step"] <= last_step)


def _tensorboard(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = _report_thread
    return SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)


def _report_thread(args: "threading.ExceptHookArgs") -> None:
    """Report any exception of a thread except OSError: TensorBoard's thread stores a failed write (a full disk) and raises it
    at the next call, so one report is enough."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def header(run: Run, gpu: str | None) -> str:
    """The lines at the start of a log: model, data, step, layout, hardware, versions, commit and initial weights."""
    cfg, layout, record = run.cfg, run.layout, run.record
    versions = "  ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    hashes = record["data"] | {"tokenizer": record["tokenizer"]}
    lines = {
        "model": f"{record['family']} {cfg.model.arch}, {cfg.model.parameter_count():,} parameters, "
        f"vocabulary {cfg.model.vocab_size:,}",
        "data": "  ".join(f"{name} {str(value)[:12]}" for name, value in hashes.items()),
        "step": f"{cfg.train.global_batch} x {cfg.data.sample_tokens} = {run.tokens_per_step:,} tokens, "
        f"{cfg.train.dtype}, seed {cfg.train.seed}",
        "layout": f"{run.stack}: {layout.shares}  {getattr(cfg, run.stack).model_dump_json()}",
        "on": f"{layout.world} x {gpu}" if gpu else f"CPU ({os.cpu_count()} cores)",
        "versions": f"python {sys.version.split()[0]}  {versions}",
        "commit": record["commit"],
        "from": str(run.resume.path) if run.resume else f"init.from={cfg.init.from_}",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def _gpu_name(ranks: Ranks) -> str | None:
    import torch

    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None


def peak_memory(device: Any) -> int:
    """Peak memory in bytes: that of PyTorch's allocator on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _perplexity(loss: float) -> float:
    import math

    return math.exp(min(loss, 50.0))


def count(number: float) -> str:
    """18600 -> '18.6k'"""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """77 -> '1m17s'"""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours >= 24:
        return f"{hours // 24}d{hours % 24}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"
