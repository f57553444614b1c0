"""Finetuning GPT: every stack and layout follows transformers' own class, tokenizer and templates; only answers
count, and a conversation does not see its neighbours; the export is the best checkpoint; resume; what is refused."""

import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_same_state, case, finished, launch_script, losses, step_of
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from test_parity import LOSS, NORM, farthest
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import config, families
from common.data import limited_process, tokenizer
from common.errors import BadInput
from common.evaluation import language
from common.training import lora
from data import sources
from recipes.gpt import finetune, finetune_samples as samples, task
from scripts import evaluate, generate
from tests import plain_gpt_finetune as plain, warm

ARCHS = ("tiny", "tiny_llama")
SEQ = 96
TEXT = """\
init: {from: FOLDER}
task: {name: NAME, data: DATA, answers: 4, max_new_tokens: 8}
data: {seq_len: 96, length_window: 0}
optim: {lr: 5.0e-4, warmup_steps: 2, weight_decay: 0.01, betas: [0.9, 0.999], eps: 1.0e-6}
train: {steps: 20, global_batch: 8, eval_every: 10, save_every: 10}
baseline: {micro_batch: 2}
deepspeed: {micro_batch: 2, zero_stage: 1}
megatron: {micro_batch: 2}
"""
LAYOUTS = {
    "baseline": ("baseline", []),
    "baseline_recompute": ("baseline", ["baseline.recompute=true", "baseline.micro_batch=4"]),
    "fsdp2": ("baseline", ["baseline.shard=full", "baseline.micro_batch=4"]),
    "zero0": ("deepspeed", ["deepspeed.zero_stage=0"]),
    "zero1": ("deepspeed", ["deepspeed.micro_batch=1"]),
    "zero2_offload": ("deepspeed", ["deepspeed.zero_stage=2", "deepspeed.offload=optimizer", "deepspeed.recompute=true"]),
    "zero3": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.micro_batch=4"]),
    "zero1_pp2": ("deepspeed", ["deepspeed.pp=2"]),
    "zero3_tp2": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.tp=2", "deepspeed.micro_batch=4"]),
    "zero1_sp2": ("deepspeed", ["deepspeed.sp=2", "deepspeed.micro_batch=4"]),
    "dp2": ("megatron", ["megatron.distributed_optimizer=true", "megatron.micro_batch=1"]),
    "tp2_sp": ("megatron", ["megatron.tp=2", "megatron.sequence_parallel=true", "megatron.micro_batch=4"]),
    "pp2": ("megatron", ["megatron.pp=2", "megatron.recompute=true"]),
    "cp2": ("megatron", ["megatron.cp=2", "megatron.micro_batch=4"]),
    "pp2_vpp2": ("megatron", ["megatron.pp=2", "megatron.vpp=2"]),
}
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
    folders = {}
    for name in ARCHS:
        cfg = config.load(ROOT / f"recipes/gpt/configs/{name}.yaml", [f"model.positions={SEQ}", "model.vocab_size=640"],
                          task.Config)  # fmt: skip
        torch.manual_seed(3)
        folders[name] = tmp_path_factory.mktemp("hf") / name
        task.hf_model(cfg.model.resolve(cfg, None)).save_pretrained(folders[name])
        words = tokenizer.load(corpus / "tokenizer")
        words.save(folders[name])
    words = AutoTokenizer.from_pretrained(folders["tiny_llama"])
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"})
    words.chat_template = CHATML
    words.save_pretrained(folders["tiny_llama"])
    assert (folders["tiny_llama"] / "chat_template.jinja").is_file()
    return folders


WORDS = "the value of a list is returned if it was given as an argument and raises an error".split()


