"""scripts/quickstart.sh and what it ends with: compare, generate, heldout."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from common import config, families
from common.errors import BadInput
from common.preflight import task_module

FAMILIES = [name for name in families.names() if (ROOT / "recipes" / name / "configs/quickstart.yaml").is_file()]
FIRST = "gpt" if "gpt" in FAMILIES else FAMILIES[0]  # the script's default


def quickstart(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("NPROC", "RANK", "WORLD_SIZE")}
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def module(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", f"scripts.{name}", *map(str, arguments)], env=env, cwd=ROOT, capture_output=True, text=True
    )


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def training(run: Path) -> dict[int, float]:
    return {int(line["step"]): line["loss"] for line in metrics(run) if "loss" in line}


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "no such family": (["gtp"], f"FAMILY can be: {' '.join(FAMILIES)}"),
    "two families": (["gpt", "bert"], "two families, gpt and bert"),
    "no such source": (["--source", "/nowhere/at/all"], "/nowhere/at/all: no such file or folder"),
    "source without a path": (["--source", "--steps", "3"], "--source needs a file or folder"),
    "no steps": (["--steps", "0"], "--steps 0: must be a whole number from 1"),
    "unknown option": (["--fast"], "unknown option --fast"),
    "out without a folder": (["--out"], "--out needs a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name: str) -> None:
    arguments, message = BAD[name]
    done = quickstart(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_help_names_every_option() -> None:
    done = quickstart("--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("--source", "--steps", "--out", "NPROC"))


# ---- all stages, small -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[pytest.param(f, marks=[] if f == FIRST else pytest.mark.slow) for f in FAMILIES])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str], str]]:
    """A quickstart of 4 steps on 300 kB of text: its OUT, its arguments and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "".join(p.read_text(encoding="utf-8", errors="ignore") for p in library)[:300_000]
    (folder / "some text.txt").write_text(text, encoding="utf-8")
    arguments = [request.param, "--source", str(folder / "some text.txt"), "--steps", "4", "--out", str(folder / "out")]
    done = quickstart(*arguments)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    yield folder / "out", arguments, done.stdout
    corpus = re.search(r"tokenized into\s+(corpora/some_text_txt_\w+)$", done.stdout, re.M)
    assert corpus
    shutil.rmtree(ROOT / corpus[1])


def stacks_of(small: tuple[Path, list[str], str]) -> list[str]:
    return families.stacks(small[1][0])


def test_every_stage_says_what_it_does(small: tuple[Path, list[str], str]) -> None:
    output = small[2]
    stacks = stacks_of(small)
    stages = re.findall(rf"^\[(\d)/{4 + len(stacks)} +\d+s\] (\w+): .+", output, re.M)
    assert stages == [(str(i), n) for i, n in enumerate(["install", "corpus", *stacks, "sample", "compare"], 1)]
    assert len(re.findall(r"^\$ env NPROC=2 bash recipes/\w+/\w+/pretrain.sh", output, re.M)) == len(stacks)
    whole = re.sub(r" \\\n {4}", " ", output)  # a command goes on in a line that the shell reads as its own
    assert len(re.findall(rf"^\$ env NPROC=2 bash \S+ \S+quickstart.yaml {re.escape(str(small[0]))}/\w+ ", whole, re.M)) == len(
        stacks
    )
    assert len(re.findall(r"^step +1 +25% ", output, re.M)) == len(stacks), "progress is on the screen"


def test_three_runs_are_one_curve_and_their_exports_reach_it(small: tuple[Path, list[str], str]) -> None:
    out = small[0]
    first = training(out / stacks_of(small)[0])
    assert list(first) == [1, 2, 3, 4]
    for stack in stacks_of(small):
        run = out / stack
        assert max(abs(loss - first[step]) for step, loss in training(run).items()) <= 1e-5, stack
        (valid,) = [line for line in metrics(run) if "valid_loss" in line]
        held_out = json.loads((run / "hf/heldout.json").read_text(encoding="utf-8"))
        assert abs(held_out["loss"] - valid["valid_loss"]) <= 1e-5 and held_out["tokens"] == valid["valid_tokens"]
    system = yaml.safe_load((out / stacks_of(small)[-1] / "config.yaml").read_text(encoding="utf-8"))["megatron"]
    assert (system["tp"], system["sequence_parallel"], system["distributed_optimizer"]) == (2, True, True)


