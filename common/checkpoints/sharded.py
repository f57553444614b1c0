"""Pieces of a training state on disk: torch.distributed.checkpoint (DCP) over safetensors and an index in JSON, no pickle.

Each rank writes the pieces that it holds to a file of its own, and rank 0 writes the index of all, OUT/step_N/state.json:

    format       2
    step, samples, seed, stack, layout, dtype, hyperparameters, commit    of the run (state.meta)
    parameters   {name: {part: full shape}}
    files        {file: {bytes, header: bytes of its header, crc32: of the header}}
    pieces       {name: {part: [[number of its file, first byte, checksum, offset, size], ...]}}
    crc32        of the index (integrity.seal)

A piece is a rectangle of a part, in fp32 and row-major order. Its checksum is XXH3 with 64 bits, in hexadecimal: 19 GB/s on a
core, where crc32 has 4. Pieces are loaded as any other pieces: a run goes on in another layout of another stack, and each rank
reads what it needs.

DCP lets the ranks agree on the outcome, and saves behind the training. Its plans stay empty: a rank knows what it holds, and
with its objects for each piece rank 0 would gather, and send to every rank, a description of the whole model.
"""

import errno
import json
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from contextlib import ExitStack, suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save, save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from torch.futures import Future
from xxhash import xxh3_64, xxh3_64_hexdigest

from common.checkpoints import integrity, parameters
from common.checkpoints.parameters import Shapes
from common.checkpoints.pieces import Batches, Piece, inside, overlap, own, uncovered
from common.errors import BadInput
from common.launch import heartbeat

if TYPE_CHECKING:
    from common.checkpoints.checkpoint import Checkpoint

BLOCK = 2**18  # elements that are checked, summed and written while a core has them in its cache
Entry = list[Any]  # number of the file, first byte, checksum, offset, size
Entries = dict[str, dict[str, list[Entry]]]  # by name and part
counters: Counter[str] = Counter()  # of this rank: bytes written, bytes read, files opened


class NotFinite(Exception):
    """A value of the state is NaN or infinite."""


class Damaged(BadInput):
    """Bytes of a checkpoint are not those that were written."""


