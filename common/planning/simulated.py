"""The estimate of memory (memory.py) beside the peaks of simulated runs: docs/memory.md."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import config, families
from common.errors import BadInput
from common.paths import ROOT
from common.planning import memory
from common.preflight import task_module
from common.yaml_files import read_yaml

FILE = ROOT / "docs/planner/simulated_memory.json"
PAGE = ROOT / "docs/memory.md"
NAMED = ("config", "stack", "world", "rank", "overrides")  # of a case (common/simulation/run.py)
MEASURED = ("peak_bytes", "reserved_bytes")
MEMORY_GB = 1000  # of the simulated GPU: a run that does not fit a real one has a peak too
HEAD = """# Memory: the estimate beside simulated runs

`python -m scripts.plan --validate` writes this page. `common/planning/memory.py` estimates what a GPU needs from shapes alone;
`scripts/simulate.py` runs the recipe itself on a GPU that computes nothing, under PyTorch's own allocator. *Peak* is
`max_memory_allocated` of {steps} optimizer steps on the rank that needs the most, *reserved* `max_memory_reserved` (-: not
recorded), in GB (10^9 bytes); torch {torch}. `python -m scripts.plan --simulate` simulates all rows again.

{count} rows. The estimate is within 3 % of the peak in {close}; the largest error is {worst:+.1%}, the median {median:.1%}.
What the allocator reserves beside the peak is {unused:.1%} of it in the median and {unused_most:.1%} at most; the estimate
adds {assumed}.
`compile: true` (baseline, DeepSpeed) is estimated for GPT-2 style and BERT without recomputation.

| config | stack | GPUs | layout | peak | reserved | estimate | error |
|---|---|---|---|---|---|---|---|
"""


def recorded() -> dict[str, Any]:
    """{"torch": version, "steps": steps per run, "cases": [{NAMED, MEASURED}]}"""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def rows() -> list[dict[str, Any]]:
    """A case of each layout, of several ranks that of the one that needs the most."""
    highest: dict[str, dict[str, Any]] = {}
    for case in recorded()["cases"]:
        key = json.dumps([case[name] for name in NAMED if name != "rank"])
        if key not in highest or case["peak_bytes"] > highest[key]["peak_bytes"]:
            highest[key] = case
    return list(highest.values())


def estimate_of(case: dict[str, Any], stage: int | None = None) -> dict[str, int]:
    task = task_module(families.of_config(case["config"]), read_yaml(case["config"]))
    cfg = config.load(case["config"], [*case["overrides"], "phases=[]"], task.Config)
    cfg = config.resolve(cfg, task.ResolvedConfig, None)
    return memory.estimate_for(cfg, cfg.model, case["stack"], case["world"], stage)


def name_of(case: dict[str, Any]) -> str:
    """'zero_stage=1 recompute=true'; the config's own layout is ''."""
    shown = (word for word in case["overrides"] if not word.startswith(("train.global_batch", "optim.")))
    words = [word.partition(".")[2] for word in shown]
    optimizer = [word.partition("=")[2] for word in case["overrides"] if word.startswith("optim.optimizer=")]
    return " ".join([*words, *optimizer])


def label(case: dict[str, Any]) -> str:
    return f"{Path(case['config']).stem} {case['stack']} {case['world']} {name_of(case)}"


def page() -> str:
    """The text of docs/memory.md."""
    found, lines, errors, unused = recorded(), [], [], []
    for case in rows():
        peak, reserved = (case[name] for name in MEASURED)
        total = estimate_of(case)["total"]
        errors.append(total / peak - 1)
        unused += [reserved / peak - 1] if reserved else []
        config_name = f"{families.of_config(case['config'])}/{Path(case['config']).stem}"
        cells = [config_name, case["stack"], str(case["world"]), name_of(case)]
        cells += [f"{size / 1e9:.2f}" if size else "-" for size in (peak, reserved, total)] + [f"{errors[-1]:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    middle = len(errors) // 2
    head = HEAD.format(
        steps=found["steps"], torch=found["torch"], count=len(errors), close=sum(abs(error) <= 0.03 for error in errors),
        worst=max(errors, key=abs), median=sorted(map(abs, errors))[middle], unused=sorted(unused)[len(unused) // 2],
        unused_most=max(unused), assumed=", ".join(f"{share:.0%} ({stack})" for stack, share in memory.UNUSED.items()),
    )  # fmt: skip
    return head + "\n".join(lines) + "\n"


def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What scripts.simulate finds for these cases, each with the fields of common/simulation/run.py's Case. BadInput where
    nothing can be simulated."""
    with tempfile.TemporaryDirectory() as folder:
        cases_file, result_file = Path(folder) / "cases.json", Path(folder) / "found.json"
        cases_file.write_text(json.dumps(cases), encoding="utf-8")
        command = [sys.executable, "-m", "scripts.simulate", "--cases", str(cases_file), "--json", str(result_file)]
        subprocess.run([*command, "--memory", str(MEMORY_GB)], cwd=ROOT, check=False)
        if not result_file.is_file():
            raise BadInput("--simulate: scripts.simulate has ended without a result; its message is above")
        found: list[dict[str, Any]] = json.loads(result_file.read_text(encoding="utf-8"))
    return found


def simulate(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases with what their runs need now. RuntimeError if a run fails."""
    named = [{name: case[name] for name in NAMED} | {"steps": recorded()["steps"], "roofline": False} for case in cases]
    found = run(named)
    for case, one in zip(named, found, strict=True):
        if one["fault"]:
            raise RuntimeError(f"{case}: {one['fault']}")
    return [
        {name: case[name] for name in NAMED} | {name: one[name] for name in MEASURED}
        for case, one in zip(cases, found, strict=True)
    ]


def record() -> None:
    """Simulate all cases again and write them to FILE: minutes."""
    import torch

    cases = simulate(recorded()["cases"])
    lines = ",\n".join(json.dumps(case) for case in cases)
    head = f'"torch": "{torch.__version__}", "steps": {recorded()["steps"]}'
    FILE.write_text(f'{{{head}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")
