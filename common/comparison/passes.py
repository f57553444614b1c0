"""Notes when each forward pass, backward pass and exchange of a step begins and ends, on every rank of real runs.

    torchrun --standalone --nproc-per-node N -m common.comparison.passes FOLDER

FOLDER/runs.json is a list of [module, config, OUT, overrides]: recipes, which run one after the other in one process group.
Rank r adds a line to FOLDER/rank_R.jsonl for each: its steps, each a list of the fields of timeline.Span. The stacks are not
changed: the functions that their schedules call are replaced by ones that also look at the clock. Without a GPU each rank keeps
to its share of the cores, with one thread.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.comparison.timeline import COMMUNICATION, PASSES, Span
from common.errors import EXIT_BAD_INPUT, BadInput
from common.launch import in_process, processes
from common.launch.launcher import visible_gpus

Label = Callable[[Sequence[Any], dict[str, Any], Any], tuple[int, int]]  # arguments and result -> micro batch, chunk


class Clock:
    """time.perf_counter, which all processes of a machine share. On a GPU, by CUDA events, the time at which the stream of the
    kernels gets to this place: the host does not wait for it."""

    def __init__(self) -> None:
        import torch

        self.cuda: Any = torch.cuda if torch.cuda.is_available() else None

    def restart(self) -> None:
        """Begin a step: from here on events are measured."""
        if self.cuda:
            self.cuda.synchronize()
            self.zero, self.zero_event = time.perf_counter(), self.now()

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: Any) -> float:
        if not self.cuda:
            return float(mark)
        mark.synchronize()
        return float(self.zero + self.zero_event.elapsed_time(mark) / 1e3)


class Recorder:
    """The spans of this rank, in one list per step."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.is_step = False  # what comes before the first step is not noted
        self.steps: list[list[Span]] = []
        self.current: list[tuple[str, Any, Any, int, int]] = []
        self.open: list[str] = []  # kinds of the calls that this one is in
        self.graphs: dict[int, tuple[int, int]] = {}  # id of the output of a pass -> its micro batch and chunk
        self.last_gradient: Any = None

    def begin_step(self) -> None:
        self.end_step()
        self.clock.restart()
        self.is_step = True

    def end_step(self) -> None:
        if self.current:
            at = self.clock.seconds
            self.steps.append([Span(kind, at(begin), at(end), micro, chunk) for kind, begin, end, micro, chunk in self.current])
        self.current, self.is_step = [], False

    def clocked(self, kind: str, run: Callable[..., Any], label: Label | None = None) -> Callable[..., Any]:
        """`run`, whose calls become spans. A pass within a pass, as DeepSpeed's PipelineEngine calls DeepSpeedEngine's, is one
        span, and so are communications; a communication within a pass is a span of its own."""
        same = PASSES if kind in PASSES else COMMUNICATION

        def measured(*arguments: Any, **named: Any) -> Any:
            if not self.is_step or any(one in same for one in self.open):
                return run(*arguments, **named)
            self.open.append(kind)
            begin, self.last_gradient = self.clock.now(), None if kind == "backward" else self.last_gradient
            try:
                result = run(*arguments, **named)
            finally:
                self.open.remove(kind)
            end = self.clock.now()
            place = label(arguments, named, result) if label else (self._count(kind), 0)
            if kind == "backward" and self.last_gradient is not None:  # after it DDP waits for the sums of its buckets
                self.current.append(("collective", self.last_gradient, end, *place))
                end = self.last_gradient
            self.current.append((kind, begin, end, *place))
            return result

        return measured

    def _count(self, kind: str) -> int:
        return sum(one[0] == kind for one in self.current)

    def note_gradients(self, model: Any) -> None:
        """From now on the end of a backward pass is that of its last gradient."""

        def note(_: Any) -> None:
            self.last_gradient = self.clock.now()

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(note)

    # ---- Megatron's schedules name the micro batch of a forward pass; a backward pass gets the output of its forward pass

    def of_forward(self, _: Sequence[Any], named: dict[str, Any], result: Any) -> tuple[int, int]:
        place = (named.get("current_microbatch") or 0, named.get("vp_stage") or 0)
        self.graphs[id(result[0])] = place
        return place

    def of_backward(self, arguments: Sequence[Any], _: dict[str, Any], __: Any) -> tuple[int, int]:
        return self.graphs.pop(id(arguments[1]), (self._count("backward"), 0))


class _Wait:
    """The handle of an exchange that runs beside the passes. What counts is the time in which the schedule waits for it."""

    def __init__(self, work: Any, recorder: Recorder):
        self.wait = recorder.clocked("exchange", work.wait)


class _Patches:
    """Attributes that are replaced, until `undo`."""

    def __init__(self) -> None:
        self.before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        self.before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        for owner, name, value in reversed(self.before):
            setattr(owner, name, value)


