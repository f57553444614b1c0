"""What the reference loops of the parity tests take from common/, written out a second time.

The learning rate of each step, which parameters decay, how each begins, and a whole training loop that calls no function of the
recipes or of common/.
"""

import math
import struct
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import ROOT, losses
from transformers import GPT2Config, GPT2LMHeadModel

from common import config, families
from common.training import init, optim
from tests import warm

LR, MIN, WARMUP, STEPS = 6e-4, 6e-5, 7, 100

# ---- the rate of a step


def warmed_up(step: int, after: float) -> float:
    """Megatron-LM's OptimizerParamScheduler.get_lr with init_lr 0: a straight line to the largest rate, then the schedule."""
    return LR * step / WARMUP if step <= WARMUP else after


def cosine(step: int) -> float:
    """SGDR, arXiv:1608.03983, equation 5, for one period: min + (max - min) / 2 (1 + cos(pi T / T_period))."""
    if step > STEPS:
        return MIN
    return warmed_up(step, MIN + (LR - MIN) / 2 * (1 + math.cos((step - WARMUP) / (STEPS - WARMUP) * math.pi)))


def linear(step: int) -> float:
    """A straight line from (WARMUP, LR) to (STEPS, MIN)."""
    return warmed_up(step, MIN if step > STEPS else LR - (LR - MIN) / (STEPS - WARMUP) * (step - WARMUP))


def constant(step: int) -> float:
    return warmed_up(step, LR)


def exponential(step: int) -> float:
    """bing_bert's "EE" of DeepSpeedExamples with its lr_offset: rises by the square, then falls by 10% per 250 steps."""
    if step <= WARMUP:
        return MIN + (LR - MIN) * step * step / WARMUP / WARMUP
    return MIN + (LR - MIN) * math.exp(math.log(0.9) / 250 * (step - WARMUP))


def inverse_sqrt(step: int) -> float:
    """T5, arXiv:1910.10683, section 3.1.2: 1 / sqrt(max(n, k)), scaled so that the rate of step k is LR."""
    return LR * WARMUP**0.5 / max(step, WARMUP) ** 0.5


SCHEDULES: dict[str, Callable[[int], float]] = {
    f.__name__: f for f in (cosine, linear, constant, exponential, inverse_sqrt)
}  # tests/test_wsd.py has the formulas of wsd


def scheduled(name: str, begin_step: int = 0) -> config.Optim:
    values = {"lr": LR, "min_lr": MIN, "warmup_steps": WARMUP, "decay_steps": STEPS, "schedule": name, "begin_step": begin_step}
    return config.Optim.model_validate(values | {"decay_rate": 0.9, "decay_interval": 250})


@pytest.mark.parametrize("begin_step", [0, 40])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_of_every_step_is_the_formulas(name: str, begin_step: int) -> None:
    """begin_step moves the schedule: step 41 has then the rate of step 1."""
    o = scheduled(name, begin_step)
    rates = [optim.lr_at(begin_step + step, o) for step in range(1, STEPS + 20)]
    assert rates == pytest.approx([SCHEDULES[name](step) for step in range(1, STEPS + 20)], rel=1e-12)


