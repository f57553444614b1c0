"""A Hugging Face folder to begin from: is it a model that this repository computes, with weights that are all there?

The configuration is compared key by key: what the folder's own `transformers` class reads from its config.json with what it
reads from the config.json that an export of the model would have. A key may differ only if it is listed, with a reason, as one
that changes no output: NO_EFFECT here, task.IGNORED_HF_KEYS for a family. Then every tensor must be a parameter of the model,
a copy of one, or listed (task.HF_BUFFER_PATTERNS, task.IGNORED_HF_HEADS), and every parameter must be there.

The launcher checks this on the host, where torch is not loaded: transformers reads the configurations in a process from which
torch is hidden, in 1 s. Where torch is loaded, this process does it.
"""

import importlib
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from common.config import Config
from common.contract import Family, PretrainingFamily
from common.errors import BadInput
from common.json_files import read_object
from common.paths import ROOT

INDEX = "model.safetensors.index.json"
JSON_BYTES = 2**26  # more than any config.json or index has
HEADER_BYTES = 100_000_000  # safetensors' own limit
FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
OTHERS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4,
          "I64": 8, "U64": 8, "C64": 8}  # fmt: skip
SHOWN = 120  # characters of a value in a message

_READ_ELSEWHERE = "known by the tensors of its heads"
_RETURNED = "what a call returns beside the output, not the output"
_MEMORY = "the same values, computed in another order or with less memory"
_RECORD = "a note on where the folder comes from"
NO_EFFECT = {  # keys of config.json -> why they change no output
    "transformers_version": _RECORD, "_name_or_path": _RECORD, "finetuning_task": _RECORD, "unsloth_version": _RECORD,
    "unsloth_fixed": _RECORD, "transformers.js_config": "another library's", "tokenizer_class": "the tokenizer's files decide",
    "task_specific_params": "settings of generation", "dtype": "of the stored weights, which become fp32 here",
    "architectures": _READ_ELSEWHERE, "id2label": _READ_ELSEWHERE, "label2id": _READ_ELSEWHERE, "_num_labels": _READ_ELSEWHERE,
    "num_labels": _READ_ELSEWHERE, "problem_type": _READ_ELSEWHERE, "loss_type": "the loss is the recipe's own",
    "output_hidden_states": _RETURNED, "output_attentions": _RETURNED, "output_past": _RETURNED, "return_dict": _RETURNED,
    "use_cache": _MEMORY, "gradient_checkpointing": _MEMORY,
    "_attn_implementation_autoset": _MEMORY, "initializer_range": "of weights that the folder lacks, which the recipe draws",
    "initializer_factor": "as initializer_range",
}  # fmt: skip
# what older files say of features that transformers' classes no longer have: the only values that change nothing
OLDER = {"pruned_heads": {}, "torchscript": False, "tie_encoder_decoder": False, "is_decoder": False,
         "add_cross_attention": False, "use_bfloat16": False}  # fmt: skip
# not given to the class: num_labels=10**9 makes as many names, and a type of torch is no object without torch
_LEFT_OUT = ("id2label", "label2id", "num_labels", "_num_labels", "problem_type", "dtype", "torch_dtype")
DTYPES = (None, "auto", "float64", "float32", "bfloat16", "float16")


class Tensor(NamedTuple):
    path: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    begin: int  # of its bytes in the file
    end: int


# ---- the two entry points: init.from, and `convert from-hf`

ADVICE = "give `scratch` or a Hugging Face folder"


def config_problems(folder: Path, name: str) -> list[str]:
    """Why the config.json of `folder`, the value of init.from, cannot be read."""
    try:
        read_config(folder, name, ADVICE)
    except BadInput as error:
        return error.problems
    return []


def check(folder: Path, name: str, cfg: Config, task: Family, notes: list[str]) -> list[str]:
    """Why this config's model cannot begin from `folder`. Adds to `notes` which parameters begin from the seed, which heads of
    the folder are not used, and which head of a finetuned model is trained further."""
    problems = config_problems(folder, name)
    if problems:
        return problems
    stored = read_config(folder, name, ADVICE)
    wanted = task.hf_model_type(cfg.model)
    if stored.get("model_type") != wanted:
        arch = f"the config's model.arch is {cfg.model.arch!r}"
        return [f"{name}: is a {_short(stored.get('model_type'))} model, {arch} ({wanted!r} in its config.json)"]
    return _problems(folder, name, stored, task, cfg.model, "train.seed", notes, cfg)


