"""Thousands of damaged configs, overrides and environments: each is taken or refused in one line per problem, and in no time.

Mutations of the configs of this repository go the way of `pretrain.sh CONFIG OUT a.b=c --dry-run` in this process.
"""

import json
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT

from common import config, errors
from common.checkpoints import run_record
from common.data.indexed_dataset import IndexedDatasetWriter, write_manifest
from common.launch import launcher
from common.yaml_files import read_yaml, to_yaml
from scripts import plan

CONFIGS = sorted((ROOT / "recipes").glob("*/configs/*.yaml"))
SECONDS, BYTES = 10, 2**30  # of one case at most
FAST, ALL = 400, 10_000
SYNTAX = [
    *list(":{}[],&*#?|-<>=!%@`'\"\\ \n\t"),
    "\0", "\x1b", "\x85", "\u2028", "\ud7ff", "\ufeff", "ü", "---\n", "<<: ", "!!int ",
]  # fmt: skip
VALUES = [
    "", "~", "null", "true", "no", "0", "-1", "1", "2", "3", "7", "1.0", "0.5", "-0.0", "2147483646", "2147483647",
    "2147483648", "9223372036854775807", "9" * 40, "9" * 400, "9" * 9000, "1e5", "1e-320", "1e308", "1e400", "-1e400",
    ".inf", "-.inf", ".nan", "0x7fffffff", "0x" + "f" * 16, "0x" + "f" * 99, "010", "0b11", "1_000", "1:30",
    "1" + ":59" * 3000, "2024-01-01", "2024-13-45", "2001-12-14t21:59:43.10-05:00", "abc", '"4"', '"a\\0b"', '"\\e[31m"',
    '"\\ud800"', '"\\u202e"', "'x\n\n y'", "x" * 254, "x" * 5000, "x/" * 3000, "/", "..", "/proc/self/mem", "/dev/zero",
    "~root", "[]", "{}", "[1]", "[1, 2]", "[a, [b]]", "[[0.5, a], [0.5, b]]", "[[1e-300, a], [1e300, b]]", "[.nan, 1]",
    "{a: 1}", "{a.b: 1}", "{<<: {a: 1}}", "{1: 2}", "{a: 1, a: 2}", "{from: scratch}", "{train.steps: 9}",
    "[{train.steps: 30}, {train.steps: 40, optim.lr: 1.0}]", "[{}]", "[{train.steps: 1}]", "[{optim: 3}]",
    "[{optim..lr: 3, train.steps: 99}]", "[{deepspeed.extra.a: {b: 3}, train.steps: 99}]", "[" * 20, "[" * 40 + "]" * 40,
    "[" * 2000, "{a: " * 20 + "1" + "}" * 20, "&a [*a]", "&a x", "*a", "!!python/object/apply:os.abort []", "!!binary aGk=",
    "!!set {a}", "!!timestamp x", "!a b", "| \n x", "> \n x", "%YAML 9.9", "@", "`", "?", ": :", "- -", "'", '"', "lamb",
    "adafactor", "llama", "bert", "bf16", "fp32", "gpt2", "span", "prefix", "none", "cosine", "corpus/train", "corpus",
    "words",
]  # fmt: skip
OVERRIDES = [
    "", "=", "a", "=1", "a..b=1", ".a=1", "a.=1", "train.steps", "train.steps.x=1", "a" * 9000, "a" + ".a" * 3000 + "=1",
    "phases.0=1", "--x=1", "model=", "data=~", "train=[]", "ü.ß=1", "a=b=c", "expect.x.value=3", "x\ny=1",
]  # fmt: skip


def leaves(values: Any, prefix: str = "") -> list[str]:
    """Every key of nested sections, such as a.b.c, sections included."""
    keys = []
    for key, value in values.items() if isinstance(values, dict) else ():
        keys += [prefix + key, *leaves(value, f"{prefix}{key}.")]
    return keys


MORE = [  # keys that the configs leave out
    "baseline.recompute", "deepspeed.tp", "deepspeed.pp", "deepspeed.partition", "deepspeed.zero_stage", "deepspeed.offload",
    "deepspeed.extra", "megatron.tp",
    "megatron.pp", "megatron.vpp", "megatron.pipeline_layout", "megatron.sequence_parallel", "megatron.recompute",
    "megatron.extra",
    "megatron.extra.recompute_num_layers", "megatron.transformer_engine", "model.kv_heads", "model.ffn", "model.positions",
    "model.vocab_size", "model.dropout", "model.rope_theta", "model.buckets", "model.max_distance", "model.kv_channels",
    "model.decoder_layers", "model.pair_head", "data.pack", "data.reset_attention", "data.tokenizer", "data.target_len",
    "objective.pair", "objective.kind", "objective.noise_density", "objective.mean_noise_span_length",
    "objective.short_seq_prob",
    "optim.lamb.max_coeff", "optim.schedule", "optim.decay_steps", "optim.begin_step", "init.from", "train.eval_every",
    "train.save_every", "train.keep", "phases", "expect", "expect.x", "task.data", "task.name", "task.tags", "lora",
]  # fmt: skip
KEYS = {path: leaves(yaml.safe_load(path.read_text())) for path in CONFIGS}


