"""Did a run reach its published numbers? The verdicts are computed from the run's own logs each time and never stored.

python -m scripts.check RUN...     OUT folders: of pretrain.sh, and of the finetune.sh runs that begin from them (an OUT of
                                   scripts.seeds stands for the runs of all its seeds)
python -m scripts.check --all      every recipes/FAMILY/configs/NAME.yaml that has `expect`, on every stack, from
                                   recipes/FAMILY/results/NAME/STACK/{config.yaml,run.json,metrics.jsonl,eval.json}

`expect` holds TASK_METRIC: {value, tolerance, source}. The names and their units are in common/evaluation/metrics.py. A score
is looked up in three places: val_loss (the validation after the last step), best_val_loss (the lowest) and parameters in the
run itself; any other in the run's eval.json, which scripts/evaluate.py writes; else in the eval.json of the finished
finetuning on that task whose run.json names this run and its last step as its beginning. Averages are computed, and only
from all of their parts. With --all finetunings are searched for anywhere under recipes/FAMILY/results.

pass       |ours - published| <= tolerance. Two-sided: a score that is better by more than the tolerance is not a
           reproduction either.
           Of n >= 2 seeds the mean must be shown to be within the tolerance, by the one-sided z-test of modded-nanogpt's
           records with sigma, the standard deviation of the seeds: from the nearer bound, published +- tolerance,
           distance * sqrt(n) >= 3 sigma. The inequality is printed.
fail       outside; of several seeds -distance * sqrt(n) >= 3 sigma.
undecided  several seeds show neither: run more seeds.
not-run    no evidence, and why. A run is evidence if it is finished, has the config's science and steps, and no `extra`;
           a score, if it was measured on the whole published set.

Exit 0 if no row fails, 1 if one does, 2 on bad input.
"""

import argparse
import json
import math
import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from common import config
from common.config import STACKS, Config, Expect
from common.errors import BadInput, exit_cleanly
from common.evaluation import metrics
from common.preflight import task_module
from common.training import log
from common.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parent.parent
SIGMAS = 3.0
WIDTH = 80
VERDICTS = ("pass", "fail", "undecided", "not-run")


class Row(NamedTuple):
    config: str
    metric: str
    published: str
    stack: str
    verdict: str  # of VERDICTS
    ours: str = "-"
    reason: str = ""  # of a not-run; else the seeds' inequality, the protocol


class NotEvidence(Exception):
    """Why a run says nothing about the published number."""


class Finetuned(NamedTuple):
    """A run of finetune.sh."""

    out: Path
    cfg: Config
    start: dict[str, Any]  # {"id", "step"} of the run that it begins from; empty for any other beginning


class Evidence(NamedTuple):
    """A finished run, and the finetunings that begin from its last step."""

    run: Path
    cfg: Config
    lines: list[dict[str, Any]]  # of metrics.jsonl
    finetuned: list[Finetuned]


class Claim(NamedTuple):
    """What a config expects."""

    path: Path
    family: str
    expect: dict[str, Expect]


