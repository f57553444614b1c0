"""Bad input, row by row: exit code 2, one line per problem that names the key, file or value; nothing started or overwritten.

Most rows call the launcher in this process with the start of the ranks replaced; the last part starts ranks. What the
modules of data/ refuse is in test_data.py, the environment's variables, ports and arguments in test_launch.py.
"""

import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from conftest import LEFT_OUT, ROOT, Drive, case, launch_script, losses

from common import families, preflight
from common.checkpoints import checkpoint, integrity, run_record, state
from common.data.indexed_dataset import IndexedDatasetWriter, write_manifest
from common.errors import BadInput, exit_cleanly
from common.launch import launcher, lock
from common.training import optim
from recipes.gpt import task
from tests import states

TEXT = """\
model: {arch: gpt2, layers: 4, hidden: 64, heads: 4, vocab_size: 128}
data: {train: corpus/train, valid: corpus/valid, seq_len: 32}
optim: {lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 2}
train: {steps: 4, global_batch: 8}
baseline: {micro_batch: 2}
deepspeed: {micro_batch: 2, zero_stage: 1}
megatron: {micro_batch: 2, tp: 1, pp: 1}
"""


class Attempt(NamedTuple):
    code: int
    lines: list[str]  # of stderr
    started: bool


Try = Callable[..., Attempt]


