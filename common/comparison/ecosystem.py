"""The ecosystem of each stack: what tests of this repository check, what the installed packages hold, and what others publish.

A cell that a test checks has the test as its source; one that was published has the publication and its date. What was not
found is None.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from common import config, families
from common.comparison import refusals
from common.comparison.figures import Figure, Kind, Options, Picture, Task, Value
from common.errors import BadInput
from common.layout import layout_for

SECTION = "Ecosystem"
DISTRIBUTIONS = {"baseline": "accelerate", "deepspeed": "deepspeed", "megatron": "megatron-core"}
PACKAGES = {"baseline": "accelerate", "deepspeed": "deepspeed", "megatron": "megatron"}  # folders of them
FOREIGN = re.compile(rb"^\s*(?:import|from) (?:tensorflow|keras)\b", re.M)
COMMAND = "python -m scripts.benchmark --parts ecosystem"


class Checked(NamedTuple):
    """What a test checks for a stack."""

    value: Value
    test: str  # tests/FILE.py::NAME, or why there is none


PARITY = "tests/test_parity.py::test_follows_the_reference_loop"
_YES = {  # row: test of each stack
    "export loads in transformers": "tests/test_convert.py::test_export_loads_with_plain_transformers",
    "weights come from transformers": "tests/test_convert.py::test_hf_to_every_stack_and_back_is_bitwise",
    "resumes a run of another stack": "tests/test_resume.py::test_one_run_moves_between_stacks",
    "resumes bit for bit": "tests/test_resume.py::test_two_halves_are_one_run_bit_for_bit",
    "TensorBoard, W&B": "tests/test_benchmark_ecosystem.py::test_every_stack_logs_to_the_same_trackers",
    "CPU": PARITY,
    "bf16": "tests/test_parity.py::test_bf16_stays_near_fp32",
    "SLURM": "tests/test_recipes.py::test_launch_scripts_are_one_text",
    "elastic": "tests/test_elastic.py::test_the_losses_are_those_of_an_undisturbed_run",
}
ADAPTERS = "tests/test_gpt_finetune.py::test_the_adapter_is_pefts_and_merged_it_is_the_export"
CHECKED: dict[str, dict[str, Checked]] = {
    **{row: dict.fromkeys(config.STACKS, Checked(True, test)) for row, test in _YES.items()},
    "LoRA": {
        "baseline": Checked(True, ADAPTERS),
        "deepspeed": Checked(True, ADAPTERS),
        "megatron": Checked(False, "tests/test_gpt_finetune.py::test_what_is_refused"),
    },
    "lm-eval": dict.fromkeys(
        config.STACKS, Checked(None, "not run here: its tasks come from the hub; docs/evaluation.md has its command")
    ),
}
OF_FAMILIES = {  # file of a stack: test
    "pretrain.py": "tests/test_recipes.py::test_scripts_have_the_same_banners",
    "finetune.py": "tests/test_recipes.py::test_scripts_have_the_same_banners",
}
OPTIMIZERS = "tests/test_bad_input.py::test_layouts"
COMPARED = "tests/test_layout_table.py::test_every_row_is_within_the_bounds"


class Cited(NamedTuple):
    value: Value
    source: str  # the publication, its date, and where it stands; of None why there is none


INDEX = "pip index versions {} --uploaded-prior-to, of 2025-11-26 and 2026-11-26 (PyPI)"
UNKNOWN = Cited(None, "not found: no dated count of all three projects")
CITED: dict[str, dict[str, Cited]] = {
    "begun by": {
        "baseline": Cited("Hugging Face", "PyPI metadata of accelerate 1.15.0, 2026: author"),
        "deepspeed": Cited("Microsoft", "git history of deepspeedai/DeepSpeed: commit 461495e of 2020-01-23"),
        "megatron": Cited(
            "NVIDIA", "git history of NVIDIA/Megatron-LM: commit fb4cbdc of 2019-03-27, of an nvidia.com address"
        ),
    },
    "first commit": {
        "baseline": Cited(None, "not found"),
        "deepspeed": Cited("2020-01-23", "git history of deepspeedai/DeepSpeed: commit 461495e, read 2026-08"),
        "megatron": Cited("2019-03-27", "git history of NVIDIA/Megatron-LM: commit fb4cbdc, read 2026-08"),
    },
    "governance": {
        "baseline": Cited("Hugging Face", "PyPI metadata of accelerate 1.15.0, 2026: author"),
        "deepspeed": Cited(
            "PyTorch Foundation, with a technical steering committee",
            "PyTorch Foundation, press release of 2025-05-07; GOVERNANCE.md of DeepSpeed 0.18.9, 2026",
        ),
        "megatron": Cited("NVIDIA", "the repository's owner and LICENSE, NVIDIA/Megatron-LM, 2026-08"),
    },
    "releases in a year": {
        "baseline": Cited(3, INDEX.format("accelerate")),
        "deepspeed": Cited(16, INDEX.format("deepspeed")),
        "megatron": Cited(12, INDEX.format("megatron-core --python-version 3.12")),
    },
    "open issues": dict.fromkeys(config.STACKS, UNKNOWN),
}


def run(options: Options, folder: Path) -> list[Figure]:
    return [*checked(options.stacks), *installed(options.stacks), *cited(options.stacks)]


def _figure(table: str, row: str, stack: str, value: Value, kind: Kind, source: str) -> Figure:
    return Figure(f"{SECTION} / {table}", row, stack, value, "", kind, source)


# ---- what tests check


def checked(stacks: Iterable[str]) -> Iterator[Figure]:
    runs = Counter(row["stack"] for row in refusals.compared())  # of all families, layouts and settings
    for stack in stacks:
        for row, cells in CHECKED.items():
            yield _figure("Checked here", row, stack, cells[stack].value, "counted", cells[stack].test)
        for file, test in OF_FAMILIES.items():
            names = [name for name in families.names() if (families.RECIPES / name / stack / file).is_file()]
            yield _figure("Checked here", f"{file.removesuffix('.py')}s", stack, ", ".join(names), "counted", test)
        yield _figure("Checked here", "optimizers", stack, ", ".join(optimizers(stack)), "counted", OPTIMIZERS)
        yield _figure("Checked here", "runs compared", stack, runs[stack], "counted", COMPARED)


def optimizers(stack: str) -> list[str]:
    """The optimizers that some layout of the stack takes in one process: it has more than one only for ZeRO's stages."""
    cfg = refusals.start(next(name for name in families.names() if stack in families.stacks(name)))
    stages = (0, 1) if stack == "deepspeed" else (None,)
    names = []
    for name in ("adamw", "lamb", "adafactor"):
        for stage in stages:
            keys = {} if stage is None else {"zero_stage": stage}
            system = config.sections(config.Config)[stack].model_validate(keys)
            one = cfg.model_copy(update={stack: system, "optim": cfg.optim.model_copy(update={"optimizer": name})})
            if _is_accepted(one, stack):
                names.append(name)
                break
    return names


