"""Loss of a run's export on held-out text, by plain `transformers` in one process: no stack, no recipe's model code.

python -m scripts.heldout RUN... [--data PREFIX] [--samples N|all]

RUN is an OUT folder of pretrain.sh that has its export, OUT/hf. The text is the run's own data.valid and
train.eval_samples, so that the value must be the run's last validation loss. It is recorded in OUT/hf/heldout.json and
not computed twice.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from common import config
from common.checkpoints import integrity
from common.config import Config
from common.contract import Dataset, PretrainingFamily
from common.errors import BadInput, exit_cleanly
from common.json_files import is_count, read_object
from common.preflight import task_module
from common.yaml_files import read_yaml
from scripts.check import read_json

TOKENS_AT_ONCE = 4096  # of one forward pass


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.heldout", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data", metavar="PREFIX", help="another corpus of the same tokenizer")
    parser.add_argument("--samples", metavar="N", help="how many of it, or all (default: the run's eval_samples)")
    args = parser.parse_args()
    samples = whole_number(args.samples)
    for run in map(Path, args.runs):
        start = time.perf_counter()
        loss, tokens = evaluate(run, args.data, samples)
        print(f"{run}  loss {loss:.6f}  {tokens:,} tokens  {time.perf_counter() - start:.1f} s", flush=True)


def whole_number(text: str | None) -> int | None:
    """'64' -> 64, 'all' -> 0, None -> None"""
    if text is None or text == "all":
        return None if text is None else 0
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"--samples {text}: must be a whole number from 1, or all")
    return int(text)


def evaluate(run: Path, data: str | None = None, samples: int | None = None) -> tuple[float, int]:
    """Mean loss over the targets, and how many there are. samples: None as the run has it, 0 all."""
    from common.paths import find

    facts = read_json(run / "run.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("family"), str):
        raise BadInput(f"{run / 'run.json'}: must hold family; a RUN is an OUT folder of pretrain.sh")
    values = read_yaml(run / "config.yaml")
    if "task" in values:
        name = values["task"].get("name") if isinstance(values["task"], dict) else "TASK"
        raise BadInput(f"{run}: was finetuned on {name}; its scores are in eval.json: python -m scripts.evaluate {run} {name}")
    cfg = config.load(run / "config.yaml", [], task_module(facts["family"], values).Config, recorded=True)
    export = run / "hf"
    if not (export / "config.json").is_file():
        raise BadInput(f"{export}: no export there; finish the run: the same pretrain.sh command again")
    prefixes = data or cfg.data.valid
    if prefixes is None:
        raise BadInput(f"{run}: the run has no data.valid; give --data PREFIX")
    prefixes = [str(find(p)) for p in ([prefixes] if isinstance(prefixes, str) else prefixes)]
    task = task_module(facts["family"], values)
    cfg = config.at_step(cfg, cfg.last_step)
    stream = task.dataset(cfg, prefixes, shuffle=False)
    stream.limit_ids(cfg.model.vocab_size, "--data" if data else "data.valid")
    corpus_hashes, run_hash = {c.tokenizer_hash for c in stream.corpora if c.tokenizer_hash}, facts.get("tokenizer")
    if run_hash and corpus_hashes - {run_hash}:
        raise BadInput(f"{prefixes[0]}: made with another tokenizer than {run}; build it with --tokenizer {export}")
    limit = len(stream) if samples == 0 else min(samples or cfg.train.eval_samples or len(stream), len(stream))

    known = {"data": stream.content_hash, "seq_len": cfg.data.seq_len, "samples": limit}
    record_path = export / "heldout.json"
    record = read_object(record_path) or {}
    if known.items() <= record.items() and isinstance(record.get("loss"), float) and is_count(record.get("tokens")):
        return record["loss"], record["tokens"]
    changed = integrity.problems(export, str(export))
    if changed:
        raise BadInput(changed)
    loss, tokens = mean_loss(export, stream, limit, task, cfg)
    write_where_possible(record_path, known | {"loss": loss, "tokens": tokens})
    return loss, tokens


def mean_loss(export: Path, stream: Dataset, samples: int, task: PretrainingFamily, cfg: Config) -> tuple[float, int]:
    """The first `samples` of the stream through the export as `from_pretrained` loads it, in fp32."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # of T5 1.1 it says at length that it is not tied
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = getattr(transformers, task.hf_class_name(cfg.model)).from_pretrained(export, dtype=torch.float32).to(device).eval()
    sums = counts = torch.zeros((), dtype=torch.float64, device=device)  # of each part of the loss
    together = max(1, TOKENS_AT_ONCE // cfg.data.seq_len)
    for first in range(0, samples, together):
        rows = stream.collate(np.arange(first, min(first + together, samples)))
        batch = task.make_batch(rows, device)
        with torch.no_grad():
            more, targets = task.export_loss_sums(model, batch)
        sums, counts = sums + more, counts + targets
    if not counts.all():
        raise BadInput(f"{stream.corpora[0].prefix}: nothing to predict in its first {samples} samples")
    return (sums / counts).sum().item(), int(counts[0])


def write_where_possible(path: Path, values: dict[str, Any]) -> None:
    """Keep a result beside the export; where it cannot be written, each call evaluates again."""
    try:
        path.write_text(json.dumps(values) + "\n", encoding="utf-8")
    except OSError:
        pass


if __name__ == "__main__":
    exit_cleanly(main)