def corpus(prefix: Path, tokens: int = 4000, vocab: int = 128, seed: int = 0, manifest: bool = True, **values: Any) -> None:
    """Random ids below `vocab` under `prefix`, in documents of 400."""
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for document in np.random.default_rng(seed).integers(0, vocab, (tokens // 400, 400)):
        writer.add(document)
    writer.finish()
    if manifest:
        write_manifest(prefix, {"tokenizer_size": vocab, "tokenizer_hash": "a" * 64} | values)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder one stands in: a config and its corpus."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("SLURM_")] + ["NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(run_record, "commit", lambda: "none")  # git: a tenth of a second per row
    (tmp_path / "tiny.yaml").write_text(TEXT)
    corpus(tmp_path / "corpus/train")
    corpus(tmp_path / "corpus/valid", seed=1)
    return tmp_path


@pytest.fixture
def attempt(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Try:
    """attempt(*overrides, stack=, nproc=, config=, out=): the launcher up to the start of the ranks."""
    started: list[Sequence[str]] = []
    monkeypatch.setattr(launcher, "run_ranks", lambda arguments, *_: started.append(arguments) or 0)

    def go(
        *overrides: str, stack: str = "baseline", nproc: int = 1, config: Any = "tiny.yaml", out: Any = "out",
        family: str = "gpt",
    ) -> Attempt:  # fmt: skip
        monkeypatch.setenv("NPROC", str(nproc))
        started.clear()
        with pytest.raises(SystemExit) as end:
            exit_cleanly(lambda: launcher.main([f"recipes.{family}.{stack}.pretrain", str(config), str(out), *overrides]))
        return Attempt(end.value.code, capsys.readouterr().err.splitlines(), bool(started))

    return go


def snapshot(folder: Path) -> dict[str, Any]:
    """Every path below a folder and what it holds."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if "tensorboard" not in name:  # each start opens a file of its own there
            contents[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return contents


def refused(place: Path, attempt: Callable[[], Attempt], *messages: str) -> list[str]:
    """Exit 2, a line for each of `messages` and no other, nothing started, every file as it was."""
    before = snapshot(place)
    code, lines, started = attempt()
    assert code == 2 and not started, lines
    assert all(line.startswith("error: ") for line in lines), lines
    for words in messages:
        assert [line for line in lines if words in line], (words, lines)
    assert len(lines) == len(messages), lines
    assert snapshot(place) == before
    return lines


# ---- keys and values

KEYS: list[tuple[str, list[str]]] = [  # overrides, messages: one entry per line
    # unknown, missing, mistyped
    ("train.stepz=3", ["train.stepz: unknown key; did you mean 'steps'? train has: steps, global_batch"]),
    ("megatron.sp=true", ["megatron.sp: unknown key; did you mean 'sequence_parallel'? megatron has: "]),
    ("train.batch_size=4", ["train.batch_size: unknown key; did you mean 'global_batch'? train has: "]),
    ("trian.steps=3", ["trian: unknown key; did you mean 'train'?"]),
    ("a.b.c=1", ["a: unknown key; a config has: model, data, optim"]),
    ("train.steps.x=1", ["override 'train.steps.x=1': steps is a value, not a section"]),
    ("model=null", [f"model.{key}: is missing; add it, or give model.{key}=" for key in ("layers", "hidden", "heads")]),
    ("optim.lr=null", ["optim.lr=null: should be a valid number"]),
    ("train=3", ["train=3: should be a section: steps, global_batch"]),
    ("baseline=[1]", ["baseline=[1]: should be a section: micro_batch, shard, recompute"]),
    ("expect.val_loss=3", ["expect.val_loss=3: should be a section: value, tolerance, source"]),
    ("expect.val_loss.value=3", ["expect.val_loss.tolerance: is missing", "expect.val_loss.source: is missing"]),
    ("expect.loss={value: 3.0, tolerance: 0.1, source: me}", ["expect.loss: no evaluator writes such a score; did you mean"]),
    ("deepspeed.extra=3", ["deepspeed.extra=3: should be a valid dictionary"]),
    # extra: read and without effect on the loss, or refused
    (
        "megatron.extra.window_size=[8,8]",
        ["megatron.extra.window_size: is refused, as it may change the loss or have no effect"],
    ),
    ("megatron.extra.softmax_scale=0.5", ["megatron.extra.softmax_scale: is refused"]),
    (
        "megatron.extra.batch_p2p_snyc=false",
        ["batch_p2p_snyc: is refused, as it may change the loss or have no effect; did you m"],
    ),
    ("megatron.extra.batch_p2p_sync=false", ["megatron.extra.batch_p2p_sync: is read only with megatron.pp above 1; leave it"]),
    ("megatron.pp=2 megatron.extra.batch_p2p_sync=0", ["megatron.extra.batch_p2p_sync: must be true or false, is 0"]),
    (
        "megatron.recompute=true megatron.extra.recompute_granularity=selective",
        ["megatron.extra.recompute_granularity=selective with megatron.recompute=full: give one of them"],
    ),
    ("megatron.extra.recompute_granularity=full", ["full has no default for how many layers; give recompute_method and"]),
    (
        "megatron.extra.recompute_method=block",
        ["megatron.extra.recompute_method: is read only with full recompute; leave it out"],
    ),
    ("deepspeed.extra.fp16={enabled: true}", ["deepspeed.extra.fp16.enabled: is refused, as it may change the loss or have"]),
    (
        "deepspeed.extra.zero_optimization={stage: 3}",
        [
            "zero_optimization.stage: is refused",
        ],
    ),
    ("deepspeed.extra.zero_optimization=3", ["deepspeed.extra.zero_optimization: is refused"]),
    ("deepspeed.extra.zero_optimization.sub_group_size=9", ["sub_group_size: is read only with deepspeed.zero_stage=3; leave"]),
    ("deepspeed.extra.zero_optimization.reduce_bucket_size=5e8", ["must be a whole number above 0, is 500000000.0"]),
    ("model.layers=four", ['model.layers="four": should be a valid integer']),
    ("model.layers=4.0", ["model.layers=4.0: should be a valid integer"]),
    ("train.global_batch=1e3", ["train.global_batch=1000.0: should be a valid integer"]),
    ("train.steps='4'", ['train.steps="4": should be a valid integer']),
    ("train.steps=2024-01-01", ['train.steps="2024-01-01": should be a valid integer']),
    ("train.steps=", ["train.steps=null: should be a valid integer"]),
    ("optim.lr=true", ["optim.lr=true: should be a valid number"]),
    ("data.pack=1", ["data.pack=1: should be a valid boolean"]),
    ("data.pack=maybe", ['data.pack="maybe": should be a valid boolean']),
    ("init=scratch", ['init="scratch": should be a section: from']),
    ("init.from=", ["init.from=null: should be a valid string"]),
    ('init.from=""', ['init.from="": String should have at least 1 character']),
    ("optim.betas=0.9", ["optim.betas=0.9: should be a valid list"]),
    ("optim.betas=[0.9]", ["optim.betas=[0.9]: List should have at least 2 items"]),
    ("steps=5", ["steps: unknown key; did you mean train.steps? a config has: "]),
    ("model.micro_batch=5", ["did you mean baseline.micro_batch or deepspeed.micro_batch or megatron.micro_batch? model has"]),
    # overrides that are none
    ("train.steps", ["override 'train.steps': must be section.key=value, for example train.steps=100"]),
    ("=x", ["override '=x': must be section.key=value"]),
    ("", ["override '': must be section.key=value"]),
    ("train..steps=3", ["override 'train..steps=3': must be section.key=value"]),
    ("train.steps =3", ["override 'train.steps =3': must be section.key=value"]),
    ("model.layers=[1,2", ["override 'model.layers=[1,2': '[1,2' is not a YAML value; quote it"]),
    ("train.steps=2024-13-45", ['train.steps="2024-13-45": should be a valid integer']),
    ("model.layers=!!python/object/apply:os.abort []", ["tags (!!python/object/apply:os.abort) are not read; write the"]),
    ("train.seed=" + "[" * 2000, ["nested more than 32 deep"]),
    ("train.seed=&a [*a]", ["anchors (&a) are not read; write the value where it is used"]),
    ("train.seed=*a", ["aliases (*a) are not read; write the value again"]),
    ("a" + ".a" * 40 + "=1", ["must be section.key=value, for example train.steps=100"]),
    # numbers that YAML 1.1 reads in silence as others: in base 8 and 60
    ("train.seed=010", ['train.seed="010": should be a valid integer']),
    ("train.steps=1:30", ['train.steps="1:30": should be a valid integer']),
    ("optim.lr=1:30.5", ['optim.lr="1:30.5": should be a valid number']),
    ("train.steps=" + "9" * 5000, ["99 ... (5,002 characters) ... 99"]),
    ("optim.lr=1e999999999", ["optim.lr=Infinity: should be a finite number"]),
    # paths that no file can have
    ('data.valid="a\\0b"', ['data.valid="a\\u0000b": must be a path without control characters']),
    ('model.arch="a\\e[2J\\u202e\\ud800"', ['model.arch="a\\u001b[2J\\u202e\\ud800": should be a valid string']),
    (
        "train.global_batch=2147483646",
        ["train.global_batch=2147483646 of 32 tokens each are 68,719,476,672 tokens per step"],
    ),
    ("model.layers=1000000000", ["model.layers=1000000000: should be less than or equal to 10000"]),
    # values out of range
    ("train.steps=0", ["train.steps=0: should be greater than 0"]),
    ("train.steps=-1", ["train.steps=-1: should be greater than 0"]),
    ("train.steps=99999999999999999999", ["train.steps=99999999999999999999: should be less than 2147483648"]),
    ("train.eval_every=-1", ["train.eval_every=-1: should be greater than or equal to 0"]),
    ("train.keep=0", ["train.keep=0: should be greater than 0"]),
    ("train.hang_seconds=-1", ["train.hang_seconds=-1: should be greater than or equal to 0"]),
    ("train.seed=-1", ["train.seed=-1: should be greater than or equal to 0"]),
    ("train.seed=9223372036854775808", ["train.seed=9223372036854775808: should be less than"]),
    ("train.dtype=fp16", ["train.dtype=\"fp16\": should be 'fp32' or 'bf16'"]),
    ("model.arch=bert", ["model.arch=\"bert\": should be 'gpt2' or 'llama'"]),
    ("model.dropout=1", ["model.dropout=1: should be less than 1"]),
    ("model.init_std=2", ["model.init_std=2: should be less than or equal to 1"]),
    ("deepspeed.zero_stage=4", ["deepspeed.zero_stage=4: should be less than or equal to 3"]),
    ("optim.lr=.nan", ["optim.lr=NaN: should be a finite number"]),
    ("optim.lr=1e400", ["optim.lr=Infinity: should be a finite number"]),
    ("optim.betas=[.nan,0.9]", ["optim.betas=NaN: should be a finite number"]),
    ("optim.betas=[0.9,1.5]", ["optim.betas=[0.9, 1.5]: each must be at least 0 and below 1"]),
    # between keys
    ("optim.min_lr=1", ["optim.min_lr=1.0 is above optim.lr=0.001"]),
    ("optim.decay_steps=1", ["optim.decay_steps=1 is below optim.warmup_steps=2"]),
    ("model.heads=5", ["model.hidden=64 is not a multiple of model.heads=5"]),
    ("model.kv_heads=2", ["model.kv_heads=2: grouped queries need model.arch=llama"]),
    ("model.arch=llama model.dropout=0.1", ["model.dropout=0.1: LlamaForCausalLM has attention dropout only"]),
    ("model.positions=16", ["model.positions=16 is below data.seq_len=32"]),
    # phases
    ("phases=[{train.steps: 4}]", ["phases[0]: train.steps=4: must be given, the step at which it ends, above 4"]),
    ("phases=[{data.seq_len: 16}]", ["phases[0]: train.steps=null: must be given, the step at which it ends, above 4"]),
    ("phases=[{train.steps: 8, model.layers: 2}]", ["phases[0]: model.layers cannot change within a run; a phase may"]),
    ("phases=[{train.steps: 8, optim.lrr: 1.0}]", ["phases[0]: optim.lrr: unknown key; did you mean 'lr'?"]),
    ("phases=[{train.steps: 8, data.seq_len: 64}]", ["phases[0]: data.seq_len changes; give model.positions"]),
    ("phases=[{train.steps: 8, optim.begin_step: 4}]", ["phases[0]: optim.begin_step begins a schedule; give its optim.deca"]),
    ("phases=3", ["phases=3: should be a valid list"]),
    ("phases=[{train.steps: 8, optim.lr.x: 3}]", ["phases[0]: optim.lr.x: lr is a value, not a section"]),
    ("phases=[{train.steps: 8, optim.optimizer: lamb}]", ["phases[0]: optim.optimizer cannot change within a run"]),
    (
        "phases=[{train.steps: 8, optim.begin_step: 5, optim.decay_steps: 4}]",
        ["phases[0]: optim.begin_step=5 is above 4, the step after which it begins"],
    ),
    ("phases=[{train.steps: 8, train.global_batch: 7}]", ["phases[0]: train.global_batch=7 is not a multiple of"]),
    ("phases=[{1: 30}]", ["override 'phases=[{1: 30}]': the key '1' must be a string"]),
    ("optim.begin_step=2", ["optim.begin_step=2: the first schedule begins at 0; it is for a later phase"]),
    ("optim.lamb.min_coeff=11", ["optim.lamb.min_coeff=11.0 is above optim.lamb.max_coeff=10.0"]),
    # blends
    ("data.train=3", ["data.train=3: must be a prefix, a list of prefixes, or a list of [weight above 0, prefix]"]),
    ("data.train=[]", ["data.train=[]: must be"]),
    ('data.train=""', ['data.train="": must be']),
    ("data.train=[[0,corpus/train]]", ['data.train=[[0, "corpus/train"]]: must be']),
    ("data.train=[[-1,corpus/train],[1,corpus/valid]]", ["data.train=[[-1, "]),
    ("data.train=[[.inf,corpus/train],[1,corpus/valid]]", ["data.train=[[Infinity, "]),
    ("data.train=[[.nan,corpus/train],[1,corpus/valid]]", ["data.train=[[NaN, "]),
    ("data.train=[[true,corpus/train],[1,corpus/valid]]", ["data.train=[[true, "]),
    ("data.train=[corpus/train,[1,corpus/valid]]", ["data.train=["]),
    ("data.train=[[1,2,3]]", ["data.train=[[1, 2, 3]]: must be"]),
    ("data.train=[[1e-9,corpus/train],[1,corpus/valid]]", ["corpus/train: under 1/10,000 of the blend"]),
    # every problem in one go, those between keys too, even where a required key is among the bad ones
    (
        "model.layers=x model.haeds=4 train.steps=0 optim.min_lr=1 deepspeed.zero_stage=4 =x",
        ["model.layers=", "model.haeds", "train.steps=0", "optim.min_lr=1.0 is above", "zero_stage=4", "override '=x'"],
    ),
    ("model.hidden=x optim.lr=-1 model.positions=16", ["model.hidden=", "optim.lr=-1", "model.positions=16 is below"]),
    ("data=null optim.min_lr=1", ["data.train", "data.seq_len: is missing", "optim.min_lr=1.0 is above"]),
]


@pytest.mark.parametrize(("overrides", "messages"), KEYS, ids=[row[0][:40] for row in KEYS])
def test_keys_and_values(overrides: str, messages: list[str], place: Path, attempt: Try) -> None:
    words = [overrides] if overrides.count("=") < 2 or "!!" in overrides else overrides.split()
    refused(place, lambda: attempt(*words), *messages)


# ---- the file

FILES: list[tuple[str, bytes, str]] = [  # name, content, message
    ("empty", b"", "must have sections (model, data, optim, train), and is empty"),
    ("comment", b"# nothing", "and is empty"),
    ("list", b"- a\n- b\n", "is a list"),
    ("word", b"hello", "is a str"),
    ("two documents", f"{TEXT}---\n{TEXT}".encode(), "not YAML: expected a single document"),
    ("tab", b"model:\n\tlayers: 4\n", "not YAML: while scanning for the next token found character '\\t'"),
    ("key twice", f"{TEXT}train: {{steps: 3, global_batch: 8}}\n".encode(), "the key 'train' is given twice at line 8"),
    ("key twice inside", TEXT.replace("steps: 4", "steps: 4, steps: 5").encode(), "the key 'steps' is given twice at line 4"),
    ("number as key", f"{TEXT}1: 3\n".encode(), "the key '1' must be a string at line 8"),
    ("truth as key", TEXT.replace("steps: 4", "steps: 4, on: 5").encode(), "the key 'on' must be a string at line 4"),
    ("list as key", f"{TEXT}? [a, b]\n: 3\n".encode(), "must be a string at line 8"),
    ("NUL", TEXT.encode() + b"\0", "not YAML: unacceptable character #x0000"),
    ("UTF-16", TEXT.encode("utf-16"), "not YAML: 'utf-8' codec can't decode byte 0xff"),
    ("Latin-1", TEXT.encode() + "# Jürgen".encode("latin-1"), "not YAML: 'utf-8' codec can't decode byte 0xfc"),
    (
        "a tag that runs code",
        f"{TEXT}x: !!python/object/apply:os.abort []\n".encode(),
        "not YAML: tags (!!python/object/apply:os.abort) are",
    ),
    ("nested too deeply", b"a: " + b"[" * 3000, "not YAML: nested more than 32 deep at line 1, column 35"),
    ("no such date", TEXT.replace("steps: 4", "steps: 2024-13-45").encode(), 'train.steps="2024-13-45": should be a valid'),
    (
        "anchors that expand",
        f"{TEXT}x: [&a [1, 1], &b [*a, *a], [*b, *b]]\n".encode(),
        "not YAML: anchors (&a) are not read; write",
    ),
    ("contains itself", TEXT.replace("4, hidden", "&l [*l], hidden").encode(), "not YAML: anchors (&l) are not read"),
    ("base 60", TEXT.replace("layers: 4", "layers: 1" + ":59" * 3000).encode(), 'model.layers="1:59:59:59'),
    ("many values", b"a: [" + b"1," * 20_000 + b"]", "not YAML: more than 10,000 values at line 1"),
    ("a megabyte", TEXT.encode() + b"#" * 2**20, "has more than 256 KB; a config is smaller"),
    ("1,000 phases", TEXT.encode() + b"phases:\n" + b"- {train.steps: 8}\n" * 1000, "phases=[{"),
    ("section missing", TEXT.replace("optim:", "# ").encode(), "optim: is missing; add it"),
]


@pytest.mark.parametrize(("content", "message"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_config_files(content: bytes, message: str, place: Path, attempt: Try) -> None:
    (place / "bad.yaml").write_bytes(content)
    (line,) = refused(place, lambda: attempt(config="bad.yaml"), message)
    assert line.startswith("error: bad.yaml: ")


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf" + TEXT.encode(), TEXT.replace("\n", "\r\n").encode(), json.dumps(yaml.safe_load(TEXT)).encode()],
    ids=["byte order mark", "CRLF", "JSON"],
)
def test_config_files_that_are_fine(content: bytes, place: Path, attempt: Try) -> None:
    (place / "fine.yaml").write_bytes(content)
    assert attempt(config="fine.yaml") == (0, [], True)


def test_no_such_config_lists_what_there_is(place: Path, attempt: Try) -> None:
    refused(place, lambda: attempt(config="tinny.yaml"), "tinny.yaml: no such config; did you mean tiny.yaml? . has: tiny")
    (line,) = refused(place, lambda: attempt(config="no/where/tiny.yaml"), "no/where/tiny.yaml: no such config; did you")
    assert "recipes/bert/configs/tiny.yaml or " in line and line.endswith("recipes/t5/configs/tiny.yaml?")
    (line,) = refused(place, lambda: attempt(config="no/where"), "no/where: no such config; those of a recipe are in ")
    (line,) = refused(place, lambda: attempt(config="recipes/gpt/configs/tiny.yaml"), "tiny.yaml: no such config in ")
    assert line.endswith(f"; type {ROOT / 'recipes/gpt/configs/tiny.yaml'}")
    refused(place, lambda: attempt(config=place), f"{place}: is a folder, not a config; {place} has: tiny.yaml")
    refused(place, lambda: attempt(config="x" * 300), "cannot be read: File name too long")
    refused(place, lambda: attempt(config=""), "CONFIG is empty")


def test_a_model_that_is_larger_than_the_memory_is_not_started_without_a_gpu(
    place: Path, attempt: Try, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "2 processes on a machine without a GPU would need about"
    (line,) = refused(place, lambda: attempt("model.hidden=65536", nproc=2), message)
    assert re.search(r"about [0-9,]{4,} GiB of memory, and it has \d+ GiB: give a smaller model", line)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # GPUs have memory of their own
    assert attempt("model.hidden=65536", nproc=2) == (0, [], True)


def test_a_config_of_another_family_is_named(place: Path, attempt: Try) -> None:
    path = ROOT / "recipes/bert/configs/tiny.yaml"
    refused(place, lambda: attempt(config=path), f"{path}: is a config of bert; give it to a script of recipes/bert")


def test_config_and_out_the_other_way_round(place: Path, attempt: Try) -> None:
    refused(place, lambda: attempt("a.b=c d", config="out", out="tiny.yaml"), "pretrain.sh tiny.yaml out 'a.b=c d'")
    refused(place, lambda: attempt("--train.steps=5"), "a key of the config is given without dashes, train.steps=5")


# ---- layouts

LAYOUTS: list[tuple[str, int, str, str]] = [  # stack, processes, overrides, message
    ("baseline", 1, "baseline.micro_batch=3", "train.global_batch=8 is not a multiple of baseline.micro_batch=3 x 1 data"),
    ("baseline", 1, "baseline.micro_batch=16", "baseline.micro_batch may be 1, 2, 4 or 8"),
    (
        "megatron", 1, "train.global_batch=2147483640 megatron.micro_batch=7 data.seq_len=1",
        "megatron.micro_batch may be 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 29, 30, 40, 43, ... or 2147483640",
    ),
    ("baseline", 3, "", "x 3 data-parallel ranks; train.global_batch may be 6 or 12, or change NPROC"),
    ("baseline", 2, "train.global_batch=3", "x 2 data-parallel ranks; train.global_batch may be 4, or change NPROC"),
    ("deepspeed", 2, "deepspeed.micro_batch=8", "deepspeed.micro_batch may be 1, 2 or 4"),
    ("megatron", 3, "megatron.tp=3 train.global_batch=6 model.ffn=240", "megatron.tp=3 does not divide model.heads=4"),
    ("megatron", 2, "megatron.tp=2 model.ffn=255", "megatron.tp=2 does not divide model.ffn=255"),
    ("deepspeed", 1, "deepspeed.offload=true deepspeed.zero_stage=0", "deepspeed.offload=optimizer needs deepspeed.zero_stage"),
    ("deepspeed", 1, "deepspeed.offload=all deepspeed.zero_stage=2", "deepspeed.offload=all needs deepspeed.zero_stage=3"),
    ("baseline", 1, "baseline.shard=full optim.optimizer=lamb", "lamb with baseline.shard=full: it scales each parameter's"),
    ("baseline", 1, "baseline.shard=half", "should be 'none' or 'full'"),
    ("deepspeed", 1, "deepspeed.compile=true deepspeed.zero_stage=3", "deepspeed.compile=true needs deepspeed.tp=1"),
    ("deepspeed", 2, "deepspeed.hpz=2", "deepspeed.hpz=2: needs deepspeed.zero_stage=3, offload=none, tp=1, sp=1"),
    ("deepspeed", 4, "deepspeed.hpz=2 deepspeed.zero_stage=3 deepspeed.tp=2", "deepspeed.hpz=2: needs deepspeed.zero_stage=3"),
    ("deepspeed", 4, "deepspeed.hpz=3 deepspeed.zero_stage=3", "4 processes are not a multiple of deepspeed.hpz=3; change"),
    ("deepspeed", 2, "deepspeed.quantized_gradients=true", "deepspeed.quantized_gradients=true: needs deepspeed.zero_stage=3"),
    ("deepspeed", 1, "deepspeed.nvme=/tmp", 'deepspeed.nvme="/tmp": needs deepspeed.zero_stage=3, offload=optimizer or all'),
    ("deepspeed", 2, "deepspeed.pp=2 deepspeed.zero_stage=0", "counts a tied embedding twice in the norm that it clips"),
    ("deepspeed", 2, "deepspeed.pp=2 deepspeed.zero_stage=2", "deepspeed.zero_stage=2: a pipeline adds up the gradients"),
    ("deepspeed", 2, "deepspeed.pp=2 deepspeed.zero_stage=3", "DeepSpeed refuses to divide them; use deepspeed.zero_stage=1"),
    ("deepspeed", 4, "deepspeed.pp=2 deepspeed.tp=2 model.arch=llama", "deepspeed.pp=2 with deepspeed.tp=2: AutoTP does not"),
    ("deepspeed", 2, "deepspeed.pp=2 deepspeed.offload=true", "deepspeed.pp=2 with deepspeed.offload=optimizer: is not tested"),
    ("deepspeed", 2, "deepspeed.pp=2 deepspeed.compile=true", "deepspeed.pp=2 with deepspeed.compile=true: is not tested toge"),
    ("deepspeed", 2, "deepspeed.pp=2 deepspeed.partition=[1,2,1]", "partition=[1, 2, 1]: give the layers of each of the"),
    ("deepspeed", 2, "deepspeed.pp=2 deepspeed.partition=[2,3]", "deepspeed.pp=2 stages, which together are model.layers=4"),
    ("deepspeed", 2, "deepspeed.pp=2 deepspeed.partition=[4,0]", "deepspeed.partition=[4, 0]: must be parameters, uniform, or"),
    ("deepspeed", 1, "deepspeed.partition=uniform", 'deepspeed.partition="uniform": is read only with deepspeed.pp above 1'),
    ("deepspeed", 8, "deepspeed.pp=8", "deepspeed.pp=8 is above model.layers=4: a stage would have no layer; give 4 or less"),
    ("deepspeed", 1, "deepspeed.pp=2", "deepspeed.pp=2 needs 2 processes and there are 1; set NPROC=2"),
    (
        "deepspeed", 2, "deepspeed.pp=2 deepspeed.extra.zero_optimization.overlap_comm=true",
        "overlap_comm: is read only with deepspeed.zero_stage=1, 2 or 3 and deepspeed.pp=1; leave it out",
    ),
    ("deepspeed", 1, "deepspeed.compile=true deepspeed.sp=2", "deepspeed.sp=2 needs deepspeed.zero_stage=1 to 3, deepsp"),
    ("deepspeed", 4, "deepspeed.tp=2 deepspeed.sp=2", "deepspeed.sp=2 needs deepspeed.zero_stage=1 to 3, deepspeed.tp=1, pp=1"),
    ("deepspeed", 2, "deepspeed.sp=2 deepspeed.zero_stage=0", "deepspeed.sp=2 needs deepspeed.zero_stage=1 to 3, deep"),
    ("deepspeed", 8, "deepspeed.sp=8", "deepspeed.sp=8 does not divide model.heads=4, model.kv_heads=4 and data.seq_len="),
    ("deepspeed", 2, "deepspeed.sp=2 data.seq_len=31", "does not divide model.heads=4, model.kv_heads=4 and data.seq_len=31"),
    ("deepspeed", 2, "deepspeed.sp=4", "deepspeed.sp=4 needs 4 processes and there are 2; set NPROC=4"),
    ("megatron", 1, "megatron.tp=2", "megatron.tp=2 needs 2 processes and there are 1; set NPROC=2"),
    ("megatron", 2, "megatron.tp=2 megatron.pp=2", "needs 4 processes and there are 2; set NPROC=4"),
    ("megatron", 3, "megatron.tp=2 train.global_batch=6", "3 processes are not a multiple of megatron.tp=2"),
    ("megatron", 3, "megatron.pp=3 train.global_batch=6", "megatron.pp=3 does not divide model.layers=4; give megatron.pip"),
    ("megatron", 3, "megatron.pp=3 train.global_batch=6", "embedding_and_loss or 'pipeline_layout=Et*1|t*2|t*1L'"),
    ("megatron", 1, "megatron.pipeline_layout=Et*4L", "megatron.pipeline_layout=Et*4L: is read only with megatron.pp above 1"),
    ("megatron", 2, "megatron.pp=2 megatron.pipeline_layout=Et|t|ttL", "Et|t|ttL has 3 stages, divided by |, and meg"),
    ("megatron", 2, "megatron.pp=2 megatron.pipeline_layout=Et|t*4L", "Et|t*4L has 5 layers (t), and model.layers=4"),
    ("megatron", 2, "megatron.pp=2 megatron.pipeline_layout=t*2E|t*2L", "the first stage must begin with E, the embedding"),
    ("megatron", 2, "megatron.pp=2 megatron.pipeline_layout=Et|m|L", "'m' has no meaning there; it is even, embedding_and"),
    (
        "megatron", 2, "megatron.pp=2 megatron.vpp=2 megatron.pipeline_layout=Et||ttt|L",
        "Et||ttt|L: a stage between the first and the last one has no layer (t)",
    ),
    (
        "megatron", 2, "megatron.pp=2 megatron.vpp=2 megatron.pipeline_layout=embedding_and_loss",
        "megatron.pp=2 x megatron.vpp=2 does not divide model.layers=4 + 2, where embedding and loss count as a layer each",
    ),
    ("megatron", 2, "megatron.pp=2 megatron.pipeline_layout=E(t*9999)*9999|L", "is longer than 20,000 layers and stages"),
    ("megatron", 2, "megatron.pp=2 megatron.vpp=4", "megatron.pp=2 x megatron.vpp=4 does not divide model.layers=4"),
    ("megatron", 1, "megatron.vpp=2", "megatron.vpp=2 with megatron.pp=1: it divides the layers of a pipeline stage into"),
    (
        "megatron", 2, "megatron.pp=2 megatron.vpp=2 megatron.micro_batch=8",
        "megatron.vpp=2 passes micro batches on in groups of megatron.pp=2, and a step has 1 per replica; change train.global",
    ),
    (
        "megatron", 2, "megatron.pp=2 megatron.vpp=2 megatron.extra.batch_p2p_comm=true",
        "megatron.extra.batch_p2p_comm: is read only with megatron.pp above 1 and megatron.vpp=1; leave it out",
    ),
    ("megatron", 2, "megatron.tp=2 megatron.sequence_parallel=true data.seq_len=31", "does not divide data.seq_len=31"),
    ("megatron", 2, "megatron.cp=2 data.seq_len=30", "megatron.cp=2 needs a multiple of 4 and data.seq_len=30; give 28 or 32"),
    ("megatron", 1, "megatron.cp=2", "megatron.cp=2 needs 2 processes and there are 1; set NPROC=2"),
    (
        "megatron", 6,
        "megatron.cp=2 megatron.tp=3 megatron.sequence_parallel=true train.global_batch=6 model.heads=3 model.hidden=48 "
        "model.ffn=192",
        "megatron.cp=2 and megatron.tp=3 with sequence_parallel needs a multiple of 12 and data.seq_len=32; give 24 or 36",
    ),
    ("megatron", 1, "optim.optimizer=lamb", "optim.optimizer=lamb on megatron: it scales each parameter's update by the norms"),
    ("deepspeed", 1, "optim.optimizer=lamb", "lamb with deepspeed.zero_stage=1: it scales each parameter's update by the"),
    (
        "deepspeed", 2, "optim.optimizer=lamb deepspeed.zero_stage=0 deepspeed.tp=2 model.arch=llama",
        "lamb with deepspeed.tp=2: it scales each parameter's update by the norms of",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("stack", "nproc", "overrides", "message"), LAYOUTS, ids=[f"{r[0]} {r[1]} {r[2]}" for r in LAYOUTS])
def test_layouts(stack: str, nproc: int, overrides: str, message: str, place: Path, attempt: Try) -> None:
    refused(place, lambda: attempt(*overrides.split(), stack=stack, nproc=nproc), message)


def test_bf16_where_it_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from common.launch.processes import check_dtype

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    check_dtype("fp32", torch.device("cuda", 0))
    check_dtype("bf16", torch.device("cpu"))
    with pytest.raises(BadInput, match="train.dtype=bf16: Tesla T4 has no bf16 arithmetic; use train.dtype=fp32"):
        check_dtype("bf16", torch.device("cuda", 0))


# ---- corpora


def _cut(path: str) -> Callable[[Path], None]:
    return lambda place: os.truncate(place / path, (place / path).stat().st_size - 8)


def _swap(place: Path) -> None:
    """Two corpora of one size, one's ids under the other's index."""
    (place / "corpus/valid.bin").replace(place / "corpus/train.bin")


def _swap_halves(place: Path) -> None:
    (place / "corpus/train.bin").rename(place / "corpus/x")
    (place / "corpus/train.idx").rename(place / "corpus/train.bin")
    (place / "corpus/x").rename(place / "corpus/train.idx")


def _without_manifest(**how: Any) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        corpus(place / "corpus/train", manifest=False, **how)

    return make


def _damaged_tokenizer(place: Path) -> None:
    (place / "words").mkdir()
    (place / "words/tokenizer.json").write_text("{")


def _replaced_tokenizer(place: Path) -> None:
    from common.data import tokenizer_training

    corpus(place / "corpus/train", tokenizer="tokenizer")
    tokenizer_training.train_char("abc").save(place / "corpus/tokenizer")


def _of_megatrons_tool(place: Path) -> None:
    """Corpora without a manifest, whose documents do not end as the tokenizer in `words` has it."""
    from common.data import tokenizer_training

    tokenizer_training.train_bpe(["a b c"], 300).save(place / "words")
    for name in ("train", "valid"):
        corpus(place / "corpus" / name, manifest=False)


CORPORA: list[tuple[str, Callable[[Path], Any], str, list[str]]] = [  # name, what is done, overrides, messages
    ("missing", lambda p: None, "data.train=nothing", ["no corpus at "]),
    ("missing .bin", lambda p: (p / "corpus/train.bin").unlink(), "", ["train.bin is missing although its other half exists"]),
    ("missing .idx", lambda p: (p / "corpus/train.idx").unlink(), "", ["train.idx is missing although its other half exists"]),
    ("truncated .bin", _cut("corpus/train.bin"), "", ["train.bin has 7,992 bytes"]),
    ("truncated .idx", _cut("corpus/valid.idx"), "", ["valid.idx: "]),
    ("truncated manifest", _cut("corpus/train.json"), "", ["train.json: not a manifest"]),
    ("swapped corpora", _swap, "data.valid=corpus/train", ["train.bin is not the file"]),
    ("swapped .bin and .idx", _swap_halves, "", ["train.idx: not the index of a corpus"]),
    ("folder", lambda p: None, "data.train=corpus", ["corpus is a folder of corpora; give one of them, such as "]),
    ("shorter than a sample", lambda p: None, "data.seq_len=4000", ["train: 4,000 tokens", "valid: 4,000 tokens"]),
    ("empty", lambda p: corpus(p / "corpus/train", tokens=0), "", ["corpus/train: 0 tokens, less than one sample"]),
    (
        "id beyond the vocabulary", lambda p: None, "model.vocab_size=100",
        ["data.train: corpus/train holds token id 127 and model.vocab_size=100", "data.valid: corpus/valid holds token id 127",
         "model.vocab_size=100 is below the tokenizer's 128 ids"],
    ),
    ("such an id, no manifest", _without_manifest(vocab=200), "", ["data.train: corpus/train holds token id 199 and model"]),
    ("vocabulary unknown", _without_manifest(), "model.vocab_size=null", ["model.vocab_size: is missing, and no tokenizer"]),
    (
        "tokenizers differ", lambda p: corpus(p / "corpus/valid", tokenizer_hash="b" * 64), "",
        ["the tokenizers differ (corpus/train has aaaaaaaaaaaa, corpus/valid has bbbbbbbbbbbb); tokenize the corpora with one"],
    ),
    (
        "tokenizers in a blend differ", lambda p: corpus(p / "corpus/valid", tokenizer_hash="b" * 64),
        "data.train=[corpus/train,corpus/valid]", ["were made with different tokenizers"],
    ),
    ("no tokenizer", lambda p: None, "data.tokenizer=./none", ["tokenizer ./none: no such folder"]),
    ("damaged tokenizer", _damaged_tokenizer, "data.tokenizer=words", ["words/tokenizer.json: cannot be read"]),
    ("no end of document", lambda p: None, "data.reset_attention=true", ["train names no end of document id", "valid names"]),
    ("keys", _cut("corpus/train.bin"), "data.valid=nothing", ["data.train: corpus/train.bin has", "data.valid: no corpus"]),
    ("one corpus twice", _cut("corpus/train.bin"), "data.valid=corpus/train", ["data.train: corpus/train.bin has 7,992 bytes"]),
    ("a name too long", lambda p: None, f"data.train=corpus/{'n' * 300}", [f"data.train: corpus/{'n' * 53}...: a name in it"]),
    ("a path too long", lambda p: None, f"data.train={'n/' * 3000}", ["n/n/...: has 6,000 bytes; at most 4,000"]),
    ("a long name elsewhere", lambda p: None, f"data.tokenizer={'n' * 300}", ["nnn...: a name in it has 300 bytes; at most"]),
    ("replaced tokenizer", _replaced_tokenizer, "", ["data.train: corpus/train was made with tokenizer aaaaaaaaaaaa, its"]),
    ("no end of document, no manifest", _of_megatrons_tool, "data.eod_mask_loss=true", [
        "data.train: corpus/train names no end of document", "data.valid: corpus/valid names no",
    ]),
    ("documents of another end", _of_megatrons_tool, "data.eod_mask_loss=true data.tokenizer=words model.vocab_size=384", [
        "data.train: corpus/train: document 0 ends in id", "data.valid: corpus/valid: document 0 ends in id",
    ]),
    ("two at once", _cut("corpus/train.bin"), "data.valid=nothing", ["train.bin has 7,992 bytes", "no corpus at "]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "overrides", "messages"), [row[1:] for row in CORPORA], ids=[row[0] for row in CORPORA])
def test_corpora(damage: Callable[[Path], Any], overrides: str, messages: list[str], place: Path, attempt: Try) -> None:
    damage(place)
    refused(place, lambda: attempt(*overrides.split()), *messages)


# ---- init.from

HF = {"model_type": "gpt2", "n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 32, "vocab_size": 128}


class _Bomb:
    """A pickle that leaves a file behind when it is read."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def _safetensors(path: Path, cut: int = 0) -> None:
    head = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes((struct.pack("<Q", len(head)) + head + bytes(16))[: -cut or None])


def _hf(config: dict[str, Any] | str = HF, **files: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A Hugging Face folder hf/ with this config.json and these files, `__` for a dot."""

    def make(place: Path) -> None:
        (place / "hf").mkdir()
        (place / "hf/config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        for name, write in files.items():
            write(place / "hf" / name.replace("__", "."))

    return make


INDEX = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}})
FOLDERS: list[tuple[str, Callable[[Path], Any], list[str]]] = [
    ("missing", lambda p: None, ["init.from=hf: no config.json there; give `scratch` or a Hugging Face folder"]),
    ("config cut", _hf("{"), ["init.from=hf: its config.json cannot be read"]),
    ("another architecture", _hf({"model_type": "bert"}), ["is a 'bert' model, the config's model.arch is 'gpt2'"]),
    (
        "another size", _hf(HF | {"n_layer": 12, "n_embd": 768}, model__safetensors=_safetensors),
        [f"init.from=hf: its config.json has {key}, the model gives {value}"
         for key, value in (("n_layer=12", 4), ("n_embd=768", 64), ("n_inner=3072", 256))],
    ),
    ("no weights", _hf(), ["init.from=hf: no *.safetensors there; a Hugging Face folder with weights is needed"]),
    (
        "pickled weights", _hf(pytorch_model__bin=lambda path: path.write_bytes(pickle.dumps(_Bomb()))),
        ["init.from=hf: holds pickled weights (.bin) only, which are not read; save it as safetensors"],
    ),
    ("weights cut", _hf(model__safetensors=lambda path: _safetensors(path, 3)), ["model.safetensors has 83 of 86 bytes"]),
    ("no weights file", _hf(model__safetensors=lambda path: path.write_bytes(b"x" * 99)), ["is not a safetensors file"]),
    ("no weights file 2", _hf(model__safetensors=lambda p: p.write_bytes(b"\xff" * 99)), ["is not a safetensors file"]),
    ("empty weights", _hf(model__safetensors=Path.touch), ["model.safetensors is not a safetensors file; get it again"]),
    (
        "shard missing",
        _hf(**{"model.safetensors.index.json": lambda p: p.write_text(INDEX), "model-1-of-2.safetensors": _safetensors}),
        ["init.from=hf: model-2-of-2.safetensors is missing"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "messages"), [row[1:] for row in FOLDERS], ids=[row[0] for row in FOLDERS])
def test_folders_to_begin_from(make: Callable[[Path], Any], messages: list[str], place: Path, attempt: Try) -> None:
    make(place)
    refused(place, lambda: attempt("init.from=hf"), *messages)
    assert not (place / "exploded").exists()


# ---- OUT


def _out_of(place: Path, name: str) -> Path:
    """A bad OUT of that name."""
    (place / "file").touch()
    (place / "full").mkdir()
    (place / "full/thesis.txt").write_text("do not touch")
    (place / "broken").symlink_to("nowhere/at/all")
    (place / "loop").symlink_to("loop")
    return place / name if not name.startswith("/") else Path(name)


OUTS: list[tuple[str, str]] = [
    ("file", "file: is a file; choose another OUT"),
    ("file/out", "file/out: not writable (Not a directory); choose another OUT"),
    ("full", "full: is not empty and has no run (no config.yaml); choose another OUT"),
    ("corpus", "corpus: is not empty and has no run"),
    ("broken", "broken: is a broken link; choose another OUT"),
    ("loop", "loop: is a broken link"),
    ("x" * 300, "not writable (File name too long)"),
    ("/proc/out", "/proc/out: not writable ("),
    ("/dev/null", "/dev/null: is a file"),
]


@pytest.mark.parametrize(("name", "message"), OUTS, ids=[row[0][:20] for row in OUTS])
def test_bad_outs(name: str, message: str, place: Path, attempt: Try) -> None:
    if name.startswith("/proc") and sys.platform != "linux":
        pytest.skip("needs /proc: a folder in which nobody can write, root neither")
    out = _out_of(place, name)
    refused(place, lambda: attempt(out=out), message)


def test_an_empty_out_is_refused(place: Path, attempt: Try) -> None:
    refused(place, lambda: attempt(out=""), "OUT is empty")


def _mounted(folder: Path, options: str) -> Iterator[Path]:
    if sys.platform != "linux" or os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs root on Linux")
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A disk of 1 MB: more than a log, less than a checkpoint of tiny.yaml (12 bytes x 210,304 parameters)."""
    yield from _mounted(place / "disk", "size=1m")


def test_a_read_only_out_is_refused(place: Path, attempt: Try) -> None:
    for disk in _mounted(place / "disk", "size=1m"):
        finished_run(disk / "run", (2,))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused(place, lambda: attempt(out="disk/new"), "disk/new: not writable (Read-only file system)")
        refused(place, lambda: attempt(out="disk/run"), "disk/run: not writable (Read-only file system)")


def test_what_lies_in_the_place_of_the_export_is_not_replaced(place: Path, attempt: Try) -> None:
    finished_run(place / "out", (2,))
    message = "out/hf: must be the export that the run writes; move it away, or choose another OUT"
    (place / "out/hf").mkdir(parents=True)
    (place / "out/hf/mine.txt").write_text("mine")
    refused(place, attempt, message)
    shutil.rmtree(place / "out/hf")
    (place / "out/hf").write_text("mine")
    refused(place, attempt, message)
    (place / "out/hf").unlink()
    (place / "elsewhere").mkdir()
    (place / "out/hf").symlink_to(place / "elsewhere")
    refused(place, attempt, message)


def test_a_disk_that_is_full_already_is_refused(place: Path, attempt: Try, small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "all").write_bytes(bytes(2**21))
    refused(place, lambda: attempt(out="disk/new"), "disk/new: not writable (No space left on device)")


@pytest.mark.parametrize("name", ['a b/c\'d "e"', "ünï/çödé", "link", "corpus/out", "$HOME/*", "new\nline"])
def test_unusual_outs_are_fine(name: str, place: Path, attempt: Try) -> None:
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    (place / "c ü.yaml").write_text(TEXT)
    before = snapshot(place)
    assert attempt(config="c ü.yaml", out=name) == (0, [], True)
    assert snapshot(place) == before  # OUT is made by the ranks


def test_the_script_from_any_folder_with_any_names(place: Path) -> None:
    """The whole way once: bash, exit code, stderr; relative names count from where one stands."""
    there = place / "a b/ünï"
    there.mkdir(parents=True)
    (there / "c'onfig.yaml").write_text(TEXT.replace("corpus/", "../../corpus/"))
    command = ["bash", str(launch_script("baseline")), "c'onfig.yaml", "o ut"]
    env = os.environ | {"NPROC": "1"}
    done = subprocess.run([*command, "--dry-run"], cwd=there, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "parameters        210,304" in done.stdout
    before = snapshot(place)
    done = subprocess.run([*command, "trian.steps=3", "optim.min_lr=1"], cwd=there, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"(error: c'onfig\.yaml: .+\n){2}", done.stderr)
    assert snapshot(place) == before


# ---- OUT that holds a run


def finished_run(out: Path, steps: Sequence[int] = (2, 4), *overrides: str) -> None:
    """What a run leaves, without training: config, run.json, checkpoints of two made-up parameters, a log."""
    run = preflight.prepare("tiny.yaml", str(out), overrides, "baseline", task, 1)
    run_record.begin(run)
    lock.release()
    for step in steps:
        folder = out / f"step_{step}"
        folder.mkdir()
        files = {}
        for name in ("wte.weight", "ln_f.bias"):
            content = f"{name} {step}".encode() * 20
            (folder / f"{name}.safetensors").write_bytes(content)
            files[name] = {"bytes": len(content), "crc32": zlib.crc32(content), "shape": [4]}
        (folder / "state.json").write_text(json.dumps(state.meta(run, step) | {"files": files}))
    (out / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, max(steps) + 1)))


ANOTHER_RUN: list[tuple[str, list[str]]] = [  # overrides, the keys that are named
    ("optim.lr=2e-3", ["optim.lr was 0.001, is 0.002; choose another OUT, or optim.lr=0.001"]),
    ("train.seed=5", ["train.seed was 1234, is 5"]),
    ("train.global_batch=16", ["train.global_batch was 8, is 16"]),
    ("train.dtype=bf16", ['train.dtype was "fp32", is "bf16"']),
    ("model.hidden=128", ["model.hidden was 64, is 128", "model.ffn was 256, is 512"]),  # a model of another size
    ("model.vocab_size=256", ["model.vocab_size was 128, is 256"]),
    ("data.seq_len=16", ["data.seq_len was 32, is 16", "model.positions was 32, is 16"]),
    ("data.pack=false", ["data.pack was true, is false"]),
    ("optim.decay_steps=9", ["optim.decay_steps was 4, is 9"]),
    ("optim.betas=[0.8,0.9]", ["optim.betas was [0.9, 0.999], is [0.8, 0.9]"]),
    ("optim.lr=2e-3 model.dropout=0.1 train.seed=5", ["optim.lr was", "model.dropout was 0.0, is 0.1", "train.seed was"]),
    ("data.train=corpus/valid", ["out has another run: the content of data.train has changed"]),
    ("data.train=[corpus/train,corpus/valid]", ["the content of data.train has changed"]),
    ("train.steps=3", ["train.steps=3 is below the 4 steps that out has made; give train.steps=4 or more"]),
]


@pytest.mark.parametrize(("overrides", "messages"), ANOTHER_RUN, ids=[row[0] for row in ANOTHER_RUN])
def test_out_that_holds_another_run(overrides: str, messages: list[str], place: Path, attempt: Try) -> None:
    finished_run(place / "out")
    lines = refused(place, lambda: attempt(*overrides.split()), *messages)
    assert all("has another run: " in line or "train.steps=3" in line for line in lines)


LONGER = (
    "note: optim.decay_steps stays 4, the steps of the first start: after that the rate is optim.min_lr; a longer schedule "
    "needs another OUT"
)
FREE: list[tuple[str, str]] = [  # stack, overrides
    ("baseline", ""),
    ("baseline", "train.steps=9"),
    ("baseline", "train.eval_every=1 train.save_every=3 train.keep=7 train.eval_samples=5 train.hang_seconds=0"),
    ("baseline", "expect.val_loss={value: 1.0, tolerance: 0.1, source: me}"),
    ("baseline", "baseline.micro_batch=4 baseline.recompute=true"),
    ("baseline", "data.train=moved/train data.valid=moved/valid.bin"),
    ("baseline", "data.valid=null"),
    ("deepspeed", "deepspeed.zero_stage=3 deepspeed.micro_batch=1"),
    ("megatron", "megatron.distributed_optimizer=true train.steps=40"),
]


@pytest.mark.parametrize(("stack", "overrides"), FREE)
def test_what_a_continued_run_may_change(stack: str, overrides: str, place: Path, attempt: Try) -> None:
    finished_run(place / "out")
    shutil.copytree(place / "corpus", place / "moved")
    words = [overrides] if "{" in overrides else overrides.split()
    notes = [LONGER] if "train.steps" in overrides else []
    assert attempt(*words, stack=stack) == (0, notes, True)
    run = preflight.prepare("tiny.yaml", "out", words, stack, task, 1)
    assert run.resume.step == 4
    assert run.cfg.optim.decay_steps == 4  # of the first start: raising steps does not bend the schedule


def test_a_continued_run_with_fewer_steps_says_where_its_rate_ends(place: Path, attempt: Try) -> None:
    finished_run(place / "out", (2,), "train.steps=2000")
    note = (
        "note: optim.decay_steps stays 2000, the steps of the first start: the rate ends at 0.000621, above "
        "optim.min_lr=0.0001; a schedule of 900 steps needs another OUT"
    )
    assert attempt("train.steps=900") == (0, [note], True)
    run = preflight.prepare("tiny.yaml", "out", ["train.steps=900"], "baseline", task, 1)
    done = (900 - 2) / (2000 - 2)
    assert optim.lr_at(900, run.cfg.optim) == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi * done)) / 2)
    assert attempt("train.steps=900", out="another") == (0, [], True)
    run = preflight.prepare("tiny.yaml", "another", ["train.steps=900"], "baseline", task, 1)
    assert optim.lr_at(900, run.cfg.optim) == pytest.approx(run.cfg.optim.min_lr)