def key(rng: random.Random, path: Path) -> str:
    return rng.choice(KEYS[path] if rng.random() < 0.7 else MORE)


def value(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return str(2 ** rng.randrange(12))
    if rng.random() < 0.2:
        return str(rng.choice([1, -1]) * rng.randrange(10 ** rng.randrange(1, 12)))
    return rng.choice(VALUES)


def damaged(rng: random.Random, text: str) -> str:
    """A few changes of a config: of values, keys, lines, characters."""
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        lines = text.splitlines(keepends=True) or [""]
        number = rng.randrange(len(lines))
        line, place = lines[number], rng.randrange(len(text) + 1)
        match rng.randrange(8):
            case 0 | 1 | 2:  # another value for a key
                ends = [i for i, c in enumerate(line) if c == ":"]
                if ends:
                    start = rng.choice(ends) + 1
                    stop = min((i for i in map(lambda c: line.find(c, start), ",}\n") if i >= 0), default=len(line))
                    lines[number] = f"{line[:start]} {value(rng)}{line[stop:]}"
                text = "".join(lines)
            case 3:  # another key
                word = rng.choice(line.replace(":", " ").split() or ["x"])
                lines[number] = line.replace(word, rng.choice(["", "on", word * 2, "x", word[:-1]]), 1)
                text = "".join(lines)
            case 4:
                text = "".join([*lines[:number], *lines[number + 1 :]])
            case 5:
                text = "".join([*lines[:number], line, line, *lines[number + 1 :]])
            case 6:
                text = text[:place] + rng.choice([*SYNTAX, value(rng)]) + text[place:]
            case 7:
                text = text[:place] + text[place + rng.randrange(1, 30) :]
    return text


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a corpus of 4,000 ids below 128; without git, srun, network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_record, "commit", lambda: "none")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("socket.getaddrinfo", _no_network)
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    writer = IndexedDatasetWriter(tmp_path / "corpus/train", np.uint16)
    for document in np.random.default_rng(0).integers(0, 128, (10, 400)):
        writer.add(document)
    writer.finish()
    write_manifest(tmp_path / "corpus/train", {"tokenizer_size": 128, "tokenizer_hash": "a" * 64})
    return tmp_path


def _no_network(host: Any, *_: Any, **__: Any) -> Any:
    if len(str(host)) > 63:
        raise UnicodeError("label too long")  # as Python's does
    raise OSError("no network in a test")


