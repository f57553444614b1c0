"""What the layouts cost: common/comparison/performance.py, and that it refuses to compare curves that are not one."""

import json

import pytest
from conftest import ROOT

from common.comparison import figures, layouts, measuring, performance, performance_pictures
from common.comparison.figures import Disagreement
from common.comparison.measuring import Record, Timing
from common.errors import BadInput
from tests import warm

TINY = ROOT / "recipes/gpt/configs/tiny.yaml"
STEPS = performance.STEPS["cpu"]
# Makes a job's runs; from the third on, weight decay applies to the norms and biases too.
WRONG = """\
import dataclasses, json, sys
from common.comparison import measuring
from recipes.gpt import task
job = measuring.job_from(json.loads(sys.argv[1]))
for number, record in enumerate(measuring.run_job(job)):
    if number == 1:
        task.has_weight_decay = lambda name: True
    print("RECORD", json.dumps(dataclasses.asdict(record)))
"""


def cases_of(corpus, folder, *words):
    overrides = [f"data.train={corpus / 'train'}", "data.valid=null", *performance.TELLING]
    chosen = layouts.parsed(words, ["baseline", "deepspeed", "megatron"])
    cases, _ = layouts.cases_of(str(TINY), overrides, chosen, STEPS, 1, folder, optional=False)
    more = [f"train.steps={STEPS + 1}", f"train.save_every={STEPS}"]
    return [case._replace(overrides=[*case.overrides, *more]) for case in cases]


def test_memory_of_a_model_for_which_layouts_matter() -> None:
    """GPT 1.3B on 8 GPUs: ZeRO 1 keeps an eighth of the fp32 state, and stages 2 and 3 of the gradients and weights too."""
    rows = {}
    for words in ("baseline", "deepspeed:zero_stage=1", "deepspeed:zero_stage=2", "deepspeed:zero_stage=3", "megatron:tp=2"):
        [layout] = layouts.parsed([words], ["baseline", "deepspeed", "megatron"])
        overrides = [f"{layout.stack}.{key}={value}" for key, value in layout.values.items()]
        case = layouts.Case(words, f"recipes.gpt.{layout.stack}.pretrain", str(TINY), "", overrides)
        rows[words] = {figure.metric: figure.value for figure in performance.memory_of_1_3b(case)}
    parameters = 1.3158e9
    zero1, zero2, zero3 = (rows[f"deepspeed:zero_stage={stage}"] for stage in (1, 2, 3))
    assert zero1["optimizer"] == pytest.approx(12 * parameters / 8 / 1e9, 0.01) and zero1["weights"] == zero2["weights"]
    assert zero2["gradients"] == pytest.approx(zero1["gradients"] / 8, 0.01)
    assert zero3["weights"] == pytest.approx(zero1["weights"] / 8, 0.01)
    assert rows["baseline"]["peak"] > 2 * zero1["peak"] > 2 * zero2["peak"] and rows["megatron:tp=2"]["peak"] < 20


def test_a_layout_is_given_by_its_keys_or_by_its_name() -> None:
    stacks = ["baseline", "deepspeed", "megatron"]
    for keys, name in (
        ("megatron:tp=2,sequence_parallel=true", "megatron tp=2 sp"),
        ("deepspeed:zero_stage=3", "deepspeed zero=3"),
    ):
        assert layouts.parsed([name], stacks) == layouts.parsed([keys], stacks)
    with pytest.raises(BadInput, match="no stack 'megatorn'"):
        layouts.parsed(["megatorn tp=2"], stacks)


def test_weight_decay_on_norms_is_refused(corpus, tmp_path):
    cases = cases_of(corpus, tmp_path, "baseline", "megatron:micro_batch=4", "deepspeed")
    job = measuring.Job([(0, case) for case in cases], cases[0], "fp32", STEPS)
    done = warm.run(["-c", WRONG, measuring.job_json(job)], nproc=1)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("RECORD ") for line in done.stdout.splitlines() if line.startswith("RECORD ")]
    reference, right, wrong = map(json.loads, lines)
    assert len(reference["losses"]) == len(reference["timing"]["seconds"]) == STEPS
    # the same state, by the same names; state.json names the layout
    # and in more pieces, which the header and the index of so small a state show: Megatron's q, k and v lie together
    assert reference["saved_bytes"] < right["saved_bytes"] < 1.02 * reference["saved_bytes"]
    assert not reference["disagreement"] and not right["disagreement"], right
    assert wrong["disagreement"].startswith("deepspeed zero=1 and baseline have not one curve: at step "), wrong
    print(wrong["disagreement"])


def test_the_first_step_that_differs_is_named():
    first = {step: {"loss": 7.0 - step, "grad_norm": 2.0} for step in (1, 2, 3)}
    near = {step: values | {"grad_norm": 2.0 * (1 + 0.9e-4)} for step, values in first.items()}
    assert measuring.disagreement("b", near, "a", first, "fp32") == ""
    far = near | {2: {"loss": 5.0, "grad_norm": 2.001}}
    text = measuring.disagreement("b", far, "a", first, "fp32")
    assert "b and a have not one curve: at step 2 the gradient norm is 2.001 and 2, a relative difference of 5.0e-04" in text
    assert measuring.disagreement("b", far, "a", first, "bf16") == ""  # the norm has no level there
    assert "at step 3 the loss is nan" in measuring.disagreement("b", near | {3: {}}, "a", first, "fp32")


def record(case, number, seconds, peak=None):
    timing = Timing([9.0, 9.0, *([seconds] * (STEPS - 2))], [512] * STEPS, after=0.25, first_at=1.0)
    losses = [7.0 - 0.1 * step for step in range(STEPS)]
    return Record(case.name, number, "", timing, losses, [2.0] * STEPS, saved_bytes=5_000_000, peak_bytes=peak)


