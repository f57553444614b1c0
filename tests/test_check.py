"""scripts.check, plan and plot: on logs as the recipes write them."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emitters
import pytest
from conftest import case

from common import config, families
from common.errors import BadInput
from common.evaluation import metrics, text
from common.preflight import task_module
from common.yaml_files import read_yaml
from recipes.bert import finetune as bert_finetune
from scripts import check, evaluate, plot

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "recipes/gpt/configs/shakespeare_char_cpu.yaml"
GPU = ROOT / "recipes/gpt/configs/shakespeare_char_gpu.yaml"
BERT = ROOT / "recipes/bert/configs/bert_base.yaml"


def trained(step: int, loss: float) -> str:
    values = {
        "step": step,
        "loss": loss,
        "grad_norm": 0.7134612798690796,
        "lr": 1.0e-05,
        "ms": 21.4,
        "tokens_per_s": 35888.0,
    }
    return json.dumps(values | {"mem_bytes": 612368384})


def run_folder(out: Path, named: Path, overrides: list[str], losses: dict[int, float], steps: int, stack: str) -> Path:
    """An OUT: config.yaml resolved as a run records it, run.json, metrics.jsonl with training lines up to `steps`."""
    family = named.parent.parent.name
    cfg = config.load(named, overrides, task_module(family, read_yaml(named)).Config)
    optim = cfg.optim.model_copy(update={"decay_steps": cfg.optim.decay_steps or cfg.last_step})
    out.mkdir(parents=True)
    config.write_yaml(cfg.model_copy(update={"model": cfg.model.resolve(cfg, 65), "optim": optim}), out / "config.yaml")
    info = {"config": named.stem, "family": family, "stack": stack, "commit": "0123abcd", "id": str(out), "init": None}
    (out / "run.json").write_text(json.dumps(info))
    lines = []
    for step in [*range(1, min(steps, 3000)), steps]:
        lines.append(trained(step, 4.17 - 2.3 * step / steps))
        if step in losses:
            lines.append(json.dumps({"step": step, "valid_loss": losses[step], "valid_tokens": 111488}))
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return out


def finetuned(out: Path, run: Path, name: str, seed: int = 1234, **more: Any) -> Path:
    """An OUT of finetune.sh that begins from the last step of `run`, and ended."""
    recorded = read_yaml(run / "config.yaml")
    family = json.loads((run / "run.json").read_text())["family"]
    named = ROOT / f"recipes/{family}/configs/finetune_{name}.yaml"
    values = read_yaml(named)
    shapes = {k: v for k, v in recorded["model"].items() if k not in {"pair_head", "dropout", "init_std"}}
    words = [f"model.{key}={config.written(value)}" for key, value in shapes.items()]
    words += [f"train.seed={seed}", "init.from=no/longer/there", *more.pop("overrides", [])]
    run_folder(out, named, words, {}, values["train"]["steps"], "deepspeed")
    steps = recorded["phases"][-1]["train.steps"] if recorded.get("phases") else recorded["train"]["steps"]
    start = {"id": json.loads((run / "run.json").read_text())["id"], "step": steps}
    info = json.loads((out / "run.json").read_text()) | {"init": start} | more
    (out / "run.json").write_text(json.dumps(info))
    return out


def evaluated(out: Path, task: str, scores: dict[str, float], n: int, protocol: str = "dev") -> None:
    path = out / "eval.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    rows += [{"task": task, "metric": m, "value": v, "n": n, "protocol": protocol} for m, v in scores.items()]
    path.write_text(json.dumps(rows))


def command(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "good", CPU, [], {250: 2.4231, 2000: 1.8857412338256836}, 2000, "megatron")


def one(run: Path) -> check.Row:
    rows = check.run_rows([run])
    assert len(rows) == 1
    return rows[0]


def test_a_run_that_reaches_its_number_passes(good: Path) -> None:
    done = command("scripts.check", str(good))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "gpt/shakespeare_char_cpu",
        "  val_loss  1.88 +- 0.03 nats (nanoGPT README)",
        "    pass         1.8857  megatron",
        "1 pass",
    ]


@pytest.mark.parametrize("loss", [1.92, 1.84, float("nan")])
def test_a_run_that_does_not_fails(tmp_path: Path, loss: float) -> None:
    run = run_folder(tmp_path / "run", CPU, [], {2000: loss}, 2000, "baseline")
    assert one(run).verdict == "fail"
    done = command("scripts.check", str(run))
    assert done.returncode == 1 and "\n    fail " in done.stdout
    assert ("better than published" in done.stdout) == (loss == 1.84)


NOT_EVIDENCE = [
    (["optim.lr=2e-3"], 2000, "optim.lr is 0.002, the config says 0.001"),
    (["model.hidden=256", "optim.lr=2e-3"], 2000, "(and 2 more)"),  # ffn follows hidden
    (["train.seed=1"], 2000, "train.seed is 1"),
    (["train.eval_samples=64"], 2000, "train.eval_samples is 64, the config says 'all'"),
    (["train.steps=1000"], 1000, "train.steps is 1000, the config says 2000"),
    (["megatron.recompute=true", "megatron.extra.recompute_num_layers=2"], 2000, "megatron.extra was used"),
    ([], 1500, "stopped at step 1500 of 2000"),
]


@pytest.mark.parametrize("overrides, steps, reason", NOT_EVIDENCE)
def test_what_is_not_the_published_experiment_is_not_evidence(
    tmp_path: Path, overrides: list[str], steps: int, reason: str
) -> None:
    row = one(run_folder(tmp_path / "run", CPU, overrides, {1000: 1.88, 2000: 1.88}, steps, "megatron"))
    assert row.verdict == "not-run" and row.measured == "-" and reason in row.reason


def test_quantized_weights_are_no_evidence(tmp_path: Path) -> None:
    quantized = ["deepspeed.zero_stage=3", "deepspeed.quantized_weights=true"]
    row = one(run_folder(tmp_path / "run", CPU, quantized, {2000: 1.88}, 2000, "deepspeed"))
    assert row.verdict == "not-run" and "deepspeed.quantized_weights was used" in row.reason


def test_what_may_differ_does_not_matter(tmp_path: Path) -> None:
    """Systems, intervals, paths of the corpus, another stack's extra, the run's own word on what it should reach."""
    changes = [
        "deepspeed.micro_batch=6",
        "deepspeed.zero_stage=3",
        "train.eval_every=100",
        "data.train=elsewhere/train",
    ]
    changes += ["megatron.extra={recompute_granularity: selective}", "expect.val_loss.value=3.0"]
    row = one(run_folder(tmp_path / "run", CPU, changes, {2000: 1.87}, 2000, "deepspeed"))
    assert row.verdict == "pass" and row.published.startswith("1.88 ")


def test_no_validation_after_the_last_step(tmp_path: Path) -> None:
    row = one(run_folder(tmp_path / "run", CPU, [], {1750: 1.88}, 2000, "megatron"))
    assert (row.verdict, row.reason) == ("not-run", "no validation at step 2000")


def test_best_val_loss_is_the_lowest(tmp_path: Path) -> None:
    row = one(run_folder(tmp_path / "run", GPU, [], {1750: 1.4733, 5000: 1.7044}, 5000, "baseline"))
    assert (row.verdict, row.metric, row.measured) == ("pass", "best_val_loss", "1.4733")


# ---- scores ----------------------------------------------------------------------------------------------------------


def verdicts(rows: list[check.Row]) -> list[tuple[str, str, str]]:
    return [(row.metric, row.verdict, row.measured) for row in rows]


def test_scores_come_from_eval_json(tmp_path: Path) -> None:
    """Of Megatron-LM's 355M (arXiv:1909.08053, table 3): 19.31 and 45.18 %."""
    named = ROOT / "recipes/gpt/configs/megatron_355m.yaml"
    run = run_folder(tmp_path / "run", named, [], {}, 300_000, "megatron")
    assert [row.verdict for row in check.run_rows([run])] == ["not-run", "not-run"]
    evaluated(run, "wikitext103", {"word_perplexity": 19.37}, 245_565, "megatron-wikitext, windows of 1024")
    evaluated(run, "lambada", {"accuracy": 0.4518}, 100, "lambada-strict, the first 100 of 5,153 passages")
    evaluated(run, "lambada", {"accuracy": 0.4518}, 5_000, "lambada-strict")
    rows = check.run_rows([run])
    assert verdicts(rows) == [("wikitext103_word_perplexity", "pass", "19.3700"), ("lambada_accuracy", "not-run", "-")]
    assert rows[0].reason == "megatron-wikitext, windows of 1024"
    assert rows[1].reason == "not measured on the published set: n is 5,000, the published set has 5,153"
    evaluated(run, "lambada", {"accuracy": 0.4518, "last_token_accuracy": 0.6}, 5_153, "lambada-strict")
    evaluated(run, "lambada", {"accuracy": 0.9}, 3, "lambada-strict, the first 3 of 5,153 passages")
    assert verdicts(check.run_rows([run]))[1] == ("lambada_accuracy", "pass", "0.4518")
    (run / "eval.json").write_text("[]")
    for step, verdict in ((100_000, "not-run"), (300_000, "pass"), (100_000, "pass")):
        evaluated(run, "lambada", {"accuracy": 0.45 + step / 1e9}, 5_153, f"lambada-strict, step {step}, bf16")
        row = check.run_rows([run])[1]
        assert row.verdict == verdict and (row.measured == "0.4503" or "measured at step 100000" in row.reason)
    evaluated(run, "lambada", {"accuracy": 45.18}, 5_153, "in percent")
    assert verdicts(check.run_rows([run]))[1][1] == "fail"
    for content in ('{"wikitext103": 19.37}', '[{"task": "lambada", "metric": "accuracy", "value": 0.45}]', "[3]"):
        (run / "eval.json").write_text(content)
        with pytest.raises(BadInput, match="eval.json: must be a list of"):
            check.run_rows([run])


