"""Every config: it loads, its model is as large as its source says, its layouts divide and fit."""

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from common import config
from common.config import Config
from common.errors import BadInput
from common.layout import layout_for
from common.planning import flops
from common.planning.hardware import gpu
from common.planning.memory import estimate_for
from common.training import optim

ROOT = Path(__file__).resolve().parent.parent
ALL = {f"{p.parts[-3]}/{p.stem}": p for p in sorted((ROOT / "recipes").glob("*/configs/*.yaml"))}
CONFIGS = {name: path for name, path in ALL.items() if "/finetune_" not in name}
FINETUNES = {name: path for name, path in ALL.items() if "/finetune_" in name}
OWN = ("tiny", "quickstart", "gutenberg")  # ours alone, of no source
PUBLISHED_CONFIGS = [name for name in CONFIGS if not name.partition("/")[2].startswith(OWN)]
GPUS = {"gpt/shakespeare_char_cpu": 1, "gpt/shakespeare_char_gpu": 1, "gpt/gpt3_175b": 768}  # the others: one node of 8
CARD = gpu("H100").memory
REFUSED = {("bert/lamb_44min", "megatron"): "optim.optimizer=lamb on megatron"}
ADAFACTOR = [name for name in PUBLISHED_CONFIGS if name.startswith("t5/t5_")]
REFUSED |= {(name, "megatron"): "optim.optimizer=adafactor on megatron" for name in ADAFACTOR}
REFUSED |= {
    (f"t5/{name}", "deepspeed"): "optim.optimizer=adafactor with deepspeed.zero_stage=3" for name in ("t5_11b", "t5_v1_1_xxl")
}
INSTEAD = (  # what the heads give where Adafactor is refused
    "optim.optimizer=adamw optim.lr=1e-4 optim.min_lr=1e-5 optim.schedule=linear optim.weight_decay=0.01 optim.grad_clip=1.0"
)

# name: (published count, its unit, what the source leaves out of our count, or counts that we do not have)
NANOGPT = "nanoGPT's model.py prints it: without position embeddings; its models have no biases"
GPT3 = "GPT-3 paper (arXiv:2005.14165) table 2.1; its vocabulary is 50,257, ours the padded 50,304"
MEGATRON = "Megatron-LM paper (arXiv:1909.08053) table 2; it counts 50,257 tokens, trains the padded 51,200"
BERT = "BERT paper (arXiv:1810.04805) section 3, in tens of millions: 110M and 340M; the encoder with its pooler, without heads"
MEGATRON_BERT = "Megatron-LM paper (arXiv:1909.08053) table 4; with both heads; 30,522 tokens, ours are the padded 30,592"
PILE_BERT = "Megatron-DeepSpeed, bert_with_pile/ds_pretrain_bert.sh; with both heads; 30,522 tokens, ours are the padded 30,592"
T5 = "google-t5 on the Hugging Face hub, the tensors of its checkpoints; the paper rounds (section 3.7)"
T5_V1_1 = "released_checkpoints.md of text-to-text-transfer-transformer: about 77, 250 and 800 million, 3 and 11 billion"
PUBLISHED = {
    "gpt/shakespeare_char_cpu": ("0.80", 1e6, NANOGPT),
    "gpt/shakespeare_char_gpu": ("10.65", 1e6, NANOGPT),
    "gpt/gpt2_124m": ("123.59", 1e6, NANOGPT),
    "gpt/megatron_355m": ("355", 1e6, MEGATRON),
    "gpt/megatron_2.5b": ("2.5", 1e9, MEGATRON),
    "gpt/megatron_8.3b": ("8.3", 1e9, MEGATRON),
    "gpt/gpt3_125m": ("125", 1e6, GPT3),
    "gpt/gpt3_350m": ("350", 1e6, GPT3),
    "gpt/gpt3_760m": ("760", 1e6, GPT3),
    "gpt/gpt3_1.3b": ("1.3", 1e9, GPT3),
    "gpt/gpt3_2.7b": ("2.7", 1e9, GPT3),
    "gpt/gpt3_6.7b": ("6.7", 1e9, GPT3),
    "gpt/gpt3_13b": ("13", 1e9, GPT3),
    "gpt/gpt3_175b": ("175", 1e9, GPT3),
    "gpt/llama_160m": ("162417408", 1, "JackFram/llama-160m, the sum over the shapes of its config.json"),
    "gpt/llama_1b": ("1100048384", 1, "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T, its safetensors on the hub"),
    "bert/bert_base": ("11", 1e7, BERT),
    "bert/bert_large": ("34", 1e7, BERT),
    "bert/megatron_336m": ("336", 1e6, MEGATRON_BERT),
    "bert/megatron_1.3b": ("1.3", 1e9, MEGATRON_BERT),
    "bert/megatron_3.9b": ("3.9", 1e9, MEGATRON_BERT),
    "bert/megatron_deepspeed_110m": ("110", 1e6, PILE_BERT),
    "bert/megatron_deepspeed_336m": ("336", 1e6, PILE_BERT),
    "bert/lamb_44min": ("34", 1e7, BERT + "; its own JSON has 119,547 rows in place of 30,522"),
    "t5/t5_small": ("60.5", 1e6, T5),
    "t5/t5_base": ("222.9", 1e6, T5),
    "t5/t5_large": ("737.7", 1e6, T5),
    "t5/t5_3b": ("2.85", 1e9, T5),
    "t5/t5_11b": ("11.3", 1e9, T5),
    "t5/t5_v1_1_small": ("77", 1e6, T5_V1_1),
    "t5/t5_v1_1_base": ("25", 1e7, T5_V1_1),
    "t5/t5_v1_1_large": ("8", 1e8, T5_V1_1),
    "t5/t5_v1_1_xl": ("3", 1e9, T5_V1_1),
    "t5/t5_v1_1_xxl": ("11", 1e9, T5_V1_1),
    "t5/nvidia_220m": ("22", 1e7, "Megatron-LM, examples/t5: 220M, of another vocabulary, with positions and biases"),
}


