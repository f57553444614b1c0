"""Damaged files of a run and of an export: each change is found, or proven to change nothing."""

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_check import run_folder
from transformers import AutoModelForCausalLM

from common import config, preflight
from common.checkpoints import checkpoint, integrity, run_record
from common.errors import BadInput
from common.huggingface import export, interchange, pretrained
from common.training import log
from recipes.gpt import task
from scripts import check, compare, evaluate, heldout, plot, seeds
from tests import warm
from tests.states import older_file, write_older_step, write_step

CFG = config.load(ROOT / "recipes/gpt/configs/tiny.yaml", ["model.vocab_size=512"], task.Config)
CFG = CFG.model_copy(update={"model": CFG.model.resolve(CFG, None)})
META = {
    "step": 4, "samples": 32, "seed": 1234, "stack": "baseline", "layout": {"world": 1, "dp": 1}, "dtype": "fp32",
    "hyperparameters": {"model.hidden": 64, "optim.lr": 0.001, "data.train": ["a", "b"], "phases": []},
    "commit": "0123456789ab",
}  # fmt: skip


def saved(out: Path, step: int = 4, write: Any = write_step) -> Path:
    """A checkpoint of two parameters."""
    parameters = {}
    for name, shape in (("wte.weight", (5, 3)), ("ln_f.bias", (3,))):
        generator = torch.Generator().manual_seed(step)
        parameters[name] = {part: torch.randn(shape, generator=generator) for part in checkpoint.PARTS}
    return write(out / f"step_{step}", META | {"step": step}, parameters)


WRITERS = pytest.mark.parametrize("write", [write_step, write_older_step])


def contents(saved: checkpoint.Checkpoint) -> Any:
    """What its readers use: where a flip renames the key `crc32`, the values beside it are as they were."""
    keys = [key for key in (*META, "files", "parameters", "pieces") if key in saved.meta]
    return {k: saved.meta[k] for k in keys}, {n: saved.read(n) for n in saved.names()}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@WRITERS
def test_every_bit_of_a_checkpoint_counts(write: Any, tmp_path: Path) -> None:
    """100 flips, half of them in state.json: another step is used, the read is refused, or the state is the same."""
    whole = saved(tmp_path, write=write)
    meta, tensors = contents(checkpoint.latest(tmp_path))
    rng, fates = random.Random(0), []
    for number in range(100):
        path = whole / "state.json" if number % 2 else rng.choice(sorted(whole.glob("*.safetensors")))
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        try:
            state, values = contents(checkpoint.latest(tmp_path))
            assert state == meta and all(values[n][p].equal(tensors[n][p]) for n in tensors for p in tensors[n]), (path, bit)
            fates.append("no effect")
        except BadInput:
            fates.append("found")
        flip(path, bit)
    assert fates.count("found") >= (95 if write is write_older_step else 60), fates  # nothing is read of a header
    assert contents(checkpoint.latest(tmp_path))[0] == meta


DAMAGED: list[Any] = [  # what a value of a state.json may be instead
    None, True, -1, 1.5, "4", "", "x" * 300, "../x", "a/b", "\0", [], [[]], {}, {"a": None}, float("inf"), float("nan"),
    10**400,
]  # fmt: skip


def damage(text: str, rng: random.Random) -> bytes:
    """The text of a JSON file with a part cut, repeated, replaced by noise, or a value of another type."""
    kind = rng.randrange(6)
    if kind == 0:
        return text[: rng.randrange(len(text))].encode()
    if kind == 1:
        data = bytearray(text.encode())
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == 2:
        return (rng.choice("[{") * rng.choice([10, 900, 100_000])).encode() + text.encode()
    if kind == 3:
        return rng.choice([b"", b"null", b"[]", b"3", b'"x"', b"\xff\xfe{}", b"1e999", b"{}", b"9" * 5000, b"\0" * 100])
    values = json.loads(text)
    place, key = values, rng.choice(sorted(values))
    while isinstance(place[key], dict) and place[key] and rng.random() < 0.7:
        place = place[key]
        key = rng.choice(sorted(place))
    if kind == 4:
        del place[key]
    else:
        place[key] = rng.choice(DAMAGED)
    if rng.random() < 0.5:
        values.pop("crc32", None)  # as a file of an older version
    return json.dumps(values).encode()


