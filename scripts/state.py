"""Verify, show or re-cut the training state of a run: the checkpoints OUT/step_N.

python -m scripts.state verify out/run          # every step of the run, each piece against its checksum
python -m scripts.state show out/run/step_20    # who wrote it, what it holds, its files
python -m scripts.state reshard out/run/step_20 out/run2/step_20 --pieces 8

The exit code is 0 if all is as it was written, and 2 with one line per damaged piece. `reshard` also converts the checkpoints
of earlier versions, which had one file per parameter. A run needs it for neither: it resumes in any layout. What a launch
script needs to continue the run is copied beside the new step, where there is no run yet.
"""

import heapq
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import preflight, screen
from common.checkpoints import checkpoint
from common.checkpoints.checkpoint import Checkpoint
from common.command_line import Parser
from common.errors import LINE, BadInput, exit_cleanly, printable, shortened
from common.json_files import read_object, write_json
from common.launch import lock

if TYPE_CHECKING:
    from common.checkpoints.pieces import Piece
    from common.checkpoints.sharded import Written

MOST_FILES = 10_000  # of a step: as many as a run of so many ranks writes
# What a launch script needs of a run besides its step, or `to-hf` of an import, and what finetuning adds
BESIDE = ("run.json", "metrics.jsonl", "tokenizer", "imported_tokenizer", "model.yaml")
RESULTS = ("eval.json", "predictions")  # of the best step
CONFIG = "config.yaml"
REMOVAL = 1  # seconds that a live run may take to remove a step


def main() -> int:
    parser = Parser(prog="python -m scripts.state", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("verify", "compare each piece with its checksum"), ("show", "print what a step holds")):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", type=_path, metavar="RUN_OR_STEP", help="OUT of a run, or one of its folders step_N")
        if name == "show":
            command.add_argument("--json", action="store_true", help="print JSON")
    command = commands.add_parser("reshard", help="write a step again, divided among another number of files")
    command.add_argument("path", type=_path, metavar="STEP", help="a folder step_N")
    command.add_argument("out", type=_path, metavar="OUT", help="a new folder, named step_N too")
    command.add_argument("--pieces", type=_count, required=True, metavar="N", help="number of files, of as many bytes each")
    args = parser.parse_args()
    if args.command == "verify":
        return verify(args.path)
    if args.command == "show":
        return show(args.path, args.json)
    return reshard(args.path, args.out, args.pieces)


def _path(text: str) -> Path:
    if not text:  # Path takes it as the current folder
        raise BadInput("'': no folder was given; give OUT of a run, or one of its folders step_N")
    path = Path(text)
    return path if path.name not in ("", "..") else Path(os.path.abspath(path))  # a step is known by its name