def family(name: str) -> Any:
    """The task module of a config's family."""
    return importlib.import_module(f"recipes.{name.partition('/')[0]}.task")


@cache
def load(name: str) -> Config:
    cfg = config.load(CONFIGS[name], [], family(name).Config)
    return config.resolve(cfg, family(name).ResolvedConfig, 256)  # 256: for the configs without a vocab_size


def phases(name: str) -> list[Config]:
    """The config of each phase of a run."""
    cfg = load(name)
    starts = [0, cfg.train.steps, *(changes["train.steps"] for changes in cfg.phases)]
    return [config.at_step(cfg, done) for done in starts[: 1 + len(cfg.phases)]]


def counted_as_published(name: str) -> int:
    """Our parameters counted as the source counts them."""
    model = load(name).model
    count, h = model.parameter_count(), model.hidden
    if name.startswith(("gpt/shakespeare", "gpt/gpt2")):
        biases = model.layers * (3 * h + h + 4 * h + h) + (2 * model.layers + 1) * h  # attention, MLP; LayerNorms
        return count - biases - model.positions * h
    if name.startswith(("gpt/megatron", "gpt/gpt3")):
        return count - (model.vocab_size - 50257) * h
    if name.startswith("bert/megatron"):
        return count - (model.vocab_size - 30522) * (h + 1)  # rows of the table; the MLM head's bias
    if name.startswith("bert/"):
        return count - (h * h + h + 2 * h + model.vocab_size) - (2 * h + 2)  # MLM head; the pair head's last layer
    return count


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_transformers_class(name: str) -> None:
    import torch

    model = load(name).model
    with torch.device("meta"):
        net = family(name).hf_model(model)
    assert sum(p.numel() for p in net.parameters()) == model.parameter_count()  # parameters() yields a tied weight once


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_parameters_are_those_published(name: str) -> None:
    digits, unit, source = PUBLISHED[name]
    count = counted_as_published(name)
    if name == "gpt/gpt3_350m":  # the only one whose name is not its count: 355.9 million, in every reading of its shapes
        assert count == 355_871_744
        return
    decimals = len(digits.partition(".")[2])
    assert f"{count / unit:.{decimals}f}" == digits, source


