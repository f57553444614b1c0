"""BERT under invariants 1, 2, 5 and 6: every layout follows the reference loop, halves are a whole, a run moves anywhere."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_state, case, losses, valid_loss
from test_parity import BF16, LOSS, NORM, farthest, rows
from test_resume import moves_without

from tests import plain_bert

ARCHS = ("tiny", "tiny_postln")
MOVES = moves_without({"deepspeed.sp=2"}, {"deepspeed.zero_stage=3", "deepspeed.tp=2"})
Layouts = dict[str, tuple[str, list[str]]]
# Masked tokens differ from sample to sample, so micro batches and ranks hold unequal numbers of targets in every run.
TWO_RANKS: Layouts = {
    "baseline": ("baseline", []),
    "baseline_micro1": ("baseline", ["baseline.micro_batch=1"]),
    "baseline_recompute": ("baseline", ["baseline.micro_batch=4", "baseline.recompute=true"]),
    "fsdp2": ("baseline", ["baseline.shard=full"]),
    "fsdp2_recompute": ("baseline", ["baseline.shard=full", "baseline.micro_batch=4", "baseline.recompute=true"]),
    "zero0": ("deepspeed", ["deepspeed.zero_stage=0"]),
    "zero1": ("deepspeed", ["deepspeed.zero_stage=1", "deepspeed.micro_batch=1"]),
    "zero2": ("deepspeed", ["deepspeed.zero_stage=2", "deepspeed.micro_batch=4"]),
    "zero2_offload": ("deepspeed", ["deepspeed.zero_stage=2", "deepspeed.offload=optimizer", "deepspeed.recompute=true"]),
    "zero3": ("deepspeed", ["deepspeed.zero_stage=3"]),
    "zero3_offload_all": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.offload=all"]),
    "zero1_pp2": ("deepspeed", ["deepspeed.pp=2"]),
    "zero1_pp2_micro1": ("deepspeed", ["deepspeed.pp=2", "deepspeed.recompute=true", "deepspeed.micro_batch=1"]),
    "dp2_micro1": ("megatron", ["megatron.micro_batch=1"]),
    "dp2_distributed_optimizer": ("megatron", ["megatron.micro_batch=4", "megatron.distributed_optimizer=true"]),
    "tp2": ("megatron", ["megatron.tp=2", "megatron.micro_batch=4"]),
    "tp2_sp": ("megatron", ["megatron.tp=2", "megatron.sequence_parallel=true", "megatron.micro_batch=4"]),
    "tp2_sp_recompute": (
        "megatron",
        ["megatron.tp=2", "megatron.sequence_parallel=true", "megatron.micro_batch=8", "megatron.recompute=true"],
    ),
    "dp2_selective": ("megatron", ["megatron.recompute=selective", "megatron.micro_batch=4"]),
    "pp2": ("megatron", ["megatron.pp=2", "megatron.micro_batch=1"]),
    "pp2_micro4": ("megatron", ["megatron.pp=2", "megatron.micro_batch=4"]),
    "cp2": ("megatron", ["megatron.cp=2", "megatron.micro_batch=1"]),
    "pp2_uneven": ("megatron", ["megatron.pp=2", "megatron.pipeline_layout=Et*3|tL"]),
    "pp2_vpp2": ("megatron", ["megatron.pp=2", "megatron.vpp=2", "megatron.micro_batch=1"]),
    "pp2_vpp2_micro4": ("megatron", ["megatron.pp=2", "megatron.vpp=2", "megatron.micro_batch=4"]),
}
AUTOTP: Layouts = {
    "zero0_tp2": ("deepspeed", ["deepspeed.zero_stage=0", "deepspeed.tp=2", "deepspeed.micro_batch=4"]),
    "zero1_tp2": ("deepspeed", ["deepspeed.zero_stage=1", "deepspeed.tp=2", "deepspeed.micro_batch=4"]),
    "zero2_tp2": ("deepspeed", ["deepspeed.zero_stage=2", "deepspeed.tp=2"]),
    "zero3_tp2": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.tp=2", "deepspeed.micro_batch=4"]),
}
# Thousands of collectives: a run of one of these takes as long as ten others
MICRO1: Layouts = {
    "tp2_sp_micro1": ("megatron", ["megatron.tp=2", "megatron.sequence_parallel=true", "megatron.micro_batch=1"]),
    "zero1_tp2_micro1": ("deepspeed", ["deepspeed.zero_stage=1", "deepspeed.tp=2", "deepspeed.micro_batch=1"]),
}
# Every layout trains one architecture; the other one goes through a layout of each mechanism, the rest is marked slow.
REPEATED = ("baseline", "zero3", "zero1_pp2", "tp2_sp")
# No mechanism of its own
RARE = ("zero2", "zero0_tp2", "zero2_tp2", "tp2", "tp2_sp_recompute", "pp2_micro4", "pp2_vpp2_micro4")
FEW = ("baseline", "zero1", "zero3", "tp2_sp", "pp2")
# The objective's other choices, and LAMB
VARIANTS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "sentences": ("tiny", ["objective.pair=none", "objective.masking=whole_word"], (*FEW, "zero1_pp2")),
    "sentences_postln": (
        "tiny_postln", ["objective.pair=none", "objective.masking=token"], ("baseline", "zero3", "tp2_sp", "cp2"),
    ),
    "order": ("tiny", ["objective.pair=sop", "objective.masking=ngram", "objective.short_seq_prob=0.5"], FEW),
    "lamb": ("tiny_postln", ["optim.optimizer=lamb", "optim.lr=3e-2"], ("baseline", "baseline_micro1", "zero0")),
    "lamb_bounded": (
        "tiny",
        ["optim.optimizer=lamb", "optim.lr=1e-2", "optim.lamb={min_coeff: 0.01, max_coeff: 0.3, bias_correction: false}",
         "optim.schedule=exponential", "optim.warmup_steps=4", "optim.decay_interval=5"],
        ("baseline", "zero0"),
    ),
}  # fmt: skip
BF16_LAYOUTS = ("baseline", "fsdp2", "zero0", "zero1", "zero3", "tp2_sp", "dp2_distributed_optimizer")
RESUMED = ("baseline", "zero3", "pp2")
# tests/test_resume.py has them in the fast suite: what saves and loads is shared
SLOW_RESUMED = ("tp2_sp", "fsdp2", "zero0", "zero1", "zero2", "tp2", "cp2", "dp2_distributed_optimizer")
FP32_ROWS = [("tiny", name) for name in (*TWO_RANKS, *AUTOTP) if name not in RARE]
FP32_ROWS += [("tiny_postln", name) for name in REPEATED]
SLOW_FP32_ROWS = [(arch, name) for arch in ARCHS for name in (*TWO_RANKS, *AUTOTP) if (arch, name) not in FP32_ROWS]
SLOW_FP32_ROWS += [(arch, name) for arch in ARCHS for name in MICRO1]
BF16_ROWS = [("tiny", name) for name in ("baseline", "fsdp2", "zero1", "tp2_sp")]
SLOW_BF16_ROWS = [(arch, name) for arch in ARCHS for name in BF16_LAYOUTS if (arch, name) not in BF16_ROWS] + [("tiny", "cp2")]
MOVED_ARCHS, SLOW_MOVED_ARCHS = ARCHS[:1], ARCHS[1:]
EACH = 5  # steps on each stack
pytestmark = pytest.mark.timeout(1800)  # the first test waits for all runs


def run(stack: str, config: str, out: Path, overrides: list[str]) -> dict:
    return case(stack, config, out, overrides, family="bert")


@pytest.fixture(scope="module")
def runs(drive, bert_settings, with_slow, tmp_path_factory) -> tuple[Path, str]:
    """(folder of all runs of this module, what they printed)"""
    out = tmp_path_factory.mktemp("bert")
    layouts = TWO_RANKS | AUTOTP | MICRO1
    fp32 = [
        run(layouts[name][0], arch, out / "fp32" / arch / name, bert_settings + layouts[name][1])
        for arch, name in FP32_ROWS + SLOW_FP32_ROWS * with_slow
    ]
    autotp = [one for one in fp32 if "deepspeed.tp=2" in one["overrides"]]
    cases = [one for one in fp32 if one not in autotp]
    for kind, (arch, more, names) in VARIANTS.items():
        cases += [run(TWO_RANKS[n][0], arch, out / kind / n, bert_settings + TWO_RANKS[n][1] + more) for n in names]
    for arch, name in BF16_ROWS + SLOW_BF16_ROWS * with_slow:
        stack, overrides = TWO_RANKS[name]
        cases.append(run(stack, arch, out / "bf16" / arch / name, [*bert_settings, "train.dtype=bf16", *overrides]))
    for name in RESUMED + SLOW_RESUMED * with_slow:
        stack, overrides = TWO_RANKS[name]
        shared = [*bert_settings, "model.dropout=0.1", "optim.decay_steps=12", *overrides]
        cases.append(run(stack, "tiny_postln", out / "whole" / name, [*shared, "train.steps=12"]))
        cases += [run(stack, "tiny_postln", out / "halves" / name, [*shared, f"train.steps={n}"]) for n in (6, 12)]
    total = EACH * len(MOVES)
    for arch in MOVED_ARCHS + SLOW_MOVED_ARCHS * with_slow:
        moved = [*bert_settings, f"optim.decay_steps={total}", "train.keep=100"]
        cases += [
            run(stack, arch, out / "moved" / arch, [*moved, f"train.steps={EACH * number}", *overrides])
            for number, (stack, overrides) in enumerate(MOVES, 1)
        ]
    return out, drive(cases + autotp, 2)


@pytest.fixture(scope="module")
def reference(bert_settings) -> dict[str, list[tuple[float, float]]]:
    """{config or variant: [(loss, norm) of each step]} of the reference loop."""

    def plain(arch: str, more: list[str]) -> list[tuple[float, float]]:
        return plain_bert.losses(ROOT / f"recipes/bert/configs/{arch}.yaml", bert_settings + more)

    return {a: plain(a, []) for a in ARCHS} | {kind: plain(arch, more) for kind, (arch, more, _) in VARIANTS.items()}


@pytest.mark.parametrize(("arch", "layout"), rows(FP32_ROWS, SLOW_FP32_ROWS))
def test_follows_the_reference_loop(runs, reference, arch, layout):
    expected = reference[arch]
    assert expected[-1][0] < expected[0][0] - 0.3, "the loss must really fall"
    loss, norm = farthest(runs[0] / "fp32" / arch / layout, expected)
    assert loss <= LOSS and norm <= NORM


@pytest.mark.parametrize(("kind", "layout"), [(kind, name) for kind, (_, _, names) in VARIANTS.items() for name in names])
def test_other_objectives_and_lamb_follow_the_reference_loop(runs, reference, kind, layout):
    assert reference[kind][-1][0] < reference[kind][0][0] - 0.1
    loss, norm = farthest(runs[0] / kind / layout, reference[kind])
    assert loss <= LOSS and norm <= NORM


@pytest.mark.parametrize(("arch", "layout"), rows(BF16_ROWS, SLOW_BF16_ROWS))
def test_bf16_stays_near_fp32(runs, reference, arch, layout):
    loss, _ = farthest(runs[0] / "bf16" / arch / layout, reference[arch])
    assert 0 < loss <= BF16  # 0 would mean that bf16 was not used


@pytest.mark.parametrize("arch", ARCHS)
def test_validation_agrees(runs, arch):
    values = {name: valid_loss(runs[0] / "fp32" / arch / name) for a, name in FP32_ROWS if a == arch}
    assert max(values.values()) - min(values.values()) <= LOSS, values


def test_parts_of_the_loss_are_logged_apart(runs):
    lines = losses(runs[0] / "fp32" / "tiny" / "tp2_sp")
    assert len(lines) == 20
    assert any(line["padding"] > 0 for line in lines.values()), "the mask of padding must be exercised"
    for line in lines.values():
        assert line["loss"] == pytest.approx(line["mlm_loss"] + line["nsp_loss"], abs=1e-9)
        assert 0 <= line["mlm_accuracy"] <= 1 and 0 <= line["nsp_accuracy"] <= 1 and 0 <= line["padding"] < 0.5
    plain, split = losses(runs[0] / "fp32" / "tiny" / "baseline"), lines
    for step, line in plain.items():
        for key in ("mlm_accuracy", "nsp_accuracy", "padding"):
            assert line[key] == pytest.approx(split[step][key], abs=1e-6), (step, key)
    alone = losses(runs[0] / "sentences" / "pp2")[20]
    assert alone["loss"] == alone["mlm_loss"] and not any("nsp" in key or "sop" in key for key in alone)
    assert "sop_loss" in losses(runs[0] / "order" / "zero3")[1]


@pytest.mark.parametrize("name", rows([(n,) for n in RESUMED], [(n,) for n in SLOW_RESUMED]))
def test_two_halves_are_one_run_bit_for_bit(runs, name):
    out, _ = runs
    whole, halves = losses(out / "whole" / name), losses(out / "halves" / name)
    assert len(whole) == 12
    for step in whole:
        for key in ("loss", "grad_norm", "lr", "mlm_loss", "mlm_accuracy"):
            assert whole[step][key] == halves[step][key], (step, key)
    assert_same_state(out / "whole" / name, out / "halves" / name, 12)


def test_dropout_was_on(runs):
    whole, without = (losses(runs[0] / name)[1]["loss"] for name in ("whole/baseline", "fp32/tiny_postln/baseline"))
    assert whole != without


@pytest.mark.parametrize("arch", rows([(a,) for a in MOVED_ARCHS], [(a,) for a in SLOW_MOVED_ARCHS]))
def test_one_run_moves_between_stacks(runs, bert_settings, arch):
    """Through all stacks it follows the reference loop, which stays."""
    total = EACH * len(MOVES)
    more = [f"optim.decay_steps={total}", f"train.steps={total}"]
    expected = plain_bert.losses(ROOT / f"recipes/bert/configs/{arch}.yaml", bert_settings + more)
    loss, norm = farthest(runs[0] / "moved" / arch, expected)
    assert len(expected) == total and loss <= LOSS and norm <= NORM
    states = sorted((runs[0] / "moved" / arch).glob("step_*/state.json"), key=lambda p: int(p.parent.name[5:]))
    assert [json.loads(p.read_text())["stack"] for p in states] == [stack for stack, _ in MOVES]


def test_every_state_reads_back_and_replicas_are_equal(runs):
    """tests/watch.py: before the first step of each run, and before each save of a Megatron run with tp."""
    for what in ("READBACK", "REPLICATED"):
        lines = re.findall(rf"{what} (\d+) parameters, (\d+) wrong", runs[1])
        assert len(lines) >= 10 and all(int(seen) > 0 and wrong == "0" for seen, wrong in lines), lines
