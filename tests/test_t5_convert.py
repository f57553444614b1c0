"""T5's interchange: no bit changes on the way, logits agree, exports load untied and write the same text."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, case, losses, valid_loss
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5ForConditionalGeneration

from common import config
from common.stacks import mcore
from recipes.t5 import task
from scripts import heldout
from tests import warm
from tests.gathered import join

VOCAB = 709  # a prime: does not divide by tp
ARCHS = ("tiny", "tiny_v1_1")
SIZE = [f"model.vocab_size={VOCAB}"]
LAYOUTS = ([], ["megatron.tp=2"], ["megatron.tp=2", "megatron.sequence_parallel=true"])


def resolved(name: str) -> task.ResolvedModel:
    cfg = config.load(ROOT / f"recipes/t5/configs/{name}.yaml", SIZE, task.Config)
    return cfg.model.resolve(cfg, None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders of random weights, as another library would save them. Of the size that T5 begins with: its scores
    are not scaled, and with larger ones softmax is so sharp that rounding alone moves a logit by more than 1e-5."""
    folders = {}
    for name in ARCHS:
        torch.manual_seed(7)
        net = task.hf_model(resolved(name))
        with torch.no_grad():
            for key, parameter in net.named_parameters():
                begins = task.initializer(resolved(name), key)
                spread = torch.randn_like(parameter)
                parameter.copy_(1 + spread * 0.05 if begins == "ones" else spread * begins)
        folders[name] = tmp_path_factory.mktemp("hf") / name
        net.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ARCHS)
def test_table_is_its_own_inverse_at_every_tp(name, tp):
    parameter_map = pytest.importorskip("recipes.t5.megatron.parameter_map")
    model = resolved(name)
    rules, shapes, seen = parameter_map.parameter_map(model), task.parameter_shapes(model), set()
    for stack, layers in (("encoder", 3), ("decoder", 2)):
        for number in range(layers):
            for part in parameter_map._layer(model, stack):
                rule = rules(f"{stack}.layers.{number}.{part}.weight")
                tensors = [torch.randn(shapes[hf]) for hf in rule.hf]
                seen |= set(rule.hf)
                whole = rule.from_hf(*tensors)
                shards = [mcore.split(whole, 0, rule.blocks, tp, rank) for rank in range(tp)]
                back = rule.to_hf(join(shards, 0, rule.blocks))
                assert all(torch.equal(a, b) for a, b in zip(tensors, back, strict=True)), part
    seen |= {hf for rule in parameter_map._outer(model).values() for hf in rule.hf}
    assert seen == set(shapes), "every parameter has its place in Megatron"


@pytest.fixture(scope="module")
def moved(drive, t5_settings, folders, tmp_path_factory) -> tuple[Path, str]:
    """Three steps from the folder on every stack, Megatron at tp 1 and tp 2."""
    out = tmp_path_factory.mktemp("convert")
    stacks = {"baseline": ("baseline", []), "zero3": ("deepspeed", ["deepspeed.zero_stage=3"]),
              "dp2": ("megatron", []), "tp2": ("megatron", ["megatron.tp=2", "megatron.sequence_parallel=true"])}  # fmt: skip
    cases = []
    for name in ARCHS:
        shared = [*t5_settings, *SIZE, f"init.from={folders[name]}", "train.steps=3"]
        cases += [case(s, name, out / name / kind, [*shared, *more], family="t5") for kind, (s, more) in stacks.items()]
    return out, drive(cases, 2)


def test_hf_to_every_stack_and_back_is_bitwise(moved):
    """The functions that load read back every weight of the folder before the first step (tests/watch.py)."""
    lines = re.findall(r"READBACK (\d+) parameters, (\d+) wrong", moved[1])
    assert len(lines) == 2 * 4 and all(int(seen) > 0 and wrong == "0" for seen, wrong in lines), lines


@pytest.mark.parametrize("name", ARCHS)
def test_a_vocabulary_that_does_not_divide_trains_alike(moved, name):
    expected = losses(moved[0] / name / "baseline")
    for kind in ("zero3", "dp2", "tp2"):
        lines = losses(moved[0] / name / kind)
        assert max(abs(lines[s]["loss"] - expected[s]["loss"]) for s in expected) <= 1e-5
        assert max(abs(lines[s]["grad_norm"] / expected[s]["grad_norm"] - 1) for s in expected) <= 1e-4
        assert load_file(moved[0] / name / kind / "hf/model.safetensors")["shared.weight"].shape[0] == VOCAB


@pytest.mark.parametrize("name", ARCHS)
def test_exports_load_untied_and_write_the_same_text(moved, name):
    written = set()
    for kind in ("zero3", "tp2"):
        run = moved[0] / name / kind
        loss, targets = heldout.evaluate(run)
        assert targets > 50 and abs(loss - valid_loss(run)) <= 1e-5
        net = T5ForConditionalGeneration.from_pretrained(run / "hf").eval()
        tied = net.lm_head.weight.data_ptr() == net.shared.weight.data_ptr()
        assert tied == (name == "tiny"), "1.1 has output weights of its own"
        weights = load_file(run / "hf/model.safetensors")
        assert ("lm_head.weight" in weights) != tied
        tokenizer = AutoTokenizer.from_pretrained(run / "hf")
        given = tokenizer(["def <extra_id_0>(self):", "import"], return_tensors="pt", padding=True)
        ids = net.generate(**given, max_new_tokens=12, do_sample=False)
        written.add(json.dumps(ids.tolist()))
    assert len(written) == 1, "greedy decoding is the same from both stacks' exports"


def test_logits_equal_transformers(t5_settings, folders, tmp_path):
    cases = [
        {
            "config": str(ROOT / f"recipes/t5/configs/{name}.yaml"), "out": str(tmp_path / name),
            "overrides": [*t5_settings, *SIZE, f"init.from={folders[name]}", *layout, *more],
        }
        for name in ARCHS
        for layout in LAYOUTS
        for more in ([], ["data.pack=false"])
    ]  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = warm.run(["tests/logits_t5.py", tmp_path / "cases.json"], nproc=2)
    matches = re.findall(r"LOGITS (\w+) (\S+) of (\S+)", done.stdout)
    assert len(matches) == 2 * len(cases), done.stdout[-2000:] + done.stderr[-3000:]
    assert all(float(apart) <= 1e-5 and float(top) > 0.1 for _, apart, top in matches), "\n".join(map(str, matches))


LAYOUTS_REFUSED = {
    "megatron.pp=2": "megatron.pp=2: megatron-core no longer splits an encoder and a decoder over pipeline stages",
    "megatron.transformer_engine=true": "megatron.transformer_engine=true: T5's relative biases and norms are the recipe's own",
    "megatron.tp=3": "megatron.tp=3 does not divide model.heads=4",
    "data.target_len=10": "data.target_len=10: spans of data.seq_len=64 make 14 tokens; give 14",
    "optim.optimizer=adafactor": "optim.optimizer=adafactor on megatron: it keeps the mean squares of the rows and columns",
    "train.dtype=fp16": "train.dtype=\"fp16\": should be 'fp32' or 'bf16'",
}


@pytest.mark.parametrize("word", LAYOUTS_REFUSED)
def test_what_t5_refuses(word, t5_settings, tmp_path):
    script = str(ROOT / "recipes/t5/megatron/pretrain.sh")
    command = ["bash", script, str(ROOT / "recipes/t5/configs/tiny.yaml"), str(tmp_path / "out"), *t5_settings, word]
    env = os.environ | {"NPROC": "6", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and LAYOUTS_REFUSED[word] in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