def _count(text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise _no_count(text)
    return int(text)


def _no_count(given: object) -> BadInput:
    given = shortened(str(given), 100)
    return BadInput(f"--pieces {given}: give the number of files, 1 or more, at most {MOST_FILES:,}")


def steps_of(path: Path) -> tuple[list[Checkpoint], dict[Path, list[str]]]:
    """The checkpoints of a run, or the one of a step, and what is wrong with those that are not whole."""
    if not path.is_dir():
        if path.exists():
            raise BadInput(f"{path}: is a file; give OUT of a run, or one of its folders step_N")
        raise BadInput(f"{path}: no such folder; give OUT of a run, or one of its folders step_N")
    # a step first: a folder in it that is named as a step must not hide its damage
    folders = [path] if (path / "state.json").exists() else checkpoint.finished(path)
    folders = folders or ([path] if path.name.startswith("step_") else [])
    if not folders:
        raise BadInput(f"{path}: holds no step_N; give OUT of a run, or one of its folders step_N")
    opened = {folder: checkpoint.opened(folder) for folder in folders}
    whole = [one for one in opened.values() if isinstance(one, Checkpoint)]
    return whole, {folder: [one] for folder, one in opened.items() if isinstance(one, str)}


def verify(path: Path) -> int:
    whole, problems = steps_of(path)
    verified = 0
    for saved in whole:
        found = list(damaged(saved))
        if found:
            problems[saved.path] = found
        else:
            verified += 1
            print(printable(f"{saved.path}: whole, {_files(saved)}"))
    problems = _still_there(path, problems)
    if not verified and not problems:
        raise BadInput(f"{path}: a run has removed what was read here; type the same command again")
    return _told(problems)


def _still_there(path: Path, problems: dict[Path, list[str]]) -> dict[Path, list[str]]:
    """The problems of steps that are still there: a live run removes old ones, which may take it a moment."""
    if problems and any((folder / lock.NAME).exists() for folder in (path, path.parent)):
        time.sleep(REMOVAL)
    return {step: lines for step, lines in problems.items() if step.is_dir()}


def _told(problems: dict[Path, list[str]]) -> int:
    """Print problems; returns the exit code."""
    for line in (line for lines in problems.values() for line in lines):
        print(screen.error_line(f"error: {printable(shortened(line, LINE))}"), file=sys.stderr)
    return 2 if problems else 0


def damaged(saved: Checkpoint) -> Iterator[str]:
    """A line for each damaged piece of a step. Several threads read and compute checksums."""
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, screen.progress("verify", len(saved.names()), "parameters") as report:
        if not saved.is_sharded:
            for number, problem in enumerate(pool.map(lambda name: _problem(saved, name), saved.names()), 1):
                report(number)
                if problem:
                    yield problem
            return
        from common.checkpoints import sharded

        yield from sharded.damaged_headers(saved)
        reader = sharded.Reader(saved)
        count = reader.number_pieces()
        for lines in pool.map(lambda first: list(reader.verify(range(first, count, threads))), range(threads)):
            yield from lines


def _problem(saved: Checkpoint, name: str) -> str | None:
    try:
        saved.read(name)
    except BadInput as error:
        return error.problems[0]
    return None


def _files(saved: Checkpoint) -> str:
    files = saved.meta["files"]
    size = sum(entry["bytes"] for entry in files.values())
    return f"{len(files):,} file{'s' if len(files) != 1 else ''}, {size / 1e6:,.1f} MB"


def show(path: Path, as_json: bool) -> int:
    whole, problems = steps_of(path)
    if not whole:
        raise BadInput([line for lines in problems.values() for line in lines])
    saved = whole[-1]
    shapes = saved.shapes()
    values: dict[str, Any] = {
        "step": saved.step, "path": str(saved.path), "stack": saved.meta.get("stack"), "layout": saved.meta.get("layout"),
        "samples": saved.meta.get("samples"), "seed": saved.meta.get("seed"), "dtype": saved.meta.get("dtype"),
        "commit": saved.meta.get("commit"), "parameters": sum(map(prod, shapes.values())), "tensors": len(shapes),
        "parts": sorted({part for parts in saved.meta["parameters"].values() for part in parts}) if saved.is_sharded else None,
        "pieces": sum(len(e) for parts in saved.meta["pieces"].values() for e in parts.values()) if saved.is_sharded else None,
        "files": saved.meta["files"],
    }  # fmt: skip
    if as_json:
        print(json.dumps(values, indent=1))
        return 0
    print(_field("step", f"{saved.step:,}, {saved.path}"))
    print(_field("run", f"{values['stack']}, {values['dtype']}, seed {values['seed']}, commit {values['commit']}"))
    layout = values["layout"] or {}
    print(_field("layout", " ".join(f"{key}={value}" for key, value in layout.items() if value not in (1, False))))
    print(_field("holds", f"{values['parameters']:,} parameters in {len(shapes):,} tensors"))
    if saved.is_sharded:
        print(_field("parts", f"{', '.join(values['parts'])}; {values['pieces']:,} pieces"))
        rows = [[printable(name), f"{entry['bytes'] / 1e6:,.1f}"] for name, entry in saved.meta["files"].items()]
    else:
        print(_field("parts", "one file per parameter, of an earlier version"))
        rows = []
    print(_field("files", _files(saved)))
    if rows:
        print(screen.table(["file", "MB"], rows[:40], {0}))
        if len(rows) > 40:
            print(f"... and {len(rows) - 40:,} more (--json lists them)")
    return _told(_still_there(path, problems))


def _field(name: str, text: str) -> str:
    return screen.field(name, printable(text))


def reshard(path: Path, out: Path, files: int) -> int:
    """Write a step again, one piece at a time, and beside it what a launch script needs to continue the run."""
    saved = _checked(path, out, files)
    folder, tmp, beside = out.parent, out.with_name(f"{out.name}.tmp"), out.with_name(f"{out.name}.run.tmp")
    with lock.locked(folder):
        _must_be_new(out)
        has_run = (folder / CONFIG).exists()
        names = [] if has_run else _names_beside(path.parent, folder, saved.step)
        with _undone_on_failure(out, [tmp, beside, out, *(folder / name for name in names)]):
            for left in (tmp, beside):  # of a reshard that was killed
                _remove(left)
            tmp.mkdir()
            written, count = _write(saved, tmp, files)
            _copy(path.parent, names, beside, saved.step)
            checkpoint.finish(tmp, out, _meta(saved, written))
            _place(beside, folder, names)
    print(printable(f"{out}: {len(written):,} file{'s' if len(written) != 1 else ''}"))
    if len(written) < files:
        print(f"note: fewer than {files:,}: the state has {count:,} pieces, and no piece is divided among files")
    if names:
        print(printable(f"copied from {path.parent}: {', '.join(names)}"))
    elif has_run:
        print(printable(f"note: {folder} has a run, whose other files are as they were"))
    return 0


def _checked(path: Path, out: Path, files: int) -> Checkpoint:
    """The step to write again. BadInput if it is not whole, or `out` or `files` cannot be."""
    if not 1 <= files <= MOST_FILES:
        raise _no_count(files)
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path}: is a file; give a folder step_N of a run")
    steps = [] if (path / "state.json").exists() else checkpoint.finished(path)
    if steps:
        raise BadInput(f"{path}: is not a step but holds some; give one of its folders step_N, such as {steps[-1]}")
    saved = checkpoint.opened(path)
    if isinstance(saved, str):
        is_step = path.is_dir() and path.name.startswith("step_")
        raise BadInput(saved if is_step else f"{saved}; give a folder step_N of a run")
    if out.name != path.name:
        raise BadInput(f"{out}: must be named {path.name}, as a step of a run is; type {out / path.name}")
    _must_be_new(out)
    for parent in Path(os.path.realpath(out)).parents:
        if os.path.isfile(parent / "state.json"):
            raise BadInput(f"{out}: is inside {parent}, which is a step itself; give a new folder outside of it")
    reason = preflight.unusable(out.parent)
    if reason:
        raise BadInput(f"{out.parent}: {reason}; give {out.name} in a folder that can be written to")
    return saved


