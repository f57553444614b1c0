"""The training state in pieces (common/checkpoints): what ranks of any layout write, any other layout reads."""

import errno
import fcntl
import importlib
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, launch_script, step_of
from test_integrity import META, flip, saved
from test_launch import config as tiny, env_with, training_lines  # noqa: F401 (tiny: a fixture)

from common import config
from common.checkpoints import checkpoint, integrity, pieces, sharded
from common.errors import BadInput
from common.families import RECIPES
from common.launch import lock
from common.stacks import mcore
from scripts import bench_state, state as state_cli
from tests.states import write_older_step, write_step


def ranges(count: int, ranks: int) -> list[tuple[int, int]]:
    """The flat ranges of a tensor that ranks have, of unequal sizes."""
    bounds = sorted({0, count, *random.Random(count).choices(range(count), k=ranks - 1)})
    return list(pairwise(bounds))


def megatron_cases() -> Iterator[Any]:
    for family, name, given in (
        ("gpt", "tiny", []), ("gpt", "tiny_llama", []), ("gpt", "tiny_llama", ["model.tied=false"]), ("bert", "tiny", []),
        ("bert", "tiny_postln", []), ("t5", "tiny", []), ("t5", "tiny_v1_1", []),
    ):  # fmt: skip
        path = RECIPES / family / f"configs/{name}.yaml"
        if path.exists():
            yield pytest.param(family, path, given, id=f"{family}-{name}{'-'.join(given)}")


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("family", "path", "given"), megatron_cases())
def test_megatron_pieces_are_the_elements_of_the_parameters(family: str, path: Path, given: list[str], tp: int) -> None:
    """Of every Megatron parameter, every tp rank's part cut into flat ranges, as the distributed optimizer has them: each piece
    has the values of its rectangle, and together they are each parameter once."""
    task = importlib.import_module(f"recipes.{family}.task")
    parameter_map = importlib.import_module(f"recipes.{family}.megatron.parameter_map").parameter_map
    cfg = config.load(path, ["model.vocab_size=131", *given], task.Config)
    model = cfg.model.resolve(cfg, None)
    shapes = task.parameter_shapes(model)
    values = {name: torch.randn(*shape) for name, shape in shapes.items()}
    seen: dict[str, list[Any]] = {name: [] for name in shapes}
    for conversion, dim in of_each_parameter(family, model, parameter_map(model), shapes):
        whole = conversion.from_hf(*(values[name] for name in conversion.hf))
        rows = conversion.unpadded_rows or 0
        padded = -(-rows // tp) * tp
        if rows:
            whole = torch.nn.functional.pad(whole, (0, 0) * (whole.dim() - 1) + (0, padded - rows))
        for rank in range(tp if dim is not None else 1):
            part = mcore.split(whole, dim, conversion.blocks, tp, rank) if dim is not None else whole
            split = {"dim": dim or 0, "blocks": conversion.blocks, "tp": 1 if dim is None else tp, "rank": rank}
            placement = pieces.converted(conversion, [shapes[name] for name in conversion.hf], padded, **split)
            assert placement.local == tuple(part.shape)
            for begin, end in ranges(part.numel(), 3):
                for piece in pieces.cut(placement, "weight", part.reshape(-1)[begin:end], begin):
                    assert piece.tensor.equal(values[piece.name][piece.region]), (conversion.hf, piece.offset)
                    seen[piece.name].append((piece.offset, tuple(piece.tensor.shape)))
    assert {name: pieces.uncovered(shapes[name], found) for name, found in seen.items()} == dict.fromkeys(shapes)


def of_each_parameter(family: str, model: Any, mapping: Any, shapes: Any) -> Iterator[tuple[Any, int | None]]:
    """(conversion, dimension that tensor parallelism splits) of each Megatron parameter that holds one."""
    row_parallel, column_parallel = ("linear_proj", "linear_fc2"), ("linear_qkv", "linear_fc1", "linear_q", "linear_kv")
    layer_names = [
        f"{block}.{leaf}"
        for block in (
            "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2", "input_layernorm",
            "pre_mlp_layernorm", "self_attn_bda.norm", "mlp_bda.norm", "pre_cross_attn_layernorm", "cross_attention.linear_q",
            "cross_attention.linear_kv", "cross_attention.linear_proj",
        )
        for leaf in ("weight", "bias")
    ]  # fmt: skip
    outer = [
        "embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias", "embedding.position_embeddings.weight",
        "embedding.tokentype_embeddings.weight", "lm_head.output_layer.weight", "decoder.final_layernorm.weight",
        "decoder.final_layernorm.bias", "encoder.final_layernorm.weight", "encoder.final_layernorm.bias",
        "encoder_relative_pos_emb.relative_attention_bias.weight", "decoder_relative_pos_emb.relative_attention_bias.weight",
        *(f"{m}.{leaf}" for m in ("lm_head.dense", "lm_head.layer_norm", "pooler.dense", "binary_head",
                                  "embedding.embedding_dropout.0") for leaf in ("weight", "bias")),
    ]  # fmt: skip
    stacks = ("encoder", "decoder") if family == "t5" else ("encoder",) if family == "bert" else ("decoder",)
    names = [f"{stack}.layers.{number}.{name}" for stack in stacks for number in range(model.layers) for name in layer_names]
    for name in [*outer, *names]:
        try:
            conversion = mapping(name)
        except KeyError:
            continue
        if conversion.is_copy or conversion.hf[0] not in shapes:  # a decoder may have other layers
            continue
        module, _, leaf = name.rpartition(".")
        block = module.rpartition(".")[2]
        dim: int | None = None
        if block in column_parallel or conversion.unpadded_rows:
            dim = 0
        elif block in row_parallel and leaf == "weight":
            dim = 1
        yield conversion, dim


def test_flat_ranges_are_at_most_three_rectangles_each() -> None:
    tensor = torch.arange(7 * 5.0)
    for begin in range(35):
        for end in range(begin + 1, 36):
            found = list(pieces.cut(pieces.whole("w", (7, 5)), "weight", tensor[begin:end], begin))
            assert len(found) <= 3
            assert sorted(v for piece in found for v in piece.tensor.flatten().tolist()) == list(range(begin, end))
            assert all(piece.tensor.equal(tensor.view(7, 5)[piece.region]) for piece in found)


def test_what_does_not_cover_a_part_once_is_named() -> None:
    whole = [((0, 0), (2, 4)), ((2, 0), (1, 1)), ((2, 1), (1, 3)), ((3, 0), (1, 4))]
    assert pieces.uncovered((4, 4), whole) is None
    assert pieces.uncovered((4, 4), whole[1:]) == "lacks 8 of its 16 elements"
    assert pieces.uncovered((4, 4), [*whole, ((0, 0), (1, 1))]) == "has elements that several ranks wrote"
    assert pieces.uncovered((4, 4), [*whole[:-1], ((0, 0), (1, 4))]) == "has elements that several ranks wrote"
    assert pieces.uncovered((4, 4), [*whole[:-1], ((4, 0), (1, 4))]) == "has elements beyond its shape"


def test_replicas_share_the_writing() -> None:
    """Weights and biases alternate: each of 4 ranks that hold all writes a quarter of the bytes."""
    held = [
        piece
        for layer in range(12)
        for name, shape in ((f"{layer}.w", (300, 100)), (f"{layer}.b", (300,)))
        for piece in pieces.cut(pieces.whole(name, shape), "weight", torch.zeros(300 * (100 if "w" in name else 1)))
    ]
    shares = [pieces.own(piece._replace(replica=rank, replicas=4) for piece in held) for rank in range(4)]
    sizes = [sum(piece.tensor.numel() for piece in share) for share in shares]
    assert max(sizes) <= 1.05 * sum(sizes) / 4
    assert sorted((p.name, p.offset) for share in shares for p in share) == sorted((p.name, p.offset) for p in held)


# ---- layouts of one model, each written and read as every other ----------------------------------------------------------

SHAPES = {"emb": (97, 32), **{f"{n}.{leaf}": shape for n in range(4) for leaf, shape in (("w", (64, 32)), ("b", (64,)))}}
VALUES = {name: torch.randn(*shape, generator=torch.Generator().manual_seed(len(name))) for name, shape in SHAPES.items()}


def held_by(layout: str, rank: int, world: int, values: dict[str, torch.Tensor]) -> list[pieces.Piece]:
    """What a rank holds: all of it, rows, columns, a flat range of each parameter, or one of all of them together."""
    held, at, total = [], 0, sum(v.numel() for v in values.values())
    for number, (name, value) in enumerate(values.items()):
        flat, shape = value.reshape(-1), tuple(value.shape)
        whole = pieces.whole(name, shape)
        if layout == "replicas":
            held += pieces.cut(whole, "weight", flat, 0, rank, world)
        elif layout == "rows":
            size = -(-shape[0] // world)
            begin = min(rank * size, shape[0])
            rows = value[begin : begin + size]
            held += pieces.cut(pieces.rows_of(name, shape, begin, len(rows)), "weight", rows.reshape(-1))
        elif layout == "columns" and len(shape) == 2:
            size = shape[1] // world
            columns = value[:, rank * size : (rank + 1) * size].contiguous()
            held += pieces.cut(whole._replace(local=(shape[0], size), column=rank * size), "weight", columns.view(-1))
        elif layout == "columns":
            held += pieces.cut(whole, "weight", flat, 0, rank, world)
        elif layout == "stages":
            held += pieces.cut(whole, "weight", flat) if number % world == rank else []
        elif layout == "zero3":
            size = -(-flat.numel() // world)
            held += pieces.cut(whole, "weight", flat[rank * size : (rank + 1) * size], rank * size)
        elif layout == "zero1":
            begin, end = max(total * rank // world, at), min(total * (rank + 1) // world, at + flat.numel())
            held += pieces.cut(whole, "weight", flat[begin - at : end - at], begin - at) if begin < end else []
        at += flat.numel()
    return held


LAYOUTS = ["replicas", "rows", "columns", "stages", "zero1", "zero3"]


def write_as(layout: str, world: int, out: Path) -> tuple[checkpoint.Checkpoint, list[int]]:
    """A step written by so many ranks, and the bytes that each wrote."""
    tmp = out / "step_4.tmp"
    tmp.mkdir(parents=True)
    written, sizes = [], []
    for rank in range(world):
        before = sharded.counters["bytes written"]
        written.append([sharded.write(tmp / f"{rank:05}.safetensors", pieces.own(held_by(layout, rank, world, VALUES)))])
        sizes.append(sharded.counters["bytes written"] - before)
    checkpoint.finish(tmp, out / "step_4", META | sharded.index(written, SHAPES))
    return step_of(out, 4), sizes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_every_other(layout: str, tmp_path: Path) -> None:
    step, _ = write_as(layout, 4, tmp_path)
    for other in LAYOUTS:
        for world in (1, 2, 3, 8) if other not in ("columns",) else (1, 2, 8):
            for rank in range(world):
                into = {name: torch.full_like(value, float("nan")) for name, value in VALUES.items()}
                held = held_by(other, rank, world, into)
                sharded.Reader(step).read(held)
                assert held and all(piece.tensor.equal(VALUES[piece.name][piece.region]) for piece in held), (other, rank)
    assert all(step.read(name)["weight"].equal(value) for name, value in VALUES.items())


@pytest.mark.parametrize("layout", ["rows", "stages", "zero1", "zero3"])
def test_no_rank_writes_or_reads_more_than_its_share(layout: str, tmp_path: Path) -> None:
    """For 1, 2, 4 and 8 ranks: bytes beside the headers, within a row of each parameter."""
    total = sum(4 * value.numel() for value in VALUES.values())
    for world in (1, 2, 4, 8):
        step, written = write_as(layout, world, tmp_path / f"{world}")
        slack = 4 * 64 * len(VALUES) + 200 * 3 * len(VALUES) if layout != "stages" else total / 2
        assert max(written) <= total / world + slack
        for rank in range(world):
            before = sharded.counters["bytes read"]
            sharded.Reader(step).read(held_by(layout, rank, world, {n: torch.empty_like(v) for n, v in VALUES.items()}))
            assert sharded.counters["bytes read"] - before <= written[rank]


def test_columns_of_what_others_have_written_are_read_alone(tmp_path: Path) -> None:
    """Of rows in files of 4 ranks, each of 8 ranks reads its eighth of the columns, and each of 2 ranks whole rows."""
    step, _ = write_as("rows", 4, tmp_path)
    total = sum(4 * value.numel() for value in VALUES.values())
    for world, share in ((8, total / 8), (2, total)):
        for rank in range(world):
            before = sharded.counters["bytes read"]
            held = held_by("columns", rank, world, {name: torch.empty_like(value) for name, value in VALUES.items()})
            sharded.Reader(step).read(held)
            vectors = sum(4 * value.numel() for value in VALUES.values() if value.dim() == 1)
            assert sharded.counters["bytes read"] - before <= share + vectors


# ---- python -m scripts.state -----------------------------------------------------------------------------------------


def cli(*args: Any) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "scripts.state", *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """100 over all files, the index included: `verify` says which step, or the bit changes no value that is read."""
    step, _ = write_as("zero3", 3, tmp_path)
    rng, missed = random.Random(3), []
    files = sorted(step.path.iterdir())
    for _ in range(100):
        path = rng.choices(files, [file.stat().st_size for file in files])[0]
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        opened = checkpoint.opened(step.path)
        lines = [opened] if isinstance(opened, str) else list(state_cli.damaged(opened))
        if not lines:
            missed.append((path.name, bit))
        flip(path, bit)
    assert not missed
    assert not list(state_cli.damaged(step_of(tmp_path, 4)))


def test_verify_names_what_is_damaged(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    saved(tmp_path, 3, write_older_step)
    assert state_cli.verify(tmp_path) == 0
    path = saved(tmp_path, 4) / "00000.safetensors"
    flip(path, 8 * path.stat().st_size - 5)
    code, out, err = cli("verify", tmp_path)
    assert code == 2 and out.count("whole") == 2 and len(err.splitlines()) == 1
    assert f"{path}: its bytes have changed since it was written (exp_avg_sq of ln_f.bias)" in err
    with pytest.raises(BadInput, match="no such folder; give OUT of a run, or one of its folders step_N"):
        state_cli.verify(tmp_path / "nothing")


def test_a_step_that_was_found_damaged_is_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    marker = saved(tmp_path, 4) / checkpoint.DAMAGED
    marker.write_text("step_4/00000.safetensors: its bytes have changed since it was written\n")
    notes: list[str] = []
    newest = checkpoint.latest(tmp_path, notes)
    assert newest is not None and newest.step == 2
    assert notes == [
        f"step_4/00000.safetensors: its bytes have changed since it was written (delete {marker} once it is restored); "
        f"continuing from {tmp_path / 'step_2'}"
    ]
    marker.unlink()
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.step == 4


WEIGHT = ("pieces", "wte.weight", "weight")
PIECE = (*WEIGHT, 0)
FOREIGN: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "file elsewhere": (("files",), {"../step_4/00000.safetensors": {"bytes": 1, "crc32": 1, "header": 1}}, "is not readable"),
    "file ..": (("files",), {"..": {"bytes": 1, "crc32": 1, "header": 1}}, "'..' must be the name of a .safetensors file"),
    "no file": (("files",), {}, "a piece of weight of ln_f.bias is not in its file"),
    "header": (("files", "00000.safetensors", "header"), 2**62, "is larger than the file"),
    "no parameters": (("parameters",), {}, "its `pieces` are not those of its `parameters`"),
    "parameter null": (("parameters", "wte.weight"), None, "its pieces of wte.weight are not those of its parts"),
    "ghost": (("parameters", "ghost"), {"weight": [2**40]}, "its `pieces` are not those of its `parameters`"),
    "shape": (("parameters", "wte.weight", "weight"), [5, 4], "weight of wte.weight is not whole"),
    "huge shape": (("parameters", "wte.weight", "weight"), [2**31, 3], "weight of wte.weight is not whole"),
    "shape null": (("parameters", "wte.weight", "weight"), None, "must be a list of sizes"),
    "no pieces": (WEIGHT, [], "weight of wte.weight lacks 15 of its 15 elements"),
    "twice": (
        WEIGHT,
        [[0, 480, "0" * 16, [0, 0], [4, 3]], [0, 480, "0" * 16, [2, 0], [3, 3]]],
        "weight of wte.weight has elements that several ranks wrote",
    ),
    "short": (PIECE, [0, 8], "a piece of weight of wte.weight is not in its file, or not in the shape [5, 3]"),
    **{f"file {value}": ((*PIECE, 0), value, "is not in its file") for value in (99, -1, "x", None, 0.0, True)},
    **{f"first byte {value}": ((*PIECE, 1), value, "is not in its file") for value in (2**62, 2**70, "8", 8.0, 0)},
    **{f"offset {value}": ((*PIECE, 3), value, "is not in its file") for value in (None, [], [10**9, 0], [-1, 0], [0] * 4)},
    **{f"size {value}": ((*PIECE, 4), value, "is not in its file") for value in (None, [-96, 3], [2**40, 3], ["a", 3], [5])},
    "checksum": ((*PIECE, 2), 5, "is not in its file"),
    "samples": (("samples",), float("nan"), "is not readable"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_an_index_that_no_run_has_written_is_refused(case: str, tmp_path: Path) -> None:
    """Its checksum is right: it was written so. The step before is used."""
    saved(tmp_path, 2)
    path = saved(tmp_path) / "state.json"
    where, value, message = FOREIGN[case]
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "crc32"}
    place: Any = values
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    path.write_text(json.dumps(integrity.seal(values)))
    problem = checkpoint.opened(path.parent)
    assert isinstance(problem, str) and problem.startswith(f"{path} is no") and message in problem
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.step == 2


def test_show(tmp_path: Path) -> None:
    saved(tmp_path)
    code, out, _ = cli("show", tmp_path)
    assert code == 0 and "18 parameters in 2 tensors" in out and "exp_avg, exp_avg_sq, weight" in out
    assert all(len(line) <= 80 for line in out.splitlines() if str(tmp_path) not in line)
    assert json.loads(cli("show", tmp_path / "step_4", "--json")[1])["pieces"] == 6


@pytest.mark.parametrize("write", [write_step, write_older_step])
@pytest.mark.parametrize("files", [1, 3])
def test_reshard_keeps_every_value(files: int, write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, 4, write)
    assert state_cli.reshard(tmp_path / "step_4", tmp_path / "again/step_4", files) == 0
    assert f"{files} file" in capsys.readouterr().out
    before, after = step_of(tmp_path, 4), step_of(tmp_path / "again", 4)
    assert after.is_sharded and len(after.meta["files"]) == files and after.meta["seed"] == before.meta["seed"]
    for name in before.names():
        a, b = before.read(name), after.read(name)
        assert a.keys() == b.keys() and all(a[part].equal(b[part]) for part in a)


REFUSED: list[tuple[list[str], str]] = [
    (["step_4", "again/step_4", "--pieces", "0"], "--pieces 0: give the number of files, 1 or more"),
    (["step_4", "again", "--pieces", "1"], "must be named step_4"),
    (["step_4", "step_4", "--pieces", "1"], "is there; give a new folder"),
    (["step_9", "again/step_9", "--pieces", "1"], "step_9/state.json is missing"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED)
def test_what_reshard_refuses(args: Sequence[str], message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(BadInput, match=message):
        state_cli.reshard(tmp_path / args[0], tmp_path / args[1], int(args[3]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_4"]


def command(monkeypatch: pytest.MonkeyPatch, *args: Any) -> str:
    """The only line of a command that is refused."""
    monkeypatch.setattr(sys, "argv", ["state", *map(str, args)])
    with pytest.raises(BadInput) as error:
        state_cli.main()
    [line] = error.value.problems
    return line


@pytest.mark.parametrize("count", ["-1", "10001", "1000000000", "9" * 20, "1e9", "1.5", "many", "٣", ""])
def test_a_number_of_files_is_refused_in_one_line(count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    line = command(monkeypatch, "reshard", tmp_path / "step_4", tmp_path / "again/step_4", "--pieces", count)
    assert line == f"--pieces {count}: give the number of files, 1 or more, at most 10,000"


def test_reshard_says_when_the_files_are_fewer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path)
    assert state_cli.reshard(tmp_path / "step_4", tmp_path / "again/step_4", 1000) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'again/step_4'}: 6 files"
    assert second == "note: fewer than 1,000: the state has 6 pieces, and no piece is divided among files"


def test_files_have_what_ranks_would_write() -> None:
    held = held_by("zero1", 0, 1, VALUES)
    for files in (1, 2, 5, 40):
        ranks = [pieces.own(piece._replace(replica=n, replicas=files) for piece in held) for n in range(files)]
        names = [[(piece.name, piece.offset) for piece in of_file] for of_file in state_cli._divided(held, files)]
        assert names == [[(piece.name, piece.offset) for piece in own] for own in ranks if own]


@pytest.mark.parametrize("fault", ["damaged", "full disk", "full disk at the index", "Ctrl-C"])
def test_a_reshard_that_fails_leaves_nothing_and_can_be_repeated(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt if fault == "Ctrl-C" else OSError(errno.ENOSPC, "No space left on device")

    step, out = saved(tmp_path), tmp_path / "again/step_4"
    (tmp_path / "config.yaml").write_text("a: 1\n")
    path, message = step / "00000.safetensors", "its bytes have changed"
    if fault == "damaged":
        flip(path, 8 * path.stat().st_size - 5)
    else:
        where = out.with_name("step_4.tmp") / "00000.safetensors" if fault == "full disk" else out
        message = f"{where}: No space left on device; nothing was written; make room there, or choose another folder"
        monkeypatch.setattr(*((checkpoint, "finish") if "index" in fault else (sharded, "_write_all")), fail)
    with pytest.raises(KeyboardInterrupt if fault == "Ctrl-C" else BadInput, match=None if fault == "Ctrl-C" else message):
        state_cli.reshard(step, out, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "step_4"]
    monkeypatch.undo()
    if fault == "damaged":
        flip(path, 8 * path.stat().st_size - 5)
    for left in ("step_4.tmp", "step_4.run.tmp"):  # of a reshard that was killed
        (tmp_path / "again" / left).mkdir(parents=True)
    assert state_cli.reshard(step, out, 2) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["config.yaml", "step_4"]


def test_reshard_finds_damage_in_what_it_reads_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, _ = write_as("rows", 2, tmp_path)
    path = step.path / "00000.safetensors"
    flip(path, 8 * path.stat().st_size - 5)
    monkeypatch.setattr(pieces, "LARGEST", 4 * 32 * 5)  # rows that no piece of the source has alone
    with pytest.raises(BadInput, match=f"{path}: its bytes have changed"):
        state_cli.reshard(step.path, tmp_path / "again/step_4", 2)
    assert not (tmp_path / "again").exists()


def test_targets_that_reshard_refuses(tmp_path: Path) -> None:
    step = saved(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "link").mkdir()
    (tmp_path / "link/step_4").symlink_to(tmp_path / "nothing")
    (tmp_path / "other").symlink_to(step)
    for out, message in (
        (Path("/proc/step_4"), "/proc: not writable .*; give step_4 in a folder that can be written to"),
        (tmp_path / "file/step_4", "file: is a file; give step_4 in a folder that can be written to"),
        (tmp_path / "link/step_4", "link/step_4: is there; give a new folder"),
        (step / "step_4", "is inside .*/step_4, which is a step itself"),
        (tmp_path / "other/deeper/step_4", "is inside .*/step_4, which is a step itself"),
    ):
        with pytest.raises(BadInput, match=message):
            state_cli.reshard(step, out, 1)
    assert sorted(path.name for path in step.iterdir()) == ["00000.safetensors", "state.json"]
    assert not (tmp_path / "nothing").exists()


def test_damage_is_not_hidden_by_a_step_in_a_step(tmp_path: Path) -> None:
    step = saved(tmp_path)
    saved(step)
    path = step / "00000.safetensors"
    flip(path, 8 * path.stat().st_size - 5)
    assert state_cli.verify(step) == 2


def test_reshard_refuses_the_folder_of_a_live_run(tmp_path: Path) -> None:
    step, folder = saved(tmp_path), tmp_path / "again"
    folder.mkdir()
    with open(folder / lock.NAME, "w+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="again: another run writes there"):
            state_cli.reshard(step, folder / "step_4", 1)
    assert state_cli.reshard(step, folder / "step_4", 1) == 0


def finetuned(out: Path) -> None:
    """What is beside step_4 and step_6 of a run, with a best step of a finetuning before them."""
    for step in (4, 6):
        saved(out, step)
    saved(out / "best", 2)
    (out / "tokenizer").mkdir()
    (out / "tokenizer/tokenizer.json").write_text("{}")
    (out / "config.yaml").write_text("a: 1\n")
    (out / "run.json").write_text(json.dumps({"id": "abc", "finished": {"step": 6, "files": []}}))
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 6)] + ['{"step": 4, "saved_ms": 3}', '{"st']
    (out / "metrics.jsonl").write_text("\n".join(lines))
    (out / "eval.json").write_text("[]")
    (out / "hf").mkdir()


def test_reshard_copies_what_a_run_needs_to_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    finetuned(run)
    assert state_cli.reshard(run / "step_4", again / "step_4", 2) == 0
    names = ["best", "config.yaml", "eval.json", "metrics.jsonl", "run.json", "step_4", "tokenizer"]
    assert sorted(path.name for path in again.iterdir()) == names
    assert f"copied from {run}: run.json, metrics.jsonl, tokenizer, best, eval.json, config.yaml" in capsys.readouterr().out
    assert json.loads((again / "run.json").read_text()) == {"id": "abc"}
    assert [json.loads(line)["step"] for line in (again / "metrics.jsonl").read_text().splitlines()] == [2, 4, 4]
    assert step_of(again / "best", 2).step == 2
    (run / "metrics.jsonl").unlink()
    assert state_cli.reshard(run / "step_6", again / "step_6", 2) == 0  # a run is there now
    assert len((again / "metrics.jsonl").read_text().splitlines()) == 3
    assert f"note: {again} has a run, whose other files are as they were" in capsys.readouterr().out


def test_a_later_best_step_and_its_results_are_not_copied(tmp_path: Path) -> None:
    finetuned(tmp_path / "run")
    saved(tmp_path / "run/best", 6)
    assert state_cli.reshard(tmp_path / "run/step_4", tmp_path / "again/step_4", 2) == 0
    assert [path.name for path in (tmp_path / "again/best").iterdir()] == ["step_2"]
    assert not (tmp_path / "again/eval.json").exists()


def test_reshard_overwrites_nothing_beside_the_step(tmp_path: Path) -> None:
    finetuned(tmp_path / "run")
    mine = tmp_path / "mine/tokenizer"
    mine.mkdir(parents=True)
    with pytest.raises(BadInput, match=r"mine: has tokenizer and no run \(no config.yaml\); give another folder"):
        state_cli.reshard(tmp_path / "run/step_4", tmp_path / "mine/step_4", 1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["tokenizer"] and not list(mine.iterdir())


@pytest.mark.slow
def test_a_step_that_was_written_again_continues_as_its_run(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    """The same command, in OUT and in the folder that reshard wrote, makes the same steps."""

    def train(out: str, steps: int) -> list[tuple[int, float]]:
        given = [str(tiny), str(tmp_path / out), f"train.steps={steps}", "train.save_every=2"]
        command, env = ["bash", str(launch_script("baseline")), *given], env_with(NPROC=2, OMP_NUM_THREADS=1)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [(line["step"], line["loss"]) for line in training_lines(tmp_path / out)]

    train("run", 4)
    for step in (2, 4):
        assert state_cli.reshard(tmp_path / f"run/step_{step}", tmp_path / f"from_{step}/step_{step}", 3) == 0
    losses = train("run", 6)
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert train("from_4", 6) == losses and train("from_2", 6) == losses
    records = [json.loads((tmp_path / out / "run.json").read_text()) for out in ("run", "from_2", "from_4")]
    assert len({record["id"] for record in records}) == 1


def test_what_verify_and_show_print_is_safe_for_a_terminal(tmp_path: Path) -> None:
    out = tmp_path / "a\n\x1b[31mb"
    step = saved(out)
    path = step / "state.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "crc32"}
    values |= {"stack": "x\x1b]0;y", "commit": "z\n\x1b[2J", "layout": {"world": 1, "dp\x1b": "\x07"}}
    path.write_text(json.dumps(integrity.seal(values)))
    saved(out, 5)
    (out / "step_5" / checkpoint.DAMAGED).write_text("first\nsecond \x1b[2J\n")
    for name, count in (("verify", 1), ("show", 0)):
        code, printed, errors = cli(name, out)
        assert code == 2 and "\x1b" not in printed + errors and "\x07" not in printed
        assert [line for line in errors.splitlines() if line] == errors.splitlines() and len(errors.splitlines()) == 1
        assert r"first\nsecond \x1b[2J" in errors
        assert not count or printed.count("\n") == count


def test_steps_that_a_live_run_removes_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4, 6):
        saved(tmp_path, step)
    (tmp_path / lock.NAME).touch()
    monkeypatch.setattr(state_cli, "REMOVAL", 0)
    (tmp_path / "step_2/state.json").unlink()
    damaged = state_cli.damaged

    def removed(of: checkpoint.Checkpoint) -> Iterator[str]:
        if of.step == 4:
            for old in (2, 4):
                shutil.rmtree(tmp_path / f"step_{old}", ignore_errors=True)
        yield from damaged(of)

    monkeypatch.setattr(state_cli, "damaged", removed)
    assert state_cli.verify(tmp_path) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path / 'step_6'}: whole") and not printed.err
    saved(tmp_path, 4)
    with pytest.raises(BadInput, match="a run has removed what was read here; type the same command again"):
        state_cli.verify(tmp_path / "step_4")


def test_what_is_no_folder_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = saved(tmp_path)
    file, out = step / "state.json", tmp_path / "again/step_4"
    give = "give OUT of a run, or one of its folders step_N"
    assert command(monkeypatch, "verify", "") == f"'': no folder was given; {give}"
    for name in ("verify", "show"):
        assert command(monkeypatch, name, file) == f"{file}: is a file; {give}"
        assert command(monkeypatch, name, tmp_path / "no") == f"{tmp_path / 'no'}: no such folder; {give}"
    monkeypatch.chdir(step)
    monkeypatch.setattr(sys, "argv", ["state", "verify", "."])
    assert state_cli.main() == 0
    line = command(monkeypatch, "reshard", tmp_path, out, "--pieces", 1)
    assert line == f"{tmp_path}: is not a step but holds some; give one of its folders step_N, such as {step}"
    assert command(monkeypatch, "reshard", file, out, "--pieces", 1) == f"{file}: is a file; give a folder step_N of a run"
    assert not out.parent.exists()


# ---- python -m scripts.bench_state -----------------------------------------------------------------------------------


def test_what_a_rank_writes_falls_with_their_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_state.count(RECIPES / "gpt/configs/tiny.yaml") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    rows = [line.split() for line in lines if line.startswith("ZeRO 3")]
    assert [row[2] for row in rows] == ["1", "2", "4", "8", "512"]
    written = [float(row[3].replace(",", "")) for row in rows]
    assert all(0.9 < written[0] / (world * one) < 1.1 for world, one in zip((1, 2, 4, 8), written, strict=False))
    # 175 billion parameters of 12 bytes, and the shares of the largest parameters that 512 does not divide
    assert 12 * 174.6e3 / 512 < written[-1] < 1.01 * 12 * 174.6e3 / 512


WTE = 4 * 50257 * 768  # bytes of the largest parameter of gpt3_125m


@pytest.mark.slow
@pytest.mark.parametrize(("command", "lines", "beside"), [("recut", 6, 4), ("weights", 12, 4 + WTE / pieces.LARGEST)])
def test_a_state_of_four_ranks_is_read_by_two(command: str, lines: int, beside: float) -> None:
    """beside: multiples of pieces.LARGEST that a rank may need beside its share. A rank draws and exports whole parameters."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench_state", command, "recipes/gpt/configs/gpt3_125m.yaml"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count(" 0 of ") == 2, done.stdout + done.stderr
    found = [float(mb) for mb in re.findall(r"([\d.]+) MB beside it", done.stdout)]
    assert len(found) == lines and max(found) < beside * pieces.LARGEST / 1e6
