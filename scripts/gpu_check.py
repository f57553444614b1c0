"""What only a GPU can show, of every family: parity of the stacks, speed, memory, the tests marked gpu.

    bash scripts/gpu_check.sh OUT [--family F ...] [--only parity|tests|speed ...] [--minutes M] [--cpu-rehearsal]

One GPU, no network, its own synthetic corpora. Each part runs in a process of its own under a time limit; one that fails,
or for which too little time is left, does not stop the others, but the exit code says so (1). Results: OUT/gpu_check.json
and OUT/gpu_check.md; what the parts printed: OUT/logs/. --cpu-rehearsal goes the same way on a CPU with tiny shapes: its
figures mean nothing, it only shows that every part runs.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import config as configs
from common.checkpoints import run_record
from common.data import tokenizer as tokenizers
from common.data.indexed_dataset import IndexedDatasetWriter, write_manifest
from common.errors import BadInput, exit_cleanly
from common.launch import processes
from common.paths import ROOT
from common.planning import flops, memory
from scripts.bench_speed import Enough, write_corpus

Layouts = dict[str, tuple[str, list[str]]]  # name -> stack, overrides


class Family(NamedTuple):
    """What a family has checked."""

    corpus: Callable[[Path, int, int], None]  # (prefix, tokens, ids): writes a synthetic corpus
    plain: str  # module whose losses(config, overrides, device) is the plain loop: [(loss, gradient norm)] by step
    tiny: tuple[str, ...]  # configs whose parity is checked
    sizes: dict[str, tuple[int, ...]]  # configs whose speed is measured -> micro batches to try, largest first


def write_sentences(prefix: Path, tokens: int, vocab: int) -> None:
    """A synthetic corpus for BERT: documents of 40 sentences of 8 to 40 ids, few of which are frequent."""
    rng = np.random.default_rng(0)
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    folder = prefix.with_name("tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    words = [*special, *(f"w{i}" for i in range(vocab - len(special)))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    writer = IndexedDatasetWriter(prefix, tokenizers.token_dtype(vocab))
    while writer.tokens < tokens:
        lengths = rng.integers(8, 40, 40)
        writer.add_sentences([5 + (rng.random(n) ** 4 * (vocab - 5)).astype(np.int64) for n in lengths])
    writer.finish()
    facts = {"tokenizer": "tokenizer", "tokenizer_hash": tokenizers.load(folder).hash, "tokenizer_size": vocab}
    write_manifest(prefix, facts)


def write_spans(prefix: Path, tokens: int, vocab: int) -> None:
    """A synthetic corpus for T5: documents of 1,000 ids, few of which are frequent, and the sentinels of its tokenizer."""
    from tokenizers import Tokenizer, models

    special, sentinels = ["<pad>", "</s>", "<unk>"], [f"<extra_id_{i}>" for i in reversed(range(tokenizers.SENTINELS))]
    words = vocab - len(special) - len(sentinels)
    pieces = [*special, *(f"\u2581w{i}" for i in range(words)), *sentinels]
    backend = Tokenizer(models.Unigram([(piece, 0.0) for piece in pieces], unk_id=2))
    backend.add_special_tokens([*special, *sentinels])
    folder = prefix.with_name("tokenizer")
    tokenizers.Tokenizer(backend).save(folder)
    rng = np.random.default_rng(0)
    writer = IndexedDatasetWriter(prefix, tokenizers.token_dtype(vocab))
    while writer.tokens < tokens:
        writer.add(len(special) + (rng.random(1000) ** 4 * words).astype(np.int64))
    writer.finish()
    facts = {"tokenizer": "tokenizer", "tokenizer_hash": tokenizers.load(folder).hash, "tokenizer_size": vocab}
    write_manifest(prefix, facts)


# A new family adds its line here.
FAMILIES = {
    "gpt": Family(
        write_corpus, "tests.plain", ("tiny", "tiny_llama"), {"megatron_355m": (16, 8, 4, 2), "gpt3_1.3b": (8, 4, 2, 1)}
    ),
    "bert": Family(
        write_sentences, "tests.plain_bert", ("tiny", "tiny_postln"),
        {"bert_large": (128, 64, 32, 16), "megatron_1.3b": (16, 8, 4, 2)},
    ),
    "t5": Family(
        write_spans, "tests.plain_t5", ("tiny", "tiny_v1_1"), {"t5_v1_1_large": (64, 32, 16, 8), "t5_3b": (16, 8, 4, 2)}
    ),
}  # fmt: skip
FP32: Layouts = {
    "baseline": ("baseline", []),
    "zero0": ("deepspeed", ["deepspeed.zero_stage=0"]),
    "zero1": ("deepspeed", ["deepspeed.zero_stage=1"]),
    "zero2": ("deepspeed", ["deepspeed.zero_stage=2"]),
    "zero3": ("deepspeed", ["deepspeed.zero_stage=3"]),
    "megatron": ("megatron", []),
    "megatron_distributed_optimizer": ("megatron", ["megatron.distributed_optimizer=true"]),
}
BF16: Layouts = {name: FP32[name] for name in FP32 if name != "zero2"}
STACKS = configs.STACKS

LOSS, NORM = 1e-5, 1e-4  # fp32 against the plain loop: largest difference of loss; of gradient norm, relative
FALL = 0.2  # at least, of the plain loop's loss
BF16_LOSS = 1e-2  # bf16 against the fp32 plain loop; tests/test_parity.py measured 2.9e-3 on a CPU
TINY_VOCAB = 512
TINY = (f"model.vocab_size={TINY_VOCAB}", "data.valid=null")
# One GPU, no pipeline, nothing recomputed, and the optimizer that each stack has; else as the config has it.
ALONE = (
    "data.valid=null", "baseline.recompute=false", "deepspeed.recompute=false", "deepspeed.zero_stage=1", "megatron.tp=1",
    "megatron.sequence_parallel=false", "megatron.distributed_optimizer=true", "optim.optimizer=adamw",
)  # fmt: skip
ACCUMULATE = 4  # micro batches a step
FULL = 0.75  # of the GPU's memory that the estimate may reach
REHEARSED = (
    "model.layers=2", "model.hidden=64", "model.heads=4", "model.vocab_size=512", "data.seq_len=64",
)  # fmt: skip
WARMUP, STEPS = 3, 6  # of a speed run

# Seconds: what a part needs at least to be begun, and when it is ended.
BUDGET = {"parity": (60, 170), "tests": (45, 130), "speed": (45, 90)}


# ---- inside a part's own process -------------------------------------------------------------------------------------


def train(module: str, config: str, out: Path, overrides: Sequence[str]) -> None:
    """One recipe from start to end in this process; it may be called again for another."""
    from tests import drive

    drive._forget_accelerator()
    processes.start()
    before = drive._groups()
    try:
        importlib.import_module(module).main([config, str(out), *overrides])
    finally:
        drive._leave_groups(before)


def lines(out: Path) -> dict[int, dict[str, float]]:
    """The training lines of a run by step."""
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    return {line["step"]: line for line in map(json.loads, text.splitlines()) if "loss" in line}


def config_path(family: str, name: str) -> str:
    return str(ROOT / f"recipes/{family}/configs/{name}.yaml")


def parity(family: str, folder: Path) -> dict[str, Any]:
    """Every layout against the plain fp32 loop on the same device, and against each other."""
    processes.quiet()
    corpus = folder / "corpus" / "train"
    FAMILIES[family].corpus(corpus, 50_000, TINY_VOCAB)
    device = processes.start().device
    plain = importlib.import_module(FAMILIES[family].plain)
    shared = [*TINY, f"data.train={corpus}"]
    rows, spread, fell = [], {}, []
    for arch in FAMILIES[family].tiny:
        path = config_path(family, arch)
        clear = getattr(plain, "clear_of_kinks", None)  # T5 1.0 has ReLUs, which have no derivative at 0
        given = clear(lambda more, path=path: plain.steps(Path(path), more, device), shared) if clear else shared
        expected = plain.losses(Path(path), given, device)
        fell.append(expected[0][0] - expected[-1][0])
        for dtype, layouts in (("fp32", FP32), ("bf16", BF16)):
            found = []
            for name, (stack, overrides) in layouts.items():
                module, out = f"recipes.{family}.{stack}.pretrain", folder / dtype / arch / name
                begin = time.perf_counter()
                row: dict[str, Any] = {"config": arch, "dtype": dtype, "layout": name}
                try:
                    train(module, path, out, [*given, f"train.dtype={dtype}", *overrides])
                    row |= compared(lines(out), expected, dtype)
                    found.append(row.pop("losses"))
                except Exception as error:  # the next layout may do: there is one process, no collective hangs
                    traceback.print_exc()
                    row |= {"ok": False, "error": told(error)}
                rows.append(row | {"seconds": time.perf_counter() - begin})
            if len(found) > 1:
                spread[f"{arch}, {dtype}"] = max(max(values) - min(values) for values in zip(*found, strict=True))
    return {"ok": all(row["ok"] for row in rows) and min(fell) > FALL, "rows": rows, "spread": spread, "fell": fell}


def compared(steps: dict[int, dict[str, float]], expected: list[tuple[float, float]], dtype: str) -> dict[str, Any]:
    """A run's steps beside the plain loop's losses and gradient norms."""
    losses = [steps[n]["loss"] for n in range(1, len(expected) + 1)]
    norms = [steps[n]["grad_norm"] for n in range(1, len(expected) + 1)]
    loss = max(abs(a - b) for a, (b, _) in zip(losses, expected, strict=True))
    norm = max(abs(a / b - 1) for a, (_, b) in zip(norms, expected, strict=True))
    ok = loss <= LOSS and norm <= NORM if dtype == "fp32" else 0 < loss <= BF16_LOSS  # 0: bf16 was not used
    return {"ok": ok, "loss_diff": loss, "norm_diff": norm, "losses": losses}


def told(error: Exception) -> str:
    """The first line of what an exception says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def speed(family: str, name: str, stack: str, folder: Path, rehearsal: bool) -> dict[str, Any]:
    """Tokens a second, MFU and peak memory of one size on one stack; the largest micro batch that fits."""
    processes.quiet()
    import torch

    device = processes.start().device
    cuda = device.type == "cuda"
    task = importlib.import_module(f"recipes.{family}.task")
    fixed = [*ALONE, *(REHEARSED if rehearsal else ())]
    model = configs.load(config_path(family, name), fixed, task.Config).model
    corpus = folder / "corpus" / name / "train"
    tokens = 200_000 if rehearsal else 2_000_000
    FAMILIES[family].corpus(corpus, tokens, model.vocab_size)
    room = torch.cuda.get_device_properties(device).total_memory if cuda else math.inf
    notes = []
    sizes = FAMILIES[family].sizes[name]
    for micro in sizes[-1:] if rehearsal else sizes:
        overrides = [
            *fixed, f"data.train={corpus}", f"{stack}.micro_batch={micro}", f"train.global_batch={micro * ACCUMULATE}",
        ]  # fmt: skip
        cfg = configs.load(config_path(family, name), overrides, task.Config)
        cfg = cfg.model_copy(update={"model": cfg.model.resolve(cfg, None)})
        estimate = memory.estimate_for(cfg, cfg.model, stack, 1)["total"]
        if estimate > FULL * room:
            notes.append(f"micro batch {micro}: {estimate / 1e9:.0f} GB estimated, too much")
            continue
        held = torch.cuda.memory_allocated(device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        module, out = f"recipes.{family}.{stack}.pretrain", folder / f"{name}_{stack}_{micro}"
        seconds, tokens_of = [], []
        with contextlib.suppress(torch.OutOfMemoryError):
            seconds, tokens_of = timed(module, config_path(family, name), out, overrides)
        if not seconds:
            notes.append(f"micro batch {micro}: out of memory")
            forget()
            continue
        rate = statistics.mean(tokens_of) / statistics.median(seconds)  # padding left out
        per_token = task.forward_backward_flops(cfg.model, cfg.data)
        gpu = torch.cuda.get_device_name(device) if cuda else None
        return {
            "ok": True, "config": name, "stack": stack, "micro_batch": micro, "parameters": cfg.model.parameter_count(),
            "tokens_per_s": rate, "ms": statistics.median(seconds) * 1e3,
            "mfu": {kind: flops.mfu(value, rate, gpu, 1) for kind, value in per_token.items()},
            "tflops": {kind: value * rate / 1e12 for kind, value in per_token.items()},
            "peak_bytes": torch.cuda.max_memory_allocated(device) - held if cuda else None,
            "reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
            "estimated_bytes": estimate, "notes": notes,
        }  # fmt: skip
    return {"ok": False, "config": name, "stack": stack, "notes": notes, "error": "no micro batch fits"}


def timed(module: str, config: str, out: Path, overrides: Sequence[str]) -> tuple[list[float], list[int]]:
    """Seconds and tokens of STEPS steps of a recipe's own loop, after WARMUP; nothing is saved."""
    recipe = importlib.import_module(module)
    marks: list[float] = []
    tokens_of: list[int] = []

    class Stopwatch(recipe.Log):
        def begin_step(self) -> None:
            if self.device.type == "cuda":
                import torch

                torch.cuda.synchronize(self.device)
            marks.append(time.perf_counter())
            if len(marks) > WARMUP + STEPS:
                raise Enough
            super().begin_step()

        def step(self, step: int, loss: float, grad_norm: float, lr: float, tokens: int, **parts: float) -> None:
            tokens_of.append(tokens)
            super().step(step, loss, grad_norm, lr, tokens, **parts)

    plain, recipe.Log = recipe.Log, Stopwatch
    try:
        train(module, config, out, overrides)
    except Enough:
        pass
    finally:
        recipe.Log = plain
    seconds = [after - before for before, after in zip(marks[WARMUP:], marks[WARMUP + 1 :], strict=False)]
    return seconds, tokens_of[WARMUP:]


def forget() -> None:
    """Give back what a run that failed still holds."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tests(folder: Path, rehearsal: bool) -> dict[str, Any]:
    """The tests marked gpu."""
    if importlib.util.find_spec("pytest") is None:
        return {"ok": False, "error": "pytest is not installed"}
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text("utf-8")]
    # without the project's addopts: a marker of a plugin that is not installed is no error then
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += [f"--basetemp={folder / 'tests'}", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "nothing printed")
    ok = done.returncode == 0 and (rehearsal or " passed" in last)  # all skipped is no proof
    return {"ok": ok, "summary": last.strip("= ")}


def child(part: Sequence[str], folder: Path, rehearsal: bool) -> dict[str, Any]:
    kind, *words = part
    try:
        if kind == "parity":
            return parity(*words, folder)
        if kind == "speed":
            return speed(*words, folder, rehearsal)
        return tests(folder, rehearsal)
    except Exception as error:
        traceback.print_exc()
        return {"ok": False, "error": told(error)}


# ---- the parts, one after the other ----------------------------------------------------------------------------------


def parts(families: Sequence[str]) -> list[tuple[str, ...]]:
    return [
        *(("parity", family) for family in families),
        ("tests",),
        *(("speed", family, name, stack) for family in families for name in FAMILIES[family].sizes for stack in STACKS),
    ]


def run_part(part: Sequence[str], out: Path, rehearsal: bool, left: float) -> dict[str, Any]:
    """One part in a process of its own: its result, with status pass, fail or skipped."""
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
        found = {"ok": False, "error": f"ended after {limit:.0f} s"}
    elif result.exists():
        found = json.loads(result.read_text(encoding="utf-8"))
    else:
        found = {"ok": False, "error": f"exit code {code}, see {log}"}
    seconds = time.perf_counter() - begin
    status = "pass" if found.pop("ok") else "fail"
    print(f"{status:<7} {name}  {seconds:.0f} s  {found.get('error') or found.get('summary') or ''}", flush=True)
    return {"part": name, "status": status, "seconds": seconds, **found}


def machine(rehearsal: bool) -> dict[str, Any]:
    import torch

    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip() or None
    cuda = torch.cuda.is_available() and not rehearsal
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "driver": driver, "cuda": torch.version.cuda, "torch": torch.__version__, "python": platform.python_version(),
        "commit": run_record.commit(), "versions": {name: run_record.version(name) for name in run_record.PACKAGES},
    }  # fmt: skip


# ---- telling ---------------------------------------------------------------------------------------------------------


def number(value: float | None, form: str = "{:.1e}", scale: float = 1.0) -> str:
    return "-" if value is None else form.format(value * scale)


def report(found: dict[str, Any]) -> str:
    """The Markdown of OUT/gpu_check.md."""
    m = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in (m["versions"] | {"torch": m["torch"]}).items() if version)
    on = f"{m['gpu']}, driver {m['driver']}, CUDA {m['cuda']}" if m["gpu"] else "a CPU"
    text = ["# GPU check", "", f"{on}, python {m['python']}, {versions}, commit {m['commit']}"]
    if found["rehearsal"]:
        text += ["", "**Rehearsal on a CPU with tiny shapes: the figures mean nothing.**"]
    text += ["", "| part | status | s | note |", "|---|---|---|---|"]
    for p in found["parts"]:
        note = p.get("error") or p.get("summary") or "; ".join(p.get("notes", []))
        text.append(f"| {p['part']} | {p['status']} | {p['seconds']:.0f} | {note} |")
    rows = [row for p in found["parts"] for row in p.get("rows", [])]
    if rows:
        goal = f"loss {LOSS:g} and norm {NORM:g} in fp32, loss {BF16_LOSS:g} in bf16"
        text += ["", f"## Parity: one process, 20 steps, against a plain PyTorch loop in fp32 (goal: {goal})", ""]
        text += ["| config | dtype | layout | loss | gradient norm, relative | |", "|---|---|---|---|---|---|"]
    for row in rows:
        verdict = "pass" if row["ok"] else f"**fail** {row.get('error', '')}"
        diffs = f"{number(row.get('loss_diff'))} | {number(row.get('norm_diff'))}"
        text.append(f"| {row['config']} | {row['dtype']} | {row['layout']} | {diffs} | {verdict} |")
    for p in found["parts"]:
        text += [
            f"\nLargest difference between the layouts, {name}: {value:.1e}" for name, value in p.get("spread", {}).items()
        ]
    speeds = [p for p in found["parts"] if "tokens_per_s" in p]
    if speeds:
        text += ["", f"## Speed and memory: bf16, {ACCUMULATE} micro batches a step, nothing recomputed", ""]
        columns = ["config", "stack", "parameters", "micro batch", "tokens/s", "TFLOP/s", "MFU", "MFU, causal half",
                   "peak GB", "estimated GB"]  # fmt: skip
        text += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for p in speeds:
        mfus = " | ".join(number(p["mfu"].get(kind), "{:.1%}") for kind in ("full", "causal"))
        gb = " | ".join(number(p[kind], "{:.1f}", 1e-9) for kind in ("peak_bytes", "estimated_bytes"))
        text.append(
            f"| {p['config']} | {p['stack']} | {p['parameters']:,} | {p['micro_batch']} | {p['tokens_per_s']:,.0f} | "
            f"{p['tflops']['full']:.0f} | {mfus} | {gb} |"
        )
    return "\n".join(text) + "\n"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, metavar="OUT")
    p.add_argument("--cpu-rehearsal", action="store_true", help="the same way on a CPU with tiny shapes")
    p.add_argument("--minutes", type=float, default=8.7, help="in all (default 8.7, which suits one family)")
    p.add_argument("--only", nargs="+", choices=list(BUDGET), default=list(BUDGET), help="these parts alone")
    p.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="these alone (default: all)")
    p.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = p.parse_args()
    out = args.out.resolve()
    if args.child:
        found = child(args.child, out / "work", args.cpu_rehearsal)
        (out / "work" / "result.json").write_text(json.dumps(found), encoding="utf-8")
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
    if (out / "gpu_check.json").exists():
        raise BadInput(f"{out}: holds a GPU check already; choose another OUT")
    for name in ("work", "logs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(args.cpu_rehearsal), "rehearsal": args.cpu_rehearsal, "parts": []}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and the part that runs ends too
    for part in [part for part in parts(args.family) if part[0] in args.only]:
        left = args.minutes * 60 - (time.perf_counter() - begin)
        found["parts"].append(run_part(part, out, args.cpu_rehearsal, left))
        found["seconds"] = time.perf_counter() - begin
        (out / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (out / "gpu_check.md").write_text(report(found), encoding="utf-8")
    shutil.rmtree(out / "work", ignore_errors=True)
    print(report(found))
    return 0 if all(part["status"] == "pass" for part in found["parts"]) else 1


def find(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    exit_cleanly(main)