def _must_be_new(out: Path) -> None:
    if os.path.lexists(out):  # a broken link too
        raise BadInput(f"{out}: is there; give a new folder")


def _names_beside(source: Path, folder: Path, step: int) -> list[str]:
    """What is to be copied to a folder that has no run: nothing if the source has none. BadInput if some of it is there."""
    if not any((source / name).is_file() for name in (CONFIG, "model.yaml")):
        return []
    best = [int(path.name[5:]) for path in checkpoint.finished(source / "best")]
    finetuned = ["best"] * any(number <= step for number in best) + [*RESULTS] * bool(best and max(best) <= step)
    names = [name for name in (*BESIDE, *finetuned, CONFIG) if (source / name).exists()]
    for name in names:
        if os.path.lexists(folder / name):
            raise BadInput(f"{folder}: has {name} and no run (no {CONFIG}); give another folder")
    return names


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _undone_on_failure(out: Path, made: Sequence[Path]) -> Iterator[None]:
    """Remove what was written if not all of it was; a fault of the disk becomes one line that names the path."""
    try:
        yield
    except BaseException as fault:
        for path in made:
            _remove(path)
        if not isinstance(fault, OSError):
            raise
        reason = fault.strerror or shortened(str(fault))
        raise BadInput(
            f"{fault.filename or out}: {reason}; nothing was written; make room there, or choose another folder"
        ) from None


