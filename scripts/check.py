"""Check runs against their published numbers. Verdicts are computed from the runs' files each time, and never stored.

python -m scripts.check RUN...     OUT folders of pretrain.sh, and of the finetune.sh runs that start from them (an OUT of
                                   scripts.seeds stands for the runs of all its seeds), or records of docs/results
python -m scripts.check --all      every recipes/FAMILY/configs/NAME.yaml that has `expect`, on every stack of that family, from
                                   the records in docs/results/FAMILY/NAME/STACK (scripts/publish.py writes them); with the
                                   hours that scripts.plan predicts for each on 8 H100
--json                             the rows as JSON

`expect` holds TASK_METRIC: {value, tolerance, source}. The names and their units are in common/evaluation/metrics.py. There are
three kinds of scores. val_loss (validation after the last step), best_val_loss (the lowest) and parameters come from the run
itself. Any other score comes from the run's eval.json, which scripts/evaluate.py writes. If that file does not have it, it
comes from the eval.json of a finished finetuning run on that task whose run.json names this run and its last step as its start.
An average is computed if all of its parts exist. With --all, finetuning runs are searched for in all of docs/results/FAMILY.

pass       |measured - published| <= tolerance. The test is two-sided: a score that is better by more than the tolerance is not
           a reproduction either.
           With n >= 2 seeds, a one-sided z-test (that of modded-nanogpt's records) must show that the mean is within the
           tolerance: distance * sqrt(n) >= 3 sigma, where distance is that of the mean from the nearer bound, published +-
           tolerance, and sigma is the standard deviation over the seeds. The inequality is printed.
fail       The score is outside the tolerance; with several seeds, -distance * sqrt(n) >= 3 sigma.
undecided  Several seeds show neither: run more seeds.
not-run    There is no evidence; the reason is printed. A run is evidence if it is finished, has the config's hyperparameters
           and steps, and uses no `extra`. A score is evidence if it was measured on the whole published set.

The exit code is 0 if no row fails, 1 if one does, 2 on bad input.
"""

import hashlib
import json
import math
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from common import config, screen
from common.command_line import Parser
from common.config import STACKS, Config, Expect
from common.errors import BadInput, exit_cleanly
from common.evaluation import metrics
from common.planning import hardware, search
from common.preflight import task_module
from common.training import log
from common.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parent.parent
SIGMAS = 3.0
VERDICTS = ("pass", "fail", "undecided", "not-run")
SYSTEMS = {"expect", "quickstart", *STACKS}  # sections of a config that do not decide the loss


class Row(NamedTuple):
    config: str
    metric: str
    published: str
    stack: str
    verdict: str  # of VERDICTS
    measured: str = "-"
    reason: str = ""  # why the verdict is not-run; for other verdicts the inequality for the seeds, and the protocol


class NotEvidence(Exception):
    """The reason why a run says nothing about the published number."""


class Finetuning(NamedTuple):
    """A run of finetune.sh."""

    folder: Path
    cfg: Config
    start: dict[str, Any]  # {"id", "step"} of the run that it starts from; {} if it does not start from a run

    @property
    def task(self) -> str:
        name: str = task_section(self.cfg)["name"]
        return name


class Evidence(NamedTuple):
    """A finished run, and the finetuning runs that start from its last step."""

    run: Path
    cfg: Config
    lines: list[dict[str, Any]]  # the lines of metrics.jsonl or loss.tsv
    finetunings: list[Finetuning]


class Claim(NamedTuple):
    """The published scores that a config expects."""

    path: Path
    family: str
    expect: dict[str, Expect]


class Scores(NamedTuple):
    values: dict[int, float]  # by seed
    protocol: str = ""


