"""Run the checks that need a GPU, for every family: parity of the stacks, speed, memory, and the tests marked gpu.

    bash scripts/gpu_check.sh OUT [--family F ...] [--only corpus|parity|tests|speed|simulate ...] [--configs C ...]
                              [--minutes M]

It needs one GPU and no network. The corpus of a family is the first 2 MB of the corpus in its configs/quickstart.yaml. The
parity check is that of scripts/parity.py for each configs/tiny*.yaml on one process, in fp32 and in bf16. Speed is measured
for two sizes per family: those of --configs, or the configs nearest to 0.35 and to 1.3 billion parameters. scripts/simulate.py
then repeats these runs without the GPU: the peaks of memory must agree, and its bound stands beside the measured MFU.

Each part runs in a process of its own, with a time limit. A part that fails, or for which too little time is left, does not
stop the others, but then the exit code is 1. Results go to OUT/gpu_check.json and OUT/gpu_check.md, the output of the parts to
OUT/logs/. --cpu-rehearsal runs every part on a CPU with tiny shapes; its numbers mean nothing.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import config as configs, families
from common.checkpoints import run_record
from common.command_line import Parser
from common.comparison import layouts, measuring
from common.errors import EXIT_BAD_INPUT, BadInput, exit_cleanly
from common.launch import processes
from common.paths import ROOT
from common.planning import flops, memory
from common.preflight import task_module
from common.yaml_files import read_yaml
from scripts import parity

CORPUS_MB = 2
SPEED_SIZES = (0.35e9, 1.3e9)  # parameters
MICRO_BATCHES = (128, 64, 32, 16, 8, 4, 2, 1)  # sizes to try, largest first
# Overrides of a speed run: one GPU, no pipeline, no recomputation, and the optimizer that every stack has.
ALONE = (
    "data.valid=null", "data.tokenizer=null", "baseline.recompute=false",
    "deepspeed.recompute=false", "deepspeed.zero_stage=1", "megatron.tp=1",
    "megatron.sequence_parallel=false", "megatron.distributed_optimizer=true", "optim.optimizer=adamw",
)  # fmt: skip
ACCUMULATE = 4  # micro batches per step
REHEARSED = (
    "model.layers=2", "model.hidden=64", "model.heads=4", "model.vocab_size=8192", "data.seq_len=64",
)  # fmt: skip
SAME_MEMORY = 0.03  # share by which the measured peak may differ from the simulated one
WARMUP, STEPS = 3, 6  # of a speed run
STEPS_OF_PARITY = 20

# Seconds: the time that must be left for a part to start, and its time limit.
BUDGET = {"corpus": (10, 120), "parity": (60, 200), "tests": (45, 130), "speed": (45, 90), "simulate": (30, 150)}


# ---- inside a part's own process -------------------------------------------------------------------------------------


def corpus(family: str, folder: Path) -> dict[str, Any]:
    """Make the beginning of the family's corpus by the command in its quickstart.yaml."""
    path = configs_of(family) / "quickstart.yaml"
    cfg = configs.load(path, [], task_module(family, {}).Config)
    if cfg.quickstart is None:
        raise BadInput(f"{path}: has no quickstart.corpus, the command that makes the family's corpus")
    module, _, *options = cfg.quickstart.corpus_words
    command = [sys.executable, "-m", module, str(folder / family / "corpus"), *options, "--max-mb", str(CORPUS_MB)]
    done = subprocess.run(command, cwd=ROOT)
    return {"ok": done.returncode == 0, "summary": " ".join(command[1:3] + options)}


def configs_of(family: str) -> Path:
    return ROOT / "recipes" / family / "configs"