def _is_accepted(cfg: config.Config, stack: str) -> bool:
    try:
        layout_for(cfg, stack, 1)
    except BadInput:
        return False
    return True


# ---- what is installed


def installed(stacks: Iterable[str]) -> Iterator[Figure]:
    for stack in stacks:
        name = DISTRIBUTIONS[stack]
        about = metadata.metadata(name)
        rows: dict[str, Value] = {
            "version": metadata.version(name),
            "licence": about.get("License-Expression") or about.get("License") or "not given",
            "accelerators": _count(stack, "accelerator/*_accelerator.py", ("abstract", "real")),
            "loggers": _count(stack, "monitor/*.py", ("__init__", "config", "monitor", "utils")),
            "TensorFlow or Keras": sum(1 for _ in foreign_files(package_folder(stack))),
        }
        for row, value in rows.items():
            source = COMMAND if value is not None else f"{name} has no folder of them; {COMMAND}"
            yield _figure("Installed packages", row, stack, value, "counted", source)


def package_folder(stack: str) -> Path:
    """The folder of the stack's package, without importing it."""
    spec = importlib.util.find_spec(PACKAGES[stack])
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(f"{PACKAGES[stack]} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _count(stack: str, pattern: str, others: tuple[str, ...]) -> int | None:
    """The modules of a folder that has one for each accelerator or logger, as DeepSpeed does; None without such a folder."""
    found = [path for path in package_folder(stack).glob(pattern) if not path.stem.startswith(others)]
    return len(found) or None


def foreign_files(folder: Path) -> Iterator[Path]:
    """The Python files that import TensorFlow or Keras."""
    return (path for path in folder.rglob("*.py") if FOREIGN.search(path.read_bytes()))


# ---- what others publish


def cited(stacks: Iterable[str]) -> Iterator[Figure]:
    for stack in stacks:
        for row, cells in CITED.items():
            yield _figure("The projects", row, stack, cells[stack].value, "cited", cells[stack].source)


TASKS: tuple[Task, ...] = (Task("ecosystem", SECTION, 5, run),)
PICTURES: tuple[Picture, ...] = ()