def main() -> int:
    parser = Parser(prog="python -m scripts.check", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--all", action="store_true", help="every config with `expect`, from docs/results")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    if args.all == bool(args.runs):
        raise BadInput("give RUN folders, or --all")
    rows = all_rows(ROOT) if args.all else run_rows([Path(run) for run in args.runs])
    costs = {name: cost_of(name, ROOT) for name in dict.fromkeys(row.config for row in rows)} if args.all else {}
    if args.json:
        predicted = {name: cost._asdict() for name, cost in costs.items()}
        print(json.dumps({"rows": [row._asdict() for row in rows], "cost": predicted}, indent=1))
    else:
        print(table(rows, costs))
    return 1 if any(row.verdict == "fail" for row in rows) else 0


# ---- which runs ------------------------------------------------------------------------------------------------------


def all_rows(root: Path) -> list[Row]:
    """A row per published number and stack of each family. Results of a stack that was deleted are ignored."""
    rows = []
    for family in sorted(path.name for path in (root / "recipes").iterdir() if (path / "configs").is_dir()):
        results = root / "docs/results" / family
        records = [path.parent for path in sorted(results.rglob("run.json"))]
        from_a_run = [record for record in records if run_json(record).get("init")]
        finetunings = [run for record in from_a_run for run in finetuning(record, root)]
        for path in sorted((root / "recipes" / family / "configs").glob("*.yaml")):
            claim = claim_of(path, family)
            for stack in stacks_of(root / "recipes" / family) if claim.expect else ():
                run = results / path.stem / stack
                rows += judge(run, claim, stack, finetunings, root) if run.is_dir() else not_run(claim, stack, "no run")
    return rows


class Cost(NamedTuple):
    """What a run of a config takes on its fastest stack, predicted for the config's own layouts on H100."""

    hours: float | None = None  # None: not predicted
    gpus: int = 8
    needs_gpu: bool = False

    def __str__(self) -> str:
        if self.hours is None:
            return "cost not predicted"
        text = f"{self.hours:.2g} h" if self.hours < 100 else f"{self.hours / 24:,.0f} days"
        text = text if self.hours >= 1 else f"{math.ceil(self.hours * 60)} min"
        return f"about {text} on {self.gpus} x H100"


def cost_of(name: str, root: Path) -> Cost:
    """The cost of FAMILY/CONFIG, all phases, on 8 GPUs, or fewer if its batch does not divide among them. It needs GPUs if it
    is in bf16, or takes them an hour."""
    family, _, stem = name.partition("/")
    path = root / "recipes" / family / "configs" / f"{stem}.yaml"
    values = read_yaml(path)
    try:
        task = task_module(family, values)
        vocabulary = [] if (values.get("model") or {}).get("vocab_size") else ["model.vocab_size=50304"]  # GPT-2's, rounded up
        cfg = config.resolve(config.load(path, vocabulary, task.Config), task.ResolvedConfig, None)
    except BadInput:  # a finetuning config, whose shapes are in init.from
        return Cost()
    stacks = list(stacks_of(root / "recipes" / family))
    for gpus in (8, 4, 2, 1):
        predicted = [seconds for stack in stacks if (seconds := seconds_of(cfg, stack, gpus)) is not None]
        if predicted:
            hours = min(predicted) / 3600
            return Cost(hours, gpus, cfg.train.dtype == "bf16" or hours >= 1)
    return Cost(needs_gpu=cfg.train.dtype == "bf16")


def seconds_of(cfg: Config, stack: str, gpus: int) -> float | None:
    """Of all steps of a resolved config on these GPUs; None if its layout cannot be, or is not predicted."""
    cluster, begin, total = hardware.Cluster(hardware.gpu("H100"), 8, None), 0, 0.0
    try:
        for phase in config.views(cfg):
            steps, begin = phase.train.steps - begin, phase.train.steps
            total += steps * search.predict(phase, stack, cluster, gpus).seconds
    except BadInput:
        return None
    return total


def stacks_of(recipe: Path) -> Iterator[str]:
    return (stack for stack in STACKS if (recipe / stack / "pretrain.py").is_file())


def run_rows(folders: Sequence[Path]) -> list[Row]:
    """The rows of OUT folders, each against the config that its run.json names."""
    runs = [run for folder in folders for run in seeds_of(folder)]
    finetunings = {run: one for run in runs for one in finetuning(run)}
    ids = {run_json(run).get("id") for run in runs} - {None}
    rows: list[Row] = []
    problems: list[str] = []
    for run in runs:
        info = run_json(run)
        path = ROOT / "recipes" / info["family"] / "configs" / f"{config_name(info)}.yaml"
        claim = claim_of(path, info["family"]) if path.is_file() else Claim(path, info["family"], {})
        rows += judge(run, claim, info["stack"], list(finetunings.values()))
        start = finetunings[run].start if run in finetunings else {}
        if not claim.expect and start.get("id") not in ids:
            problems.append(f"{run}: nothing to check: {why_unused(claim, finetunings.get(run))}")
    if problems:
        raise BadInput(problems)
    return rows


def why_unused(claim: Claim, run: Finetuning | None) -> str:
    """Why a run has no row itself, and no other run's row uses it."""
    folder = f"recipes/{claim.family}/configs"
    why = f"{folder}/{claim.path.name} has no `expect`"
    if not claim.path.is_file():
        why = f"{folder} has no {claim.path.name} to compare it with"
    if run is None:
        return why
    start = f"init.from={run.cfg.init.from_}"
    return (
        f"{why}; give the run that it starts from too ({start})"
        if run.start
        else f"{why}, and {start} is not the export of a run"
    )


def claim_of(path: Path, family: str) -> Claim:
    """The config's `expect`, checked. The rest of the config is not validated, so nothing is downloaded (init.from)."""
    expect: dict[str, Expect] = {}
    problems: list[str] = []
    for name, values in (read_yaml(path).get("expect") or {}).items():
        try:
            expect[name] = Expect.model_validate(values)
            problems += metrics.problems(name, expect[name].value)
        except ValidationError as error:
            problems += [f"expect.{name}.{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
    if problems:
        raise BadInput([f"{path}: {problem}" for problem in problems])
    return Claim(path, family, expect)


def seeds_of(run: Path) -> list[Path]:
    """The runs in an OUT of scripts/seeds.py. Any other folder is a single run."""
    if not (run / "seeds.json").is_file():
        return [run]
    return sorted(path.parent for path in run.glob("seed_*/run.json"))


def finetuning(run: Path, root: Path = ROOT) -> list[Finetuning]:
    """[the run in this folder] if it is a finetuning run, else []."""
    info = run_json(run)
    if "task" not in recorded_values(run, info, root):
        return []
    return [Finetuning(run, recorded_config(run, info, root), info.get("init") or {})]


# ---- the config of a run ---------------------------------------------------------------------------------------------


def run_json(run: Path) -> dict[str, Any]:
    path = run / "run.json"
    info = read_json(path)
    strings = isinstance(info, dict) and all(isinstance(info.get(key), str) for key in ("config", "family", "stack"))
    if not strings or info["stack"] not in STACKS:
        raise BadInput(f"{path}: must hold config, family and stack (one of {', '.join(STACKS)})")
    if not isinstance(info.get("id"), str | None) or not isinstance(info.get("init"), dict | None):
        raise BadInput(f"{path}: its id must be a string and its init an object; restore it")
    return info


def config_name(info: dict[str, Any]) -> str:
    """The name of a run's config without .yaml. A dot may be part of the name (megatron_1.3b)."""
    return Path(info["config"]).name.removesuffix(".yaml")


def record_of(run: Path) -> dict[str, Any] | None:
    """The content of record.yaml. None for an OUT folder, which has the resolved config instead."""
    path = run / "record.yaml"
    if not path.is_file():
        return None
    record = read_yaml(path)
    words = record.get("overrides")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or "config_sha256" not in record:
        raise BadInput(f"{path}: must hold overrides (a list of a.b=c) and config_sha256")
    return record


def recorded_values(run: Path, info: dict[str, Any], root: Path = ROOT) -> dict[str, Any]:
    """The values of a run's config file: the resolved config of an OUT folder, or, for a record, the recipe's config."""
    path = run / "config.yaml"
    return read_yaml(path if record_of(run) is None else recipe_config(run, info, root))


def recorded_config(run: Path, info: dict[str, Any], root: Path = ROOT) -> Config:
    """The config of a run, without its own `expect`, which is no evidence and may have names of an earlier version."""
    record, values = record_of(run), recorded_values(run, info, root)
    schema: type[Config] = task_module(info["family"], values).Config
    if record is None:
        return config.load(run / "config.yaml", ["expect={}"], schema, recorded=True)
    return config.load(recipe_config(run, info, root), [*record["overrides"], "expect={}"], schema)


def recipe_config(run: Path, info: dict[str, Any], root: Path) -> Path:
    path = root / "recipes" / info["family"] / "configs" / f"{config_name(info)}.yaml"
    if not path.is_file():
        raise BadInput(f"{run / 'run.json'}: names a config that is not there: {path}")
    return path


def config_sha256(path: Path) -> str:
    """sha256 (hex) of the values that decide the loss. A record holds it, because its overrides apply to this config only."""
    values = {section: value for section, value in read_yaml(path).items() if section not in SYSTEMS}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def unchanged(run: Path, path: Path) -> None:
    """NotEvidence if the config has changed since the record was written."""
    record = record_of(run)
    digest = config_sha256(path)
    if record is not None and record["config_sha256"] != digest:
        raise NotEvidence(f"{path.name} has changed since this run; run it again, or, if no value changed, correct "
                          f"config_sha256 in {run / 'record.yaml'} to {digest}")  # fmt: skip


def start_overrides(path: Path, recorded: dict[str, Any]) -> list[str]:
    """The overrides that give a finetuning config the model shapes and init.from of a recorded run. The config itself takes
    the shapes from the folder init.from."""
    values = read_yaml(path)
    if "task" not in values:
        return []
    own = values.get("model") or {}
    shapes = {key: value for key, value in recorded["model"].items() if key not in own}
    return [override(f"model.{key}", value) for key, value in shapes.items()] + [
        override("init.from", recorded["init"]["from"])
    ]


def override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def task_section(cfg: Config) -> dict[str, Any]:
    """The values of `task`, empty for a pretraining config."""
    values: dict[str, Any] = cfg.dump().get("task", {})
    return values


# ---- what a run says -------------------------------------------------------------------------------------------------


def judge(run: Path, claim: Claim, stack: str, finetunings: Sequence[Finetuning] = (), root: Path = ROOT) -> list[Row]:
    """The rows of `run` against a config."""
    if not claim.expect:
        return []
    info, name = run_json(run), claim.path.stem
    try:
        if (info["family"], config_name(info), info["stack"]) != (claim.family, name, stack):
            raise NotEvidence(f"its run.json says {info['config']} of {info['family']} on {info['stack']}")
        unchanged(run, claim.path)
        cfg = recorded_config(run, info, root)
        overrides = start_overrides(claim.path, cfg.dump())
        same_experiment(cfg, config.load(claim.path, overrides, type(cfg)), stack)
        lines = finished(run, cfg)
    except NotEvidence as reason:
        return not_run(claim, stack, str(reason))
    start = {"id": info.get("id"), "step": cfg.last_step}
    evidence = Evidence(run, cfg, lines, [other for other in finetunings if other.start == start])
    rows = []
    for metric, expect in claim.expect.items():
        try:
            scores = scores_of(metric, evidence)
            rows.append(Row(*heading(claim, metric), stack, *verdict(metric, expect, scores)))
        except NotEvidence as reason:
            rows.append(Row(*heading(claim, metric), stack, "not-run", reason=str(reason)))
    return rows


def same_experiment(cfg: Config, published: Config, stack: str) -> None:
    """NotEvidence if `cfg` differs from the published config."""
    no_extra(cfg, stack)
    expected, actual = resolved(published), resolved(cfg)
    # A default that follows from the tokenizer (model.vocab_size) is unknown here, so the run's own value counts.
    differing = [key for key in expected if expected[key] is not None and expected[key] != actual.get(key)]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise NotEvidence(f"another experiment: {key} is {actual.get(key)!r}, the config says {expected[key]!r}{more}")


def no_extra(cfg: Config, stack: str) -> None:
    for key in ("extra", "quantized_weights", "quantized_gradients"):  # the last two are not exact
        if cfg.dump()[stack].get(key):
            raise NotEvidence(f"{stack}.{key} was used")


def with_defaults(cfg: Config) -> Config:
    """The config with the defaults that follow from other keys filled in."""
    optim = cfg.optim.model_copy(update={"decay_steps": cfg.optim.decay_steps or cfg.last_step})
    return cfg.model_copy(update={"model": cfg.model.resolve(cfg, None), "optim": optim})


def resolved(cfg: Config) -> dict[str, Any]:
    """The hyperparameters with their defaults filled in, and the keys that only a continued run may change."""
    steps = {"train.steps": cfg.train.steps, "last step": cfg.last_step}
    return config.hyperparameters(with_defaults(cfg)) | steps | {"train.eval_samples": cfg.train.eval_samples or "all"}


def finished(run: Path, cfg: Config) -> list[dict[str, Any]]:
    """The logged lines of a run. NotEvidence if it is not finished."""
    lines = logged(run)
    done = max((line["step"] for line in lines if "loss" in line), default=0)
    if done < cfg.last_step and not stopped_early(cfg, lines):
        raise NotEvidence(f"stopped at step {done} of {cfg.last_step}")
    return lines


def stopped_early(cfg: Config, lines: Sequence[dict[str, Any]]) -> bool:
    """Did task.patience end a finetuning run? The rule is that of common/training/finetuning.py."""
    task = task_section(cfg)
    if not task.get("patience"):
        return False
    first, unit = next(iter(metrics.TASKS[task["name"]].items()))
    key, sign = f"valid_{first}", unit.better
    if not any(key in line for line in lines):
        key, sign = "valid_loss", -1
    values = {line["step"]: sign * line[key] for line in lines if key in line}
    best = max(values, key=lambda step: (values[step], -step), default=0)
    later = sum(step > best for step in values)
    return later >= int(task["patience"])


def scores_of(name: str, evidence: Evidence) -> Scores:
    """The scores TASK_METRIC of a run, by seed. NotEvidence if there are none."""
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
    own = evaluated(name, run, None if task_section(cfg) else cfg.last_step)
    if own:
        return Scores({cfg.train.seed: own[0]}, own[1])
    task, _ = metrics.NAMES[name]
    runs = [other for other in evidence.finetunings if other.task == task]
    if not runs:
        raise NotEvidence(f"no score: neither its eval.json nor a finetuning on {task} from its last step has one")
    return of_seeds(name, runs)


def of_seeds(name: str, runs: Sequence[Finetuning]) -> Scores:
    """The score of finetuning runs that differ only in their seeds."""
    values: dict[int, float] = {}
    protocol, first = "", resolved(runs[0].cfg)
    for run, cfg, _ in runs:
        hyperparameters = resolved(cfg)
        differing = [key for key in first if key not in ("train.seed", "init.from") and hyperparameters.get(key) != first[key]]
        if differing:
            raise NotEvidence(f"{runs[0].folder} and {run} are two experiments: {differing[0]} differs; give one of them")
        if cfg.train.seed in values:
            raise NotEvidence(f"several finetunings have train.seed={cfg.train.seed}; give one of them")
        try:
            no_extra(cfg, run_json(run)["stack"])
            finished(run, cfg)
            score = evaluated(name, run)
        except NotEvidence as reason:
            raise NotEvidence(f"{run}: {reason}") from None
        if score is None:
            raise NotEvidence(f"{run / 'eval.json'}: does not have it")
        values[cfg.train.seed], protocol = score
    return Scores(dict(sorted(values.items())), protocol)


def average(name: str, evidence: Evidence) -> Scores:
    """The mean of the parts: one value per seed if all parts have the same seeds, else one mean of the parts' means.
    NotEvidence if a part is missing."""
    parts, missing = {}, []
    for part in metrics.AVERAGES[name]:
        try:
            parts[part] = scores_of(part, evidence).values
        except NotEvidence as reason:
            missing.append(f"{part} ({reason})")
    if missing:
        more = f", and {len(missing) - 1} more parts" if len(missing) > 1 else ""
        raise NotEvidence(f"of its {len(metrics.AVERAGES[name])} parts it lacks {missing[0]}{more}")
    protocol = f"the mean of {', '.join(parts)}"
    if len({tuple(values) for values in parts.values()}) == 1:
        seeds = next(iter(parts.values()))
        return Scores({seed: statistics.fmean(values[seed] for values in parts.values()) for seed in seeds}, protocol)
    return Scores({evidence.cfg.train.seed: statistics.fmean(statistics.fmean(v.values()) for v in parts.values())}, protocol)


def evaluated(name: str, run: Path, step: int | None = None) -> tuple[float, str] | None:
    """The last such score in a run's eval.json, and its protocol; None if there is none. NotEvidence if all of them were
    measured on another set than the published one, or on the export of another step."""
    path = run / "eval.json"
    content = read_json(path) if path.is_file() else []
    try:
        rows = [(float(row["value"]), int(row["n"]), str(row["protocol"]))
                for row in content if (row["task"], row["metric"]) == metrics.NAMES[name]]  # fmt: skip
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
    """The step of the export that scripts/evaluate.py measured."""
    match = re.search(r", step (\d+)(, bf16)?$", protocol)
    return int(match[1]) if match else None


# ---- verdicts --------------------------------------------------------------------------------------------------------


def verdict(name: str, expect: Expect, scores: Scores) -> tuple[str, str, str]:
    """Verdict, measured value and reason."""
    values, tolerance = list(scores.values.values()), expect.tolerance
    measured = statistics.fmean(values)
    shown = f"{measured:,.0f}" if name == "parameters" else f"{measured:.4f}"
    if not all(map(math.isfinite, values)):
        return "fail", shown, scores.protocol
    gap = measured - expect.value
    notes = [scores.protocol] if scores.protocol else []
    if len(values) == 1:
        decision = "pass" if abs(gap) <= tolerance * (1 + 1e-9) else "fail"  # 0.849 is 0.844 + 0.005
    else:
        bound = expect.value + math.copysign(tolerance, gap)  # the nearer one
        sigma, root = statistics.stdev(values), math.sqrt(len(values))
        margin = (tolerance - abs(gap)) * root
        decision = "pass" if margin >= SIGMAS * sigma else "fail" if -margin >= SIGMAS * sigma else "undecided"
        high, low = (bound, measured) if gap > 0 else (measured, bound)
        sign = ">=" if decision == "pass" else "<"
        notes.insert(0, f"mean of seeds {' '.join(map(str, scores.values))}: ({high:.4f} - {low:.4f}) * sqrt({len(values)}) = "
                        f"{margin:.4f} {sign} {SIGMAS:g} sigma = {SIGMAS:g} * {sigma:.4f} = {SIGMAS * sigma:.4f}")  # fmt: skip
        if decision == "undecided":
            notes.append("run more seeds")
    if decision == "fail" and gap * unit_of(name).better > 0:
        notes.append("better than published by more than the tolerance: is it the same experiment?")
    return decision, shown, "; ".join(notes)


def unit_of(name: str) -> metrics.Unit:
    unit = metrics.unit_of(name)
    if unit is None:
        raise BadInput(f"expect.{name}: not the name of a score; common/evaluation/metrics.py lists them")
    return unit


def not_run(claim: Claim, stack: str, reason: str) -> list[Row]:
    return [
        Row(*heading(claim, name), stack, "not-run", reason=no_evaluator(name) if name in metrics.MISSING else reason)
        for name in claim.expect
    ]


def no_evaluator(name: str) -> str:
    return f"no evaluator here: {metrics.MISSING[name]}"


def heading(claim: Claim, name: str) -> tuple[str, str, str]:
    """Config, metric and the published value."""
    expect = claim.expect[name]
    published = f"{expect.value:.12g} +- {expect.tolerance:g} {unit_of(name).name} ({expect.source})"
    return f"{claim.family}/{claim.path.stem}", name, published


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


def logged(run: Path) -> list[dict[str, Any]]:
    """The values that a run logged: the lines of metrics.jsonl in an OUT folder, or the rows of a record's loss.tsv."""
    return read_table(run / "loss.tsv") if (run / "loss.tsv").is_file() else read_lines(run / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, each with at least `step`."""
    if not path.is_file():
        raise BadInput(f"{path}: not there; the run has no metrics")
    lines = []
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            line = log.parsed(text.rstrip(b"\n") + b"\n")  # the last line may lack its line end
            if line is None:
                raise BadInput(f'{path}:{number}: not a line of metrics: no "step", or a value that is not a number')
            lines.append(line)
    return lines


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a loss.tsv, without empty cells."""
    header, *rows = path.read_text(encoding="utf-8").splitlines() or [""]
    columns = header.split("\t")
    lines: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 2):
        cells = row.split("\t")
        try:
            step = int(cells[columns.index("step")])
            values = {key: float(cell) for key, cell in zip(columns, cells, strict=True) if cell and key != "step"}
        except ValueError:
            raise BadInput(f"{path}:{number}: not a row of numbers under {', '.join(columns)}") from None
        lines.append({"step": step, **values})
    return lines


def table(rows: Sequence[Row], costs: Mapping[str, Cost] = {}) -> str:
    """The printed table: each config, below it each published number, below that one line per verdict with its stacks. With
    costs, that of each config is behind its name, and each family has a line of its own."""
    lines: list[str] = []
    last_name = last_family = ""
    headings = {row[:3]: [other for other in rows if other[:3] == row[:3]] for row in rows}
    for (name, metric, published), group in headings.items():
        family = name.partition("/")[0]
        if costs and family != last_family:
            own = [row for row in rows if row.config.startswith(f"{family}/")]
            reached = f"{sum(row.verdict == 'pass' for row in own)} of {len(own)} rows reached"
            lines += [*([""] if lines else []), screen.styled(f"{family}: {reached}", "bold")]
        lines += [name + (f"  {costs[name]}" if name in costs else "")] if name != last_name else []
        last_name, last_family = name, family
        lines += wrapped(f"  {metric}  {published}", 4)
        stacks: dict[tuple[str, str, str], list[str]] = {}
        for row in group:
            stacks.setdefault((row.verdict, row.measured, row.reason), []).append(row.stack)
        for (decision, measured, reason), names in stacks.items():
            lines += wrapped(f"    {decision:<9}  {measured:>8}  {', '.join(names)}  {reason}".rstrip(), 25)
    counts = {decision: sum(row.verdict == decision for row in rows) for decision in VERDICTS}
    last = ", ".join(f"{count} {decision}" for decision, count in counts.items() if count)
    return "\n".join([*lines, *(["", *wrapped(summary(rows, costs), 2)] if costs else [last])])


def summary(rows: Sequence[Row], costs: Mapping[str, Cost]) -> str:
    """'3 of 108 rows reached, 1 config of 18; 105 not run: need GPUs'"""
    names = list(dict.fromkeys(row.config for row in rows))
    whole = sum(all(row.verdict == "pass" for row in rows if row.config == name) for name in names)
    counts = Counter(row.verdict for row in rows)
    text = f"{counts['pass']} of {len(rows)} rows reached, {whole} config{'s' * (whole != 1)} of {len(names)}"
    text += "".join(f"; {counts[decision]} {decision}" for decision in ("fail", "undecided") if counts[decision])
    hindrances = Counter(hindrance(row, costs) for row in rows if row.verdict == "not-run")
    if not hindrances:
        return text
    several = ", ".join(f"{number} {what}" for what, number in hindrances.most_common())
    return f"{text}; {counts['not-run']} not run: {several if len(hindrances) > 1 else next(iter(hindrances))}"


def hindrance(row: Row, costs: Mapping[str, Cost]) -> str:
    if row.reason.startswith("no evaluator"):
        return "have no evaluator here"
    return "need GPUs" if row.reason == "no run" and costs[row.config].needs_gpu else "have no evidence"


def wrapped(line: str, indent: int) -> list[str]:
    return textwrap.wrap(line, screen.width(), subsequent_indent=" " * indent, break_on_hyphens=False)


if __name__ == "__main__":
    exit_cleanly(main)
