"""The load balance of the comparison of the stacks: passes of real runs, what they say, and what the schedule predicts."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.comparison import balance, padding, timeline
from common.comparison.figures import Figure, Options, tables
from common.comparison.timeline import Slow, Span
from common.errors import BadInput
from common.stacks import pipeline
from scripts import document_balance
from tests import warm

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "recipes/gpt/configs/tiny.yaml")


# ---- what the schedule predicts


def one_f_one_b(stages: int, m: int) -> list[list[tuple[str, int, int]]]:
    """1F1B (arXiv:2104.04473, figure 4): stage s begins with p - s - 1 forward passes."""
    order = []
    for stage in range(stages):
        warmup = min(stages - stage - 1, m)
        tasks = [("forward", i, 0) for i in range(warmup)]
        for i in range(m - warmup):
            tasks += [("forward", warmup + i, 0), ("backward", i, 0)]
        order.append(tasks + [("backward", i, 0) for i in range(m - warmup, m)])
    return order


def interleaved(stages: int, m: int, chunks: int) -> list[list[tuple[str, int, int]]]:
    """Interleaved 1F1B, in groups of p micro batches (megatron/core/pipeline_parallel/schedules.py)."""
    group, order = stages * chunks, []
    for stage in range(stages):
        passes = {
            kind: [(kind, k // group * stages + k % stages, c if kind == "forward" else chunks - 1 - c)
                   for k in range(m * chunks) for c in [k % group // stages]]
            for kind in timeline.PASSES
        }  # fmt: skip
        warmup = min((stages - stage - 1) * 2 + (chunks - 1) * stages, m * chunks)
        tasks = passes["forward"][:warmup]
        for forward, backward in zip(passes["forward"][warmup:], passes["backward"], strict=False):
            tasks += [forward, backward]
        order.append(tasks + passes["backward"][m * chunks - warmup :])
    return order


@pytest.mark.parametrize(
    ("stages", "m", "chunks"), [(1, 3, 1), (2, 4, 1), (2, 8, 1), (4, 8, 1), (3, 2, 1), (2, 8, 2), (4, 8, 3)]
)
def test_the_bubble_of_equal_stages(stages, m, chunks):
    """The published formula is what the schedule gives where all stages take equally long."""
    order = one_f_one_b(stages, m) if chunks == 1 else interleaved(stages, m, chunks)
    seconds = {
        (s, kind, c): t for s in range(stages) for c in range(chunks) for kind, t in (("forward", 1.0), ("backward", 2.0))
    }
    step = timeline.simulated(order, seconds)
    assert timeline.bubble(step) == pytest.approx(timeline.bubble_of_equal_stages(stages, m, chunks))
    assert timeline.order_of(step) == order
    assert [share.exchange for share in timeline.shares(step)] == [0] * stages


def test_the_bubble_of_unequal_stages():
    seconds = {(0, "forward", 0): 1.0, (0, "backward", 0): 2.0, (1, "forward", 0): 2.0, (1, "backward", 0): 3.0}
    step = timeline.simulated(one_f_one_b(2, 2), seconds)
    # stage 1: F 1-3, B 3-6, F 6-8, B 8-11; stage 0: F 0-1, F 1-2, B 6-8, B 11-13: 16 of 26 seconds
    assert [(span.begin, span.end) for span in step[0]] == [(0, 1), (1, 2), (6, 8), (11, 13)]
    assert timeline.bubble(step) == pytest.approx(10 / 26)
    assert timeline.imbalance(step) == pytest.approx(10 / 8)
    assert [share.idle for share in timeline.shares(step)] == [7, 3]


def test_stages_that_wait_for_each_other():
    order = [[("backward", 0, 0), ("forward", 0, 0)], [("forward", 0, 0), ("backward", 0, 0)]]
    with pytest.raises(ValueError, match="wait for each other"):
        timeline.simulated(order, {(s, kind, 0): 1.0 for s in (0, 1) for kind in timeline.PASSES})


def test_waiting_for_a_stage_is_no_communication():
    """A receive that begins before the other stage is done: until then it waits."""
    step = [
        [Span("forward", 0, 4), Span("exchange", 4, 5), Span("exchange", 5, 10), Span("backward", 10, 12), Span("sum", 12, 13)],
        [Span("exchange", 0, 5), Span("forward", 5, 6), Span("backward", 6, 9), Span("exchange", 9, 10), Span("sum", 10, 13)],
    ]
    first, second = timeline.shares(step)
    assert first == (4, 2, 1, 12 - 4 - 2 - 1, 1)  # of 4-10, the time after 9 is an exchange
    assert second == (1, 3, 1 + 1, 12 - 1 - 3 - 2, 1)


def test_collectives_in_a_pass_are_no_computation():
    spans = [Span("forward", 0, 1), Span("backward", 1, 4), Span("collective", 3, 4), Span("collective", 5, 9)]
    assert timeline.compute_seconds(spans) == 3
    assert timeline.waits([spans, [Span("forward", 0, 2), Span("backward", 2, 7)]]) == [4, 0]


# ---- a slow rank


def steps_of(*seconds: tuple[float, ...]) -> list[list[list[Span]]]:
    return [[[Span("forward", 0, of_rank)] for of_rank in step] for step in seconds]


def test_a_slow_rank_is_named():
    steps = steps_of((1, 2, 1), (1, 1.9, 1), (1, 2, 1), (1, 1.7, 1))
    assert timeline.slow_ranks(steps, [1, 1, 1], 1.3) == [Slow(1, pytest.approx(1.95))]
    assert str(Slow(1, 1.8)) == "rank 1: 1.8 x the others"
    assert timeline.slow_ranks(steps, [1, 2, 1], 1.3) == []  # it holds twice as much


def test_a_disturbed_step_names_no_rank():
    assert timeline.slow_ranks(steps_of((1, 1), (1, 3), (1, 1.1), (1.1, 1), (1, 1)), [1, 1], 1.3) == []


# ---- layouts


def test_balanced_stages():
    assert balance.balanced(8, 2, 2) == [5, 3]
    assert balance.balanced(16, 2, 4) == [4, 5, 5, 2]
    assert balance.balanced(8, 0, 2) == [4, 4]
    for p in range(2, 9):
        for stack, keys in balance.pipelines(4 * p, balance.HEAD_LAYERS, p):
            if stack == "megatron":
                system = type(
                    "", (), {"pp": p, "vpp": int(keys.get("vpp", 1)), "pipeline_layout": keys.get("pipeline_layout", "even")}
                )
                loads = pipeline.stage_layers(4 * p, system)
                loads[-1] += balance.HEAD_LAYERS
                assert max(loads) - min(loads) <= (2 if keys.get("pipeline_layout") is None else 1)


def test_micro_batches_of_a_step():
    assert balance.batches(Options(), True, 2) == [["train.global_batch=32"]]
    given = Options(micro_batches=(2, 4))
    assert balance.batches(given, True, 2) == [["train.global_batch=8"], ["train.global_batch=16"]]
    assert balance.command_of(given, "balance_pipelines").endswith("--parts balance_pipelines --micro-batches 2 4")
    with pytest.raises(BadInput, match="is of the small GPT"):
        balance.batches(given, False, 2)


def test_the_table_of_the_document_is_the_one_that_the_script_writes():
    page = document_balance.PAGE.read_text(encoding="utf-8")
    assert document_balance.page(page) == page
    assert document_balance.TABLE.search(page)


def test_layouts_with_lists():
    options = Options(layouts=("deepspeed:partition=[5,3],zero_stage=1", "megatron"))
    assert balance.asked(options) == [("deepspeed", {"partition": "[5,3]", "zero_stage": "1"}), ("megatron", {})]


# ---- real runs

SLOW_RANK = """
import os, sys, time
from pathlib import Path
import torch
from common.comparison import passes
def slow(module, _):
    if type(module).__name__ in ("GPT2Block", "TransformerLayer"):
        time.sleep(0.02)