def chats(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Conversations of one or two turns, some with a system message, of very unequal lengths; every ninth is longer than
    a sample."""
    rng = np.random.default_rng(seed)

    def say(role: str, least: int, most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choice(WORDS, rng.integers(least, most)))}

    conversations = []
    for i in range(count):
        chat = [say("system", 1, 3)] if i % 3 == 0 else []
        for _ in range(1 + (i % 4 == 3)):
            chat += [say("user", 1, 3), say("assistant", 40, 60) if i % 9 == 8 else say("assistant", 1, 6)]
        conversations.append(chat)
    return conversations


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
    folder, paths = tmp_path_factory.mktemp("configs"), {}
    for arch in ARCHS:
        for kind in ("sft", "lm"):
            paths[kind, arch] = folder / f"{kind}_{arch}.yaml"
            text = TEXT.replace("FOLDER", str(folders[arch])).replace("NAME", kind).replace("DATA", str(data / kind))
            paths[kind, arch].write_text(text)
    return paths


def one(stack: str, path: Path, out: Path, overrides: list[str]) -> dict:
    return case(stack, "tiny", out, overrides) | {"module": f"recipes.gpt.{stack}.finetune", "config": str(path)}


PILOT = ["train.steps=40", "optim.lr=5.0e-3", "train.eval_every=20", "train.save_every=0"]  # learns one answer by heart


@pytest.fixture(scope="module")
def chatml(folders, tmp_path_factory) -> Path:
    """A folder whose turns end otherwise than its texts, and one conversation to learn from it."""
    folder = tmp_path_factory.mktemp("chatml")
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((folders["tiny"] / file).read_bytes())
    words = AutoTokenizer.from_pretrained(folders["tiny"])
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words.chat_template = CHATML
    words.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "temperature": 0.6, "top_k": "x"}))
    turns = [{"from": "human", "value": "Who is Ada?"}, {"from": "gpt", "value": "A pilot."}]  # as ShareGPT has it
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text((json.dumps({"conversations": turns}) + "\n") * 16)
    return folder


LLAMA_LAYOUTS = [name for name in LAYOUTS if name != "zero3_tp2"]
LORA = ["lora={rank: 4, alpha: 8}", "optim.lr=5.0e-3"]
LORA_LAYOUTS = ("baseline", "baseline_recompute", "fsdp2", "zero0", "zero1", "zero2_offload", "zero3", "zero1_sp2")


@pytest.fixture(scope="module")
def runs(drive, configs, chatml, tmp_path_factory) -> Path:
    """OUT of each run: KIND_ARCH/LAYOUT."""
    out = tmp_path_factory.mktemp("finetuned")
    sft = configs["sft", "tiny"]

    def many(kind: str, path: Path, names: Sequence[str], more: Sequence[str] = ()) -> list[dict]:
        return [one(LAYOUTS[name][0], path, out / kind / name, [*LAYOUTS[name][1], *more]) for name in names]

    cases = many("sft_tiny_llama", configs["sft", "tiny_llama"], LLAMA_LAYOUTS)
    cases += many("sft_tiny", sft, ("baseline", "zero1", "zero3_tp2", "pp2"))
    cases += many("lm_tiny", configs["lm", "tiny"], ("baseline", "zero1", "tp2_sp"))
    cases += many(
        "unpacked_tiny", sft, ("zero3", "zero1_sp2", "zero1_pp2", "tp2_sp", "cp2"), ["data.pack=false", "train.steps=10"]
    )
    cases += many("lora_tiny", sft, LORA_LAYOUTS, LORA)
    cases += many("lora_tiny_llama", configs["sft", "tiny_llama"], ("baseline", "zero3"), LORA)
    dropped = ["model.dropout=0.1", "optim.decay_steps=8"]
    adapters = [*LORA, "lora.dropout=0.1", "optim.decay_steps=8"]
    for kind, names, more in (("", ("baseline", "tp2_sp"), dropped), ("lora_", ("zero1", "zero3"), adapters)):
        for name in names:
            cases += many(f"{kind}whole", sft, [name], [*more, "train.steps=8"])
            cases += many(f"{kind}halves", sft, [name], [*more, "train.steps=4"])
            cases += many(f"{kind}halves", sft, [name], [*more, "train.steps=8"])
    cases += [one("baseline", sft, out / "pilot", PILOT + [f"init.from={chatml}", f"task.data={chatml}"])]
    worse = ["task.patience=2", "optim.lr=0.1", "optim.warmup_steps=0", "optim.grad_clip=0", "train.eval_every=1"]
    cases += [one("baseline", sft, out / "patient", worse)] * 2
    cases += [one("baseline", sft, out / "moved", ["train.steps=10", "optim.decay_steps=20"]),
              one("megatron", sft, out / "moved", ["train.steps=20", "megatron.tp=2"])]  # fmt: skip
    drive(cases, 2)
    return out


def documents(folders, data, kind: str, arch: str, pack: bool = True, split: str = "train") -> list[list[plain.Document]]:
    """The documents of each sample of train, by transformers' tokenizer and template."""
    words = AutoTokenizer.from_pretrained(folders[arch])
    lines = map(json.loads, (data / kind / f"{split}.jsonl").read_text().splitlines())
    if kind == "lm":
        ids: list[int] = []
        for line in lines:
            ids += [*words(line["text"])["input_ids"], words.convert_tokens_to_ids("<|endoftext|>")]
        ids = ids[:-1]  # between documents
        cut = [ids[i : i + SEQ + 1] for i in range(0, len(ids) - 1, SEQ)]
        return [[(window, [True] * len(window))] for window in cut]
    known = []
    for line in lines:
        asked = {"role": "user", "content": line.get("prompt")}
        chat = line.get("messages") or [asked, {"role": "assistant", "content": line["response"]}]
        known.append(plain.answers(words, chat, END[arch]))
    known = [(ids[: SEQ + 1], is_target[: SEQ + 1]) for ids, is_target in known]
    if not pack:
        return [[document] for document in known]
    return [[known[i] for i in group] for group in samples.best_fit([len(ids) for ids, _ in known], SEQ + 1)]


@pytest.fixture(scope="module")
def reference(configs, folders, data) -> dict[str, list[tuple[float, float]]]:
    curves = {}
    for kind, arch in (("sft", "tiny_llama"), ("sft", "tiny"), ("lm", "tiny")):
        groups = documents(folders, data, kind, arch)
        curves[f"{kind}_{arch}"] = plain.losses(configs[kind, arch], [], groups)
        if kind == "sft":
            curves[f"lora_{arch}"] = plain.losses(configs[kind, arch], LORA, groups, partial(plain_peft, arch=arch))
    alone = documents(folders, data, "sft", "tiny", pack=False)
    curves["unpacked_tiny"] = plain.losses(configs["sft", "tiny"], ["train.steps=10"], alone)
    return curves


def plain_peft(net: torch.nn.Module, arch: str) -> torch.nn.Module:
    """Adapters on every linear layer, as a user of peft adds them."""
    shapes = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", fan_in_fan_out=arch == "tiny"
    )
    net = peft.get_peft_model(net, shapes)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(lora.initial(1234, name.removeprefix("base_model.model."), parameter.shape))
    return net


