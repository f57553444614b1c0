"""Run one finetuning with several seeds, and report the median and the spread of its scores.

    python -m scripts.seeds recipes/bert/megatron/finetune.sh CONFIG OUT --seeds 1 2 3 [a.b=c ...]

Runs the launch script once per seed, one after the other, with OUT/seed_N as its OUT. A run that was stopped is resumed; a
finished run is skipped. OUT/seeds.json holds, for each metric of eval.json, the values by seed, median, least, greatest, mean
and sigma (the sample's standard deviation, null for one seed). If a run stops or fails, the command ends with its exit code;
the same command continues.
"""

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

from common import screen
from common.command_line import Parser
from common.errors import BadInput, exit_cleanly
from common.json_files import write_json
from common.launch import lock


def main() -> int:
    p = Parser(prog="python -m scripts.seeds", description=__doc__)
    p.add_argument("script", metavar="SCRIPT", type=Path, help="recipes/FAMILY/STACK/finetune.sh")
    p.add_argument("config", metavar="CONFIG")
    p.add_argument("out", metavar="OUT", type=Path)
    p.add_argument("overrides", nargs="*", metavar="a.b=c", help="of the config")
    p.add_argument("--seeds", nargs="+", metavar="N", default=["1", "2", "3"], help="default: 1 2 3")
    p.add_argument("--dry-run", action="store_true", help="check the first run; start nothing")
    p.add_argument("--json", action="store_true", help="print the scores as JSON; what the runs print goes to stderr")
    args = p.parse_intermixed_args()
    words = [word for word in args.seeds if "=" not in word]
    overrides = args.overrides + [word for word in args.seeds if "=" in word]  # given after --seeds
    is_script = args.script.is_file() and args.script.name == "finetune.sh"
    what = "no such script" if not args.script.is_file() else "is no finetuning script"
    problems = [] if is_script else [f"{args.script}: {what}; give recipes/FAMILY/STACK/finetune.sh"]
    problems += [f"--seeds {word}: must be a whole number from 0" for word in words if not word.isdecimal()]
    problems += [f"--seeds {word}: is given twice" for word in dict.fromkeys(words) if words.count(word) > 1]
    problems += [] if words else ["--seeds: give one or more"]
    problems += [f"{word}: the seeds are given by --seeds" for word in overrides if word.startswith("train.seed=")]
    if problems:
        raise BadInput(problems)
    with contextlib.nullcontext() if args.dry_run else lock.locked(args.out):
        return run_all(args, overrides, [int(word) for word in words])


def run_all(args: argparse.Namespace, overrides: list[str], seeds: list[int]) -> int:
    """Run all seeds, one after the other, then write seeds.json. Returns the exit code of the first run that fails, else 0."""
    for seed in seeds:
        run = args.out / f"seed_{seed}"
        words = [args.config, str(run), *overrides, f"train.seed={seed}", *(["--dry-run"] if args.dry_run else [])]
        code = run_one(["bash", str(args.script), *words], sys.stderr if args.json else None)
        if code or args.dry_run:
            return code
    rows = summary({seed: args.out / f"seed_{seed}" for seed in seeds})
    write_json(args.out / "seeds.json", rows)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    print(f"results   {args.out / 'seeds.json'}", file=sys.stderr if args.json else sys.stdout)
    return 0


def run_one(command: list[str], stdout: TextIO | None = None) -> int:
    """Run a command and return its exit code. A signal to this process is passed on to the run, which saves its state and ends.
    If the run finished all the same, the code is that of the signal, so that no other run begins."""
    signals: list[int] = []
    process: subprocess.Popen | None = None

    def pass_on(number: int, _frame: object) -> None:
        signals.append(number)
        if process:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, pass_on)
    # its own group, so that Ctrl-C reaches it once, through this process
    process = subprocess.Popen(command, process_group=0, stdout=stdout)
    for number in signals:  # those that arrived before the process existed
        process.send_signal(number)
    code = process.wait()
    if code == 0 and signals:
        return 128 + signals[0]
    return code if code >= 0 else 128 - code


def summary(runs: dict[int, Path]) -> list[dict[str, Any]]:
    """{seed: OUT} -> one row per metric. If eval.json has several values, the first counts: the run's own.
    scripts/evaluate.py appends its results."""
    by_metric: dict[tuple[str, str], dict[int, float]] = {}
    for seed, run in runs.items():
        for row in results(run / "eval.json"):
            by_metric.setdefault((row["task"], row["metric"]), {}).setdefault(seed, row["value"])
    return [
        {"task": task, "metric": metric, "median": statistics.median(values.values()), "least": min(values.values()),
         "greatest": max(values.values()), "mean": statistics.fmean(values.values()),
         "sigma": statistics.stdev(values.values()) if len(values) > 1 else None, "values": values}
        for (task, metric), values in by_metric.items()
    ]  # fmt: skip


def results(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if all(
            isinstance(row["value"], int | float) and not abs(row["value"]) > 1e300 and {row["task"], row["metric"]}
            for row in rows
        ):
            return rows
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    raise BadInput(f'{path}: is not a list of {{"task", "metric", "value"}}; remove {path.parent} to run that seed again')


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("median", "least", "greatest", "mean", "sigma")
    cells = [
        [row["task"], row["metric"], *("-" if row[name] is None else f"{row[name]:.4f}" for name in columns)] for row in rows
    ]
    return screen.table(("task", "metric", *columns), cells, words={0, 1})


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
