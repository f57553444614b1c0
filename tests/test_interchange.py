"""from-hf and to-hf one after the other give the folder back, in every family: weights, shapes and tokenizer."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoTokenizer

from common import config
from common.data import tokenizer
from common.errors import BadInput
from common.huggingface.interchange import to_hf
from tests import warm

CONFIGS = [
    ("gpt", "tiny"),
    ("gpt", "tiny_llama"),
    ("bert", "tiny"),
    ("bert", "tiny_postln"),
    ("t5", "tiny"),
    ("t5", "tiny_v1_1"),
]
THERE_AND_BACK = """\
import sys
from importlib import import_module
from pathlib import Path
from common.huggingface import interchange
out = Path(sys.argv[1])
for name in sys.argv[2:]:
    task = import_module(f"recipes.{name.partition('_')[0]}.task")
    interchange.from_hf(out / name, out / f"{name}_run", task)
    interchange.to_hf(out / f"{name}_run", out / f"{name}_back", task)
"""


@pytest.fixture(scope="module")
def folders(corpus: Path, sentences: Path, spans: Path, tmp_path_factory) -> Path:
    """Folders FAMILY_CONFIG of random weights, and FAMILY_CONFIG_back."""
    out, corpora = tmp_path_factory.mktemp("folders"), {"gpt": corpus, "bert": sentences, "t5": spans}
    for family, name in CONFIGS:
        task = import_module(f"recipes.{family}.task")
        cfg = config.load(ROOT / f"recipes/{family}/configs/{name}.yaml", ["model.vocab_size=768"], task.Config)
        torch.manual_seed(3)
        task.hf_model(cfg.model.resolve(cfg, None)).save_pretrained(out / f"{family}_{name}")
        tokenizer.load(corpora[family] / "tokenizer").save(out / f"{family}_{name}")
    done = warm.run(["-c", THERE_AND_BACK, out, *(f"{family}_{name}" for family, name in CONFIGS)])
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize(("family", "name"), CONFIGS)
def test_an_imported_folder_comes_back_bit_for_bit(folders: Path, family: str, name: str):
    given, back = folders / f"{family}_{name}", folders / f"{family}_{name}_back"
    before, after = load_file(given / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    model_from_hf_config = import_module(f"recipes.{family}.task").model_from_hf_config
    shapes = [model_from_hf_config(json.loads((folder / "config.json").read_text())) for folder in (given, back)]
    assert shapes[0] == shapes[1]
    text = "the value of a list is returned"
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (given, back)]
    assert ids[0] == ids[1] and len(ids[0]) > 3
    card = (back / "README.md").read_text()
    assert "trained with" not in card and "None" not in card


@pytest.mark.parametrize(("family", "name"), [("gpt", "tiny"), ("bert", "tiny"), ("t5", "tiny")])
def test_a_model_section_that_was_changed_is_refused(folders: Path, tmp_path: Path, family: str, name: str):
    """norm_eps shows in no shape; step_0/state.json has it under its checksum."""
    run = tmp_path / "run"
    shutil.copytree(folders / f"{family}_{name}_run", run)
    section = yaml.safe_load((run / "model.yaml").read_text())
    recorded, section["model"]["norm_eps"] = section["model"]["norm_eps"], 0.03125
    (run / "model.yaml").write_text(yaml.safe_dump(section))
    with pytest.raises(BadInput) as refused:
        to_hf(run, tmp_path / "hf", import_module(f"recipes.{family}.task"))
    state = run / "step_0/state.json"
    message = f"{run / 'model.yaml'}: says model.norm_eps=0.03125, {state} model.norm_eps={recorded}; restore model.yaml"
    assert refused.value.problems == [message] and not (tmp_path / "hf").exists()


def test_an_import_without_its_model_section_is_refused(folders: Path, tmp_path: Path):
    run, task = folders / "gpt_tiny_run", import_module("recipes.gpt.task")
    before = (run / "model.yaml").read_text()
    for text, message in ((None, "has step_0 but no model.yaml"), ("model: {layers: x}\n", "is not the model section that")):
        (run / "model.yaml").unlink() if text is None else (run / "model.yaml").write_text(text)
        with pytest.raises(BadInput, match=message):
            to_hf(run, tmp_path / "hf", task)
    (run / "model.yaml").write_text(before)
    assert not (tmp_path / "hf").exists()


def test_the_command_reads_what_it_has_written(tmp_path: Path) -> None:
    """In a process of its own, as in a shell: it looks at the config where torch cannot be imported."""
    task = import_module("recipes.gpt.task")
    cfg = config.load(ROOT / "recipes/gpt/configs/tiny.yaml", ["model.vocab_size=512"], task.Config)
    task.hf_model(cfg.model.resolve(cfg, 512)).save_pretrained(tmp_path / "hf")
    for words in (["from-hf", "hf", "run"], ["to-hf", "run", "again"]):
        command = [sys.executable, "-m", "recipes.gpt.convert", words[0], *(str(tmp_path / word) for word in words[1:])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    first, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "again"))
    assert all(again[name].equal(value) for name, value in first.items() if name in again) and len(again) > 10
