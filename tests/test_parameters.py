"""A parameter that one side has and the other lacks is refused before the first step, on save and on export."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import Drive, finished, step_of

from common.checkpoints import parameters
from common.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent

# A copied recipe whose task.py has gained norms on queries and keys (Qwen3's), as a user would begin.
QWEN3 = """
def hf_model(model: Model) -> PreTrainedModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**hf_config(model).to_dict()))


def parameter_shapes"""
COUNTED = ("3 * h * f + 2 * h\n", "3 * h * f + 2 * h + 2 * h // self.heads\n")
TIED_TWICE = ('_unchanged("model.norm.weight")', '_unchanged("model.layers.0.input_layernorm.weight")')
TRANSPOSED_FC2 = '"mlp.linear_fc2.weight": lambda i: _changed(f"model.layers.{i}.mlp.down_proj.weight", torch.t)'
TRANSPOSED = ('"mlp.linear_fc2.weight": named("mlp.down_proj.weight")', TRANSPOSED_FC2)
NO_RULE = ('"self_attention.linear_proj.weight": named', '"self_attention.proj.weight": named')


Replacements = tuple[tuple[str, str], ...]


def changed_recipe(checkout: Path, name: str, task: Replacements = (), parameter_map: Replacements = ()) -> None:
    """recipes/NAME of the checkout: recipes/gpt with these replacements, each of which must apply."""
    folder = checkout / "recipes" / name
    shutil.copytree(ROOT / "recipes/gpt", folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    for file, replacements in (("task.py", task), ("megatron/parameter_map.py", parameter_map)):
        text = (folder / file).read_text()
        for old, new in replacements:
            assert old in text, old
            text = text.replace(old, new)
        (folder / file).write_text(text)


@pytest.fixture(scope="module")
def outcomes(drive: Drive, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of the runs, and what tests/drive.py printed of them: two processes, every case in both."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("common", "tests"):
        (checkout / name).symlink_to(ROOT / name)
    model = ("def parameter_shapes", QWEN3.lstrip("\n"))
    changed_recipe(checkout, "uncounted", task=(model,))
    changed_recipe(checkout, "norms", task=(model, COUNTED))
    changed_recipe(checkout, "twice", parameter_map=(TIED_TWICE,))
    changed_recipe(checkout, "transposed", parameter_map=(TRANSPOSED,))
    changed_recipe(checkout, "no_rule", parameter_map=(NO_RULE,))
    settings = [f"data.train={corpus}/train", "data.valid=null", "model.arch=llama", "model.kv_heads=2", "train.steps=2"]
    cases = []
    for name, stack, *overrides in (
        ("uncounted", "baseline"),
        ("uncounted", "deepspeed"),
        ("uncounted", "megatron"),
        ("norms", "baseline"),
        ("norms", "deepspeed", "deepspeed.zero_stage=3"),
        ("norms", "megatron"),
        ("norms", "megatron", "megatron.pp=2"),
        ("norms", "megatron", "megatron.tp=2"),
        ("twice", "megatron", "megatron.pp=2"),
        ("transposed", "megatron", "megatron.tp=2"),
        ("no_rule", "megatron"),
    ):
        out = checkout / "out" / "-".join([name, stack, *(o.replace("=", "_") for o in overrides)])
        config = str(ROOT / "recipes/gpt/configs/tiny.yaml")
        module = f"recipes.{name}.{stack}.pretrain"
        cases.append({"module": module, "config": config, "out": str(out), "overrides": [*settings, *overrides], "expect": 2})
    return checkout / "out", drive(cases, 2, checkout)


MISSING = r"model.layers.0.self_attn.q_norm.weight \(and 7 more\) is missing; task.parameter_shapes has it"
UNKNOWN = (
    r"model.layers.0.self_attn.k_norm.weight \(and 7 more\) is unknown; LlamaForCausalLM, which loads the export, does not"
)
ON_MEGATRON = "the model on megatron: "
REFUSED = {
    "uncounted-baseline": r"Model.parameter_count of recipes.uncounted.task counts 311,872 .*parameter_shapes lists 312,000",
    "uncounted-deepspeed": "Model.parameter_count of recipes.uncounted.task counts",
    "uncounted-megatron": "Model.parameter_count of recipes.uncounted.task counts",
    "norms-megatron": ON_MEGATRON + MISSING,
    "norms-megatron-megatron.pp_2": ON_MEGATRON + MISSING,
    "norms-megatron-megatron.tp_2": ON_MEGATRON + MISSING,
    "twice-megatron-megatron.pp_2": ON_MEGATRON + "parameter_map.py names model.layers.0.input_layernorm.weight 2 times",
    "transposed-megatron-megatron.tp_2": ON_MEGATRON
    + r"decoder.layers.0.mlp.linear_fc2.weight of Megatron has shape \(64, 128\), parameter_map.py makes \(256, 32\)",
    "no_rule-megatron": ON_MEGATRON + r"decoder.layers.0.self_attention.linear_proj.weight of Megatron is not in parameter_map",
}


@pytest.mark.parametrize("run", REFUSED)
def test_other_parameters_are_refused_before_the_first_step(outcomes: tuple[Path, str], run: str) -> None:
    folder, output = outcomes
    finished(folder / run)
    assert re.search(rf"CASE {folder / run} code 2 [\d.]+ s {REFUSED[run]}", output), output[-6000:]
    assert not (folder / run).exists()


@pytest.mark.parametrize("run", ["norms-baseline", "norms-deepspeed-deepspeed.zero_stage_3"])
def test_an_export_that_its_class_cannot_load_is_refused(outcomes: tuple[Path, str], run: str) -> None:
    """The class trains on these stacks, and its checkpoint has the norms; the export would be read as a plain Llama."""
    folder, output = outcomes
    finished(folder / run)
    assert re.search(rf"CASE {folder / run} code 2 [\d.]+ s \S+step_2: {UNKNOWN}", output), output[-6000:]
    assert "model.layers.0.self_attn.q_norm.weight" in step_of(folder / run, 2).names()
    assert not (folder / run / "hf").exists()


def test_every_difference_is_one_line() -> None:
    listed = {"a": (2, 3), "b": (4,), "c": (5,)}
    parameters.prove({"c": [5], "a": [2, 3], "b": (4,)}, listed, "here")
    with pytest.raises(BadInput) as refused:
        parameters.prove({"a": (3, 2), "d": (1,), "e": (1,)}, listed, "here")
    assert refused.value.problems == [
        "here: b (and 1 more) is missing; task.parameter_shapes has it",
        "here: d (and 1 more) is unknown; task.parameter_shapes does not have it",
        "here: a has shape (3, 2); in task.parameter_shapes it is (2, 3)",
    ]
