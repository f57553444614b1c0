"""How padding and tokens are spread over data-parallel ranks, counted on the batches that the recipes' own data pipeline gives.

Samples are of unequal length, so that ranks with equally many samples have unequally many tokens. Where a micro batch is padded
to a fixed length, all ranks still compute the same; where it is padded to its longest sample, they do not, and wait.
"""

import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import config as configs
from common.comparison.figures import Figure, Options
from common.data import batches
from common.errors import BadInput
from common.paths import ROOT
from common.preflight import prepare, task_module
from common.yaml_files import read_yaml

SECTION = "Load balance / Tokens of data-parallel ranks"
RANKS = (2, 8)
STEPS, BATCH = 200, 32
MAX_MB = 2  # of text
BOOKS_VOCAB = 4096  # ids of the tokenizer of the books


class Data(NamedTuple):
    """A kind of samples: a config, with overrides."""

    name: str
    family: str
    config: str
    overrides: Sequence[str]


class Spread(NamedTuple):
    """Of all steps: tokens and computed positions of each rank, (steps, ranks)."""

    tokens: np.ndarray
    positions: np.ndarray

    @property
    def padding(self) -> float:
        """Share of the computed positions that hold no token."""
        return float(1 - self.tokens.sum() / self.positions.sum())


def positions(batch: batches.MicroBatch) -> int:
    """Positions that a model computes for a micro batch, padding among them."""
    names = ("inputs", "targets") if "inputs" in batch else ("loss_mask",) if "loss_mask" in batch else ("tokens",)
    return sum(batch[name].size for name in names)


def fullest(counts: np.ndarray) -> np.ndarray:
    """(steps, ranks) -> of each step, the largest count of a rank to the mean of all."""
    ratios: np.ndarray = counts.max(axis=1) / counts.mean(axis=1)
    return ratios


def spread(data: Data, ranks: int, steps: int, folder: Path) -> Spread:
    """Count the tokens that each of `ranks` replicas gets in each of `steps` steps of BATCH samples."""
    config = str(ROOT / "recipes" / data.family / "configs" / data.config)
    words = [*data.overrides, f"train.global_batch={BATCH}", f"train.steps={steps}", "baseline.micro_batch=4"]
    run = prepare(config, str(folder / "unused"), words, "baseline", task_module(data.family, read_yaml(config)), ranks)
    if run.train is None:
        raise BadInput(f"{config}: has no training data")
    tokens, computed = np.zeros((2, steps, ranks))
    for step in range(steps):
        for rank in range(ranks):
            for batch in batches.for_step(run.train, run.samples(step + 1), run.layout, rank):
                tokens[step, rank] += batch["lengths"].sum()
                computed[step, rank] += positions(batch)
    return Spread(tokens, computed)


# ---- the data


def corpora(options: Options, folder: Path) -> list[Data]:
    """Pretraining of BERT and T5 on texts of --source, or else on the text of their quickstart; and GPT's finetuning on
    conversations (SFT), packed, sorted by length, and neither."""
    found = []
    for family in ("bert", "t5"):
        corpus = folder / family
        _make(_command(family, corpus, options.source))
        split = [f"data.train={corpus / 'train'}", "data.valid=null"]
        found.append(Data({"bert": "BERT", "t5": "T5"}[family], family, "quickstart.yaml", split))
    chats, text = folder / "chats", folder / "gpt"
    _make(["-m", "data.python_chat", str(chats)])
    _make(["-m", "data.python_docs", str(text), "--max-mb", "1", "--vocab-size", "4096"])
    words = [
        "init.from=scratch", f"data.tokenizer={text / 'tokenizer'}", f"task.data={chats}", "model.layers=2", "model.hidden=64",
        "model.heads=2",
    ]  # fmt: skip
    ways = {"packed": [], "by length": ["data.pack=false"], "as drawn": ["data.pack=false", "data.length_window=0"]}
    return found + [Data(f"SFT, {name}", "gpt", "finetune_cpu.yaml", [*words, *more]) for name, more in ways.items()]


def _command(family: str, corpus: Path, source: Path | None) -> list[str]:
    """The command of the family's corpus: of Project Gutenberg's books in `source`, else as in its quickstart.yaml."""
    path = ROOT / "recipes" / family / "configs" / "quickstart.yaml"
    cfg = configs.load(path, [], task_module(family, {}).Config)
    if cfg.quickstart is None:
        raise BadInput(f"{path}: has no quickstart.corpus, the command that makes the family's corpus")
    module, _, *words = cfg.quickstart.corpus_words
    books = source / "gutenberg" if source else None
    if books and books.is_dir():
        module, words = "data.text", [*words, "--source", str(books), "--vocab-size", str(BOOKS_VOCAB)]
    return ["-m", module, str(corpus), *words, "--max-mb", str(MAX_MB)]


def _make(arguments: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"python {' '.join(arguments)}: ended with code {done.returncode}: {done.stderr.strip()[-300:]}")


def balance_data(options: Options, folder: Path) -> list[Figure]:
    source = "python -m scripts.benchmark --parts balance_data"
    if options.source:
        source += " --source DIR"
    figures = []
    for data in corpora(options, folder):
        for ranks in RANKS:
            found = spread(data, ranks, STEPS, folder)
            columns = {
                "padding": (100 * found.padding, "%"),
                "tokens, fullest / mean": (statistics.median(fullest(found.tokens)), ""),
                "tokens, worst step": (fullest(found.tokens).max(), ""),
                "computed, fullest / mean": (statistics.median(fullest(found.positions)), ""),
                "computed, worst step": (fullest(found.positions).max(), ""),
            }
            for metric, (value, unit) in columns.items():
                figures.append(Figure(SECTION, f"{data.name}, dp={ranks}", metric, float(value), unit, "counted", source))
    return figures