def launches(monkeypatch, seconds, fails=()):
    """Replace the processes: a layout's step takes these seconds, or it fails."""
    jobs = []

    def launch(job, nproc, folder):
        jobs.append(job)
        made = []
        for number, case in job.runs:
            if case.name in fails:
                return [*made, Record(case.name, number, reason="OutOfMemoryError: out")]
            made.append(record(case, number, seconds.get(case.name, 1.0) * (1 + 0.01 * number)))
        return made

    monkeypatch.setattr(measuring, "launch", launch)
    return jobs


def test_tables_of_a_comparison(corpus, tmp_path, monkeypatch):
    jobs = launches(monkeypatch, {"deepspeed zero=1": 0.5, "deepspeed zero=3": 2.0}, fails=("megatron dist-opt",))
    work = performance.Work("GPT", TINY, [f"data.train={corpus / 'train'}", *performance.TELLING])
    found = performance.compared(work, figures.Options(words=("--rounds", "3")), "performance_gpt", tmp_path)
    speed, best, memory, curves, losses, of_1_3b = figures.tables(found)
    rows = {"baseline", "baseline shard=full", *(f"deepspeed zero={stage}" for stage in range(4)), "megatron", "megatron tp=2",
            "megatron pp=2"}  # fmt: skip
    assert set(memory.rows) == set(curves.rows) == set(losses.rows) == set(of_1_3b.rows) == rows
    assert set(speed.rows) == rows | {"megatron dist-opt"}
    failed = speed.cells["megatron dist-opt", "speed"]
    assert failed.value is None and failed.source == "failed: OutOfMemoryError: out"
    assert [number for number, _ in jobs[1].runs][:3] == [0, 0, 1]  # tp and pp, then the next round
    assert not any(case.name == "megatron dist-opt" for _, case in jobs[1].runs)
    assert speed.cells["deepspeed zero=1", "ratio"].value == pytest.approx(2)
    assert speed.cells["deepspeed zero=1", "ratio"].unit == "of baseline"
    assert speed.cells["deepspeed zero=3", "ratio"].value == pytest.approx(0.5)
    assert speed.cells["deepspeed zero=1", "speed"].value == pytest.approx(512 / 0.505)
    assert speed.cells["baseline", "save"].value == 0.25 and speed.cells["baseline", "checkpoint"].value == 5
    assert speed.cells["baseline", "MFU full"].value is None  # on a CPU
    goal = next(metric for metric in speed.columns if metric.startswith("to loss"))
    assert speed.cells["deepspeed zero=1", goal].value == pytest.approx(STEPS * 0.505)
    assert [best.cells[stack, "layout"].value for stack in best.rows] == ["baseline", "deepspeed zero=1", "megatron"]
    assert memory.cells["deepspeed zero=3", "weights"].value < 0.6 * memory.cells["deepspeed zero=2", "weights"].value
    assert memory.cells["baseline", "optimizer"].kind == "counted"
    assert {f.kind for f in memory.column("activations")} == {"predicted"}
    assert curves.cells["megatron pp=2", "loss off by"].value == 0
    assert all(f.source.startswith(("python -m", "common/planning", "failed", "a process")) for f in found), found
    for picture in performance_pictures.PICTURES:
        assert picture.draw(found) is not None
        assert picture.draw(figures.select(found, best.section)) is None  # without the other tables


def test_a_reference_that_fails_leaves_the_part_out(corpus, tmp_path, monkeypatch):
    launches(monkeypatch, {}, fails=("baseline",))
    work = performance.Work("GPT", TINY, [f"data.train={corpus / 'train'}"])
    with pytest.raises(BadInput, match="baseline, with which all others are compared: OutOfMemoryError"):
        performance.compared(work, figures.Options(), "performance_gpt", tmp_path)


def test_a_disagreement_ends_the_comparison(corpus, tmp_path, monkeypatch):
    def launch(job, nproc, folder):
        return [Record(case.name, number, disagreement=f"{case.name} differs" if "zero" in case.name else "")
                for number, case in job.runs]  # fmt: skip

    monkeypatch.setattr(measuring, "launch", launch)
    work = performance.Work("GPT", TINY, [f"data.train={corpus / 'train'}"])
    with pytest.raises(Disagreement, match="deepspeed zero=0 differs"):
        performance.compared(work, figures.Options(), "performance_gpt", tmp_path)


def test_stacks_and_layouts_that_are_asked_for():
    assert performance.short('megatron:tp=1,pp=2,sequence_parallel=false,recompute="none"') == "megatron pp=2"
    some = performance.layouts_of("gpt", figures.Options(stacks=("baseline", "megatron")))
    assert {layout.stack for layout in some} == {"baseline", "megatron"}
    given = performance.layouts_of("gpt", figures.Options(layouts=("deepspeed:zero_stage=2",)))
    assert given == [layouts.Layout("deepspeed", {"zero_stage": "2"})]
    assert performance.no_dropout(str(TINY), ["model.dropout=0.1"]) == ["model.dropout=0"]
    assert performance.no_dropout(str(TINY), []) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_comparison(tmp_path):
    options = figures.Options(layouts=("baseline", "deepspeed:zero_stage=2", "megatron:tp=2"), rounds=2)
    found = performance.pretraining("gpt", options, tmp_path)
    speed, best, memory, curves, _ = figures.tables(found)
    assert len(speed.rows) == len(best.rows) == len(memory.rows) == 3
    assert all(figure.value > 5 for figure in best.column("start"))  # the imports alone take as long
    assert all(figure.value < layouts.LOSS for figure in curves.column("loss off by"))