def test_table_picture_and_samples(small: tuple[Path, list[str], str]) -> None:
    out, _, output = small
    table = (out / "table.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == [f"| {stack}" for stack in stacks_of(small)]
    layouts = {"megatron": "megatron tp=2 sp dist-opt, 2 processes", "deepspeed": "deepspeed zero=1, 2 processes"}
    assert all(layouts.get(stack, stack) in table for stack in stacks_of(small))
    assert "Another experiment" not in table and "does not reach" not in table
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    last = 4 + len(stacks_of(small))
    samples = output.partition(f"[{last - 1}/{last}")[2].partition(f"[{last}/{last}")[0]
    assert all(f"---- {out / stack / 'hf'}" in samples for stack in stacks_of(small))


def test_a_rerun_returns_at_once_with_the_same_table(small: tuple[Path, list[str], str]) -> None:
    out, arguments, _ = small
    before = (out / "table.md").read_text(encoding="utf-8"), [metrics(out / stack) for stack in stacks_of(small)]
    done = quickstart(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already there: ") == 1 + len(stacks_of(small))  # the corpus and the runs
    assert ((out / "table.md").read_text(encoding="utf-8"), [metrics(out / stack) for stack in stacks_of(small)]) == before


def test_another_text_is_not_put_into_the_same_runs(small: tuple[Path, list[str], str], tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("This is another text.\n" * 3000, encoding="utf-8")
    done = quickstart(small[1][0], "--source", tmp_path / "other.txt", "--steps", "4", "--out", small[0])
    corpus = re.search(r"tokenized into\s+(corpora/other_txt_\w+)$", done.stdout, re.M)
    assert corpus
    shutil.rmtree(ROOT / corpus[1])
    assert done.returncode == 2
    assert "has another run" in done.stderr and "--out DIR" in done.stderr
    assert training(small[0] / stacks_of(small)[0]).keys() == {1, 2, 3, 4}


# ---- the corpus command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_corpus_is_that_of_the_config(family: str) -> None:
    path = ROOT / "recipes" / family / "configs/quickstart.yaml"
    cfg = config.load(path, [], task_module(family, {}).Config)
    module, folder, *_ = cfg.quickstart.corpus_words
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    assert (cfg.data.train, cfg.data.valid) == (f"{folder}/train", f"{folder}/valid")
    assert not any(key.startswith("quickstart") for key in config.hyperparameters(cfg))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{}", "quickstart.corpus: is missing"),
        ("{corpus: make corpora/x}", "must be a command that makes a corpus: python -m data.NAME FOLDER"),
        ("{corpus: python -m data.text}", "must be a command that makes a corpus"),
        ("{corpus: python -m data.text --source x}", "must be a command that makes a corpus"),
        ("{corpus: python -m data.text 'x}", "is not a command: No closing quotation"),
        ('{corpus: python -m data.text x, prompt: "a\\nb"}', "must be one line without control characters"),
    ],
)
def test_another_corpus_command_is_refused(value: str, message: str) -> None:
    with pytest.raises(BadInput) as refused:
        path = ROOT / "recipes" / FIRST / "configs/quickstart.yaml"
        config.load(path, [f"quickstart={value}"], task_module(FIRST, {}).Config)
    assert len(refused.value.problems) == 1 and message in refused.value.problems[0]


# ---- whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("family", "first_above", "last_below", "apart"),
    [  # apart: rounding, grown over all steps
        values
        for values in (("gpt", 8.0, 5.0, 1e-3), ("bert", 8.5, 7.5, 5e-3), ("t5", 8.0, 5.0, 5e-3))
        if values[0] in FAMILIES
    ],
)
def test_the_whole_quickstart(tmp_path: Path, family: str, first_above: float, last_below: float, apart: float) -> None:
    """As a user runs it; its runs are compared with what recipes/FAMILY/README.md says of them."""
    start = time.monotonic()
    done = quickstart(family, "--out", tmp_path / "out")
    seconds = time.monotonic() - start
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    print(f"{seconds:.0f} s")
    stacks = families.stacks(family)
    first = training(tmp_path / "out" / stacks[0])
    for stack in stacks:
        losses = training(tmp_path / "out" / stack)
        assert max(abs(losses[step] - first[step]) for step in first) <= apart, stack
        assert max(abs(losses[step] - first[step]) for step in range(1, 21)) <= 1e-5, stack
        valid = [line["valid_loss"] for line in metrics(tmp_path / "out" / stack) if "valid_loss" in line]
        assert losses[1] > first_above and valid[-1] < last_below
    if len(os.sched_getaffinity(0)) >= 2 and os.getloadavg()[0] < 4:
        assert seconds < 600