def parity_of(family: str, folder: Path) -> dict[str, Any]:
    """Compare every layout of one process with the first one, in fp32 and bf16, for each tiny config."""
    processes.quiet()
    rows: list[dict[str, Any]] = []
    usual = layouts.usual_layouts(families.stacks(family), 1)
    for path in sorted(configs_of(family).glob("tiny*.yaml")):
        for dtype in ("fp32", "bf16"):
            shared = [f"data.train={folder / family / 'corpus/train'}", "data.valid=null", f"train.dtype={dtype}"]
            out = folder / family / path.stem / dtype
            cases, left_out = layouts.cases_of(str(path), shared, usual, STEPS_OF_PARITY, 1, out, optional=True)
            print(*left_out, sep="\n")
            done: list[parity.Row] = []
            while len(done) < len(cases):  # a case that raises ends the loop below; with one process no collective can hang
                for row in parity.run_cases(cases[len(done) :], cases[0], dtype):
                    parity.show(row)
                    done.append(row)
            rows += [{"config": path.stem, "dtype": dtype, **row._asdict()} for row in done]
    return {"ok": bool(rows) and all(row["verdict"] != "fail" for row in rows), "rows": rows}


def first_line(error: Exception) -> str:
    """The first line of an exception's message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def speed_configs(family: str) -> list[str]:
    """The pretraining configs whose parameters are nearest to SPEED_SIZES."""
    sizes: dict[str, int] = {}
    for path in sorted(configs_of(family).glob("*.yaml")):
        values = read_yaml(path)
        if "task" not in values:
            cfg = configs.load(path, list(ALONE), task_module(family, values).Config)
            if cfg.model.vocab_size is not None:  # configs that leave it to the tokenizer are small
                sizes[path.stem] = cfg.model.resolve(cfg, None).parameter_count()
    nearest = (min(sizes, key=lambda name: abs(math.log(sizes[name] / size)), default=None) for size in SPEED_SIZES)
    return list(dict.fromkeys(name for name in nearest if name is not None))


def speed(family: str, name: str, stack: str, folder: Path, rehearsal: bool) -> dict[str, Any]:
    """Tokens per second, MFU and peak memory of one size on one stack, with the largest micro batch that fits."""
    processes.quiet()
    import torch

    device = processes.start().device
    cuda = device.type == "cuda"
    task = task_module(family, {})
    path = configs_of(family) / f"{name}.yaml"
    fixed = [*ALONE, *(REHEARSED if rehearsal else ())]
    room = torch.cuda.get_device_properties(device).total_memory if cuda else math.inf
    notes = []
    for micro in MICRO_BATCHES[-1:] if rehearsal else MICRO_BATCHES:
        sizes = [*fixed, f"{stack}.micro_batch={micro}", f"train.global_batch={micro * ACCUMULATE}"]
        overrides = [*sizes, f"data.train={folder / family / 'corpus/train'}"]
        cfg = configs.load(path, overrides, task.Config)
        cfg = configs.resolve(cfg, task.ResolvedConfig, None)
        estimate = memory.estimate_for(cfg, cfg.model, stack, 1)
        if estimate["required"] > room:
            notes.append(f"micro batch {micro}: {estimate['required'] / 1e9:.0f} GB estimated, too much")
            continue
        allocated = torch.cuda.memory_allocated(device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        module, out = f"recipes.{family}.{stack}.pretrain", folder / f"{name}_{stack}_{micro}"
        seconds: list[float] = []
        tokens_of: list[int] = []
        with contextlib.suppress(torch.OutOfMemoryError):
            timing = measuring.timed(module, [str(path), str(out), *overrides], WARMUP + STEPS)
            seconds, tokens_of = timing.seconds[WARMUP:], timing.tokens[WARMUP:]
        if not seconds:
            notes.append(f"micro batch {micro}: out of memory")
            forget()
            continue
        rate = statistics.mean(tokens_of) / statistics.median(seconds)  # without padding
        per_token = task.forward_backward_flops(cfg.model, cfg.data)
        gpu = torch.cuda.get_device_name(device) if cuda else None
        return {
            "ok": True, "config": name, "stack": stack, "micro_batch": micro, "parameters": cfg.model.parameter_count(),
            "tokens_per_s": rate, "ms": statistics.median(seconds) * 1e3,
            "mfu": {kind: flops.mfu(value, rate, gpu, 1) for kind, value in per_token.items()},
            "tflops": {kind: value * rate / 1e12 for kind, value in per_token.items()},
            "peak_bytes": torch.cuda.max_memory_allocated(device) - allocated if cuda else None,
            "reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
            "estimated_bytes": estimate["total"], "notes": notes, "overrides": sizes,
        }  # fmt: skip
    return {"ok": False, "config": name, "stack": stack, "notes": notes, "error": "no micro batch fits"}


def simulate(family: str, folder: Path) -> dict[str, Any]:
    """Repeat the family's speed runs on the GPU that does nothing: memory, which must agree, and a bound of the MFU."""
    results = json.loads((folder.parent / "gpu_check.json").read_text(encoding="utf-8"))
    runs = [p for p in results["parts"] if p["part"].startswith(f"speed {family} ") and "tokens_per_s" in p]
    if not runs:
        return {"ok": False, "error": f"no speed run of {family} to compare with"}
    path = {run["config"]: str(configs_of(family) / f"{run['config']}.yaml") for run in runs}
    cases = [{"config": path[run["config"]], "stack": run["stack"], "overrides": run["overrides"]} for run in runs]
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    command = [sys.executable, "-m", "scripts.simulate", "--cases", str(folder / "cases.json"), "--json"]
    command += [str(folder / "simulated.json")]
    gpu = results["machine"]["gpu"]
    command += ["--memory", str(gpu["memory_bytes"] / 1e9)] if gpu else []
    if subprocess.run(command, cwd=ROOT).returncode == EXIT_BAD_INPUT:
        return {"ok": True, "summary": "cannot simulate here, for the reason in the log"}
    simulated, problems = [], []
    found_runs = json.loads((folder / "simulated.json").read_text(encoding="utf-8"))
    for run, found in zip(runs, found_runs, strict=True):
        name = f"{run['config']} {run['stack']}"
        if found["fault"]:
            problems.append(f"{name}: {found['fault']}")
            continue
        difference = run["peak_bytes"] / found["peak_bytes"] - 1 if run["peak_bytes"] else None
        if difference is not None and abs(difference) > SAME_MEMORY:
            problems.append(f"{name}: measured peak {difference:+.1%} of the simulated one")
        bound = {kind: found["roofline"][f"mfu_{kind}"] for kind in ("full", "causal")} if found["roofline"] else {}
        simulated.append(
            {"config": run["config"], "stack": run["stack"], "peak_bytes": found["peak_bytes"], "mfu": bound,
             "difference": difference}
        )  # fmt: skip
    return {"ok": not problems, "simulated": simulated} | ({"error": "; ".join(problems)} if problems else {})


