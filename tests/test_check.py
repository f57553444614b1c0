"""scripts.check, plan and plot: on logs as the recipes write them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common import config
from common.errors import BadInput
from recipes.gpt.task import Config
from scripts import check, plot

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "recipes/gpt/configs/shakespeare_char_cpu.yaml"
GPU = ROOT / "recipes/gpt/configs/shakespeare_char_gpu.yaml"


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
    cfg = config.load(named, overrides, Config)
    optim = cfg.optim.model_copy(update={"decay_steps": cfg.optim.decay_steps or cfg.train.steps})
    out.mkdir(parents=True)
    config.write_yaml(cfg.model_copy(update={"model": cfg.model.resolve(cfg, 65), "optim": optim}), out / "config.yaml")
    (out / "run.json").write_text(json.dumps({"config": named.stem, "family": "gpt", "stack": stack, "commit": "0123abcd"}))
    lines = []
    for step in range(1, steps + 1):
        lines.append(trained(step, 4.17 - 2.3 * step / steps))
        if step in losses:
            lines.append(json.dumps({"step": step, "valid_loss": losses[step], "valid_tokens": 111488}))
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return out


def command(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "good", CPU, [], {250: 2.4231, 2000: 1.8857412338256836}, 2000, "megatron")


def one(run: Path) -> check.Row:
    rows = check.run_rows(run)
    assert len(rows) == 1
    return rows[0]


def test_a_run_that_reaches_its_number_passes(good: Path) -> None:
    done = command("scripts.check", str(good))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == "pass shakespeare_char_cpu megatron val_loss 1.8857 1.88 +- 0.03 (nanoGPT README)".split()


@pytest.mark.parametrize("loss", [1.92, 1.84, float("nan")])
def test_a_run_that_does_not_fails(tmp_path: Path, loss: float) -> None:
    run = run_folder(tmp_path / "run", CPU, [], {2000: loss}, 2000, "baseline")
    assert one(run).verdict == "fail"
    done = command("scripts.check", str(run))
    assert done.returncode == 1 and done.stdout.startswith("fail")


NOT_EVIDENCE = [
    (["optim.lr=2e-3"], 2000, "optim.lr is 0.002, the config says 0.001"),
    (["model.hidden=256", "optim.lr=2e-3"], 2000, "(and 2 more)"),  # ffn follows hidden
    (["train.seed=1"], 2000, "train.seed is 1"),
    (["train.eval_samples=64"], 2000, "train.eval_samples is 64, the config says 'all'"),
    (["train.steps=1000"], 1000, "train.steps is 1000, the config says 2000"),
    (["megatron.extra={use_cpu_initialization: true}"], 2000, "megatron.extra was used"),
    ([], 1500, "stopped at step 1500 of 2000"),
]


@pytest.mark.parametrize("overrides, steps, reason", NOT_EVIDENCE)
def test_what_is_not_the_published_experiment_is_not_evidence(
    tmp_path: Path, overrides: list[str], steps: int, reason: str
) -> None:
    row = one(run_folder(tmp_path / "run", CPU, overrides, {1000: 1.88, 2000: 1.88}, steps, "megatron"))
    assert row.verdict == "not-run" and row.ours == "-" and reason in row.reason


def test_what_may_differ_does_not_matter(tmp_path: Path) -> None:
    """Systems, intervals, paths of the corpus, another stack's extra, the run's own word on what it should reach."""
    changes = [
        "deepspeed.micro_batch=6",
        "deepspeed.zero_stage=3",
        "train.eval_every=100",
        "data.train=elsewhere/train",
    ]
    changes += ["megatron.extra={a: 1}", "expect.val_loss.value=3.0"]
    row = one(run_folder(tmp_path / "run", CPU, changes, {2000: 1.87}, 2000, "deepspeed"))
    assert row.verdict == "pass" and row.published.startswith("1.88 ")


def test_no_validation_after_the_last_step(tmp_path: Path) -> None:
    row = one(run_folder(tmp_path / "run", CPU, [], {1750: 1.88}, 2000, "megatron"))
    assert (row.verdict, row.reason) == ("not-run", "no validation at step 2000")


def test_best_val_loss_is_the_lowest(tmp_path: Path) -> None:
    row = one(run_folder(tmp_path / "run", GPU, [], {1750: 1.4733, 5000: 1.7044}, 5000, "baseline"))
    assert (row.verdict, row.metric, row.ours) == ("pass", "best_val_loss", "1.4733")


def test_other_metrics_come_from_eval_json(tmp_path: Path) -> None:
    named = ROOT / "recipes/gpt/configs/megatron_355m.yaml"
    cfg = config.load(named, [], Config)
    run = run_folder(tmp_path / "run", named, [], {}, 1, "megatron")
    steps = cfg.train.steps
    (run / "metrics.jsonl").write_text(trained(steps, 2.9) + "\n")
    assert [row.verdict for row in check.run_rows(run)] == ["not-run", "not-run"]
    (run / "eval.json").write_text(json.dumps([{"task": "wikitext103", "metric": "ppl", "value": 19.37}]))
    rows = check.run_rows(run)
    assert [(r.metric, r.verdict, r.ours) for r in rows] == [
        ("wikitext103_ppl", "pass", "19.3700"),
        ("lambada_accuracy", "not-run", "-"),
    ]
    (run / "eval.json").write_text('{"wikitext103": 19.37}')
    with pytest.raises(BadInput, match="eval.json"):
        check.run_rows(run)


def test_parameters(good: Path) -> None:
    ours = config.load(good / "config.yaml", [], Config)
    assert check.measured("parameters", good, ours, []) == 809_856


def test_all_covers_every_expect_and_stack(tmp_path: Path) -> None:
    folder = tmp_path / "recipes/gpt/configs"
    folder.mkdir(parents=True)
    (folder / CPU.name).write_text(CPU.read_text())
    (folder / "tiny.yaml").write_text((CPU.parent / "tiny.yaml").read_text())  # no `expect`: no row
    results = tmp_path / "recipes/gpt/results/shakespeare_char_cpu"
    run_folder(results / "deepspeed", CPU, [], {2000: 1.89}, 2000, "deepspeed")
    run_folder(results / "megatron", CPU, [], {2000: 1.89}, 2000, "deepspeed")  # in the wrong folder
    rows = check.all_rows(tmp_path)
    assert [(r.stack, r.verdict) for r in rows] == [
        ("baseline", "not-run"),
        ("deepspeed", "pass"),
        ("megatron", "not-run"),
    ]
    assert [r.reason for r in rows] == ["no run", "", "its run.json says shakespeare_char_cpu on deepspeed"]


def test_all_of_this_tree() -> None:
    done = command("scripts.check", "--all")
    rows = [line.split()[:4] for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    expected = 0
    for path in (ROOT / "recipes").glob("*/configs/*.yaml"):
        expected += 3 * len(yaml.safe_load(path.read_text()).get("expect") or {})
    assert len(rows) == expected and {row[0] for row in rows} <= {"pass", "not-run"}


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
    ("run.json", '{"config": "tiny", "family": "nosuch", "stack": "megatron"}', "no recipe 'nosuch'"),
    ("run.json", '{"config": "tiny", "family": "gpt", "stack": "megatron"}', "has no `expect`"),
    ("config.yaml", "model: [", "config.yaml: not YAML"),
    ("metrics.jsonl", None, "metrics.jsonl: not there"),
    ("metrics.jsonl", trained(1, 4.1) + '\n{"step": 2, "lo', "metrics.jsonl:2: not a line of metrics"),
    ("metrics.jsonl", '{"step": 1, "loss": "4.1"}', "metrics.jsonl:1: not a line of metrics"),
]


@pytest.mark.parametrize("name, text, told", BAD)
def test_bad_input_is_named(good: Path, name: str, text: str | None, told: str) -> None:
    done = command("scripts.check", str(broken(good, name, text)))
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_check_wants_runs_or_all() -> None:
    assert command("scripts.check").returncode == 2
    assert command("scripts.check", "--all", "x").returncode == 2


def test_plan() -> None:
    done = command("scripts.plan", "recipes/gpt/configs/gpt3_1.3b.yaml", "--gpus", "64", "--gpu", "A100")
    assert done.returncode == 0, done.stderr
    assert "1,315,819,520" in done.stdout and "1,048,576" in done.stdout and "312 TFLOP/s" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.lstrip("* ").startswith(("baseline", "deepspeed", "megatron"))]
    assert sum(row.startswith("*") for row in rows) == 3 and len(rows) > 8
    assert max(len(line) for line in done.stdout.splitlines()) < 160


PLAN_BAD = [
    (["recipes/gpt/configs/gpt3_1.3b.yaml", "--gpu", "Abacus"], "Abacus"),
    (["recipes/gpt/configs/gpt3_1.3b.yaml", "--gpus", "0"], "--gpus 0"),
    (["recipes/gpt/configs/gpt3_1.4b.yaml"], "did you mean"),
    (["recipes/gpt/configs/tiny.yaml"], "model.vocab_size"),
    (["pyproject.toml"], "recipes/FAMILY/configs"),
]


@pytest.mark.parametrize("words, told", PLAN_BAD)
def test_plan_bad_input(words: list[str], told: str) -> None:
    done = command("scripts.plan", *words)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_plan_says_why_the_configs_own_layout_cannot_be() -> None:
    done = command("scripts.plan", "recipes/gpt/configs/gpt3_13b.yaml", "--gpus", "4")
    assert done.returncode == 0 and "cannot: megatron.tp=8" in done.stdout


def test_plot(good: Path, tmp_path: Path) -> None:
    other = run_folder(tmp_path / "other", CPU, [], {2000: 1.8857}, 600, "deepspeed")
    png = tmp_path / "curves.png"
    done = command("scripts.plot", str(good), str(other), "--out", str(png))
    assert done.returncode == 0, done.stderr
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 20_000
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
