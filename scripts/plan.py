"""What a config needs on each stack and layout, before anything is started: memory per GPU, tokens, FLOPs, days.

python -m scripts.plan CONFIG [--gpus N] [a.b=c ...]    memory per GPU of the usual layouts of each stack
python -m scripts.plan CONFIG --gpus N --gpu NAME [--own] [--json]    the fastest layouts that fit, with time and memory
python -m scripts.plan CONFIG --gpus N --gpu NAME --simulate    the same, and what scripts.simulate finds for those layouts
python -m scripts.plan CONFIG --gpus N --calibrate RUN ...    the same, by constants fitted to the measured steps of runs
python -m scripts.plan --validate    predictions beside published and simulated values; writes docs/planner.md, docs/memory.md
"""

import argparse
import datetime
import json
import math
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import config, families, pictures, screen
from common.command_line import Parser
from common.comparison import planned
from common.comparison.layouts import name_of
from common.config import Config
from common.errors import BadInput, exit_cleanly
from common.layout import layout_for
from common.paths import ROOT
from common.planning import calibration, hardware, memory, search, simulated
from common.planning.hardware import gpu
from common.preflight import task_module
from common.yaml_files import read_yaml

COLUMNS = {"gradients": "grads", "optimizer": "optim", "activations": "activ", "total": "peak"}  # shorter names of parts
CARDS = {"40 GB": "A100-40GB", "80 GB": "H100", "141 GB": "H200"}


