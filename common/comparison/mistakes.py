"""Ten mistakes: the lines that a user reads here, and what the stacks do without this repository's checks (alone.py)."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import pictures
from common.comparison.figures import Figure, tables
from common.errors import BadInput
from common.paths import ROOT

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SECTION = "Ease of use"
LINES = f"{SECTION} / Lines of ten mistakes"
COMMAND = "python -m scripts.benchmark --parts ease_of_use"
CONFIG = """\
model: {{arch: gpt2, layers: 4, hidden: 64, heads: 4, vocab_size: 128}}
data: {{train: {folder}/train, seq_len: 32}}
optim: {{lr: 1.0e-3}}
train: {{steps: 2, global_batch: 8}}
deepspeed: {{micro_batch: 2, zero_stage: 1}}
megatron: {{micro_batch: 2}}
"""
TOKENS, VOCAB = 4000, 128
ENVIRONMENT = {  # quiet, and on CPUs wherever it runs
    "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "NPROC": "2",
}  # fmt: skip


class Mistake(NamedTuple):
    name: str  # in alone.py
    says: str  # a row of the table
    overrides: str  # that make it here, {stack} for the section; "": only the ranks can see it
    of_stack: dict[str, str] = {}  # where each stack has one of its own


MISTAKES = (
    Mistake("key", "misspelt key", "{stack}.micro_batchs=2"),
    Mistake("batch", "batch does not divide", "train.global_batch=7"),
    Mistake("heads", "tp above the heads", "model.heads=1 {stack}.tp=2"),
    Mistake("ids", "token ids above the vocabulary", "model.vocab_size=100 {stack}.tp=2"),
    Mistake("corpus", "no such corpus", "data.train=nowhere"),
    Mistake("positions", "samples longer than positions", "model.positions=16"),
    Mistake(
        "pipeline", "a pipeline that cannot be", "",
        {"deepspeed": "deepspeed.zero_stage=3 deepspeed.pp=2", "megatron": "megatron.vpp=2"},
    ),
    Mistake("folder", "no such folder to start from", "init.from=nowhere"),
    Mistake("nan", "NaN in the first weights", ""),
    Mistake("byte", "a changed byte in a checkpoint", ""),
)  # fmt: skip

FOUND_BY_RANKS = ("nan", "byte")


def figures(stacks: Iterable[str], folder: Path) -> Iterator[Figure]:
    chosen = [stack for stack in stacks if stack != "baseline"]
    if not chosen:
        return
    attempts = [*by_launcher(chosen, folder), *by_ranks(chosen, folder)]
    for mistake in MISTAKES:
        for stack in chosen:
            for row in (row for row in attempts if (row["mistake"], row["stack"]) == (mistake.name, stack)):
                lines = row["lines"] if row["code"] else None
                source = COMMAND if row["code"] else f"no error, so no lines; {COMMAND}"
                if row["where"] == "here" and mistake.name in FOUND_BY_RANKS:
                    source = f"of one rank, which finds it; {COMMAND}"
                yield Figure(
                    f"{SECTION} / Lines of ten mistakes",
                    mistake.says,
                    f"{stack} {row['where']}",
                    lines,
                    "lines",
                    "measured",
                    source,
                )
                if row["where"] == "alone":
                    table = f"{SECTION} / Ten mistakes without these recipes"
                    yield Figure(table, mistake.says, stack, row["does"], "", "measured", COMMAND)


def by_launcher(stacks: Iterable[str], folder: Path) -> Iterator[dict[str, Any]]:
    """The mistakes that a launch script finds before it starts a rank."""
    config = make_inputs(folder)
    for stack in stacks:
        for mistake in MISTAKES:
            overrides = mistake.of_stack.get(stack, mistake.overrides).format(stack=stack).split()
            if overrides:
                command = [sys.executable, "-m", "common.launch", f"recipes.gpt.{stack}.pretrain", str(config)]
                done = _run([*command, str(folder / "refused"), *overrides])
                lines = done.stderr.splitlines()
                yield {"mistake": mistake.name, "stack": stack, "where": "here", "code": done.returncode, "lines": len(lines)}


def make_inputs(folder: Path) -> Path:
    """A config and its corpus of random ids."""
    import numpy as np

    from common.data.indexed_dataset import IndexedDatasetWriter, write_manifest

    writer = IndexedDatasetWriter(folder / "train", np.uint16)
    for document in np.random.default_rng(0).integers(0, VOCAB, (TOKENS // 400, 400)):
        writer.add(document)
    writer.finish()
    write_manifest(folder / "train", {"tokenizer_size": VOCAB, "tokenizer_hash": "a" * 64})
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder), encoding="utf-8")
    return config


def by_ranks(stacks: Iterable[str], folder: Path) -> Iterator[dict[str, Any]]:
    """The others, and all of them without this repository: in processes forked from one that has imported the stacks."""
    done = _run([sys.executable, "-m", "common.comparison.alone", str(folder), *stacks])
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = [row for row in rows if row["mistake"] == "none" and row["code"]]
    if done.returncode or failed:
        raise BadInput(f"the attempts without a mistake failed: {failed or done.stderr.strip().rpartition(chr(10))[2]}")
    return (row for row in rows if row["mistake"] != "none")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "NNODES")} | ENVIRONMENT
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def draw(figures: Sequence[Figure]) -> "Drawing | None":
    """A dot for each mistake and stack, a cross without these recipes, or the words that it trains on."""
    table = next((table for table in tables(figures) if table.section == LINES), None)
    if table is None:
        return None
    drawing, axes = pictures.new(height=0.4 * len(table.rows) + 0.8)
    for column in table.columns:
        stack, where = column.split()
        for row, subject in enumerate(table.rows):
            figure = table.cells.get((subject, column))
            if figure is None:
                continue
            colour = pictures.STACK_COLOURS[stack]
            at = row + (0.15 if stack == "megatron" else -0.15)  # both stacks of one mistake stand apart
            if figure.value is None:
                axes.text(200, at, "trains on", color=colour, va="center")
            else:
                marker = "o" if where == "here" else "x"
                axes.plot(figure.value, at, marker, color=colour)
    axes.set_xscale("log")
    axes.set_xlim(0.8, 900)
    axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    axes.set_xlabel("lines")
    axes.set_yticks(range(len(table.rows)), table.rows)
    axes.invert_yaxis()
    handles = [
        axes.plot([], [], marker, color=pictures.STACK_COLOURS[stack], label=f"{stack}, {words}")[0]
        for stack in dict.fromkeys(column.split()[0] for column in table.columns)
        for marker, words in (("o", "these recipes"), ("x", "without them"))
    ]
    drawing.legend(handles=handles, loc="outside lower center", ncols=2)
    return drawing
