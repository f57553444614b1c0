"""Interchange: names and rows move, no bit changes; logits and losses agree; exports load with plain transformers."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, case, losses, step_of, valid_loss
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from common import config
from common.stacks import mcore
from common.yaml_files import read_yaml
from recipes.gpt import task
from tests import warm
from tests.drive import END
from tests.gathered import join

VOCAB = 1021  # a prime: does not divide by tp
SHAPES = {"tiny": ["model.layers=2"], "tiny_llama": ["model.layers=2", "model.tied=true"]}


def resolved(name: str, *overrides: str) -> task.ResolvedModel:
    cfg = config.load(ROOT / f"recipes/gpt/configs/{name}.yaml", [f"model.vocab_size={VOCAB}", *overrides], task.Config)
    return cfg.model.resolve(cfg, None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders of random weights, norms and biases too, as another library would save them."""
    folders = {}
    for name, overrides in SHAPES.items():
        torch.manual_seed(7)
        net = task.hf_model(resolved(name, *overrides))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        folders[name] = tmp_path_factory.mktemp("hf") / name
        net.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ["tiny", "tiny_llama"])
def test_table_is_its_own_inverse_at_every_tp(name, tp):
    parameter_map = pytest.importorskip("recipes.gpt.megatron.parameter_map")
    model = resolved(name) if name == "tiny" or tp < 4 else resolved(name, "model.kv_heads=4")
    rules = parameter_map.parameter_map(model)
    shapes = task.parameter_shapes(model)
    layer = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    columns = {"self_attention.linear_qkv", "mlp.linear_fc1"}
    for block in layer:
        rule = rules(f"decoder.layers.3.{block}.weight")
        tensors = [torch.randn(shapes[hf]) for hf in rule.hf]
        whole = rule.from_hf(*tensors)
        dim = 0 if block in columns else 1
        shards = [mcore.split(whole, dim, rule.blocks, tp, rank) for rank in range(tp)]
        back = rule.to_hf(join(shards, dim, rule.blocks))
        assert all(torch.equal(a, b) for a, b in zip(tensors, back, strict=True)), block


@pytest.fixture(scope="module")
def moved(drive, settings, folders, tmp_path_factory) -> tuple[Path, str]:
    """One step from the folder on every stack, Megatron at tp 1 and tp 2."""
    out = tmp_path_factory.mktemp("convert")
    stacks = {"baseline": ("baseline", []), "zero3": ("deepspeed", ["deepspeed.zero_stage=3"]),
              "dp2": ("megatron", []), "tp2": ("megatron", ["megatron.tp=2", "megatron.sequence_parallel=true"])}  # fmt: skip
    cases = []
    for name, shape in SHAPES.items():
        shared = [*settings, *shape, f"model.vocab_size={VOCAB}", f"init.from={folders[name]}", "train.steps=3"]
        cases += [case(stack, name, out / name / kind, [*shared, *more]) for kind, (stack, more) in stacks.items()]
    return out, drive(cases, 2)


def test_hf_to_every_stack_and_back_is_bitwise(moved):
    """The functions that load read back every weight of the folder before the first step (tests/watch.py)."""
    lines = re.findall(r"READBACK (\d+) parameters, (\d+) wrong", moved[1])
    assert len(lines) == moved[1].count(f"\n{END}") > 0 and all(int(seen) > 0 and wrong == "0" for seen, wrong in lines), lines


@pytest.mark.parametrize("name", SHAPES)
def test_a_vocabulary_that_does_not_divide_trains_alike(moved, name):
    out, _ = moved
    expected = losses(out / name / "baseline")
    for kind in ("zero3", "dp2", "tp2"):
        lines = losses(out / name / kind)
        assert max(abs(lines[s]["loss"] - expected[s]["loss"]) for s in expected) <= 1e-5
        assert max(abs(lines[s]["grad_norm"] / expected[s]["grad_norm"] - 1) for s in expected) <= 1e-4
        weights = load_file(out / name / kind / "hf" / "model.safetensors")
        embedding = weights["transformer.wte.weight" if name == "tiny" else "model.embed_tokens.weight"]
        assert embedding.shape[0] == VOCAB  # the rows added for tp are gone


