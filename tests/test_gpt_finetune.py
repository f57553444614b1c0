"""Finetuning GPT under the laws: every stack and layout follows transformers' own class, tokenizer and templates; only answers
count, and a conversation does not see its neighbours; the export is the best checkpoint; resume; what is refused."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, case, losses
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_parity import LOSS, NORM, farthest
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import config, tokenizer
from common.errors import BadInput
from recipes.gpt import finetune, samples, task
from tests import plain_gpt_finetune as plain

ARCHS = ("tiny", "tiny_llama")
SEQ = 96
TEXT = """\
init: {from: FOLDER}
task: {name: NAME, data: DATA}
data: {seq_len: 96}
optim: {lr: 5.0e-4, warmup_steps: 2, weight_decay: 0.01, betas: [0.9, 0.999], eps: 1.0e-6}
train: {steps: 20, global_batch: 8, eval_every: 5, save_every: 10}
baseline: {micro_batch: 2}
deepspeed: {micro_batch: 2, zero_stage: 1}
megatron: {micro_batch: 2}
"""
LAYOUTS = {
    "baseline": ("baseline", []),
    "baseline_recompute": ("baseline", ["baseline.recompute=true", "baseline.micro_batch=4"]),
    "zero0": ("deepspeed", ["deepspeed.zero_stage=0"]),
    "zero1": ("deepspeed", ["deepspeed.micro_batch=1"]),
    "zero2_offload": ("deepspeed", ["deepspeed.zero_stage=2", "deepspeed.offload=true", "deepspeed.recompute=true"]),
    "zero3": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.micro_batch=4"]),
    "dp2": ("megatron", ["megatron.distributed_optimizer=true", "megatron.micro_batch=1"]),
    "tp2_sp": ("megatron", ["megatron.tp=2", "megatron.sequence_parallel=true", "megatron.micro_batch=4"]),
    "pp2": ("megatron", ["megatron.pp=2", "megatron.recompute=true"]),
}
FEW = ("baseline", "zero1", "zero3", "tp2_sp", "pp2")
# ChatML, as SmolLM2 has it: an answer ends with <|im_end|>, and a line break after it is no part of it
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END = {"tiny": "<|endoftext|>", "tiny_llama": "<|im_end|>"}
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders of untrained models: GPT-2 style with the corpus's tokenizer, which has no template, and Llama
    style with marks of turns and ChatML."""
    made = {}
    for name in ARCHS:
        cfg = config.load(ROOT / f"recipes/gpt/configs/{name}.yaml", [f"model.positions={SEQ}", "model.vocab_size=640"],
                          task.Config)  # fmt: skip
        torch.manual_seed(3)
        made[name] = tmp_path_factory.mktemp("hf") / name
        task.hf_model(cfg.model.resolve(cfg, None)).save_pretrained(made[name])
        words = tokenizer.load(corpus / "tokenizer")
        words.save(made[name])
    words = AutoTokenizer.from_pretrained(made["tiny_llama"])
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"})
    words.chat_template = CHATML
    words.save_pretrained(made["tiny_llama"])
    assert (made["tiny_llama"] / "chat_template.jinja").is_file()
    return made


WORDS = "the value of a list is returned if it was given as an argument and raises an error".split()


