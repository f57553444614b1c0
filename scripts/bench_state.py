"""Measure how fast a training state is saved and loaded, or count what each rank writes, reads and sends for it.

    python -m scripts.bench_state time [--mb 1500] [--ranks 2] [--rounds 5] [--dir DIR]
    python -m scripts.bench_state count [CONFIG]
    python -m scripts.bench_state recut [CONFIG] [--dir DIR]
    python -m scripts.bench_state weights [CONFIG] [--dir DIR]

time: of a state in flat partitions (ZeRO 1) and one in halves of each matrix (tensor parallelism), on the disk of DIR, in turn:
    ours            common/checkpoints, with checksums
    torch.save      of the same tensors, a file per rank; on disk (fsync) before the clock stops, as with the others
    dcp             torch.distributed.checkpoint with its own writer, reader and planners
  A ratio above 1 means that ours is faster. Loads come from the page cache where the state fits into it. stall: the part of a
  save in the background during which the training waits, of the time of one that is not.
count: without data, of 1, 2, 4 and 8 ranks of CONFIG (default: GPT-2), and of gpt3_175b on 512 ranks at ZeRO 3: the most that
  any rank has. index: state.json, which rank 0 writes and every rank reads. What a rank of the stacks writes is counted by
  `python -m scripts.simulate CONFIG --stack S --world N --rank R --state`.
recut: 4 ranks (tp=2 pp=2) write a state of CONFIG, and 2 ranks (ZeRO 3) read it and compare each value: the memory that each
  rank needs beside its share of the state.
weights: from the seed to an export. 4 ranks (tp=2 pp=2) draw the weights of CONFIG, keep them in bf16 and save them; 2 ranks
  (ZeRO 3) read them, write the Hugging Face folder together, and compare each of its values with one that is drawn again. DIR
  needs 8 bytes for each parameter of CONFIG.
"""

import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from common import screen
from common.command_line import Parser
from common.errors import BadInput, exit_cleanly

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("weight", "exp_avg", "exp_avg_sq")
DEFAULT = ROOT / "recipes/gpt/configs/gpt2_124m.yaml"
LARGE = ROOT / "recipes/gpt/configs/gpt3_175b.yaml"
Shapes = dict[str, tuple[int, ...]]


