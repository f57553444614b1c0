"""Loading with plain transformers what it must not load in part: it fills what weights lack with random numbers, and says so
only where it logs."""

import re
from pathlib import Path
from typing import Any

from common import integrity
from common import tokenizer as tokenizers
from common.errors import BadInput
from common.run import read_object

_LAYER = re.compile(r".*?\.\d+\.")


def architecture_of(folder: str | Path) -> str:
    """The first class that config.json names, such as T5ForConditionalGeneration; '' where it names none. BadInput where it
    cannot be read."""
    config = read_object(Path(folder) / "config.json")
    if config is None:
        raise BadInput(f"{folder}: its config.json cannot be read; get the folder again")
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def load(of: Any, folder: str | Path, may_lack: tuple[str, ...] = (), **how: Any) -> tuple[Any, Any]:
    """The model of a folder, by `of.from_pretrained`, and its tokenizer.

    BadInput for what cannot be loaded, for files of an export that are not those written, for weights that lack a tensor of the
    model (but for names that begin with `may_lack`), have one of another shape, hold layers that config.json leaves out, or are
    NaN or infinite.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    changed = integrity.problems(Path(folder), str(folder)) if integrity.is_first_reader() else []
    if changed:
        raise BadInput(changed)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # of T5 1.1 it says at length that it is not tied
    try:
        net, found = of.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **how)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise BadInput(f"{folder}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}") from None
    lacking = sorted(name for name in found["missing_keys"] if not name.startswith(may_lack or ("\0",)))
    ours = {match[0] for name in net.state_dict() if (match := _LAYER.match(name))}
    left_out = sorted(
        name for name in found["unexpected_keys"] if (match := _LAYER.match(name)) and not any(match[0] in x for x in ours)
    )
    problems = [f"its weights lack {_few(lacking)}"] if lacking else []
    problems += [f"its weights hold {_few(left_out)}, for which its config.json has no layer"] if left_out else []
    for name, theirs, wanted in found["mismatched_keys"]:
        problems.append(f"its {name} is {tuple(theirs)}, by its config.json {tuple(wanted)}")
    spoiled = [name for name, value in net.named_parameters() if value.is_floating_point() and not integrity.is_finite(value)]
    problems += [f"its {_few(spoiled)} holds NaN or infinite values"] if spoiled else []
    if problems:
        raise BadInput([f"{folder}: {told}; get the folder again" for told in problems[:3]])
    write_plainly(net)
    return net.eval(), load_tokenizer(Path(folder))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, of transformers. BadInput for one that is damaged, or that only code of its own can read."""
    from transformers import AutoTokenizer

    with tokenizers.refusing(f"{folder}: its tokenizer cannot be read"):
        if (folder / "tokenizer.json").is_file():
            tokenizers.check_ids(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


NUMBER = int | float
SAMPLING = {"do_sample": bool, "temperature": NUMBER, "top_k": int, "top_p": NUMBER, "repetition_penalty": NUMBER}


def generation_config(folder: Path) -> dict[str, Any]:
    """What generation_config.json of a folder says of the ids of its tokens, `eos_token_id` as a list, and of sampling; what
    is not of its type is left out. {} without one."""
    values = read_object(folder / "generation_config.json") or {}
    ends = values.get("eos_token_id")
    known = [i for i in (ends if isinstance(ends, list) else [ends]) if _is_id(i)]
    made: dict[str, Any] = {key: i for key, i in values.items() if key.endswith("_token_id") and _is_id(i)}
    made |= {"eos_token_id": known} if known else {}
    sampling = {key: values[key] for key, of in SAMPLING.items() if isinstance(values.get(key), of)}
    return made | {key: value for key, value in sampling.items() if SAMPLING[key] is bool or value > 0}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def write_plainly(net: Any) -> set[int]:
    """Let `generate` of a model know of its generation_config.json the ids of tokens alone, not how to choose among them, which
    each caller says. Returns the ids that end a text."""
    from transformers import GenerationConfig

    if not getattr(net, "generation_config", None):  # of a class that does not write
        return set()
    ids = {key: value for key, value in net.generation_config.to_dict().items() if key.endswith("_token_id")}
    net.generation_config = GenerationConfig(**ids)
    ends = ids.get("eos_token_id")
    return set(ends if isinstance(ends, list) else [ends]) - {None}


def _few(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
