"""Ten mistakes on DeepSpeed and Megatron Core without this repository, and those that here only the ranks can see.

    python -m common.comparison.alone FOLDER [STACK ...]

Each mistake is made in processes of its own, two ranks over gloo on CPUs, forked from this one, which has imported the stacks.
They train a model of two layers for three steps, as the documentation of each stack shows it. One line of JSON per attempt goes
to standard output: mistake, stack, exit code, lines of the error on all ranks, and what the stack does in its place.
"""

import importlib
import json
import re
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from common.command_line import Parser
from common.comparison import alone_deepspeed, alone_megatron
from common.comparison.forked import RANKS, attempt

IMPORTS = {
    "deepspeed": ("deepspeed", "deepspeed.pipe", "transformers.models.gpt2.modeling_gpt2"),
    "megatron": ("megatron.core.models.gpt.gpt_model", "megatron.core.optimizer", "megatron.core.distributed"),
}
ALONE = {"deepspeed": alone_deepspeed.DEEPSPEED, "megatron": alone_megatron.MEGATRON}


def recipe(stack: str, *arguments: str) -> None:
    """A recipe of this repository, as a launch script runs it."""
    sys.argv = [f"recipes.gpt.{stack}.pretrain", *arguments]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def here(stack: str, folder: Path) -> Iterable[tuple[str, Callable[[], object]]]:
    """The mistakes that here the ranks find, on one: first a run without one, whose files are then spoiled. What one of several
    ranks finds, the launcher reports once (tests/test_bad_input.py, test_a_file_that_one_rank_alone_reads_is_reported_once)."""
    from safetensors.torch import load_file, save_file

    config, run = str(folder / "config.yaml"), folder / f"{stack}_run"
    yield "none", partial(recipe, stack, config, str(run))
    spoiled = shutil.copytree(run / "hf", folder / f"{stack}_nan_hf")
    (spoiled / "twinstack.json").unlink()  # its checksums
    weights = load_file(spoiled / "model.safetensors")
    weights["transformer.wte.weight"][0, 0] = float("nan")
    save_file(weights, spoiled / "model.safetensors", {"format": "pt"})
    yield "nan", partial(recipe, stack, config, str(folder / f"{stack}_nan_run"), f"init.from={spoiled}")
    path = run / "step_2/00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 64]) + content[-8:])
    yield "byte", partial(recipe, stack, config, str(run), "train.steps=4")


def attempts(stack: str, folder: Path) -> Iterable[tuple[str, str, Callable[[], object]]]:
    """(mistake, here or alone, what to call)"""
    if (folder / "config.yaml").is_file():
        for name, call in here(stack, folder):
            yield name, "here", call
    for name, of_stack in ALONE[stack].items():
        yield name, "alone", partial(of_stack, folder / f"{stack}_{name}")


def main() -> None:
    parser = Parser(prog="python -m common.comparison.alone", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("stacks", nargs="*", help=" or ".join(ALONE))
    options = parser.parse_args()
    folder, stacks = options.folder.resolve(), options.stacks or [*ALONE]
    with warnings.catch_warnings(action="ignore"):
        for stack in stacks:
            for name in IMPORTS[stack]:
                importlib.import_module(name)
    for stack in stacks:
        for mistake, where, call in attempts(stack, folder):
            (folder / f"{stack}_{mistake}").mkdir(exist_ok=True)
            code, printed, errors = attempt(call, folder, 1 if where == "here" else RANKS)
            row = {"mistake": mistake, "stack": stack, "where": where, "code": code, "lines": _lines(where, errors)}
            print(json.dumps(row | {"does": _what_it_does(code, printed, errors)}), flush=True)


def _lines(where: str, errors: list[str]) -> int:
    """The lines of an error: here all that the ranks wrote, else those from a traceback on."""
    first = next((number for number, line in enumerate(errors) if line.startswith("Traceback ")), len(errors))
    return len(errors) - (0 if where == "here" else first)


def _what_it_does(code: int, printed: list[str], errors: list[str]) -> str:
    if code:
        named = (found[1] for line in errors if (found := re.match(r"(?:\w+\.)*(\w+(?:Error|Exception))\b", line)))
        return next(named, f"exit code {code}")
    said = [line.removeprefix("does: ") for line in printed if line.startswith("does: ")]
    warned = any("[WARNING]" in line for line in printed)
    return (said[-1] if said else "ends") + (", after a warning" if warned else "")


if __name__ == "__main__":
    main()