def main() -> int:
    parser = Parser(prog="python -m scripts.bench_state", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("time", help="seconds of saves and loads")
    command.add_argument("--mb", type=int, default=1500, help="size of the state in MB (default: 1500)")
    command.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    command.add_argument("--rounds", type=int, default=5, help="measurements of each (default: 5)")
    command.add_argument("--dir", type=Path, default=None, help="folder on the disk to measure (default: a temporary one)")
    command = commands.add_parser("count", help="bytes and files of each rank")
    command.add_argument("config", type=Path, nargs="?", default=DEFAULT, metavar="CONFIG")
    command = commands.add_parser("recut", help="memory of ranks that write a state and of others that read it")
    command.add_argument("config", type=Path, nargs="?", default=DEFAULT, metavar="CONFIG")
    command.add_argument("--dir", type=Path, default=None, help="folder for the state (default: a temporary one)")
    command = commands.add_parser("weights", help="the same, of weights that are drawn, saved, read and exported")
    command.add_argument("config", type=Path, nargs="?", default=DEFAULT, metavar="CONFIG")
    command.add_argument("--dir", type=Path, default=None, help="folder for state and export (default: a temporary one)")
    args = parser.parse_args()
    if args.command == "count":
        return count(args.config)
    if args.command in ("recut", "weights"):
        return on_four_and_two(args.command, args.config, args.dir)
    if args.mb < 1 or args.ranks < 1 or args.rounds < 1:
        raise BadInput("--mb, --ranks and --rounds: give numbers of 1 or more")
    if "RANK" in os.environ:
        measure(args.mb, args.rounds, args.dir)
        return 0
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        return on_ranks(args.ranks, "time", f"--mb={args.mb}", f"--rounds={args.rounds}", f"--dir={folder}")


def on_ranks(ranks: int, *args: str) -> int:
    """Run this command in so many processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {"OMP_NUM_THREADS": "1"} | os.environ
    return subprocess.run([*run, "-m", "scripts.bench_state", *args], cwd=ROOT, env=env).returncode


# ---- time ------------------------------------------------------------------------------------------------------------


def state_of(megabytes: int) -> Shapes:
    """A model whose weights and biases alternate, of which the state of all parts takes so many MB."""
    layer = {"w": (1024, 4096), "v": (1000, 333), "b": (4096,)}
    layers = max(1, round(megabytes * 1e6 / 12 / sum(map(prod, layer.values()))))
    return {f"layer{number}.{name}": shape for number in range(layers) for name, shape in layer.items()}


def flat(shapes: Shapes, rank: int, world: int, make: Callable[[int], Any]) -> Iterator[Any]:
    """The pieces of a flat partition of all parameters together, as ZeRO 1 has it."""
    from common.checkpoints import pieces

    total, at = sum(map(prod, shapes.values())), 0
    begin, end = total * rank // world, total * (rank + 1) // world
    for name, shape in shapes.items():
        first, last = max(begin, at), min(end, at + prod(shape))
        for part in PARTS if first < last else ():
            yield from pieces.cut(pieces.whole(name, shape), part, make(last - first), first - at)
        at += prod(shape)


def halves(shapes: Shapes, rank: int, world: int, make: Callable[[int], Any]) -> Iterator[Any]:
    """Columns of each matrix; vectors are on every rank, and written by one."""
    from common.checkpoints import pieces

    for name, shape in shapes.items():
        size = shape[-1] // world
        is_split = len(shape) == 2 and size * world == shape[-1]
        for part in PARTS:
            if is_split:
                place = pieces.whole(name, shape)._replace(local=(shape[0], size), column=rank * size)
                yield from pieces.cut(place, part, make(shape[0] * size))
            else:
                yield from pieces.cut(pieces.whole(name, shape), part, make(prod(shape)), 0, rank, world)


def measure(megabytes: int, rounds: int, folder: Path) -> None:
    import datetime
    import warnings

    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    torch.set_num_threads(1)
    shapes, rank, world = state_of(megabytes), dist.get_rank(), dist.get_world_size()
    if rank == 0:
        print(f"{12 * sum(map(prod, shapes.values())) / 1e6:,.0f} MB on {world} ranks, {rounds} rounds in turn, {folder}")
    for name, layout in (("flat partitions", flat), ("halves", halves)):
        held = list(layout(shapes, rank, world, torch.randn))
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds + 1):  # the first is not counted
            for what, work in ways(held, shapes, folder, rank):
                dist.barrier()
                begin = time.perf_counter()
                work()
                own = time.perf_counter() - begin
                dist.barrier()
                passed = time.perf_counter() - begin if "stall" not in what else own
                seconds.setdefault(what, []).append(passed)
        if rank == 0:
            report(name, {what: times[1:] for what, times in seconds.items()})
    dist.destroy_process_group()


def ways(held: list[Any], shapes: Shapes, folder: Path, rank: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, how) of one round, saves before loads."""
    import torch
    import torch.distributed.checkpoint as plain

    from common.checkpoints import checkpoint, pieces, sharded

    batches = [pieces.Batch(list(shapes), held)]
    own = {f"{p.name}/{p.part}/{p.offset}/{rank}": p.tensor.contiguous() for p in pieces.own(held)}
    meta = {"step": 1, "layout": {"world": 1}, "hyperparameters": {}, "stack": ""}
    file = folder / f"{rank}.pt"

    def torch_save() -> None:
        with open(file, "wb") as opened:
            torch.save(own, opened)
            opened.flush()
            os.fsync(opened.fileno())

    def ours_load() -> None:
        opened = checkpoint.opened(folder / "step_1")
        assert isinstance(opened, checkpoint.Checkpoint), opened
        sharded.load(opened, batches)

    def background() -> None:
        checkpoint.save(folder, batches, shapes, meta, 1, in_background=True)

    yield "save ours", lambda: checkpoint.save(folder, batches, shapes, meta, 1)
    yield "save torch.save", torch_save
    yield "save dcp", lambda: plain.save(dict(own), checkpoint_id=folder / "dcp")  # type: ignore[attr-defined]
    yield "load ours", ours_load
    yield "load torch.save", lambda: torch.load(file, weights_only=True)
    yield "load dcp", lambda: plain.load(dict(own), checkpoint_id=folder / "dcp")  # type: ignore[attr-defined]
    yield "stall", background
    yield "background", checkpoint.wait
    if rank == 0:
        shutil.rmtree(folder / "dcp", ignore_errors=True)


def report(name: str, seconds: dict[str, list[float]]) -> None:
    print(f"\n{name}: seconds, and the time of the other over ours (median [least .. greatest])")
    rows = []
    for what in ("save", "load"):
        ours = seconds[f"{what} ours"]
        for other in ("torch.save", "dcp"):
            ratios = [b / a for a, b in zip(ours, seconds[f"{what} {other}"], strict=True)]
            cells = [f"{statistics.median(times):.2f}" for times in (ours, seconds[f"{what} {other}"])]
            rows.append([what, other, *cells, f"{statistics.median(ratios):.2f} [{min(ratios):.2f} .. {max(ratios):.2f}]"])
    shares = [stall / save for stall, save in zip(seconds["stall"], seconds["save ours"], strict=True)]
    print(screen.table(["", "beside", "ours", "other", "ratio"], rows, {0, 1}))
    print(f"stall of a save in the background: {statistics.median(shares):.1%} of one that is not "
          f"[{min(shares):.1%} .. {max(shares):.1%}]")  # fmt: skip


# ---- count -----------------------------------------------------------------------------------------------------------


def config_of(path: Path) -> Any:
    from common import config as configs
    from recipes.gpt import task

    cfg = configs.load(path, [], task.Config)
    return cfg.model_copy(update={"model": cfg.model.resolve(cfg, 50257)})


def shapes_of(path: Path) -> Shapes:
    from recipes.gpt import task

    return {name: tuple(shape) for name, shape in task.parameter_shapes(config_of(path).model).items()}


def count(config: Path) -> int:
    import torch

    def meta(size: int) -> Any:
        return torch.empty(size, device="meta")

    shapes, rows = shapes_of(config), []
    for layout, name in ((flat, "ZeRO 1, dist-opt"), (each, "ZeRO 3"), (halves, "tp")):
        for world in (1, 2, 4, 8):
            held = [list(layout(shapes, rank, world, meta)) for rank in range(world)]
            rows.append([name, f"{world}", *counted(held, world)])
    print(f"{config.stem}, the most of any rank\n{screen.table(HEADINGS, rows, {0})}")
    large = shapes_of(LARGE)
    rows = [["ZeRO 3", "512", *counted([list(each(large, rank, 512, meta)) for rank in (0, 511)], 512)]]
    print(f"\n{LARGE.stem}, the most of any rank\n{screen.table(HEADINGS, rows, {0})}")
    print("s: to write or read a rank's share at 2 GB/s per node of 8 ranks")
    return 0


HEADINGS = ["layout", "ranks", "MB written", "MB read", "pieces", "kB sent", "index MB", "s"]


def each(shapes: Shapes, rank: int, world: int, make: Callable[[int], Any], parts: Sequence[str] = PARTS) -> Iterator[Any]:
    """A share of each parameter, as ZeRO 3 has it."""
    from common.checkpoints import pieces

    for name, shape in shapes.items():
        size = -(-prod(shape) // world)
        here = min(size, prod(shape) - rank * size)
        for part in parts if here > 0 else ():
            yield from pieces.cut(pieces.whole(name, shape), part, make(here), rank * size)


def staged(
    shapes: Shapes, tp_rank: int, tp: int, stage: int, stages: int, make: Callable[[int], Any], parts: Sequence[str] = PARTS
) -> Iterator[Any]:
    """One of the stages of layers, and a tp-th of each matrix."""
    from common.checkpoints import pieces

    numbers = {name: next((int(word) for word in name.split(".") if word.isdigit()), None) for name in shapes}
    layers = max(number for number in numbers.values() if number is not None) + 1
    for name, shape in shapes.items():
        number = numbers[name]
        outside = 0 if "embed" in name or ".wte" in name or ".wpe" in name else stages - 1
        if (outside if number is None else number * stages // layers) != stage:
            continue
        is_split = len(shape) == 2 and "wpe" not in name and shape[1] % tp == 0
        local = (shape[0], shape[1] // tp) if is_split else shape
        place = pieces.whole(name, shape)._replace(local=local, column=tp_rank * local[-1] if is_split else 0)
        replica, replicas = (0, 1) if is_split else (tp_rank, tp)
        for part in parts:
            yield from pieces.cut(place, part, make(prod(local)), 0, replica, replicas)


def counted(held: Sequence[Sequence[Any]], world: int) -> list[str]:
    """The most of any rank. kB sent: what it reports to rank 0."""
    from common.checkpoints import pieces

    own = [pieces.own(of_rank) for of_rank in held]
    size = [sum(4 * piece.tensor.numel() for piece in of_rank) for of_rank in own]
    entries = [[[0, 2**31, "0123456789abcdef", list(p.offset), list(p.tensor.shape)] for p in of_rank] for of_rank in own]
    sent = [len(pickle.dumps(of_rank)) for of_rank in entries]
    index = sum(len(str(entry)) for of_rank in entries for entry in of_rank) / len(own) * world
    read = [sum(4 * piece.tensor.numel() for piece in of_rank) for of_rank in held]
    return [
        f"{max(size) / 1e6:,.1f}", f"{max(read) / 1e6:,.1f}", f"{max(map(len, own)):,}", f"{max(sent) / 1e3:,.1f}",
        f"{index / 1e6:,.2f}", f"{8 * max(size) / 2e9:,.1f}",
    ]  # fmt: skip


# ---- recut and weights -----------------------------------------------------------------------------------------------


def on_four_and_two(command: str, config: Path, folder: Path | None) -> int:
    """On 4 ranks, and then on 2."""
    if "RANK" in os.environ:
        assert folder is not None
        if command == "recut":
            recut_rank(shapes_of(config), folder)
        else:
            weights_rank(config, folder)
        return 0
    with tempfile.TemporaryDirectory(dir=folder) as place:
        given = [command, str(config), f"--dir={place}"]
        return on_ranks(4, *given) or on_ranks(2, *given)


def recut_rank(shapes: Shapes, folder: Path) -> None:
    """Four ranks write, and two read."""
    import torch
    import torch.distributed as dist

    from common.checkpoints import checkpoint, pieces, sharded

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if writes := world == 4:
        held = list(staged(shapes, rank % 2, 2, rank // 2, 2, torch.empty))
        for piece in held:
            piece.tensor.copy_(value_of(piece))
    else:
        held = list(each(shapes, rank, world, torch.zeros))
    watch = Watch(held)
    batches = [pieces.Batch(list(shapes), held)]
    if writes:
        meta = {"step": 1, "layout": {"world": 4}, "hyperparameters": {}, "stack": ""}
        checkpoint.save(folder, batches, shapes, meta, 1)
    else:
        opened = checkpoint.opened(folder / "step_1")
        assert isinstance(opened, checkpoint.Checkpoint), opened
        sharded.load(opened, batches)
    line = str(watch)
    wrong = 0 if writes else sum(not piece.tensor.equal(value_of(piece)) for piece in held)
    tell(f"{FOUR}, write" if writes else f"{TWO}, read", line + ("" if writes else f", {wrong} of {len(held):,} pieces wrong"))
    dist.destroy_process_group()
    if wrong:
        sys.exit(1)


FOUR, TWO = "4 ranks, tp=2 pp=2", "2 ranks, ZeRO 3"


class Watch:
    """The peak of this rank's memory beside its share, and the seconds."""

    def __init__(self, held: Sequence[Any]):
        self.share = sum(piece.tensor.element_size() * piece.tensor.numel() for piece in held)
        reset_peak()
        self.before, self.begin = resident("VmRSS"), time.perf_counter()

    def __str__(self) -> str:
        beside, seconds = resident("VmHWM") - self.before, time.perf_counter() - self.begin
        return f"share {self.share / 1e6:,.0f} MB, {beside / 1e6:,.0f} MB beside it, {seconds:.1f} s"


def tell(what: str, line: str) -> None:
    """Print a line of each rank, on rank 0."""
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, line)
    if dist.get_rank() == 0:
        print("\n".join([what, *(f"  rank {number}: {line}" for number, line in enumerate(gathered))]), flush=True)


def weights_rank(config: Path, folder: Path) -> None:
    """Four ranks draw and save, and two read and export."""
    import torch
    import torch.distributed as dist

    from common.checkpoints import checkpoint, pieces, sharded, state
    from common.huggingface import export
    from common.training import init
    from recipes.gpt import task

    dist.init_process_group("gloo")
    cfg, rank, cpu = config_of(config), dist.get_rank(), torch.device("cpu")
    shapes = {name: tuple(shape) for name, shape in task.parameter_shapes(cfg.model).items()}
    draw = init.scratch(cfg.train.seed, lambda name: task.initializer(cfg.model, name))

    def bf16(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.bfloat16)

    if dist.get_world_size() == 4:
        held = list(staged(shapes, rank % 2, 2, rank // 2, 2, bf16, PARTS[:1]))
        stages = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        here = {piece.name for piece in held}
        names = sorted((name for name in shapes if name in here), key=lambda name: -prod(shapes[name]))
        batches = [pieces.Batch(names, held)]
        wanted = [(name, state.part_shapes(shapes[name], False)) for name in names]
        watch = Watch(held)
        state.fill(batches, wanted, lambda name, shape: {"weight": draw(name, shape)}, cpu, stages[rank // 2])
        tell(f"{FOUR}, draw; the largest parameter has {4 * max(map(prod, shapes.values())) / 1e6:,.0f} MB", str(watch))
        meta = {"step": 1, "layout": {"world": 4}, "hyperparameters": {}, "stack": "none", "seed": cfg.train.seed}
        watch = Watch(held)
        checkpoint.save(folder, batches, shapes, meta, 1)
        tell(f"{FOUR}, write", str(watch))
        dist.destroy_process_group()
        return
    held = list(each(shapes, rank, 2, bf16, PARTS[:1]))
    opened = checkpoint.opened(folder / "step_1")
    assert isinstance(opened, checkpoint.Checkpoint), opened
    watch = Watch(held)
    sharded.load(opened, [pieces.Batch(list(shapes), held)])
    tell(f"{TWO}, read", str(watch))
    watch = Watch(held)
    export.write(opened, cfg, task, folder / "hf", folder / "none", {"config": config.stem})
    tell(f"{TWO}, export", str(watch))
    wrong = wrong_values(folder / "hf", held, shapes, draw)
    tell(f"{TWO}, compare", f"{len(wrong)} of {len(shapes):,} parameters wrong")
    dist.destroy_process_group()
    if wrong:
        sys.exit(1)


def wrong_values(folder: Path, held: Sequence[Any], shapes: Shapes, draw: Callable[[str, Any], Any]) -> list[str]:
    """The parameters of which the export, or what this rank has read, is not what is drawn. A rank compares every other one."""
    import torch
    import torch.distributed as dist
    from safetensors import safe_open

    from common.huggingface import hf_folder

    problems: list[str] = []
    tensors = hf_folder.tensors(folder, str(folder), problems)
    wrong = [*problems, *(set(shapes) ^ set(tensors))]
    for name in sorted(shapes)[dist.get_rank() :: 2]:
        drawn = draw(name, shapes[name]).to(torch.bfloat16)
        with safe_open(tensors[name].path, framework="pt") as file:
            exported = file.get_tensor(name)
        mine = [piece for piece in held if piece.name == name]
        if not drawn.float().equal(exported) or not all(piece.tensor.equal(drawn[piece.region]) for piece in mine):
            wrong.append(name)
    return wrong


def value_of(piece: Any) -> Any:
    """Values that tell a place in a parameter from most others."""
    import torch

    columns = [torch.arange(o, o + s, dtype=torch.float32) for o, s in zip(piece.offset, piece.tensor.shape, strict=True)]
    kind = float(PARTS.index(piece.part) + len(piece.name))
    return columns[0] + kind if len(columns) == 1 else columns[0][:, None] * 3 + columns[1] + kind


def reset_peak() -> None:
    """Reset the peak of resident memory that Linux records."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(what: str) -> int:
    """Bytes of resident memory: now (VmRSS), or the peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


if __name__ == "__main__":
    exit_cleanly(main)