def _megatron(recorder: Recorder, patches: _Patches) -> None:
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from common.stacks import mcore

    finalize = vars(mcore)["finalize_model_grads"]  # Megatron's function, which mcore gives to its schedules
    patches.set(schedules, "forward_step", recorder.clocked("forward", schedules.forward_step, recorder.of_forward))
    patches.set(schedules, "backward_step", recorder.clocked("backward", schedules.backward_step, recorder.of_backward))
    patches.set(mcore, "finalize_model_grads", recorder.clocked("sum", finalize))
    exchange = recorder.clocked("exchange", P2PCommunicator._communicate)

    def communicate(*arguments: Any, **named: Any) -> Any:
        *received, handles = exchange(*arguments, **named)
        if isinstance(handles, dict):
            handles = {name: _Wait(work, recorder) for name, work in handles.items()}
        return (*received, handles)

    patches.set(P2PCommunicator, "_communicate", communicate)


def _deepspeed(recorder: Recorder, patches: _Patches) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine

    kinds = {
        schedule.ForwardPass: "forward", schedule.BackwardPass: "backward", schedule.SendActivation: "exchange",
        schedule.RecvActivation: "exchange", schedule.SendGrad: "exchange", schedule.RecvGrad: "exchange",
        schedule.ReduceGrads: "sum", schedule.ReduceTiedGrads: "sum",
    }  # fmt: skip
    instructions = PipelineEngine._INSTRUCTION_MAP
    timed = {instruction: recorder.clocked(kind, instructions[instruction]) for instruction, kind in kinds.items()}
    patches.set(PipelineEngine, "_INSTRUCTION_MAP", instructions | timed)
    patches.set(DeepSpeedEngine, "forward", recorder.clocked("forward", DeepSpeedEngine.forward))
    patches.set(DeepSpeedEngine, "backward", recorder.clocked("backward", DeepSpeedEngine.backward))


def _torch(recorder: Recorder, patches: _Patches) -> None:
    """torch's collectives, and the passes of the baseline's DistributedDataParallel."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "broadcast"):
        patches.set(dist, name, recorder.clocked("collective", getattr(dist, name)))
    forward, seen = recorder.clocked("forward", DistributedDataParallel.forward), set[int]()

    def noted(model: Any, *arguments: Any, **named: Any) -> Any:
        if id(model) not in seen:
            seen.add(id(model))
            recorder.note_gradients(model)
        return forward(model, *arguments, **named)

    patches.set(DistributedDataParallel, "forward", noted)
    patches.set(torch.Tensor, "backward", recorder.clocked("backward", torch.Tensor.backward))


@contextlib.contextmanager
def recorded(stack: str) -> Iterator[Recorder]:
    """Within it, the passes and the communication of a recipe on `stack` are noted."""
    from common.training.log import Log

    recorder, patches, begin_step = Recorder(), _Patches(), Log.begin_step

    def begin(log: Log) -> None:
        recorder.begin_step()
        begin_step(log)

    for patch in (_torch, {"megatron": _megatron, "deepspeed": _deepspeed}.get(stack)):
        if patch:
            patch(recorder, patches)
    patches.set(Log, "begin_step", begin)
    try:
        yield recorder
        recorder.end_step()
    finally:
        patches.undo()


def keep_to_cores() -> None:
    """Each rank of this machine gets an equal share of its cores, and one thread for its passes."""
    rank, ranks = (int(os.environ.get(name, value)) for name, value in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    if visible_gpus(os.environ) or sys.platform != "linux":
        return
    cores = sorted(os.sched_getaffinity(0))
    if share := len(cores) // ranks:
        os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share])
    os.environ["OMP_NUM_THREADS"] = "1"


def main(folder: Path) -> None:
    keep_to_cores()
    processes.quiet()
    rank, before = os.environ.get("RANK", "0"), None
    for module, config, out, overrides in json.loads((folder / "runs.json").read_text(encoding="utf-8")):
        with open(os.devnull, "w", encoding="utf-8") as nowhere, recorded(module.split(".")[2]) as recorder:
            with contextlib.redirect_stdout(nowhere):
                try:
                    in_process.run(module, [config, out, *overrides])
                except BadInput as error:
                    (folder / "problems.json").write_text(json.dumps(error.problems), encoding="utf-8")
                    os._exit(EXIT_BAD_INPUT)
        with open(folder / f"rank_{rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(recorder.steps) + "\n")
        if rank == "0" and before:  # which no rank uses any more
            shutil.rmtree(before, ignore_errors=True)
        before = out
    sys.stdout.flush()
    os._exit(0)  # worker threads of the stacks outlive a normal exit by seconds


if __name__ == "__main__":
    main(Path(sys.argv[1]))
