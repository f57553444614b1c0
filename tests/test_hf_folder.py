"""Hugging Face folders to begin from: another model than config.json says, tensors that nobody takes, damaged files.

The oracle is transformers on the folder itself: what is accepted gives its logits, all else is refused.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file

from common.errors import BadInput
from common.huggingface import hf_folder, pretrained
from common.training import init

SEED = 1234
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 16},
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "max_position_embeddings": 16},
    "megatron-bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "max_position_embeddings": 16},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "t5_v1_1": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4,
                "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
}  # fmt: skip
CLASSES = {
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "bert": "BertForPreTraining",
    "megatron-bert": "MegatronBertForPreTraining", "t5": "T5ForConditionalGeneration", "t5_v1_1": "T5ForConditionalGeneration",
}  # fmt: skip


def task_of(arch: str) -> ModuleType:
    family = "gpt" if arch in ("gpt2", "llama") else "t5" if arch.startswith("t5") else "bert"
    return importlib.import_module(f"recipes.{family}.task")


def stored(arch: str, **changes: Any) -> dict[str, Any]:
    """The content of a config.json."""
    hf_config = {"model_type": "t5" if arch == "t5_v1_1" else arch, "architectures": [CLASSES[arch]], "vocab_size": 64}
    return hf_config | SIZES[arch] | changes


def network(hf_config: dict[str, Any], std: float = 0.15) -> Any:
    """The model that transformers builds of a config.json, its weights drawn wide so that a wrong formula shows."""
    torch.manual_seed(0)
    of = getattr(transformers, hf_config["architectures"][0])
    net = of(of.config_class(**{k: v for k, v in hf_config.items() if k != "model_type"}))
    untied = hf_config["model_type"] == "t5" and hf_config.get("tie_word_embeddings") is False
    if untied:
        net.lm_head.weight = torch.nn.Parameter(torch.empty_like(net.shared.weight))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, std) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def folder_of(path: Path, hf_config: dict[str, Any], net: Any = None) -> Path:
    """A Hugging Face folder with this config.json and these weights."""
    net = network(hf_config) if net is None else net
    named = {name: p.detach().clone() for name, p in net.named_parameters()}  # a tied one once
    path.mkdir(parents=True, exist_ok=True)
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(hf_config))
    return path


def change(path: Path, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Path:
    """edit(config, tensors) of a folder."""
    hf_config, named = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    edit(hf_config, named)
    (path / "config.json").write_text(json.dumps(hf_config))
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, path / "model.safetensors")
    return path


def logits(folder: Path, of: str) -> list[torch.Tensor]:
    """What plain transformers computes."""
    # return_dict=False: some classes of transformers cannot be called any more
    net = getattr(transformers, of).from_pretrained(folder, dtype=torch.float32, return_dict=True).eval()
    length = min(8, getattr(net.config, "max_position_embeddings", None) or 8)
    ids = torch.arange(3 * length).view(3, length) * 7 % min(64, net.config.vocab_size)
    given = {"decoder_input_ids": ids.flip(0)} if of.startswith("T5") else {}
    with torch.no_grad():
        out = net(input_ids=ids, **given)
    if "prediction_logits" in out:
        return [out.prediction_logits, out.seq_relationship_logits]
    return [out.logits]


def exported(folder: Path, out: Path, task: ModuleType) -> tuple[Path, str]:
    """What from-hf and to-hf make of a folder, and the class that loads it; BadInput where it is refused."""
    model, _ = hf_folder.model_in(folder, task, SEED)
    scratch = init.scratch(SEED, lambda name: task.initializer(model, name))
    source = init.from_hf(folder, task.stored_names, task.optional_prefixes(model), scratch)
    out.mkdir(parents=True, exist_ok=True)
    named = {name: source(name, shape).clone() for name, shape in task.parameter_shapes(model).items()}
    save_file(named, out / "model.safetensors", metadata={"format": "pt"})
    hf_config = task.hf_config(model).to_dict() | task.hf_config_overrides(model)
    (out / "config.json").write_text(json.dumps(hf_config | {"architectures": [task.hf_class_name(model)]}))
    return out, task.hf_class_name(model)


def refusal(folder: Path, task: ModuleType) -> list[str]:
    with pytest.raises(BadInput) as refused:
        hf_folder.model_in(folder, task, SEED)
    return refused.value.problems


# ---- config.json -----------------------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}  # fmt: skip


def _codes(to: torch.dtype, scale: str, quantization: dict[str, Any]) -> Callable:
    def edit(hf_config: dict[str, Any], named: dict[str, torch.Tensor]) -> None:
        for name in [name for name in named if "_proj.weight" in name]:
            named[name + scale] = named[name].abs().amax(1)
            named[name] = (named[name] / named[name].abs().max() * 100).to(to)
        hf_config |= quantization

    return edit


FP8 = {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}
INT8 = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
OTHER_MODELS = {  # name: (arch, what its config.json says, edit, words of the refusal)
    "llama3 rope, older spelling": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}, None, "rope_type': 'llama3'"),
    "linear rope, older spelling": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, None, "rope_type': 'linear'"),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, None, "linear"),
    "fp8": ("llama", {}, _codes(torch.float8_e4m3fn, "_scale", FP8), "quantized weights (quantization_config in its config"),
    "fp8, not said": ("llama", {}, _codes(torch.float8_e4m3fn, "_scale", {}), "proj.weight_scale, which this model does not"),
    "int8": ("llama", {}, _codes(torch.int8, ".SCB", INT8), "quantized weights (quantization_config in its config.json, 'bits"),
    "int8 alone": ("llama", {}, lambda s, n: n.update({k: t.to(torch.int8) for k, t in n.items() if "o_proj" in k}),
                   "o_proj.weight is I8; weights must be F32, BF16, F16 or F64, not codes (and 1 more)"),
    "unscaled attention": ("gpt2", {"scale_attn_weights": False}, None, "has scale_attn_weights=False, the model gives True"),
    "untied": ("gpt2", {"tie_word_embeddings": False}, None, "has tie_word_embeddings=False, the model gives True"),
    "a scale by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, None, "has scale_attn_by_inverse_layer_idx=True"),
    "gated and tied, older spelling": ("t5_v1_1", {"tie_word_embeddings": True}, None, "has scale_decoder_outputs=True"),
    "a key of another class": ("llama", {"logit_scale": 0.5}, None, "has logit_scale=0.5, which this model does not know"),
    "layers that differ": ("llama", {"per_layer_config": {"0": {"num_key_value_heads": 4}}}, None, "per_layer_config"),
    "a window": ("llama", {"sliding_window": 4}, None, "has sliding_window=4, which this model does not know"),
    "dtype": ("gpt2", {"torch_dtype": "int8"}, None, "has dtype='int8'; weights must be one of float64, float32"),
    "ids of T5": ("t5", {"eos_token_id": 2}, None, "has eos_token_id=2, the model gives 1"),
    "beginning of T5": ("t5", {"decoder_start_token_id": 3}, None, "has decoder_start_token_id=3, the model gives 0"),
    "a decoder": ("bert", {"is_decoder": True}, None, "has is_decoder=True, the model gives False"),
    "pruned": ("bert", {"pruned_heads": {"0": [1]}}, None, "has pruned_heads={'0': [1]}"),
    "a word for a number": ("gpt2", {"layer_norm_epsilon": "x"}, None, "its config.json gives norm_eps='x'"),
    "a list for a number": ("gpt2", {"attn_pdrop": [1]}, None, "transformers cannot read its config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_another_model_is_refused_by_both_doors(name: str, tmp_path: Path) -> None:
    arch, hf_config, edit, words = OTHER_MODELS[name]
    hf_config = stored(arch, **hf_config)
    sound = stored(arch)
    folder = folder_of(tmp_path / "hf", hf_config, network(sound))
    if edit:
        change(folder, edit)
    refused = refusal(folder, task_of(arch))
    assert any(words in line for line in refused), refused
    if "give" not in words:
        theta = {"rope_theta": hf_config["rope_theta"]} if "rope_theta" in hf_config else {}  # model.* says it
        model = task_of(arch).model_from_hf_config(sound | theta)
        problems, notes = [], []
        problems += hf_folder.check(folder, "init.from=hf", _config(model), task_of(arch), notes)
        assert [line.partition(": ")[2] for line in problems] == [line.partition(": ")[2] for line in refused] and not notes


def _config(model: Any) -> Any:
    return type("Config", (), {"model": model, "task": type("Task", (), {"name": "classify"})()})()


PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {  # what published folders say beside their shapes
    "gpt2": ("gpt2", {
        "activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 6, "embd_pdrop": 0.1, "eos_token_id": 6,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 16, "resid_pdrop": 0.1, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}),
    "llama 2": ("llama", {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "initializer_range": 0.02, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True}),
    "smollm 2": ("llama", {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": [0, 2], "is_llama_config": True,
        "mlp_bias": False, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers.js_config": {"dtype": "q4"}, "use_cache": True}),
    "bert": ("bert", {
        "attention_probs_dropout_prob": 0.1, "classifier_dropout": None, "directionality": "bidi",
        "gradient_checkpointing": False,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform", "position_embedding_type": "absolute",
        "type_vocab_size": 2, "use_cache": True}),
    "t5": ("t5", {
        "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06, "n_positions": 512, "output_past": True, "pad_token_id": 0,
        "relative_attention_num_buckets": 32, "task_specific_params": {"summarization": {"num_beams": 4}}}),
    "flan-t5": ("t5_v1_1", {
        "dropout_rate": 0.1, "eos_token_id": 1, "is_encoder_decoder": True, "n_positions": 512, "output_past": True,
        "pad_token_id": 0, "relative_attention_max_distance": 128, "use_cache": True, "transformers_version": "4.23.1"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folders_are_computed_as_transformers_does(name: str, tmp_path: Path) -> None:
    arch, hf_config = PUBLISHED[name]
    folder = folder_of(tmp_path / "hf", stored(arch, **hf_config))
    _same_logits(folder, tmp_path / "out", task_of(arch), CLASSES[arch])


def _same_logits(folder: Path, out: Path, task: ModuleType, of: str) -> None:
    exported_logits = logits(*exported(folder, out, task))
    for a, b in zip(exported_logits, logits(folder, of), strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5


# ---- variations of every field ---------------------------------------------------------------------------------------

WORDS = (
    "relu",
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "silu",
    "gated-gelu",
    "gated-silu",
    "tanh",
    "absolute",
    "relative_key",
)
ROPES = (None, {"rope_type": "default", "rope_theta": 500.0}, {"type": "linear", "factor": 2.0}, {"rope_theta": 1e6}, LLAMA3,
         {"rope_type": "dynamic", "factor": 3.0}, {"rope_type": "yarn", "factor": 2.0})  # fmt: skip
LATER = ("rope_scaling", "rope_theta", "position_embedding_type", "torch_dtype", "sliding_window", "n_ctx", "head_dim",
         "scale_decoder_outputs", "dense_act_fn", "is_gated_act", "tie_word_embeddings", "partial_rotary_factor")  # fmt: skip


def another(rng: random.Random, name: str, value: Any) -> Any:
    if name in ("rope_parameters", "rope_scaling"):
        return rng.choice(ROPES)
    if "dtype" in name:
        return rng.choice(["float32", "float16", "bfloat16", "int8", None])
    if name in ("id2label", "label2id"):
        return {"0": "a", "1": "b", "2": "c"} if name == "id2label" else {"a": 0, "b": 1, "c": 2}
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([0, 1, 2, 3, value + 1, 2 * value, value // 2, 10**6])
    if isinstance(value, float):
        return rng.choice([0.0, value * 2, value / 2, 0.5, 1.0, 1.5, 1e-3])
    if isinstance(value, str):
        return rng.choice(WORDS)
    return rng.choice([True, 1, 3, 0.25, "gelu", {"a": 1}])


@pytest.mark.parametrize("arch", SIZES)
def test_variations_are_computed_as_transformers_does_or_refused(arch: str, tmp_path: Path) -> None:
    """One or two fields at a time, drawn from the class's own attributes and their older spellings."""
    rng, task, sound = random.Random(arch), task_of(arch), network(stored(arch))
    kind = type(sound.config)
    defaults = {f.name: getattr(sound.config, f.name, None) for f in dataclasses.fields(kind)} | {k: None for k in LATER}
    fields = sorted(defaults.keys() - {"architectures", "transformers_version"})
    accepted = 0
    for number in range(60):
        changes = {name: another(rng, name, defaults[name]) for name in rng.sample(fields, rng.choice([1, 1, 2]))}
        hf_config, net = stored(arch, **changes), sound
        with contextlib.suppress(Exception):  # where transformers cannot build it, it must be refused
            net = network(hf_config) if 10**6 not in changes.values() else sound
        folder = folder_of(tmp_path / str(number), hf_config, net)
        try:
            out, of = exported(folder, tmp_path / f"{number}_out", task)
        except BadInput as refused:
            assert all("\n" not in line and len(line) < 600 for line in refused.problems)
            continue
        accepted += 1
        for a, b in zip(logits(out, of), logits(folder, CLASSES[arch]), strict=True):
            assert a.shape == b.shape and (a - b).abs().max() <= 1e-5, changes
        shutil.rmtree(folder)
        shutil.rmtree(out)
    assert accepted >= 10  # else nothing is shown