@pytest.mark.slow
def test_a_signal_is_passed_on_and_the_rerun_continues(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), "--steps", "12", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if re.match(r"step +\d+ ", line):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 143, rest
    assert "the same command continues" in rest
    run = tmp_path / families.stacks(FIRST)[0]
    (saved,) = run.glob("step_*")
    done = training(run)
    assert max(done) == int(saved.name[5:]) < 12
    again = quickstart("--steps", "12", "--out", tmp_path)
    assert again.returncode == 0, again.stderr
    assert {k: v for k, v in training(run).items() if k in done} == done


# ---- compare, on runs made by hand -----------------------------------------------------------------------------------


def run_of(folder: Path, stack: str, losses: list[float], lr: float = 1e-3, valid: float | None = 2.5) -> Path:
    """A run of pretrain.sh as far as compare reads it."""
    folder.mkdir(parents=True)
    cfg = yaml.safe_load((ROOT / "recipes/gpt/configs/tiny.yaml").read_text(encoding="utf-8"))
    cfg["optim"]["lr"] = lr
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg), encoding="utf-8")
    info = {"config": "tiny", "family": "gpt", "stack": stack, "data": {}, "commit": "abc", "versions": {"torch": "2"}}
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    lines = [
        {"step": i, "loss": loss, "tokens_per_s": 100.0 * (1 if i == 1 else 10), "mem_bytes": 2**30}
        for i, loss in enumerate(losses, 1)
    ]
    lines += [{"step": len(losses), "valid_loss": valid}] if valid else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_compare_tells_differences_and_speed(tmp_path: Path) -> None:
    one = run_of(tmp_path / "one", "baseline", [4.0, 3.0, 2.0])
    two = run_of(tmp_path / "two", "deepspeed", [4.0, 3.5, 2.0], lr=2e-3)
    out = tmp_path / "made/by_it"
    done = module("compare", one, two, "--no-export", "--out", out)
    assert done.returncode == 0, done.stderr
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "| two | deepspeed zero=1 | 3 | 5.0e-01 at step 2 | 2.50000 | - | 1.0k | 1.00 | 1.00 GiB |" in table
    assert "Another experiment: two differs from one in optim.lr." in table
    assert (out / "curves.png").is_file() and max(map(len, done.stdout.splitlines()[:-1])) <= 80
    assert {"5.0e-01", "2.50000", "1.0k", "1.00"} <= set(done.stdout.split())  # whole
    found = json.loads(module("compare", one, two, "--no-export", "--json").stdout)
    assert found["runs"][1] | {"layout": ""} == {
        "run": "two", "layout": "", "steps": 3, "largest_difference": {"value": 0.5, "step": 2}, "validation_loss": 2.5,
        "export_loss": None, "tokens_per_s": 1000.0, "tokens_per_s_ratio": 1.0, "peak_memory_bytes": 2**30,
    }  # fmt: skip
    assert found["notes"][0] == "Another experiment: two differs from one in optim.lr."


def test_compare_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    one = run_of(tmp_path / "one", "baseline", [4.0])
    empty = run_of(tmp_path / "empty", "deepspeed", [], valid=None)
    cases = {
        "at least two different runs": [one, one],
        "missing: not there": [one, tmp_path / "missing"],
        "metrics.jsonl: holds no step yet": [one, empty],
        "run.json/table: not writable": [one, one, "--out", one / "run.json/table"],
        "config.yaml: is a file": [one, one, "--out", one / "config.yaml"],
    }
    for message, arguments in cases.items():
        done = module("compare", *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: "), (arguments, done.stderr)
        assert re.search(message.replace("missing: ", "missing/run.json: "), done.stderr), done.stderr
    done = module("compare", one, empty, "--out", tmp_path / "nowhere")
    assert done.returncode == 2 and not (tmp_path / "nowhere").exists()


def test_heldout_and_generate_refuse_what_is_not_there(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "baseline", [4.0])
    for name, arguments, message in (
        ("heldout", [run], "no export there"),
        ("heldout", [run, "--samples", "none"], "--samples none: must be"),
        ("generate", [run], "no config.json there"),
        ("generate", [tmp_path / "rum"], f"rum: no such folder; did you mean {run}? give a Hugging Face folder, or OUT of a"),
        ("generate", [run, "--tokens", "0"], "--tokens 0: must be from 1 to"),
    ):
        done = module(name, *arguments)
        assert done.returncode == 2 and message in done.stderr, (name, done.stderr)
