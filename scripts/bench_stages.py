"""Measure how evenly the stages of a pipeline are loaded, and how long they idle, beside what the schedule predicts.

    torchrun --standalone --nproc-per-node P -m scripts.bench_stages CONFIG [a.b=c ...] --layouts LAYOUT ...

P processes are P stages. CONFIG is one of GPT or BERT, for pretraining. A LAYOUT is one word with overrides of one stack beside
its pp, such as deepspeed.partition=[4,2] or "megatron.vpp=2 megatron.pipeline_layout=even". Each is trained with each number of
micro batches (--micro-batches), --rounds times in turn, for --steps steps, of which the first two do not count. A line gives
the median over all counted steps, with the least and the greatest:
  slowest / mean   time of the forward and backward passes of the slowest stage, to the mean over the stages
  idle             share of the stages' time, from the first forward to the last backward pass of a step, without either
  predicted        the same of equal stages: (p - 1) / (m v + p - 1), with p stages of v chunks and m micro batches
                   (arXiv:2104.04473, section 2.2)
"""

import argparse
import contextlib
import itertools
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import families
from common.errors import EXIT_BAD_INPUT, BadInput, exit_cleanly
from common.launch import in_process, processes

WARMUP = 2  # steps that do not count


class Passes(NamedTuple):
    """The passes of one step on one stage, by time.perf_counter, which all processes of a machine share."""

    begin: float
    end: float
    busy: float  # seconds


class Step(NamedTuple):
    imbalance: float  # time of the slowest stage, to the mean
    idle: float


@contextlib.contextmanager
def timed() -> Iterator[list[list[tuple[float, float]]]]:
    """Note the begin and end of each forward and backward pass of a pipeline on this rank, in one list per step."""
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass
    from megatron.core.pipeline_parallel import schedules

    from common.training.log import Log

    steps: list[list[tuple[float, float]]] = []
    instructions, begin_step = dict(PipelineEngine._INSTRUCTION_MAP), Log.begin_step
    functions = {name: getattr(schedules, name) for name in ("forward_step", "backward_step")}

    def clocked(run: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            result = run(*arguments, **named)
            steps[-1].append((begin, time.perf_counter()))
            return result

        return measured

    def begin(log: Log) -> None:
        steps.append([])
        begin_step(log)

    for kind in (ForwardPass, BackwardPass):
        PipelineEngine._INSTRUCTION_MAP[kind] = clocked(instructions[kind])
    for name, function in functions.items():
        setattr(schedules, name, clocked(function))
    Log.begin_step = begin  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        PipelineEngine._INSTRUCTION_MAP, Log.begin_step = instructions, begin_step  # type: ignore[method-assign]
        for name, function in functions.items():
            setattr(schedules, name, function)


def measure(module: str, arguments: list[str]) -> list[Step]:
    """Run a recipe on all ranks, which are the stages of one pipeline -> its counted steps."""
    import torch.distributed as dist

    with timed() as noted, contextlib.redirect_stdout(open(os.devnull, "w", encoding="utf-8")):  # noqa: SIM115  lives as long
        in_process.run(module, arguments)
    own = [Passes(step[0][0], step[-1][1], sum(end - begin for begin, end in step)) for step in noted[WARMUP:]]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return [of_stages([Passes(*stage) for stage in stages]) for stages in zip(*gathered, strict=True)]


def of_stages(stages: list[Passes]) -> Step:
    busy = [stage.busy for stage in stages]
    whole = max(stage.end for stage in stages) - min(stage.begin for stage in stages)
    return Step(max(busy) / statistics.mean(busy), 1 - statistics.mean(busy) / whole)


def written(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f} .. {max(values):.3f}]"


def table(found: dict[tuple[str, int], list[Step]], stages: int) -> str:
    """A block of 80 columns for each layout."""
    lines = []
    for layout in dict.fromkeys(layout for layout, _ in found):
        chunks = next((int(word.partition("=")[2]) for word in shlex.split(layout) if word.startswith("megatron.vpp=")), 1)
        lines += [layout, f"  {'m':>2}  {'slowest / mean':<24} {'idle':<24} predicted"]
        for m in [m for name, m in found if name == layout]:
            steps = found[layout, m]
            columns = [written([step.imbalance for step in steps]), written([step.idle for step in steps])]
            predicted = (stages - 1) / (m * chunks + stages - 1)
            lines.append(f"  {m:>2}  {columns[0]:<24} {columns[1]:<24} {predicted:.3f}")
    return "\n".join(lines)


def main() -> int:
    processes.quiet()
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides of the config")
    parser.add_argument("--layouts", nargs="+", required=True, metavar="LAYOUT", help="overrides of one stack")
    parser.add_argument(
        "--micro-batches", nargs="+", type=int, default=[2, 4, 8], metavar="M", help="per step (default: 2 4 8)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="of each run (default: 6)")
    args = parser.parse_intermixed_args()
    family, stages = families.of_config(args.config), int(os.environ.get("WORLD_SIZE", "1"))
    is_first = os.environ.get("RANK", "0") == "0"
    found: dict[tuple[str, int], list[Step]] = {}
    folder = Path(tempfile.gettempdir()) / f"bench_stages_{os.environ.get('MASTER_PORT', '0')}"  # the same on every rank
    for number, (_, layout, m) in enumerate(itertools.product(range(args.rounds), args.layouts, args.micro_batches)):
        stack = layout.partition(".")[0]
        if stack not in ("deepspeed", "megatron"):
            parser.error(f"--layouts {layout}: has no pipeline; give overrides of deepspeed or megatron")
        sizes = [word.partition("=")[2] for word in args.overrides if word.startswith(f"{stack}.micro_batch=")]
        micro_batch = sizes[-1] if sizes else "1"
        more = [
            f"{stack}.pp={stages}", *shlex.split(layout), f"{stack}.micro_batch={micro_batch}",
            f"train.global_batch={m * int(micro_batch)}", f"train.steps={args.steps}", "train.save_every=0", "data.valid=null",
        ]  # fmt: skip
        out = str(folder / str(number))
        try:
            steps = measure(f"recipes.{family}.{stack}.pretrain", [args.config, out, *args.overrides, *more])
        except BadInput as error:
            if is_first:
                print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr, flush=True)
            os._exit(EXIT_BAD_INPUT)  # worker threads of the stacks outlive a normal exit by seconds
        found.setdefault((layout, m), []).extend(steps)
        shutil.rmtree(out, ignore_errors=True)
    if is_first:
        shutil.rmtree(folder, ignore_errors=True)
        print(table(found, stages), flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    exit_cleanly(main)
