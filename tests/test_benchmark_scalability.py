"""Scalability and the choice of a stack: what is counted against theory and simulated runs, what is predicted against the lines
of scripts/plan.py and published values, and the search for the largest model."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from common.comparison import choice, communication, largest_model, planned, scalability, verdict
from common.comparison.figures import Figure, Options, select, tables
from common.comparison.layouts import SHORT
from common.errors import BadInput
from common.simulation import build
from scripts import plan

ROOT = Path(__file__).resolve().parents[1]
TINY = json.loads((ROOT / "tests/simulated.json").read_text(encoding="utf-8"))
LARGE = json.loads((ROOT / "docs/planner/simulation_report.json").read_text(encoding="utf-8"))["rows"]


def gpt2(layers: int, hidden: int, vocabulary: int, positions: int) -> int:
    """Parameters: embeddings; of a layer 4 matrices of attention and 8 of the MLP, their biases, 2 norms; the last norm."""
    layer = 12 * hidden**2 + 4 * hidden + 5 * hidden + 4 * hidden
    return (vocabulary + positions) * hidden + layers * layer + 2 * hidden


LAYERS, HIDDEN = 4, 64  # of tiny.yaml, which tests/test_simulated_runs.py simulates on 4 ranks
MODEL = gpt2(LAYERS, HIDDEN, 512, 64)
ACTIVATION = 2 * 2 * 64 * HIDDEN  # bytes in bf16: 2 samples of 64 positions
SIZES = {
    "gpt3_1.3b": gpt2(24, 2048, 50304, 2048), "gpt3_2.7b": gpt2(32, 2560, 50304, 2048),
    "gpt3_6.7b": gpt2(32, 4096, 50304, 2048), "gpt3_13b": gpt2(40, 5120, 50304, 2048),
}  # fmt: skip


def tiny(layout: str, what: str, rank: int = 0) -> tuple[int, int]:
    """(calls, bytes) in a step of the simulated run, such as 'send bf16 of 2'."""
    calls, size = TINY[f"gpt pretrain {layout} rank {rank}"]["collectives"].get(what, (0, 0))
    return calls, size


def large(config: str, stack: str, *words: str) -> dict[str, Any]:
    [row] = [
        row for row in LARGE
        if (row["config"], row["stack"], row["rank"]) == (f"recipes/gpt/configs/{config}.yaml", stack, 0)
        and row["world"] > 1 and row["overrides"][1:] == list(words)  # after train.global_batch
    ]  # fmt: skip
    return row


def size_of(row: dict[str, Any], op: str, dtype: str, ranks: int = 8) -> int:
    return sum(one["bytes"] for one in row["collectives"] if (one["op"], one["dtype"], one["group_size"]) == (op, dtype, ranks))


# ---- counted equals theory, on collectives that the simulation has recorded


def test_zero_1_sends_2_x_the_parameters_and_so_does_zero_2_in_one_micro_batch() -> None:
    one = large("gpt3_1.3b", "deepspeed")  # gradients once, to the rank that owns them; weights back
    assert size_of(one, "reduce", "bf16") == size_of(one, "all_gather", "bf16") == 2 * SIZES["gpt3_1.3b"]
    two = large("gpt3_2.7b", "deepspeed")  # gradients in each of the 2 micro batches
    assert size_of(two, "reduce", "bf16") == 2 * 2 * SIZES["gpt3_2.7b"]
    assert size_of(two, "all_gather", "bf16") == 2 * SIZES["gpt3_2.7b"]


def test_zero_1_of_a_small_model_all_reduces() -> None:
    """Then it sends 3 x: an all-reduce is two rings (use_multi_rank_bucket_allreduce of common/stacks/zero.py)."""
    assert tiny("zero1", "all_reduce bf16 of 4")[1] == tiny("zero1", "all_gather bf16 of 4")[1] == 2 * MODEL
    assert tiny("zero2", "all_reduce bf16 of 4")[1] == 2 * 2 * MODEL  # 2 micro batches


@pytest.mark.parametrize("config", SIZES)
def test_zero_3_sends_3_x_the_parameters_in_a_micro_batch(config: str) -> None:
    """Weights for the forward and for the backward pass, and gradients; but for those weights that it keeps between the two, at
    most stage3_max_live_parameters = 1e9."""
    row, size = large(config, "deepspeed", "deepspeed.zero_stage=3"), SIZES[config]
    assert size_of(row, "reduce_scatter", "bf16") == 2 * 2 * size
    kept = 2 * size - size_of(row, "all_gather", "bf16") / 2 / 2
    assert 0 <= kept <= 1e9


def test_tensor_parallelism_has_4_all_reduces_per_layer() -> None:
    micro_batches, outside = 4, 2  # the embedding's, and the gradient of the head's input
    assert tiny("tp2", "all_reduce bf16 of 2") == (
        micro_batches * (4 * LAYERS + outside), micro_batches * (4 * LAYERS + outside) * ACTIVATION,
    )  # fmt: skip


def test_sequence_parallelism_gathers_and_scatters_the_same_bytes() -> None:
    """A scatter and a gather for each all-reduce; and gathers once more for the gradients of two weights per layer and of the
    head (arXiv:2205.05198, section 4.2.2)."""
    micro_batches = 4
    all_reduced = micro_batches * 4 * LAYERS * ACTIVATION
    head = micro_batches * ACTIVATION
    assert tiny("tp2_sp", "reduce_scatter bf16 of 2")[1] == all_reduced + head
    again = micro_batches * (2 * LAYERS + 1) * ACTIVATION
    weights = 2 * sum(64 * math.ceil(n / 64) for n in tensor_parallel_parameters())  # the distributed optimizer's
    weights = 128 * 2 * math.ceil(weights / 2 / 128)
    embedding_and_head = 2 * head
    assert tiny("tp2_sp", "all_gather bf16 of 2")[1] == all_reduced + again + embedding_and_head + weights


def tensor_parallel_parameters() -> list[int]:
    """Elements of a rank of two, of embeddings, norms, and divided matrices and biases."""
    h = HIDDEN
    layer = [h, h, 3 * h * h // 2, 3 * h // 2, h * h // 2, h, h, h, 2 * h * h, 2 * h, 2 * h * h, h]
    return [512 * h // 2, 64 * h, *(layer * LAYERS), h, h]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_pipeline_passes_one_activation_per_boundary_and_micro_batch_each_way(rank: int) -> None:
    micro_batches = 4
    for layout, group in (("pp2", 2), ("zero1_pp2", 4)):
        for way in ("send", "recv"):
            assert tiny(layout, f"{way} bf16 of {group}", rank) == (micro_batches, micro_batches * ACTIVATION)


def test_the_distributed_optimizer_splits_an_all_reduce() -> None:
    assert tiny("megatron", "all_reduce fp32 of 4")[1] == 4 * MODEL
    assert tiny("distributed_optimizer", "reduce_scatter fp32 of 4")[1] == 4 * MODEL
    assert tiny("distributed_optimizer", "all_gather bf16 of 4")[1] == 2 * MODEL
    row = large("gpt3_1.3b", "megatron")
    assert size_of(row, "reduce_scatter", "fp32") == 4 * SIZES["gpt3_1.3b"]
    assert size_of(row, "all_gather", "bf16") == 2 * SIZES["gpt3_1.3b"]


def test_what_is_counted_equals_the_simulation() -> None:
    """Of every simulated GPT without tp and pp, but ZeRO 3, of which is known what it keeps in one config alone."""
    compared = []
    for row in LARGE:
        stem = Path(row["config"]).stem
        if "gpt" not in row["config"] or stem == "llama_1b" or row["world"] != 8 or row["rank"]:
            continue
        cfg = planned.resolved(row["config"], row["overrides"])
        system = getattr(cfg, row["stack"])
        zero_3 = getattr(system, "zero_stage", 0) == 3
        if getattr(system, "tp", 1) * getattr(system, "pp", 1) > 1 or zero_3 and stem != "gpt3_1.3b":
            continue
        dtype = "bf16" if row["stack"] == "deepspeed" else "fp32"
        for op, size in communication.of_replicas(cfg, row["stack"], 8).items():
            recorded = size_of(row, op, "bf16" if op == "all_gather" else dtype)
            if op == "reduce_scatter":
                recorded += size_of(row, "reduce", dtype)
            assert size == recorded, (row["config"], row["stack"], row["overrides"], op)
            compared.append(op)
    assert len(compared) >= 15


def test_figures_of_the_bytes() -> None:
    figures = communication.bytes_counted(Options(), Path())
    tables(figures)
    of = {(f.subject, f.metric): f.value for f in select(figures, communication.SENT)}
    size = SIZES["gpt3_1.3b"] / 1e9
    assert of["baseline", "8 ranks"] == pytest.approx(2 * 4 * size * 7 / 8, rel=1e-9)
    assert of["deepspeed zero=1", "8 ranks"] == pytest.approx(2 * 2 * size * 7 / 8, rel=1e-9)
    assert of["deepspeed zero=1", "64 ranks"] == pytest.approx(3 * 2 * size * 63 / 64, rel=1e-9)  # all-reduced
    assert of["megatron dist-opt", "512 ranks"] == pytest.approx((4 + 2) * size * 511 / 512, rel=1e-9)
    activation = 2 * 8 * 2048 * 2048 / 1e9
    passed = {(f.subject, f.metric): f.value for f in select(figures, communication.THEORY)}
    assert all(abs(passed[s, "simulated"] / passed[s, "theory"] - 1) < 0.03 for s, _ in passed)  # type: ignore[operator]
    # 8 micro batches: 4 all-reduces per layer, the embedding's and the head's, and 3 numbers per token
    assert of["megatron tp<=8", "8 ranks"] == pytest.approx(8 * (24 * 4 + 2) * activation * 2 * 7 / 8, rel=0.01)
    assert communication.draw(figures) and communication.draw([]) is None
    alone = communication.bytes_counted(Options(stacks=("deepspeed",)), Path())
    assert {f.subject.split()[0] for f in alone} == {"deepspeed"}


# ---- predicted


def test_published_rows_are_those_of_the_paper() -> None:
    """PTD-P, table 2: achieved TFLOP/s per GPU."""
    figures = scalability.published_beside_predicted()
    published = {f.subject: f.value for f in select(figures, scalability.TABLE_2, "published")}
    assert published == {
        "175B, ZeRO 3, 384 GPUs": 144, "175B, ZeRO 3, 768 GPUs": 88, "175B, ZeRO 3, 1,536 GPUs": 44,
        "530B, ZeRO 3, 640 GPUs": 138, "530B, ZeRO 3, 1,120 GPUs": 98, "530B, ZeRO 3, 2,240 GPUs": 48,
        "175B, PTD, 384 GPUs": 153, "175B, PTD, 768 GPUs": 149, "175B, PTD, 1,536 GPUs": 141,
        "530B, PTD, 560 GPUs": 171, "530B, PTD, 1,120 GPUs": 167, "530B, PTD, 2,240 GPUs": 159,
    }  # fmt: skip
    for figure in select(figures, scalability.TABLE_2, "predicted"):
        assert figure.spread and figure.spread[0] <= published[figure.subject] <= figure.spread[1]  # type: ignore[operator]
    assert scalability.draw_table_2(figures) and scalability.draw_table_2([]) is None


def test_figures_of_predicted_scaling() -> None:
    figures = scalability.predicted_on("13B", 1024, ("baseline", "deepspeed")) + scalability.predicted_on(
        "13B", 4096, ("baseline",)
    )
    [table] = tables(figures)
    seconds, mfu, rate = (table.cells["1,024 GPUs", f"deepspeed {unit}"] for unit in ("s/step", "MFU %", "tokens/s per GPU"))
    assert isinstance(seconds.value, float) and isinstance(mfu.value, float) and isinstance(rate.value, float)
    assert rate.value == pytest.approx(1024 * 2048 / seconds.value / 1024)
    flops = 6 * SIZES["gpt3_13b"] + 12 * 40 * 5120 * 2048  # per token (PaLM, arXiv:2204.02311, appendix B)
    assert mfu.value == pytest.approx(100 * rate.value * flops / 989.4e12, rel=0.02)
    assert seconds.spread and seconds.spread[0] < seconds.value < seconds.spread[1]
    nothing = table.cells["4,096 GPUs", "baseline s/step"]
    assert nothing.value is None and "does not divide" in nothing.source
    assert scalability.draw_predicted(figures) and scalability.draw_predicted([]) is None


# ---- which one


def planned_lines(source: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the line of a cell prints with --json."""
    assert source.startswith("python -m scripts.plan ")
    monkeypatch.setattr(sys, "argv", [*shlex.split(source)[2:], "--json"])
    plan.main()
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def named(words: str) -> tuple[str, dict[str, Any]]:
    """'megatron tp=2 sp dist-opt micro=4' -> (stack, layout as scripts/plan.py has it)."""
    longer = {short: key for key, short in SHORT.items()} | {"micro": "micro_batch"}
    stack, *pairs = words.partition(" (")[0].split()
    layout: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        layout[longer.get(key, key)] = int(value) if value.isdigit() else value or True
    return stack, layout