def forget() -> None:
    """Free the memory that a failed run still holds."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tests(folder: Path, rehearsal: bool) -> dict[str, Any]:
    """Run the tests marked gpu."""
    if importlib.util.find_spec("pytest") is None:
        return {"ok": False, "error": "pytest is not installed"}
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text("utf-8")]
    # without the project's addopts, so that a marker of a plugin that is not installed is not an error
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += [f"--basetemp={folder / 'tests'}", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "nothing printed")
    ok = done.returncode == 0 and (rehearsal or " passed" in last)  # fail if all tests were skipped
    return {"ok": ok, "summary": last.strip("= ")}


def child(part: Sequence[str], folder: Path, rehearsal: bool) -> dict[str, Any]:
    kind, *words = part
    try:
        if kind == "corpus":
            return corpus(*words, folder)
        if kind == "parity":
            return parity_of(*words, folder)
        if kind == "speed":
            return speed(*words, folder, rehearsal)
        if kind == "simulate":
            return simulate(*words, folder)
        return tests(folder, rehearsal)
    except Exception as error:
        traceback.print_exc()
        return {"ok": False, "error": first_line(error)}


# ---- the parts, one after the other ----------------------------------------------------------------------------------


def parts(names: Sequence[str], sizes: Sequence[str] | None = None) -> list[tuple[str, ...]]:
    """The parts of a check of these families. sizes: the configs whose speed is measured."""
    return [
        *(("corpus", family) for family in names),
        *(("parity", family) for family in names),
        ("tests",),
        *(
            ("speed", family, name, stack)
            for family in names
            for name in sizes or speed_configs(family)
            for stack in families.stacks(family)
        ),
        *(("simulate", family) for family in names),
    ]


def run_part(part: Sequence[str], out: Path, rehearsal: bool, left: float) -> dict[str, Any]:
    """Run one part in a process of its own. Returns its result, with the status pass, fail or skipped."""
    name = " ".join(part)
    needs, limit = BUDGET[part[0]]
    if left < needs:
        print(f"SKIPPED {name}: {left:.0f} s left, it needs {needs} s", flush=True)
        return {"part": name, "status": "skipped", "seconds": 0.0, "error": f"{left:.0f} s left, it needs {needs} s"}
    limit = 4 * limit if rehearsal else max(needs, min(limit, left))
    begin = time.perf_counter()
    result, log = out / "work" / "result.json", out / "logs" / f"{name.replace(' ', '_')}.txt"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "scripts.gpu_check", str(out), "--child", *part]
    env = os.environ | {"NVIDIA_TF32_OVERRIDE": "0", "PYTHONUNBUFFERED": "1"}
    if rehearsal:
        command.insert(4, "--cpu-rehearsal")
        env["CUDA_VISIBLE_DEVICES"] = ""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code is None:
        values = {"ok": False, "error": f"ended after {limit:.0f} s"}
    elif result.exists():
        values = json.loads(result.read_text(encoding="utf-8"))
    else:
        values = {"ok": False, "error": f"exit code {code}, see {log}"}
    seconds = time.perf_counter() - begin
    status = "pass" if values.pop("ok") else "fail"
    print(f"{status:<7} {name}  {seconds:.0f} s  {values.get('error') or values.get('summary') or ''}", flush=True)
    return {"part": name, "status": status, "seconds": seconds, **values}


def machine(rehearsal: bool) -> dict[str, Any]:
    return {
        "gpu": None if rehearsal else run_record.gpu(), "python": platform.python_version(),
        "commit": run_record.commit(), "versions": run_record.versions(),
    }  # fmt: skip


# ---- the report --------------------------------------------------------------------------------------------------------


def number(value: float | None, form: str = "{:.1e}", scale: float = 1.0) -> str:
    return "-" if value is None else form.format(value * scale)


def report(results: dict[str, Any]) -> str:
    """The Markdown of OUT/gpu_check.md."""
    m = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items() if version)
    on = "{name}, driver {driver}, CUDA {cuda}, NCCL {nccl}, cuDNN {cudnn}".format(**m["gpu"]) if m["gpu"] else "a CPU"
    text = ["# GPU check", "", f"{on}, python {m['python']}, {versions}, commit {m['commit']}"]
    if results["rehearsal"]:
        text += ["", "**Rehearsal on a CPU with tiny shapes: the figures mean nothing.**"]
    text += ["", "| part | status | s | note |", "|---|---|---|---|"]
    for p in results["parts"]:
        note = p.get("error") or p.get("summary") or "; ".join(p.get("notes", []))
        text.append(f"| {p['part']} | {p['status']} | {p['seconds']:.0f} | {note} |")
    rows = [row for p in results["parts"] for row in p.get("rows", [])]
    if rows:
        goal = f"loss {layouts.LOSS:g} and norm {layouts.NORM:g} in fp32, loss {layouts.BF16:g} in bf16"
        text += [
            "",
            f"## Parity: one process, {STEPS_OF_PARITY} steps, relative to the first layout in fp32 (goal: {goal})",
            "",
        ]
        text += ["| config | dtype | layout | loss | gradient norm | |", "|---|---|---|---|---|---|"]
    for row in rows:
        verdict = row["verdict"] if row["verdict"] != "fail" else f"**fail** {row['reason']}"
        text.append(
            f"| {row['config']} | {row['dtype']} | {row['name']} | {number(row['loss'])} | {number(row['norm'])} | {verdict} |"
        )
    speeds = [p for p in results["parts"] if "tokens_per_s" in p]
    simulated = {(s["config"], s["stack"]): s for p in results["parts"] for s in p.get("simulated", [])}
    if speeds:
        text += ["", f"## Speed and memory: bf16, {ACCUMULATE} micro batches per step, no recomputation", ""]
        text += [
            f"Simulated: without the GPU; its peak must agree within {SAME_MEMORY:.0%}, its MFU bounds an H100.",
            "",
        ]
        columns = ["config", "stack", "parameters", "micro batch", "tokens/s", "TFLOP/s", "MFU", "MFU, causal half",
                   "simulated bound", "peak GB", "simulated GB", "estimated GB"]  # fmt: skip
        text += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for p in speeds:
        beside = simulated.get((p["config"], p["stack"]), {"mfu": {}, "peak_bytes": None})
        mfus = [number(p["mfu"].get(kind), "{:.1%}") for kind in ("full", "causal")]
        sizes = (p["peak_bytes"], beside["peak_bytes"], p["estimated_bytes"])
        cells = [
            p["config"], p["stack"], f"{p['parameters']:,}", str(p["micro_batch"]), f"{p['tokens_per_s']:,.0f}",
            f"{p['tflops']['full']:.0f}", *mfus, number(beside["mfu"].get("full"), "{:.1%}"),
            *(number(size, "{:.1f}", 1e-9) for size in sizes),
        ]  # fmt: skip
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def main() -> int:
    p = Parser(description=__doc__)
    p.add_argument("out", type=Path, metavar="OUT")
    p.add_argument("--cpu-rehearsal", action="store_true", help="run the parts on a CPU with tiny shapes")
    p.add_argument("--minutes", type=float, default=9.7, help="time limit (default: 9.7, which is enough for one family)")
    p.add_argument(
        "--only",
        nargs="+",
        choices=list(BUDGET),
        default=list(BUDGET),
        metavar="PART",
        help=f"run only these parts, of {', '.join(BUDGET)}",
    )
    p.add_argument("--family", nargs="+", choices=families.names(), default=families.names(), help="default: all families")
    p.add_argument("--configs", nargs="+", metavar="C", help="configs whose speed is measured (default: two per family)")
    p.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = p.parse_args()
    out = args.out.resolve()
    if args.child:
        values = child(args.child, out / "work", args.cpu_rehearsal)
        (out / "work" / "result.json").write_text(json.dumps(values), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # worker threads of the stacks outlive a normal exit by seconds
    begin = time.perf_counter()
    missing = [name for name in ("torch", "deepspeed", "megatron", "transformers", "accelerate") if not find(name)]
    if missing:
        raise BadInput(f"not installed: {', '.join(missing)}; bash scripts/setup.sh installs them")
    import torch

    if not args.cpu_rehearsal and not torch.cuda.is_available():
        raise BadInput(f"torch {torch.__version__} sees no CUDA GPU here; --cpu-rehearsal tries the parts on a CPU")
    unknown = [
        f"{family}/{name}"
        for family in args.family
        for name in args.configs or []
        if not (configs_of(family) / f"{name}.yaml").is_file()
    ]
    if unknown:
        raise BadInput(f"--configs: no recipes/{unknown[0].replace('/', '/configs/')}.yaml")
    if (out / "gpu_check.json").exists():
        raise BadInput(f"{out}: holds a GPU check already; choose another OUT")
    for name in ("work", "logs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(args.cpu_rehearsal), "rehearsal": args.cpu_rehearsal, "parts": []}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the part that runs is killed too
    for part in [part for part in parts(args.family, args.configs) if part[0] in args.only]:
        left = args.minutes * 60 - (time.perf_counter() - begin)
        results["parts"].append(run_part(part, out, args.cpu_rehearsal, left))
        results["seconds"] = time.perf_counter() - begin
        (out / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (out / "gpu_check.md").write_text(report(results), encoding="utf-8")
    shutil.rmtree(out / "work", ignore_errors=True)
    print(report(results))
    return 0 if all(part["status"] == "pass" for part in results["parts"]) else 1


def find(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    exit_cleanly(main)