def test_overrides_of_a_stack_that_is_not_started_are_noted(place: Path, attempt: Try) -> None:
    lines = [
        "note: deepspeed.zero_stage=3 has no effect on megatron; start recipes/gpt/deepspeed/pretrain.sh",
        "note: baseline.shard=full has no effect on megatron; start recipes/gpt/baseline/pretrain.sh",
    ]
    words = ["deepspeed.zero_stage=3", "train.keep=3", "megatron.tp=1", "baseline.shard=full"]
    assert attempt(*words, stack="megatron") == (0, lines, True)


def test_a_validation_set_smaller_than_what_is_asked_for_is_noted(place: Path, attempt: Try) -> None:
    """4,000 ids are 124 samples of 32 tokens, each with one more for its last target."""
    note = "note: data.valid has 124 samples, fewer than train.eval_samples=125: all are used"
    assert attempt("train.eval_samples=125") == (0, [note], True)
    assert attempt("train.eval_samples=124") == (0, [], True)


def test_a_corpus_moved_without_its_tokenizer_trains(place: Path, attempt: Try) -> None:
    corpus(place / "corpus/train", tokenizer="words")
    code, lines, started = attempt()
    assert (code, started) == (0, True)
    assert lines == ["note: corpus/words, the corpus's tokenizer, does not exist: the export will have none"]


