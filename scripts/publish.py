"""Write the record of a finished run: the small files from which scripts/check.py can check a published number.

python -m scripts.publish RUN docs/results/FAMILY/NAME/STACK [--also COLUMN ...]

RUN is an OUT folder of pretrain.sh or finetune.sh. The record holds:

run.json       a copy of the run's file: config, family, stack, hashes of data and tokenizer, commit, versions
record.yaml    overrides: what differs from the config; config_sha256: hash of the sections of that config that decide the
               loss; steps (the last step), seconds (sum over all steps), tokens_per_s (median over the steps after the first
               tenth) and mem_bytes (the largest)
loss.tsv       one row per step: the loss, the columns of the validation, and the columns of metrics.jsonl that --also names
eval.json      a copy of the run's scores, if it has any
"""

import shutil
import statistics
from pathlib import Path
from typing import Any

from common import config
from common.command_line import Parser
from common.config import Config
from common.errors import BadInput, exit_cleanly
from common.preflight import task_module, unusable
from common.yaml_files import read_yaml, to_yaml
from scripts import check

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 0.1  # of a run's steps, left out of its speed, as in scripts/compare.py


def main() -> None:
    parser = Parser(prog="python -m scripts.publish", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("out", metavar="RECORD", type=Path, help="a new folder")
    parser.add_argument(
        "--also", nargs="+", metavar="COLUMN", default=[], help="further columns of metrics.jsonl, such as grad_norm"
    )
    args = parser.parse_args()
    problem = unusable(args.out)
    if problem:
        raise BadInput(f"{args.out}: {problem}; give another folder")
    if args.out.exists() and any(args.out.iterdir()):
        raise BadInput(f"{args.out}: is not empty; remove it, or give another folder")
    write(args.run, args.out, args.also)
    print(args.out)


def write(run: Path, out: Path, also: list[str], root: Path = ROOT) -> None:
    info = check.run_json(run)
    path = root / "recipes" / info["family"] / "configs" / f"{check.config_name(info)}.yaml"
    if not path.is_file():
        raise BadInput(f"{run / 'run.json'}: names config {info['config']}, and there is no {path}")
    lines = check.read_lines(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise BadInput(f"{run / 'metrics.jsonl'}: holds no step")
    unknown = [name for name in also if not any(name in line for line in steps)]
    if unknown:
        raise BadInput(f"--also {' '.join(unknown)}: no such column; there are {', '.join(steps[0])}")
    warm = steps[int(len(steps) * WARM_UP) :]
    record: dict[str, Any] = {
        "overrides": overrides(run, path, info["family"]),
        "config_sha256": check.config_sha256(path),
        "steps": steps[-1]["step"],
        "seconds": round(sum(line["ms"] for line in steps) / 1e3, 1),
        "tokens_per_s": round(statistics.median(line["tokens_per_s"] for line in warm), 1),
        "mem_bytes": max(line["mem_bytes"] for line in steps),
    }
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "run.json", out / "run.json")
    if (run / "eval.json").is_file():
        shutil.copyfile(run / "eval.json", out / "eval.json")
    (out / "record.yaml").write_text(to_yaml(record), encoding="utf-8")
    (out / "loss.tsv").write_text(table(lines, also), encoding="utf-8")


def overrides(run: Path, path: Path, family: str) -> list[str]:
    """The overrides that turn the config at `path` into the config of the run."""
    recorded = read_yaml(run / "config.yaml")
    schema: type[Config] = task_module(family, recorded).Config
    start = check.start_overrides(path, recorded)
    values, goal = (
        flat(config.load(path, start, schema)),
        flat(config.load(run / "config.yaml", ["expect={}"], schema, recorded=True)),
    )
    changed = [check.override(key, value) for key, value in goal.items() if values.get(key) != value]
    for word in start:  # leave out overrides that repeat a default
        shorter = [other for other in start if other != word]
        if resolves_to(goal, path, [*shorter, *changed], schema):
            start = shorter
    if not resolves_to(goal, path, [*start, *changed], schema):
        raise BadInput(f"{run / 'config.yaml'}: overrides of {path} cannot give these values; has the config lost a key?")
    return [*start, *changed]


def resolves_to(goal: dict[str, Any], path: Path, words: list[str], schema: type[Config]) -> bool:
    try:
        return flat(config.load(path, words, schema)) == goal
    except BadInput:  # init.from, which gives the shapes if `words` do not, is not on this machine
        return False


def flat(cfg: Config) -> dict[str, Any]:
    """Every key of a config except `expect` and `quickstart`, with the defaults that follow from other keys filled in."""
    return config.flat(check.with_defaults(cfg).model_copy(update={"expect": {}, "quickstart": None}).dump())


def table(lines: list[dict[str, Any]], also: list[str]) -> str:
    """The text of loss.tsv: one row per step, ten significant digits per number, an empty cell for a missing value."""
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        rows.setdefault(line["step"], {}).update(line)
    keys = dict.fromkeys(key for line in lines for key in line)
    validation = [key for key in keys if key.startswith("valid_") and key != "valid_tokens"]
    columns = ["loss", *validation, *also]
    cells = [["step", *columns]]
    cells += [[str(step), *(f"{row[key]:.10g}" if key in row else "" for key in columns)] for step, row in rows.items()]
    return "".join("\t".join(row) + "\n" for row in cells)


if __name__ == "__main__":
    exit_cleanly(main)