def test_a_score_of_another_set_is_none() -> None:
    """Protocols as finetuning and scripts/evaluate.py write them, and sizes as GLUE has them."""
    for protocol in (
        "mrpc dev, the first 16 of 408, step 20, the best by f1",
        "squad dev, the first 1,000 of 10,570 windows, 384 tokens",
        "mrpc dev, step 57, the best by f1; glue/MRPC has no dev set: 408 examples of train are it, drawn by seed 1234",
        "mrpc dev, step 57, the best by f1; glue/MRPC has no dev set: 408 examples of train, drawn with seed 1234, replace it",
        "squad dev, step 229; new_wiki_v1.0.json: 158 of its 1,581 paragraphs are dev, drawn by seed 1234",
        "megatron-wikitext, T 100; not the published test file, whose T_o is 245,566",
    ):
        assert metrics.not_comparable("mrpc_f1", 408, protocol), protocol
    assert metrics.not_comparable("mrpc_f1", 408, "mrpc dev, step 57; 100 of 3,668 examples of train, drawn by seed 1") is None
    assert metrics.not_comparable("mnli_accuracy_mismatched", 9_832, "mnli dev") is None
    assert metrics.not_comparable("mnli_accuracy", 9_832, "mnli dev") == "n is 9,832, the published set has 9,815"


