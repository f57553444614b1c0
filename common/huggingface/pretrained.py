"""Load a Hugging Face folder with plain transformers, whole or not at all: transformers fills missing weights with random
numbers, and says so only in its log."""

import math
import re
from pathlib import Path
from typing import Any

from common.checkpoints import integrity
from common.data import tokenizer as tokenizers
from common.errors import BadInput
from common.huggingface import hf_folder
from common.json_files import read_object

# tensors that a class may leave unread: masks and tables of numbers that older versions saved, heads of pretraining
_UNREAD = re.compile(r"(^|.*\.)(pooler|cls)\..*|.*\b(attn\.bias|masked_bias|inv_freq|position_ids|token_type_ids)")
_DEPTH = re.compile(r"(n|num)_(\w+_)?(layers?|blocks?)|depth")
MOST_LABELS = 100_000


def architecture_of(folder: str | Path) -> str:
    """The first class in config.json, such as T5ForConditionalGeneration; '' without one. BadInput if it cannot be read."""
    config = hf_folder.read_config(Path(folder), str(folder), "give a Hugging Face folder")
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def load(of: Any, folder: str | Path, may_lack: tuple[str, ...] = (), **how: Any) -> tuple[Any, Any]:
    """The model of a folder, by `of.from_pretrained`, and its tokenizer.

    BadInput for a folder that cannot be loaded, for files of an export that have changed, for weights that are quantized, NaN
    or infinite, and for weights that lack a tensor of the model (unless its name begins with `may_lack`), have one of another
    shape or one that the model does not have.
    """
    problems = integrity.problems(Path(folder), str(folder)) if integrity.is_first_reader() else []
    problems = problems or _unfit(Path(folder))
    if problems:
        raise BadInput(problems)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # of T5 1.1 it says at length that it is not tied
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):  # no memory: a missing tensor would be allocated at the size that config.json gives
            build = getattr(of, "from_config", of)  # an Auto class's, or the class itself
            size = sum(parameter.numel() for parameter in build(config).parameters())
        stored = sum(math.prod(t.shape) for t in hf_folder.tensors(Path(folder), str(folder), []).values())
        if size > 2 * stored:
            raise BadInput(f"{folder}: its weights hold {stored:,} values, its config.json says {size:,}; get the folder again")
        net, info = of.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **how)
    except BadInput:
        raise
    except Exception as error:  # of transformers, torch, safetensors and huggingface_hub, each with classes of its own
        raise BadInput(f"{folder}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}") from None
    lacking = sorted(name for name in info["missing_keys"] if not name.startswith(may_lack or ("\0",)))
    too_many = sorted(name for name in info["unexpected_keys"] if not _UNREAD.fullmatch(name))
    problems = [f"its weights lack {_few(lacking)}"] if lacking else []
    problems += [f"its weights hold {_few(too_many)}, for which the model of its config.json has no place"] if too_many else []
    for name, shape, wanted in info["mismatched_keys"]:
        problems.append(f"its {name} is {tuple(shape)}, by its config.json {tuple(wanted)}")
    broken = [name for name, value in net.named_parameters() if value.is_floating_point() and not integrity.is_finite(value)]
    problems += [f"its {_few(broken)} holds NaN or infinite values"] if broken else []
    if problems:
        raise BadInput([f"{folder}: {problem}; get the folder again" for problem in problems[:3]])
    reset_generation_config(net)
    return net.eval(), load_tokenizer(Path(folder))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, of transformers. BadInput for one that is damaged, or that only code of its own can read."""
    from transformers import AutoTokenizer

    with tokenizers.refusing(f"{folder}: its tokenizer cannot be read"):
        if (folder / "tokenizer.json").is_file():
            tokenizers.check_ids(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


NUMBER = (int, float)
SAMPLING: dict[str, type | tuple[type, ...]] = {
    "do_sample": bool, "temperature": NUMBER, "top_k": int, "top_p": NUMBER, "repetition_penalty": NUMBER,
}  # fmt: skip


def generation_config(folder: Path) -> dict[str, Any]:
    """What generation_config.json of a folder says of the ids of its tokens, `eos_token_id` as a list, and of sampling; what
    is not of its type is left out. {} without one."""
    values = read_object(folder / "generation_config.json") or {}
    ends = values.get("eos_token_id")
    valid = [i for i in (ends if isinstance(ends, list) else [ends]) if _is_id(i)]
    ids: dict[str, Any] = {key: i for key, i in values.items() if key.endswith("_token_id") and _is_id(i)}
    ids |= {"eos_token_id": valid} if valid else {}
    sampling = {key: values[key] for key, of in SAMPLING.items() if isinstance(values.get(key), of)}
    return ids | {key: value for key, value in sampling.items() if SAMPLING[key] is bool or value > 0}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _are_ids(value: Any) -> bool:
    return value is None or all(map(_is_id, value if isinstance(value, list) else [value]))


def refuse_unknown(largest: int, net: Any, folder: str | Path) -> None:
    """BadInput where the tokenizer gives an id that the model has no embedding for: torch would fail inside a kernel."""
    rows = net.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise BadInput(f"{folder}: its tokenizer gives id {largest}, its model has {rows} embeddings; get the folder again")


def reset_generation_config(net: Any) -> set[int]:
    """Keep only the token ids of the model's generation config, so that `generate` samples as its caller says. Returns the ids
    that end a text."""
    from transformers import GenerationConfig

    if not getattr(net, "generation_config", None):  # of a class that does not write
        return set()
    ids = {key: value for key, value in net.generation_config.to_dict().items() if key.endswith("_token_id")}
    net.generation_config = GenerationConfig(**ids)
    ends = ids.get("eos_token_id")
    return set(ends if isinstance(ends, list) else [ends]) - {None}


def _unfit(folder: Path) -> list[str]:
    """Why a folder must not be given to transformers: weights that are codes or damaged, numbers that take all memory."""
    stored = hf_folder.read_config(folder, str(folder), "give a Hugging Face folder")
    problems = hf_folder.quantized(folder, stored, str(folder))
    tensors = hf_folder.tensors(folder, str(folder), problems)
    codes = sorted(name for name, t in tensors.items() if t.dtype not in hf_folder.FLOATS and not _UNREAD.fullmatch(name))
    problems += [hf_folder.not_floats(str(folder), tensors, codes)] if codes and not problems else []
    path = folder / "generation_config.json"
    if path.exists():
        values = read_object(path)
        wrong = [key for key, value in (values or {}).items() if key.endswith("_token_id") and not _are_ids(value)]
        if values is None or wrong:
            what = f"{wrong[0]} must be an id or a list of ids" if wrong else "it must be a JSON object"
            problems.append(f"{path}: cannot be used ({what}); get the folder again")
    for key, value in stored.items():
        most = MOST_LABELS if key == "num_labels" else len(tensors) if _DEPTH.fullmatch(key) else None
        if tensors and most is not None and isinstance(value, int) and value > most:
            problems.append(f"{folder}: has {key}={value} in its config.json, more than its weights hold; get the folder again")
    return problems


def _few(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
