"""The recipes beside what one would write or take instead: transformers.Trainer, alone and with DeepSpeed, and a loop by hand
over Megatron Core. One process per family and stack, on the GPU if there is one.

    python -m common.comparison.alternatives FILE FAMILY STACK STEPS [a.b=c ...]    measures one of them; writes the result

It runs the recipe's own pretrain.py. Before each step of the recipe the other loops make one step on the same samples, from the
same initial values, so that the machine's drift affects all alike. The ratio of a round is the other loop's time over the
recipe's: 1 is equal, and below 1 the recipe is slower. The recipe's time includes all that it does between two steps: reading
the samples, the update, the log line, metrics.jsonl and TensorBoard. The Trainers get their samples from memory, and log every
500 steps.

  trainer   transformers.Trainer with the class that loads the recipe's export; for DeepSpeed with the recipe's configuration
  tuned     the same with the recipes' kernels: AdamW(fused=True), GELU as one kernel, SDPA, the head on the targets only
  minimal   for GPT on Megatron: a loop written by hand over Megatron Core, with the recipe's AdamW kernel
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import families
from common.comparison import small
from common.comparison.figures import Disagreement, Figure, Options, Task
from common.comparison.measuring import Enough, clock
from common.errors import BadInput
from common.launch import processes
from common.paths import ROOT
from common.preflight import task_module
from common.training.log import Log

if TYPE_CHECKING:
    import torch

    from common.comparison.alternative_loops import Arrays, Step
    from common.preflight import Run

GOALS = {"trainer": 1.10, "tuned": 1.0, "minimal": 0.97}  # ratios that the recipes are to reach
WARMUP = 2  # rounds
# Vocabularies of the published models, except GPT's, where a vocabulary of 50,257 would take half of the step
VOCABULARIES = {"gpt": 4096, "bert": 30_522, "t5": 32_128}
ON_CPU = small.Shape(layers=4, hidden=192, heads=4, seq_len=128, batch=8, micro_batch=8, vocab=0)
ON_GPU = small.Shape(layers=12, hidden=1024, heads=16, seq_len=512, batch=16, micro_batch=16, vocab=0)
# Trainer's loss is the recipe's, in nats: GPT's class shifts the labels itself, and has one target less per sample
SAME = {"gpt": 0.02, "bert": 1e-4, "t5": 1e-4}


class Rounds:
    """The seconds and losses of every step, by the name of the loop."""

    def __init__(self, family: str, stack: str, rounds: int):
        self.family, self.stack, self.rounds = family, stack, rounds
        self.seconds: dict[str, list[float]] = {}
        self.losses: dict[str, list[float]] = {}
        self.arrays: list[Arrays] = []
        self.others: dict[str, Step] | None = None
        self.step_start = 0.0

    def before_step(self, run: "Run", device: "torch.device") -> None:
        """End the recipe's last step, let each other loop make one step, and begin the recipe's next step."""
        if self.others is None:
            self.others = self._other_loops(run, device)
        else:
            self._add("recipe", clock(device) - self.step_start, None)
        done = len(self.seconds.get("recipe", []))
        if done == self.rounds:
            raise Enough
        order = list(self.others) if done % 2 else list(self.others)[::-1]
        for name in order:
            start = clock(device)
            loss = self.others[name](self.arrays[done])
            self._add(name, clock(device) - start, loss)
        self.step_start = clock(device)

    def _other_loops(self, run: "Run", device: "torch.device") -> "dict[str, Step]":
        from common.comparison import alternative_loops as loops

        if run.train is None:
            raise AssertionError("a run that started has a dataset")
        task: Any = task_module(self.family, {})
        self.arrays = [run.train.collate(run.samples(step)) for step in range(1, self.rounds + 1)]
        ds_config = None
        if self.stack == "deepspeed":
            from common.stacks import zero

            ds_config = zero.ds_config(run.cfg, run.layout)
        found = {name: loops.trainer(run, task, ds_config, self.arrays, tuned=name == "tuned") for name in ("trainer", "tuned")}
        if (self.family, self.stack) == ("gpt", "megatron"):
            found["minimal"] = loops.minimal_megatron(run, processes.Ranks(0, 1, device))
        return found

    def _add(self, name: str, seconds: float, loss: float | None) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        self.losses.setdefault(name, []).extend([] if loss is None else [loss])


def measure(family: str, stack: str, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Run one recipe with the other loops in between. A process can call this only once."""
    processes.quiet()
    recipe: Any = importlib.import_module(f"recipes.{family}.{stack}.pretrain")
    rounds = Rounds(family, stack, WARMUP + steps)

    class Interleaved(Log):
        def begin_step(self) -> None:
            try:
                rounds.before_step(self.run, self.device)
            except Enough:
                self.close()  # else TensorBoard's thread writes while the folder is deleted
                raise
            super().begin_step()

        def step(self, step: int, loss: float, grad_norm: float, lr: float, tokens: int, **parts: float) -> None:
            super().step(step, loss, grad_norm, lr, tokens, **parts)
            rounds.losses.setdefault("recipe", []).append(loss)

    recipe.Log = Interleaved
    with tempfile.TemporaryDirectory() as folder:
        try:
            recipe.main([str(small.config_of(family)), folder, *overrides])
        except Enough:
            pass
    seconds = {name: values[WARMUP:] for name, values in rounds.seconds.items()}
    others = {name: values for name, values in seconds.items() if name != "recipe"}
    return {
        "family": family, "stack": stack,
        "ratio": {name: ratio(values, seconds["recipe"]) for name, values in others.items()},
        "spread": {name: spread(values, seconds["recipe"]) for name, values in others.items()},
        "ms": {name: statistics.median(values) * 1e3 for name, values in seconds.items()},
        "loss": {name: [values[0], values[-1]] for name, values in rounds.losses.items()},
    }  # fmt: skip