def test_in_words_mnli_has_two_sets() -> None:
    examples = text.Examples([], [], [], "", sizes=(25, 15))
    assert text.counts("mnli", 40, examples) == {"accuracy": 25, "accuracy_mismatched": 15}
    assert text.counts("rte", 40, examples) == {}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A finished bert_base, whose config expects MNLI 84.4 % and SQuAD F1 88.5 (arXiv:1810.04805)."""
    return run_folder(tmp_path / "bert_base", BERT, [], {}, 1_000_000, "megatron")


def test_finetunings_are_found_by_the_run_that_they_begin_from(bert: Path, tmp_path: Path) -> None:
    other = run_folder(tmp_path / "other", BERT, [], {}, 1_000_000, "megatron")
    mnli, squad = finetuned(tmp_path / "mnli", bert, "mnli"), finetuned(tmp_path / "squad", bert, "squad")
    evaluated(mnli, "mnli", {"accuracy": 0.849}, 9_815)
    evaluated(squad, "squad", {"f1": 88.7, "exact_match": 81.0}, 10_570)
    expected = [("mnli_accuracy", "pass", "0.8490"), ("squad_f1", "pass", "88.7000")]
    assert verdicts(check.run_rows([bert, mnli, squad])) == expected
    assert verdicts(check.run_rows([squad, bert])) == [("mnli_accuracy", "not-run", "-"), expected[1]]
    rows = check.run_rows([other, bert, mnli])  # the other run has none
    assert [row.verdict for row in rows] == ["not-run", "not-run", "pass", "not-run"]
    assert "nor a finetuning on mnli from its last step" in rows[0].reason
    early = finetuned(tmp_path / "early", bert, "mnli", init={"id": str(bert), "step": 500_000})
    evaluated(early, "mnli", {"accuracy": 0.844}, 9_815)
    assert [row.verdict for row in check.run_rows([bert, early])] == ["not-run", "not-run"]
    with pytest.raises(BadInput, match="mnli: nothing to check: .* give the run that it starts from too"):
        check.run_rows([mnli])
    with pytest.raises(BadInput, match="no/longer/there is not the export of a run"):
        check.run_rows([bert, finetuned(tmp_path / "hub", bert, "mnli", init=None)])


def test_a_finetuning_is_evidence_as_a_run_is(bert: Path, tmp_path: Path) -> None:
    def reason(name: str, score: bool = True, **more: Any) -> str:
        run = finetuned(tmp_path / name, bert, "mnli", **more)
        if score:
            evaluated(run, "mnli", {"accuracy": 0.844}, 9_815)
        (run / "metrics.jsonl").write_text(lines)
        row = check.run_rows([bert, run])[0]
        assert row.verdict in ("pass", "not-run")
        return row.reason

    steps = read_yaml(ROOT / "recipes/bert/configs/finetune_mnli.yaml")["train"]["steps"]
    lines = trained(steps, 0.4)
    assert reason("whole") == "dev"
    assert "deepspeed.extra was used" in reason(
        "extra", overrides=["deepspeed.extra={zero_optimization: {overlap_comm: true}}"]
    )
    assert "eval.json: does not have it" in reason("unscored", score=False)
    lines = trained(100, 0.4)
    assert f"stopped at step 100 of {steps}" in reason("stopped")
    values = [0.7, 0.8, 0.79, 0.8, 0.78]
    lines = "\n".join(json.dumps({"step": 20 * i, "loss": 1.0, "valid_loss": 1 / i, "valid_accuracy": v})
                      for i, v in enumerate(values, 1))  # fmt: skip
    assert "stopped at step 100" in reason("patient", overrides=["task.patience=4"])
    assert reason("stopped early", overrides=["task.patience=3"]) == "dev"


def test_two_settings_are_not_two_seeds(bert: Path, tmp_path: Path) -> None:
    runs = [finetuned(tmp_path / f"lr{i}", bert, "mnli", i, overrides=[f"optim.lr={i}e-5"]) for i in (1, 2)]
    runs.append(finetuned(tmp_path / "again", bert, "mnli", 2, overrides=["optim.lr=2e-5"]))
    for run in runs:
        evaluated(run, "mnli", {"accuracy": 0.844}, 9_815)
    assert "are two experiments: optim.lr differs" in check.run_rows([bert, *runs[:2]])[0].reason
    assert "several finetunings have train.seed=2" in check.run_rows([bert, *runs[1:]])[0].reason


SEEDS = [  # three seeds, of which sigma is 0.1, against 88.5 +- 0.5: 3 sigma are 0.3
    ([88.2, 88.3, 88.4], "pass", "(88.3000 - 88.0000) * sqrt(3) = 0.5196 >= 3 sigma = 3 * 0.1000 = 0.3000"),
    ([88.7, 88.8, 88.9], "pass", "(89.0000 - 88.8000) * sqrt(3) = 0.3464 >= 3 sigma"),
    ([88.0, 88.1, 88.2], "undecided", "(88.1000 - 88.0000) * sqrt(3) = 0.1732 < 3 sigma = 3 * 0.1000 = 0.3000; dev; run more"),
    ([87.7, 87.8, 87.9], "fail", "(87.8000 - 88.0000) * sqrt(3) = -0.3464 < 3 sigma"),
    ([89.1, 89.2, 89.3], "fail", "better than published by more than the tolerance"),
    ([88.5, 88.5, math.nan], "fail", ""),
]


@pytest.mark.parametrize("scores, verdict, message", SEEDS)
def test_of_seeds_the_mean_must_be_shown(scores: list[float], verdict: str, message: str, bert: Path, tmp_path: Path) -> None:
    for seed, score in enumerate(scores, 1):
        evaluated(finetuned(tmp_path / f"seeds/seed_{seed}", bert, "squad", seed), "squad", {"f1": score}, 10_570)
    (tmp_path / "seeds/seeds.json").write_text("[]")
    row = check.run_rows([bert, tmp_path / "seeds"])[1]
    assert row.verdict == verdict and message in row.reason, row
    assert math.isnan(sum(scores)) or row.reason.startswith("mean of seeds 1 2 3: (")


# arXiv:1910.10683, table 16, "baseline average": GLUE is 83.28
GLUE = {
    "cola": {"matthews": 0.5384}, "sst2": {"accuracy": 0.9268}, "mrpc": {"f1": 0.9207, "accuracy": 0.8892},
    "stsb": {"pearson": 0.8802, "spearman": 0.8794}, "qqp": {"f1": 0.8867, "accuracy": 0.9156},
    "mnli": {"accuracy": 0.8424, "accuracy_mismatched": 0.8457}, "qnli": {"accuracy": 0.9048}, "rte": {"accuracy": 0.7628},
}  # fmt: skip
SIZES = {  # of GLUE's, SQuAD's and LAMBADA's sets, and the words of WikiText-103's test file less one
    "cola": 1043, "sst2": 872, "mrpc": 408, "stsb": 1500, "qqp": 40430, "qnli": 5463, "rte": 277, "squad": 10570,
    "squad2": 11873, "lambada": 5153, "wikitext103": 245565, "mnli": 9815, "mnli_accuracy_mismatched": 9832,
}  # fmt: skip


def scored(out: Path, task: str, scores: dict[str, float]) -> None:
    for metric, value in scores.items():
        evaluated(out, task, {metric: value}, SIZES.get(f"{task}_{metric}") or SIZES[task])


def test_averages_are_computed_from_all_their_parts(tmp_path: Path) -> None:
    t5 = run_folder(tmp_path / "t5", ROOT / "recipes/t5/configs/t5_base.yaml", [], {}, 524_288, "baseline")
    runs = []
    for task, scores in GLUE.items():
        runs.append(finetuned(tmp_path / task, t5, f"glue_{task}"))
        scored(runs[-1], task, scores)
    row = check.run_rows([t5, *runs])[0]
    assert (row.metric, row.verdict, row.measured) == ("glue_average", "pass", "0.8328")
    row = check.run_rows([t5, *runs[:-1]])[0]
    assert row.verdict == "not-run" and row.reason.startswith("of its 8 parts it lacks rte_accuracy (no score")
    row = check.run_rows([t5, *runs[3:]])[0]
    assert "it lacks cola_matthews" in row.reason and row.reason.endswith("and 2 more parts")
    for task, scores in GLUE.items():  # a second seed of all but one is no second average, of all it is
        if task == "rte":
            assert "seeds" not in check.run_rows([t5, *runs])[0].reason
        runs.append(finetuned(tmp_path / f"{task}_2", t5, f"glue_{task}", seed=2))
        scored(runs[-1], task, {metric: value + 0.002 for metric, value in scores.items()})
    row = check.run_rows([t5, *runs])[0]
    assert row.measured == "0.8338" and row.reason.startswith("mean of seeds 2 1234: (0.8338 - 0.8299) * sqrt(2) =")


# ---- one vocabulary --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    return emitters.of_evaluators(tmp_path_factory.mktemp("emitters"))


def test_the_table_has_what_evaluators_write_and_no_more(emitted: dict[str, dict[str, float]]) -> None:
    assert evaluate.EVALUATE["text"] == evaluate.EVALUATE["wikitext2-raw"]
    emitted = emitted | {"text": emitted["wikitext2-raw"]}
    assert set(evaluate.KNOWN) <= set(emitted)
    assert {task: set(scores) for task, scores in emitted.items()} == {t: set(scores) for t, scores in metrics.TASKS.items()}
    assert len(metrics.NAMES) == sum(map(len, metrics.TASKS.values()))  # no two spell alike
    assert not metrics.NAMES.keys() & (metrics.RUN.keys() | metrics.AVERAGES.keys() | metrics.MISSING.keys())


@pytest.mark.parametrize("name", bert_finetune.registry.TASKS)
def test_the_first_metric_of_a_task_decides(name: str) -> None:
    assert next(iter(metrics.TASKS[name])) == bert_finetune.selection_metric(SimpleNamespace(task=SimpleNamespace(name=name)))


def test_a_perfect_score_is_the_most_of_its_unit(emitted: dict[str, dict[str, float]]) -> None:
    """1 of a fraction, 100 of a percentage, no loss: what was evaluated were the labels themselves."""
    most = {"fraction": 1, "correlation": 1, "percent": 100, "nats": 0, "perplexity": 1}
    for task, scores in emitted.items():
        for metric, value in scores.items():
            unit = metrics.TASKS[task][metric]
            if task.startswith(("wikitext", "lambada")):  # of an untrained model
                assert unit.least <= value <= unit.most
            elif unit != metrics.LOGITS:
                assert value == pytest.approx(most[unit.name], abs=1e-6), (task, metric)


def parts_of(name: str) -> Iterator[str]:
    for part in metrics.AVERAGES.get(name, ()):
        yield from parts_of(part)
    if name not in metrics.AVERAGES:
        yield name


def expecting() -> list[Path]:
    return [path for path in sorted((ROOT / "recipes").glob("*/configs/*.yaml")) if read_yaml(path).get("expect")]


@pytest.mark.parametrize("named", expecting(), ids=lambda path: path.stem)
def test_a_perfect_eval_json_passes(named: Path, emitted: dict[str, dict[str, float]], tmp_path: Path) -> None:
    """What is published, written into eval.json by the names of the evaluators: every row passes that one can measure."""
    expect = read_yaml(named)["expect"]
    cfg = config.load(named, [], task_module(named.parent.parent.name, {}).Config)
    losses = {}
    for name in {"val_loss", "best_val_loss"} & expect.keys():
        losses[cfg.last_step] = expect[name]["value"]
    run = run_folder(tmp_path / "run", named, [], losses, cfg.last_step, "deepspeed")
    runs: dict[str, Path] = {}
    for name, values in expect.items():
        for part in parts_of(name):
            for task, scores in emitted.items():
                metric = part.removeprefix(f"{task}_")
                if metric not in scores or part == metric:
                    continue
                if named.parent.parent.name != "gpt" and task not in runs:
                    config_name = task if named.parent.parent.name == "bert" or task == "squad" else f"glue_{task}"
                    runs[task] = finetuned(tmp_path / task, run, config_name)
                scored(runs.get(task, run), task, {metric: values["value"]})
    rows = check.run_rows([run, *runs.values()])
    assert [row.metric for row in rows] == list(expect)
    for row in rows:
        if row.metric in ("hellaswag_acc_norm", "superglue_average", "zeroshot19_accuracy"):
            assert row.verdict == "not-run" and row.reason.startswith("no evaluator here: "), row
        else:
            assert row.verdict == "pass", row


BAD_EXPECT = [
    ("mnli_acc", 0.844, "no evaluator writes such a score; did you mean 'mnli_accuracy'?"),
    ("wikitext103_ppl", 19.31, "expect.wikitext103_ppl: no evaluator writes such a score"),
    ("x", 1.0, "give TASK_METRIC, for example squad_f1 or val_loss; all names: common/evaluation/metrics.py"),
    ("mnli_accuracy", 84.4, "expect.mnli_accuracy.value=84.4: is a fraction, from 0 to 1; give 0.844"),
    ("squad_f1", 0.885, "expect.squad_f1.value=0.885: is in percent, from 0 to 100; give 88.5"),
    ("squad_f1", 885.0, "expect.squad_f1.value=885: is outside its unit (percent, from 0 to 100)"),
    ("wikitext103_word_perplexity", 0.5, "is outside its unit (perplexity, 1 or more)"),
]


@pytest.mark.parametrize("name, value, message", BAD_EXPECT)
def test_an_expectation_that_nothing_can_meet_is_refused(name: str, value: float, message: str, tmp_path: Path) -> None:
    """When the config is loaded: by pretrain.sh, and by check of configs that no run needs."""
    schema = task_module("gpt", {}).Config
    words = f"{{value: {value}, tolerance: 0.1, source: me}}"
    with pytest.raises(BadInput) as refused:
        config.load(CPU, [f"expect.{name}={words}"], schema)
    assert len(refused.value.problems) == 1 and message in refused.value.problems[0]
    folder = tmp_path / "recipes/gpt/configs"
    folder.mkdir(parents=True)
    (folder / "c.yaml").write_text(CPU.read_text().replace("expect:", f"expect:\n  {name}: {words}"))
    with pytest.raises(BadInput) as refused:
        check.all_rows(tmp_path)
    assert len(refused.value.problems) == 1 and message in refused.value.problems[0]


def test_runs_name_where_they_begin(drive, bert_settings, sentences: Path, tmp_path: Path) -> None:
    """Two steps of BERT, then two of RTE from its OUT: real runs, and check finds the one by the other."""
    emitters.write_dev("rte", tmp_path / "data")
    (tmp_path / "data/train.tsv").write_text((tmp_path / "data/dev.tsv").read_text())
    shape = ["model.positions=64", "data.seq_len=64", "train.steps=2", "train.global_batch=2", "optim.warmup_steps=0"]
    first = case("baseline", "tiny", tmp_path / "bert", [*bert_settings, *shape], family="bert")
    words = [
        f"init.from={tmp_path}/bert",
        f"task.data={tmp_path}/data",
        "data.seq_len=32",
        "train.steps=2",
        "train.eval_every=2",
    ]
    words += ["optim.warmup_steps=0", "train.global_batch=2", "baseline.micro_batch=1"]
    second = case("baseline", "finetune_rte", tmp_path / "rte", words, family="bert")
    drive([first, second | {"module": "recipes.bert.baseline.finetune"}, first], 1)
    pretrained, tuned = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("bert", "rte"))
    export = json.loads((tmp_path / "bert/hf/twinstack.json").read_text())
    assert pretrained["id"] == export["id"] != tuned["id"] and len(tuned["id"]) == 32
    assert tuned["init"] == {"id": pretrained["id"], "step": 2} and pretrained["init"] is None
    [run] = check.finetuning(tmp_path / "rte")
    assert run.start == tuned["init"] and check.finetuning(tmp_path / "bert") == []
    evidence = check.Evidence(tmp_path / "bert", run.cfg, [], [run])
    with pytest.raises(check.NotEvidence, match="n is 8, the published set has 277"):
        check.scores_of("rte_accuracy", evidence)


def test_parameters(good: Path) -> None:
    cfg = config.load(good / "config.yaml", [], task_module("gpt", {}).Config)
    assert check.scores_of("parameters", check.Evidence(good, cfg, [], [])).values == {1337: 809_856}


def test_all_covers_every_expect_and_stack(tmp_path: Path) -> None:
    folder = tmp_path / "recipes/gpt/configs"
    folder.mkdir(parents=True)
    (folder / CPU.name).write_text(CPU.read_text())
    (folder / "tiny.yaml").write_text((CPU.parent / "tiny.yaml").read_text())  # no `expect`: no row
    for stack in ("baseline", "deepspeed", "megatron"):
        (folder.parent / stack).mkdir()
        (folder.parent / stack / "pretrain.py").touch()
    results = tmp_path / "docs/results/gpt/shakespeare_char_cpu"
    run_folder(results / "deepspeed", CPU, [], {2000: 1.89}, 2000, "deepspeed")
    run_folder(results / "megatron", CPU, [], {2000: 1.89}, 2000, "deepspeed")  # in the wrong folder
    rows = check.all_rows(tmp_path)
    assert [(r.stack, r.verdict) for r in rows] == [
        ("baseline", "not-run"),
        ("deepspeed", "pass"),
        ("megatron", "not-run"),
    ]
    assert [r.reason for r in rows] == ["no run", "", "its run.json says shakespeare_char_cpu of gpt on deepspeed"]


def test_all_finds_finetunings_wherever_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "recipes/bert/configs"
    folder.mkdir(parents=True)
    (folder / BERT.name).write_text(BERT.read_text())
    for stack in ("deepspeed", "megatron"):
        (folder.parent / stack).mkdir()
        (folder.parent / stack / "pretrain.py").touch()
    results = tmp_path / "docs/results/bert"
    run = run_folder(results / "bert_base/megatron", BERT, [], {}, 1_000_000, "megatron")
    for seed in (1, 2):
        tuned = finetuned(results / f"anywhere/mnli/seed_{seed}", run, "mnli", seed)
        evaluated(tuned, "mnli", {"accuracy": 0.844 + seed / 10_000}, 9_815)
    rows = {(row.metric, row.stack): row for row in check.all_rows(tmp_path)}
    assert len(rows) == 4 and rows["mnli_accuracy", "megatron"].verdict == "pass"
    assert sum(row.verdict == "not-run" for row in rows.values()) == 3


def test_all_of_this_tree() -> None:
    done = command("scripts.check", "--all")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, lines)) <= 80
    expected = sum(len(families.stacks(families.of_config(path))) * len(read_yaml(path)["expect"]) for path in expecting())
    passing = families.stacks("gpt")
    last = " ".join(" ".join(lines[lines.index("", len(lines) - 4) + 1 :]).split())  # it may be wrapped
    count, not_run = len(expecting()), expected - len(passing)
    assert last.startswith(f"{len(passing)} of {expected} rows reached, 1 config of {count}; {not_run} not run: "), last
    assert re.search(r"\d+ need GPUs", last) and "fail" not in last
    costs = {line.split()[0]: line for line in lines if " x H100" in line}
    assert len(costs) == count and re.search(r"  about \d+ h on 8 x H100$", costs["gpt/gpt2_124m"])
    headings = [line for line in lines if re.match(r"\w+: ", line)]
    assert [line.partition(":")[0] for line in headings] == sorted({families.of_config(path) for path in expecting()})
    assert sum(int(line.split()[3]) for line in headings) == expected and f"gpt: {len(passing)} of " in "\n".join(headings)
    found = json.loads(command("scripts.check", "--all", "--json").stdout)
    assert len(found["rows"]) == expected and len(found["cost"]) == count and found["rows"][0]["verdict"] == "not-run"
    assert lines.count(f"    pass         1.8970  {', '.join(passing)}") == 1
    assert {line.split()[0] for line in lines if line.startswith("    ") and line[4] != " "} >= {"pass", "not-run"}


def broken(good: Path, name: str, text: str | None) -> Path:
    if text is None:
        (good / name).unlink()
    else:
        (good / name).write_text(text)
    return good


BAD = [
    ("run.json", None, "run.json: not there"),
    ("run.json", "{", "run.json: not JSON"),
    ("run.json", '{"config": "x"}', "must hold config, family and stack"),
    ("run.json", '{"config": "tiny", "family": "nosuch", "stack": "megatron"}', "configs has no tiny.yaml to compare it with"),
    ("run.json", '{"config": "tiny", "family": "gpt", "stack": "megatron"}', "has no `expect`"),
    ("config.yaml", "model: [", "config.yaml: not YAML"),
    ("metrics.jsonl", None, "metrics.jsonl: not there"),
    ("metrics.jsonl", trained(1, 4.1) + '\n{"step": 2, "lo', "metrics.jsonl:2: not a line of metrics"),
    ("metrics.jsonl", '{"step": 1, "loss": "4.1"}', "metrics.jsonl:1: not a line of metrics"),
]


@pytest.mark.parametrize("name, text, message", BAD)
def test_bad_input_is_named(good: Path, name: str, text: str | None, message: str) -> None:
    done = command("scripts.check", str(broken(good, name, text)))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_check_wants_runs_or_all() -> None:
    assert command("scripts.check").returncode == 2
    assert command("scripts.check", "--all", "x").returncode == 2


def test_plan() -> None:
    done = command("scripts.plan", "recipes/gpt/configs/gpt3_1.3b.yaml", "--gpus", "64")
    assert done.returncode == 0, done.stderr
    assert "1,315,819,520" in done.stdout and "1,048,576" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.lstrip("* ").startswith(("baseline", "deepspeed", "megatron"))]
    assert sum(row.startswith("*") for row in rows) == len(families.stacks("gpt")) and len(rows) > 4
    assert max(len(line) for line in done.stdout.splitlines()) < 160


def test_plan_fits_the_screen_and_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("scripts.plan", "recipes/gpt/configs/gpt3_1.3b.yaml", "--gpus", "64")
    for columns, peak in (("80", r"peak  required"), ("160", r"weights +grads +optim .*peak .*required")):
        monkeypatch.setenv("COLUMNS", columns)
        lines = command(*words).stdout.splitlines()
        assert max(map(len, lines)) <= int(columns) and sum(bool(re.search(peak, line)) for line in lines) == 1, lines
    [phase] = json.loads(command(*words, "--json").stdout)["phases"]
    own = next(row for row in phase["layouts"] if row["layout"].startswith("* megatron"))
    required = f"{own['bytes']['required'] / 1e9:.2f}"
    assert any(line.startswith("* megatron") and required in line.split() for line in lines)
    assert own["fits"] == ["40 GB", "80 GB", "141 GB"]


PLAN_BAD = [
    (["recipes/gpt/configs/gpt3_1.3b.yaml", "--gpu", "Abacus"], "Abacus"),
    (["recipes/gpt/configs/gpt3_1.3b.yaml", "--gpus", "0"], "--gpus 0"),
    (["recipes/gpt/configs/gpt3_1.3b.yaml", "--gpu", "H100", "--network", "fast"], "8x400Gb"),
    (["recipes/gpt/configs/gpt3_1.3b.yaml", "--gpu", "H100", "--price", "-1"], "--price -1"),
    (["recipes/gpt/configs/gpt3_1.3b.yaml", "--gpu", "H100", "--scale", "8,x"], "--scale 8,x"),
    (["recipes/gpt/configs/gpt3_1.3b.yaml", "--price", "2"], "--gpu NAME"),
    (["recipes/gpt/configs/gpt3_13b.yaml", "--gpus", "2", "--gpu", "H100", "--own", "--stack", "megatron"], "megatron.tp=4"),
    (["recipes/gpt/configs/gpt3_1.3b.yaml", "--gpu", "H100", "--json", "--write", "x.yaml"], "exclude each other"),
    (["recipes/gpt/configs/gpt3_1.3b.yaml", "--gpu", "H100", "--own", "--scale", "8"], "exclude each other"),
    ([], "give a config"),
    (["recipes/gpt/configs/gpt3_1.4b.yaml"], "did you mean"),
    (["recipes/gpt/configs/tiny.yaml"], "model.vocab_size"),
    (["pyproject.toml"], "recipes/FAMILY/configs"),
]


@pytest.mark.parametrize("words, message", PLAN_BAD)
def test_plan_bad_input(words: list[str], message: str) -> None:
    done = command("scripts.plan", *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_plan_says_why_the_configs_own_layout_cannot_be() -> None:
    done = command("scripts.plan", "recipes/gpt/configs/gpt3_13b.yaml", "--gpus", "2")
    assert done.returncode == 0 and "cannot: megatron.tp=4" in done.stdout


def test_plot(good: Path, tmp_path: Path) -> None:
    other = run_folder(tmp_path / "other", CPU, [], {2000: 1.8857}, 600, "deepspeed")
    png = tmp_path / "curves.png"
    done = command("scripts.plot", str(good), str(other), "--out", str(png))
    assert done.returncode == 0, done.stderr
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 10_000
    assert png.with_suffix(".svg").is_file()
    single = command("scripts.plot", str(good), "--out", str(png))
    assert single.returncode == 0, single.stderr


def test_plot_bad_input(good: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "metrics.jsonl").write_text("")
    done = command("scripts.plot", str(good), str(tmp_path / "empty"), str(begun), "--out", str(tmp_path / "c.png"))
    assert done.returncode == 2 and not (tmp_path / "c.png").exists()
    assert "the run has no metrics" in done.stderr and "holds no step yet" in done.stderr
    assert command("scripts.plot", str(good), "--out", str(tmp_path / "no/c.png")).returncode == 2
    assert command("scripts.plot", str(good), "--out", str(tmp_path / "c.nosuch")).returncode == 2


def test_plot_labels_and_smoothing() -> None:
    assert list(plot.labels(["out/q/gpt/megatron", "out/q/gpt/deepspeed"])) == ["megatron", "deepspeed"]
    assert list(plot.labels(["a/megatron", "b/megatron"])) == ["a/megatron", "b/megatron"]
    assert len(plot.labels(["a/x", "a/x"])) == 1
    flat = plot.smooth({step: 2.5 for step in range(1, 50)}, 10)
    assert all(value == pytest.approx(2.5) for value in flat.values())