# ---- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", SIZES)
def test_the_list_of_tensors_is_that_of_the_class(arch: str) -> None:
    """task.parameter_patterns, which needs no torch, against the parameters of the transformers class."""
    task = task_of(arch)
    model = task.model_from_hf_config(stored(arch))
    every = [model]
    if task.FAMILY == "bert":
        every.append(model.model_copy(update={"pair_head": False}))
    if task.FAMILY == "gpt":
        every.append(model.model_copy(update={"tied": True}))
    assert all(_whole(task, each) == task.parameter_shapes(each) for each in every)


@pytest.mark.parametrize("arch", ["bert", "megatron-bert"])
def test_the_list_of_tensors_with_the_heads_of_tasks(arch: str) -> None:
    from recipes.bert import finetune

    shapes = task_of(arch).model_from_hf_config(stored(arch)).model_dump(exclude={"pair_head"})
    for task_type in finetune.registry.HEADS:
        model = finetune.ResolvedModel(**shapes, task_type=task_type, labels=["a", "b"], pair_head=False)
        assert _whole(finetune, model) == finetune.parameter_shapes(model)


def _whole(task: ModuleType, model: Any) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, shape in task.parameter_patterns(model).items():
        layers = model.decoder_layers if name.startswith("decoder") else model.layers
        shapes |= {name.replace("*", str(i)): shape for i in range(layers if "*" in name else 1)}
    return shapes