if os.environ["RANK"] == "1":
    torch.nn.modules.module.register_module_forward_pre_hook(slow)
passes.main(Path(sys.argv[1]))
"""
LAYOUTS = [("baseline", {}), ("deepspeed", {}), ("deepspeed", {"pp": "2"}), ("megatron", {"pp": "2", "vpp": "2"})]


@pytest.fixture(scope="module")
def slow_runs(corpus, tmp_path_factory):
    """Two ranks, of which rank 1 sleeps in the forward pass of each of its layers: the figures of each layout."""
    folder = tmp_path_factory.mktemp("passes")
    overrides = [f"data.train={corpus}/train", *(f"{stack}.micro_batch=2" for stack in ("baseline", "deepspeed", "megatron"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "STEPS", 3)
        cases = [balance.case_of(TINY, overrides, stack, keys, 2, folder) for stack, keys in LAYOUTS]
    balance.write_runs(cases, folder)
    done = warm.run(["-c", SLOW_RANK, str(folder)], nproc=2, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = balance.steps_of(folder, [case.name for case in cases], 2)
    return {case.name: (case, steps[case.name]) for case in cases}


def test_a_slow_rank_of_a_run_is_named(slow_runs):
    assert list(slow_runs) == ["baseline", "deepspeed", "deepspeed 2+2", "megatron vpp=2 2+2"]
    for name, (case, steps) in slow_runs.items():
        cells = balance.copy_cells(case, steps) if len(case.work) == 1 else balance.pipeline_cells(case, steps)
        [named] = [cell.values for cell in cells if cell.section == balance.SLOW]
        assert str(named).startswith("rank 1: "), name
        assert "rank 0" not in str(named)


def test_the_other_rank_waits(slow_runs):
    for name in ("baseline", "deepspeed"):
        for step in slow_runs[name][1]:
            first, second = map(timeline.compute_seconds, step)
            fast, slow = timeline.waits(step)
            assert second > first + 2 * 4 * 0.02 * 0.9  # micro batches, layers, seconds
            assert fast > 0.1
            assert slow == 0


@pytest.mark.parametrize(("name", "chunks"), [("deepspeed 2+2", 1), ("megatron vpp=2 2+2", 2)])
def test_the_passes_of_a_pipeline(slow_runs, name, chunks):
    case, steps = slow_runs[name]
    assert len(steps) == 3
    for step in steps:
        done = {(s, p.kind, p.micro, p.chunk): p for s, spans in enumerate(step) for p in timeline.passes(spans)}
        kinds = [(s, kind, m, c) for s in (0, 1) for kind in timeline.PASSES for m in range(4) for c in range(chunks)]
        assert sorted(done) == sorted(kinds)
        for task, span in done.items():  # no pass begins before what it needs
            source = timeline.needs(task, 2, chunks)
            assert source is None or done[source].end <= span.begin
        for spans in step:
            own = timeline.passes(spans)
            assert all(a.end <= b.begin for a, b in zip(own, own[1:], strict=False))
            assert any(span.kind == "exchange" for span in spans)
            assert any(span.kind == "sum" for span in spans)
        begin, end = timeline.window(step)
        for share in timeline.shares(step):
            assert share.compute + share.exchange + share.idle == pytest.approx(end - begin)
            assert share.idle > -1e-6
        # the medians leave out the jitter of single passes, which are of 2 ms here beside those of the slow rank; equal stages
        # would idle for 0.2 of the time or less
        predicted = timeline.bubble(timeline.simulated(timeline.order_of(step), timeline.median_seconds([step])))
        assert timeline.bubble(step) > 0.35 and predicted == pytest.approx(timeline.bubble(step), abs=0.1)
    figures = balance.figures_of(balance.pipeline_cells(case, steps), "command")
    assert len(tables(figures)) == 4
    drawn = [picture.name for picture in balance.PICTURES if picture.draw(figures)]
    assert drawn == ["timeline_deepspeed" if chunks == 1 else "timeline_megatron_interleaved"]


def test_a_picture_needs_its_figures():
    other = [Figure("Load balance / Pipelines", "megatron 4+4", "bubble", 1.0, "%", "measured", "command")]
    assert [picture.draw(other) for picture in balance.PICTURES] == [None] * 3


@pytest.mark.slow
def test_the_whole_part(tmp_path):
    """Without a slow rank none is named, and the schedule predicts the bubble."""
    figures = [figure for task in balance.TASKS[:2] for figure in task.run(Options(rounds=2), tmp_path)]
    named = {figure.subject: figure.value for figure in figures if figure.section == balance.SLOW}
    assert set(named.values()) == {"none"}, named


# ---- tokens


def test_tokens_are_counted():
    batch = {"tokens": np.zeros((2, 9)), "loss_mask": np.zeros((2, 8)), "lengths": np.array([8, 3])}
    assert padding.positions(batch) == 16
    assert padding.positions({"inputs": np.zeros((2, 8)), "targets": np.zeros((2, 4)), "loss_mask": np.zeros((2, 4))}) == 24
    counts = np.array([[1, 3], [2, 2]])
    assert padding.fullest(counts).tolist() == [1.5, 1.0]
    assert padding.Spread(counts, 2 * counts).padding == 0.5


def test_the_ranks_of_a_step_have_all_of_its_tokens(corpus, tmp_path):
    """What 2 and 8 ranks get of a step is the same, and dataset and padding are the run's own."""
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": "a" * (3 + 7 * i % 60), "response": "b" * (1 + i % 9)}) + "\n" for i in range(300)),
        encoding="utf-8",
    )
    words = [
        "init.from=scratch", f"data.tokenizer={corpus / 'tokenizer'}", f"task.data={tmp_path}", "model.layers=2",
        "model.hidden=64", "model.heads=2", "data.pack=false",
    ]  # fmt: skip
    drawn = padding.Data("SFT", "gpt", "finetune_cpu.yaml", [*words, "data.length_window=0"])
    two, eight = (padding.spread(drawn, ranks, 5, tmp_path) for ranks in (2, 8))
    assert two.tokens.shape == (5, 2)
    assert eight.tokens.sum(axis=1).tolist() == two.tokens.sum(axis=1).tolist()
    assert 0 < two.padding < 1
    assert (eight.positions >= eight.tokens).all()
    by_length = padding.spread(drawn._replace(overrides=words), 8, 5, tmp_path)
    assert np.median(padding.fullest(by_length.positions)) < np.median(padding.fullest(eight.positions))