@WRITERS
@pytest.mark.parametrize("number", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_damaged_state_gives_the_step_before(number: int, write: Any, tmp_path: Path) -> None:
    saved(tmp_path, 2, write)
    text = (saved(tmp_path, 4, write) / "state.json").read_text()
    rng, fallen = random.Random(1), 0
    for _ in range(number):
        (tmp_path / "step_4/state.json").write_bytes(damage(text, rng))
        notes: list[str] = []
        latest = checkpoint.latest(tmp_path, notes)
        assert latest.step in (2, 4) and len(notes) == (latest.step == 2)
        fallen += latest.step == 2
        for name in latest.names():
            try:
                latest.read(name)
            except BadInput:
                assert latest.step == 4
    assert fallen > number / 2


def test_a_state_without_a_checksum_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path, write=write_older_step) / "state.json"
    values = json.loads(path.read_text())
    assert values["crc32"] == integrity.seal({k: v for k, v in values.items() if k != "crc32"})["crc32"]
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "crc32"}))
    assert checkpoint.latest(tmp_path).step == 4
    path.write_text(json.dumps(values | {"seed": 5}))
    with pytest.raises(BadInput, match=r"state.json has other contents than were written"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["weight", "exp_avg_sq"])
def test_a_step_that_is_not_finite_is_named(value: float, part: str, tmp_path: Path) -> None:
    """One of an older version, which saved it."""
    folder = saved(tmp_path, write=write_older_step)
    parts = checkpoint.latest(tmp_path).read("wte.weight")
    parts[part][3, 1] = value
    meta = checkpoint.latest(tmp_path).meta
    meta["files"]["wte.weight"] = older_file(folder / "wte.weight.safetensors", parts)
    damaged = checkpoint.Checkpoint(folder, meta)
    with pytest.raises(BadInput, match=rf"wte.weight.safetensors: its {part} holds NaN or infinite .* remove .*step_4"):
        damaged.read("wte.weight")
    damaged.read("ln_f.bias")


@pytest.mark.parametrize(
    "tensor", [torch.zeros(0), torch.tensor(3.0), torch.full((4, 5), 3e38), torch.zeros(7, dtype=torch.bfloat16)]
)
def test_finite_tensors(tensor: torch.Tensor) -> None:
    assert integrity.is_finite(tensor)
    for value in (float("nan"), float("inf"), float("-inf")) if tensor.numel() else ():
        damaged = tensor.clone()
        damaged.view(-1)[-1] = value
        assert not integrity.is_finite(damaged)


# ---- metrics.jsonl

LINES = [json.dumps({"step": n, "loss": 2.0 - n / 10, "valid_loss": 1.0}) + "\n" for n in range(1, 6)]


@pytest.mark.parametrize(
    ("lines", "whole_lines"),
    [
        (LINES, LINES[:4]),
        ([*LINES[:2], '{"step": 3, "lo'], LINES[:2]),
        ([*LINES[:2], "\0" * 50 + "\n", *LINES[2:]], LINES[:4]),
        ([*LINES[:1], '{"step": "2"}\n', "[1]\n", "3\n", *LINES[2:3], '{"step": null}\n'], [LINES[0], LINES[2]]),
        (['{"step": 1, "loss": "x"}\n', "[" * 100_000 + "\n", LINES[1]], [LINES[1]]),
        (['{"step": 1e999}\n', '{"step": true}\n', '{"step": -1}\n', "\xff\n"], []),
        ([], []),
    ],
)
def test_lines_that_are_damaged_leave_the_log(lines: list[str], whole_lines: list[str], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines), encoding="latin-1")
    assert [json.dumps(line) + "\n" for line in log.read(path, 4)] == whole_lines
    with log._open_metrics(path, 4) as file:
        file.write(LINES[4])
    assert path.read_text() == "".join([*whole_lines, LINES[4]])
    place = max((i for i, line in enumerate(lines) if line in whole_lines), default=-1)
    damaged = sum(line not in LINES for line in lines[: max(place, 0)])
    printed = capsys.readouterr().err
    assert (f"{path}: {damaged} damaged line" in printed) == bool(damaged) and printed.count("\n") == bool(damaged)


def test_later_steps_between_the_lines_to_keep_are_removed(tmp_path: Path, capsys: Any) -> None:
    """A save in the background is logged once it is on disk, after later steps, which a killed run makes again."""
    path, saved_line = tmp_path / "metrics.jsonl", '{"step": 2, "saved_ms": 3.0}\n'
    path.write_text("".join([*LINES[:3], saved_line, LINES[3]]))
    log._open_metrics(path, 2).close()
    assert path.read_text() == "".join([*LINES[:2], saved_line]) and not capsys.readouterr().err


