"""baseline.compile and deepspeed.compile: the losses of the plain layers, by Inductor's kernels for a CPU."""

from pathlib import Path

import pytest
import torch
from conftest import case, losses

from common.training import compiling

LOSS = 1e-5  # invariant 1
RUNS = {
    "gpt": ("baseline", "tiny", ["baseline.recompute=true"]),
    "llama": ("deepspeed", "tiny_llama", ["deepspeed.zero_stage=2"]),
    "bert": ("baseline", "tiny_postln", []),
    "megatron_bert": ("deepspeed", "tiny", ["deepspeed.recompute=true"]),
    "t5": ("baseline", "tiny", ["baseline.recompute=true"]),
    "t5_v1_1": ("deepspeed", "tiny_v1_1", []),
    "gpt_fsdp2": ("baseline", "tiny", ["baseline.shard=full", "baseline.recompute=true"]),
    "llama_fsdp2": ("baseline", "tiny_llama", ["baseline.shard=full"]),
    "bert_fsdp2": ("baseline", "tiny_postln", ["baseline.shard=full"]),
    "t5_fsdp2": ("baseline", "tiny", ["baseline.shard=full"]),
}


def test_layers_of_one_class_share_a_graph():
    from transformers import GPT2Config, GPT2LMHeadModel

    net = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=3, n_head=2, use_cache=False)).eval()
    names, ids = [name for name, _ in net.named_parameters()], torch.arange(32).view(2, 16)
    expected = net(input_ids=ids).logits
    torch._dynamo.utils.counters.clear()
    compiling.layers(net)
    found = net(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert [name for name, _ in net.named_parameters()] == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RUNS)
def test_compiled_runs_have_the_losses_of_plain_ones(
    name: str, drive, settings, bert_settings, t5_settings, tmp_path: Path
) -> None:
    stack, tiny, layout = RUNS[name]
    of = {"gpt": "gpt", "llama": "gpt", "bert": "bert", "megatron_bert": "bert"}
    family = of.get(name.removesuffix("_fsdp2"), "t5")
    given = [*{"gpt": settings, "bert": bert_settings, "t5": t5_settings}[family], "train.steps=20", *layout]
    cases = [
        case(stack, tiny, tmp_path / value, [*given, f"{stack}.compile={value}"], family=family) for value in ("false", "true")
    ]
    drive(cases, 2)
    plain, compiled = (losses(tmp_path / value) for value in ("false", "true"))
    assert len(plain) == len(compiled) == 20
    assert max(abs(compiled[step]["loss"] - plain[step]["loss"]) for step in plain) <= LOSS
