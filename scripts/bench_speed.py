"""Measure the speed of a recipe's step, compared with transformers.Trainer.

    python -m scripts.bench_speed [--families F ...] [--stacks S ...] [--steps N] [--threads N] [--out FILE]

There is one process per family and stack, on the GPU if there is one. It runs the recipe's own pretrain.py. Before each step of
the recipe the other loops make one step on the same samples, from the same initial values, so that drift of the machine affects
all loops equally. The result is the median over the rounds of (the other loop's time / the recipe's time in that round), with
the quartiles: 1.00 is equal, and below 1 the recipe is slower. The recipe's time includes all that it does between two steps:
reading the samples, the update, the log line, metrics.jsonl and TensorBoard. The Trainers get their samples from memory, and
log every 500 steps.

  trainer   transformers.Trainer with the class that loads the recipe's export; for DeepSpeed with the recipe's configuration
  tuned     the same with the recipes' kernels: AdamW(fused=True), GELU as one kernel, SDPA, the head on the targets only
  minimal   for GPT on Megatron: a loop written by hand over Megatron Core, with the recipe's AdamW kernel

The corpus is the beginning of the family's quickstart corpus. --finetune DIR compares finetuning on MRPC instead, BERT's recipe
with a Trainer that groups samples by length, over one epoch; DIR holds glue/MRPC and tokenizers/bert. --startup measures the
seconds from the start of the process to the end of the first step, of recipe and Trainer, in alternating processes.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import config as configs, families
from common.errors import BadInput, exit_cleanly
from common.launch import processes
from common.preflight import task_module

if TYPE_CHECKING:
    import torch

    from common.preflight import Run
    from scripts.bench_loops import Arrays, Step

ROOT = Path(__file__).resolve().parents[1]
STACKS = ("baseline", "deepspeed", "megatron")
GOALS = {"trainer": 1.10, "tuned": 1.0, "minimal": 0.97}
# Vocabularies of the published models, except GPT's, where a vocabulary of 50,257 would take half of the step.
VOCABULARIES = {"gpt": 4096, "bert": 30_522, "t5": 32_128}
ARCHITECTURES = {"gpt": "gpt2", "bert": "bert", "t5": "t5_v1_1"}
WARMUP = 3  # rounds
CORPUS_MB = 2


class Enough(Exception):
    """All rounds are done."""


def make_corpus(family: str, prefix: Path) -> None:
    """Make the beginning of the family's corpus by the command in its quickstart.yaml."""
    path = ROOT / "recipes" / family / "configs" / "quickstart.yaml"
    cfg = configs.load(path, [], task_module(family, {}).Config)
    if cfg.quickstart is None:
        raise BadInput(f"{path}: has no quickstart.corpus, the command that makes the family's corpus")
    module, _, *options = cfg.quickstart.corpus_words
    command = [sys.executable, "-m", module, str(prefix), *options, "--max-mb", str(CORPUS_MB)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def overrides_of(family: str, args: argparse.Namespace, corpus: Path) -> list[str]:
    """What a run differs in from the family's tiny.yaml: the shape, one micro batch per step, and no end."""
    hidden, layers = args.hidden, args.layers
    values = [
        f"model.layers={layers}", f"model.hidden={hidden}", f"model.heads={args.heads}", f"data.seq_len={args.seq_len}",
        f"data.train={corpus / 'train'}", "data.valid=null", "train.steps=1000000", f"train.global_batch={args.batch}",
        f"model.vocab_size={args.vocab or VOCABULARIES.get(family, 32_000)}", "train.save_every=0", "optim.lr=3e-4",
        "optim.warmup_steps=10", *(f"{stack}.micro_batch={args.batch}" for stack in STACKS),
    ]  # fmt: skip
    if family in ARCHITECTURES:
        values.append(f"model.arch={ARCHITECTURES[family]}")
    if family == "t5":
        values += [
            f"model.decoder_layers={layers}", f"model.kv_channels={hidden // args.heads}", f"model.ffn={hidden * 8 // 3}",
            f"data.target_len={max(16, args.seq_len // 4)}",
        ]  # fmt: skip
    return values


# ---- in a process of its own -----------------------------------------------------------------------------------------


class Rounds:
    """The seconds and losses of every step, by the name of the loop."""

    def __init__(self, family: str, stack: str, rounds: int, finetuning: bool = False):
        self.family, self.stack, self.rounds, self.finetuning = family, stack, rounds, finetuning
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
            self._add("recipe", self._clock(device) - self.step_start, None)
        done = len(self.seconds.get("recipe", []))
        if done == self.rounds:
            raise Enough
        order = list(self.others) if done % 2 else list(self.others)[::-1]
        for name in order:
            start = self._clock(device)
            loss = self.others[name](self.arrays[done] if self.arrays else {})
            self._add(name, self._clock(device) - start, loss)
        self.step_start = self._clock(device)

    def _other_loops(self, run: "Run", device: "torch.device") -> "dict[str, Step]":
        from scripts import bench_loops

        if self.finetuning:
            return {"trainer": bench_loops.finetuning_trainer(run, self.rounds)}
        if run.train is None:
            raise AssertionError("a run that started has a dataset")
        task = task_module(self.family, {})
        self.arrays = [run.train.collate(run.samples(step)) for step in range(1, self.rounds + 1)]
        ds_config = None
        if self.stack == "deepspeed":
            from common.stacks import zero

            ds_config = zero.ds_config(run.cfg, run.layout)
        loops = {
            name: bench_loops.trainer(run, task, ds_config, self.arrays, tuned=name == "tuned") for name in ("trainer", "tuned")
        }
        if (self.family, self.stack) == ("gpt", "megatron"):
            loops["minimal"] = bench_loops.minimal_megatron(run, processes.Ranks(0, 1, device))
        return loops

    def _add(self, name: str, seconds: float, loss: float | None) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        self.losses.setdefault(name, []).extend([] if loss is None else [loss])

    @staticmethod
    def _clock(device: "torch.device") -> float:
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
        return time.perf_counter()


def measure(
    family: str, stack: str, config: Path, overrides: Sequence[str], steps: int, threads: int | None, kind: str = "pretrain"
) -> dict[str, Any]:
    """Run one recipe with the other loops in between. A process can call this only once. kind: or "finetune"."""
    processes.quiet()
    import torch

    if threads:
        torch.set_num_threads(threads)
    recipe = importlib.import_module(f"recipes.{family}.{stack}.{kind}")
    rounds = Rounds(family, stack, WARMUP + steps, finetuning=kind == "finetune")

    class Interleaved(recipe.Log):
        def begin_step(self) -> None:
            rounds.before_step(self.run, self.device)
            super().begin_step()

        def step(self, step: int, loss: float, *values: Any, **parts: float) -> None:
            super().step(step, loss, *values, **parts)
            rounds.losses.setdefault("recipe", []).append(loss)

    recipe.Log = Interleaved
    with tempfile.TemporaryDirectory() as folder:
        try:
            recipe.main([str(config), folder, *overrides])
        except Enough:
            pass
    seconds = {name: values[WARMUP:] for name, values in rounds.seconds.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    others = {name: values for name, values in seconds.items() if name != "recipe"}
    return {
        "family": family, "stack": stack, "device": device, "torch": torch.__version__, "steps": steps,
        "overrides": list(overrides),
        **_ratios(others, seconds["recipe"], kind),
        "ms": {name: statistics.median(values) * 1e3 for name, values in seconds.items()},
        "seconds": seconds,
        "loss": {name: [values[0], values[-1]] for name, values in rounds.losses.items()},
    }  # fmt: skip


def _ratios(others: dict[str, list[float]], recipe: list[float], kind: str) -> dict[str, dict[str, Any]]:
    """{"ratio": {loop: ...}, "spread": {loop: [low, high]}}. In finetuning the batches of two loops differ from step to step:
    there the ratio is that of the sums, and the spread that of four parts of the epoch."""
    if kind == "pretrain":
        return {
            "ratio": {name: ratio(values, recipe) for name, values in others.items()},
            "spread": {name: spread(values, recipe) for name, values in others.items()},
        }
    size = max(1, len(recipe) // 4)
    parts = {
        name: [sum(values[i : i + size]) / sum(recipe[i : i + size]) for i in range(0, size * 4, size)]
        for name, values in others.items()
    }
    return {
        "ratio": {name: sum(values) / sum(recipe) for name, values in others.items()},
        "spread": {name: [min(values), max(values)] for name, values in parts.items()},
    }


def finetuning_of(source: Path, folder: Path, args: argparse.Namespace) -> tuple[Path, list[str], int]:
    """(config, overrides, steps) of one epoch of MRPC, from an untrained BERT of the shape that `args` gives."""
    from transformers import BertConfig, BertForMaskedLM

    from common.data import tokenizer

    tokens = tokenizer.load(source / "tokenizers/bert")
    shape = BertConfig(
        vocab_size=tokens.size, num_hidden_layers=args.layers, hidden_size=args.hidden, num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden,
    )  # fmt: skip
    BertForMaskedLM(shape).save_pretrained(folder)
    tokens.save(folder)
    overrides = [
        f"init.from={folder}", f"task.data={source / 'glue/MRPC'}", "train.steps=1000000", "train.eval_every=0",
        "train.save_every=0", "baseline.micro_batch=32", "deepspeed.micro_batch=32", "megatron.micro_batch=32",
    ]  # fmt: skip
    return ROOT / "recipes/bert/configs/finetune_mrpc.yaml", overrides, 101 - WARMUP  # 3,260 samples, since 408 are dev


def first_step(family: str, stack: str, config: Path, overrides: Sequence[str], loop: str) -> float:
    """Start the recipe or the Trainer; returns the time at which its first step ends, in seconds since the epoch.

    The Trainer gets the samples of one step from memory and transformers' own initial values, and checks nothing.
    """
    if loop == "recipe":
        processes.quiet()
        recipe = importlib.import_module(f"recipes.{family}.{stack}.pretrain")

        class First(recipe.Log):
            def step(self, *values: Any, **parts: float) -> None:
                raise Enough

        recipe.Log = First
        with tempfile.TemporaryDirectory() as folder:
            try:
                recipe.main([str(config), folder, *overrides])
            except Enough:
                return time.time()
        raise AssertionError("the recipe ended before its first step")
    import torch
    import transformers

    from scripts.bench_loops import trainer_fields

    task = task_module(family, {})
    cfg = configs.resolve(configs.load(config, overrides, task.Config), task.ResolvedConfig, None)
    net = getattr(transformers, task.hf_class_name(cfg.model))(task.hf_config(cfg.model))
    fields = trainer_fields(task.dataset(cfg, cfg.data.train, True).collate(range(cfg.train.global_batch)))
    samples = [{name: torch.as_tensor(rows[i]) for name, rows in fields.items()} for i in range(cfg.train.global_batch)]
    more: dict[str, Any] = {}
    if stack == "deepspeed":
        from common.layout import layout_for
        from common.stacks import zero

        more["deepspeed"] = zero.ds_config(cfg, layout_for(cfg, stack, 1))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=len(samples), max_steps=1, use_cpu=not torch.cuda.is_available(),
            save_strategy="no", report_to="none", disable_tqdm=True, **more,
        )  # fmt: skip
        transformers.Trainer(net, arguments, train_dataset=samples).train()
    return time.time()


def ratio(other: Sequence[float], recipe: Sequence[float]) -> float:
    """The speed of the recipe relative to the other loop: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(other, recipe, strict=True))


def spread(other: Sequence[float], recipe: Sequence[float]) -> list[float]:
    """The quartiles of the ratios of the rounds, [first, third]."""
    ratios = [a / b for a, b in zip(other, recipe, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return [low, high]


# ---- all of them -----------------------------------------------------------------------------------------------------


def missed(result: dict[str, Any]) -> list[str]:
    """The goals that a result does not reach, one line each."""
    name, ratios = f"{result['family']} on {result['stack']}", result["ratio"]
    return [f"{name}: {ratios[key]:.3f} of {key}, goal {goal}" for key, goal in GOALS.items() if ratios.get(key, goal) < goal]


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = ["| recipe | of trainer | of tuned | of minimal | ms/step |", "|---|---|---|---|---|"]
    for r in results:
        cells = [
            f"{r['ratio'][name]:.3f} ({r['spread'][name][0]:.2f}-{r['spread'][name][1]:.2f})" if name in r["ratio"] else ""
            for name in GOALS
        ]
        lines.append(f"| {r['family']} {r['stack']} | {' | '.join(cells)} | {r['ms']['recipe']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--families", nargs="+", choices=families.names(), default=families.names(), metavar="F")
    p.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    p.add_argument("--steps", type=int, default=20, help=f"measured rounds, after {WARMUP} rounds of warmup")
    p.add_argument("--threads", type=int, help="threads of torch on a CPU (default: all cores)")
    p.add_argument("--out", type=Path, help="also write the results to this file, as JSON")
    p.add_argument("--corpora", type=Path, help="keep the corpora in this folder (default: a temporary one)")
    for name, value in {"layers": 6, "hidden": 384, "heads": 6, "seq_len": 256, "batch": 8}.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    p.add_argument("--vocab", type=int, help=f"ids (default: {VOCABULARIES})")
    p.add_argument("--finetune", type=Path, metavar="DIR", help="measure finetuning on MRPC")
    p.add_argument("--startup", action="store_true", help="measure the seconds to the end of the first step")
    # measure one family and stack in this process; with --startup only this loop
    p.add_argument("--child", choices=("recipe", "trainer"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.steps < 2:
        raise BadInput(f"--steps {args.steps}: must be 2 or more")
    if args.child:
        family, stack = args.families[0], args.stacks[0]
        config = ROOT / "recipes" / family / "configs" / "tiny.yaml"
        overrides = overrides_of(family, args, args.corpora / family)
        result: Any
        if args.finetune:
            with tempfile.TemporaryDirectory() as folder:
                config, overrides, steps = finetuning_of(args.finetune.resolve(), Path(folder), args)
                result = measure(family, stack, config, overrides, steps, args.threads, "finetune")
        elif args.startup:
            result = first_step(family, stack, config, overrides, args.child)
        else:
            result = measure(family, stack, config, overrides, args.steps, args.threads)
        args.out.write_text(json.dumps(result), encoding="utf-8")
        sys.stdout.flush()
        os._exit(0)  # worker threads of the stacks and of the Trainers outlive a normal exit
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        corpora = args.corpora or Path(temporary)
        for family in ["bert"] if args.finetune else args.families:
            if not args.finetune and not (corpora / family).is_dir():
                make_corpus(family, corpora / family)
            for stack in [stack for stack in families.stacks(family) if stack in args.stacks]:
                results.append(
                    startup(family, stack, args, corpora) if args.startup else child(family, stack, corpora, "recipe")
                )
                shown = {name: round(value, 3) for name, value in results[-1]["ratio"].items()}
                print(f"{family} {stack}: {json.dumps(shown)}", file=sys.stderr, flush=True)
    print(table(results))
    if not args.startup and not args.finetune:
        print(*[line for result in results for line in missed(result)], sep="\n")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def child(family: str, stack: str, corpora: Path, loop: str) -> Any:
    """What a process of its own measures of one family and stack."""
    with tempfile.TemporaryDirectory() as folder:
        result_file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "scripts.bench_speed", *sys.argv[1:], "--families", family, "--stacks", stack]
        command += ["--corpora", str(corpora), "--out", str(result_file), "--child", loop]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise BadInput(f"{family} on {stack}: the measurement ended with exit code {done.returncode}; its output is above")
        return json.loads(result_file.read_text(encoding="utf-8"))


def startup(family: str, stack: str, args: argparse.Namespace, corpora: Path) -> dict[str, Any]:
    """Seconds from the start of a process to the end of its first step, of --steps processes of each loop in turn."""
    seconds: dict[str, list[float]] = {"recipe": [], "trainer": []}
    for _ in range(args.steps):
        for loop, values in seconds.items():
            start = time.time()
            values.append(child(family, stack, corpora, loop) - start)
    trainer, recipe = seconds["trainer"], seconds["recipe"]
    return {
        "family": family, "stack": stack, "steps": args.steps, "seconds": seconds,
        "ratio": {"trainer": ratio(trainer, recipe)}, "spread": {"trainer": spread(trainer, recipe)},
        "ms": {name: statistics.median(values) * 1e3 for name, values in seconds.items()},
    }  # fmt: skip


if __name__ == "__main__":
    exit_cleanly(main)
