"""Small models of every family, and the beginning of their corpora: what is compared where no config is given.

python -m common.comparison.small TOKENIZER FOLDER LAYERS HIDDEN HEADS    writes an untrained BERT with this tokenizer
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from common import config as configs
from common.config import STACKS
from common.errors import BadInput
from common.launch.launcher import visible_gpus
from common.paths import ROOT
from common.preflight import task_module

ARCHITECTURES = {"gpt": "gpt2", "bert": "bert", "t5": "t5_v1_1"}  # of a family that has several
CORPUS_MB = 1


class Shape(NamedTuple):
    """Of a model, and of its samples."""

    layers: int  # of T5, half of them in the encoder and half in the decoder
    hidden: int
    heads: int
    seq_len: int
    batch: int  # samples of a step, on all ranks
    micro_batch: int
    vocab: int


def has_gpu() -> bool:
    return visible_gpus(os.environ) > 0


def config_of(family: str) -> Path:
    return ROOT / "recipes" / family / "configs" / "tiny.yaml"


def make_corpus(family: str, folder: Path, ids: int | None = None) -> None:
    """Make the beginning of the family's corpus by the command in its quickstart.yaml. ids: of its tokenizer, without T5's
    sentinels."""
    path = ROOT / "recipes" / family / "configs" / "quickstart.yaml"
    cfg = configs.load(path, [], task_module(family, {}).Config)
    if cfg.quickstart is None:
        raise BadInput(f"{path}: has no quickstart.corpus, the command that makes the family's corpus")
    module, _, *options = cfg.quickstart.corpus_words
    command = [sys.executable, "-m", module, str(folder), *options, "--max-mb", str(CORPUS_MB)]
    call([*command, "--vocab-size", str(ids)] if ids else command)


def make_bert(tokenizer: Path, folder: Path, shape: Shape) -> None:
    """Write the Hugging Face folder of an untrained BERT with this tokenizer."""
    words = [str(word) for word in (tokenizer, folder, shape.layers, shape.hidden, shape.heads)]
    call([sys.executable, "-m", "common.comparison.small", *words])


def call(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"{' '.join(command[1:])}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")


def overrides_of(family: str, shape: Shape, corpus: Path) -> list[str]:
    """What a run differs in from the family's tiny.yaml: the shape, the corpus, no validation, and no end."""
    layers = shape.layers // 2 if family == "t5" else shape.layers
    values = [
        f"model.layers={layers}", f"model.hidden={shape.hidden}", f"model.heads={shape.heads}",
        f"model.vocab_size={shape.vocab}", f"data.seq_len={shape.seq_len}", f"data.train={corpus / 'train'}", "data.valid=null",
        f"train.global_batch={shape.batch}", "train.steps=1000000", "train.save_every=0",
        *(f"{stack}.micro_batch={shape.micro_batch}" for stack in STACKS),
    ]  # fmt: skip
    if family in ARCHITECTURES:
        values.append(f"model.arch={ARCHITECTURES[family]}")
    if family == "t5":
        values += [
            f"model.decoder_layers={layers}", f"model.kv_channels={shape.hidden // shape.heads}",
            f"model.ffn={shape.hidden * 8 // 3}", f"data.target_len={max(16, shape.seq_len // 4)}",
        ]  # fmt: skip
    return values


def main() -> None:
    source, folder, layers, hidden, heads = sys.argv[1:]
    from transformers import BertConfig, BertForMaskedLM

    from common.data import tokenizer

    tokens = tokenizer.load(Path(source))
    model = BertConfig(
        vocab_size=tokens.size, num_hidden_layers=int(layers), hidden_size=int(hidden), num_attention_heads=int(heads),
        intermediate_size=4 * int(hidden),
    )  # fmt: skip
    BertForMaskedLM(model).save_pretrained(folder)
    tokens.save(Path(folder))


if __name__ == "__main__":
    main()
