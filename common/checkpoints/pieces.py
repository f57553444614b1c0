"""What each rank holds of the training state: rectangles of parameters and of their optimizer state, by Hugging Face name.

Every layout of every stack is described in this way, whether a rank has whole parameters, rows or columns of them (tensor
parallelism, FSDP2), or a range of their elements in row-major order (ZeRO, Megatron's distributed optimizer). The rectangles
are views of the memory that the optimizer steps: saving reads them, and loading writes into them.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from common.json_files import is_count

if TYPE_CHECKING:
    import torch

    from common.stacks.parameter_map import Conversion

LARGEST = 32 * 2**20  # bytes of a piece: what a rank copies, checks and writes at a time
Shape = Sequence[int]
Region = tuple[str, tuple[int, ...], tuple[int, ...]]  # part, offset and size of a rectangle


class Piece(NamedTuple):
    """A rectangle of one part of a parameter's state, in the memory of this rank."""

    name: str  # Hugging Face name
    part: str  # weight, exp_avg, ...
    shape: tuple[int, ...]  # of the whole part
    offset: tuple[int, ...]  # of the rectangle in it
    tensor: "torch.Tensor"  # a view, in the orientation of `shape`
    replica: int = 0  # of the ranks that hold this rectangle, the number of this one
    replicas: int = 1
    is_saved: bool = True  # False: a copy of what another piece has, such as bf16 weights; only loaded

    @property
    def region(self) -> tuple[slice, ...]:
        """The index of the rectangle in the whole part."""
        return region(self.offset, self.tensor.shape)


def region(offset: Shape, size: Shape) -> Any:
    """The index of a rectangle."""
    return tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))


class Batch(NamedTuple):
    """Pieces that are in memory at the same time, and the names of the parameters that they may belong to: the same ones, in
    the same order, on each rank of a pipeline stage."""

    names: Sequence[str]
    pieces: Sequence[Piece]


Batches = Iterable[Batch]  # the pieces of a batch are valid until the next is asked for


class Run(NamedTuple):
    """Consecutive rows of a local matrix that are consecutive rows of one Hugging Face parameter."""

    begin: int  # first local row
    rows: int
    source: int  # which of the Hugging Face parameters
    row: int  # its first row