def ratio(other: Sequence[float], recipe: Sequence[float]) -> float:
    """The speed of the recipe relative to the other loop: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(other, recipe, strict=True))


def spread(other: Sequence[float], recipe: Sequence[float]) -> list[float]:
    """The quartiles of the ratios of the rounds, [first, third]."""
    ratios = [a / b for a, b in zip(other, recipe, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return [low, high]


def missed(result: dict[str, Any]) -> list[str]:
    """The goals that a result does not reach, one line each."""
    name, ratios = f"{result['family']} on {result['stack']}", result["ratio"]
    return [f"{name}: {ratios[key]:.3f} of {key}, goal {goal}" for key, goal in GOALS.items() if ratios.get(key, goal) < goal]


# ---- the task --------------------------------------------------------------------------------------------------------


def beside(family: str, stack: str, corpus: Path, shape: small.Shape, steps: int) -> dict[str, Any]:
    """What a process of its own measures of one family and stack. BadInput if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "common.comparison.alternatives", str(result), family, stack, str(steps)]
        command += [*small.overrides_of(family, shape, corpus), "optim.lr=3e-4", "optim.warmup_steps=10"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise BadInput(f"{family} on {stack}: exit code {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def check(result: dict[str, Any]) -> None:
    """Disagreement unless the loops begin with one loss."""
    family, (recipe, *_), (tuned, *_) = result["family"], result["loss"]["recipe"], result["loss"]["tuned"]
    if not abs(recipe - tuned) <= SAME[family]:
        raise Disagreement(
            f"{family}: {result['stack']} and Trainer begin with losses {recipe:.6f} and {tuned:.6f}, which differ by more "
            f"than {SAME[family]:g}"
        )


def run(family: str, options: Options, folder: Path) -> list[Figure]:
    if options.configs:
        raise BadInput("configs are given; without, it measures small models")
    shape = (ON_GPU if small.has_gpu() else ON_CPU)._replace(vocab=VOCABULARIES[family])
    small.make_corpus(family, folder / "corpus")
    found = []
    for stack in [stack for stack in families.stacks(family) if stack in options.stacks]:
        result = beside(family, stack, folder / "corpus", shape, steps=2 * options.rounds)
        check(result)
        found += figures_of(result, options)
    return found


def figures_of(result: dict[str, Any], options: Options) -> list[Figure]:
    """A row for each of the other loops."""
    family, stack = result["family"], result["stack"]
    part = f"alternatives_{family}"
    source = options.command if "--parts" in options.words else f"{options.command} --parts {part}"
    trainer = "Trainer + DeepSpeed" if stack == "deepspeed" else "Trainer"
    as_it_comes = f"{trainer}, tied embeddings" if family == "t5" else trainer  # transformers 5 ties those of every T5
    names = {"trainer": as_it_comes, "tuned": f"{trainer}, same kernels", "minimal": "loop by hand on megatron-core"}
    found = []
    for key, value in result["ratio"].items():
        low, high = result["spread"][key]
        cells = (("speed", value, "of the other", (low, high)), ("recipe", result["ms"]["recipe"], "ms a step", None),
                 ("other", result["ms"][key], "ms a step", None))  # fmt: skip
        found += [
            Figure(section(family), f"{stack} to {names[key]}", metric, number, unit, "measured", source, around)
            for metric, number, unit, around in cells
        ]
    return found


def section(family: str) -> str:
    return f"Performance / {family.upper()} beside other loops"


TASKS = tuple(
    Task(f"alternatives_{family}", section(family), 55, partial(run, family))
    for family in families.names() if family in VOCABULARIES
)  # fmt: skip


def main() -> None:
    file, family, stack, steps, *overrides = sys.argv[1:]
    Path(file).write_text(json.dumps(measure(family, stack, int(steps), overrides)), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # worker threads of the stacks and of the Trainers outlive a normal exit


if __name__ == "__main__":
    main()
