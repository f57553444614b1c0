"""The export of a finished run in Hugging Face form: weights of its last checkpoint, tokenizer, model card."""

import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common import screen
from common.checkpoints import checkpoint, integrity, parameters
from common.checkpoints.checkpoint import Checkpoint
from common.contract import Family
from common.errors import DISK_ERRORS, BadInput
from common.launch import heartbeat
from common.launch.processes import Ranks
from common.preflight import Run
from common.training import log
from common.yaml_files import to_yaml

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5 * 10**9


class Exportable(Protocol):
    """What an export needs of a config."""

    @property
    def model(self) -> Any: ...

    def dump(self) -> dict[str, Any]: ...


UNCHECKED = ("README.md", integrity.RECORD)  # a model card is there to be edited


def to_hf(
    run: Run, task: Family, ranks: Ranks, steps: Path | None = None, whole: Callable[[Checkpoint], Any] = lambda c: c
) -> None:
    """Write OUT/hf after the last step; a collective. An export that exists already stays.

    steps: folder whose newest checkpoint is exported (default: OUT). whole: turns a checkpoint with a part of the model into
    one with the whole model (common/training/lora.py).
    """
    folder = run.out / "hf"

    def newest() -> Path | None:
        """The checkpoint to export, on rank 0."""
        if ranks.rank or not run.is_last_phase:
            return None
        notes: list[str] = []
        last = checkpoint.latest(steps or run.out, notes)
        if last is None or integrity.exported_step(folder) == last.step:
            return None
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
        return last.path

    path = _on_every_rank(newest, folder)[0]
    if path is None:
        return
    last = checkpoint.opened(path)
    if not isinstance(last, Checkpoint):  # what is wrong with it, which rank 0 did not see
        raise BadInput(last)
    write(whole(last), run.whole, task, folder, run.out / "tokenizer", run.record)
    if ranks.rank == 0:
        print(f"export    {folder}", flush=True)


def _on_every_rank[T](work: Callable[[], T], folder: Path) -> list[T]:
    """Do the work, and return what it returned on each rank; a collective. BadInput on all if it fails on one."""
    import torch.distributed as dist

    result: Any = None
    problems: list[str] = []
    try:
        result = work()
    except BadInput as error:
        problems = error.problems
    except OSError as error:
        is_disk = error.errno in DISK_ERRORS
        advice = "make room there, and the same command continues" if is_disk else "give a folder that can be made"
        problems = [f"{folder}: cannot write the export: {error.strerror or error}; {advice}"]
    gathered = [(result, problems)]
    if dist.is_initialized():
        gathered *= dist.get_world_size()
        heartbeat.wait("export")
        dist.all_gather_object(gathered, (result, problems))
        heartbeat.beat("export")
    found = [problem for _, of_rank in gathered for problem in of_rank]
    if found:
        raise BadInput(list(dict.fromkeys(found))[:8])
    return [result for result, _ in gathered]


def unfinished(folder: Path) -> Path:
    """Where an export is written before it is whole; what is there is removed."""
    return folder.with_name(folder.name + ".tmp")


def write(
    source: checkpoint.Checkpoint, cfg: Exportable, task: Family, folder: Path, tokenizer: Path, record: dict[str, Any]
) -> None:
    """Write a folder that `AutoModel...from_pretrained` loads; it appears under its name when it is whole. twinstack.json has
    the record of the run, and bytes and checksum of each file. A collective where there are ranks, of which each writes some
    of the files of weights."""
    import torch.distributed as dist

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tmp = unfinished(folder)

    def begin() -> None:
        if rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)

    def finish(weights: dict[str, dict[str, int]]) -> None:
        if rank == 0:
            task.hf_config(cfg.model).save_pretrained(tmp)
            _finish_config(tmp, task, cfg, _tokenizer(tokenizer, tmp, record.get("tokenizer")))
            _prove(source, cfg, task, tmp)
            (tmp / "README.md").write_text(_card(source, cfg, task, record), encoding="utf-8")
            others = {path.name for path in tmp.iterdir()} - weights.keys() - set(UNCHECKED)
            files = weights | {name: integrity.checksum(tmp / name) for name in sorted(others)}
            sealed = integrity.seal({"step": source.step, **record, "files": files})
            (tmp / integrity.RECORD).write_text(json.dumps(sealed, indent=1), encoding="utf-8")
            integrity.replace_folder(tmp, folder)

    try:
        _on_every_rank(begin, folder)
        written = _on_every_rank(lambda: _weights(source, tmp, rank, world), folder)
        weights = {file: entry for of_rank in written for file, entry in of_rank.items()}
        _on_every_rank(lambda: finish(dict(sorted(weights.items()))), folder)
    except BadInput:
        if rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise


