"""A Hugging Face folder to begin from: is it a model that this repository computes, with weights that are all there?"""

import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from common.config import Config
from common.errors import BadInput
from common.run import read_object


def check(folder: Path, name: str, cfg: Config, task: ModuleType, notes: list[str]) -> list[str]:
    """Is this a Hugging Face folder of the config's architecture (its config.json says so), with whole weights? Adds to
    `notes` which heads it lacks, and which of a finetuned model is trained on."""
    if not (folder / "config.json").is_file():
        return [f"{name}: no config.json there; give `scratch` or a Hugging Face folder"]
    theirs = read_object(folder / "config.json")
    if theirs is None:
        return [f"{name}: its config.json cannot be read; get the folder again"]
    wanted = task.hf_type(cfg.model)
    if theirs.get("model_type") != wanted:
        ours = f"the config's model.arch is {cfg.model.arch!r}"
        return [f"{name}: is a {theirs.get('model_type')!r} model, {ours} ({wanted!r} in its config.json)"]
    problems = [f"{name}: has {difference}" for difference in differences(theirs, task.hf_shapes(cfg.model))]
    held: dict[str, tuple[int, ...]] = {}
    problems += whole_weights(folder, name, held)
    for stack, count in _depths(held).items():
        wanted = getattr(cfg.model, "decoder_layers", cfg.model.layers) if "decoder" in stack else cfg.model.layers
        if count != wanted:
            problems.append(
                f"{name}: its weights hold {count} layers ({stack}0 on), its config.json says {wanted}; get it again"
            )
    if hasattr(task, "head_problems"):  # of finetuning
        problems += [f"{name}: {told}" for told in task.head_problems(cfg, held, theirs)]
        if not problems:
            notes += [f"{name}: {told}" for told in task.head_notes(cfg, held, theirs)]
    for head in task.heads(cfg.model):
        if not problems and not any(key.startswith(tuple(task.stored_names(head))) for key in held):
            notes.append(f"{name}: holds no {head}*; these parameters begin from train.seed")
    return problems


def model_in(folder: Path, task: ModuleType) -> Any:
    """The `model` section of a Hugging Face folder, all of whose weights are there; BadInput says what is wrong with it."""
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: no config.json there; give a Hugging Face folder")
    theirs = read_object(folder / "config.json")
    if theirs is None:
        raise BadInput(f"{folder}: its config.json cannot be read; get the folder again")
    if theirs.get("model_type") not in task.MODEL_TYPES:
        known = " and ".join(task.MODEL_TYPES)
        raise BadInput(f"{folder}: is a {theirs.get('model_type')!r} model; this family knows {known}")
    try:
        model = task.model_of(theirs)
    except KeyError as error:
        raise BadInput(f"{folder}: its config.json has no {error.args[0]}; get the folder again") from None
    except ValidationError as error:
        told = [f"{'.'.join(map(str, e['loc']))}={e.get('input')!r}: {e['msg']}" for e in error.errors(include_url=False)]
        raise BadInput([f"{folder}: its config.json gives {line}" for line in told]) from None
    problems = [f"has {difference}" for difference in differences(theirs, task.hf_shapes(model))]
    problems = [*model.problems(), *problems]
    held: dict[str, tuple[int, ...]] = {}
    unreadable = whole_weights(folder, str(folder), held)
    if problems or unreadable:
        raise BadInput([*(f"{folder}: {p}" for p in problems), *unreadable])
    for name, shape in task.hf_parameters(model).items():
        found = next((held[known] for known in task.stored_names(name) if known in held), None)
        if found is None and not name.startswith(task.heads(model)):
            problems.append(f"{folder}: holds no {name}; it is a model of another architecture")
        elif found not in (None, shape):
            problems.append(f"{folder}: {name} is {found}, its config.json says {shape}")
    if problems:
        raise BadInput(problems)
    return model


def differences(theirs: dict[str, object], ours: dict[str, object]) -> list[str]:
    """'n_layer=12, the model gives 4': where a folder's config.json contradicts what we would build (a tuple: one of)."""
    given = {**(theirs.get("rope_parameters") or {}), **{k: v for k, v in theirs.items() if v is not None}}
    allowed = {k: v if isinstance(v, tuple) else (v,) for k, v in ours.items() if k in given}
    return [f"{k}={given[k]!r}, the model gives {' or '.join(map(repr, v))}" for k, v in allowed.items() if given[k] not in v]


def whole_weights(folder: Path, name: str, held: dict[str, tuple[int, ...]]) -> list[str]:
    """Are there safetensors, each as long as its header says? Adds the names and shapes of their tensors to `held`. Pickles
    (.bin) are never read: they can run code."""
    files = sorted(folder.glob("*.safetensors"))
    if not files and any(folder.glob("*.bin")):
        return [f"{name}: holds pickled weights (.bin) only, which are not read; save it as safetensors"]
    if not files:
        return [f"{name}: no *.safetensors there; a Hugging Face folder with weights is needed"]
    index = (read_object(folder / "model.safetensors.index.json") or {}).get("weight_map")
    named = set(index.values()) if isinstance(index, dict) else set()
    problems = [f"{name}: {file} is missing" for file in sorted(named - {path.name for path in files})]
    for path in files:
        try:
            with open(path, "rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            held.update({key: tuple(tensor["shape"]) for key, tensor in header.items()})
            end = max((t["data_offsets"][1] for t in header.values()), default=0)
            if path.stat().st_size != 8 + size + end:
                problems.append(f"{name}: {path.name} has {path.stat().st_size} of {8 + size + end} bytes; get it again")
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError, RecursionError):
            problems.append(f"{name}: {path.name} is not a safetensors file; get it again")
    return problems


_LAYER = re.compile(r"((?:.*?\.)?(?:h|layer|layers|block)\.)(\d+)\.")


def _depths(held: Iterable[str]) -> dict[str, int]:
    """{beginning of the names of a stack of layers, such as encoder.layer.: layers} of the tensors with these names."""
    made: dict[str, int] = {}
    for match in filter(None, map(_LAYER.match, held)):
        made[match[1]] = max(made.get(match[1], 0), int(match[2]) + 1)
    return made