class Watch:
    """Runs commands and sees to it that each is done or refused as it should be."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self.capsys, self.monkeypatch, self.codes = capsys, monkeypatch, Counter()
        self.slowest = 0.0

    def __call__(self, what: Any, main: Any) -> str | None:
        """What the command prints; None where it refuses."""
        what = repr(what)[:3000]
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        with pytest.raises(SystemExit) as end:
            try:
                errors.exit_cleanly(main)
            except SystemExit:
                raise
            except BaseException as error:
                raise AssertionError(f"{what}: {error!r}") from error
        took = time.monotonic() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        out, err = self.capsys.readouterr()
        code = end.value.code or 0
        self.codes[code] += 1
        self.slowest = max(self.slowest, took)
        assert took < SECONDS and grown < BYTES, (what, took, grown)
        assert code in (0, 2), (what, code, err)
        lines = err.splitlines()
        if code:
            assert 0 < len(lines) <= 60 and all(line.startswith("error: ") for line in lines), (what, err)
        assert all(len(line) < 4100 for line in lines), (what, err)
        assert err.replace("\n", "").isprintable(), (what, err)
        return None if code else out


def attempt(rng: random.Random, place: Path, watch: Watch, corpora: dict[str, Path]) -> None:
    path = rng.choice(CONFIGS if rng.random() < 0.3 else [p for p in CONFIGS if not p.name.startswith("finetune_")])
    text = damaged(rng, path.read_text()) if rng.random() < 0.6 else path.read_text()
    (place / "c.yaml").write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    overrides = [f"{key(rng, path)}={value(rng)}" for _ in range(rng.choice([0, 1, 1, 2]))]
    if rng.random() < 0.7:
        overrides.insert(0, "model.vocab_size=128")
    if rng.random() < 0.5 and path.parts[-3] in corpora:
        overrides.insert(0, f"data.train={corpora[path.parts[-3]]}/train")
    if rng.random() < 0.1:
        overrides.append(rng.choice(OVERRIDES))
    overrides = [text for text in overrides if not text.startswith("-")]
    watch.monkeypatch.setenv("NPROC", rng.choice(["1", "1", "1", "1", "2", "8", "1048576"]))
    stack = rng.choice(config.STACKS)
    kind = "finetune" if path.name.startswith("finetune_") else "pretrain"
    module = f"recipes.{path.parts[-3]}.{stack}.{kind}"
    what = (module, text, overrides)
    out = watch(what, lambda: launcher.main([module, "c.yaml", "out", *overrides, "--dry-run"]))
    if out is not None:
        resolved = out.partition("\n\n")[0]
        (place / "again.yaml").write_text(resolved)
        values = read_yaml(place / "again.yaml")
        assert to_yaml(values).rstrip() == resolved, what
        assert {"model", "data", "optim", "train", *config.STACKS} <= values.keys(), what


def some(count: int) -> Any:
    return pytest.mark.parametrize("count", [count, pytest.param(ALL, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])


@some(FAST)
def test_configs_and_overrides(count: int, place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """The long way also opens a corpus of BERT and one of T5."""
    corpora = {"gpt": Path("corpus")}
    if count == ALL:
        corpora |= {family: request.getfixturevalue(name) for family, name in (("bert", "sentences"), ("t5", "spans"))}
    watch = Watch(capsys, monkeypatch)
    monkeypatch.setattr("huggingface_hub.snapshot_download", _no_network)
    for number in range(count):
        attempt(random.Random(number), place, watch, corpora)
    assert not (place / "out").exists()
    assert watch.codes[0] > count // 20 and watch.codes[2] > count // 4, watch.codes
    with capsys.disabled():
        print(f"\n{count} configs: {dict(watch.codes)}, the slowest {watch.slowest:.2f} s")


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_plan(count: int, place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(capsys, monkeypatch)
    for number in range(count):
        rng = random.Random(number)
        path = rng.choice([p for p in CONFIGS if not p.name.startswith("finetune_")])
        folder = place / "recipes" / path.parts[-3] / "configs"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "c.yaml").write_text(damaged(rng, path.read_text()), encoding="utf-8", errors="surrogatepass", newline="")
        overrides = [f"{key(rng, path)}={value(rng)}" for _ in range(rng.choice([0, 1, 2]))]
        overrides.insert(0, "model.vocab_size=128")
        argv = ["plan", str(folder / "c.yaml"), *overrides]
        gpus = rng.choice(["1", "8", "7", "1000000", "2147483647", "9" * 30])
        argv += ["--gpus", gpus] + (["--gpu", rng.choice(["A100", "H100", ""])] if rng.random() < 0.5 else [])
        monkeypatch.setattr(sys, "argv", argv)
        watch((path, argv), plan.main)
    assert watch.codes[0] and watch.codes[2], watch.codes


NUMBERS = [
    "", " ", "0", "1", "2", "-1", "1.5", "x", "9" * 30, "9" * 9000, "٣", "²", "0x2", "1 2", "65535", "65536", "\n1",
    "1(x2)",
]  # fmt: skip
HOSTS = [
    "", " ", "a", "gpu[1-3]", "gpu[", "[", "]", ",", "a" * 300, "a.b", "gpu[007-009,12],login1", "127.0.0.1", "::1", "a b",
    "ü",
]  # fmt: skip


@pytest.mark.parametrize("count", [500])
def test_environments(count: int, place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(capsys, monkeypatch)
    for number in range(count):
        rng = random.Random(number)
        names = ["NPROC", "NNODES", "NODE_RANK", "MASTER_PORT", "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_STEP_NUM_TASKS"]
        env = {name: rng.choice(NUMBERS) for name in [*names, "SLURM_NODEID", "SLURM_JOB_ID"] if rng.random() < 0.5}
        hosts = ["MASTER_ADDR", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "CUDA_VISIBLE_DEVICES"]
        env |= {name: rng.choice(HOSTS) for name in hosts if rng.random() < 0.6}
        env |= {"SLURM_STEP_ID": "0"} if rng.random() < 0.5 else {}
        watch(env, lambda env=env: print(launcher.nodes(env)))
    assert watch.codes[0] and watch.codes[2], watch.codes


def test_a_recorded_config_reads_as_it_was(place: Path) -> None:
    """Texts that YAML would read as something else, through OUT/config.yaml and back."""
    texts = [
        "1e5",
        "6e-4",
        "010",
        "1:30",
        "2024-01-01",
        "no",
        "~",
        "null",
        "1.5",
        ".inf",
        "0x10",
        "a: b",
        "- a",
        "#",
        "ü",
        "'",
        "1_0",
    ]
    (place / "x.yaml").write_text(to_yaml({"a": texts}))
    assert read_yaml(place / "x.yaml") == {"a": texts}
    assert yaml.safe_load((place / "x.yaml").read_text()) == {"a": texts}
    same = ["x"]
    assert "&" not in to_yaml({"a": same, "b": same})  # no anchors: they are not read
    numbers = [0, -1, 10**20, 0.0, 1e-300, 6e-4, 1e22, True, None, [], {}]
    (place / "x.yaml").write_text(to_yaml({"a": numbers}))
    assert json.dumps(read_yaml(place / "x.yaml")) == json.dumps({"a": numbers})