class Scores(NamedTuple):
    values: dict[int, float]  # by seed
    how: str = ""  # the protocol


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--all", action="store_true", help="every config with `expect`, from recipes/*/results")
    args = parser.parse_args()
    if args.all == bool(args.runs):
        raise BadInput("give RUN folders, or --all")
    rows = all_rows(ROOT) if args.all else run_rows([Path(run) for run in args.runs])
    print(table(rows))
    return 1 if any(row.verdict == "fail" for row in rows) else 0


# ---- which runs ------------------------------------------------------------------------------------------------------


def all_rows(root: Path) -> list[Row]:
    rows = []
    for family in sorted(path.name for path in (root / "recipes").iterdir() if (path / "configs").is_dir()):
        results = root / "recipes" / family / "results"
        finetuned = [run for facts in sorted(results.rglob("run.json")) for run in finetuning(facts.parent)]
        for path in sorted((root / "recipes" / family / "configs").glob("*.yaml")):
            claim = claim_of(path, family)
            for stack in STACKS if claim.expect else ():
                run = results / path.stem / stack
                rows += judge(run, claim, stack, finetuned) if run.is_dir() else not_run(claim, stack, "no run")
    return rows


def run_rows(given: Sequence[Path]) -> list[Row]:
    """The rows of OUT folders, each against the config that its run.json names."""
    outs = [out for run in given for out in seeds_of(run)]
    finetuned = {out: run for out in outs for run in finetuning(out)}
    ids = {facts_of(out).get("id") for out in outs} - {None}
    rows, problems = [], []
    for out in outs:
        facts = facts_of(out)
        path = ROOT / "recipes" / facts["family"] / "configs" / f"{config_name(facts)}.yaml"
        claim = claim_of(path, facts["family"]) if path.is_file() else Claim(path, facts["family"], {})
        rows += judge(out, claim, facts["stack"], list(finetuned.values()))
        start = finetuned[out].start if out in finetuned else {}
        if not claim.expect and start.get("id") not in ids:
            problems.append(f"{out}: nothing to check: {why_idle(claim, finetuned.get(out))}")
    if problems:
        raise BadInput(problems)
    return rows


def why_idle(claim: Claim, run: Finetuned | None) -> str:
    """Of a run that has no row and gives none to another."""
    folder = f"recipes/{claim.family}/configs"
    why = f"{folder}/{claim.path.name} has no `expect`"
    if not claim.path.is_file():
        why = f"{folder} has no {claim.path.name} to compare it with"
    if run is None:
        return why
    start = f"init.from={run.cfg.init.from_}"
    return f"{why}; give the run that it begins from too ({start})" if run.start else f"{why}, and {start} is no run's export"


def claim_of(path: Path, family: str) -> Claim:
    """The config's `expect`, checked; nothing else of the config is read, and nothing fetched (finetuning's init.from)."""
    expect, problems = {}, []
    for name, values in (read_yaml(path).get("expect") or {}).items():
        try:
            expect[name] = Expect.model_validate(values)
            problems += metrics.problems(name, expect[name].value)
        except ValidationError as error:
            problems += [f"expect.{name}.{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
    if problems:
        raise BadInput([f"{path}: {problem}" for problem in problems])
    return Claim(path, family, expect)


def named_config(claim: Claim, run: Path, schema: type[Config]) -> Config:
    """The config that a run is measured by. One of finetuning takes the model's shapes from init.from, and its beginning is
    free: both are the run's."""
    words, given, recorded = [], read_yaml(claim.path), read_yaml(run / "config.yaml")
    if "task" in given:
        own = given.get("model") or {}
        words = [f"model.{key}={config.written(value)}" for key, value in recorded["model"].items() if key not in own]
        words.append(f"init.from={config.written(recorded['init']['from'])}")
    return config.load(claim.path, words, schema)


def seeds_of(run: Path) -> list[Path]:
    """The runs that an OUT of scripts/seeds.py holds; any other folder is one run itself."""
    if not (run / "seeds.json").is_file():
        return [run]
    return sorted(path.parent for path in run.glob("seed_*/run.json"))


def finetuning(out: Path) -> list[Finetuned]:
    """The run in this folder if it is one of finetuning, else nothing."""
    facts, values = facts_of(out), read_yaml(out / "config.yaml")
    if "task" not in values:
        return []
    # Its own `expect` says nothing here, and may have names of an earlier version
    cfg = config.load(out / "config.yaml", ["expect={}"], task_module(facts["family"], values).Config, recorded=True)
    return [Finetuned(out, cfg, facts.get("init") or {})]


def facts_of(run: Path) -> dict[str, Any]:
    facts = read_json(run / "run.json")
    strings = isinstance(facts, dict) and all(isinstance(facts.get(key), str) for key in ("config", "family", "stack"))
    if not strings or facts["stack"] not in STACKS:
        raise BadInput(f"{run / 'run.json'}: must hold config, family and stack (one of {', '.join(STACKS)})")
    if not isinstance(facts.get("id"), str | None) or not isinstance(facts.get("init"), dict | None):
        raise BadInput(f"{run / 'run.json'}: its id must be a string and its init an object; restore it")
    return facts


def config_name(facts: dict[str, Any]) -> str:
    """Without .yaml; a point may be part of the name (megatron_1.3b)."""
    return Path(facts["config"]).name.removesuffix(".yaml")