def _rename(change_name: Callable[[str], str]) -> Callable:
    def edit(_: dict[str, Any], named: dict[str, torch.Tensor]) -> None:
        renamed = {change_name(name): tensor for name, tensor in named.items()}
        named.clear()
        named.update(renamed)

    return edit


def _add(**tensors: torch.Tensor) -> Callable:
    return lambda _, named: named.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


def _drop(*starts: str) -> Callable:
    return lambda _, named: [named.pop(name) for name in list(named) if name.startswith(starts)]


def _copy(name: str, of: str, edit: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Callable:
    return lambda _, named: named.update({name: edit(named[of])})


def _qk_norms(_: dict[str, Any], named: dict[str, torch.Tensor]) -> None:
    """As Qwen3 has them."""
    named |= {f"model.layers.{i}.self_attn.{one}_norm.weight": torch.ones(8) for i in (0, 1) for one in "qk"}


def _biases(_: dict[str, Any], named: dict[str, torch.Tensor]) -> None:
    named |= {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(32) for i in (0, 1)}


UNFIT = {  # name: (arch, edit, words of the refusal)
    "q and k norms": ("llama", _qk_norms, "holds model.layers.0.self_attn.k_norm.weight, which this model does not have; it is"
                      " a model of another architecture (and 3 more)"),
    "biases": ("llama", _biases, "holds model.layers.0.self_attn.q_proj.bias, which this model does not have"),
    "heads of AntiBERTy": ("bert", _add(cls__species__weight=torch.ones(5, 32)), "holds cls.species.weight, which this model"),
    "a reward model": ("gpt2", _add(score__weight=torch.ones(1, 32)), "holds score.weight, which this model does not have"),
    "a name twice": ("gpt2", _copy("wte.weight", "transformer.wte.weight"), "holds wte.weight, which this model does not have"),
    "an output of its own": ("gpt2", _copy("lm_head.weight", "transformer.wte.weight", lambda t: t + 1),
                             "its lm_head.weight is not its transformer.wte.weight, to which its config.json ties it"),
    "an output of T5's own": ("t5", _copy("lm_head.weight", "shared.weight", lambda t: t + 1), "its lm_head.weight is not its"),
    "an embedding for each stack": ("t5", _copy("decoder.embed_tokens.weight", "shared.weight", lambda t: t + 1),
                                    "its decoder.embed_tokens.weight is not its shared.weight"),
    "a part of a head": ("bert", _drop("cls.predictions.bias"), "holds no cls.predictions.bias; it is a model of another"),
    "no output": ("t5_v1_1", _drop("lm_head."), "holds no lm_head.weight; it is a model of another architecture"),
    "no norm": ("llama", _drop("model.layers.1.input_layernorm"), "holds no model.layers.1.input_layernorm.weight"),
    "a layer more": ("gpt2", _copy("transformer.h.2.ln_1.bias", "transformer.h.1.ln_1.bias"),
                     "its weights hold 3 layers (transformer.h.0 on), its config.json says 2; get it again"),
    "another shape": ("gpt2", _copy("transformer.ln_f.bias", "transformer.ln_f.bias", lambda t: t[:9]),
                      "transformer.ln_f.bias is (9,), its config.json says (32,)"),
    "whole numbers": ("gpt2", _copy("transformer.ln_f.bias", "transformer.ln_f.bias", torch.Tensor.long),
                      "its transformer.ln_f.bias is I64; weights must be F32, BF16, F16 or F64, not codes"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_tensors_that_nobody_takes_or_fills_are_refused(name: str, tmp_path: Path) -> None:
    arch, edit, words = UNFIT[name]
    folder = change(folder_of(tmp_path / "hf", stored(arch)), edit)
    refused = refusal(folder, task_of(arch))
    assert len(refused) == 1 and words in refused[0], refused
    model = task_of(arch).model_from_hf_config(stored(arch))
    problems = hf_folder.check(folder, str(folder), _config(model), task_of(arch), [])
    assert problems == refused


def _older_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


FIT = {  # name: (arch, edit)
    "masks of older versions": ("gpt2", _add(transformer__h__0__attn__bias=torch.ones(1, 1, 16, 16).byte())),
    "a model without its head": ("gpt2", _rename(lambda name: name.removeprefix("transformer."))),
    "a copy of the embedding": ("gpt2", _copy("lm_head.weight", "transformer.wte.weight")),
    "frequencies": ("llama", _add(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))),
    "norms of TensorFlow": ("bert", _rename(_older_norms)),
    "places": ("bert", _add(bert__embeddings__position_ids=torch.arange(16)[None])),
    "a copied bias": ("bert", _copy("cls.predictions.decoder.bias", "cls.predictions.bias")),
    "embeddings of both stacks": ("t5", lambda _, n: n.update({f"{s}.embed_tokens.weight": n["shared.weight"].clone()
                                                               for s in ("encoder", "decoder")})),
    "biases of Mesh TensorFlow": ("t5", _add(**{
        "decoder__block__0__layer__1__EncDecAttention__relative_attention_bias__weight": torch.ones(32, 4)})),
    "bf16": ("llama", lambda _, n: n.update({name: t.bfloat16() for name, t in n.items()})),
    "1.1 as transformers 5 saves it": ("t5_v1_1", lambda hf_config, _: hf_config.update(
        tie_word_embeddings=True, scale_decoder_outputs=False)),
    "fp64": ("t5_v1_1", lambda _, n: n.update({name: t.double() for name, t in n.items()})),
}  # fmt: skip


@pytest.mark.parametrize("name", FIT)
def test_copies_and_buffers_change_nothing(name: str, tmp_path: Path) -> None:
    arch, edit = FIT[name]
    folder = change(folder_of(tmp_path / "hf", stored(arch)), edit)
    _, notes = hf_folder.model_in(folder, task_of(arch), SEED)
    assert not notes
    _same_logits(folder, tmp_path / "out", task_of(arch), CLASSES[arch])


def test_what_begins_from_the_seed_and_what_is_not_used_is_noted_by_both_doors(tmp_path: Path) -> None:
    from recipes.bert import finetune, task

    whole = folder_of(tmp_path / "whole", stored("bert"))
    alone = shutil.copytree(whole, tmp_path / "alone")
    change(alone, _drop("cls.", "bert.pooler."))
    single = shutil.copytree(whole, tmp_path / "single")
    change(single, lambda hf_config, _: hf_config.update(architectures=["BertForMaskedLM"]))  # as google-bert/bert-base-uncased
    scored = shutil.copytree(whole, tmp_path / "scored")
    change(scored, _drop("cls."))
    change(scored, lambda hf_config, _: hf_config.update(architectures=["BertForSequenceClassification"]))
    change(scored, _add(classifier__weight=torch.ones(2, 32), classifier__bias=torch.ones(2)))
    missing = "holds no {}*; these parameters begin from {}"
    unused = "its {}* is not used: this model has no such head"
    wanted = {
        whole: [],
        alone: [missing.format(head, "SEED") for head in ("cls.predictions.", "cls.seq_relationship.", "bert.pooler.")],
        single: [unused.format(head) for head in ("cls.seq_relationship.", "bert.pooler.")],
        scored: [missing.format(head, "SEED") for head in ("cls.predictions.", "cls.seq_relationship.")]
        + [unused.format("classifier.")],
    }
    for folder, lines in wanted.items():
        model, notes = hf_folder.model_in(folder, task, SEED)
        assert notes == [f"{folder}: {line.replace('SEED', 'seed 1234')}" for line in lines]
        notes = []
        assert not hf_folder.check(folder, "init.from=hf", _config(model), task, notes)
        assert notes == [f"init.from=hf: {line.replace('SEED', 'train.seed')}" for line in lines]

    shapes = task.model_from_hf_config(stored("bert")).model_dump(exclude={"pair_head"})
    model = finetune.ResolvedModel(**shapes, task_type="sequence_classification", labels=["a", "b"], pair_head=False)
    replaced = model.model_copy(update={"new_head": True})
    pretraining = [unused.format(head) for head in ("cls.predictions.", "cls.seq_relationship.")]
    for begins, folder, lines in (
        (model, whole, [missing.format("classifier.", "train.seed"), *pretraining]),
        (
            model,
            scored,
            [
                "its head classifier.* is trained on; give model.new_head=true to initialize it from train.seed",
                "the labels of its head have no names (id2label): assumed to be a, b, in this order",
            ],
        ),
        (replaced, scored, ["its classifier.* is replaced; these parameters begin from train.seed"]),
    ):
        notes = []
        assert not hf_folder.check(folder, "hf", _config(begins), finetune, notes)
        assert notes == [f"hf: {line}" for line in lines]


def _shards(folder: Path) -> None:
    """model.safetensors in two parts and their index."""
    named = load_file(folder / "model.safetensors")
    names = sorted(named)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: named[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    folder, task = folder_of(tmp_path / "hf", stored("gpt2")), task_of("gpt2")
    _shards(folder)
    _same_logits(folder, tmp_path / "out", task, CLASSES["gpt2"])
    other = folder_of(tmp_path / "other", stored("gpt2"), network(stored("gpt2"), std=0.3))
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")  # counts more than an index beside it
    _same_logits(folder, tmp_path / "out", task, CLASSES["gpt2"])
    (folder / "model.safetensors").unlink()

    path = folder / "model-00002-of-00002.safetensors"
    named = load_file(path)
    save_file(named | {"transformer.h.0.attn.c_attn.bias": torch.ones(96)}, path)
    assert "transformer.h.0.attn.c_attn.bias is in model-00001-of-00002.safetensors and in model-0" in refusal(folder, task)[0]
    save_file({name: t for name, t in named.items() if "ln_f" not in name}, path)
    assert "model.safetensors.index.json differ in transformer.ln_f" in refusal(folder, task)[0]
    (folder / "model.safetensors.index.json").unlink()
    assert "no model.safetensors there and no model.safetensors.index.json" in refusal(folder, task)[0]
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    assert "model.safetensors.index.json is not an index of tensors" in refusal(folder, task)[0]
    (folder / "adapter_config.json").touch()
    assert "holds adapters (adapter_config.json)" in refusal(folder, task)[0]


# ---- evaluate and generate -------------------------------------------------------------------------------------------


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


LOADED = {  # name: (edit, words of the refusal)
    "as it is": (lambda hf_config, named: None, None),
    "q and k norms": (
        _qk_norms,
        "hold model.layers.0.self_attn.k_norm.weight and 3 more, for which the model of its config.json",
    ),
    "int8": (_codes(torch.int8, ".SCB", {}), "its model.layers.0.mlp.down_proj.weight is I8; weights must be F32, BF16, F16"),
    "quantized": (_codes(torch.int8, ".SCB", INT8), "holds quantized weights (quantization_config in its config.json"),
    "many layers": (
        lambda hf_config, _: hf_config.update(num_hidden_layers=10**9),
        "has num_hidden_layers=1000000000 in its config.json",
    ),
    "many labels": (lambda hf_config, _: hf_config.update(num_labels=10**9), "has num_labels=1000000000 in its config.json"),
    "many words": (lambda hf_config, _: hf_config.update(vocab_size=10**12), "values, its config.json says 64,000,000,015,520"),
}


@pytest.mark.parametrize("name", LOADED)
def test_evaluate_and_generate_load_what_transformers_has_a_place_for(name: str, tmp_path: Path) -> None:
    edit, words = LOADED[name]
    folder = change(folder_of(tmp_path / "hf", stored("llama")), edit)
    _tokenizer(folder)
    if words is None:
        assert pretrained.load(transformers.AutoModelForCausalLM, folder)[0].lm_head.weight.dtype == torch.float32
        return
    with pytest.raises(BadInput) as refused:
        pretrained.load(transformers.AutoModelForCausalLM, folder)
    assert len(refused.value.problems) == 1 and words in refused.value.problems[0], refused.value.problems


# ---- damaged folders -------------------------------------------------------------------------------------------------

ODD = (None, True, -1, 0, 10**9, 10**400, 1e308, float("nan"), "", "x" * 300, [], [[]] * 50, {}, {"a": {"b": []}}, "../../etc")


def damage(rng: random.Random, folder: Path) -> str:
    """Damage one file of a folder; says how."""
    names = sorted(path.name for path in folder.iterdir())
    path = folder / rng.choice(names)
    raw = bytearray(path.read_bytes())
    how = rng.choice(["cut", "bytes", "empty", "longer", "folder", "gone", "value", "header", "text"])
    is_json = path.suffix == ".json"
    if how == "cut":
        path.write_bytes(raw[: rng.randrange(len(raw))])
    elif how == "bytes":
        for _ in range(rng.randint(1, 20)):
            raw[rng.randrange(min(len(raw), 4000))] = rng.randrange(256)
        path.write_bytes(raw)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "longer":
        path.write_bytes(raw + rng.randbytes(rng.randint(1, 100)))
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "gone":
        path.unlink()
    elif how == "text":
        path.write_text(rng.choice(["[" * 100_000, '{"a":' * 100_000, "null", "{}", "[]", "\x00", '"x"', "{'a': 1}", "NaN"]))
    elif is_json:
        hf_config = json.loads(raw)
        inner = hf_config["weight_map"] if "weight_map" in hf_config and rng.random() < 0.9 else hf_config
        key = rng.choice([*inner, "num_labels", "id2label", "per_layer_config", "to_dict", "__class__", "self", "model_type"])
        inner[key] = rng.choice(ODD)
        path.write_text(json.dumps(hf_config))
        how = f"value {key}={str(inner[key])[:20]}"
    else:
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        if rng.random() < 0.2:
            damaged = struct.pack("<Q", rng.choice([0, 1, size - 1, size + 8, 2**40, 2**63])) + raw[8:]
        else:
            name = rng.choice([n for n in header if n != "__metadata__"])
            entry, key = header[name], rng.choice(["dtype", "shape", "data_offsets", "name"])
            if key == "name":
                header[rng.choice(["__metadata__", "x" * 300, "a.1.b", name + "\n"])] = header.pop(name)
            else:
                entry[key] = rng.choice([*ODD, "I8", "F8_E4M3", "F16", "U64", [0, 0], [2**62, 2**62], [1] * 64, [-1, 4]])
            text = json.dumps(header).encode()
            damaged = struct.pack("<Q", len(text)) + text + raw[8 + size :]
        path.write_bytes(damaged)
    return f"{path.name}: {how}"


def attempt(folder: Path, out: Path, arch: str, whole: bool) -> None:
    """Both readers and, if `whole`, the loading of scripts.evaluate and scripts.generate: BadInput or nothing."""
    task = task_of(arch)
    problems = hf_folder.check(folder, "init.from=hf", _config(task.model_from_hf_config(stored(arch))), task, [])
    lines = BadInput(problems).problems  # as the terminal shows them
    assert all("\n" not in line and len(line) < 1000 for line in lines), lines
    with contextlib.suppress(BadInput):
        exported(folder, out, task)
    if whole:
        of = getattr(transformers, CLASSES[arch])
        with contextlib.suppress(BadInput):
            pretrained.load(of, folder)


def _fuzz(tmp_path: Path, count: int) -> None:
    sound = {}
    for arch in SIZES:
        sound[arch] = folder_of(tmp_path / arch, stored(arch))
        if arch in ("llama", "bert"):
            _shards(sound[arch])
        _tokenizer(sound[arch])
        attempt(sound[arch], tmp_path / "out", arch, whole=True)
        assert pretrained.load(getattr(transformers, CLASSES[arch]), sound[arch])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    rng = random.Random(SEED)
    for number in range(count):
        arch = rng.choice(list(SIZES))
        folder = shutil.copytree(sound[arch], tmp_path / f"damaged_{number}")
        how = damage(rng, folder)
        begin = time.monotonic()
        try:
            attempt(folder, tmp_path / "out", arch, whole=number % 4 == 0)
        except Exception as error:
            raise AssertionError(f"case {number}, {arch}, {how}") from error
        assert time.monotonic() - begin < 10, (number, arch, how)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, (number, arch, how)
        shutil.rmtree(folder)


def test_damaged_folders_are_one_line_each(tmp_path: Path) -> None:
    _fuzz(tmp_path, 100)


@pytest.mark.slow
def test_a_thousand_damaged_folders_are_one_line_each(tmp_path: Path) -> None:
    _fuzz(tmp_path, 1000)


# ---- the commands ----------------------------------------------------------------------------------------------------

RUN = """\
model: {arch: llama, layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 48, vocab_size: 64, positions: 16, norm_eps: 1.0e-6}
data: {train: corpus/train, seq_len: 8}
init: {from: hf}
optim: {lr: 1.0e-3}
train: {steps: 2, global_batch: 2, dtype: fp32}
baseline: {micro_batch: 1}
"""
HOST = """\
import sys
from common import preflight
from common.errors import BadInput
from recipes.gpt import task
for start in sys.argv[1:]:
    try:
        preflight.prepare("run.yaml", "out", [f"init.from={start}"], "baseline", task, 1, dry_run=True)
        print("prepared")
    except BadInput as error:
        print(*error.problems, sep="\\n")
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_the_host_checks_a_folder_without_torch(tmp_path: Path) -> None:
    folder_of(tmp_path / "hf", stored("llama"))
    folder_of(tmp_path / "rope", stored("llama", rope_scaling={"type": "linear", "factor": 4.0}), network(stored("llama")))
    (tmp_path / "run.yaml").write_text(RUN)
    words = [sys.executable, "-c", HOST, "hf", "rope", "x" * 300]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert (
        first == "prepared"
        and second.startswith("init.from=rope: its config.json has rope_parameters={'")
        and "linear" in second
    )
    assert third.startswith("xxx") and "a name in it has 300 bytes" in third