def chats(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Conversations of one to three turns, some with a system message, of very unequal lengths; every ninth is longer than
    a sample."""
    rng = np.random.default_rng(seed)

    def say(role: str, least: int, most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choice(WORDS, rng.integers(least, most)))}

    made = []
    for i in range(count):
        chat = [say("system", 1, 4)] if i % 3 == 0 else []
        for _ in range(1 + i % 3):
            chat += [say("user", 1, 5), say("assistant", 40, 60) if i % 9 == 8 else say("assistant", 1, 8)]
        made.append(chat)
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, count, seed in (("train", 70, 1), ("valid", 17, 2)):
        for kind in ("sft", "lm"):
            (folder / kind).mkdir(exist_ok=True)
        lines = [json.dumps({"messages": chat}) for chat in chats(count, seed)]
        asked = {"prompt": "is it an error", "response": f"it is the {name}"}
        (folder / "sft" / f"{name}.jsonl").write_text("\n".join([*lines, json.dumps(asked), ""]))
        texts = [" ".join(m["content"] for m in chat) for chat in chats(count, seed + 2)]
        (folder / "lm" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def configs(folders, data, tmp_path_factory) -> dict[tuple[str, str], Path]:
    folder, made = tmp_path_factory.mktemp("configs"), {}
    for arch in ARCHS:
        for kind in ("sft", "lm"):
            made[kind, arch] = folder / f"{kind}_{arch}.yaml"
            text = TEXT.replace("FOLDER", str(folders[arch])).replace("NAME", kind).replace("DATA", str(data / kind))
            made[kind, arch].write_text(text)
    return made


def one(stack: str, path: Path, out: Path, overrides: list[str]) -> dict:
    return case(stack, "tiny", out, overrides) | {"module": f"recipes.gpt.{stack}.finetune", "config": str(path)}


@pytest.fixture(scope="module")
def runs(drive, configs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finetuned")
    cases = [one(stack, configs["sft", "tiny_llama"], out / "sft_tiny_llama" / name, more) for name, (stack, more) in LAYOUTS.items()]
    for name in FEW:
        stack, more = LAYOUTS[name]
        cases.append(one(stack, configs["sft", "tiny"], out / "sft_tiny" / name, more))
        cases.append(one(stack, configs["lm", "tiny"], out / "lm_tiny" / name, more))
        cases.append(one(stack, configs["sft", "tiny"], out / "unpacked_tiny" / name, [*more, "data.pack=false", "train.steps=10"]))
    for name in ("baseline", "zero1", "tp2_sp"):
        stack, more = LAYOUTS[name]
        shared = [*more, "model.dropout=0.1", "optim.decay_steps=12"]
        cases.append(one(stack, configs["sft", "tiny"], out / "whole" / name, [*shared, "train.steps=12"]))
        cases += [one(stack, configs["sft", "tiny"], out / "halves" / name, [*shared, f"train.steps={n}"]) for n in (6, 12)]
    worse = ["task.patience=2", "optim.lr=0.1", "optim.warmup_steps=0", "optim.grad_clip=0", "train.steps=40", "train.eval_every=1"]
    cases += [one("baseline", configs["sft", "tiny"], out / "patient", worse)] * 2
    cases += [one("baseline", configs["sft", "tiny"], out / "moved", ["train.steps=10", "optim.decay_steps=20"]),
              one("megatron", configs["sft", "tiny"], out / "moved", ["train.steps=20", "megatron.tp=2"])]  # fmt: skip
    drive(cases, 2)
    return out


def documents(folders, data, kind: str, arch: str, pack: bool = True) -> list[list[plain.Document]]:
    """The documents of each sample of train, by transformers' tokenizer and template."""
    words = AutoTokenizer.from_pretrained(folders[arch])
    lines = map(json.loads, (data / kind / "train.jsonl").read_text().splitlines())
    if kind == "lm":
        ids: list[int] = []
        for line in lines:
            ids += [*words(line["text"])["input_ids"], words.convert_tokens_to_ids("<|endoftext|>")]
        ids = ids[:-1]  # between documents
        return [[(ids[i : i + SEQ + 1], [True] * (SEQ + 1))] for i in range(0, len(ids) - 1, SEQ)]
    known = []
    for line in lines:
        asked = {"role": "user", "content": line.get("prompt")}
        chat = line.get("messages") or [asked, {"role": "assistant", "content": line["response"]}]
        known.append(plain.answers(words, chat, END[arch]))
    known = [(ids[: SEQ + 1], counted[: SEQ + 1]) for ids, counted in known]
    if not pack:
        return [[document] for document in known]
    return [[known[i] for i in group] for group in samples.best_fit([len(ids) for ids, _ in known], SEQ + 1)]


@pytest.fixture(scope="module")
def reference(configs, folders, data) -> dict[str, list[tuple[float, float]]]:
    made = {}
    for kind, arch in (("sft", "tiny_llama"), ("sft", "tiny"), ("lm", "tiny")):
        groups = documents(folders, data, kind, arch)
        made[f"{kind}_{arch}"] = plain.losses(configs[kind, arch], [], groups)
    alone = documents(folders, data, "sft", "tiny", pack=False)
    made["unpacked_tiny"] = plain.losses(configs["sft", "tiny"], ["train.steps=10"], alone)
    return made


NAMES = [("sft_tiny_llama", name) for name in LAYOUTS]
NAMES += [(kind, name) for kind in ("sft_tiny", "lm_tiny", "unpacked_tiny") for name in FEW]


@pytest.mark.parametrize(("kind", "layout"), NAMES, ids=[f"{kind}-{name}" for kind, name in NAMES])
def test_follows_the_plain_loop(runs, reference, kind, layout):
    expected = reference[kind]
    assert min(loss for loss, _ in expected[5:]) < expected[0][0] - 0.01
    loss, norm = farthest(runs / kind / layout, expected)
    print(f"{kind} {layout}: loss {loss:.1e} norm {norm:.1e}")
    assert loss <= LOSS and norm <= NORM