def _prove(source: checkpoint.Checkpoint, cfg: Exportable, task: Family, folder: Path) -> None:
    """BadInput unless the class that loads the export, built from its config.json, has exactly the tensors of the export. A
    tensor that the class has under several names (tied weights) may be stored under each of them."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        net = getattr(transformers, task.hf_class_name(cfg.model))(config)
    names: dict[int, list[str]] = {}
    tensors = net.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    stored = source.shapes()
    loaded = [name for shared in names.values() for name in [n for n in shared if n in stored] or shared[:1]]
    shapes = {name: tuple(tensors[name].shape) for name in loaded}
    parameters.prove(stored, shapes, str(source.path), f"{task.hf_class_name(cfg.model)}, which loads the export,")


def _weights(source: checkpoint.Checkpoint, folder: Path, rank: int, world: int) -> dict[str, dict[str, int]]:
    """Write this rank's share of model-0000k-of-0000n.safetensors, at most SHARD_BYTES each, and on rank 0 their index; fp32 as
    the masters are. Returns {file: checksum} of those that it wrote."""
    shapes = source.shapes()
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    size = 0
    for name in shapes:
        if size and size + sizes[name] > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += sizes[name]
    own = shards[rank::world]
    begun: list[str] = []
    written: dict[str, dict[str, int]] = {}
    with screen.progress("export", sum(map(len, own)), "parameters", shown=rank == 0) as report:

        def read(name: str) -> "torch.Tensor":
            begun.append(name)
            report(len(begun) - 1)
            return source.read(name, ("weight",))["weight"]

        for number, names in enumerate(own):
            file = shard_name(rank + number * world, len(shards))
            written[file] = write_tensors(folder / file, {name: shapes[name] for name in names}, read)
    if rank == 0 and len(shards) > 1:
        index = {name: shard_name(number, len(shards)) for number, names in enumerate(shards) for name in names}
        text = json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}, indent=1)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return written


def shard_name(number: int, of: int) -> str:
    return "model.safetensors" if of == 1 else f"model-{number + 1:05}-of-{of:05}.safetensors"


def write_tensors(path: Path, shapes: Mapping[str, Sequence[int]], read: Callable[[str], "torch.Tensor"]) -> dict[str, int]:
    """Write a safetensors file of fp32 tensors, one at a time, and return its {bytes, crc32}. It is byte for byte the file of
    safetensors' save_file, which would hold all tensors in memory and need a second reading for the checksum.

    shapes: full shape by name. read: returns the tensor of a name. https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    size = crc32 = 0
    with open(path, "wb") as file:

        def put(data: Any) -> None:
            nonlocal size, crc32
            file.write(data)
            size, crc32 = size + len(data), zlib.crc32(data, crc32)

        put(len(text).to_bytes(8, "little") + text)
        for name in sorted(shapes):
            heartbeat.beat("export")
            tensor = read(name)
            if list(tensor.shape) != list(shapes[name]):
                raise BadInput(f"{path}: {name} is {tuple(tensor.shape)}, state.json says {tuple(shapes[name])}")
            put(memoryview(tensor.float().contiguous().view(-1).numpy()).cast("B"))
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "crc32": crc32}


def _tokenizer(tokenizer: Path, folder: Path, wanted: str | None) -> dict[str, int]:
    """Copy the tokenizer of the run, if it has one; return the ids for config.json. wanted: its hash, if it is known."""
    if not tokenizer.is_dir():
        return {}
    generation = "generation_config.json"  # the ids that end a text
    if (tokenizer / generation).is_file():
        shutil.copyfile(tokenizer / generation, folder / generation)
    if [path.name for path in tokenizer.iterdir()] == [generation]:  # from-hf of a folder without a tokenizer
        return {}
    from common.data import tokenizer as tokenizers

    loaded = tokenizers.load(tokenizer)
    if wanted not in (None, loaded.hash):
        raise BadInput(f"{tokenizer}: is not the tokenizer that run.json names; copy that of the corpus there again")
    loaded.save(folder)
    ids = {"bos_token_id": loaded.eod_id, "eos_token_id": loaded.eod_id, "pad_token_id": loaded.pad_id}
    return {name: value for name, value in ids.items() if value is not None}


def _finish_config(folder: Path, task: Family, cfg: Exportable, ids: dict[str, int]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= {"architectures": [task.hf_class_name(cfg.model)], "use_cache": True, "dtype": "float32"} | ids
    values |= task.hf_config_overrides(cfg.model)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _card(source: checkpoint.Checkpoint, cfg: Exportable, task: Family, record: dict[str, Any]) -> str:
    """README.md of the export: the architecture, the data, the config and the losses."""
    losses, values = _losses(source.path.parent / "metrics.jsonl", source.step), cfg.dump()
    trained = source.meta["stack"] != "huggingface"  # else the weights that from-hf has imported
    rows = {
        **task.model_card(cfg.model),
        "trained with": f"{source.meta['stack']} to step {source.step:,}" if trained else None,
        "training loss": losses.get("loss"), "validation loss": losses.get("valid_loss"),
        "data": f"{values['data']['train']} (content {str((record.get('data') or {}).get('train'))[:16]})" if trained else None,
        "tokenizer": str(record.get("tokenizer"))[:16] if trained else None,
        "commit": record.get("commit"), "config": record.get("config"),
    }  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    return (
        f"---\nlibrary_name: transformers\ntags: [{task.FAMILY}]\n---\n# {record.get('config')}\n\n"
        f"| | |\n|---|---|\n{table}\n\n```yaml\n{to_yaml(values)}```\n"
    )


def _losses(path: Path, step: int) -> dict[str, float]:
    """The last training and validation loss in the log up to `step`."""
    losses: dict[str, float] = {}
    for line in log.read(path, step):
        losses |= {k: line[k] for k in ("loss", "valid_loss") if k in line}
    return losses