def test_the_differences_to_the_sources_are_the_stated_ones() -> None:
    assert load("gpt/gpt2_124m").model.parameter_count() - counted_as_published("gpt/gpt2_124m") == 102_144 + 1024 * 768
    assert "102,144" in CONFIGS["gpt/gpt2_124m"].read_text()
    assert load("gpt/megatron_355m").model.parameter_count() - counted_as_published("gpt/megatron_355m") == 943 * 1024
    assert load("gpt/gpt3_175b").model.parameter_count() - counted_as_published("gpt/gpt3_175b") == 47 * 12288
    assert load("bert/megatron_3.9b").model.parameter_count() - counted_as_published("bert/megatron_3.9b") == 70 * 2561


@pytest.mark.parametrize(
    "name, encoder, whole",
    [("bert/bert_base", 109_482_240, 110_106_428), ("bert/bert_large", 335_141_888, 336_226_108)],
)
def test_bert_is_as_large_as_the_plain_class(name: str, encoder: int, whole: int) -> None:
    """Of transformers itself: `encoder` is what the paper counts, `whole` what is trained, with both heads."""
    import torch
    from transformers import BertForPreTraining

    with torch.device("meta"):
        net = BertForPreTraining(family(name).hf_config(load(name).model))
    assert sum(p.numel() for p in net.bert.parameters()) == counted_as_published(name) == encoder
    assert sum(p.numel() for p in net.parameters()) == load(name).model.parameter_count() == whole


@pytest.mark.parametrize(
    "name, paper, whole",
    [
        ("t5/t5_small", 60e6, 60_506_624),
        ("t5/t5_base", 220e6, 222_903_552),
        ("t5/t5_large", 770e6, 737_668_096),
        ("t5/t5_3b", 2.8e9, 2_851_598_336),
        ("t5/t5_11b", 11e9, 11_307_321_344),
        ("t5/t5_v1_1_small", None, 76_961_152),
        ("t5/t5_v1_1_base", None, 247_577_856),
        ("t5/t5_v1_1_large", None, 783_150_080),
        ("t5/t5_v1_1_xl", None, 2_849_757_184),
        ("t5/t5_v1_1_xxl", None, 11_135_332_352),
        ("t5/nvidia_220m", None, 222_903_552),
    ],
)
def test_t5_is_as_large_as_the_plain_class(name: str, paper: float | None, whole: int) -> None:
    """Of transformers itself, which ties the output to the embedding whatever its configuration says; and of the paper
    (arXiv:1910.10683, section 3.7), whose 770M counts the tied output too."""
    import torch
    from transformers import T5ForConditionalGeneration

    task, model = family(name), load(name).model
    with torch.device("meta"):
        net = T5ForConditionalGeneration(task.hf_config(model))
    counts = {key: p.numel() for key, p in net.named_parameters()}
    untied = model.vocab_size * model.hidden if model.arch == "t5_v1_1" else 0
    assert sum(counts.values()) + untied == model.parameter_count() == whole
    tables = [count for key, count in counts.items() if "relative_attention_bias" in key]
    assert tables == [32 * model.heads] * 2, "one for the encoder, one for the decoder, in their first layers"
    unpadded = model.model_copy(update={"vocab_size": 32_100})  # 32,000 and 100 sentinels
    assert whole - unpadded.parameter_count() == 28 * model.hidden * (2 if untied else 1)
    if paper:
        twice = model.vocab_size * model.hidden if name == "t5/t5_large" else 0
        assert whole + twice == pytest.approx(paper, rel=0.03)
        assert not twice or whole != pytest.approx(paper, rel=0.03)


@pytest.mark.parametrize("name", [n for n in PUBLISHED_CONFIGS if n.startswith(("gpt/megatron", "gpt/gpt3"))])
def test_parameters_follow_the_published_formula(name: str) -> None:
    """arXiv:2104.04473 equation 2, 12Lh^2 (1 + 13/(12h) + (V+s)/(12Lh)), which leaves out the last LayerNorm's 2h."""
    cfg = load(name)
    layers, h = cfg.model.layers, cfg.model.hidden
    formula = 12 * layers * h**2 + 13 * layers * h + (cfg.model.vocab_size + cfg.data.seq_len) * h
    assert cfg.model.parameter_count() - formula == 2 * h


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_the_layouts_divide_and_fit_an_80_gb_gpu(name: str) -> None:
    gpus, text = GPUS.get(name, 8), CONFIGS[name].read_text()
    for cfg in phases(name):
        for stack in config.STACKS:
            if (name, stack) in REFUSED:
                with pytest.raises(BadInput, match=REFUSED[name, stack]):
                    layout_for(cfg, stack, gpus)
                assert "is refused" in text.partition(f"\n{stack}:")[2], "the section says so"
                continue
            required = estimate_for(cfg, cfg.model, stack, gpus)["required"]
            too_large = stack == "baseline" and 16 * cfg.model.parameter_count() > 80e9
            assert (required > CARD) == too_large, (stack, required)
            assert not too_large or "does not fit" in text