FOLLOW = [
    *[("sft_tiny_llama", name) for name in LLAMA_LAYOUTS],
    *[("sft_tiny", name) for name in ("baseline", "zero1", "zero3_tp2", "pp2")],
    *[("lm_tiny", name) for name in ("baseline", "zero1", "tp2_sp")],
    *[("unpacked_tiny", name) for name in ("zero3", "zero1_sp2", "zero1_pp2", "tp2_sp", "cp2")],
    *[("lora_tiny", name) for name in LORA_LAYOUTS],
    *[("lora_tiny_llama", name) for name in ("baseline", "zero3")],
]


@pytest.mark.parametrize(("kind", "layout"), FOLLOW, ids=[f"{kind}-{name}" for kind, name in FOLLOW])
def test_follows_the_reference_loop(runs, reference, kind, layout):
    expected = reference[kind]
    assert min(loss for loss, _ in expected[5:]) < expected[0][0] - 0.01
    loss, norm = farthest(runs / kind / layout, expected)
    print(f"{kind} {layout}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss <= LOSS and norm <= NORM


# ---- evaluation and export -------------------------------------------------------------------------------------------


def valids(out: Path) -> dict[int, dict]:
    lines = map(json.loads, (finished(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line for line in lines if "valid_loss" in line}


@pytest.mark.parametrize(("kind", "layout"), FOLLOW, ids=[f"{kind}-{name}" for kind, name in FOLLOW])
def test_the_export_is_the_best_and_has_its_loss(runs, folders, data, kind, layout):
    """Computed again by plain transformers, each conversation alone."""
    out, (task_name, arch) = runs / kind / layout, kind.split("_", 1)
    task_name = "lm" if task_name == "lm" else "sft"
    values = {step: line["valid_loss"] for step, line in valids(out).items()}
    assert sorted(values) == ([10] if "unpacked" in kind else [10, 20])
    best = min(values, key=lambda step: (values[step], step))
    assert json.loads((out / "hf/twinstack.json").read_text())["step"] == best
    rows = {row["metric"]: row for row in json.loads((out / "eval.json").read_text())}
    assert rows.keys() == {"loss", "perplexity"} and rows["loss"]["value"] == values[best]
    assert f"step {best}, the best by loss" in rows["loss"]["protocol"]

    net, total, targets = AutoModelForCausalLM.from_pretrained(out / "hf").eval(), 0.0, 0
    for group in documents(folders, data, task_name, arch, split="valid"):
        for ids, is_target in group:
            with torch.no_grad():
                logits = net(torch.tensor([ids[:-1]])).logits[0]
            mask = torch.tensor(is_target[1:])
            total += F.cross_entropy(logits[mask], torch.tensor(ids[1:])[mask], reduction="sum").item()
            targets += int(mask.sum())
    assert task_name == "lm" or f"valid: 18 conversations, {targets} answer tokens, in" in rows["loss"]["protocol"]
    assert rows["loss"]["n"] == targets and abs(rows["loss"]["value"] - total / targets) <= 1e-5
    assert abs(rows["perplexity"]["value"] / math.exp(total / targets) - 1) <= 1e-4


@pytest.mark.parametrize("arch", ARCHS)
def test_the_export_writes_conversations_as_it_was_taught(runs, folders, arch):
    words, chat = AutoTokenizer.from_pretrained(finished(runs / f"sft_{arch}/baseline") / "hf"), chats(3, 5)[2]
    template = CHATML if arch == "tiny_llama" else samples.DEFAULT_TEMPLATE
    expected = AutoTokenizer.from_pretrained(folders[arch]).apply_chat_template(chat, chat_template=template, return_dict=False)
    assert words.apply_chat_template(chat, return_dict=False) == expected
    assert words.convert_tokens_to_ids(END[arch]) in expected


@pytest.mark.parametrize("which", ["sft_tiny_llama/baseline", "sft_tiny/zero1", "sft_tiny/pp2", "lora_tiny/zero1"])
def test_the_best_checkpoint_answers(runs, data, which):
    """By transformers' own template and generate: the last answer of each of valid's first conversations with room for one."""
    out, arch = finished(runs / which), "tiny_llama" if "llama" in which else "tiny"
    words, net = AutoTokenizer.from_pretrained(out / "hf"), AutoModelForCausalLM.from_pretrained(out / "hf").eval()
    expected = []
    for line in (data / "sft/valid.jsonl").read_text().splitlines()[:-1]:  # the last is of another form
        *before, reference = json.loads(line)["messages"]
        given = words.apply_chat_template(before, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        if (room := SEQ - given["input_ids"].shape[1]) < 1:
            continue
        end = words.convert_tokens_to_ids(END[arch])
        written = net.generate(**given, do_sample=False, max_new_tokens=min(8, room), eos_token_id=end, pad_token_id=end)
        said = words.decode(written[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append({"messages": [*before, {"role": "assistant", "content": said}], "reference": reference["content"]})
    step = json.loads((out / "hf/twinstack.json").read_text())["step"]
    conversations = [json.loads(line) for line in (out / "predictions/valid.jsonl").read_text().splitlines()]
    assert conversations == [{"step": step, **row} for row in expected[:4]]
    assert "llama" in which or any(
        row["messages"][-1]["content"] for row in conversations
    )  # that one has learnt to end at once


def test_generate_asks_as_it_was_taught(runs):
    lines = (finished(runs / "sft_tiny/pp2") / "predictions/valid.jsonl").read_text().splitlines()
    asked, said = next(m for m in (json.loads(line)["messages"] for line in lines) if len(m) == 2)
    words = [runs / "sft_tiny/pp2", "--prompt", asked["content"], "--chat", "--temperature", "0", "--tokens", "8"]
    done = warm.run(["-m", "scripts.generate", *words])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n", 1)[1].strip() == said["content"].strip() != ""
    done = warm.run(["-m", "scripts.generate", runs / "sft_tiny/pp2", "--chat"])
    assert done.returncode == 2 and "--chat: there is no question; give --prompt TEXT" in done.stderr


def test_an_answer_ends_where_the_turn_does(runs, chatml):
    """<|im_end|> ends a turn and <|endoftext|> a text: the export names both and what the folder named, and readers stop."""
    out = finished(runs / "pilot")
    written = json.loads((out / "hf/generation_config.json").read_text())
    end = AutoTokenizer.from_pretrained(out / "hf").convert_tokens_to_ids("<|im_end|>")
    assert end == 513 and written == {"eos_token_id": [0, 5, end], "temperature": 0.6}
    assert AutoModelForCausalLM.from_pretrained(out / "hf").generation_config.eos_token_id == [0, 5, end]
    said = [json.loads(line)["messages"][-1]["content"] for line in (out / "predictions/valid.jsonl").read_text().splitlines()]
    assert said == ["A pilot."] * 4
    words = AutoTokenizer.from_pretrained(out / "hf")
    assert generate.format_question(words, "here", "a")[1] == {0, end}  # the template alone says it too
    command = [sys.executable, "-m", "scripts.generate", out, "--chat", "--prompt", "Who is Ada?", "--temperature", "0"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split("\n", 1)[1].strip() == "A pilot.", done.stderr


@pytest.mark.parametrize(("kind", "layout"), [row for row in FOLLOW if row[0].startswith("lora")])
def test_the_adapter_is_pefts_and_merged_it_is_the_export(runs, folders, kind, layout):
    out, arch = finished(runs / kind / layout), kind.partition("_")[2]
    saved = load_file(out / "adapter/adapter_model.safetensors")
    checkpoints = sorted(p.name for p in (out / "best").iterdir())
    names = step_of(out / "best", int(checkpoints[-1].removeprefix("step_"))).names()
    assert len(saved) == len(names) and all(".lora_" in name for name in names)
    base = AutoModelForCausalLM.from_pretrained(folders[arch], dtype=torch.float32)
    ids = torch.arange(90)[None]
    with torch.no_grad():
        before = base(ids).logits
        net = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
        with_adapter = net(ids).logits
        merged = net.merge_and_unload()(ids).logits
        logits = AutoModelForCausalLM.from_pretrained(out / "hf").eval()(ids).logits
    assert (with_adapter - before).abs().max() > 1e-2
    assert (logits - with_adapter).abs().max() <= 1e-5 and (logits - merged).abs().max() <= 1e-6


@pytest.mark.parametrize("which", ["baseline", "tp2_sp", "lora_zero1", "lora_zero3"])
def test_two_halves_are_one_run_bit_for_bit(runs, which):
    kind, layout = ("lora_", which[5:]) if which.startswith("lora_") else ("", which)
    whole, halves = runs / f"{kind}whole" / layout, runs / f"{kind}halves" / layout
    first, second = losses(whole), losses(halves)
    assert len(first) == 8 and all(first[s][key] == second[s][key] for s in first for key in ("loss", "grad_norm", "lr"))
    assert_same_state(whole, halves, 8)


def test_a_run_that_gets_worse_ends_early_and_stays_ended(runs):
    values = {step: line["valid_loss"] for step, line in valids(runs / "patient").items()}
    best = min(values, key=values.get)
    assert max(losses(runs / "patient")) == max(values) == best + 2 < 20
    assert json.loads((runs / "patient/hf/twinstack.json").read_text())["step"] == best


def test_sigterm_saves_and_the_same_command_continues(configs, tmp_path):
    out = tmp_path / "out"
    command = ["bash", str(launch_script("megatron", "finetune")), str(configs["sft", "tiny"]), str(out)]
    env = os.environ | {"NPROC": "2", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "megatron.tp=2", "train.steps=1000000"], env=env)
    while process.poll() is None and not ((out / "metrics.jsonl").exists() and len(losses(out)) > 2):
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 143
    done = losses(out)
    assert (out / f"step_{len(done)}").is_dir() and not (out / "eval.json").exists()

    subprocess.run([*command, "megatron.tp=2", f"train.steps={len(done) + 2}"], env=env, check=True)
    assert {step: losses(out)[step] for step in done} == done and max(losses(out)) == len(done) + 2
    assert (out / "hf/twinstack.json").exists() and (out / "eval.json").exists()


def test_a_run_moves_from_stack_to_stack(runs, reference):
    loss, norm = farthest(runs / "moved", reference["sft_tiny"])
    assert loss <= LOSS and norm <= NORM


# ---- conversations ---------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "how are you"}, {"role": "assistant", "content": " fine"},
    {"role": "user", "content": "and now"}, {"role": "assistant", "content": "so so \n"},
]  # fmt: skip
# what each part of the text is: the assistant's or not, written out by hand
PARTS = [
    ("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n", False),
    (" fine<|im_end|>", True),
    ("\n<|im_start|>user\nand now<|im_end|>\n<|im_start|>assistant\n", False),
    ("so so \n<|im_end|>", True),
    ("\n", False),
]
MARKED = (  # the same by {% generation %} marks
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_answers_count_and_nothing_else(folders, template):
    loaded = tokenizer.load(folders["tiny_llama"])
    loaded.config["chat_template"] = template
    [(ids, is_target)] = samples.Template(loaded, "here").encode([CHAT], ["line 1"])
    words = AutoTokenizer.from_pretrained(folders["tiny_llama"])
    expected = [(i, is_target) for text, is_target in PARTS for i in words(text, add_special_tokens=False)["input_ids"]]
    assert list(zip(ids.tolist(), is_target.tolist(), strict=True)) == expected
    assert words.decode(ids[is_target]) == " fine<|im_end|>so so \n<|im_end|>"


def test_the_default_template(folders):
    loaded = tokenizer.load(folders["tiny"])
    template = samples.Template(loaded, "here")
    [(ids, is_target)] = template.encode([CHAT[1:3]], ["line 1"])
    assert loaded.decode(ids) == "### user\nhow are you\n### assistant\n fine<|endoftext|>\n"
    assert loaded.decode(ids[is_target]) == " fine<|endoftext|>"


def test_a_template_that_rewrites_is_refused(folders):
    loaded = tokenizer.load(folders["tiny_llama"])
    loaded.config["chat_template"] = "{% for m in messages %}{{ m['content'] if loop.last else '...' }}{% endfor %}"
    with pytest.raises(BadInput, match="line 1: the chat template of here rewrites earlier messages"):
        samples.Template(loaded, "here").encode([CHAT], ["line 1"])


ODD = {
    "marks": (MARKED.replace(" + '<|im_end|>' }}{% endgen", " }}{% endgen"),
              [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]),
    "begins": ("{% if messages[0]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}{% for m in messages %}"
               "{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}{% if messages | length == 1 %}"
               "{{ raise_exception('no answer yet') }}{% endif %}",
               [{"role": "user", "content": "a"}, {"role": "assistant", "content": "list"}]),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_no_conversation_ends_a_run_badly(name, configs, folders, data, tmp_path):
    """Answers come after all training: what cannot be asked is left out."""
    template, chat = ODD[name]
    lines = [json.dumps({"messages": chat}), (data / "sft/valid.jsonl").read_text().splitlines()[1]]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "valid.jsonl").write_text("\n".join(lines if name == "marks" else lines[:1]))
    cfg = config.load(configs["sft", "tiny_llama"], [f"task.data={tmp_path}"], finetune.Config)
    loaded = tokenizer.load(folders["tiny_llama"])
    loaded.config["chat_template"] = template
    assert len(finetune.questions(cfg, samples.Template(loaded, "here"))) == (name == "marks")


def stream(configs, kind: str, arch: str, overrides: Sequence[str] = (), shuffle: bool = True) -> samples.Packed:
    cfg = config.load(configs[kind, arch], overrides, finetune.Config)
    return finetune.dataset(cfg, "train", shuffle)


def test_only_the_stack_that_asks_for_one_length_pads_to_it(configs):
    """megatron.* is of no concern to the other stacks."""
    overrides = ["data.pack=false", "megatron.tp=2", "megatron.sequence_parallel=true"]
    cfg = config.load(configs["sft", "tiny"], overrides, finetune.Config)
    lengths = {
        name: max(finetune.dataset(cfg, "train", True, name).collate(np.array([i]))["tokens"].shape[1] for i in range(8))
        for name in ("baseline", "deepspeed", "megatron")
    }
    assert lengths["megatron"] == cfg.data.seq_len + 1  # inputs, and the last target
    assert lengths["baseline"] == lengths["deepspeed"] <= cfg.data.seq_len


def test_a_conversation_does_not_see_its_neighbours(configs, folders):
    """Losses of each token, packed and alone; and packed without the bounds they differ."""
    net = AutoModelForCausalLM.from_pretrained(folders["tiny"]).eval()
    packed = stream(configs, "sft", "tiny")
    busiest = max(range(len(packed)), key=lambda i: len(packed.pieces[i]))
    assert len(packed.pieces[busiest]) >= 3
    packed.shuffle = False

    def of(rows: dict) -> torch.Tensor:
        batch = task.make_batch(rows, "cpu")
        with torch.no_grad():
            return F.cross_entropy(net(**task.model_inputs(batch)).logits[0], batch["targets"][0], reduction="none")

    rows = packed.collate([busiest])
    together, at = of(rows), 0
    blind = of({name: values for name, values in rows.items() if name not in ("segment", "position")})
    for begin, end in packed.pieces[busiest]:
        ids = torch.from_numpy(packed.ids[begin:end].astype(np.int64))[None]
        with torch.no_grad():
            alone = F.cross_entropy(net(ids[:, :-1]).logits[0], ids[0, 1:], reduction="none")
        here = slice(at, at + len(alone))
        assert (together[here] - alone).abs().max() <= 2e-6
        assert at == 0 or (blind[here] - alone).abs().max() > 1e-3
        at += end - begin


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_best_fit_puts_each_once_and_overfills_none(lengths: list[int]):
    groups = samples.best_fit(lengths, 40)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in group) for group in groups]
    assert max(filled) <= 40
    assert all(a + b > 40 for k, a in enumerate(filled) for b in filled[k + 1 :])  # no two could have been one


def test_an_epoch_has_each_conversation_once(configs):
    packed = stream(configs, "sft", "tiny_llama")
    every = sorted(tuple(packed.ids[b:e].tolist()) for row in packed.pieces for b, e in row)
    assert len(packed.pieces) < len(every) - 10
    for epoch in (0, 3):
        ids_seen, targets = [], 0
        for number in range(epoch * len(packed), (epoch + 1) * len(packed)):
            rows, pieces = packed.collate([number]), packed.pieces[packed.indices([number])[0]]
            row_ids = [packed.ids[b:e] for b, e in pieces]
            total = sum(map(len, row_ids))
            assert rows["tokens"][0, :total].tolist() == np.concatenate(row_ids).tolist()
            positions = np.concatenate([np.arange(len(ids)) for ids in row_ids])[:SEQ]
            assert rows["position"][0, : len(positions)].tolist() == positions.tolist()
            assert rows["lengths"][0] == min(total, SEQ) and not rows["loss_mask"][0, total - 1 :].any()
            ids_seen += [tuple(ids.tolist()) for ids in row_ids]
            targets += int(rows["loss_mask"].sum())
        assert sorted(ids_seen) == every and targets == packed.is_target.sum()
    order = [packed.indices(range(e * len(packed), (e + 1) * len(packed))).tolist() for e in (0, 1)]
    assert sorted(order[0]) == sorted(order[1]) and order[0] != order[1]


def test_windows_predict_each_token_once(configs):
    for more in ([], ["data.reset_attention=true"]):
        packed = stream(configs, "lm", "tiny", more)
        packed.shuffle = False
        rows = packed.collate(range(len(packed)))
        predicted = np.concatenate([t[1:][m] for t, m in zip(rows["tokens"], rows["loss_mask"], strict=True)])
        assert predicted.tolist() == packed.ids[1:].tolist()
        if more:
            ends = rows["tokens"][:, :-1] == 0  # <|endoftext|> of the test corpus
            inside = np.arange(SEQ) < rows["lengths"][:, None] - 1
            after = (ends & inside)[:, :-1]
            assert after.any() and (rows["position"][:, 1:][after] == 0).all()
            assert (np.diff(rows["segment"], axis=1)[:, : SEQ - 1][after] == 1).all()


def test_a_dev_set_is_drawn_where_there_is_none(configs, data, tmp_path):
    (tmp_path / "train.jsonl").write_text((data / "sft/train.jsonl").read_text())
    more = [f"task.data={tmp_path}", "data.pack=false"]
    train, valid = stream(configs, "sft", "tiny", more), stream(configs, "sft", "tiny", more, shuffle=False)
    whole = stream(configs, "sft", "tiny", ["data.pack=false"])
    assert (len(train), len(valid)) == (67, 4)
    parts = [sorted(tuple(p.ids[b:e].tolist()) for row in p.pieces for b, e in row) for p in (train, valid, whole)]
    assert sorted(parts[0] + parts[1]) == parts[2]
    note = f"task.data has no 'valid': 4 of 71 of train, drawn with seed {samples.VALID_SEED}, take its place"
    assert note in train.notes


def test_a_dataset_of_the_hub(configs, monkeypatch):
    """Its splits by name, a configuration behind a colon; without network one line says so."""
    rows = [{"messages": chat} for chat in chats(5, 6)]
    asked = []

    def load_dataset(name: str, part: str | None, split: str) -> list[dict]:
        asked.append((name, part, split))
        return rows

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, part: ["train", "validation", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = [stream(configs, "sft", "tiny", ["task.data=someone/chats:short"], shuffle) for shuffle in (True, False)]
    assert asked == [("someone/chats", "short", "train"), ("someone/chats", "short", "validation")]
    assert all(sum(len(row) for row in packed.pieces) == 5 for packed in splits)

    def no_network(name: str, part: str | None) -> list[str]:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "get_dataset_split_names", no_network)
    with pytest.raises(BadInput, match="task.data=someone/chats: no such folder, and the hub did not provide it: no route"):
        stream(configs, "sft", "tiny", ["task.data=someone/chats"])


def test_a_byte_order_mark_is_no_text(configs, data, tmp_path):
    """Of conversations, texts and JSON lines, and of what evaluation reads."""
    texts = {"lm/train.txt": "A text behind a byte order mark.\r\n" * 40, "lm/valid.txt": "A text\n" * 9}
    texts |= {f"sft/{name}.jsonl": (data / f"sft/{name}.jsonl").read_text() for name in ("train", "valid")}
    streams = {}
    for encoding in ("utf-8", "utf-8-sig"):
        for name, text in texts.items():
            path = tmp_path / encoding / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode(encoding))
        for kind in ("sft", "lm"):
            streams[encoding, kind] = stream(configs, kind, "tiny", [f"task.data={tmp_path / encoding / kind}"])
    for kind in ("sft", "lm"):
        assert streams["utf-8", kind].content_hash == streams["utf-8-sig", kind].content_hash
    assert evaluate.read_nonblank(tmp_path / "utf-8-sig/lm/train.txt") == texts["lm/train.txt"]
    assert sources.read_text(tmp_path / "utf-8-sig/lm/train.txt", sources.Errors()) == texts["lm/train.txt"]  # of the builders
    (tmp_path / "lambada.jsonl").write_text('{"text": "two words"}\n', encoding="utf-8-sig")
    assert language.lambada(tmp_path / "lambada.jsonl") == ["two words"]


def test_what_is_cut_or_left_out_is_told(configs, tmp_path):
    lines = [json.dumps({"prompt": "value " * n, "response": r}) for n, r in ((2, "list"), (2, "list " * 90), (90, "list"))]
    lines.append(json.dumps({"prompt": "is it <|endoftext|>", "response": "yes"}))
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    packed = stream(configs, "sft", "tiny", [f"task.data={tmp_path}"])
    notes = "\n".join(packed.notes)
    assert "1 of 4 conversations are longer than data.seq_len=96 and are truncated" in notes
    assert "1 of 4 conversations are left out: no answer begins within data.seq_len=96" in notes
    assert "1 of 4 conversations are left out: a message contains a special token" in notes
    assert sum(len(row) for row in packed.pieces) == 2


def test_answers_without_an_end_mark_are_told(configs, folders):
    loaded, chat = tokenizer.load(folders["tiny_llama"]), CHAT[1:3]
    for template, has_note in ((CHATML, False), (CHATML.replace("+ '<|im_end|>' ", ""), True), (MARKED, False)):
        loaded.config["chat_template"] = template
        cfg = config.load(configs["sft", "tiny_llama"], [], finetune.Config)
        *_, notes = finetune._conversations(cfg, samples.Documents([chat], ["line 1"], []), loaded, "here")
        assert any("1 of 1 conversations end without a special token" in note for note in notes) == has_note


def test_conversations_of_sharegpt():
    turns = [{"from": "system", "value": "be kind"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    chat = [
        dict(zip(("role", "content"), turn, strict=True)) for turn in (("system", "be kind"), ("user", "a"), ("assistant", "b"))
    ]
    assert samples._conversation({"conversations": turns}, "line 1") == chat
    assert samples._conversation({"conversations": chat}, "line 1") == chat
    for bad, message in (
        ([{"from": "bot", "value": "a"}], "role 'bot'"),
        ([{"from": "gpt"}], "content null"),
        (5, "must be a list"),
    ):
        with pytest.raises(BadInput, match=message):
            samples._conversation({"conversations": bad}, "line 1")


# ---- bad input -------------------------------------------------------------------------------------------------------

HOSTILE = {
    "divides": ("{{ 1 / 0 }}", "line 1: the chat template of here refuses it: division by zero"),
    "power": ("{{ 10 ** (10 ** 9) }}", "the chat template of here takes more than 5 s for a conversation"),
    "memory": ("{{ 'a' * 10 ** 9 }}", "refuses it: MemoryError"),
    "range": ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses it: Range too big"),
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 5 s"),
    "macro": ("{% macro a(n) %}{{ a(n) }}{{ a(n) }}{% endmacro %}{{ a(1) }}", "refuses it: maximum recursion depth"),
    "doubles": ("{% set n = namespace(s='ab') %}{% for i in range(64) %}{% set n.s = n.s + n.s %}{% endfor %}", "MemoryError"),
    "escapes": ("{{ ().__class__.__base__.__subclasses__() }}", "refuses it"),
    "unclosed": ("{% for m in messages %}", "refuses it: Unexpected end of template"),
    "name": ("{{ nothing.there.at.all }}", "refuses it"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_line_in_bounded_time(name, folders, monkeypatch):
    template, message = HOSTILE[name]
    loaded = tokenizer.load(folders["tiny_llama"])
    loaded.config["chat_template"] = template
    if "5 s" in message:
        monkeypatch.setattr(limited_process, "SECONDS", 0.5)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(BadInput, match=re.escape(message.replace("5 s", "0.5 s"))) as refused:
        samples.Template(loaded, "here").encode([CHAT], ["line 1"])
    assert len(refused.value.problems) == 1 and "\n" not in refused.value.problems[0]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3  # of CPU: the machine may be busy


GOOD = '{"prompt": "a", "response": "b"}'
DAMAGED = {
    "json": ('{"messages": [', "train.jsonl:2: is not JSON"),
    "keys": ('{"question": "a"}', "train.jsonl:2: has neither `messages` nor `prompt` and `response`"),
    "role": ('{"messages": [{"role": "bot", "content": "a"}]}',
             "train.jsonl:2: message 0 has role 'bot'; a role is one of system, user, assistant"),
    "content": ('{"messages": [{"role": "assistant", "content": null}]}',
                "train.jsonl:2: message 0 (assistant) has content null; it must be a text"),
    "no_answer": ('{"messages": [{"role": "user", "content": "a"}]}', "train.jsonl:2: has no assistant message"),
    "nested": ("[" * 100_000, "train.jsonl:2: is not JSON"),
    "half": ('{"prompt": "a", "response": "\\ud83d"}', "contains half of a surrogate pair"),
    "none": ('{"messages": []}', "train.jsonl:2: `messages` must be a list of messages"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_lines_that_are_no_conversations(name, configs, tmp_path):
    line, message = DAMAGED[name]
    (tmp_path / "train.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(BadInput, match=re.escape(message)):
        stream(configs, "sft", "tiny", [f"task.data={tmp_path}"])


def test_an_empty_file_and_one_too_long(configs, tmp_path):
    long = json.dumps({"prompt": "a " * 200, "response": "b"})
    for text, message in (("\n", "train.jsonl: is empty"), (long, "no conversation is left")):
        for name in ("train", "valid"):
            (tmp_path / f"{name}.jsonl").write_text(text)
        with pytest.raises(BadInput, match=message):
            stream(configs, "sft", "tiny", [f"task.data={tmp_path}"])


REFUSED = [
    (["task.name=chat"], "task.name=\"chat\": should be 'lm' or 'sft'"),
    (["task.data=nowhere"], "task.data=nowhere: no such folder; give one with train.jsonl, or a dataset on the hub"),
    (["task.data=recipes"], "task.data=recipes: has no 'train'; it has nothing to read; give data.train"),
    (["data.seq_len=4096"], "model.positions=96 is below data.seq_len=4096"),
    (["model.layers=3"], "has n_layer=4, the model gives 3"),
    (["init.from=scratch", "model={layers: 4, hidden: 64, heads: 4}"], "data.tokenizer: is missing"),
    (["init.from=nowhere", "model={layers: 4, hidden: 64, heads: 4}"], "init.from=nowhere: no config.json there"),
    (["lora={rank: 4}"], "lora on megatron: Megatron Core fuses query, key and value"),
    (["lora={targets: [q_proj]}"], "lora.targets: the model has no linear layer 'q_proj'; it has c_attn, c_proj, c_fc"),
    (["lora={rnk: 4}"], "lora.rnk: unknown key; did you mean 'rank'?"),
]


@pytest.mark.parametrize("row", REFUSED, ids=[row[0][0] for row in REFUSED])
def test_what_is_refused(row, configs, tmp_path):
    words, message = row
    script = str(launch_script("megatron", "finetune"))
    command = ["bash", script, str(configs["sft", "tiny"]), str(tmp_path / "out"), *words]
    env = os.environ | {"NPROC": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "out").exists(), done.stderr
    assert message in done.stderr, done.stderr


def test_a_folder_without_a_tokenizer_is_refused(folders, configs, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((folders["tiny"] / file).read_bytes())
    with pytest.raises(BadInput, match="no tokenizer there; give a folder with tokenizer.json"):
        stream(configs, "sft", "tiny", [f"init.from={folder}"])


# ---- the scripts -----------------------------------------------------------------------------------------------------


def test_the_scripts_read_as_their_siblings():
    for stack in families.stacks("gpt"):
        folder = ROOT / "recipes/gpt" / stack
        scripts = [(folder / f"{kind}.py").read_text() for kind in ("pretrain", "finetune")]
        banners = [re.findall(r"^    # ---- (\w+)$", text, re.M) for text in scripts]
        assert banners[0] == banners[1] and len(banners[0]) == 8
        assert (folder / "finetune.sh").read_text() == (folder / "pretrain.sh").read_text().replace("pretrain", "finetune")


def test_conversations_of_the_library(tmp_path):
    done = subprocess.run([sys.executable, "-m", "data.python_chat", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    splits = {name: samples.read("sft", "-", tmp_path, "train", "valid", name == "train") for name in ("train", "valid")}
    assert len(splits["train"].documents) > 2000 and not splits["train"].notes
    assert len(splits["valid"].documents) == -(-(len(splits["train"].documents) + len(splits["valid"].documents)) // 20)
    chats = [chat for one in splits.values() for chat in one.documents]
    asked = {chat[0]["content"]: chat[1]["content"] for chat in chats}
    assert asked["What does textwrap.wrap do?"].startswith("Wrap a single paragraph of text")
