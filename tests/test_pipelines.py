"""Megatron's recompute and pipelines, beside the parity and resume of each layout: what is drawn, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, case, losses, valid_loss
from test_parity import LOSS, NORM, farthest, rows

from common import config
from common.stacks import extra, pipeline
from recipes.gpt import task
from tests import plain, warm

TINY = ROOT / "recipes/gpt/configs/tiny.yaml"


@pytest.mark.parametrize(("value", "read"), [("false", "none"), ("true", "full"), ("selective", "selective")])
def test_recompute_reads_the_values_of_earlier_versions(value: str, read: str) -> None:
    cfg = config.load(TINY, [f"megatron.recompute={value}"], task.Config)
    assert cfg.megatron.recompute == extra.granularity(cfg.megatron) == read
    assert cfg.dump()["megatron"]["recompute"] == read


def test_recomputation_draws_the_same_dropout(drive, settings, tmp_path: Path) -> None:
    """Else the gradients would be those of other units than the loss."""
    given = [*settings, "train.steps=3", "train.eval_samples=8", "model.dropout=0.1", "megatron.tp=2", "megatron.micro_batch=4"]
    kinds = ("none", "selective", "full")
    drive([case("megatron", "tiny", tmp_path / kind, [*given, f"megatron.recompute={kind}"]) for kind in kinds], 2)
    plain, *others = (losses(tmp_path / kind) for kind in kinds)
    assert len(plain) == 3
    for lines in others:
        for step, line in plain.items():
            assert lines[step]["loss"] == pytest.approx(line["loss"], rel=1e-6)
            assert lines[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-6)


# ---- layers of the stages


@pytest.mark.parametrize(
    ("pp", "vpp", "layout", "counts"),
    [
        (2, 2, "even", [2, 2, 2, 2]), (2, 1, "embedding_and_loss", [4, 4]), (5, 1, "embedding_and_loss", [1, 2, 2, 2, 1]),
        (5, 2, "embedding_and_loss", [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]), (2, 1, "Et*3|t*5L", [3, 5]),
        (2, 2, "E|(t|)*2t*6,L", [0, 1, 1, 6]),
        (4, 1, "Et,t|(t*2|)*2t*2L", [2, 2, 2, 2]), (2, 2, "E(tt|t|)*1tt|t*3L", [2, 1, 2, 3]),
    ],
)  # fmt: skip
def test_the_layers_of_the_stages_are_those_that_megatron_builds(pp: int, vpp: int, layout: str, counts: list[int]) -> None:
    from megatron.core.transformer import transformer_block, transformer_config, transformer_layer

    system = config.Megatron(pp=pp, vpp=vpp, pipeline_layout=layout)
    assert list(pipeline.problems(8, system)) == [] and pipeline.chunk_layers(8, system) == counts
    built = transformer_config.TransformerConfig(
        num_layers=8, hidden_size=8, num_attention_heads=1, pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None, **pipeline.settings(system),
    )  # fmt: skip
    if built.pipeline_model_parallel_layout:
        stages = built.pipeline_model_parallel_layout.layout
        found = [sum(kind.name == "decoder" for kind in stages[stage][chunk]) for chunk in range(vpp) for stage in range(pp)]
    else:
        places = [(chunk if vpp > 1 else None, stage) for chunk in range(vpp) for stage in range(pp)]
        found = [transformer_block.get_num_layers_to_build(built, *place) for place in places]
        offsets = [transformer_layer.get_transformer_layer_offset(built, *place) for place in places]
        assert offsets == [sum(counts[:number]) for number in range(len(counts))]
    assert found == counts
    assert pipeline.stage_layers(8, system) == [sum(counts[stage::pp]) for stage in range(pp)]


SIX_ROWS = {  # {row: (architecture, layout)}; a stage may have the embedding alone, or the loss
    "uneven": ("tiny_llama", ["megatron.pipeline_layout=Et*4|t*2L", "megatron.micro_batch=1"]),
    "embedding_and_loss": ("tiny", ["megatron.vpp=2", "megatron.pipeline_layout=embedding_and_loss"]),
    "empty_ends": ("tiny", ["megatron.vpp=2", "megatron.pipeline_layout=E|t*2|t*4|L", "megatron.recompute=full"]),
}


def test_uneven_stages_follow_the_reference_loop(drive, settings, tmp_path: Path) -> None:
    given = [*settings, "model.layers=6", "train.steps=10"]
    drive(
        [case("megatron", arch, tmp_path / name, [*given, "megatron.pp=2", *row]) for name, (arch, row) in SIX_ROWS.items()], 2
    )
    for name, (arch, _) in SIX_ROWS.items():
        loss, norm = farthest(tmp_path / name, plain.losses(ROOT / f"recipes/gpt/configs/{arch}.yaml", given))
        assert loss <= LOSS and norm <= NORM, name


# ---- interleaved chunks

# What each of the four chunks of two stages draws: from the default generator, and from that of a tensor-parallel region
DRAWS = """
import types
import torch, torch.distributed as dist
from common.launch import processes
from common.layout import Layout
ranks = processes.start()
from megatron.core import tensor_parallel
from common.stacks import mcore
mcore.start(ranks, Layout(world=2, dp=1, tp=1, pp=2, vpp=2, micro_batch=1, accumulate=2))
drawn = []
for number in range(2):
    mcore.begin_micro_batch(processes.seed_micro_batch(1, 2, 3, 0), types.SimpleNamespace(vp_stage=number))
    drawn.append(torch.rand(()).item())
    with tensor_parallel.get_cuda_rng_tracker().fork():
        drawn.append(torch.rand(()).item())
