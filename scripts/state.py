"""Verify, show or re-cut the training state of a run: the checkpoints OUT/step_N.

python -m scripts.state verify out/run          # every step of the run, each piece against its checksum
python -m scripts.state show out/run/step_20    # who wrote it, what it holds, its files
python -m scripts.state reshard out/run/step_20 out/run2/step_20 --pieces 8

The exit code is 0 if all is as it was written, and 2 with one line per damaged piece. `reshard` also converts the checkpoints
of earlier versions, which had one file per parameter. A run needs it for neither: it resumes in any layout.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

from common import screen
from common.checkpoints import checkpoint
from common.checkpoints.checkpoint import Checkpoint
from common.errors import LINE, BadInput, exit_cleanly, printable, shortened
from common.launch import lock

GIVE_STEPS = "give OUT of a run, or one of its folders step_N"
REMOVAL = 1  # seconds that a live run may take to remove a step


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.state", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("verify", "compare each piece with its checksum"), ("show", "print what a step holds")):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", type=_path, metavar="RUN_OR_STEP", help="OUT of a run, or one of its folders step_N")
        if name == "show":
            command.add_argument("--json", action="store_true", help="print JSON")
    command = commands.add_parser("reshard", help="write a step again, divided among another number of files")
    command.add_argument("path", type=_path, metavar="STEP", help="a folder step_N")
    command.add_argument("out", type=_path, metavar="OUT", help="a new folder, named step_N too")
    command.add_argument("--pieces", type=int, required=True, metavar="N", help="number of files, of as many bytes each")
    args = parser.parse_args()
    if args.command == "verify":
        return verify(args.path)
    if args.command == "show":
        return show(args.path, args.json)
    return reshard(args.path, args.out, args.pieces)


def _path(text: str) -> Path:
    if not text:  # Path takes it as the current folder
        raise BadInput(f"'': no folder was given; {GIVE_STEPS}")
    path = Path(text)
    return path if path.name not in ("", "..") else Path(os.path.abspath(path))  # a step is known by its name


def steps_of(path: Path) -> tuple[list[Checkpoint], dict[Path, list[str]]]:
    """The checkpoints of a run, or the one of a step, and what is wrong with those that are not whole."""
    if not path.is_dir():
        raise BadInput(f"{path}: {'is a file' if path.exists() else 'no such folder'}; {GIVE_STEPS}")
    # a step first: a folder in it that is named as a step must not hide its damage
    folders = [path] if (path / "state.json").exists() else checkpoint.finished(path)
    folders = folders or ([path] if path.name.startswith("step_") else [])
    if not folders:
        raise BadInput(f"{path}: holds no step_N; {GIVE_STEPS}")
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
    """Write a step again, one piece at a time."""
    if files < 1:
        raise BadInput(f"--pieces {files}: give the number of files, 1 or more")
    saved = checkpoint.opened(path)
    if isinstance(saved, str):
        raise BadInput(saved)
    if out.name != path.name:
        raise BadInput(f"{out}: must be named {path.name}, as a step of a run is; type {out / path.name}")
    if out.exists():
        raise BadInput(f"{out}: is there; give a new folder")
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
    kept: dict[str, Any] = {}  # of an earlier version: the parameter that was read last

    def values(piece: pieces.Piece) -> torch.Tensor:
        if saved.is_sharded:
            tensor = torch.empty(piece.tensor.shape)
            reader.read([piece._replace(tensor=tensor)])
            return tensor
        if piece.name not in kept:
            kept.clear()
            kept[piece.name] = saved.read(piece.name)
        return kept[piece.name][piece.part][piece.region]

    reader = sharded.Reader(saved) if saved.is_sharded else None
    tmp = out.with_name(f"{out.name}.tmp")
    tmp.mkdir(parents=True)
    written = []
    for number in range(files):
        of_file = pieces.own(piece._replace(replica=number, replicas=files) for piece in held)
        if of_file:
            written.append(sharded.write(tmp / f"{number:05}.safetensors", of_file, values))
    meta = {key: value for key, value in saved.meta.items() if key not in ("files", "parameters", "pieces", "format", "crc32")}
    checkpoint.finish(tmp, out, meta | sharded.index([written], saved.shapes()))
    print(f"{out}: {len(written):,} file{'s' if len(written) != 1 else ''}")
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