def test_a_trial_shorter_than_its_warmup_leaves_a_config_that_is_valid(place: Path) -> None:
    finished_run(place / "out", (4,), "optim.warmup_steps=50")
    from common import config

    assert config.load("out/config.yaml", [], task.Config).optim.decay_steps == 50


def _spoil(path: str, content: bytes) -> Callable[[Path], Any]:
    return lambda place: (place / "out" / path).write_bytes(content)


def _edit_state(number: int, /, **values: Any) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        path = place / f"out/step_{number}/state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


RECORDS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("config cut", _spoil("config.yaml", b"model: {"), "out/config.yaml: not YAML"),
    ("config empty", _spoil("config.yaml", b""), "out/config.yaml: must have sections"),
    ("config of something else", _spoil("config.yaml", b"model: 3\nx: 1\n"), "is the config of another family or version"),
    ("run.json cut", _spoil("run.json", b'{"data"'), "out/run.json: cannot be read"),
    ("run.json of something else", _spoil("run.json", b"[]"), "out/run.json: cannot be read"),
    (
        "checkpoint of another model", _edit_state(4, hyperparameters={"model.hidden": 128}),
        "out/step_4 has another run: model.hidden was 128, is 64",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in RECORDS], ids=[row[0] for row in RECORDS])
def test_records_of_a_run_that_are_damaged(damage: Callable[[Path], Any], message: str, place: Path, attempt: Try) -> None:
    finished_run(place / "out")
    damage(place)
    before = snapshot(place)
    code, lines, started = attempt()
    assert code == 2 and not started and message in "\n".join(lines) and snapshot(place) == before