class Written(NamedTuple):
    """What a rank reports of a file that it wrote."""

    file: str
    info: dict[str, int]  # its entry among the `files` of the index
    shapes: dict[str, dict[str, tuple[int, ...]]]
    entries: Entries  # with 0 for the number of the file


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(path: Path, pieces: Sequence[Piece], values: Callable[[Piece], torch.Tensor] = lambda piece: piece.tensor) -> Written:
    """Write pieces to a safetensors file, one at a time; returns once they are on disk. OSError, NotFinite.

    values: returns the tensor to write of a piece. No copy is made of what is contiguous in host memory; of anything else, one
    piece at a time (pieces.LARGEST).
    """
    header: dict[str, Any] = {}
    end = 0
    for number, piece in enumerate(pieces):
        begin, end = end, end + 4 * piece.tensor.numel()
        key = f"{piece.name}/{piece.part}/{','.join(map(str, piece.offset))}"
        assert key not in header, f"{key} twice, and then at {number}"
        header[key] = {"dtype": "F32", "shape": list(piece.tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    at = 8 + len(text)
    text = len(text).to_bytes(8, "little") + text
    written = Written(path.name, {"bytes": at + end, "header": at, "crc32": zlib.crc32(text)}, {}, {})
    with open(path, "wb", buffering=0) as file:
        counters["files opened"] += 1
        _write_all(file.fileno(), text)
        for piece in pieces:
            _beat("saving")
            tensor = values(piece).detach().to("cpu", torch.float32).contiguous()
            checksum = xxh3_64()
            for block in tensor.view(-1).split(BLOCK):
                if not integrity.is_finite(block):
                    raise NotFinite(piece.name)
                data = _bytes_of(block)
                checksum.update(data)
                _write_all(file.fileno(), data)
            written.shapes.setdefault(piece.name, {})[piece.part] = piece.shape
            entry = [0, at, checksum.hexdigest(), list(piece.offset), list(tensor.shape)]
            written.entries.setdefault(piece.name, {}).setdefault(piece.part, []).append(entry)
            at += 4 * tensor.numel()
        os.fsync(file.fileno())
    counters["bytes written"] += at
    return written


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous fp32 tensor on the CPU."""
    return memoryview(tensor.view(-1).numpy()).cast("B")


def _write_all(file: int, data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def index(results: Sequence[Sequence[Written]], shapes: Shapes) -> dict[str, Any]:
    """The index of the files of all ranks. BadInput unless they hold each parameter of `shapes`, and each part of it, once."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    pieces: Entries = {}
    files = {written.file: written.info for result in results for written in result}
    names = {file: number for number, file in enumerate(files)}
    for written in (written for result in results for written in result):
        for name, of_name in written.entries.items():
            for part, entries in of_name.items():
                parts.setdefault(name, {}).setdefault(part, written.shapes[name][part])
                kept = pieces.setdefault(name, {}).setdefault(part, [])
                kept += [[names[written.file], *entry[1:]] for entry in entries]
    problems = parameters.differences({name: shape.get("weight", ()) for name, shape in parts.items()}, shapes)
    for name, of_name in pieces.items():
        for part, entries in of_name.items():
            problem = uncovered(parts[name][part], [(entry[3], entry[4]) for entry in entries])
            problems += [f"{part} of {name} {problem}"] if problem else []
    if problems:
        raise BadInput([f"the state of all ranks: {problem}; nothing was saved" for problem in problems[:8]])
    return {
        "format": 2,
        "parameters": {name: {part: list(shape) for part, shape in parts[name].items()} for name in sorted(parts)},
        "files": files,
        "pieces": {name: pieces[name] for name in sorted(pieces)},
    }


class SavingPlanner(SavePlanner):
    """Passes the batches of pieces to the storage."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.batches: Batches = state_dict["batches"]

    def create_local_plan(self) -> SavePlan:
        return SavePlan([])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: Any) -> torch.Tensor:
        raise NotImplementedError("the plans are empty")


class LoadingPlanner(LoadPlanner):
    """Passes the batches of pieces to the storage."""

    def set_up_planner(self, state_dict: Any, *_: Any, **__: Any) -> None:
        self.batches: Batches = state_dict["batches"]

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise NotImplementedError("the plans are empty")

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        raise NotImplementedError("the plans are empty")

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        raise NotImplementedError("the plans are empty")


class Writer(StorageWriter):
    """Writes a step to the folder `tmp`. On rank 0, `begin` makes it, and `finish` gets the index once all have written."""

    def __init__(
        self, tmp: Path, rank: int, shapes: Shapes, begin: Callable[[], None], finish: Callable[[dict[str, Any]], None]
    ):
        self.tmp, self.rank, self.shapes, self.begin, self.finish_step = tmp, rank, shapes, begin, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        if is_coordinator:
            self.begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        written = []
        progress.phase = "saving"
        for number, batch in enumerate(planner.batches):
            pieces = own(batch.pieces)
            if pieces:
                name = f"{self.rank:05}" + (f"-{number:05}" if number else "")
                path = self.tmp / f"{name}.safetensors"
                try:
                    written.append(write(path, pieces))
                except OSError as error:
                    raise BadInput(disk_error(path, "be written", error)) from None
        progress.phase = "waiting"
        if _is_main():
            heartbeat.wait("save")
        future: Any = Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: Any) -> None:
        self.finish_step(index(results, self.shapes))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def disk_error(path: Path, what: str, error: OSError) -> str:
    """The line for a step of OUT, or a file in it, that could not be written."""
    line = f"{path}: cannot {what}: {error.strerror or error}"
    if error.errno == errno.ENOENT:
        return f"{line}; OUT is gone: with it in its place again, the same command continues"
    return f"{line}; the steps saved before are whole"


# ---- reading ---------------------------------------------------------------------------------------------------------


class Reader(StorageReader):
    """Reads the pieces that this rank wants."""

    def __init__(self, checkpoint: "Checkpoint"):
        self.checkpoint, self.entries = checkpoint, checkpoint.meta["pieces"]
        self.files = [checkpoint.path / file for file in checkpoint.meta["files"]]
        self.first: dict[tuple[str, str], int] = {}  # number of the first piece of a part (number_pieces)
        self.verified: set[int] = set()  # numbers of the pieces whose checksums were compared

    def number_pieces(self) -> int:
        """Number the pieces of the index, in its order; returns how many they are."""
        count = 0
        for name, parts in self.entries.items():
            for part, entries in parts.items():
                self.first[name, part] = count
                count += len(entries)
        return count

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return Metadata({})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> Any:
        for batch in planner.batches:
            self.read(batch.pieces)
        heartbeat.wait("parameters of other ranks")
        future: Any = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read(self, targets: Sequence[Piece]) -> None:
        """Fill the pieces. Each piece on disk is read once, whole or in part."""
        wanted: dict[tuple[str, str], list[Piece]] = {}
        for target in targets:
            wanted.setdefault((target.name, target.part), []).append(target)
        with ExitStack() as stack:
            opened: dict[int, int] = {}

            def file_of(number: int) -> int:
                if number not in opened:
                    counters["files opened"] += 1
                    opened[number] = os.open(self.files[number], os.O_RDONLY)
                    stack.callback(os.close, opened[number])
                return opened[number]

            for (name, part), pieces in wanted.items():
                heartbeat.beat("reading parameters")
                entries = self.entries.get(name, {}).get(part)
                if entries is None:
                    raise BadInput(f"{self.checkpoint.path}: holds no {part} of {name}; it is a checkpoint of another run")
                begin = min(piece.offset[0] for piece in pieces)
                end = max(piece.offset[0] + len(piece.tensor) for piece in pieces)
                for number, entry in enumerate(entries, self.first.get((name, part), 0)):
                    if entry[3][0] >= end or entry[3][0] + entry[4][0] <= begin:  # most, where many ranks have written
                        continue
                    shared = [(piece, overlap(entry[3], entry[4], piece.offset, piece.tensor.shape)) for piece in pieces]
                    regions = [(piece, both) for piece, both in shared if both is not None]
                    if regions:
                        try:
                            self._fill(name, part, number, entry, file_of, regions)
                        except OSError as error:
                            path = self.files[entry[0]]
                            raise BadInput(
                                f"{path}: cannot be read ({error.strerror or error}); does another run write into "
                                f"{self.checkpoint.path.parent}?"
                            ) from None

    def _fill(self, name: str, part: str, number: int, entry: Entry, file_of: Any, regions: Any) -> None:
        """Read of one piece what its regions want, and copy each region to the piece in memory that wants it.

        Whole rows are read, by one call, and of a piece that is read whole the checksum is compared. Where less than half of
        the columns are wanted (a tensor-parallel rank's, of rows that another layout has written), these alone are read.
        """
        file, begin, checksum, offset, size = entry
        first, last = min(both[0][0] for _, both in regions), max(both[0][1] for _, both in regions)
        origin, read = [first, *offset[1:]], [last - first, *size[1:]]
        if len(size) == 2:
            left, right = min(both[1][0] for _, both in regions), max(both[1][1] for _, both in regions)
            if 2 * (right - left) < size[1]:
                origin, read = [first, left], [last - first, right - left]
        direct = _direct(regions, origin, read)
        values = torch.empty(read) if direct is None else direct
        at = begin + 4 * (first - offset[0]) * prod(size[1:])
        if read[1:] == size[1:]:
            _read_all(file_of(file), _bytes_of(values), at, self.files[file])
        else:
            at += 4 * (origin[1] - offset[1])
            for row in range(read[0]):
                _read_all(file_of(file), _bytes_of(values[row]), at + 4 * row * size[1], self.files[file])
        if read == size:
            if xxh3_64_hexdigest(_bytes_of(values)) != checksum:
                raise Damaged(self._changed(file, name, part))
            self.verified.add(number)
            if not integrity.is_finite(values):
                raise BadInput(
                    f"{self.files[file]}: {part} of {name} holds NaN or infinite values, the training had diverged by step "
                    f"{self.checkpoint.step}; remove {self.checkpoint.path} to continue from the step before, or begin in "
                    "another OUT with a lower optim.lr"
                )
        if direct is None:
            for piece, both in regions:
                piece.tensor[inside(both, piece.offset)].copy_(values[inside(both, origin)])

    def _changed(self, file: int, name: str, part: str) -> str:
        return f"{self.files[file]}: its bytes have changed since it was written ({part} of {name})"

    def verify(self, numbers: Iterable[int]) -> Iterator[str]:
        """Compare the checksums of these pieces (number_pieces). Yields one line for each damaged one."""
        numbers = set(numbers)
        handles: dict[int, Any] = {}
        with ExitStack() as stack:
            for (name, part), first in self.first.items():
                for number, (file, begin, checksum, _, size) in enumerate(self.entries[name][part], first):
                    if number not in numbers:
                        continue
                    heartbeat.beat("verifying the state")
                    try:
                        if file not in handles:
                            counters["files opened"] += 1
                            handles[file] = stack.enter_context(open(self.files[file], "rb", buffering=0))
                        data = bytearray(4 * prod(size))
                        _read_all(handles[file].fileno(), memoryview(data), begin, self.files[file])
                    except OSError as error:
                        yield f"{self.files[file]}: cannot be read ({error.strerror or error}): {part} of {name}"
                        continue
                    if xxh3_64_hexdigest(data) != checksum:
                        yield self._changed(file, name, part)


def read_whole(checkpoint: "Checkpoint", name: str, parts: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The parts of one parameter (default: all), as Checkpoint.read has them."""
    shapes = checkpoint.meta["parameters"].get(name)
    if shapes is None:
        raise BadInput(f"{checkpoint.path}: holds no parameter {name}; it is a checkpoint of another model")
    whole = {part: torch.empty(shapes[part]) for part in parts or shapes}
    targets = [Piece(name, part, tuple(tensor.shape), (0,) * tensor.dim(), tensor) for part, tensor in whole.items()]
    Reader(checkpoint).read(targets)
    return whole


def _verify_rest(reader: Reader, count: int) -> None:
    """Divide the pieces that no rank has verified among the ranks; a collective. BadInput on all if one is damaged."""
    import torch.distributed as dist

    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    own = torch.zeros(count, dtype=torch.uint8)
    own[list(reader.verified)] = 1
    verified = own.to(device)
    dist.all_reduce(verified, dist.ReduceOp.MAX)
    rest = (verified.cpu() == 0).nonzero().flatten().tolist()
    if not rest:
        return
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, list(reader.verify(rest[dist.get_rank() :: dist.get_world_size()])))
    found = [line for lines in problems for line in lines]
    if found:
        raise Damaged(found[:8])


def save(writer: Writer, batches: Batches) -> None:
    """Write a step; a collective. The fault of one rank is raised on all."""
    try:
        dcp_save({"batches": batches}, storage_writer=writer, planner=SavingPlanner())
    except CheckpointException as error:
        raise _fault(error) from None


class Background:
    """A save in a thread of DCP's."""

    def __init__(self, future: Any):
        self.future, self.ended = future, 0.0
        future.add_done_callback(self._end)

    def _end(self, _: Any) -> None:
        self.ended = time.perf_counter()

    def has_succeeded(self) -> bool:
        return bool(self.ended) and self.future.exception() is None

    def wait(self) -> None:
        """Wait for the end of the save. The heartbeats are those of the thread: a slow disk that makes progress is no hang."""
        seen = -1
        while not self.future.done():
            if progress.phase == "waiting":
                heartbeat.wait("save")
            elif progress.pieces != seen:
                seen = progress.pieces
                heartbeat.beat("saving")
            futures.wait([self.future], timeout=0.1)
        try:
            self.future.result()
        except CheckpointException as error:
            raise _fault(error) from None


class _Stager(AsyncStager):
    """Copies what this rank writes to host memory, which is pinned on a GPU machine and kept for the next save."""

    buffers: ClassVar[dict[tuple[str, str, tuple[int, ...]], torch.Tensor]] = {}

    def stage(self, state_dict: Any) -> Any:
        staged, on_gpu = [], torch.cuda.is_available()
        for batch in state_dict["batches"]:
            copies = []
            for piece in own(batch.pieces):
                key = piece.name, piece.part, piece.offset
                buffer = self.buffers.get(key)
                if buffer is None or buffer.shape != piece.tensor.shape:
                    buffer = self.buffers[key] = torch.empty(piece.tensor.shape, pin_memory=on_gpu)
                buffer.copy_(piece.tensor.detach(), non_blocking=True)
                copies.append(piece._replace(tensor=buffer, replica=0, replicas=1))
            if on_gpu:
                torch.cuda.synchronize()  # of deepspeed.nvme, the memory is used again for the next batch
            staged.append(batch._replace(pieces=copies))
        return {"batches": staged}

    @property
    def should_synchronize_after_execute(self) -> bool:
        return False

    def synchronize_staging(self) -> None:
        pass

    def close(self) -> None:
        pass


_group: list[Any] = []  # that of the threads: their collectives must not meet those of the training


def save_in_background(writer: Writer, batches: Batches) -> Background:
    """As `save`, in a thread, of a copy of the pieces; a collective."""
    import torch.distributed as dist

    if not _group or _group[0] != dist.group.WORLD:
        _group[:] = [dist.group.WORLD, dist.new_group(backend="gloo")]
    future = dcp_async_save(
        {"batches": batches}, storage_writer=writer, planner=SavingPlanner(), process_group=_group[1], async_stager=_Stager()
    )
    return Background(future)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


class Progress:
    """Of the save that this rank makes."""

    phase = "waiting"  # for the other ranks, or "saving"
    pieces = 0  # that it has begun


progress = Progress()


def _beat(phase: str) -> None:
    """A heartbeat of what the training does. A save in the background has its own, which Background.wait passes on."""
    progress.pieces += 1
    if _is_main():
        heartbeat.beat(phase)


def load(checkpoint: "Checkpoint", batches: Batches) -> None:
    """Fill the pieces of this rank; a collective. The fault of one rank is raised on all.

    A rank verifies the checksums of the pieces that it reads whole; those that none reads whole are divided among the ranks. A
    damaged checkpoint is marked, so that the next start uses the one before.
    """
    import torch.distributed as dist

    from common.checkpoints.checkpoint import DAMAGED, finished

    reader = Reader(checkpoint)
    count = reader.number_pieces()
    try:
        try:
            dcp_load({"batches": batches}, storage_reader=reader, planner=LoadingPlanner())
        except CheckpointException as error:
            raise _fault(error) from None
        heartbeat.beat("verifying the state")
        _verify_rest(reader, count)
    except Damaged as error:
        if dist.get_rank() == 0:
            with suppress(OSError):  # a folder that may only be read
                (checkpoint.path / DAMAGED).write_text(f"{error.problems[0]}\n", encoding="utf-8")
        is_first = finished(checkpoint.path.parent)[:1] == [checkpoint.path]
        then = "no step before it is left: restore it, or choose another OUT"
        then = then if is_first else "the same command continues from the step before it"
        raise BadInput([f"{line}; {then}" for line in error.problems]) from None


def _fault(error: CheckpointException) -> Exception:
    """Of the faults of all ranks the one to tell; the exception itself where it is none that we raise."""
    faults = [fault for _, (fault, _) in sorted(error.failures.items())]
    ours = [fault for fault in faults if isinstance(fault, BadInput)] + [f for f in faults if isinstance(f, NotFinite)]
    if ours:
        return ours[0]
    raise error


def damaged_headers(checkpoint: "Checkpoint") -> Iterator[str]:
    """One line for each file whose header, which other tools read, has changed. The index has what is read here."""
    for name, info in checkpoint.meta["files"].items():
        path = checkpoint.path / name
        try:
            with open(path, "rb") as file:
                if zlib.crc32(file.read(info["header"])) != info["crc32"]:
                    yield f"{path}: its header has changed since it was written, which no value is read from; copy it again"
        except OSError as error:
            yield f"{path}: cannot be read ({error.strerror or error})"


def _direct(regions: Any, origin: Sequence[int], size: Sequence[int]) -> torch.Tensor | None:
    """The memory that the bytes of a file can be read into, as they are: that of the only region."""
    if len(regions) != 1:
        return None
    piece, both = regions[0]
    if [(o, o + s) for o, s in zip(origin, size, strict=True)] != both:
        return None
    tensor: torch.Tensor = piece.tensor[inside(both, piece.offset)].detach()
    fits = tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
    return tensor if fits else None


def _read_all(file: int, into: memoryview, begin: int, path: Path) -> None:
    counters["bytes read"] += len(into)
    while into:
        count = os.preadv(file, [into], begin)
        if not count:
            raise OSError(0, "it is too short", str(path))
        into, begin = into[count:], begin + count