def _write(saved: Checkpoint, tmp: Path, files: int) -> "tuple[list[Written], int]":
    """Write the files of a step. Returns what each holds, and how many pieces there are."""
    import torch

    from common.checkpoints import pieces, sharded

    parts = saved.meta["parameters"] if saved.is_sharded else {
        name: {part: tuple(tensor.shape) for part, tensor in saved.read(name).items()} for name in saved.names()
    }  # fmt: skip
    held = [
        piece
        for name, shapes in parts.items()
        for part, shape in shapes.items()
        for piece in pieces.cut(pieces.whole(name, shape), part, torch.empty(prod(shape), device="meta"))
    ]
    reader = sharded.Reader(saved) if saved.is_sharded else None
    count = reader.number_pieces() if reader else 0
    kept: dict[str, Any] = {}  # of an earlier version: the parameter that was read last

    def values(piece: pieces.Piece) -> torch.Tensor:
        if reader:
            tensor = torch.empty(piece.tensor.shape)
            reader.read([piece._replace(tensor=tensor)])
            return tensor
        if piece.name not in kept:
            kept.clear()
            kept[piece.name] = saved.read(piece.name)
        return kept[piece.name][piece.part][piece.region]

    written = []
    for number, of_file in enumerate(_divided(held, files)):
        path = tmp / f"{number:05}.safetensors"
        try:
            written.append(sharded.write(path, of_file, values))
        except sharded.NotFinite as fault:
            raise BadInput(f"{saved.path}: {fault} holds NaN or infinite values; give a step before it") from None
        except OSError as fault:
            raise OSError(fault.errno, fault.strerror, str(path)) from None
    # a piece that was read in parts alone was not compared with its checksum, and its damage would get a new one
    changed = list(reader.verify(set(range(count)) - reader.verified)) if reader else []
    if changed:
        raise BadInput(changed)
    return written, len(held)


def _divided(held: "Iterable[Piece]", files: int) -> "list[list[Piece]]":
    """The pieces of each file, as many bytes in each, as pieces.own divides them among ranks."""
    divided: dict[int, list[Piece]] = {}
    loads = [(0, number) for number in range(files)]
    for piece in held:
        load, number = loads[0]
        heapq.heapreplace(loads, (load + piece.tensor.numel(), number))
        divided.setdefault(number, []).append(piece)
    return list(divided.values())


def _meta(saved: Checkpoint, written: "Sequence[Written]") -> dict[str, Any]:
    from common.checkpoints import sharded

    kept = {key: value for key, value in saved.meta.items() if key not in ("files", "parameters", "pieces", "format", "crc32")}
    return kept | sharded.index([written], saved.shapes())


def _copy(source: Path, names: Iterable[str], to: Path, step: int) -> None:
    """Copy what is beside a step, as it was when that step was the last."""
    from common.training import log

    to.mkdir()
    for name in names:
        path = source / name
        if name == "metrics.jsonl":  # a run that continues cuts off later lines; until then they would be shown as this run's
            with open(path, "rb") as lines, open(to / name, "wb") as kept:
                kept.writelines(line for line in lines if (values := log.parsed(line)) and values["step"] <= step)
        elif name == "run.json" and (record := read_object(path)):  # what its `finished` lists is not here
            write_json(to / name, {key: value for key, value in record.items() if key != "finished"})
        elif name == "best":
            for best in checkpoint.finished(path):
                if int(best.name[5:]) <= step:
                    shutil.copytree(best, to / name / best.name)
        elif path.is_dir():
            shutil.copytree(path, to / name)
        else:
            shutil.copyfile(path, to / name)


def _place(beside: Path, folder: Path, names: Iterable[str]) -> None:
    """Move the copies to their places, config.yaml last: a launch script refuses a folder that has a step and no config, and
    starts from step 0 in one that has a config and no step."""
    for name in names:
        (beside / name).rename(folder / name)
    beside.rmdir()


if __name__ == "__main__":
    exit_cleanly(main)