SHARD = "wte.weight.safetensors"
SHARDS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing", lambda place: (place / "out/step_4" / SHARD).unlink(), f"step_4/{SHARD} is missing"),
    ("truncated", lambda place: os.truncate(place / "out/step_4" / SHARD, 9), f"step_4/{SHARD} has 9 of 240 bytes"),
    ("empty", lambda place: os.truncate(place / "out/step_4" / SHARD, 0), f"step_4/{SHARD} has 0 of 240 bytes"),
    ("no state", lambda place: (place / "out/step_4/state.json").unlink(), "step_4/state.json is missing"),
    ("state cut", _spoil("step_4/state.json", b'{"step": 4,'), "step_4/state.json is not readable"),
    ("state of something else", _spoil("step_4/state.json", b'{"files": [1]}'), "step_4/state.json is not readable"),
    ("state is binary", _spoil("step_4/state.json", b"\xff\xfe\0"), "step_4/state.json is not readable"),
    ("state of another step", _edit_state(4, step=3), "step_4/state.json is of step 3"),
]


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in SHARDS], ids=[row[0] for row in SHARDS])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: Callable[[Path], Any], message: str, place: Path, attempt: Try
) -> None:
    finished_run(place / "out")
    damage(place)
    code, lines, started = attempt()
    assert (code, started) == (0, True)
    assert lines == [f"note: out/{message}; continuing from out/step_2"]
    shutil.rmtree(place / "out/step_2")
    refused(place, attempt, f"out/{message}", "out: no whole checkpoint is left; restore one, or choose another OUT")