def model_in(folder: Path, task: PretrainingFamily, seed: int) -> tuple[Any, list[str]]:
    """The `model` section of a Hugging Face folder with all its weights, and notes as those of `check`. BadInput for a folder
    that is not such a model. seed: of the parameters that the folder lacks."""
    stored = read_config(folder, str(folder), "give a Hugging Face folder")
    if stored.get("model_type") not in task.HF_MODEL_TYPES:
        types = " and ".join(task.HF_MODEL_TYPES)
        raise BadInput(f"{folder}: is a {_short(stored.get('model_type'))} model; this family knows {types}")
    model = model_from_hf_config(stored, str(folder), task.model_from_hf_config)
    notes: list[str] = []
    problems = [f"{folder}: {problem}" for problem in model.problems()]
    problems = problems or _problems(folder, str(folder), stored, task, model, f"seed {seed}", notes)
    if problems:
        raise BadInput(problems)
    return model, notes


def read_config(folder: Path, name: str, advice: str) -> dict[str, Any]:
    """The content of config.json. BadInput if it does not exist or cannot be read."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):  # not Path.is_file, which raises for a name that is too long
        raise BadInput(f"{name}: no config.json there; {advice}")
    stored = _object(Path(path))
    if stored is None:
        raise BadInput(f"{name}: its config.json cannot be read; get the folder again")
    return stored


def _object(path: Path) -> dict[str, Any] | None:
    try:
        return read_object(path) if path.stat().st_size <= JSON_BYTES else None
    except OSError:
        return None


def model_from_hf_config(stored: dict[str, Any], name: str, of: Callable[[dict[str, Any]], Any]) -> Any:
    """The `model` section for a config.json. of: the family's model_from_hf_config. BadInput if it lacks a shape."""
    try:
        return of(stored)
    except KeyError as error:
        raise BadInput(f"{name}: its config.json has no {error.args[0]}; get the folder again") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}={_short(e['input'])}: {e['msg']}" for e in error.errors(include_url=False)]
        raise BadInput([f"{name}: its config.json gives {line}" for line in lines]) from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadInput(f"{name}: its config.json has a value of a wrong type ({error}); get the folder again") from None


def _problems(
    folder: Path, name: str, stored: dict[str, Any], task: Family, model: Any, seed: str, notes: list[str],
    cfg: Config | None = None,
) -> list[str]:  # fmt: skip
    problems = quantized(folder, stored, name) or differences(stored, task, model, name)
    available = tensors(folder, name, problems)
    if not problems:
        shapes = {key: tensor.shape for key, tensor in available.items()}
        of_heads = list(task.head_problems(cfg, shapes, stored))
        problems += [f"{name}: {problem}" for problem in of_heads]
        problems += _not_the_models(available, task, model, name, task.optional_prefixes(model) if of_heads else ())
    if not problems:
        notes += [f"{name}: {note}" for note in _notes(available, task, model, seed)]
        notes += [f"{name}: {note}" for note in task.head_notes(cfg, shapes, stored)]
    return problems


# ---- config.json


def quantized(folder: Path, stored: dict[str, Any], name: str) -> list[str]:
    """Why the tensors of a folder are not its weights: they are quantized, or adapters have to be added to them."""
    problems = []
    for key in ("quantization_config", "compression_config"):
        if stored.get(key) is not None:
            method = stored[key].get("quant_method") if isinstance(stored[key], dict) else None
            of = f", {_short(method)}" if method else ""
            what = f"holds quantized weights ({key} in its config.json{of}), which are not read"
            problems.append(f"{name}: {what}; give a folder of fp32, bf16 or fp16 weights")
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        problems.append(f"{name}: holds adapters (adapter_config.json), which are not read; merge them into the weights")
    return problems