def main() -> None:
    parser = Parser(prog="python -m scripts.plan", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--gpus", type=int, help="number of GPUs (default: 8; with --calibrate: those of the first run)")
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"predict the time on this GPU: {', '.join(g.name for g in hardware.GPUS)}"
    )
    parser.add_argument("--network", metavar="CxRGb", help="network cards per node and their rate, such as 8x400Gb")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument(
        "--host-memory", type=float, metavar="GB", default=hardware.HOST_MEMORY / 1e9,
        help="memory of a node, for what deepspeed.offload keeps there (default: %(default).0f)",
    )  # fmt: skip
    parser.add_argument(
        "--stack",
        nargs="+",
        choices=config.STACKS,
        metavar="STACK",
        help=f"of {', '.join(config.STACKS)} (default: all that the family has)",
    )
    parser.add_argument("--price", type=float, metavar="P", help="per GPU and hour, to print the cost of the run")
    parser.add_argument("--own", action="store_true", help="predict the config's own layouts alone")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="layouts to print per stack (default: 3)")
    parser.add_argument("--scale", metavar="N,N,...", help="the best layout of each stack on each of these numbers of GPUs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --scale: also draw it, as .svg or .png")
    parser.add_argument(
        "--dense-attention", choices=("unfused", "flash"), help="kernels of the attention (default: what the stack chooses)"
    )
    parser.add_argument("--recompute-counted", action="store_true", help="MFU counts recomputed layers twice, as PTD-P does")
    parser.add_argument(
        "--json", action="store_true", help="print the memory, or with --gpu all predictions, the best first, as JSON"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the config with the best layouts there")
    parser.add_argument("--validate", action="store_true", help="print and write docs/planner.md and docs/memory.md")
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="simulate the printed layouts (scripts/simulate.py) and compare; without CONFIG: those of docs/memory.md, then "
        "--validate",
    )
    # an option that takes several values would swallow the overrides that follow it
    overrides = [word for word in sys.argv[1:] if re.match(r"\w+(\.\w+)+=", word)]
    parser.add_argument(
        "--calibrate", nargs="+", type=Path, metavar="RUN", help="fit constants of the GPU or CPU to the steps of these "
        "runs: OUT of a recipe, or OUT of scripts/gpu_check.sh"
    )  # fmt: skip
    args = parser.parse_intermixed_args([word for word in sys.argv[1:] if word not in overrides])
    args.overrides += overrides
    if args.validate or args.simulate and args.config is None:
        return validate(args.simulate)
    if args.config is None:
        raise BadInput("scripts.plan: give a config, such as recipes/gpt/configs/gpt3_1.3b.yaml, or --validate")
    args.gpus = 8 if args.gpus is None and not args.calibrate else args.gpus
    for name in ("gpus", "gpus_per_node", "top"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if not 0 <= args.host_memory < math.inf:
        raise BadInput(f"--host-memory {args.host_memory}: must be 0 or more, in GB per node")
    if args.price is not None and not 0 <= args.price < math.inf:
        raise BadInput(f"--price {args.price}: must be 0 or more, per GPU and hour")
    needing = ("network", "price", "scale", "write", "dense_attention", "own", "recompute_counted", "simulate")
    wanting = [name.replace("_", "-") for name in needing if getattr(args, name) not in (None, False)]
    if args.plot and not args.scale:
        raise BadInput(f"--plot {args.plot}: draws --scale N,N,...; give it")
    if args.plot and args.plot.suffix not in (".png", ".svg"):
        raise BadInput(f"--plot {args.plot}: must end in .svg or .png")
    if args.write and args.write.exists():
        raise BadInput(f"--write {args.write}: exists; give another name, or delete it")
    for word in args.overrides:
        if word.isdecimal():
            raise BadInput(f"{word}: is no override a.b=c; give a number of GPUs as --gpus {word}")
    given = [name for name in ("scale", "json", "write") if getattr(args, name)]
    if args.simulate and given:
        raise BadInput(f"--simulate and --{given[0]}: exclude each other; give one of them per command")
    if len(given) > 1 or args.scale and args.own:
        both = " and ".join(f"--{name}" for name in [*given, *(["own"] if args.own else [])])
        raise BadInput(f"{both}: exclude each other; give one of them per command")
    if args.calibrate and args.gpu:
        raise BadInput(f"--gpu {args.gpu}: the runs of --calibrate name their GPU; leave it out")
    if wanting and not (args.gpu or args.calibrate):
        raise BadInput(f"--{wanting[0]}: needs --gpu NAME, the GPU whose time is predicted")

    task = task_module(families.of_config(args.config), read_yaml(args.config))
    cfg = config.load(args.config, args.overrides, task.Config)
    if cfg.model.vocab_size is None:
        raise BadInput(f"{args.config}: gives no model.vocab_size (the tokenizer decides); add model.vocab_size=N")
    cfg = config.resolve(cfg, task.ResolvedConfig, None)
    if args.gpu or args.calibrate:
        predictions(cfg, args)
    else:
        memory_table(cfg, task, args.gpus, args.json, args.host_memory * 1e9 / min(args.gpus, args.gpus_per_node))


def memory_table(cfg: Config, task: Any, gpus: int, as_json: bool, host: float) -> None:
    """Print tokens and FLOPs of a run, and the memory of the usual layouts of each stack in each phase. host: bytes of the
    node's memory per GPU."""
    model, stacks = cfg.model, families.stacks(task.FAMILY)
    if as_json:
        phases = [
            {"seq_len": phase.data.seq_len, "layouts": list(memory_rows(phase, gpus, stacks, host))}
            for phase in config.views(cfg)
        ]
        print(json.dumps({"parameters": model.parameter_count(), "gpus": gpus, "phases": phases}, indent=1))
        return
    print(f"parameters     {model.parameter_count():,}")
    begin, in_all, flops_in_all = 0, 0, 0.0
    for phase in config.views(cfg):
        per_token = task.forward_backward_flops(model, phase.data)
        tokens = phase.train.global_batch * phase.data.sample_tokens
        steps, begin = phase.train.steps - begin, phase.train.steps
        in_all, flops_in_all = in_all + tokens * steps, flops_in_all + tokens * steps * per_token["full"]
        causal = f" ({per_token['causal']:.4g} counting the causal half of attention)" if "causal" in per_token else ""
        print(f"FLOPs/token    {per_token['full']:.4g}{causal}")
        product = f"{phase.train.global_batch} x {phase.data.sample_tokens} = {tokens:,}"
        print(f"tokens/step    {product}; in {steps:,} steps {tokens * steps:.4g}")
    print(f"in all         {in_all:.4g} tokens, {flops_in_all:.4g} FLOPs")
    views = config.views(cfg)
    for number, phase in enumerate(views, 1):
        which = f", phase {number} ({phase.data.seq_len} tokens per sample)" if len(views) > 1 else ""
        text = f"GB (10^9 bytes) on each of {gpus} GPUs, by common/planning/memory.py{which}; *: the config's own layout"
        print("\n" + textwrap.fill(text, screen.width(), break_on_hyphens=False))
        print(table(list(memory_rows(phase, gpus, stacks, host))))


# ---- time ------------------------------------------------------------------------------------------------------------


def predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Print, or write, the fastest layouts that fit."""
    network = hardware.network(args.network, args.gpus_per_node) if args.network else None
    stacks = args.stack or families.stacks(families.of_config(args.config))
    assumed = search.Assumed(args.dense_attention, args.recompute_counted)
    if args.calibrate:
        cluster, host = calibrated(args, network)
        assumed = replace(assumed, host=host)
    else:
        cluster = hardware.Cluster(hardware.gpu(args.gpu), args.gpus_per_node, network)
    cluster = replace(cluster, host_memory=args.host_memory * 1e9)
    card = cluster.gpu
    if card.is_cpu:
        return on_cpu(cfg, cluster, stacks, args)
    if args.scale:
        return scaling(cfg, cluster, stacks, args, assumed)
    left_out: list[str] = []
    if args.own:
        found, left_out = own_layouts(cfg, stacks, cluster, args.gpus, assumed)
    else:
        found, left_out = search.search(cfg, stacks, cluster, args.gpus, assumed)
    tokens = float(cfg.train.steps * cfg.train.global_batch * cfg.data.sample_tokens)
    if args.json:
        print(json.dumps([one.as_json(tokens, args.price) for one in found], indent=1))
        return
    print(f"{args.gpus} x {card.name}, predicted by common/planning/step_time.py (docs/planner.md)")
    if cfg.train.dtype == "fp32":
        print("train.dtype=fp32, but products are predicted at the rate of bf16: a step takes\nlonger. Give train.dtype=bf16.")
    shown: list[search.Prediction] = []
    for stack in stacks:
        own = [one for one in found if one.stack == stack]
        fitting = own if args.own else [one for one in own if one.fits][: args.top]
        shown += fitting
        for one in fitting:
            print("\n" + "\n".join(block(one, tokens, args.price, cluster)))
            if not one.fits:
                print("\n".join(textwrap.wrap(search.instead(one, cluster), 80, initial_indent="  ")))
        if not fitting and not args.own:
            print(f"\n{stack}: no layout fits on {args.gpus} GPUs; {search.needs(cfg, stack, cluster, args.gpus)}")
    for line in left_out:
        print("\n" + textwrap.fill(f"left out: {line}", 80, subsequent_indent="  "))
    if args.simulate:
        beside_simulation(shown, args)
    if args.write:
        write(args.config, args.write, found)


def calibrated(args: argparse.Namespace, network: float | None) -> tuple[hardware.Cluster, float]:
    """The GPUs with constants that are fitted to the runs of --calibrate, and the seconds of the host per layer. Prints how far
    the runs are from their prediction, before and after."""
    runs = [run for path in args.calibrate for run in calibration.read(path)]
    args.gpus = args.gpus or runs[0].world
    clusters = calibration.clusters_of(runs, args.gpus_per_node, network)
    factors = calibration.fit(runs, clusters, calibration.constants_of(runs))
    if not args.json:
        print("\n".join(calibration.report(runs, clusters, factors)) + "\n")
    cluster = clusters[0]
    if cluster.gpu.is_cpu and args.gpus not in {run.world for run in runs}:
        raise BadInput(f"--gpus {args.gpus}: none of the runs has as many processes, so that their rates are not known")
    cluster = next(c for run, c in zip(runs, clusters, strict=True) if not c.gpu.is_cpu or run.world == args.gpus)
    return calibration.changed(cluster, factors), search.HOST * factors.get("host", 1.0)


def on_cpu(cfg: Config, cluster: hardware.Cluster, stacks: Sequence[str], args: argparse.Namespace) -> None:
    """Print the seconds of a step of the config's own layouts, in processes of this machine's CPU."""
    for name in ("json", "scale", "write", "simulate"):
        if getattr(args, name):
            raise BadInput(f"--{name}: is of GPUs, and the runs of --calibrate are of a CPU; leave it out")
    print(f"{args.gpus} processes of this CPU, the config's own layouts")
    for stack in stacks:
        try:
            time = search.step_of(cfg, stack, cluster, args.gpus)[3]
        except BadInput as error:
            print(f"{stack}  cannot: {error.problems[0]}")
            continue
        shares = {name.replace("_", " "): value / time.total for name, value in vars(time).items()}
        parts = ", ".join(
            f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda i: -i[1]) if share >= 0.005
        )
        rate = cfg.train.global_batch * cfg.data.sample_tokens / time.total
        print("\n".join(textwrap.wrap(f"{stack}  {time.total:.3g} s per step, {rate:,.0f} tokens/s: {parts}", 80)))


def own_layouts(
    cfg: Config, stacks: Sequence[str], cluster: hardware.Cluster, gpus: int, assumed: search.Assumed
) -> tuple[list[search.Prediction], list[str]]:
    """The predictions for the config's own layouts, and why a stack has none. BadInput if no stack has one."""
    found, left_out = [], []
    for stack in stacks:
        try:
            found.append(search.predict(cfg, stack, cluster, gpus, assumed))
        except BadInput as error:
            left_out += error.problems
    if not found:
        raise BadInput(left_out)
    return found, left_out


def block(one: search.Prediction, tokens: float, price: float | None, cluster: hardware.Cluster) -> list[str]:
    """A prediction in lines of at most 80 characters."""
    days = tokens / one.tokens_per_s / 86400
    cost = "" if price is None else f", costs {days * 24 * one.shared.world * price:,.0f}"
    causal = f" ({one.mfu_causal:.1%} causal)" if one.mfu_causal != one.mfu_full else ""
    layout = " ".join(f"{key}={str(value).lower()}" for key, value in one.layout.items())
    parts = {name: one.memory[name] for name in (*memory.PARTS, *memory.BESIDE)}
    sizes = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
    shares = {name.replace("_", " "): value / one.seconds for name, value in one.time.items()}
    times = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda i: -i[1]) if share >= 0.005)
    near = (
        f"up to {one.near[1]:.1%} on the nearest published rows"
        if one.near
        else f"no published row is near, up to {planned.error_of(one):.1%} on others"
    )
    room = cluster.gpu.memory
    host = f"{one.host_memory / 1e9:,.0f} of {cluster.host_memory / 1e9:,.0f} GB of each node for what is offloaded"
    lines = [
        f"{one.stack}  {one.seconds:.3g} s per step, {one.tokens_per_s:,.0f} tokens/s, MFU {one.mfu_full:.1%}{causal}",
        f"  layout  {layout}",
        f"  memory  {one.memory['required'] / 1e9:.1f} of {room / 1e9:.1f} GB{'' if one.fits else ', does not fit'}: {sizes}",
        *([f"  host    {host}"] if one.host_memory else []),
        f"  time    {times}",
        f"  run     {days:.3g} days{cost}; error: {near}",
    ]
    return [line for text in lines for line in textwrap.wrap(text, 80, subsequent_indent=" " * 10)]