def test_a_log_of_noise_is_read(tmp_path: Path) -> None:
    rng, path = random.Random(2), tmp_path / "metrics.jsonl"
    for _ in range(300):
        data = bytearray("".join(LINES).encode())
        for _ in range(rng.randrange(1, 30)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        whole_lines = list(log.read(path, 4))
        log._open_metrics(path, 4).close()
        assert [json.loads(line) for line in path.read_bytes().splitlines()] == whole_lines


def test_crc32_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 40_000)
    assert integrity.checksum(tmp_path / "a") == {"bytes": 10_240_000, "crc32": zlib.crc32(bytes(range(256)) * 40_000)}


# ---- exports


@pytest.fixture(scope="module")
def exported(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[checkpoint.Checkpoint, Path]:
    """(the checkpoint of a tiny GPT, OUT/hf of it)"""
    out = tmp_path_factory.mktemp("exported")
    parameters: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in task.parameter_shapes(CFG.model).items():
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(parameters))) * 0.02
        parameters[name] = {"weight": weight}
    write_step(out / "step_4", META, parameters)
    source = checkpoint.latest(out)
    export.write(source, CFG, task, out / "hf", corpus / "tokenizer", {"config": "tiny", "stack": "baseline"})
    return source, out / "hf"


def test_an_export_is_what_safetensors_writes(
    exported: tuple[checkpoint.Checkpoint, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = exported
    weights = {name: source.read(name, ("weight",))["weight"] for name in source.names()}
    save_file(weights, str(tmp_path / "expected"), metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert integrity.problems(folder, "x") == []
    record = json.loads((folder / "twinstack.json").read_text())
    assert record["step"] == 4 and record["files"]["model.safetensors"]["crc32"] == zlib.crc32(
        (folder / "model.safetensors").read_bytes()
    )
    assert {p.name for p in folder.iterdir()} == {*record["files"], "README.md", "twinstack.json"}
    net, _ = pretrained.load(AutoModelForCausalLM, folder)
    assert all(weights[name].equal(value) for name, value in net.named_parameters())

    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    export.write(source, CFG, task, tmp_path / "hf", tmp_path / "none", {})
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3 and integrity.problems(tmp_path / "hf", "x") == []
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(weights[name].equal(value) for name, value in net.named_parameters())


def export_rank(rank: int, source: checkpoint.Checkpoint, tmp_path: Path, room: int | None, results: Any) -> None:
    """One of two ranks that export together. room: what a file of rank 1 may have, in bytes."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=2)
    if room is not None and rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    written, write = [], export.write_tensors
    export.write_tensors = lambda path, *args: written.append(path.name) or write(path, *args)
    try:
        export.write(source, CFG, task, tmp_path / "hf", tmp_path / "none", {})
        results.put((rank, written, []))
    except BadInput as error:
        results.put((rank, written, error.problems))
    dist.barrier()
    dist.destroy_process_group()


def export_on_two_ranks(source: checkpoint.Checkpoint, tmp_path: Path, room: int | None) -> list[Any]:
    """Of each rank its number, the files of weights that it began, and what was wrong."""
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=export_rank, args=(rank, source, tmp_path, room, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=100) for _ in processes)
    for process in processes:
        process.join()
    return found


def test_two_ranks_export_what_one_does(
    exported: tuple[checkpoint.Checkpoint, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    (_, first, none), (_, second, neither) = export_on_two_ranks(exported[0], tmp_path, None)
    assert none == neither == [] and not set(first) & set(second) and abs(len(first) - len(second)) <= 1
    (tmp_path / "one").mkdir()
    export.write(exported[0], CFG, task, tmp_path / "one/hf", tmp_path / "none", {})
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("one/hf", "hf"))
    assert one == two and {*first, *second} == {name for name in one if name.endswith(".safetensors")}


def test_a_rank_that_cannot_write_its_part_of_an_export_ends_it_on_all(
    exported: tuple[checkpoint.Checkpoint, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    line = f"{tmp_path}/hf: cannot write the export: File too large; make room there, and the same command continues"
    assert [problems for *_, problems in export_on_two_ranks(exported[0], tmp_path, 10_000)] == [[line], [line]]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_every_bit_of_an_export_counts(exported: tuple[checkpoint.Checkpoint, Path], tmp_path: Path) -> None:
    """100 flips: half of them in the weights, the others in the small files."""
    folder = shutil.copytree(exported[1], tmp_path / "hf")
    record = json.loads((folder / "twinstack.json").read_text())
    rng, fates = random.Random(3), []
    for number in range(100):
        path = folder / ("model.safetensors" if number % 2 else rng.choice([*sorted(record["files"]), "twinstack.json"]))
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        problems = integrity.problems(folder, "x")
        if not problems:  # the record's own: what it says is the same
            values = json.loads((folder / "twinstack.json").read_text())
            assert path.name == "twinstack.json" and values.items() >= {k: v for k, v in record.items() if k != "crc32"}.items()
        assert len(problems) <= 1 and all("copy the folder again; if it was changed on purpose" in line for line in problems)
        fates.append(bool(problems))
        flip(path, bit)
    assert fates.count(True) >= 98
    assert integrity.problems(folder, "x") == []


def test_changed_exports_are_refused_where_they_are_opened(
    exported: tuple[checkpoint.Checkpoint, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(exported[1], tmp_path / "hf")
    flip(folder / "model.safetensors", 8 * 100_000)
    message = r"hf: model.safetensors has other contents .* if it was changed on purpose, delete .*hf/twinstack.json"
    start = [f"data.train={corpus}/train", "data.valid=null", f"init.from={folder}", "model.vocab_size=512"]
    tiny = str(ROOT / "recipes/gpt/configs/tiny.yaml")
    for attempt in (
        lambda: preflight.prepare(tiny, str(tmp_path / "out"), start, "baseline", task, 1),
        lambda: interchange.from_hf(folder, tmp_path / "out", task),
        lambda: pretrained.load(AutoModelForCausalLM, folder),
    ):
        with pytest.raises(BadInput, match=message) as error:
            attempt()
        assert len(error.value.problems) == 1 and not (tmp_path / "out").exists()
    monkeypatch.setenv("TWINSTACK_EXIT_CODE", "x")  # the ranks leave it to their launcher
    preflight.prepare(tiny, str(tmp_path / "out"), start, "baseline", task, 1)
    monkeypatch.delenv("TWINSTACK_EXIT_CODE")
    (folder / "twinstack.json").unlink()
    preflight.prepare(tiny, str(tmp_path / "out"), start, "baseline", task, 1)


CHANGES: list[tuple[str, Callable[[Path], Any], str | None]] = [
    ("edited", lambda f: (f / "config.json").write_text("{}"), "config.json has 2 bytes"),
    ("missing", lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json cannot be read (No such file or directory)"),
    ("added", lambda f: (f / "more.safetensors").write_bytes(b""), "more.safetensors is not of this export"),
    ("ids", lambda f: (f / "added_tokens.json").write_text('{"def": 3}'), "added_tokens.json is not of this export"),
    ("record cut", lambda f: os.truncate(f / "twinstack.json", 50), "twinstack.json is not as it was written"),
    ("record of another kind", lambda f: (f / "twinstack.json").write_text('{"files": [1]}'), "twinstack.json is not as it"),
    ("record edited", lambda f: edit(f / "twinstack.json", step=5), "twinstack.json is not as it was written"),
    ("record of a device", lambda f: edit(f / "twinstack.json", files={"/dev/zero": {"bytes": 0}}), "twinstack.json is not as"),
    ("pipe", lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")), "config.json is not a file"),
    ("card", lambda f: (f / "README.md").write_text("mine"), None),
    ("notes beside", lambda f: (f / "notes.txt").write_text("mine"), None),
    ("older version", lambda f: (f / "twinstack.json").write_text('{"step": 4}'), None),
    ("another library's", lambda f: (f / "twinstack.json").unlink(), None),
]  # fmt: skip


def edit(path: Path, **values: Any) -> None:
    """Values in place of others, without the checksum."""
    path.write_text(
        json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if k != "crc32" or "files" not in values})
    )


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_what_may_change_in_an_export(
    change: Callable[[Path], Any], message: str | None, exported: tuple[checkpoint.Checkpoint, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(exported[1], tmp_path / "hf")
    change(folder)
    problems = integrity.problems(folder, "init.from=hf")
    assert len(problems) == (message is not None) and all(line.startswith(f"init.from=hf: {message}") for line in problems), (
        problems
    )


def test_ids_that_a_model_does_not_know_are_refused(exported: tuple[checkpoint.Checkpoint, Path], tmp_path: Path) -> None:
    """Of generation_config.json where it is read; of a text before the model sees them."""
    import transformers

    folder = tmp_path / "hf"
    shutil.copytree(exported[1], folder)
    (folder / "twinstack.json").unlink()
    for ends in ("x", [5, "x"], 10**30, -1, True):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        with pytest.raises(BadInput, match=r"generation_config.json: cannot be used \(eos_token_id must be an id or a list of"):
            pretrained.load(transformers.AutoModelForCausalLM, folder)
    (folder / "generation_config.json").write_text("[1, 2]")
    with pytest.raises(BadInput, match="it must be a JSON object"):
        pretrained.load(transformers.AutoModelForCausalLM, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    net, _ = pretrained.load(transformers.AutoModelForCausalLM, folder)
    rows = net.get_input_embeddings().weight.shape[0]
    pretrained.refuse_unknown(rows - 1, net, folder)
    with pytest.raises(BadInput, match=f"its tokenizer gives id {rows}, its model has {rows} embeddings"):
        pretrained.refuse_unknown(rows, net, folder)


def test_an_export_that_does_not_fit_leaves_the_one_before(
    exported: tuple[checkpoint.Checkpoint, Path], tmp_path: Path
) -> None:
    """A file that may not grow: what a full disk does, at another size."""
    source, folder = exported[0], shutil.copytree(exported[1], tmp_path / "hf")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(BadInput, match=r"hf: cannot write the export: File too large; make room there, and the same comm"):
            export.write(source, CFG, task, folder, tmp_path / "none", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    export.write(source, CFG, task, folder, tmp_path / "none", {})
    assert integrity.problems(folder, "x") == [] and [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_spoiled_weights_of_a_folder_are_named(exported: tuple[checkpoint.Checkpoint, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported[1], tmp_path / "hf")
    (folder / "twinstack.json").unlink()
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.bias"][3] = float("nan")
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"hf: its transformer.h.1.mlp.c_fc.bias holds NaN or infinite values"):
        pretrained.load(AutoModelForCausalLM, folder)
    done = warm.run(["-m", "recipes.gpt.convert", "from-hf", folder, tmp_path / "out"])
    message = "hf: transformer.h.1.mlp.c_fc.bias holds NaN or infinite values; the run that made it diverged"
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


# ---- every reader of a run's records, over many damaged ones

BASE = ROOT / "recipes/gpt/configs/shakespeare_char_cpu.yaml"
EVAL = [{"task": "text", "metric": "loss", "value": 1.5, "n": 10, "protocol": "all of it"}]


def read_all(out: Path) -> None:
    """By each script; BadInput is an answer, another error is not. No answer takes 10 s."""
    run = preflight.Run(*[None] * len(preflight.Run._fields))._replace(
        out=out, whole=CFG, resume=checkpoint.Checkpoint(out / "step_4", {"step": 4})
    )
    for reader in (
        lambda: check.run_rows([out]),
        lambda: plot.curves(out),
        lambda: compare.summary("run", out, with_export=False),
        lambda: heldout.evaluate(out, data="nowhere"),
        lambda: seeds.summary({1: out}),
        lambda: evaluate.read_results(out / "eval.json"),
        lambda: export._losses(out / "metrics.jsonl", 4),
        lambda: integrity.exported_step(out / "hf"),
        lambda: integrity.problems(out / "hf", "hf"),
        lambda: run_record.finished(run),
    ):
        begin = time.monotonic()
        try:
            reader()
        except OSError as error:  # one line of exit_cleanly
            assert error.errno == errno.ENAMETOOLONG
        except BadInput:
            pass
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize("number", [10, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_no_record_ends_in_a_traceback(number: int, tmp_path: Path) -> None:
    """`number` damaged ones each of run.json, metrics.jsonl, eval.json and twinstack.json, in less than 1 GB more of memory."""
    out = run_folder(tmp_path / "out", BASE, [], {5: 1.5}, 5, "baseline")
    (out / "eval.json").write_text(json.dumps(EVAL))
    (out / "hf").mkdir()
    record = integrity.seal({"step": 4, "config": "x", "files": {"a": {"bytes": 1, "crc32": 2}}})
    (out / "hf/twinstack.json").write_text(json.dumps(record))
    for name, content in {"run.json": {"finished": {"step": 4, "files": ["eval.json"]}, "stacks": ["baseline"]}}.items():
        (out / name).write_text(json.dumps(json.loads((out / name).read_text()) | content))
    rng, before = random.Random(number), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_all(out)
    for name in ("run.json", "metrics.jsonl", "eval.json", "hf/twinstack.json"):
        path = out / name
        text = path.read_text()
        for _ in range(number):
            lines = text.splitlines() if name == "metrics.jsonl" else [text]
            place = rng.randrange(len(lines))
            listed = lines[place].startswith("[")
            damaged = damage(lines[place][1:-1] if listed else lines[place], rng)
            lines[place] = (f"[{damaged.decode('latin-1')}]" if listed else damaged.decode("latin-1")).replace("\n", " ")
            path.write_text("\n".join(lines) + "\n" * rng.randrange(2), encoding="latin-1")
            read_all(out)
        path.write_text(text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
