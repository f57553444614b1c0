"""Loss of a run's export on held-out text, by plain `transformers` in one process, without a stack or a recipe's model code.

python -m scripts.heldout RUN... [--data PREFIX] [--samples N|all]

RUN is an OUT folder of pretrain.sh with its export, OUT/hf. By default the text is the run's data.valid, and the number of
samples its train.eval_samples, so the value must equal the run's last validation loss. The value is recorded in
OUT/hf/heldout.json, and is not computed again.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from common import config
from common.checkpoints import integrity
from common.command_line import Parser
from common.config import Config
from common.contract import Dataset, PretrainingFamily
from common.errors import BadInput, exit_cleanly
from common.json_files import is_count, read_object
from common.preflight import task_module
from common.yaml_files import read_yaml
from scripts.check import read_json

TOKENS_AT_ONCE = 4096  # tokens per forward pass


def main() -> None:
    parser = Parser(prog="python -m scripts.heldout", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data", metavar="PREFIX", help="another corpus with the same tokenizer")
    parser.add_argument("--samples", metavar="N", help="number of samples, or all (default: the run's eval_samples)")
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
    """Mean loss over the targets, and the number of targets. samples: None: train.eval_samples of the run; 0: all."""
    from common.paths import find

    info = read_json(run / "run.json")
    if not isinstance(info, dict) or not isinstance(info.get("family"), str):
        raise BadInput(f"{run / 'run.json'}: must hold family; a RUN is an OUT folder of pretrain.sh")
    values = read_yaml(run / "config.yaml")
    if "task" in values:
        name = values["task"].get("name") if isinstance(values["task"], dict) else "TASK"
        raise BadInput(f"{run}: was finetuned on {name}; its scores are in eval.json: python -m scripts.evaluate {run} {name}")
    cfg = config.load(run / "config.yaml", [], task_module(info["family"], values).Config, recorded=True)
    export = run / "hf"
    if not (export / "config.json").is_file():
        raise BadInput(f"{export}: no export there; finish the run: the same pretrain.sh command again")
    prefixes = data or cfg.data.valid
    if prefixes is None:
        raise BadInput(f"{run}: the run has no data.valid; give --data PREFIX")
    prefixes = [str(find(p)) for p in ([prefixes] if isinstance(prefixes, str) else prefixes)]
    task = task_module(info["family"], values)
    cfg = config.at_step(cfg, cfg.last_step)
    stream = task.dataset(cfg, prefixes, shuffle=False)
    stream.limit_ids(cfg.model.vocab_size, "--data" if data else "data.valid")
    corpus_hashes, run_hash = {c.tokenizer_hash for c in stream.corpora if c.tokenizer_hash}, info.get("tokenizer")
    if run_hash and corpus_hashes - {run_hash}:
        raise BadInput(f"{prefixes[0]}: made with another tokenizer than {run}; build it with --tokenizer {export}")
    limit = len(stream) if samples == 0 else min(samples or cfg.train.eval_samples or len(stream), len(stream))

    request = {"data": stream.content_hash, "seq_len": cfg.data.seq_len, "samples": limit}
    record_path = export / "heldout.json"
    record = read_object(record_path) or {}
    if request.items() <= record.items() and isinstance(record.get("loss"), float) and is_count(record.get("tokens")):
        return record["loss"], record["tokens"]
    changed = integrity.problems(export, str(export))
    if changed:
        raise BadInput(changed)
    loss, tokens = mean_loss(export, stream, limit, task, cfg)
    write_where_possible(record_path, request | {"loss": loss, "tokens": tokens})
    return loss, tokens


def mean_loss(export: Path, stream: Dataset, samples: int, task: PretrainingFamily, cfg: Config) -> tuple[float, int]:
    """(mean loss, number of targets) of the export, loaded by `from_pretrained` in fp32, on the stream's first `samples`."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # hides a long warning that T5 1.1 has no tied weights
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = getattr(transformers, task.hf_class_name(cfg.model)).from_pretrained(export, dtype=torch.float32).to(device).eval()
    sums = counts = torch.zeros((), dtype=torch.float64, device=device)  # (P,) once added to: P parts of the loss
    batch_size = max(1, TOKENS_AT_ONCE // cfg.data.seq_len)
    for first in range(0, samples, batch_size):
        micro_batch = stream.collate(np.arange(first, min(first + batch_size, samples)))
        batch = task.make_batch(micro_batch, device)
        with torch.no_grad():
            more, targets = task.export_loss_sums(model, batch)
        sums, counts = sums + more, counts + targets
    if not counts.all():
        raise BadInput(f"{stream.corpora[0].prefix}: nothing to predict in its first {samples} samples")
    return (sums / counts).sum().item(), int(counts[0])


def write_where_possible(path: Path, values: dict[str, Any]) -> None:
    """Record a result beside the export. If the file cannot be written, each call evaluates again."""
    try:
        path.write_text(json.dumps(values) + "\n", encoding="utf-8")
    except OSError:
        pass


if __name__ == "__main__":
    exit_cleanly(main)