def beside_simulation(shown: Sequence[search.Prediction], args: argparse.Namespace) -> None:
    """Simulate layouts on the GPU that computes nothing, the first and the last rank of a pipeline, and print peak, bytes of
    the collectives and roofline beside what is predicted."""
    from common.planning import traffic

    cases, of_case = [], []
    for one in shown:
        values = getattr(one.cfg, one.stack).model_dump(exclude={"extra"}, exclude_none=True)
        words = [f"{one.stack}.{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in values.items()]
        for rank in sorted({0, args.gpus - 1}) if one.shared.pp > 1 else (0,):
            cases.append({"config": args.config, "stack": one.stack, "world": args.gpus, "rank": rank,
                          "overrides": [*args.overrides, *words]})  # fmt: skip
            of_case.append(one)
    found = simulated.run(cases)
    for number, (one, case, result) in enumerate(zip(of_case, cases, found, strict=True)):
        if one is not of_case[number - 1] or number == 0:
            own = [result for other, result in zip(of_case, found, strict=True) if other is one]
            peak = max(each["peak_bytes"] or 0 for each in own)
            print(f"\n{one.stack} {' '.join(f'{key}={str(value).lower()}' for key, value in one.layout.items())}")
            if peak:
                total = one.memory["total"]
                print(f"  peak         simulated {peak / 1e9:.2f} GB, predicted {total / 1e9:.2f} ({total / peak - 1:+.1%})")
        if result["fault"]:
            print(f"  rank {case['rank']}: {result['fault']}")
            continue
        seconds = result["roofline"]["seconds"]
        predicted = f"predicted {one.seconds:.3g}"
        if one.seconds < seconds and args.gpu and gpu(args.gpu).name == "H100":
            predicted += ", less than that"
        print(f"  rank {case['rank']:<7} at best {seconds:.3g} s on an H100 without collectives, {predicted}")
        there = traffic.reported(result["collectives"])
        try:
            counted = traffic.collectives(one.cfg, one.stack, args.gpus, case["rank"] * one.shared.pp // args.gpus)
        except BadInput as error:
            counted = None
            print(f"    {error.problems[0]}")
        for name in sorted({*there, *(counted or {})}):
            size = there.get(name, 0)
            beside = "" if counted is None else "equal" if counted.get(name) == size else f"predicted {counted.get(name, 0):,}"
            print(f"    {name:<28} {size:>16,} bytes  {beside}")


def scaling(
    cfg: Config, cluster: hardware.Cluster, stacks: Sequence[str], args: argparse.Namespace, assumed: search.Assumed
) -> None:
    """Print, and draw, the best layout of each stack on each number of GPUs: with the config's global batch (strong scaling),
    and with one that grows with the number (weak scaling)."""
    numbers = args.scale
    counts = sorted({int(word) for word in numbers.split(",") if word.strip().isdigit() and int(word) > 0})
    if not counts or not all(word.strip().isdigit() for word in numbers.split(",")):
        raise BadInput(f"--scale {numbers}: must be numbers of GPUs, such as 8,64,512")
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for kind in ("strong", "weak"):
        print(f"{kind} scaling" + (", global batch in proportion to the GPUs" if kind == "weak" else ""))
        print(f"  {'GPUs':>6} {'stack':<10} {'batch':>7} {'s/step':>8} {'tokens/s':>12} {'MFU':>6}")
        curves[kind] = {stack: [] for stack in stacks}
        for gpus in counts:
            batch = cfg.train.global_batch * gpus // counts[0] if kind == "weak" else cfg.train.global_batch
            grown = cfg.model_copy(update={"train": cfg.train.model_copy(update={"global_batch": batch})})
            for stack in stacks:
                best = next((one for one in search.search(grown, [stack], cluster, gpus, assumed)[0] if one.fits), None)
                row = f"{best.seconds:>8.3g} {best.tokens_per_s:>12,.0f} {best.mfu_full:>6.1%}" if best else "  no layout fits"
                print(f"  {gpus:>6} {stack:<10} {batch:>7} {row}")
                curves[kind][stack] += [(gpus, best.tokens_per_s)] if best else []
    if args.plot:
        about = f"{Path(args.config).stem}; predicted for {cluster.gpu.name}, {datetime.date.today().isoformat()}"
        draw(curves, counts, args.plot, about)


def draw(curves: dict[str, dict[str, list[tuple[int, float]]]], counts: Sequence[int], target: Path, about: str) -> None:
    """Tokens/s over the number of GPUs, both on logarithmic axes, strong and weak scaling side by side; dotted: in proportion
    to the GPUs from a curve's first point."""
    figure, both = pictures.new(1, 2, sharey=True)
    for axes, (kind, of_stack) in zip(both, curves.items(), strict=True):
        for stack, points in of_stack.items():
            if points:
                numbers, rates = zip(*points, strict=True)
                colour = pictures.STACK_COLOURS[stack]
                axes.plot(numbers, rates, marker=".", label=stack, color=colour)
                axes.plot(numbers, [rates[0] * n / numbers[0] for n in numbers], ":", color=colour)
        axes.set(xscale="log", yscale="log", title=f"{kind} scaling", xlabel="GPUs")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.grid()
    both[0].set_ylabel("tokens/s; dotted: in proportion")
    both[0].legend()
    pictures.label(figure, "Predicted scaling of the fastest layouts", about)
    pictures.save(figure, target)
    print(f"drawn to {target}")


def write(source: str, target: Path, found: Sequence[search.Prediction]) -> None:
    """Write a config whose sections of the stacks are the best layouts that fit."""
    best = {one.stack: one for one in reversed(found) if one.fits}
    lines = Path(source).read_text(encoding="utf-8").splitlines()
    for stack in best:
        if not any(line.startswith(f"{stack}: {{") for line in lines):
            raise BadInput(
                f"--write: {source} has no section `{stack}: {{...}}` in one line to replace; use --json, and edit it"
            )
    for stack, one in best.items():
        values = ", ".join(f"{key}: {json.dumps(value)}" for key, value in one.layout.items())
        lines = [f"{stack}: {{{values}}}" if line.startswith(f"{stack}:") else line for line in lines]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\nwritten to {target}: {', '.join(best) or 'no stack fits, nothing changed'}")


# ---- evidence and memory ---------------------------------------------------------------------------------------------


def validate(simulate: bool) -> None:
    """Print predictions beside published and simulated values, and write them to docs/. simulate: run the simulations again."""
    from common.planning import validation

    if simulate:
        simulated.record()
    for path, page in ((ROOT / "docs/planner.md", validation.page() + calibration.page()), (simulated.PAGE, simulated.page())):
        print(page)
        path.write_text(page, encoding="utf-8")


def memory_rows(cfg: Config, gpus: int, stacks: Sequence[str], host: float = math.inf) -> Iterator[dict[str, Any]]:
    """For each layout of these stacks: what each part takes on a GPU at the peak, in bytes, what it needs beside it, and on
    which GPUs all of it fits, with at most `host` bytes per GPU in the node's memory; or why the config's own layout cannot
    be."""
    for layout, stack, changed in layouts(cfg, stacks):
        try:
            shared = layout_for(changed, stack, gpus)
            estimate = memory.estimate_for(changed, cfg.model, stack, gpus)
        except BadInput as error:
            if layout.startswith("*"):
                yield {"layout": layout, "cannot": error.problems[0]}
            continue  # the other rows are examples: a layout that does not divide the GPUs or the batch is left out
        parts = {part: int(estimate[part]) for part in (*memory.PARTS, "total", *memory.BESIDE, "required", "host")}
        is_on_host = estimate["host"] <= host
        fits = [size for size, name in CARDS.items() if is_on_host and estimate["required"] <= gpu(name).memory]
        yield {
            "layout": layout,
            "micro_batch": shared.micro_batch,
            "accumulate": shared.accumulate,
            "bytes": parts,
            "fits": fits,
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of memory_rows in GB; on a screen of fewer than 160 columns without the parts of the memory."""
    parts = [*memory.PARTS, "total", *memory.BESIDE, "required"] if screen.width() >= 160 else ["total", "required"]
    headings = ("layout", "micro", "accum", *(COLUMNS.get(part, part) for part in parts), *CARDS)
    cells, others = [], []
    for row in rows:
        if "cannot" in row:
            others.append(textwrap.fill(f"{row['layout']} cannot: {row['cannot']}", screen.width(), subsequent_indent="    "))
            continue
        sizes = [f"{row['bytes'][part] / 1e9:.2f}" for part in parts]
        fits = ["fits" if size in row["fits"] else "-" for size in CARDS]
        cells.append([row["layout"], str(row["micro_batch"]), str(row["accumulate"]), *sizes, *fits])
    if len(parts) == 2:
        others.append("The parts of the memory: on a screen of 160 columns (COLUMNS=160), or by --json.")
    return "\n".join([*([screen.table(headings, cells, words={0})] if cells else []), *others])


def layouts(cfg: Config, stacks: Sequence[str]) -> Iterator[tuple[str, str, Config]]:
    """(name, stack, config with that layout) of the config's own layout, then of the usual layouts of each stack."""
    for stack in stacks:
        yield f"* {name_of(cfg, stack)}", stack, cfg
        for change in CHOICES[stack]:
            system = getattr(cfg, stack).model_copy(update=change)
            changed = cfg.model_copy(update={stack: system})
            if system != getattr(cfg, stack):
                yield f"  {name_of(changed, stack)}", stack, changed


def _megatron(tp: int, pp: int) -> dict[str, object]:
    return {"tp": tp, "pp": pp, "vpp": 1, "pipeline_layout": "even", "sequence_parallel": tp > 1, "distributed_optimizer": True}


CHOICES: dict[str, list[dict[str, object]]] = {
    "baseline": [{"shard": shard, "recompute": recompute} for shard in ("none", "full") for recompute in (False, True)],
    "deepspeed": [{"zero_stage": s, "offload": o} for s, o in ((1, "none"), (2, "none"), (3, "none"), (3, "optimizer"))],
    "megatron": [_megatron(tp, pp) for tp, pp in ((1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (8, 8))],
}


if __name__ == "__main__":
    exit_cleanly(main)