of_all = [None] * 2
dist.all_gather_object(of_all, drawn)
assert len({value for one in of_all for value in one}) == 8, of_all
"""


def test_no_two_chunks_drop_the_same_units() -> None:
    done = warm.run(["-c", DRAWS], nproc=2, merged=True)
    assert done.returncode == 0, done.stdout


DEEP = ["model.layers=8", "train.steps=10"]
DEEP_ROWS = {
    "tp2_pp2_vpp2": (4, ["megatron.tp=2", "megatron.pp=2", "megatron.vpp=2"]),
    "pp4_vpp2": (4, ["megatron.pp=4", "megatron.vpp=2"]),
    "tp2_sp_pp2_vpp2_dp2": (
        8,
        ["megatron.tp=2", "megatron.sequence_parallel=true", "megatron.pp=2", "megatron.vpp=2", "megatron.micro_batch=1"],
    ),
    "tp2_pp2_vpp4_dp2": (8, ["megatron.tp=2", "megatron.pp=2", "megatron.vpp=4", "megatron.distributed_optimizer=true"]),
}


@pytest.mark.parametrize("name", rows([("tp2_pp2_vpp2",)], [(name,) for name in DEEP_ROWS if name != "tp2_pp2_vpp2"]))
def test_eight_layers_follow_the_reference_loop(drive, settings, tmp_path: Path, name: str) -> None:
    nproc, layout = DEEP_ROWS[name]
    drive([case("megatron", "tiny_llama", tmp_path / "run", [*settings, *DEEP, *layout])], nproc)
    loss, norm = farthest(tmp_path / "run", plain.losses(ROOT / "recipes/gpt/configs/tiny_llama.yaml", settings + DEEP))
    assert loss <= LOSS and norm <= NORM


def test_an_evaluation_takes_any_number_of_samples(drive, settings, tmp_path: Path) -> None:
    """Five samples are three micro batches of two, and the interleaved schedule takes them in twos."""
    given = [*settings, "train.steps=2", "train.eval_samples=5"]
    layout = ["megatron.pp=2", "megatron.vpp=2", "megatron.micro_batch=2"]
    drive([case("baseline", "tiny", tmp_path / "plain", given)], 2)
    drive([case("megatron", "tiny", tmp_path / "vpp", given + layout)], 2)
    assert abs(valid_loss(tmp_path / "plain") - valid_loss(tmp_path / "vpp")) <= LOSS


# ---- overlap with the data-parallel ranks' traffic

# One run in buckets of a few parameters, so that most of them are gathered while the forward pass computes
SMALL_BUCKETS = """
import functools, sys
from common.launch import in_process, processes
processes.quiet()
from common.stacks import mcore
mcore.DistributedDataParallelConfig = functools.partial(mcore.DistributedDataParallelConfig, bucket_size=5000)
module, *arguments = sys.argv[1:]
in_process.run(module, arguments)
"""


@pytest.mark.parametrize("family", ["gpt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "t5"))])
def test_parameters_are_gathered_before_they_are_read(
    drive, settings, bert_settings, t5_settings, tmp_path: Path, family: str
) -> None:
    """The losses, of training and of evaluations between its steps, are those of ranks that hold all states whole."""
    given = {"gpt": settings, "bert": bert_settings, "t5": t5_settings}[family]
    given = [*given, "train.steps=4", "train.eval_every=1", "train.save_every=0", "megatron.micro_batch=2"]
    one = case("megatron", "tiny", tmp_path / "whole", given, family=family)
    drive([one], 2)
    arguments = [one["module"], one["config"], tmp_path / "divided", *given, "megatron.distributed_optimizer=true"]
    done = warm.run(["-c", SMALL_BUCKETS, *arguments], nproc=2, merged=True)
    assert done.returncode == 0, done.stdout
    whole, divided = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() if "loss" in line]
        for name in ("whole", "divided")
    )
    assert len(whole) == len(divided) == 8
    for line, other in zip(whole, divided, strict=True):
        key = "loss" if "loss" in line else "valid_loss"
        assert other[key] == pytest.approx(line[key], abs=1e-6), line["step"]