# ---- what a run says -------------------------------------------------------------------------------------------------


def judge(run: Path, claim: Claim, stack: str, finetuned: Sequence[Finetuned] = ()) -> list[Row]:
    """The rows of `run` against a config."""
    if not claim.expect:
        return []
    facts, name = facts_of(run), claim.path.stem
    schema = task_module(claim.family, read_yaml(run / "config.yaml")).Config
    ours = config.load(run / "config.yaml", ["expect={}"], schema, recorded=True)
    try:
        if (facts["family"], config_name(facts), facts["stack"]) != (claim.family, name, stack):
            raise NotEvidence(f"its run.json says {facts['config']} of {facts['family']} on {facts['stack']}")
        same_experiment(ours, named_config(claim, run, schema), stack)
        lines = finished(run, ours)
    except NotEvidence as reason:
        return not_run(claim, stack, str(reason))
    begun = {"id": facts.get("id"), "step": ours.last_step}
    evidence = Evidence(run, ours, lines, [other for other in finetuned if other.start == begun])
    rows = []
    for metric, expect in claim.expect.items():
        try:
            found = scores_of(metric, evidence)
            rows.append(Row(*heading(claim, metric), stack, *verdict(metric, expect, found)))
        except NotEvidence as reason:
            rows.append(Row(*heading(claim, metric), stack, "not-run", reason=str(reason)))
    return rows


def same_experiment(ours: Config, named: Config, stack: str) -> None:
    """NotEvidence if the run is not what the config says."""
    no_extra(ours, stack)
    theirs, mine = resolved(named), resolved(ours)
    # A default that only the tokenizer knows (model.vocab_size) is the run's own.
    differing = [key for key in theirs if theirs[key] is not None and theirs[key] != mine.get(key)]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise NotEvidence(f"another experiment: {key} is {mine.get(key)!r}, the config says {theirs[key]!r}{more}")


def no_extra(cfg: Config, stack: str) -> None:
    if getattr(getattr(cfg, stack), "extra", None):
        raise NotEvidence(f"{stack}.extra was used")


def resolved(cfg: Config) -> dict[str, Any]:
    """The science with its defaults filled in, and what may change in a continued run but not in a published one."""
    model = cfg.model.resolve(cfg, None)
    optim = cfg.optim.model_copy(update={"decay_steps": cfg.optim.decay_steps or cfg.last_step})
    values = config.hyperparameters(cfg.model_copy(update={"model": model, "optim": optim}))
    steps = {"train.steps": cfg.train.steps, "last step": cfg.last_step}
    return values | steps | {"train.eval_samples": cfg.train.eval_samples or "all"}