class Placement(NamedTuple):
    """Where the elements of a local tensor are in Hugging Face parameters."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # full ones, as Hugging Face has them
    local: tuple[int, ...]  # shape of the local tensor, whole parameters or a tensor-parallel rank's part
    runs: tuple[Run, ...]  # rows that are in no run are padding
    column: int = 0  # the column of the parameter that is the local tensor's first
    is_transposed: bool = False  # the parameter is stored as (in, out), the local tensor as (out, in)


def whole(name: str, shape: Shape) -> Placement:
    """That of a tensor which is a whole parameter."""
    return rows_of(name, shape, 0, shape[0])


def rows_of(name: str, shape: Shape, begin: int, rows: int) -> Placement:
    """That of a tensor which holds these rows of a parameter."""
    return Placement((name,), (tuple(shape),), (rows, *shape[1:]), (Run(0, rows, 0, begin),))


def converted(
    conversion: "Conversion",
    shapes: Sequence[Shape],
    padded: int = 0,
    dim: int = 0,
    blocks: int = 1,
    tp: int = 1,
    rank: int = 0,
) -> Placement:
    """That of a tensor-parallel rank's part of the tensor which `conversion` makes.

    shapes: full ones of the Hugging Face parameters. padded: rows with padding. dim: the one that is split over tp ranks, in
    each of `blocks` blocks of rows. A conversion moves rows and never mixes them: it is applied to their numbers.
    """
    import torch

    sizes = [shape[-1] if conversion.is_transposed and len(shape) == 2 else shape[0] for shape in shapes]
    numbered = []
    for source, (size, shape) in enumerate(zip(sizes, shapes, strict=True)):
        rows = torch.arange(size) + source * _SOURCE
        as_stored = rows if len(shape) < 2 else rows[None] if conversion.is_transposed else rows[:, None]
        numbered.append(as_stored)
    rows = conversion.from_hf(*numbered).reshape(-1)
    if padded > len(rows):
        rows = torch.cat([rows, rows.new_full((padded - len(rows),), _PADDING)])
    columns = tuple(shapes[0][:1] if conversion.is_transposed else shapes[0][1:]) if len(shapes[0]) == 2 else ()
    column = 0
    if tp > 1 and dim == 0:
        rows = torch.cat([block.chunk(tp)[rank] for block in rows.chunk(blocks)])
    elif tp > 1:
        columns = (columns[0] // tp,)
        column = rank * columns[0]
    return Placement(
        conversion.hf, tuple(tuple(shape) for shape in shapes), (len(rows), *columns), tuple(_runs(rows.tolist())), column,
        conversion.is_transposed and len(shapes[0]) == 2,
    )  # fmt: skip


_SOURCE = 2**40  # above the number of rows of any parameter
_PADDING = -2  # a row of no parameter


def _runs(rows: Sequence[int]) -> Iterator[Run]:
    breaks = [0, *(i for i, (a, b) in enumerate(pairwise(rows), 1) if b != a + 1), len(rows)]
    for begin, end in pairwise(breaks):
        if end > begin and rows[begin] >= 0:
            yield Run(begin, end - begin, rows[begin] // _SOURCE, rows[begin] % _SOURCE)


def cut(
    placement: Placement, part: str, flat: "torch.Tensor", start: int = 0, replica: int = 0, replicas: int = 1,
    is_saved: bool = True,
) -> Iterator[Piece]:  # fmt: skip
    """The pieces of a tensor (n,) that holds the elements from `start` on of the local tensor in row-major order."""
    width = prod(placement.local[1:])
    end = min(start + flat.numel(), prod(placement.local))  # ZeRO pads the last rank's range
    for begin, rows, column, columns in _rectangles(start, end, width):
        at = begin * width + column - start
        block = flat[at : at + rows * columns].view(rows, columns)
        for run in placement.runs:
            first, last = max(run.begin, begin), min(run.begin + run.rows, begin + rows)
            if first >= last:
                continue
            view = block[first - begin : last - begin]
            offset: tuple[int, ...] = (run.row + first - run.begin, placement.column + column)
            shape = placement.shapes[run.source]
            if placement.is_transposed:
                view, offset = view.t(), offset[::-1]
            elif len(shape) == 1:
                view, offset = view.flatten(), offset[:1]
            elif len(shape) > 2:
                view, offset = view.view(-1, *shape[1:]), (offset[0], *[0] * (len(shape) - 1))
            for piece in _chunks(view, offset):
                yield Piece(placement.names[run.source], part, shape, *piece, replica, replicas, is_saved)


def _rectangles(start: int, end: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """The elements [start, end) of a matrix in row-major order as at most three rectangles: first row, rows, first column,
    columns."""
    while start < end:
        row, column = divmod(start, width)
        if column or end - start < width:
            columns = min(width - column, end - start)
            yield row, 1, column, columns
            start += columns
        else:
            rows = (end - start) // width
            yield row, rows, 0, width
            start += rows * width


def _chunks(view: "torch.Tensor", offset: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], "torch.Tensor"]]:
    """The view in chunks of rows of at most LARGEST bytes of fp32."""
    rows = max(1, LARGEST // (4 * max(1, prod(view.shape[1:]))))
    for begin in range(0, len(view), rows):
        yield (offset[0] + begin, *offset[1:]), view[begin : begin + rows]


def own(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces that this rank saves. Those that several ranks hold are divided among them, as many bytes to each."""
    loads: dict[int, list[int]] = {}
    chosen = []
    for piece in pieces:
        if not piece.is_saved:
            continue
        written = loads.setdefault(piece.replicas, [0] * piece.replicas)
        least = min(range(piece.replicas), key=written.__getitem__)
        written[least] += piece.tensor.numel()
        if least == piece.replica:
            chosen.append(piece)
    return chosen