def test_logits_equal_transformers(settings, folders, tmp_path):
    cases = [
        {
            "config": str(ROOT / f"recipes/gpt/configs/{name}.yaml"), "out": str(tmp_path / name), "hf": str(folders[name]),
            "overrides": [*settings, *shape, f"model.vocab_size={VOCAB}", f"init.from={folders[name]}", *layout],
        }
        for name, shape in SHAPES.items()
        for layout in ([], ["megatron.tp=2"], ["megatron.tp=2", "megatron.sequence_parallel=true"])
    ]  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = warm.run(["tests/logits.py", tmp_path / "cases.json"], nproc=2)
    matches = re.findall(r"LOGITS (\S+) of (\S+)", done.stdout)
    assert len(matches) == len(cases), done.stdout[-2000:] + done.stderr[-3000:]
    assert all(float(diff) <= 1e-5 and float(largest) > 0.1 for diff, largest in matches), matches


@pytest.mark.parametrize("name", SHAPES)
def test_export_loads_with_plain_transformers(moved, corpus, name):
    run = moved[0] / name / "tp2"
    net = AutoModelForCausalLM.from_pretrained(run / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    assert type(net).__name__ == ("GPT2LMHeadModel" if name == "tiny" else "LlamaForCausalLM")
    from recipes.gpt.samples import Samples

    stream = Samples(str(corpus / "valid"), 64, shuffle=False)
    tokens = torch.from_numpy(stream.collate(range(16))["tokens"])
    with torch.no_grad():
        logits = net(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - valid_loss(run)) <= 1e-5  # the run's own validation loss
    assert tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"
    card = (run / "hf" / "README.md").read_text()
    assert "validation loss" in card and "commit" in card and "vocab_size" in card


def convert_cli(*words: object) -> subprocess.CompletedProcess[str]:
    return warm.run(["-m", "recipes.gpt.convert", *words])


def test_commands_to_hf_and_from_hf(moved, folders, tmp_path):
    run = moved[0] / "tiny_llama" / "tp2"
    (tmp_path / "hf.tmp").mkdir()  # somebody's own
    done = convert_cli("to-hf", run, tmp_path / "hf")
    assert done.returncode == 2 and "hf.tmp: exists, and to-hf writes there first" in done.stderr, done.stderr
    (tmp_path / "hf.tmp").rmdir()  # as it was: rmdir refuses a folder with files
    done = convert_cli("to-hf", run, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    converted, exported = load_file(tmp_path / "hf/model.safetensors"), load_file(run / "hf/model.safetensors")
    assert converted.keys() == exported.keys() and all(torch.equal(converted[k], exported[k]) for k in converted)
    done = convert_cli("from-hf", folders["tiny_llama"], tmp_path / "run")
    assert done.returncode == 0, done.stderr
    state = step_of(tmp_path / "run", 0).read("model.norm.weight")
    assert torch.equal(state["weight"], load_file(folders["tiny_llama"] / "model.safetensors")["model.norm.weight"])
    assert read_yaml(tmp_path / "run/model.yaml")["model"]["kv_heads"] == 2


def test_commands_refuse_what_they_cannot_convert(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pipe").mkdir()
    GPT2Config().save_pretrained(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe/model.safetensors")
    for words, message in (
        (("to-hf", tmp_path / "none", tmp_path / "hf"), "has no run"),
        (("from-hf", tmp_path / "bert", tmp_path / "out"), "'bert' model"),
        (("from-hf", tmp_path / "none", tmp_path / "out"), "no config.json"),
        (("from-hf", tmp_path / "pipe", tmp_path / "out"), "model.safetensors is not a safetensors file"),
    ):
        done = convert_cli(*words)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_model_of_reads_the_configs_that_transformers_writes():
    for hf_config in (GPT2Config(n_layer=2, n_embd=64, n_head=4), LlamaConfig(num_hidden_layers=2, rope_theta=5e5)):
        model = task.model_from_hf_config(json.loads(json.dumps(hf_config.to_dict())))
        with torch.device("meta"):
            net = (GPT2LMHeadModel if model.arch == "gpt2" else LlamaForCausalLM)(hf_config)
        shapes = task.parameter_shapes(model)
        assert shapes == {name: tuple(p.shape) for name, p in net.named_parameters()}