@pytest.mark.parametrize("name", ADAFACTOR)
def test_the_heads_way_around_adafactor_fits(name: str) -> None:
    assert INSTEAD in CONFIGS[name].read_text().partition("model:")[0]
    overrides = INSTEAD.split()
    if load(name).phases:
        last = f"phases=[] train.steps={phases(name)[-1].train.steps}"
        assert last in CONFIGS[name].read_text().partition("model:")[0]
        overrides += last.split()
    if (name, "deepspeed") not in REFUSED:
        overrides.append("deepspeed.zero_stage=1")
    cfg = config.load(CONFIGS[name], overrides, family(name).Config)
    for stack in ("deepspeed", "megatron"):
        assert estimate_for(cfg, load(name).model, stack, 8)["required"] < CARD, stack


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_and_the_arithmetic_are_true(name: str) -> None:
    path = CONFIGS[name]
    text = path.read_text()
    assert str(path.relative_to(ROOT)) in text.partition("model:")[0], "the head gives the command"
    for cfg in phases(name):
        batch, length = cfg.train.global_batch, str(cfg.data.seq_len)
        if cfg.data.sample_tokens != cfg.data.seq_len:
            length = f"({length} + {cfg.data.target_len})"
        assert f"{batch} x {length} = {batch * cfg.data.sample_tokens:,} tokens per step" in text
    above, mark, below = text.partition("# ---- below this line nothing may change the loss ----\n")
    assert mark and re.findall(r"^(?!quickstart)(\w+):", below, re.M) == list(config.STACKS)
    assert not any(f"\n{stack}:" in above for stack in config.STACKS)