def uncovered(shape: Shape, rectangles: Sequence[tuple[Shape, Shape]]) -> str | None:
    """What is wrong if rectangles (offset, size) do not cover each element of `shape` once."""
    import numpy as np

    missing = prod(shape) - sum(prod(size) for _, size in rectangles)
    if len(rectangles) == 1:  # most are whole
        return None if list(rectangles[0][1]) == list(shape) else "is not whole"
    if missing > 0:
        return f"lacks {missing:,} of its {prod(shape):,} elements"
    bounds = [
        np.unique([0, size, *(o[d] for o, _ in rectangles), *(o[d] + s[d] for o, s in rectangles)])
        for d, size in enumerate(shape)
    ]
    if any(b[-1] > size for b, size in zip(bounds, shape, strict=True)):
        return "has elements beyond its shape"
    counts = np.zeros([len(b) - 1 for b in bounds], np.int32)
    for offset, size in rectangles:
        where = tuple(
            slice(np.searchsorted(b, o), np.searchsorted(b, o + s)) for b, o, s in zip(bounds, offset, size, strict=True)
        )
        counts[where] += 1
    if (counts == 1).all():
        return None
    return "has elements that several ranks wrote" if counts.max() > 1 else "is not whole"


def index_problem(meta: dict[str, Any]) -> str | None:
    """What is wrong with the index of a step (common/checkpoints/sharded.py); None if its pieces lie in its files and cover
    each parameter once. The checksum of the index detects damage on disk; this check detects an index that no run wrote."""
    parameters, found, files = meta.get("parameters"), meta.get("pieces"), list(meta["files"].items())
    if not isinstance(parameters, dict) or not isinstance(found, dict) or not parameters or parameters.keys() != found.keys():
        return "its `pieces` are not those of its `parameters`"
    for file, info in files:
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            return f"its file {file!r} must be the name of a .safetensors file"
        if info["header"] > info["bytes"]:
            return f"the header of its file {file} is larger than the file"
    room = [(info["header"], info["bytes"]) for _, info in files]
    for name, shapes in parameters.items():
        if not isinstance(shapes, dict) or not isinstance(found[name], dict) or shapes.keys() != found[name].keys():
            return f"its pieces of {name} are not those of its parts"
        if "weight" not in shapes:
            return f"it has no weight of {name}"
        for part, shape in shapes.items():
            if not _are_counts(shape) or not shape or 0 in shape:
                return f"the shape of {part} of {name} must be a list of sizes"
            entries = found[name][part]
            if not isinstance(entries, list) or not all(_is_entry(entry, shape, room) for entry in entries):
                return f"a piece of {part} of {name} is not in its file, or not in the shape {shape}"
            problem = uncovered(shape, [(entry[3], entry[4]) for entry in entries])
            if problem:
                return f"{part} of {name} {problem}"
    return None


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(map(is_count, values))


def _is_entry(entry: Any, shape: Shape, room: Sequence[tuple[int, int]]) -> bool:
    """Is it [number of a file, first byte, checksum, offset, size] of a rectangle in `shape`, in the bytes of its file?"""
    if not isinstance(entry, list) or len(entry) != 5:
        return False
    file, begin, checksum, offset, size = entry
    if not (is_count(file) and file < len(room) and is_count(begin) and _are_counts(offset) and _are_counts(size)):
        return False
    return (
        isinstance(checksum, str)
        and len(offset) == len(size) == len(shape)
        and all(s > 0 and o + s <= whole for o, s, whole in zip(offset, size, shape, strict=True))
        and room[file][0] <= begin
        and begin + 4 * prod(size) <= room[file][1]
    )


def overlap(offset: Shape, size: Shape, other: Shape, other_size: Shape) -> list[tuple[int, int]] | None:
    """What two rectangles share, as (begin, end) in each dimension; None if nothing."""
    both = [(max(a, b), min(a + m, b + n)) for a, m, b, n in zip(offset, size, other, other_size, strict=True)]
    return both if all(begin < end for begin, end in both) else None


def inside(both: Sequence[tuple[int, int]], offset: Shape) -> Any:
    """The index of a shared region in the rectangle that begins at `offset`."""
    return tuple(slice(begin - o, end - o) for (begin, end), o in zip(both, offset, strict=True))
