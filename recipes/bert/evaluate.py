"""An export with a head on the dev set of its task, in plain transformers: what scripts/evaluate.py calls for such models."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common import config
from common.errors import BadInput
from common.hf_folder import whole_weights
from common.ranks import Ranks
from common.run import read_object

from . import finetune, kinds

PUBLIC_DEV_ALONE = ("squad", "squad2")
SEQ_LEN = {"squad": 384, "squad2": 384, "race": 512}  # of the others 128


def tasks_of(architecture: str) -> list[str]:
    """The tasks of a class of transformers; none of one without such a head."""
    return [name for name, kind in kinds.KIND_OF.items() if architecture.endswith(kinds.KINDS[kind].export_class)]


def settings(given: Path, folder: Path, name: str, data: Path | None, seq_len: int | None, split: str) -> finetune.Config:
    """The config of the run where `given` is one of this task, else one of the task's defaults."""
    known = config.read_yaml(given / "config.yaml") if (given / "config.yaml").is_file() else {}
    own = isinstance(known.get("task"), dict) and known["task"].get("name") == name
    stored = read_object(folder / "config.json") or {}
    task = dict(known["task"]) if own else {"name": name}
    if name == "ner" and not own:
        task["tags"] = [label for _, label in sorted((stored.get("id2label") or {}).items(), key=lambda item: int(item[0]))]
    positions = stored.get("max_position_embeddings") or 512
    length = seq_len or (known["data"]["seq_len"] if own and "data" in known else min(positions, SEQ_LEN.get(name, 128)))
    cfg = finetune.Config.model_validate(
        {
            "init": {"from": str(folder)}, "task": task | ({"data": str(data)} if data else {}),
            "data": {"seq_len": length, "valid": split}, "optim": {"lr": 1e-5}, "train": {"steps": 1, "global_batch": 1},
        }
    )  # fmt: skip
    least = kinds.least_seq_len(cfg.task)
    if length < least:
        beside = f"a context beside a question of {cfg.task.question_len} tokens (task.question_len)"
        has = f"; the model has {positions} positions: finetune it with shorter questions" if positions < least else ""
        raise BadInput(f"--seq-len {length}: leaves no room for {beside}; give --seq-len {least} or more{has}")
    model = cfg.model.resolve(cfg, None)
    head, held = model.does.parameter, {}
    whole_weights(folder, str(folder), held)
    outputs = held[f"{head}.weight"][0] if f"{head}.weight" in held else 0
    if outputs != len(model.labels):
        told = f"its head has {outputs} outputs, {name} wants {len(model.labels)}"
        raise BadInput(f"{folder}: {told}; finetune it on {name} first")
    named = [label for _, label in sorted((stored.get("id2label") or {}).items(), key=lambda item: int(item[0]))]
    if named != model.labels and not all(label.startswith("LABEL_") for label in named):
        told = f"{', '.join(named)}; they are taken for {name}'s, {', '.join(model.labels)}, in this order"
        print(f"note: {folder}: its head's labels are {told}", file=sys.stderr)
    return cfg.model_copy(update={"model": model})


def predict(
    net: Any, cfg: finetune.Config, examples: kinds.Kind, batch: int, limit: int | None, ranks: Ranks,
    tell: Callable[[int], None],
) -> np.ndarray:  # fmt: skip
    """Predictions (n, width) of the first n examples. Each is done once, by one rank, in the same batches whatever the number
    of ranks: so 2 ranks give what 1 gives, bit for bit. tell: is given the number of each batch."""
    import torch
    import torch.distributed as dist

    does, n = cfg.model.does, min(limit or len(examples), len(examples))
    ordered = examples.arrange(range(n))
    found = torch.zeros(n, does.width(cfg), dtype=torch.float64, device=ranks.device)
    for number in range(ranks.rank, -(-n // batch), ranks.world):
        tell(number)
        rows = examples.rows(ordered[number * batch : (number + 1) * batch])
        given = finetune.batch(rows, ranks.device)
        mask = given["attention_mask"].long()  # (B, T), as plain transformers takes it
        with torch.no_grad():
            output = net(given["tokens"], token_type_ids=given["token_types"], attention_mask=mask)
        said = does.predictions(finetune.logits_of(output).float(), given)
        found[rows["places"], : said.shape[1]] = said.double()
    if ranks.world > 1:
        dist.all_reduce(found)  # each value and zeros: exact
    return found.cpu().numpy()


def write_predictions(cfg: finetune.Config, examples: kinds.Kind, predictions: np.ndarray, out: Path) -> list[Path]:
    """The files of out/predictions; of test, and of the first examples alone, those of a folder there: none replaces
    finetuning's own answers on dev."""
    part = f"first_{len(predictions)}" if len(predictions) < len(examples) else ""
    folder = out / "predictions" / ("test" if cfg.data.valid == "test" else "") / part
    folder.mkdir(parents=True, exist_ok=True)
    files = examples.files(predictions)
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [folder / file for file in files]


def is_unanswered(cfg: finetune.Config) -> bool:
    """Are the answers of this split not known?"""
    return cfg.data.valid == "test" and cfg.model.kind == "text"


def scores(cfg: finetune.Config, examples: kinds.Kind, predictions: np.ndarray) -> list[dict[str, Any]]:
    """Rows of eval.json."""
    n, whole = len(predictions), len(examples)
    part = "" if n == whole else f", the first {n:,} of {whole:,} {examples.unit}"
    notes = "".join(f"; {note}" for note in examples.notes)
    how = f"{cfg.task.name} {cfg.data.valid}{part}, {cfg.data.seq_len} tokens{notes}"
    counts = examples.counts(n)
    return [
        {"metric": name, "value": value, "n": counts.get(name, examples.scored(n)), "protocol": how}
        for name, value in examples.metrics(predictions).items()
    ]
