"""Measure steps of layouts and sizes on this machine's CPU, and how far common/planning/step_time.py is from them.

    python -m scripts.bench_plan [--processes N] [--out DIR] [--write]

Sixteen runs of tiny models, of one and of two processes with one thread each. The constants of the CPU are measured
(common/planning/cpu.py) and then fitted to four of the runs, as scripts.plan --calibrate does; the other twelve are predicted.
It takes four minutes, and needs two cores on which nothing else runs: what was disturbed is measured again. --write keeps the
measurements in docs/planner/cpu.json, from which `python -m scripts.plan --validate` writes docs/planner.md.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from common.command_line import Parser
from common.comparison.layouts import torchrun
from common.errors import BadInput, exit_cleanly
from common.launch import in_process, processes
from common.planning import calibration, cpu

THREADS, STEPS = 1, 9


class Case(NamedTuple):
    """A run. Those with `is_fitted` were chosen before anything was measured: one of each kind of layout."""

    world: int
    config: str
    stack: str
    words: str  # keys of model, data.seq_len, train.global_batch, and of the stack
    is_fitted: bool = False

    @property
    def path(self) -> str:
        return f"recipes/gpt/configs/{self.config}.yaml"

    @property
    def overrides(self) -> list[str]:
        names = {"seq_len": "data.seq_len", "batch": "train.global_batch"}
        names |= {name: f"model.{name}" for name in ("layers", "hidden", "heads", "ffn", "kv_heads", "vocab_size")}
        pairs = [word.split("=") for word in self.words.split()]
        return [f"{names.get(key, f'{self.stack}.{key}')}={value}" for key, value in pairs]


CASES = [
    Case(1, "tiny", "baseline", "layers=4 hidden=256 heads=4 vocab_size=4096 seq_len=256 batch=8 micro_batch=4", True),
    Case(1, "tiny", "baseline", "layers=2 hidden=512 heads=8 vocab_size=2048 seq_len=128 batch=16 micro_batch=8"),
    Case(1, "tiny", "deepspeed", "layers=3 hidden=384 heads=6 vocab_size=2048 seq_len=512 batch=4 micro_batch=1"),
    Case(1, "tiny", "megatron", "layers=6 hidden=256 heads=4 vocab_size=8192 seq_len=256 batch=8 micro_batch=2", True),
    Case(1, "tiny_llama", "baseline",
         "layers=4 hidden=384 heads=6 kv_heads=2 ffn=1024 vocab_size=8192 seq_len=256 batch=4 micro_batch=2"),
    Case(1, "tiny", "deepspeed",
         "layers=4 hidden=384 heads=6 vocab_size=4096 seq_len=128 batch=16 micro_batch=8 recompute=true"),
    Case(1, "tiny", "megatron",
         "layers=3 hidden=512 heads=8 vocab_size=4096 seq_len=256 batch=4 micro_batch=2 recompute=full"),
    Case(2, "tiny", "baseline", "layers=4 hidden=512 heads=8 vocab_size=4096 seq_len=128 batch=16 micro_batch=4", True),
    Case(2, "tiny", "baseline",
         "layers=4 hidden=256 heads=4 vocab_size=4096 seq_len=512 batch=8 micro_batch=2 recompute=true"),
    Case(2, "tiny", "deepspeed",
         "layers=8 hidden=256 heads=4 vocab_size=2048 seq_len=256 batch=8 micro_batch=2 zero_stage=1"),
    Case(2, "tiny", "deepspeed",
         "layers=2 hidden=512 heads=8 vocab_size=8192 seq_len=256 batch=8 micro_batch=4 zero_stage=2"),
    Case(2, "tiny", "megatron",
         "layers=4 hidden=384 heads=6 vocab_size=4096 seq_len=256 batch=8 micro_batch=2 distributed_optimizer=true"),
    Case(2, "tiny", "megatron", "layers=4 hidden=512 heads=8 vocab_size=4096 seq_len=256 batch=4 micro_batch=2 tp=2", True),
    Case(2, "tiny_llama", "megatron",
         "layers=2 hidden=512 heads=8 kv_heads=4 ffn=1536 vocab_size=8192 seq_len=512 batch=4 micro_batch=1 tp=2"),
    Case(2, "tiny", "megatron", "layers=6 hidden=384 heads=6 vocab_size=2048 seq_len=256 batch=8 micro_batch=1 pp=2"),
    Case(2, "tiny", "megatron",
         "layers=4 hidden=512 heads=8 vocab_size=2048 seq_len=128 batch=16 micro_batch=2 pp=2 recompute=full"),
]  # fmt: skip
WORLDS = sorted({case.world for case in CASES})
NUMBERS = {"hardware": "ranks", "rows": "world"}  # how docs/planner/cpu.json names the number of processes
FIXED = ["data.valid=null", "data.tokenizer=null", f"train.steps={STEPS}", "train.save_every=0"]


def child(folder: Path) -> None:
    """A rank: all runs of as many processes, one after the other."""
    processes.quiet()
    processes.start()
    world = int(os.environ["WORLD_SIZE"])

    def run(case: Case, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)  # of a run that was disturbed
        words = [case.path, str(out), *FIXED, f"data.train={folder}/corpus/train", *case.overrides]
        in_process.run(f"recipes.gpt.{case.stack}.pretrain", words)

    problems = []
    for number, case in enumerate(CASES):
        out = folder / str(number)
        if case.world == world and not (out / "hf").is_dir():
            try:
                with contextlib.redirect_stdout(open(os.devnull, "w", encoding="utf-8")):  # noqa: SIM115  lives as long
                    cpu.undisturbed(partial(run, case, out))
            except BadInput as error:
                problems = error.problems
                shutil.rmtree(out, ignore_errors=True)
    if problems:
        raise BadInput(problems)
    os._exit(0)  # worker threads of the stacks outlive a normal exit by seconds


def measured(folder: Path, worlds: Sequence[int]) -> dict[str, Any]:
    """The content of docs/planner/cpu.json, of runs of these numbers of processes."""
    from common.simulation import corpus

    corpus.write(folder / "corpus", corpus.SMALLEST, 1024, sentences=False)
    hardware = []
    for world in worlds:
        os.environ["OMP_NUM_THREADS"] = str(THREADS)
        code = torchrun(world, ["-m", "scripts.bench_plan", "--child", str(folder)], folder / "log.txt")
        if code:
            raise BadInput(f"{world} processes: {cpu.reason((folder / 'log.txt').read_text(encoding='utf-8'))}")
        runs = [calibration.of_run(folder / str(n)) for n, case in enumerate(CASES) if case.world == world]
        hardware.append(cpu.measured(world, THREADS, calibration.works(runs)))
    rows = []
    for number, case in enumerate(CASES):
        if case.world not in worlds:
            continue
        run = calibration.of_run(folder / str(number))
        rows.append({
            "config": case.path, "stack": case.stack, "world": case.world, "words": case.words, "overrides": case.overrides,
            "is_fitted": case.is_fitted, "seconds": run.seconds, "least": min(run.taken), "most": max(run.taken),
        })  # fmt: skip
    return {"cpu": cpu.name(), "hardware": hardware, "rows": rows}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
    parser = Parser(prog="python -m scripts.bench_plan", description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the measurements in docs/planner/cpu.json")
    parser.add_argument("--processes", type=int, choices=WORLDS, help="only these runs; docs/planner/cpu.json has the others")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the runs there, and go on with those that are missing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_plan_") as folder:
        found = measured(args.out or Path(folder), [args.processes] if args.processes else WORLDS)
    if args.processes:
        before = json.loads(calibration.FILE.read_text(encoding="utf-8"))
        kept = {key: [one for one in before[key] if one[name] != args.processes] for key, name in NUMBERS.items()}
        found |= {key: sorted([*kept[key], *found[key]], key=itemgetter(name)) for key, name in NUMBERS.items()}
    if args.write:
        lines = ",\n".join(json.dumps(row) for row in found["rows"])
        machines = ",\n".join(json.dumps(values) for values in found["hardware"])
        text = f'{{"cpu": {json.dumps(found["cpu"])}, "hardware": [\n{machines}\n], "rows": [\n{lines}\n]}}\n'
        calibration.FILE.write_text(text, encoding="utf-8")
    print(calibration.page(found))


if __name__ == "__main__":
    exit_cleanly(main)