def test_every_schedule_has_a_formula_of_its_own() -> None:
    names = get_args(config.Optim.model_fields["schedule"].annotation)
    assert set(names) == {*SCHEDULES, "wsd"}
    middle = [SCHEDULES[name](2 * STEPS // 3) for name in SCHEDULES]
    assert min(abs(a - b) for i, a in enumerate(middle) for b in middle[:i]) > LR / 200


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("cosine", transformers.get_cosine_schedule_with_warmup),
        ("linear", transformers.get_linear_schedule_with_warmup),
        ("constant", transformers.get_constant_schedule_with_warmup),
        ("inverse_sqrt", transformers.get_inverse_sqrt_schedule),
    ],
)
def test_it_is_the_schedule_of_transformers(name: str, reference: Callable[..., torch.optim.lr_scheduler.LambdaLR]) -> None:
    """Which fall to 0, and count the warmup of inverse_sqrt as the others'."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    more = {"num_training_steps": STEPS} if name in ("cosine", "linear") else {}
    [share] = reference(optimizer, num_warmup_steps=WARMUP, **more).lr_lambdas
    o = scheduled(name).model_copy(update={"min_lr": 0.0})
    for step in range(WARMUP if name == "inverse_sqrt" else 1, STEPS):
        assert optim.lr_at(step, o) == pytest.approx(LR * share(step), rel=1e-12, abs=1e-18), step


# ---- which parameters decay, and how each begins

CONFIGS = {"gpt": ("tiny", "tiny_llama"), "bert": ("tiny", "tiny_postln"), "t5": ("tiny", "tiny_v1_1")}
MODELS = [(family, name) for family in families.names() if family in CONFIGS for name in CONFIGS[family]]


def model_of(family: str, name: str, overrides: tuple[str, ...] = ()) -> tuple[config.Optim, Any, Any]:
    """Of a tiny config: (its optimizer's section, resolved shapes, family module)."""
    task = import_module(f"recipes.{family}.task")
    shape = [*overrides, "model.vocab_size=768", "data.valid=null"]
    cfg = config.load(ROOT / f"recipes/{family}/configs/{name}.yaml", shape, task.Config)
    return cfg.optim, cfg.model.resolve(cfg, None), task


@pytest.mark.parametrize(("family", "name"), MODELS)
def test_matrices_decay_and_biases_and_norms_do_not(family: str, name: str) -> None:
    """By the class of the module that holds a parameter, not by its name."""
    section, model, task = model_of(family, name)
    net = task.hf_model(model)
    norms = tuple(type(m) for m in net.modules() if "Norm" in type(m).__name__)
    assert norms
    decays: list[torch.nn.Parameter] = []
    decay_free: list[torch.nn.Parameter] = []
    for module in net.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            (decay_free if isinstance(module, norms) or leaf == "bias" else decays).append(parameter)
    expected = {0.0: {id(p) for p in decay_free}, section.weight_decay: {id(p) for p in decays}}
    groups = optim.groups(net.named_parameters(), task.has_weight_decay, section)
    assert {g["weight_decay"]: {id(p) for p in g["params"]} for g in groups} == expected and section.weight_decay > 0


def deviation(family: str, arch: str, name: str, shapes: dict[str, int]) -> float:
    """Standard deviation of a matrix's initial values."""
    residual = 0.02 / math.sqrt(2 * shapes["layers"])  # GPT-2, section 2.3; Megatron-LM, arXiv:1909.08053, section 5.1
    if family == "gpt":
        return residual if name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight")) else 0.02
    if family == "bert":
        ends_a_branch = ".layer." in name and name.endswith(("attention.output.dense.weight", "output.dense.weight"))
        return residual if arch == "megatron-bert" and ends_a_branch else 0.02
    hidden, ffn, inner, per_head = shapes["hidden"], shapes["ffn"], shapes["inner"], shapes["per_head"]
    if name == "shared.weight":
        return 1.0
    # Mesh TensorFlow's T5, as transformers' T5PreTrainedModel._init_weights has it with initializer_factor 1
    if name.endswith("Attention.q.weight"):
        return 1 / math.sqrt(hidden * per_head)
    if name.endswith("Attention.o.weight"):
        return 1 / math.sqrt(inner)
    return 1 / math.sqrt(ffn) if name.endswith("DenseReluDense.wo.weight") else 1 / math.sqrt(hidden)


@pytest.mark.parametrize(("family", "name"), MODELS)
def test_initial_values_are_normal_with_the_papers_deviations(family: str, name: str) -> None:
    _, model, task = model_of(family, name)
    shapes = {"layers": model.layers, "hidden": model.hidden, "ffn": model.ffn}
    shapes |= {"inner": model.heads * model.kv_channels, "per_head": model.kv_channels} if family == "t5" else {}
    draw = init.scratch(1234, lambda key: task.initializer(model, key))
    for key, parameter in task.hf_model(model).named_parameters():
        values = draw(key, parameter.shape).double()
        if values.dim() == 1:  # biases and norms
            assert torch.equal(values, torch.full_like(values, 0.0 if key.endswith("bias") else 1.0)), key
            continue
        std = deviation(family, model.arch if family == "bert" else "", key, shapes)
        error = 5 / math.sqrt(values.numel())  # five standard errors of a mean, in units of std
        assert abs(values.mean().item()) <= error * std, key
        assert abs(values.square().mean().sqrt().item() / std - 1) <= error, key
        within = (values.abs() < std).double().mean().item()  # erf(1 / sqrt 2) of a normal distribution
        assert abs(within - math.erf(0.5**0.5)) <= error, key


# ---- a training loop without common/

MASK = 2**64 - 1


def splitmix(x: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def shuffled(position: int, size: int, seed: int, epoch: int) -> int:
    """The sample at `position` of a pass over one corpus: a Feistel network of 6 rounds, walked until it is below `size`."""
    golden = 0x9E3779B97F4A7C15
    key = splitmix(splitmix((splitmix((seed + golden) & MASK) + 0) & MASK) ^ epoch * golden & MASK)
    # the corpus's number is 0
    keys = [splitmix((key + golden * r) & MASK) for r in range(1, 7)]
    bits = max(1, (size - 1).bit_length())
    low_bits, high_bits = bits // 2, bits - bits // 2
    x = position
    while True:
        left, right = x >> low_bits, x & (1 << low_bits) - 1
        for r in range(0, 6, 2):
            left ^= splitmix((right + keys[r]) & MASK) & (1 << high_bits) - 1
            right ^= splitmix((left + keys[r + 1]) & MASK) & (1 << low_bits) - 1
        x = left << low_bits | right
        if x < size:
            return x


def read_tokens(prefix: Path) -> np.ndarray:
    """All ids of a corpus in Megatron's format (megatron/core/datasets/indexed_dataset.py): header, lengths, offsets."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, _ = struct.unpack_from("<QBQQ", index, 9)
    dtype = {4: np.int32, 8: np.uint16}[code]
    lengths = np.frombuffer(index, np.int32, sequences, offset=34)
    tokens = np.fromfile(prefix.with_suffix(".bin"), dtype)
    assert version == 1 and lengths.sum() == len(tokens)
    return tokens.astype(np.int64)


def own_loop(path: Path, tokens: np.ndarray, folder: Path) -> Iterator[tuple[float, float, float]]:
    """(loss, gradient norm before clipping, rate) of each step of a config file."""
    cfg = yaml.safe_load(path.read_text(encoding="utf-8"))
    o, length, batch, steps = cfg["optim"], cfg["data"]["seq_len"], cfg["train"]["global_batch"], cfg["train"]["steps"]
    net = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).train()
    parameters = list(net.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": o["weight_decay"]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=tuple(o["betas"]), eps=1e-8, foreach=False)
    samples = (len(tokens) - 1) // length
    for step in range(1, steps + 1):
        numbers = [divmod(n, samples) for n in range((step - 1) * batch, step * batch)]
        chosen = [shuffled(position, samples, cfg["train"]["seed"], epoch) for epoch, position in numbers]
        rows = torch.from_numpy(np.stack([tokens[i * length : i * length + length + 1] for i in chosen]))
        logits = net(rows[:, :-1]).logits.double()
        loss = (logits.logsumexp(-1) - logits.gather(-1, rows[:, 1:, None])[..., 0]).mean()
        for p in parameters:
            p.grad = None
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters))
        for p in parameters:
            p.grad *= min(1.0, o["grad_clip"] / norm)
        if step <= o["warmup_steps"]:
            rate = o["lr"] * step / o["warmup_steps"]
        else:
            share = (step - o["warmup_steps"]) / (steps - o["warmup_steps"])
            rate = o["min_lr"] + (o["lr"] - o["min_lr"]) * (1 + math.cos(math.pi * share)) / 2
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        yield loss.item(), norm, rate


def test_a_loop_that_shares_nothing_with_the_recipe_gives_its_curve(corpus: Path, settings: list[str], tmp_path: Path) -> None:
    """20 steps from a folder of transformers, against the training script of the first stack, the baseline."""
    folder, out, path = tmp_path / "hf", tmp_path / "out", ROOT / "recipes/gpt/configs/tiny.yaml"
    torch.manual_seed(3)
    dropout: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    shape = GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=4, n_head=4, **dropout)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    module = f"recipes.gpt.{families.stacks('gpt')[0]}.pretrain"
    done = warm.run(["-m", module, path, out, *settings, f"init.from={folder}"], nproc=2)
    assert done.returncode == 0, done.stderr
    lines = losses(out)
    expected = list(own_loop(path, read_tokens(corpus / "train"), folder))
    assert sorted(lines) == list(range(1, 21)) and expected[-1][0] < expected[0][0] - 0.3
    for step, (loss, norm, rate) in enumerate(expected, 1):
        line = lines[step]
        assert abs(line["loss"] - loss) <= 1e-5, step
        assert abs(line["grad_norm"] / norm - 1) <= 1e-4, step
        assert line["lr"] == pytest.approx(rate, rel=1e-12), step


# ---- norms of gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_in_fp64(dtype: torch.dtype) -> None:
    """Sizes around those of a block; and where torch's own norm is off by more than is allowed here."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(), (0,), (1,), (optim.BLOCK - 1,), (optim.BLOCK,), (2 * optim.BLOCK + 1,), (8192, 1024)]
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    tensors.append(torch.randn(1000, 200, generator=generator).to(dtype).t())
    exact = [tensor.double().norm() for tensor in tensors]
    found = optim.norms(tensors)
    assert all(norm.shape == () and norm.dtype == torch.float32 for norm in found)
    allowed = 4e-7 if dtype == torch.float32 else 4e-6
    assert all(abs(norm.item() - value) <= allowed * value for norm, value in zip(found, exact, strict=True))
    assert abs(optim.total_norm(tensors).item() / torch.stack(exact).norm() - 1) <= allowed
    assert abs(torch._foreach_norm(tensors[6:7], 2, torch.float32)[0].item() / exact[6] - 1) > 10 * allowed
