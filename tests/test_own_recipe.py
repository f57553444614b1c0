"""docs/own_recipe.md: each of its changes is applied to a copied recipe and run, and scripts.parity finds what goes wrong."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, losses
from safetensors.torch import load_file

from common import families
from common.errors import BadInput
from scripts import parity as parity_command
from tests import warm

DOCUMENT = (ROOT / "docs/own_recipe.md").read_text(encoding="utf-8")
CHANGES = {
    title.split(":")[0].lower(): diff
    for title, diff in re.findall(r"^## (\w+:[^\n]*)\n(?:(?!^## ).)*?^```diff\n(.*?)^```$", DOCUMENT, re.M | re.S)
}
PREPARE = """\
import json, sys
from pathlib import Path
from common import families
from common.comparison import layouts
config, folder, words, overrides = json.loads(sys.argv[1])
given = layouts.parsed(words, families.stacks("mine"))
cases, left_out = layouts.cases_of(config, overrides, given, 20, 2, Path(folder), optional=True)
Path(folder, "cases.json").write_text(json.dumps({"cases": cases, "reference": cases[0], "dtype": "fp32"}))
print(*left_out, sep="\\n")
"""
pytestmark = pytest.mark.skipif(
    set(families.stacks("gpt")) != {"baseline", "deepspeed", "megatron"},
    reason="the changes are to a copy of recipes/gpt, whole",
)
MakeCheckout = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckout:
    """checkout(CHANGE): a checkout with recipes/mine, a copy of recipes/gpt with that change ('' for none)."""

    def make(change: str) -> Path:
        folder = tmp_path_factory.mktemp("checkout")
        for name in ("common", "data", "scripts", "recipes"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(folder / "recipes/gpt", folder / "recipes/mine")
        (folder / "prepare.py").write_text(PREPARE, encoding="utf-8")
        if change:
            (folder / "change.diff").write_text(CHANGES[change], encoding="utf-8")
            env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
            done = subprocess.run(["git", "apply", "change.diff"], cwd=folder, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"the change in docs/own_recipe.md does not apply: {done.stderr}"
        return folder

    return make


def command(checkout: Path, *arguments: object, nproc: int = 0) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return warm.run(arguments, nproc, checkout, env)


def parity(checkout: Path, config: str, layouts: list[str], overrides: list[str]) -> tuple[list[dict], str]:
    """The rows of scripts.parity for these layouts, and what it leaves out. Its runs stay in checkout/parity/0, 1, ..."""
    folder = checkout / "parity"
    folder.mkdir()
    selected = json.dumps([str(checkout / "recipes/mine/configs" / config), str(folder), layouts, overrides])
    prepared = command(checkout, "prepare.py", selected)
    assert prepared.returncode == 0, prepared.stderr
    done = command(checkout, "-m", "scripts.parity", "--child", folder, nproc=2)
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    names = ("name", "verdict", "loss", "loss_step", "norm", "norm_step", "valid", "reason")
    assert done.returncode == 0, done.stdout + done.stderr
    return [dict(zip(names, json.loads(line), strict=True)) for line in lines], prepared.stdout


def verdicts(rows: list[dict]) -> list[str]:
    return [row["verdict"] for row in rows]


def test_the_document_has_four_changes() -> None:
    assert list(CHANGES) == ["architecture", "optimizer", "schedule", "data"]


# ---- architecture ----------------------------------------------------------------------------------------------------

LAYOUTS = ["baseline", "deepspeed:zero_stage=3", "megatron:tp=2,sequence_parallel=true,micro_batch=4"]


@pytest.fixture(scope="module")
def norms(checkout: MakeCheckout, settings: list[str]) -> tuple[Path, list[dict]]:
    folder = checkout("architecture")
    return folder, parity(folder, "tiny_llama.yaml", LAYOUTS, settings)[0]


def test_a_changed_architecture_trains_one_curve_on_all_stacks(norms: tuple[Path, list[dict]]) -> None:
    folder, rows = norms
    assert verdicts(rows) == ["reference", "pass", "pass"], rows
    record = json.loads((folder / "parity/2/run.json").read_text(encoding="utf-8"))
    assert (record["family"], record["stack"]) == ("mine", "megatron")
    tensors = load_file(folder / "parity/2/hf/model.safetensors")
    assert tensors["model.layers.3.self_attn.q_norm.weight"].shape == (16,)
    assert not torch.equal(tensors["model.layers.3.self_attn.q_norm.weight"], torch.ones(16)), "it is trained"


def test_a_changed_architecture_is_converted_both_ways_evaluated_and_sampled(norms: tuple[Path, list[dict]]) -> None:
    folder, _ = norms
    for words in (
        ("to-hf", "parity/2", "hf"),
        ("from-hf", "hf", "again"),
        ("to-hf", "again", "back"),
    ):
        done = command(folder, "-m", "recipes.mine.convert", *words)
        assert done.returncode == 0, done.stderr
    first = (folder / "parity/2/hf/model.safetensors").read_bytes()
    assert (folder / "hf/model.safetensors").read_bytes() == first == (folder / "back/model.safetensors").read_bytes()
    assert json.loads((folder / "back/config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    (folder / "text.txt").write_text("The value of a list is returned.\n" * 40, encoding="utf-8")
    done = command(folder, "-m", "scripts.evaluate", "parity/0", "text", "--data", "text.txt", "--limit", "2")
    assert done.returncode == 0 and "perplexity" in done.stdout, done.stderr
    done = command(folder, "-m", "scripts.generate", "parity/0", "--prompt", "def ", "--tokens", "4")
    assert done.returncode == 0 and "---- parity/0/hf" in done.stdout, done.stderr
    done = command(folder, "-m", "scripts.plan", "recipes/mine/configs/tiny_llama.yaml", "model.vocab_size=512", "--gpus", "2")
    assert done.returncode == 0 and "megatron tp=2" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layouts", "megatron tp=2"], "--layouts megatron tp=2: nothing to compare it with; give two or more"),
        (["--layouts", "baseline", "--json", "notes.json"], "--json notes.json: exists, and is no earlier result"),
        (["--layouts", "baseline", "--layouts", "megatorn tp=2"], "--layouts megatorn tp=2: no stack 'megatorn'"),
    ],
)
def test_the_command_refuses_what_compares_nothing_or_is_lost(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.json").write_text('{"mine": 1}', encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["parity", str(ROOT / "recipes/gpt/configs/tiny.yaml"), *words])
    with pytest.raises(BadInput) as error:
        parity_command.main()
    assert any(line.startswith(message) for line in error.value.problems), error.value.problems
    assert (tmp_path / "notes.json").read_text(encoding="utf-8") == '{"mine": 1}'


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_compares_every_layout_of_a_changed_architecture(
    checkout: MakeCheckout, settings: list[str], tmp_path: Path
) -> None:
    folder = checkout("architecture")
    words = ["recipes/mine/configs/tiny_llama.yaml", *settings, "--json", tmp_path / "rows.json"]
    done = command(folder, "-m", "scripts.parity", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert verdicts(rows) == ["reference"] + ["pass"] * 11
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


# ---- optimizer -------------------------------------------------------------------------------------------------------


def test_another_optimizer(checkout: MakeCheckout, settings: list[str]) -> None:
    folder = checkout("optimizer")
    layouts = ["baseline", "deepspeed:zero_stage=0", "deepspeed:zero_stage=1", "megatron"]
    rows, left_out = parity(folder, "tiny.yaml", layouts, settings)
    assert verdicts(rows) == ["reference", "pass"], rows
    assert left_out.count("StableAdamW takes the mean over a whole parameter") == 2
    assert abs(losses(folder / "parity/0")[20]["loss"] - 5.9) < 1  # it trains

    spec = importlib.util.spec_from_file_location("own_optimizer", folder / "recipes/mine/optimizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    weight, decay, lr, eps, (b1, b2) = torch.randn(3, 4), 0.1, 0.01, 1e-8, (0.9, 0.95)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = module.StableAdamW(
        [{"params": [parameter], "weight_decay": decay}], SimpleNamespace(lr=lr, betas=(b1, b2), eps=eps)
    )
    v = u = torch.zeros(3, 4)
    for step in (1, 2, 3):  # the paper's form, with corrected coefficients in place of corrected moments
        grad = torch.randn(3, 4) * 10**step  # grows, so that the rate is lowered
        beta1, beta2 = (b * (1 - b ** (step - 1)) / (1 - b**step) for b in (b1, b2))
        v, u = beta1 * v + (1 - beta1) * grad, beta2 * u + (1 - beta2) * grad**2
        rms = (grad**2 / torch.maximum(u, torch.tensor(eps**2))).mean().sqrt().item()
        rate = lr / max(1.0, rms)
        weight = weight - rate * decay * weight - rate * v / (u.sqrt() + eps)
        parameter.grad = grad
        optimizer.step()
        assert torch.allclose(parameter, weight, rtol=1e-5)
    assert rms > 1.1


# ---- schedule and data -----------------------------------------------------------------------------------------------


def test_another_schedule(checkout: MakeCheckout, settings: list[str]) -> None:
    folder = checkout("schedule")
    words = ["recipes/mine/configs/tiny.yaml", "out", *settings]
    done = command(folder, "-m", "recipes.mine.baseline.pretrain", *words, nproc=1)
    assert done.returncode == 0, done.stderr
    rates = [line["lr"] for _, line in sorted(losses(folder / "out").items())]
    assert rates[:12] == [5e-4, *[1e-3] * 11]
    assert rates[12:] == pytest.approx([1e-4 + 9e-4 * (1 - (n / 8) ** 0.5) for n in range(1, 9)])
    words[0] = "recipes/gpt/configs/tiny.yaml"
    done = command(folder, "-m", "common.launch", "recipes.gpt.baseline.pretrain", *words, "optim.schedule=cosine")
    assert done.returncode == 2
    assert "out has a run of recipes/mine; continue it with that recipe, or choose another OUT" in done.stderr


def test_another_corpus(checkout: MakeCheckout) -> None:
    folder = checkout("data")
    (folder / "README.md").write_text("short\n", encoding="utf-8")
    done = command(folder, "-m", "data.own_text", "--help")
    assert done.returncode == 0 and "--min-characters" in done.stdout
    recipe = (folder / "recipes/mine/configs/quickstart.yaml").read_text(encoding="utf-8")
    words = re.search(r"corpus: python (-m data\.own_text .*)", recipe)[1].split()
    done = command(folder, *words)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "corpora/own/manifest.json").read_text(encoding="utf-8"))
    expected = sum(len(path.read_text(encoding="utf-8")) >= 200 for path in text_files(folder / "recipes"))
    documents = sum(split["documents"] for split in manifest["splits"].values())
    assert documents == expected, manifest["splits"]  # each but README.md, which is short
    config = ["recipes/mine/configs/quickstart.yaml", "out", "train.steps=2", "baseline.micro_batch=16", "train.eval_samples=8"]
    done = command(folder, "-m", "recipes.mine.baseline.pretrain", *config, nproc=1)
    assert done.returncode == 0 and (folder / "out/hf/model.safetensors").is_file(), done.stderr


def text_files(folder: Path) -> Iterator[Path]:
    from data.sources import find_files

    return (path for _, path in find_files(folder))


# ---- what scripts.parity finds ---------------------------------------------------------------------------------------


def test_a_stack_that_differs_fails_and_a_stack_that_breaks_is_named(checkout: MakeCheckout, settings: list[str]) -> None:
    """Megatron's epsilon of the norms is wrong, and DeepSpeed's script raises an exception."""
    folder = checkout("")
    model = folder / "recipes/mine/megatron/model.py"
    model.write_text(model.read_text().replace('"layernorm_epsilon": m.norm_eps', '"layernorm_epsilon": 1e-2'))
    script = folder / "recipes/mine/deepspeed/pretrain.py"
    script.write_text(
        script.read_text().replace("    # ---- model\n", "    raise RuntimeError('broken here')\n    # ---- model\n")
    )
    rows, _ = parity(folder, "tiny.yaml", ["baseline", "megatron", "deepspeed"], settings)
    assert verdicts(rows) == ["reference", "fail", "fail"]
    assert rows[1]["loss"] > 1e-5 and rows[1]["loss_step"] in range(1, 21)
    assert rows[2]["reason"] == "RuntimeError: broken here"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes/mine/configs/tiny.yaml", "model.dropout=0.1"], "model.dropout=0.1: the layouts draw different masks"),
        (
            ["recipes/mine/configs/tiny.yaml", "--layouts", "jax"],
            "--layouts jax: no stack 'jax'; the recipe has baseline, deepspeed",
        ),
        (["recipes/mine/configs/tiny.yaml", "--layouts", "megatron:tp"], "'tp' must be key=value"),
        (["recipes/mine/configs/tiny.yaml", "--layouts", "megatron:tp=4"], "megatron.tp=4 needs 4 processes"),
        (["recipes/mine/configs/tiny.yaml", "--steps", "0"], "--steps 0: must be 1 or more"),
        (["recipes/mine/configs/tiny.yaml"], "no corpus at corpora/python/train"),
        (["other.yaml"], "other.yaml: lies in no recipe"),
    ],
)
def test_parity_refuses_bad_input(untouched: Path, words: list[str], message: str) -> None:
    done = command(untouched, "-m", "scripts.parity", *words)
    assert done.returncode == 2 and message in done.stderr, done.stderr


@pytest.fixture(scope="module")
def untouched(checkout: MakeCheckout) -> Path:
    return checkout("")


def test_a_copy_without_a_stack(checkout: MakeCheckout, settings: list[str]) -> None:
    folder = checkout("")
    for name in ("baseline", "deepspeed"):
        shutil.rmtree(folder / "recipes/mine" / name)
    rows, _ = parity(folder, "tiny.yaml", ["megatron", "megatron:tp=2"], settings)
    assert verdicts(rows) == ["reference", "pass"]
    done = command(folder, "-m", "scripts.plan", "recipes/mine/configs/tiny.yaml", "model.vocab_size=512")
    assert done.returncode == 0 and "megatron" in done.stdout and "zero" not in done.stdout
    done = command(folder, "-m", "scripts.parity", "recipes/mine/configs/tiny.yaml", "--layouts", "baseline")
    assert "--layouts baseline: no stack 'baseline'; the recipe has megatron" in done.stderr