def test_a_changed_byte_of_a_checkpoint_is_found(place: Path) -> None:
    """Where it is read: the launcher does not read gigabytes."""
    finished_run(place / "out")
    path = place / "out/step_4" / SHARD
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    saved = checkpoint.latest(place / "out")
    with pytest.raises(BadInput, match=f"{SHARD}: its bytes have changed since it was written; remove .*step_4 to use"):
        saved.read("wte.weight")
    with pytest.raises(BadInput, match="holds no parameter lm_head.weight; it is a checkpoint of another model"):
        saved.read("lm_head.weight")


def test_only_whole_steps_count_as_kept(place: Path) -> None:
    """A damaged newest step must not push the good ones out."""
    finished_run(place / "out", (2, 3, 9))
    (place / "out/step_2.tmp").mkdir()
    checkpoint._remove_old(place / "out", 3, keep=1)
    assert [path.name for path in sorted((place / "out").glob("step_*"))] == ["step_3"]


# ---- OUT in use, and OUT that is finished


def test_an_out_in_use_is_refused(place: Path, attempt: Try) -> None:
    finished_run(place / "out")
    hold = (
        "import sys; from pathlib import Path; from common.launch import lock; "
        "lock.hold(Path('out')); print(1, flush=True); input()"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", hold], env=env, stdin=-1, stdout=-1, text=True) as holder:
        holder.stdout.readline()
        message = f"out: another run writes there (process {holder.pid} on "
        refused(place, attempt, message)
        run = preflight.prepare("tiny.yaml", "out", [], "baseline", task, 1)
        with pytest.raises(BadInput, match=re.escape(message)):  # a rank without a launcher
            run_record.begin(run)
        code, _, started = attempt("--dry-run")
        assert (code, started) == (0, False)
        holder.kill()
    assert attempt() == (0, [], True)


def test_what_a_killed_run_left_half_written_is_removed(place: Path) -> None:
    finished_run(place / "out")
    before = snapshot(place)
    for name in ("step_6.tmp", "step_4.old.tmp", "hf.tmp", "hf.old.tmp", "tokenizer.tmp", "adapter.tmp"):
        (place / "out" / name / "x").mkdir(parents=True)
    for name in ("run.json.part", "config.yaml.tmp", "metrics.jsonl.part"):
        (place / "out" / name).write_text("{")
    (place / "out/other.tmp").write_text("do not touch")
    run_record.begin(preflight.prepare("tiny.yaml", "out", [], "baseline", task, 1))
    record = json.loads((place / "out/run.json").read_text())
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", record["date"]) and re.search(r"cores of \S| x \S", record["hardware"])
    lock.release()
    assert snapshot(place) == before | {"out/other.tmp": b"do not touch"}


def test_a_finished_run_says_so(place: Path, attempt: Try, capsys: pytest.CaptureFixture[str]) -> None:
    """Once its launcher has recorded the end, and as long as the config and what the end wrote are the same."""
    assert attempt() == (0, [], True)
    finished_run(place / "out")
    files = [place / "out" / name for name in ("hf/config.json", "eval.json", "predictions/dev.txt")]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    written = {"config.json": integrity.checksum(files[0])}
    (place / "out/hf/twinstack.json").write_text(json.dumps(integrity.seal({"step": 4, "files": written})))
    assert attempt() == (0, [], True)  # a run of an older version, whose end is recorded now
    before = snapshot(place)
    assert attempt() == (0, [], False) and snapshot(place) == before
    run = preflight.prepare("tiny.yaml", "out", [], "baseline", task, 1)
    assert run_record.finished(run) == "complete: out is at its last step, 4; its export is out/hf"
    assert attempt("baseline.micro_batch=4", "train.keep=5") == (0, [], False)  # nothing is trained: the record stays
    assert snapshot(place) == before
    assert attempt("train.steps=9") == (0, [LONGER], True)
    for path in files:
        path.unlink()
        assert attempt() == (0, [], True)
        path.write_text("{}")
        assert attempt() == (0, [], False)
    shutil.rmtree(place / "out/step_4")
    assert attempt() == (0, [], True)


WRONG: list[Any] = [
    None,
    True,
    3,
    "x",
    [],
    [3],
    {},
    {"step": 4},
    {"step": 4, "files": 3},
    {"step": 4, "files": [3, "\0"]},
    1e999,
]


@pytest.mark.parametrize("value", WRONG, ids=map(str, range(len(WRONG))))
def test_records_of_wrong_types(value: Any, place: Path, attempt: Try) -> None:
    """Each value of run.json in turn: refused in one line, or as if it were not there."""
    finished_run(place / "out")
    path = place / "out/run.json"
    record = json.loads(path.read_text())
    for key in ("data", "stacks", "finished"):
        path.write_text(json.dumps(record | {key: value}))
        code, lines, started = attempt()
        assert (code, lines, started) == (0, [], True) or code == 2 and len(lines) == 1 and not started, (key, lines)
        path.write_text(json.dumps(record | {key: value}))
        if code == 0:
            run_record.begin(preflight.prepare("tiny.yaml", "out", [], "baseline", task, 1))
            lock.release()


# ---- with ranks


def checkpoint_of(out: Path, spoil: Callable[[str, Any], Any] = lambda name, weight: weight) -> None:
    """A run of tiny.yaml stopped after step 2, without training. spoil(name, weight) is what it saved."""
    import torch

    finished_run(out, (2,))
    run = preflight.prepare("tiny.yaml", str(out), [], "baseline", task, 1)
    shutil.rmtree(out / "step_2")
    generator, parameters = torch.Generator().manual_seed(0), {}
    for name, shape in task.parameter_shapes(run.cfg.model).items():
        weight = spoil(name, torch.randn(*shape, generator=generator) * 0.02)
        parameters[name] = {"weight": weight, "exp_avg": torch.zeros(*weight.shape), "exp_avg_sq": torch.zeros(*weight.shape)}
    states.write_step(out / "step_2", state.meta(run, 2), parameters)


def _overflowing(name: str, weight: Any) -> Any:
    """Finite, but what is computed with it is not."""
    if name == "transformer.wte.weight":
        weight[7] = 3e38
    return weight


def _not_finite(name: str, weight: Any) -> Any:
    if name == "transformer.wte.weight":
        weight[7, 3] = float("inf")
    return weight


def test_what_only_ranks_can_see(place: Path, drive: Drive) -> None:
    """NaN on each stack, bad checkpoints and folders: the code, the words, and OUT byte for byte as it was."""
    import torch
    from safetensors.torch import save_file

    (place / "tiny.yaml").write_text(TEXT.replace("corpus/", f"{place}/corpus/"))
    cases, messages = [], {}

    def row(name: str, stack: str, expect: int, words: str, *overrides: str) -> Path:
        messages[name] = words
        one = case(stack, "tiny", place / name, overrides, expect) | {"config": str(place / "tiny.yaml")}
        cases.append(one)
        return place / name

    for stack in launcher.STACKS:
        words = r"code 3 .*the loss of step 3 is (nan|inf) \(samples 16 to 23\): stopped before the update, nothing saved"
        checkpoint_of(row(f"nan_{stack}", stack, 3, words, "train.save_every=1"), _overflowing)
        words = r"code 2 .*step_2/00000.safetensors: weight of transformer.wte.weight holds NaN or infinite.*remove .*step_2"
        checkpoint_of(row(f"spoiled_{stack}", stack, 2, words), _not_finite)
    flipped = row("flipped", "baseline", 2, r"code 2 .*00000.safetensors: its bytes have changed since it was written")
    checkpoint_of(flipped)
    path = flipped / "step_2/00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    size = row(
        "size", "megatron", 2, r"code 2 .*transformer.ln_f.bias has shape \(3,\); in task.parameter_shapes it is \(64,\)"
    )
    checkpoint_of(size, lambda name, weight: torch.ones(3) if name.endswith("ln_f.bias") else weight)
    whole = {name: torch.zeros(shape) for name, shape in task.parameter_shapes(task.model_from_hf_config(HF)).items()}
    for name, tensors, words in (
        ("other", {"encoder.weight": torch.zeros(3)}, "code 2 .*holds encoder.weight, which this model does not have"),
        ("shape", whole | {"transformer.wte.weight": torch.zeros(3, 64)}, r"code 2 .*wte.weight is \(3, 64\), its config.json"),
        (
            "nan_folder",
            whole | {"transformer.wte.weight": torch.full((128, 64), float("nan"))},
            "code 2 .*: transformer.wte.weight holds NaN or infinite val",
        ),
    ):
        folder = place / f"hf_{name}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(HF))
        save_file(tensors, str(folder / "model.safetensors"))
        row(name, "deepspeed", 2, words, f"init.from={folder}")

    def unchanged() -> dict[str, Any]:
        """All, but that a run that stops at NaN has begun: config.yaml and run.json tell so."""
        return {k: v for k, v in snapshot(place).items() if not re.match(r"nan_\w+/(config.yaml|run.json)$", k)}

    before = unchanged()
    output = drive(cases, 1)
    assert "00000.safetensors: its bytes have changed" in (flipped / "step_2/damaged.txt").read_text()
    (flipped / "step_2/damaged.txt").unlink()
    for name, words in messages.items():
        if place / name not in LEFT_OUT:
            assert re.search(rf"CASE {place / name} {words}", output), output[-3000:]
    assert unchanged() == before