def test_lamb_44min_is_deepspeeds_schedule() -> None:
    first, second = phases("bert/lamb_44min")
    assert first.train.steps == round(403e6 / 65536)
    assert second.train.steps - first.train.steps == round(18e6 / 32768)
    assert (first.optim.warmup_steps, second.optim.warmup_steps) == (0.06 * 7500, 0.02 * 7500)
    for cfg, begin, base, offset in ((first, 0, 11e-3, 10e-4), (second, 6149, 2e-3, 0.0)):
        o = cfg.optim
        for step in (1, o.warmup_steps // 2, o.warmup_steps, o.warmup_steps + o.decay_interval, cfg.train.steps - begin):
            since = step - o.warmup_steps
            share = (step / o.warmup_steps) ** 2 if since <= 0 else 0.9 ** (since / o.decay_interval)
            assert optim.lr_at(begin + step, o) == pytest.approx(base * share + offset)


@pytest.mark.parametrize("name", ["bert/bert_base", "bert/bert_large"])
def test_bert_has_one_schedule_over_both_lengths(name: str) -> None:
    first, second = phases(name)
    assert first.optim == second.optim and second.train.steps == second.optim.decay_steps == 1_000_000
    assert first.train.steps == 900_000 and (first.data.seq_len, second.data.seq_len) == (128, 512)
    assert optim.lr_at(10_000, first.optim) == 1e-4 and optim.lr_at(1_000_000, second.optim) == 0
    assert optim.lr_at(900_000, first.optim) > optim.lr_at(900_001, second.optim) > 0


@pytest.mark.parametrize("name", ADAFACTOR)
def test_t5_has_the_papers_rate_and_batches(name: str) -> None:
    """1 / sqrt(max(n, 10,000)); 2^19 steps of 2^16 tokens in the studies, 1,000,000 of 2^20 for the five sizes."""
    cfg = phases(name)[0]
    for step in (1, 10_000, 10_001, 40_000, 400_000):
        assert optim.lr_at(step, cfg.optim) == pytest.approx(max(step, 10_000) ** -0.5)
    assert cfg.model.dropout == (0.0 if cfg.model.arch == "t5_v1_1" else 0.1)
    study = name in ("t5/t5_base", "t5/t5_v1_1_base")
    assert cfg.train.global_batch * cfg.data.seq_len == (2**16 if study else 2**20)
    assert phases(name)[-1].train.steps == (2**19 if study else 1_000_000)


def test_t5_v1_1_base_falls_over_the_last_tenth() -> None:
    first, second = phases("t5/t5_v1_1_base")
    assert first.train.steps == round(0.9 * 2**19)
    assert optim.lr_at(471_860, second.optim) == pytest.approx(optim.lr_at(471_859, first.optim), rel=1e-3)
    assert optim.lr_at(524_288, second.optim) == 0


@pytest.mark.parametrize("name", [n for n in PUBLISHED_CONFIGS if n.startswith("gpt/gpt3")])
def test_gpt3_steps_are_the_published_tokens(name: str) -> None:
    cfg = load(name)
    tokens = cfg.train.global_batch * cfg.data.seq_len
    assert cfg.train.steps == cfg.optim.decay_steps == -(-300_000_000_000 // tokens)
    assert cfg.optim.warmup_steps == round(3_000_000_000 / tokens)
    assert abs(cfg.model.init_std - (1 / 3 / cfg.model.hidden) ** 0.5) < 0.0011  # the script's rule, which it rounds


def test_peaks_and_mfu() -> None:
    peaks = {
        "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835.5, "NVIDIA H200": 989.4,
        "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA B200": 2250, "NVIDIA GB200": 2500,
        "NVIDIA L4": 121, "NVIDIA L40": 181.05, "NVIDIA L40S": 362.05, "NVIDIA A10G": 125, "NVIDIA A40": 149.7,
        "NVIDIA RTX A6000": 154.8, "NVIDIA RTX 6000 Ada Generation": 364.2, "NVIDIA GeForce RTX 4090": 165.2,
        "Tesla V100-SXM2-16GB": 125, "Tesla V100-PCIE-32GB": 112, "Tesla T4": 65, "H100": 989.4,
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None, "AMD EPYC": None,
        None: None,
    }  # fmt: skip
    assert {name: flops.peak_tflops(name) for name in peaks} == peaks
    assert flops.mfu(1e9, 312_000 * 8, "NVIDIA A100-SXM4-80GB", 8) == pytest.approx(1.0)
    assert flops.mfu(1e9, 1e6, None, 1) is None
    cfg = load("gpt/gpt2_124m")
    per_token = family("gpt/gpt2_124m").forward_backward_flops(cfg.model, cfg.data)
    assert per_token["causal"] < per_token["full"] == pytest.approx(6 * 123.5e6 + 12 * 12 * 768 * 1024, rel=0.001)


# ---- finetuning ------------------------------------------------------------------------------------------------------

BASES = {"gpt": "gpt2_124m", "bert": "bert_base", "t5": "t5_base"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder to begin from, of each family: its config.json alone."""
    folders = {}
    for kind, base in BASES.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        family(f"{kind}/{base}").hf_config(load(f"{kind}/{base}").model).save_pretrained(folders[kind])
    return folders


@pytest.mark.parametrize("name", FINETUNES)
def test_finetuning_configs_load_and_divide(name: str, bases: dict[str, Path]) -> None:
    kind, text = name.partition("/")[0], FINETUNES[name].read_text(encoding="utf-8")
    module = importlib.import_module(f"recipes.{kind}.finetune")
    start = [] if "from: scratch" in text else [f"init.from={bases[kind]}"]
    cfg = config.load(FINETUNES[name], start, module.Config)
    cfg = config.resolve(cfg, module.ResolvedConfig, 32_000)
    assert cfg.model.parameter_count() > 0
    for stack in config.STACKS:
        try:
            assert layout_for(cfg, stack, 2).world == 2
        except BadInput as error:
            known = ("lora on megatron", "optim.optimizer=adafactor on megatron")
            assert any(message in str(error) for message in known), error
    prose = text.replace("\n# ", " ")
    per_epoch, epochs = re.search(r"([\d,]+) steps per epoch", prose), re.search(r"# (\d+) epochs?$", text, re.M)
    assert per_epoch or kind != "bert", "each of BERT's configs gives its steps per epoch"
    if per_epoch:
        # steps per epoch are rounded, so the error grows with the number of epochs
        assert abs(cfg.train.steps - int(per_epoch[1].replace(",", "")) * int(epochs[1])) <= int(epochs[1])
