"""A finished run in Hugging Face form: weights from its last checkpoint, one parameter at a time, tokenizer, model card."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from common import checkpoint, heartbeat, parameters
from common.checkpoint import Checkpoint
from common.config import Config
from common.errors import BadInput
from common.ranks import Ranks
from common.run import Run

SHARD_BYTES = 4 * 2**30


def to_hf(
    run: Run, task: ModuleType, ranks: Ranks, steps: Path | None = None, whole: Callable[[Checkpoint], Any] = lambda c: c
) -> None:
    """OUT/hf after the last step, by rank 0; the others wait. Nothing is done where it is there already.

    steps: folder whose newest checkpoint is exported (default: OUT). whole: what is read in place of a checkpoint that holds
    a part of the model (common/lora.py).
    """
    import torch.distributed as dist

    problems: list[Any] = [None]
    if ranks.rank == 0 and run.is_last_phase:
        last = checkpoint.latest(steps or run.out)
        folder = run.out / "hf"
        try:
            if last and _exported_step(folder) != last.step:
                write(whole(last), run.whole, task, folder, run.out / "tokenizer", run.facts)
                print(f"export    {folder}", flush=True)
        except BadInput as error:
            problems = [error.problems]
    heartbeat.wait("export")
    dist.broadcast_object_list(problems)  # the others wait here
    heartbeat.beat("exported")
    if problems[0]:
        raise BadInput(problems[0])


def _exported_step(folder: Path) -> int | None:
    try:
        return json.loads((folder / "twinstack.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError):
        return None


def write(
    source: checkpoint.Checkpoint, cfg: Config, task: ModuleType, folder: Path, tokenizer: Path, facts: dict[str, Any]
) -> None:
    """Write a folder that `AutoModel...from_pretrained` loads; it appears under its name when it is whole."""
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        _weights(source, tmp)
        task.hf_config(cfg.model).save_pretrained(tmp)
        _finish_config(tmp, task, cfg, _tokenizer(tokenizer, tmp))
        _prove(source, cfg, task, tmp)
        (tmp / "README.md").write_text(_card(source, cfg, task, facts), encoding="utf-8")
        (tmp / "twinstack.json").write_text(json.dumps({"step": source.step, **facts}, indent=1), encoding="utf-8")
    except OSError as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise BadInput(f"{folder}: cannot write the export: {error.strerror or error}") from None
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)


def _prove(source: checkpoint.Checkpoint, cfg: Config, task: ModuleType, folder: Path) -> None:
    """BadInput unless the class that loads the export, built from the config.json written, has the tensors written and no
    other: a tensor that it shares under several names (tied weights) may be stored under each of them."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        net = getattr(transformers, task.hf_class(cfg.model))(config)
    names: dict[int, list[str]] = {}
    tensors = net.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    stored = source.shapes()
    loaded = [name for shared in names.values() for name in [n for n in shared if n in stored] or shared[:1]]
    shapes = {name: tuple(tensors[name].shape) for name in loaded}
    parameters.prove(stored, shapes, str(source.path), f"{task.hf_class(cfg.model)}, which loads the export,")


def _weights(source: checkpoint.Checkpoint, folder: Path) -> None:
    """model-0000k-of-0000n.safetensors, at most SHARD_BYTES each, and their index; fp32 as the masters are."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    size = 0
    for name in source.names():
        bytes_of = 4 * math.prod(source.meta["files"][name]["shape"])  # fp32
        if size and size + bytes_of > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_of
    index, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            heartbeat.beat("export")
            tensors[name] = source.read(name, ("weight",))["weight"].clone()
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        total += sum(t.numel() * 4 for t in tensors.values())
    if len(shards) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _tokenizer(tokenizer: Path, folder: Path) -> dict[str, int]:
    """Copy the tokenizer, where the run has one; returns what config.json says of it."""
    if not tokenizer.is_dir():
        return {}
    from common import tokenizer as tokenizers

    loaded = tokenizers.load(tokenizer)
    loaded.save(folder)
    ids = {"bos_token_id": loaded.eod_id, "eos_token_id": loaded.eod_id, "pad_token_id": loaded.pad_id}
    return {name: value for name, value in ids.items() if value is not None}


def _finish_config(folder: Path, task: ModuleType, cfg: Config, ids: dict[str, int]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= {"architectures": [task.hf_class(cfg.model)], "use_cache": True, "dtype": "float32"} | ids
    values |= task.export_config(cfg.model)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _card(source: checkpoint.Checkpoint, cfg: Config, task: ModuleType, facts: dict[str, Any]) -> str:
    """README.md of the export: what it is, on what it was trained, how, and what it reached."""
    import yaml

    losses = _losses(source.path.parent / "metrics.jsonl", source.step)
    trained = source.meta["stack"] != "huggingface"  # else the weights that from-hf has imported
    rows = {
        **task.card(cfg.model),
        "trained with": f"{source.meta['stack']} to step {source.step:,}" if trained else None,
        "training loss": losses.get("loss"), "validation loss": losses.get("valid_loss"),
        "data": f"{cfg.data.train} (content {str((facts.get('data') or {}).get('train'))[:16]})" if trained else None,
        "tokenizer": str(facts.get("tokenizer"))[:16] if trained else None,
        "commit": facts.get("commit"), "config": facts.get("config"),
    }  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    config = yaml.safe_dump(cfg.dump(), sort_keys=False, width=120)
    return (
        f"---\nlibrary_name: transformers\ntags: [{task.FAMILY}]\n---\n# {facts.get('config')}\n\n"
        f"| | |\n|---|---|\n{table}\n\n```yaml\n{config}```\n"
    )


def _losses(path: Path, step: int) -> dict[str, float]:
    """The last training and validation loss that the log holds up to `step`."""
    found: dict[str, float] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if values["step"] <= step:
                found |= {k: values[k] for k in ("loss", "valid_loss") if k in values}
    return found