def pretrain(place: Path, out: Path, *overrides: str, ranks: int = 1) -> tuple[int, list[str]]:
    """One node by the launch script of the first stack: exit code and stderr."""
    script = ROOT / f"recipes/gpt/{families.stacks('gpt')[0]}/pretrain.sh"
    env = os.environ | {"NPROC": str(ranks), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(script), str(place / "tiny.yaml"), str(out), *overrides]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


def test_a_file_that_one_rank_alone_reads_is_reported_once(place: Path) -> None:
    """The ranks divide the pieces that none reads whole; one of them finds what is damaged, and the others end with it."""
    out = place / "out"
    checkpoint_of(out)
    path = out / "step_2/00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    before = snapshot(out)
    code, lines = pretrain(place, out, ranks=2)
    assert code == 2, lines
    assert len(lines) == 1 and re.search(r"step_2/00000\.safetensors: its bytes have changed", lines[0]), lines
    assert lines[0].endswith("; no step before it is left: restore it, or choose another OUT")
    (out / "step_2/damaged.txt").unlink()
    assert snapshot(out) == before


def test_a_loss_that_explodes_exits_3_and_keeps_what_was_saved(place: Path) -> None:
    overrides = ["optim.lr=1e30", "optim.warmup_steps=0", "train.save_every=1"]
    code, lines = pretrain(place, place / "out", *overrides)
    assert code == 3, lines
    assert len(lines) == 1 and re.match(r"error: the loss of step 2 is (nan|inf) \(samples 8 to 15\): stopped", lines[0])
    assert [path.name for path in (place / "out").glob("step_*")] == ["step_1"]
    assert list(losses(place / "out")) == [1]
    assert not (place / "out/hf").exists()


