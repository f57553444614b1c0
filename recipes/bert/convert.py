"""Hugging Face <-> Megatron: which parameter is which. The table serves the training state, exports and imports alike.

    python -m recipes.bert.convert to-hf RUN HF_DIR      the last checkpoint of a run of any stack, in Hugging Face form
    python -m recipes.bert.convert from-hf HF_DIR OUT    a run's starting point from a Hugging Face folder, for any stack
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from common import checkpoint, config, export, init, ranks, state
from common.errors import BadInput, exit_cleanly
from common.rules import Rule, Rules

from . import task


def qkv(heads: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Rows of q, k, v -> linear_qkv's: for each head its q, its k, its v."""
    return torch.stack([t.unflatten(0, (heads, -1)) for t in (q, k, v)], 1).flatten(0, 2)


def split_qkv(heads: int, mixed: torch.Tensor) -> Sequence[torch.Tensor]:
    """The inverse of qkv."""
    return [t.flatten(0, 1) for t in mixed.unflatten(0, (heads, 3, -1)).unbind(1)]


def _copy(name: str, rows: int | None = None) -> Rule:
    return Rule((name,), lambda tensor: [tensor], lambda tensor: tensor, rows=rows)


def rules(model: task.Model) -> Rules:
    """The table for a resolved model: global Megatron name -> Rule. KeyError for a name that is not in it."""
    outer, layer = _outer(model), _layer(model)

    def rule(name: str) -> Rule:
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if not match:
            return outer[name]
        number, part, leaf = match.groups()
        theirs = [f"bert.encoder.layer.{number}.{one}.{leaf}" for one in layer[part]]
        if len(theirs) == 1:
            return _copy(theirs[0])
        return Rule(tuple(theirs), partial(split_qkv, model.heads), partial(qkv, model.heads))

    return rule


def _layer(m: task.Model) -> dict[str, tuple[str, ...]]:
    """Parts of a layer in Megatron -> in transformers. Each has a weight and a bias."""
    table = {
        "self_attention.linear_qkv": tuple(f"attention.self.{one}" for one in ("query", "key", "value")),
        "self_attention.linear_proj": ("attention.output.dense",),
        "mlp.linear_fc1": ("intermediate.dense",),
        "mlp.linear_fc2": ("output.dense",),
    }
    if m.arch == "bert":
        return table | {"self_attn_bda.norm": ("attention.output.LayerNorm",), "mlp_bda.norm": ("output.LayerNorm",)}
    return table | {"input_layernorm": ("attention.ln",), "pre_mlp_layernorm": ("ln",)}


def _outer(m: task.Model) -> dict[str, Rule]:
    """What lies outside the layers."""
    embedding = _copy("bert.embeddings.word_embeddings.weight", m.vocab_size)
    table = {
        "embedding.word_embeddings.weight": embedding,
        "output_layer.weight": embedding,  # the copy on the last pipeline stage
        "output_layer.bias": _copy("cls.predictions.bias", m.vocab_size),
        "embedding.position_embeddings.weight": _copy("bert.embeddings.position_embeddings.weight"),
        "embedding.tokentype_embeddings.weight": _copy("bert.embeddings.token_type_embeddings.weight"),
    }
    both = {"lm_head.dense": "cls.predictions.transform.dense", "lm_head.layer_norm": "cls.predictions.transform.LayerNorm"}
    both |= {"pooler.dense": "bert.pooler.dense", "binary_head": "cls.seq_relationship"}
    if m.arch == "bert":
        both["embedding.embedding_dropout.0"] = "bert.embeddings.LayerNorm"
    else:
        both["encoder.final_layernorm"] = "bert.encoder.ln"
    for ours, theirs in both.items():
        table |= {f"{ours}.{leaf}": _copy(f"{theirs}.{leaf}") for leaf in ("weight", "bias")}
    return table


def to_hf(run: Path, folder: Path) -> None:
    """The last whole checkpoint of a run as a Hugging Face folder."""
    if not (run / "config.yaml").is_file():
        raise BadInput(f"{run}: holds no run (no config.yaml); give the OUT of a pretrain.sh")
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder}: is not empty; give a new folder")
    cfg = config.load(run / "config.yaml", [], task.Config)
    last = checkpoint.latest(run)
    if last is None:
        raise BadInput(f"{run}: holds no checkpoint yet; it is saved at train.save_every and after the last step")
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    export.write(last, cfg, task, folder, run / "tokenizer", facts)
    print(f"{folder}: step {last.step:,} of {run}")


def from_hf(folder: Path, out: Path, seed: int = 1234) -> None:
    """OUT/step_0 with the weights of a Hugging Face folder, and OUT/model.yaml, the `model` section to train it with.

    `pretrain.sh CONFIG OUT` of any stack goes on from there, if CONFIG has that section. seed: of heads that it lacks.
    """
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{out}: is not empty; give a new folder")
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: no config.json there; give a Hugging Face folder")
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if theirs.get("model_type") not in ("bert", "megatron-bert"):
        raise BadInput(f"{folder}: is a {theirs.get('model_type')!r} model; this family knows bert and megatron-bert")
    model = task.model_of(theirs)
    wrong = init.differences(theirs, task.hf_shapes(model))
    if wrong:
        raise BadInput([f"{folder}: has {difference}" for difference in wrong])
    anew = init.scratch(seed, lambda name: task.initial(model, name))  # an encoder alone: its heads
    source = init.from_hf(folder, task.stored_names, task.HEADS, anew)

    def entries() -> Iterator[checkpoint.Entry]:
        for name, shape in task.hf_parameters(model).items():
            yield name, state.parts_of(source(name, shape), None, None)

    ranks.quiet()
    ranks.start()
    science = {f"model.{key}": value for key, value in model.model_dump().items()}
    checkpoint.save(out, entries(), {"step": 0, "samples": 0, "stack": "huggingface", "science": science}, keep=1)
    config.write_section(out / "model.yaml", "model", model)
    print(f"{out}: step_0 and model.yaml, from {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.bert.convert", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    there = commands.add_parser("to-hf", help="the last checkpoint of a run of any stack, in Hugging Face form")
    there.add_argument("run", type=Path, metavar="RUN")
    there.add_argument("folder", type=Path, metavar="HF_DIR")
    back = commands.add_parser("from-hf", help="a run's starting point from a Hugging Face folder, for any stack")
    back.add_argument("folder", type=Path, metavar="HF_DIR")
    back.add_argument("out", type=Path, metavar="OUT")
    told = "of the heads that an encoder alone lacks (default: %(default)s)"
    back.add_argument("--seed", type=int, metavar="N", default=1234, help=told)
    given = parser.parse_args()
    if given.command == "to-hf":
        to_hf(given.run, given.folder)
    else:
        from_hf(given.folder, given.out, given.seed)


if __name__ == "__main__":
    exit_cleanly(main)