def differences(stored: dict[str, Any], task: Family, model: Any, name: str) -> list[str]:
    """The keys in which config.json, as transformers reads it, differs from that of an export of the model."""
    dtype = stored.get("dtype", stored.get("torch_dtype"))
    if dtype not in DTYPES:
        allowed = ", ".join(t for t in DTYPES if t and t != "auto")
        return [f"{name}: has dtype={_short(dtype)}; weights must be one of {allowed}"]
    values = {"task": task.__name__, "model": model.model_dump(mode="json", by_alias=True), "config": stored}
    if "torch" in sys.modules:
        both = resolved(task, model, stored)
    else:
        both = _resolved_without_torch(values)
    if "error" in both:
        return [f"{name}: {both['error']}"]
    in_folder, of_export = both["in_folder"], both["of_export"]
    wrong = []
    for key in sorted(in_folder | of_export):
        if key in NO_EFFECT or key in task.IGNORED_HF_KEYS or in_folder.get(key) == of_export.get(key):
            continue
        a, b = in_folder.get(key), of_export.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            apart = [k for k in a | b if a.get(k) != b.get(k)]
            a, b = ({k: each[k] for k in apart if k in each} for each in (a, b))
        why = f"the model gives {_short(b)}" if key in of_export else "which this model does not know"
        wrong.append(f"{name}: its config.json has {key}={_short(a)}, {why}")
    for key, value in in_folder.items():
        if "drop" in key and isinstance(value, (int, float)) and not 0 <= value <= 1:
            wrong.append(f"{name}: has {key}={_short(value)}; it must be from 0 to 1")
    pad, size = in_folder.get("pad_token_id"), in_folder.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        wrong.append(f"{name}: has pad_token_id={_short(pad)}, which is not below vocab_size={size}")
    return wrong


def resolved(task: Family, model: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """{in_folder, of_export}: config.json of each, each read by the model's transformers class, so that its defaults and
    older spellings are resolved by itself; {error} where it refuses one of them."""

    def read(values: dict[str, Any]) -> dict[str, Any]:
        read_by_class = config_class(**{key: value for key, value in values.items() if key not in _LEFT_OUT}).to_dict()
        return task.normalized_hf_config({**OLDER, **read_by_class})

    from transformers.utils import logging

    logging.set_verbosity_error()  # what it warns of is in the comparison, or changes nothing
    what = "the config's model"
    try:
        export = task.hf_config(model)
        config_class = type(export)
        of_export = read({**export.to_dict(), **task.hf_config_overrides(model)})
        what = "its config.json"
        in_folder = read(json.loads(json.dumps(stored)))  # a copy: the class changes nested values
    except Exception as error:  # whatever the class raises for values of wrong types
        reason = _short(" ".join(str(error).split()) or type(error).__name__, quote=False)
        return {"error": f"transformers cannot read {what}: {reason}"}
    return {"in_folder": in_folder, "of_export": of_export}


def _resolved_without_torch(values: dict[str, Any]) -> dict[str, Any]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    env |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "common.huggingface.hf_folder"]
    done = subprocess.run(command, input=json.dumps(values), env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def _short(value: object, quote: bool = True) -> str:
    text = repr(value) if quote else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


# ---- tensors


def files(folder: Path, name: str, problems: list[str]) -> dict[str, set[str] | None]:
    """{file: its tensors by the index, None without an index}. As in transformers the file is model.safetensors, else the files
    are those of model.safetensors.index.json. Pickles (.bin) are never read: they can run code."""
    there = {path.name for path in Path(folder).glob("*.safetensors")}
    if "model.safetensors" in there:
        return {"model.safetensors": None}
    index = Path(folder) / "model.safetensors.index.json"
    if not index.is_file():
        if not there and any(Path(folder).glob("*.bin")):
            problems.append(f"{name}: holds pickled weights (.bin) only, which are not read; save it as safetensors")
        elif not there:
            problems.append(f"{name}: no *.safetensors there; a Hugging Face folder with weights is needed")
        else:
            problems.append(f"{name}: no model.safetensors there and no model.safetensors.index.json; get the folder again")
        return {}
    weight_map = (_object(index) or {}).get("weight_map")
    named = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) and re.fullmatch(r"[\w.-]+", file) for file in named):
        problems.append(f"{name}: {index.name} is not an index of tensors; get it again")
        return {}
    by_file: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        by_file.setdefault(file, set()).add(tensor)
    missing = sorted(by_file.keys() - there)
    problems += [f"{name}: {_short(file, quote=False)} is missing" for file in missing[:3]]
    problems += [f"{name}: {len(missing) - 3} more files are missing"] if len(missing) > 3 else []
    return {} if missing else dict(by_file)