@pytest.mark.parametrize(
    "model, gpus", [(choice.GPT["70B (Llama)"], 8), (choice.ON_16["BERT 1.3B"], 16), (choice.ON_16["GPT 13B"], 16)],
)  # fmt: skip
def test_a_cell_is_what_its_plan_line_says(
    model: choice.Model, gpus: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    best, source = choice.best_of(model, gpus, ("baseline", "deepspeed", "megatron"))
    text = choice.answer(best)
    lines = [one for one in planned_lines(source, capsys, monkeypatch) if one["fits"]]
    lines = [one for one in lines if one["memory"]["host"] * min(gpus, 8) <= 2e12]  # of a node's host
    first = {stack: next((one for one in lines if one["stack"] == stack), None) for stack in planned_stacks(lines)}
    chosen = [named(words) for words in text.removeprefix("either: ").split(", or ")]
    assert [stack for stack, _ in chosen] == sorted((s for s, _ in chosen), key=choice.SIMPLER.index)
    for stack, layout in chosen:
        line = first[stack]
        assert line is not None
        expected = {key: value for key, value in line["layout"].items() if value is True or value not in (1, "none")}
        expected |= {"zero_stage": line["layout"].get("zero_stage", 1)} if stack == "deepspeed" else {}
        expected |= {"micro_batch": line["layout"]["micro_batch"]}
        assert layout == expected
    worst = {stack: one["error_of_nearest"] or 0.117 for stack, one in first.items() if one}  # docs/planner.md: ZeRO 3 11.7 %
    least = lines[0]["seconds_per_step"]
    for stack, one in first.items():
        near = one["seconds_per_step"] / least - 1 <= max(worst[stack], worst[lines[0]["stack"]]) if one else False
        assert near == (stack in dict(chosen)), (stack, text)


def planned_stacks(lines: list[dict[str, Any]]) -> set[str]:
    return {one["stack"] for one in lines}


def test_a_model_that_fits_nowhere_says_so() -> None:
    figures = choice.cell("175B", choice.GPT["175B"], 1, ("baseline", "deepspeed", "megatron"))
    assert str(figures[0].value).startswith("does not fit: needs 3,1") and figures[1].value is None
    only = choice.cell("175B", choice.GPT["175B"], 1, ("megatron",))
    assert only[0].value == "does not fit" and "--stack megatron" in only[0].source
    tables([*figures, *choice.rules()])


# ---- the largest model


@pytest.mark.parametrize("answer", [0, 1, 7, 30, 31, 32, 33, 38, 90])
def test_the_boundary_is_found_in_few_runs(answer: int) -> None:
    asked: list[int] = []

    def fits(layers: int) -> bool:
        assert layers not in asked, "asked twice"
        asked.append(layers)
        return layers <= answer

    assert largest_model.boundary(32, fits) == answer
    assert len(asked) <= (2 if answer in (31, 32) else 14)


def test_where_the_search_begins() -> None:
    room = largest_model.capacity("H100", 8)
    assert room == int(79.2 * 2**30) - 3 * 2**29
    cell = largest_model.placed("deepspeed", {"zero_stage": 1}, 8, room)
    assert (cell.hidden, cell.heads) in {(hidden, heads) for _, hidden, heads in largest_model.SERIES}
    fits = [largest_model.is_estimated_to_fit(cell, cell.start + more, cell.hidden, cell.heads, room) for more in (0, 1)]
    assert fits == [True, False]
    on_host = largest_model.placed("deepspeed", {"zero_stage": 3, "offload": "all"}, 8, room)
    assert cell.parameters(cell.start) < on_host.parameters(on_host.start) < 2e12 / 16  # 16 bytes each in 2 TB


@pytest.mark.slow
def test_the_largest_model_fits_and_one_layer_more_does_not(tmp_path: Path) -> None:
    try:
        build.preload()
    except build.CannotSimulate as error:
        pytest.skip(error.problems[0])
    room = 6 * 10**9
    cell = largest_model.placed("deepspeed", {"zero_stage": 3}, 8, room)
    found = largest_model.searched({"small": ([cell], room)}, tmp_path)["small"][0]
    assert not found.reason and 0 < found.reserved <= room
    assert abs(found.layers / cell.start - 1) < 0.1
    # 16 bytes per parameter on 8 ranks are the least
    assert cell.parameters(found.layers) * 16 / 8 < room < cell.parameters(found.layers) * 16


def test_a_cell_of_the_largest_model_names_the_run_that_fits() -> None:
    cell = largest_model.Cell("megatron", {"tp": 8}, 8, 4096, 32, 40)
    found = {"H100": largest_model.Found(41, 80), "A100": largest_model.Found(0, 0, "it hangs")}
    figures: list[Figure] = largest_model.row(cell, found)
    [table] = tables(figures)
    assert table.rows == ["8 GPUs: megatron tp=8 dist-opt"]
    assert figures[0].value == pytest.approx(gpt2(41, 4096, 50304, 2048) / 1e9)
    assert (
        "--world 8" in figures[0].source
        and "model.layers=41" in figures[0].source
        and "train.global_batch=2" in figures[0].source
    )
    assert figures[1].value is None and "it hangs" in figures[1].source


def test_the_smaller_gpu_is_asked_where_the_larger_one_was_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An A100 has 0.1 GiB less than an H100."""
    asked: dict[str, list[str]] = {}

    def searched(groups: dict[str, Any], folder: Path) -> dict[str, list[largest_model.Found]]:
        asked.update({name: [largest_model.subject_of(cell) for cell in cells] for name, (cells, _) in groups.items()})
        return {
            name: [largest_model.Found(c.start - ("A100" in name), room - 10**7 if c.stack == "megatron" else 1) for c in cells]
            for name, (cells, room) in groups.items() if cells
        }  # fmt: skip

    monkeypatch.setattr(largest_model, "searched", searched)
    monkeypatch.setattr(build, "preload", lambda: "")
    [table] = tables(largest_model.largest_model(Options(stacks=("deepspeed", "megatron")), tmp_path))
    assert asked["H100_1"] == ["1 GPU: deepspeed zero=1", "1 GPU: megatron"] and asked["A100_1"] == ["1 GPU: megatron"]
    sizes = [[table.cells[row, name].value for name in largest_model.GPUS.values()] for row in asked["H100_1"]]
    assert sizes[0][0] == sizes[0][1] and sizes[1][0] > sizes[1][1]  # type: ignore[operator]
    assert table.cells["8 GPUs: deepspeed zero=3 offload=all (2 TB of host memory)", "H100 80 GB"].value is None


def test_the_verdict_finds_these_tables() -> None:
    """By their names, which it repeats."""
    assert verdict.LARGEST == largest_model.SECTION
    found = scalability.predicted_on("175B", 1024, ("deepspeed", "megatron"))
    [head] = [one for one in verdict.HEADS if "175B on 1,024" in one.name]
    assert all(head.find(found, stack) for stack in ("deepspeed", "megatron"))


def test_without_a_null_gpu_the_part_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(BadInput, match=r"needs g\+\+"):
        largest_model.largest_model(Options(), tmp_path)
