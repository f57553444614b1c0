"""Did a run reach its published number? One line a row, worked out anew from the run's own logs and never stored.

python -m scripts.check RUN...     each RUN an OUT folder of pretrain.sh
python -m scripts.check --all      every recipes/FAMILY/configs/NAME.yaml that has `expect`, every stack:
                                   recipes/FAMILY/results/NAME/STACK/{config.yaml,run.json,metrics.jsonl}

A row is: pass|fail|not-run CONFIG STACK METRIC ours published. Metrics: val_loss (the validation after the last step),
best_val_loss (the lowest validation of the run), parameters, and TASK_METRIC from eval.json, a list of
{"task", "metric", "value"}. A run is evidence for a config only if it finished, with the config's own science and
steps, and without `extra`. Exit 0 if no row fails, 1 if one does, 2 on bad input.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from common import config
from common.config import STACKS, Config
from common.errors import BadInput, exit_cleanly
from common.run import task_module

ROOT = Path(__file__).resolve().parent.parent


class Row(NamedTuple):
    verdict: str  # pass, fail or not-run
    config: str
    stack: str
    metric: str
    ours: str
    published: str
    reason: str  # of a not-run


class NotEvidence(Exception):
    """Why a run says nothing about the published number."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.check", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--all", action="store_true", help="every config with `expect`, from recipes/*/results")
    args = parser.parse_args()
    if args.all == bool(args.runs):
        raise BadInput("give RUN folders, or --all")
    rows = all_rows(ROOT) if args.all else [row for run in args.runs for row in run_rows(Path(run))]
    for line in aligned(rows):
        print(line)
    return 1 if any(row.verdict == "fail" for row in rows) else 0


def all_rows(root: Path) -> list[Row]:
    rows = []
    for path in sorted((root / "recipes").glob("*/configs/*.yaml")):
        family, values = path.parts[-3], config.read_yaml(path)
        if not values.get("expect"):
            continue
        named = config.load(path, [], task_module(family, values).Config)
        for stack in STACKS:
            run = root / "recipes" / family / "results" / path.stem / stack
            if run.is_dir():
                rows += judge(run, named, path.stem, stack, family)
            else:
                rows += missing(named, path.stem, stack, "no run")
    return rows


def run_rows(run: Path) -> list[Row]:
    """The rows of one OUT, against the config that its run.json names."""
    facts = read_json(run / "run.json")
    if not isinstance(facts, dict) or facts.get("stack") not in STACKS or not {"config", "family"} <= facts.keys():
        raise BadInput(f"{run / 'run.json'}: must hold config, family and stack (one of {', '.join(STACKS)})")
    name, family, stack = Path(facts["config"]).stem, facts["family"], facts["stack"]
    made = task_module(family, config.read_yaml(run / "config.yaml")).Config
    path = ROOT / "recipes" / family / "configs" / f"{name}.yaml"
    ours = config.load(run / "config.yaml", [], made)
    if not path.is_file():
        return missing(ours, name, stack, f"recipes/{family}/configs has no {name}.yaml to compare the run with")
    named = config.load(path, [], made)
    if not named.expect:
        raise BadInput(f"{path}: has no `expect`, so there is nothing to check {run} against")
    return judge(run, named, name, stack, family)


def judge(run: Path, named: Config, name: str, stack: str, family: str) -> list[Row]:
    """The rows of `run` against the config `named`."""
    facts, ours = read_json(run / "run.json"), config.load(run / "config.yaml", [], type(named))
    try:
        same_experiment(ours, named, stack)
        if (Path(facts["config"]).stem, facts["stack"]) != (name, stack):
            raise NotEvidence(f"its run.json says {facts['config']} on {facts['stack']}")
        lines = read_lines(run / "metrics.jsonl")
        done = max((line["step"] for line in lines if "loss" in line), default=0)
        if done < named.last_step:
            raise NotEvidence(f"stopped at step {done} of {named.last_step}")
    except NotEvidence as reason:
        return missing(named, name, stack, str(reason))
    rows = []
    for metric, expect in named.expect.items():
        try:
            value = measured(metric, run, ours, lines)
        except NotEvidence as reason:
            rows.append(Row("not-run", name, stack, metric, "-", published(expect), str(reason)))
            continue
        # Two-sided: what is better than published by more than the tolerance is not a reproduction either. NaN fails.
        verdict = "pass" if abs(value - expect.value) <= expect.tolerance else "fail"
        shown = f"{value:,.0f}" if metric == "parameters" else f"{value:.4f}"
        rows.append(Row(verdict, name, stack, metric, shown, published(expect), ""))
    return rows


def same_experiment(ours: Config, named: Config, stack: str) -> None:
    """NotEvidence if the run is not what the config says."""
    if getattr(getattr(ours, stack), "extra", None):
        raise NotEvidence(f"{stack}.extra was used")
    theirs, mine = resolved(named), resolved(ours)
    # A default that only the tokenizer knows (model.vocab_size) is the run's own.
    differing = [key for key in theirs if theirs[key] is not None and theirs[key] != mine.get(key)]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise NotEvidence(f"another experiment: {key} is {mine.get(key)!r}, the config says {theirs[key]!r}{more}")


def resolved(cfg: Config) -> dict[str, Any]:
    """The science with its defaults filled in, and what may change in a continued run but not in a published one."""
    model = cfg.model.resolve(cfg, None)
    optim = cfg.optim.model_copy(update={"decay_steps": cfg.optim.decay_steps or cfg.last_step})
    values = config.science(cfg.model_copy(update={"model": model, "optim": optim}))
    steps = {"train.steps": cfg.train.steps, "last step": cfg.last_step}
    return values | steps | {"train.eval_samples": cfg.train.eval_samples or "all"}


def measured(metric: str, run: Path, ours: Config, lines: list[dict[str, Any]]) -> float:
    if metric == "parameters":
        return ours.model.resolve(ours, None).parameters()
    if metric in ("val_loss", "best_val_loss"):
        losses = {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}
        if ours.last_step not in losses:
            raise NotEvidence(f"no validation at step {ours.last_step}")
        return losses[ours.last_step] if metric == "val_loss" else min(losses.values())
    path = run / "eval.json"
    found = read_json(path) if path.is_file() else []
    try:
        values = [float(entry["value"]) for entry in found if f"{entry['task']}_{entry['metric']}" == metric]
    except (TypeError, KeyError, ValueError):
        raise BadInput(f'{path}: must be a list of {{"task", "metric", "value"}}') from None
    if not values:
        raise NotEvidence("not evaluated: eval.json does not have it")
    return values[-1]


def missing(named: Config, name: str, stack: str, reason: str) -> list[Row]:
    return [Row("not-run", name, stack, metric, "-", published(e), reason) for metric, e in named.expect.items()]


def published(expect: config.Expect) -> str:
    return f"{expect.value:.12g} +- {expect.tolerance:g} ({expect.source})"


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: not there; a RUN is an OUT folder of pretrain.sh") from None
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, each with at least `step`."""
    if not path.is_file():
        raise BadInput(f"{path}: not there; the run has no metrics")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            known = [line[key] for key in ("step", "loss", "valid_loss") if key in line]
            if "step" not in line or not all(isinstance(v, int | float) for v in known):
                raise ValueError('no "step", or a value that is not a number')
        except (ValueError, TypeError) as error:
            raise BadInput(f"{path}:{number}: not a line of metrics: {error}") from None
        lines.append(line)
    return lines


def aligned(rows: list[Row]) -> list[str]:
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
    made = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row[:4], widths[:4], strict=True)]
        made.append("  ".join([*cells, row.ours.rjust(widths[4]), row.published]) + (f"  {row.reason}" if row.reason else ""))
    return made


if __name__ == "__main__":
    exit_cleanly(main)