def tensors(folder: Path, name: str, problems: list[str]) -> dict[str, Tensor]:
    """Every tensor of a folder by name, from the headers of its safetensors. Adds to `problems` what is missing or damaged."""
    available: dict[str, Tensor] = {}
    for file, wanted in sorted(files(folder, name, problems).items()):
        path = Path(folder) / file
        try:
            in_file = _header(path)
        except (OSError, ValueError, TypeError, KeyError, RecursionError, MemoryError, struct.error) as error:
            what = str(error) if isinstance(error, _Damaged) else "is not a safetensors file"
            problems.append(f"{name}: {file} {what}; get it again")
            continue
        twice = sorted(in_file.keys() & available.keys())
        if twice:
            where = f"is in {available[twice[0]].path.name} and in {file}"
            problems.append(f"{name}: {twice[0]} {where}{_more(twice)}; get the folder again")
        elif wanted is not None and wanted != in_file.keys():
            odd = sorted(wanted ^ in_file.keys())
            problems.append(f"{name}: {file} and {INDEX} differ in {odd[0]}{_more(odd)}; get the folder again")
        available |= in_file
    return available


class _Damaged(ValueError):
    pass


def _header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, which fill it without gaps. _Damaged or another exception if they do not."""
    if not path.is_file():  # opening a pipe would wait for its writer
        raise ValueError
    whole = path.stat().st_size
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if not 2 <= size <= HEADER_BYTES:
            raise ValueError
        header = json.loads(file.read(size), object_pairs_hook=_once)
    header.pop("__metadata__", None)
    tensors_of_file, end = {}, 8 + size
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, stop]
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError
        width = (FLOATS | OTHERS).get(dtype)
        if 8 + size + begin != end or width is not None and math.prod(shape) * width != stop - begin:
            raise _Damaged(f"contradicts itself at {_short(name, quote=False)}")
        end = 8 + size + stop
        tensors_of_file[name] = Tensor(path, dtype, tuple(shape), 8 + size + begin, end)
    if whole != end:
        raise _Damaged(f"has {whole} of {end} bytes")
    return tensors_of_file


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _Damaged("gives a name twice")
    return values


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


class Match(NamedTuple):
    """The parameter of the model that a tensor of the folder is."""

    parameter: str  # the model's name, with `*` for the number of a layer
    layer: int | None
    rank: int  # which of task.stored_names the tensor has: the first that is there counts


def matcher(model: Any, task: Family) -> Callable[[str], Match | None]:
    """A tensor's name in a folder -> the model's parameter; None for a tensor that is no parameter."""
    parameters: dict[str, tuple[str, int]] = {}
    for parameter in task.parameter_patterns(model):
        for rank, stored in enumerate(task.stored_names(parameter)):
            parameters.setdefault(stored, (parameter, rank))

    def match(name: str) -> Match | None:
        if name in parameters and "*" not in name:
            return Match(parameters[name][0], None, parameters[name][1])
        layer = _LAYER.search(name)
        if layer and (pattern := f"{name[: layer.start(1)]}*{name[layer.end(1) :]}") in parameters:
            return Match(parameters[pattern][0], int(layer[1]), parameters[pattern][1])
        return None

    return match


_LAYER = re.compile(r"\.(0|[1-9]\d{0,8})\.")


def _begins(name: str, starts: Sequence[str]) -> bool:
    return name.startswith(tuple(starts))


def _not_the_models(available: dict[str, Tensor], task: Family, model: Any, name: str, refused: Sequence[str]) -> Iterator[str]:
    """Tensors that the model does not have, parameters that the folder does not have, and those of another shape or type. The
    shapes of the heads that are `refused` already are not compared."""
    shapes, match, heads = task.parameter_patterns(model), matcher(model, task), task.optional_prefixes(model)
    new_heads = task.new_head_prefixes(model)
    stored: dict[tuple[str, int | None], str] = {}  # parameter, layer -> tensor
    unused = []
    for tensor, found in sorted(((t, match(t)) for t in available), key=lambda pair: (pair[1].rank if pair[1] else 0, pair[0])):
        if found is None or found[:2] in stored:
            unused.append(tensor)
        else:
            stored[found[:2]] = tensor

    depths: dict[str, int] = {}
    for parameter, layer in stored:
        if layer is not None:
            start = parameter.partition("*")[0]
            depths[start] = max(depths.get(start, 0), layer + 1)
    wrong = [(start, count) for start, count in depths.items() if count != task.layer_count(model, start)]
    for start, count in wrong:
        layers = f"its weights hold {count} layers ({start}0 on), its config.json says {task.layer_count(model, start)}"
        yield f"{name}: {layers}; get it again"
    if wrong:
        return

    copies, strangers = task.duplicate_names(model), []
    for tensor in unused:
        original = stored.get((copies.get(tensor, ""), None))
        if original is not None:
            if not same_bytes(available[tensor], available[original]):
                yield f"{name}: its {tensor} is not its {original}, to which its config.json ties it; it is another model"
        elif not _begins(tensor, task.IGNORED_HF_HEADS) and not any(
            re.fullmatch(pattern, tensor) for pattern in task.HF_BUFFER_PATTERNS
        ):
            strangers.append(tensor)
    if strangers:
        what = f"holds {min(strangers)}, which this model does not have"
        yield f"{name}: {what}; it is a model of another architecture{_more(strangers)}"

    every = [(p, layer) for p in shapes for layer in (range(task.layer_count(model, p)) if "*" in p else (None,))]
    whole = [head for head in heads if not any(_begins(p, (head,)) for p, _ in stored)]  # missing: they begin from the seed
    missing = [p.replace("*", str(i)) for p, i in every if (p, i) not in stored and not _begins(p, (*whole, *new_heads))]
    if missing:
        yield f"{name}: holds no {missing[0]}; it is a model of another architecture{_more(missing)}"

    read = [(stored[p, layer], p) for p, layer in every if (p, layer) in stored and not _begins(p, new_heads)]
    codes = [tensor for tensor, _ in read if available[tensor].dtype not in FLOATS]
    if codes:
        yield not_floats(name, available, codes)
    other = [(t, p) for t, p in read if available[t].shape != shapes[p] and not _begins(p, refused)]
    for tensor, parameter in other[:3]:
        yield f"{name}: {tensor} is {available[tensor].shape}, its config.json says {shapes[parameter]}"


def not_floats(name: str, available: dict[str, Tensor], names: Sequence[str]) -> str:
    dtype = _short(available[names[0]].dtype, quote=False)
    return f"{name}: its {names[0]} is {dtype}; weights must be F32, BF16, F16 or F64, not codes{_more(names)}"


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Do two tensors hold the same bytes? Read in pieces."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(one.path, "rb") as first, open(other.path, "rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        left = one.end - one.begin
        while left:
            piece = min(left, 2**24)
            if first.read(piece) != second.read(piece):
                return False
            left -= piece
    return True


def _notes(available: dict[str, Tensor], task: Family, model: Any, seed: str) -> Iterator[str]:
    """Which parameters begin from the seed, and which heads are not used."""
    new_heads = task.new_head_prefixes(model)
    for head in task.optional_prefixes(model):
        is_there = any(_begins(tensor, task.stored_names(head)) for tensor in available)
        if is_there and head in new_heads:
            yield f"its {head}* is replaced; these parameters begin from {seed}"
        elif not is_there:
            yield f"holds no {head}*; these parameters begin from {seed}"
    match, copies = matcher(model, task), task.duplicate_names(model)
    for head in task.IGNORED_HF_HEADS:
        if any(_begins(tensor, (head,)) and tensor not in copies and match(tensor) is None for tensor in available):
            yield f"its {head}* is not used: this model has no such head"


if __name__ == "__main__":  # differences() starts this, without torch
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed: an import of it then fails
    request = json.load(sys.stdin)
    module = importlib.import_module(request["task"])
    print(json.dumps(resolved(module, module.ResolvedModel.model_validate(request["model"]), request["config"]), default=str))