def test_a_disk_that_fills_up_is_told_and_the_steps_before_are_whole(place: Path, small_disk: Path) -> None:
    code, lines = pretrain(place, small_disk / "out")
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert re.match(r"error: .*/out/step_4.tmp/.* cannot be written: No space left on device; the steps saved", lines[0])
    assert not list((small_disk / "out").glob("step_*"))
    assert list(losses(small_disk / "out")) == [1, 2, 3, 4]


ONE_SIDED = """
import sys
import torch
import torch.distributed as dist
from common.launch import processes
from common.errors import BadInput

def main(argv):
    here = processes.start()
    kind = argv[0]
    if here.rank == 1 and kind == "input":
        raise BadInput(["corpus/train.idx is missing", "and so is its other half"])
    if here.rank == 1 and kind == "disk":
        raise OSError(28, "No space left on device", "out/metrics.jsonl")
    if here.rank == 1 and kind == "fault":
        raise RuntimeError("a fault of our own")
    dist.barrier()

processes.run(main)
"""


SEEN_BY_ONE: list[tuple[str, int, list[str]]] = [
    ("input", 2, ["error: corpus/train.idx is missing", "error: and so is its other half"]),
    ("disk", 2, ["error: out/metrics.jsonl: No space left on device; correct that: the checkpoints are whole, and the same"]),
    ("fault", 1, ["\nRuntimeError: a fault of our own", "\nfailed with exit code 1: rank 1: RuntimeError: a fault of our own"]),
]


def test_what_one_rank_alone_sees_is_told_once(place: Path) -> None:
    """Rank 1 of 2, while rank 0 waits for it in a collective. All three launches at once: most of it is importing torch."""
    (place / "one_sided.py").write_text(ONE_SIDED)
    begin = "import sys; from common.launch import launcher; on = launcher.Nodes(2, 1, 0, None, None); "
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    launches = []
    for kind, _, _ in SEEN_BY_ONE:
        script = begin + f"sys.exit(launcher.run_ranks([*launcher.torchrun(on), 'one_sided.py', {kind!r}], on))"
        command = [sys.executable, "-c", script]
        launches.append(subprocess.Popen(command, cwd=place, env=env, stderr=subprocess.PIPE, text=True))
    for process, (kind, code, messages) in zip(launches, SEEN_BY_ONE, strict=True):
        _, stderr = process.communicate()
        assert process.returncode == code, (kind, stderr)
        assert all(stderr.count(line) == 1 for line in messages), stderr
        if code == 2:
            assert len(stderr.splitlines()) == len(messages), stderr


FINETUNING = {"gpt": ("finetune_sft", "t5"), "bert": ("finetune_rte", "gpt2"), "t5": ("finetune_cnn_dm", "bert")}


@pytest.mark.parametrize("family", FINETUNING)
def test_a_beginning_that_is_none_is_named(family: str, tmp_path: Path):
    """Not as the shapes of the model that the config leaves to it."""
    config, other = FINETUNING[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": other}), encoding="utf-8")
    for start, message in (("nowhere", "no config.json there"), (tmp_path, f"is a {other!r} model; give one of")):
        script = f"recipes/{family}/{families.stacks(family)[0]}/finetune.sh"
        words = [f"recipes/{family}/configs/{config}.yaml", str(tmp_path / "out"), "--dry-run", f"init.from={start}"]
        command = ["bash", script, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and f"error: init.from={start}: {message}" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("module", ["scripts.plan", "data.text", "recipes.gpt.convert"])
def test_a_python_without_the_packages_is_told_in_one_line(module: str) -> None:
    """As in a shell in which the environment is not active. -S: without site-packages."""
    done = subprocess.run([sys.executable, "-S", "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} (Python 3.") and line.endswith(
        "is not the environment of these commands: activate it by `. .venv/bin/activate`, or make it first by "
        "`bash scripts/setup.sh`"
    )
