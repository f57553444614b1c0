"""What a run reports, on rank 0 only: a header, a line per train.log_every steps, OUT/metrics.jsonl and TensorBoard."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from common import screen
from common.checkpoints import checkpoint
from common.config import Section, written
from common.contract import Family
from common.json_files import is_count
from common.launch import heartbeat, processes, startup
from common.launch.processes import Ranks
from common.planning import flops
from common.preflight import Run
from common.training import trackers
from common.yaml_files import to_yaml

SAVING = {"save_ms", "saved_ms"}  # keys of the lines of a checkpoint, which the trackers do not get


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
        processes.before_exit(self.close)
        if not self.first:
            return
        startup.done(f"model and optimizer with their values ({_origin(run)})")
        self.file = _open_metrics(run.out / "metrics.jsonl", self.first_step)
        before = (line for line in read(run.out / "metrics.jsonl", self.first_step) if not SAVING & line.keys())
        self.trackers = trackers.started(run, self.first_step, _texts(run, task), before)
        if os.environ.get(startup.HEADER) != str(ranks.world):
            print(header(run), flush=True)
        self.row = Row(run.whole.last_step, flops.peak_tflops(self.gpu) is not None)
        self.every, self.lines = run.cfg.train.log_every, 0  # steps per line on the screen; lines so far
        self.steps, self.seconds, self.tokens = 0, 0.0, 0  # since the last of these lines

    def begin_step(self) -> None:
        self.current += 1
        heartbeat.beat("data", self.current)
        checkpoint.poll()
        self.step_start = time.perf_counter()

    def step(self, step: int, loss: float, grad_norm: float, lr: float, tokens: int, **parts: float) -> None:
        """Log one optimizer step. loss: mean over the targets of the global batch; grad_norm: before clipping; tokens: tokens
        in the global batch without padding; parts: further values for metrics.jsonl, such as the parts of the loss."""
        if not self.first:
            return
        seconds = time.perf_counter() - self.step_start
        memory = peak_memory(self.device)
        values = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, **parts,
                  "padding": 1 - tokens / self.run.tokens_per_step, "ms": seconds * 1e3, "tokens_per_s": tokens / seconds,
                  "mem_bytes": memory}  # fmt: skip
        self._write(values)
        self.steps, self.seconds, self.tokens = self.steps + 1, self.seconds + seconds, self.tokens + tokens
        if step % self.every == 0 or step == self.run.cfg.train.steps:
            self._show(step, loss, grad_norm, lr, memory)
        elif step == self.first_step + 1:
            startup.done(f"first step, loss {loss:.4f}")

    def _show(self, step: int, loss: float, grad_norm: float, lr: float, memory: int) -> None:
        """Print the line of a step, with the mean time of the steps since the last one."""
        if self.lines % HEADING_EVERY == 0 and (self.lines == 0 or screen.has_colour(sys.stdout)):
            print(screen.styled(self.row.heading(), "dim"))
        rate, world = self.tokens / self.seconds, self.run.layout.world
        speed = flops.mfu(self.flops_per_token, rate, self.gpu, world) if self.row.has_mfu else None
        speed = self.flops_per_token * rate / 1e12 / world if speed is None else speed
        left = (time.perf_counter() - self.start) / max(1, step - self.first_step) * (self.row.total - step)
        line = self.row.line(step, loss, grad_norm, lr, self.seconds / self.steps, rate, speed, memory, left)
        print(line, flush=True)
        self.lines += 1
        self.steps, self.seconds, self.tokens = 0, 0.0, 0

    def valid(self, step: int, loss: float, tokens: int, **parts: float) -> None:
        """Log the validation loss (mean over `tokens` targets) after `step`, with the perplexity if the loss has one part."""
        if not self.first:
            return
        more = [f"{name} {value:.4f}" for name, value in parts.items()] or [f"ppl {_perplexity(loss):.4g}"]
        print(self.row.valid(step, loss, more), flush=True)
        named = {f"valid_{name}": value for name, value in parts.items()}
        self._write({"step": step, "valid_loss": loss, "valid_tokens": tokens, **named})

    def saved(self, step: int, **ms: float) -> None:
        """Log how long the training waited for a checkpoint (save_ms), and when all of it was on disk (saved_ms)."""
        if self.first:
            self.file.write(json.dumps({"step": step, **ms}) + "\n")
            self.file.flush()

    def _write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        rest = {name: value for name, value in values.items() if name != "step"}
        for tracker in self.trackers:
            tracker.write(values["step"], rest)

    def close(self) -> None:
        """Write what is left. A run that is stopped comes here from processes.run."""
        checkpoint.wait()
        if self.first and not self.file.closed:
            self.file.close()
            for tracker in self.trackers:
                tracker.close()


def _open_metrics(path: Path, step: int) -> TextIO:
    """Open metrics.jsonl to append after the lines of steps up to `step`; those lines keep their bytes. Damaged lines are
    removed, with a note: a disk may change a byte in the middle of the file, and a killed run leaves half a line at its end.
    Later steps may stand between those lines: that a checkpoint is on disk is logged when it is (`Log.saved`)."""
    place = found = 0  # current offset; damaged lines up to it
    end = damaged = removed = 0  # end of the last line to keep; before it: damaged lines, and all lines to remove
    spans: list[tuple[int, int]] = []  # (begin, end) of each line to remove, in bytes
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                values = parsed(line)
                if values is None or values["step"] > step:
                    spans.append((place, place + len(line)))
                    found += values is None
                else:
                    end, damaged, removed = place + len(line), found, len(spans)
                place += len(line)
        os.truncate(path, end)
        if removed:
            _cut_out(path, spans[:removed])
        if damaged:
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


def _texts(run: Run, task: Family) -> dict[str, str]:
    """What a tracker shows of a run as Markdown: what the model is, and the config."""
    rows = {**task.model_card(run.cfg.model), **{name: run.record.get(name) for name in ("stack", "commit", "config")}}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    return {"model": f"| | |\n|---|---|\n{table}", "config": f"```yaml\n{to_yaml(run.whole.dump())}```"}


HEADING_EVERY = 25  # lines of steps, on a terminal


class Row:
    """The lines of steps, at most screen.WIDTH columns wide for up to 10 million steps.

    Their columns: step, share of all steps, loss, norm of the gradients, learning rate, ms per step, tokens per s of all ranks,
    TFLOP/s or (has_mfu) MFU per GPU, peak memory in GiB, time left.
    """

    def __init__(self, total: int, has_mfu: bool):
        self.total, self.has_mfu = total, has_mfu
        self.digits = max(4, len(str(total)))
        self.widths = (self.digits + 5, 5, 9, 8, 9, 7, 8, 7 if has_mfu else 9, 6, 7)

    def heading(self) -> str:
        speed = "MFU" if self.has_mfu else "TFLOP/s"
        names = (f"of {self.total}", "done", "loss", "norm", "lr", "ms", "tok/s", speed, "GiB", "left")
        return self._joined(names)

    def line(
        self, step: int, loss: float, grad_norm: float, lr: float, seconds: float, rate: float, speed: float, memory: int,
        left: float,
    ) -> str:  # fmt: skip
        """seconds: per step; speed: the MFU from 0 to 1, or TFLOP/s per GPU; memory: bytes; left: seconds."""
        ms = _number(seconds * 1e3, 1 if seconds < 0.1 else 0)
        shown = (
            f"step {step:>{self.digits}}", f"{step * 100 // self.total}%",
            _number(loss, 4), _number(grad_norm, 3), f"{lr:.2e}", ms, screen.count(rate),
            f"{speed:.1%}" if self.has_mfu else f"{speed:.3g}",
            f"{memory / 2**30:.1f}", screen.duration(left),
        )  # fmt: skip
        return self._joined(shown)

    def valid(self, step: int, loss: float, more: Sequence[str]) -> str:
        """The line of a validation. more: 'ppl 12.3', or the parts of the loss and the scores."""
        first = f"valid {step:>{self.digits - 1}}      loss {loss:.4f}"
        lines = screen.together(more, screen.WIDTH - len(first) - 2, "  ")
        return f"\n{'':{len(first)}}".join([screen.styled(first, "bold") + lines[0], *lines[1:]])

    def _joined(self, cells: Sequence[str]) -> str:
        """Right-aligned. A cell that is too wide is not cut: it moves those behind it."""
        return "".join(f"{cell:>{width}}" if len(cell) < width or not i else f" {cell}"
                       for i, (cell, width) in enumerate(zip(cells, self.widths, strict=True)))  # fmt: skip


def _number(value: float, decimals: int) -> str:
    """In at most 7 characters: with fewer decimals if it is large, with an exponent if it is very large or very small."""
    if value and abs(value) < 10 ** (1 - decimals) or abs(value) >= 1e7:
        return f"{value:.1e}"
    return next(text for places in range(decimals, -1, -1) if len(text := f"{value:.{places}f}") <= 7 or not places)


def header(run: Run) -> str:
    """The lines at the start of a run: model, data, step, layout, versions, commit and initial values. Torch-free."""
    cfg, layout, record = run.cfg, run.layout, run.record
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    hashes = record["data"] | {"tokenizer": record["tokenizer"]}
    lines = {
        "model": f"{cfg.model.arch}, {cfg.model.parameter_count():,} parameters, vocabulary {cfg.model.vocab_size:,}",
        "data": ", ".join(f"{name} {value[:12]}" for name, value in hashes.items() if value) + " (hashes)",
        "step": f"{cfg.train.global_batch} samples x {cfg.data.sample_tokens} = {run.tokens_per_step:,} tokens, "
        f"{cfg.train.dtype}, seed {cfg.train.seed}; {run.whole.last_step:,} steps",
        "layout": f"{run.stack}: {layout.shares}",
        "settings": _changed_keys(getattr(cfg, run.stack)),
        "versions": f"python {sys.version.split()[0]}, {versions}",
        "commit": record["commit"],
        "from": _origin(run),
        "out": str(run.out),
    }
    return "\n".join(screen.field(name, text) for name, text in lines.items())


def _changed_keys(section: Section) -> str:
    """'zero_stage=3 offload=all': the keys whose value is not the default."""
    values, fields = section.model_dump(), type(section).model_fields
    changed = {key: value for key, value in values.items() if value != fields[key].default}
    return " ".join(f"{key}={written(value)}" for key, value in changed.items()) or "the defaults"


def _origin(run: Run) -> str:
    """Where the weights of a run come from, when it starts or continues."""
    if run.resume:
        return f"step {run.resume.step:,}: {run.resume.path}"
    start = run.cfg.init.from_
    return f"drawn from seed {run.cfg.train.seed}" if start == "scratch" else f"init.from={start}"


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