def finished(run: Path, cfg: Config) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; NotEvidence where it is not finished."""
    lines = read_lines(run / "metrics.jsonl")
    done = max((line["step"] for line in lines if "loss" in line), default=0)
    if done < cfg.last_step and not stopped_early(cfg, lines):
        raise NotEvidence(f"stopped at step {done} of {cfg.last_step}")
    return lines


def stopped_early(cfg: Config, lines: Sequence[dict[str, Any]]) -> bool:
    """Did a finetuning end by task.patience? As common/training/finetuning.py decides it."""
    task = getattr(cfg, "task", None)
    if task is None or not task.patience:
        return False
    first, unit = next(iter(metrics.TASKS[task.name].items()))
    key, sign = f"valid_{first}", unit.better
    if not any(key in line for line in lines):
        key, sign = "valid_loss", -1
    values = {line["step"]: sign * line[key] for line in lines if key in line}
    best = max(values, key=lambda step: (values[step], -step), default=0)
    return sum(step > best for step in values) >= task.patience


def scores_of(name: str, evidence: Evidence) -> Scores:
    """The scores TASK_METRIC of a run, by seed. NotEvidence where there is none to go by."""
    run, cfg = evidence.run, evidence.cfg
    if name == "parameters":
        return Scores({cfg.train.seed: cfg.model.resolve(cfg, None).parameter_count()})
    if name in ("val_loss", "best_val_loss"):
        losses = {line["step"]: line["valid_loss"] for line in evidence.lines if "valid_loss" in line}
        if cfg.last_step not in losses:
            raise NotEvidence(f"no validation at step {cfg.last_step}")
        return Scores({cfg.train.seed: losses[cfg.last_step] if name == "val_loss" else min(losses.values())})
    if name in metrics.MISSING:
        raise NotEvidence(no_evaluator(name))
    if name in metrics.AVERAGES:
        return average(name, evidence)
    own = evaluated(name, run, None if hasattr(cfg, "task") else cfg.last_step)
    if own:
        return Scores({cfg.train.seed: own[0]}, own[1])
    task, _ = metrics.NAMES[name]
    runs = [other for other in evidence.finetuned if other.cfg.task.name == task]
    if not runs:
        raise NotEvidence(f"no score: neither its eval.json nor a finetuning on {task} from its last step has one")
    return of_seeds(name, runs)


def of_seeds(name: str, runs: Sequence[Finetuned]) -> Scores:
    """The score of finetunings that differ in their seeds alone."""
    values: dict[int, float] = {}
    how, first = "", resolved(runs[0].cfg)
    for out, cfg, _ in runs:
        science = resolved(cfg)
        apart = [key for key in first if key not in ("train.seed", "init.from") and science.get(key) != first[key]]
        if apart:
            raise NotEvidence(f"{runs[0].out} and {out} are two experiments: {apart[0]} differs; give one of them")
        if cfg.train.seed in values:
            raise NotEvidence(f"several finetunings have train.seed={cfg.train.seed}; give one of them")
        try:
            no_extra(cfg, facts_of(out)["stack"])
            finished(out, cfg)
            found = evaluated(name, out)
        except NotEvidence as reason:
            raise NotEvidence(f"{out}: {reason}") from None
        if found is None:
            raise NotEvidence(f"{out / 'eval.json'}: does not have it")
        values[cfg.train.seed], how = found
    return Scores(dict(sorted(values.items())), how)


def average(name: str, evidence: Evidence) -> Scores:
    """The mean of the parts, seed by seed where all parts have the same seeds, else of the parts' means. NotEvidence where a
    part is missing."""
    parts, missing = {}, []
    for part in metrics.AVERAGES[name]:
        try:
            parts[part] = scores_of(part, evidence).values
        except NotEvidence as reason:
            missing.append(f"{part} ({reason})")
    if missing:
        more = f", and {len(missing) - 1} more parts" if len(missing) > 1 else ""
        raise NotEvidence(f"of its {len(metrics.AVERAGES[name])} parts it lacks {missing[0]}{more}")
    how = f"the mean of {', '.join(parts)}"
    if len({tuple(values) for values in parts.values()}) == 1:
        seeds = next(iter(parts.values()))
        return Scores({seed: statistics.fmean(values[seed] for values in parts.values()) for seed in seeds}, how)
    return Scores({evidence.cfg.train.seed: statistics.fmean(statistics.fmean(v.values()) for v in parts.values())}, how)


def evaluated(name: str, run: Path, step: int | None = None) -> tuple[float, str] | None:
    """The score in a run's eval.json that was written last, and its protocol; None where there is none. NotEvidence if all
    are of another set than the published one, or of the export of another step."""
    path = run / "eval.json"
    found = read_json(path) if path.is_file() else []
    try:
        rows = [(float(row["value"]), int(row["n"]), str(row["protocol"]))
                for row in found if (row["task"], row["metric"]) == metrics.NAMES[name]]  # fmt: skip
    except (TypeError, KeyError, ValueError):
        raise BadInput(f'{path}: must be a list of {{"task", "metric", "value", "n", "protocol"}}') from None
    whole = [(value, protocol) for value, n, protocol in rows if not metrics.not_comparable(name, n, protocol)]
    if rows and not whole:
        raise NotEvidence(f"not measured on the published set: {metrics.not_comparable(name, *rows[-1][1:])}")
    of_step = [(value, protocol) for value, protocol in whole if step is None or step_of(protocol) in (None, step)]
    if whole and not of_step:
        raise NotEvidence(f"measured at step {step_of(whole[-1][1])}, and the run has gone on to {step}: evaluate it again")
    return of_step[-1] if of_step else None


def step_of(protocol: str) -> int | None:
    """Of the export that scripts/evaluate.py measured."""
    found = re.search(r", step (\d+)(, bf16)?$", protocol)
    return int(found[1]) if found else None


# ---- verdicts --------------------------------------------------------------------------------------------------------


def verdict(name: str, expect: Expect, found: Scores) -> tuple[str, str, str]:
    """Verdict, our value and what there is to say of it."""
    values, tolerance = list(found.values.values()), expect.tolerance
    ours = statistics.fmean(values)
    shown = f"{ours:,.0f}" if name == "parameters" else f"{ours:.4f}"
    if not all(map(math.isfinite, values)):
        return "fail", shown, found.how
    gap = ours - expect.value
    notes = [found.how] if found.how else []
    if len(values) == 1:
        made = "pass" if abs(gap) <= tolerance * (1 + 1e-9) else "fail"  # 0.849 is 0.844 + 0.005
    else:
        bound = expect.value + math.copysign(tolerance, gap)  # the nearer one
        sigma, root = statistics.stdev(values), math.sqrt(len(values))
        margin = (tolerance - abs(gap)) * root
        made = "pass" if margin >= SIGMAS * sigma else "fail" if -margin >= SIGMAS * sigma else "undecided"
        high, low = (bound, ours) if gap > 0 else (ours, bound)
        sign = ">=" if made == "pass" else "<"
        notes.insert(0, f"mean of seeds {' '.join(map(str, found.values))}: ({high:.4f} - {low:.4f}) * sqrt({len(values)}) = "
                        f"{margin:.4f} {sign} {SIGMAS:g} sigma = {SIGMAS:g} * {sigma:.4f} = {SIGMAS * sigma:.4f}")  # fmt: skip
        if made == "undecided":
            notes.append("run more seeds")
    if made == "fail" and gap * metrics.unit_of(name).better > 0:
        notes.append("better than published by more than the tolerance: is it the same experiment?")
    return made, shown, "; ".join(notes)


def not_run(claim: Claim, stack: str, reason: str) -> list[Row]:
    return [
        Row(*heading(claim, name), stack, "not-run", reason=no_evaluator(name) if name in metrics.MISSING else reason)
        for name in claim.expect
    ]


def no_evaluator(name: str) -> str:
    return f"no evaluator here: {metrics.MISSING[name]}"


def heading(claim: Claim, name: str) -> tuple[str, str, str]:
    """Config, metric and what is published."""
    expect = claim.expect[name]
    said = f"{expect.value:.12g} +- {expect.tolerance:g} {metrics.unit_of(name).name} ({expect.source})"
    return f"{claim.family}/{claim.path.stem}", name, said


# ---- files and the table ---------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: not there; a RUN is an OUT folder of pretrain.sh or finetune.sh") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, each with at least `step`."""
    if not path.is_file():
        raise BadInput(f"{path}: not there; the run has no metrics")
    lines = []
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            line = log.parsed(text.rstrip(b"\n") + b"\n")  # the last one may end without
            if line is None:
                raise BadInput(f'{path}:{number}: not a line of metrics: no "step", or a value that is not a number')
            lines.append(line)
    return lines


def table(rows: Sequence[Row]) -> str:
    """Each config; below it each published number; below that a line a verdict, with the stacks of which it is the same."""
    lines, config_above = [], None
    headings = {row[:3]: [other for other in rows if other[:3] == row[:3]] for row in rows}
    for (name, metric, published), found in headings.items():
        lines += [name] if name != config_above else []
        config_above = name
        lines += wrapped(f"  {metric}  {published}", 4)
        said: dict[tuple[str, str, str], list[str]] = {}
        for row in found:
            said.setdefault((row.verdict, row.ours, row.reason), []).append(row.stack)
        for (decided, ours, reason), stacks in said.items():
            lines += wrapped(f"    {decided:<9}  {ours:>8}  {', '.join(stacks)}  {reason}".rstrip(), 25)
    counts = {decided: sum(row.verdict == decided for row in rows) for decided in VERDICTS}
    return "\n".join([*lines, ", ".join(f"{count} {decided}" for decided, count in counts.items() if count)])


def wrapped(line: str, indent: int) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


if __name__ == "__main__":
    exit_cleanly(main)
