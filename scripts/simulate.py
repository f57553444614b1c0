"""Run one rank of a config on a GPU that does nothing: memory, kernels, collectives and host syncs, before a GPU is rented.

python -m scripts.simulate CONFIG --stack S [--world N] [--rank R] [a.b=c ...]
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import config
from common.command_line import Parser
from common.errors import BadInput, exit_cleanly
from common.simulation import build


def main() -> int:
    parser = Parser(prog="python -m scripts.simulate", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--stack", choices=config.STACKS)
    parser.add_argument("--world", type=int, default=1, help="number of GPUs of the run (default: 1)")
    parser.add_argument("--rank", type=int, default=0, help="the one that is simulated (default: 0)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the last one is counted (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    parser.add_argument("--fill", action="store_true", help="give every parameter its value, which can take minutes")
    parser.add_argument("--save", action="store_true", help="go on to the end: evaluation, checkpoint, export")
    parser.add_argument("--state", action="store_true", help="count what this rank writes of a checkpoint")
    parser.add_argument("--out", help="OUT of the run, which is kept, and resumed from if it holds a checkpoint")
    parser.add_argument("--data", action="store_true", help="read the config's own corpus (default: a synthetic one)")
    parser.add_argument("--memory", type=float, metavar="GB", help="of the GPU (default: 85, an H100's)")
    parser.add_argument("--top", type=int, default=12, help="kernels and operators to list (default: 12)")
    parser.add_argument("--cases", metavar="FILE", help="a JSON list of cases: the fields of run.Case")
    parser.add_argument("--report", action="store_true", help="write docs/simulation_report.md; goes on where it ended")
    args = parser.parse_intermixed_args()
    if not (args.cases or args.report) and not (args.config and args.stack):
        parser.error("CONFIG and --stack are needed, or --cases FILE, or --report")
    from common.simulation import null_gpu

    if not null_gpu.is_here():
        _again_with_null_gpu(args.memory)
    from common.simulation import run

    if args.report:
        from common.simulation import report

        report.record()
        return 0
    if args.cases:
        return _many(args.cases, args.json)
    case = run.Case(args.config, args.stack, args.world, args.rank, args.steps, args.overrides)
    found = run.run(case._replace(fill=args.fill, save=args.save, state=args.state, out=args.out, data=args.data))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(described(found, args.top)), flush=True)
    if found["fault"]:
        print(found["traceback"], file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if found["fault"] else 0)  # a normal exit would wait for threads of the stacks


def _again_with_null_gpu(gigabytes: float | None) -> None:
    """Replace this process by one in front of whose CUDA the null GPU stands."""
    environment = os.environ | {"LD_PRELOAD": build.preload()}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # as the launcher sets it where Megatron warns about any other value
    if gigabytes is not None:
        environment["NULL_GPU_MEMORY"] = str(int(gigabytes * 1e9))
    words = ["-m", "scripts.simulate", *sys.argv[1:]]
    os.execve(sys.executable, [sys.executable, *words], environment)


def _many(file: str, result: str | None) -> int:
    """Simulate a list of cases; prints a line for each. Returns the exit code."""
    from common.simulation import run

    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        cases = [run.Case(**value) for value in values]
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"--cases {file}: {error}") from None
    all_found = []
    for case, found in zip(cases, run.run_all(cases), strict=True):
        all_found.append(found)
        line = found["fault"] or f"peak {found['peak_bytes'] / 1e9:.2f} GB, {found['kernels']:,} kernels"
        print(f"{Path(case.config).stem} {case.stack} rank {case.rank} of {case.world}: {line}", flush=True)
    if result:
        Path(result).write_text(json.dumps(all_found, indent=1) + "\n", encoding="utf-8")
    return 1 if any(found["fault"] for found in all_found) else 0


# ---- the report ------------------------------------------------------------------------------------------------------


def described(found: Mapping[str, Any], top: int) -> list[str]:
    """The result of common/simulation/run.py as lines of at most 80 characters."""
    who = f"{Path(found['config']).stem}, {found['stack']}, rank {found['rank']} of {found['world']}"
    lines = [f"{who}, optimizer step {found['step']}"]
    if found["fault"]:
        lines.append(f"fault        {found['fault']}"[:80])
    if found["peak_bytes"] is not None:
        lines += ["", "memory (GB = 10^9 bytes)              peak    reserved"]
        lines += [f"  {name:<30} {_gb(p['peak_bytes'])} {_gb(p['reserved_bytes'])}" for name, p in found["phases"].items()]
        lines.append(f"  {'highest':<30} {_gb(found['peak_bytes'])} {_gb(found['reserved_bytes'])}")
    if found["estimate_bytes"] is not None:
        lines.append(f"  {'estimate of scripts.plan':<30} {_gb(found['estimate_bytes'])}")
    if found["kernels"] is None:
        return lines  # no step was finished
    kinds = found["memory_kinds"]
    lines += ["", "at the peak of the step                 GB"]
    lines += [f"  {name:<30} {_gb(size)}" for name, size in kinds.items()]
    flops = ", ".join(f"{dtype} {n:.3e}" for dtype, n in found["gemm_flops"].items()) or "none"
    attention = ", ".join(f"{backend} {n}" for backend, n in found["attention"].items()) or "none"
    lines += ["", "in one optimizer step"]
    lines += [f"  kernels        {found['kernels']:,}, of them matrix products {found['gemms']:,}"]
    lines += [f"  FLOPs          {flops} (matrix products)", f"  attention      {attention} (calls)"]
    if found["state"]:
        written, entries, index = (found["state"][key] for key in ("bytes_written", "pieces", "index_bytes"))
        lines += [f"  a checkpoint   {written / 1e6:,.1f} MB in {entries:,} pieces, {index / 1e3:,.1f} kB of the index"]
    lines += [f"  host syncs     {found['host_syncs']}"]
    lines += [f"    {n:>4} {place}"[:80] for place, n in list(found["sync_places"].items())[:top]]
    lines += ["", f"  {'collective':<24} {'dtype':<6} {'ranks':>6} {'calls':>7} {'MB':>12}"]
    lines += [
        f"  {c['op']:<24} {c['dtype']:<6} {c['group_size']:>6} {c['calls']:>7} {c['bytes'] / 1e6:>12.3f}"
        for c in found["collectives"]
    ]
    if found["compiled_regions"]:
        lines += ["", "  counted as one kernel each, since they would be compiled"]
        lines += [f"    {n:>6} {name}"[:80] for name, n in found["compiled_regions"].items()]
    lines += ["", "  most launched kernels"]
    lines += [f"    {k['calls']:>6} {k['kernel']}"[:80] for k in found["top_kernels"][:top]]
    return lines + _roofline(found["roofline"], top)


def _roofline(found: Mapping[str, Any] | None, top: int) -> list[str]:
    if not found:
        return []
    full, causal = found["mfu_full"], found["mfu_causal"]
    mfu = f"MFU {full:.1%}" + (f" ({causal:.1%} by the causal half)" if causal else "")
    lines = ["", f"at best on an H100: {found['seconds'] * 1e3:.1f} ms, {mfu}"]
    lines.append(f"  {'operator':<52} {'calls':>7} {'ms':>10}")
    lines += [f"  {o['operator'][:52]:<52} {o['calls']:>7} {o['seconds'] * 1e3:>10.2f}" for o in found["operators"][:top]]
    return lines


def _gb(size: float) -> str:
    return f"{size / 1e9:>11.3f}"


if __name__ == "__main__":
    exit_cleanly(main)
