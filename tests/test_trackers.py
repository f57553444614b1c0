"""Where the values of a run go beside metrics.jsonl: TensorBoard, CSV files, Weights & Biases."""

import csv
import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, case, finished, losses

from common import preflight
from common.errors import BadInput
from common.training import trackers
from recipes.gpt import task


def rows(path: Path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_and_its_continuation(drive, settings: list[str], tmp_path: Path) -> None:
    """log.csv is turned on by the continuation: it has every step all the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*settings, "optim.decay_steps=6", "train.eval_every=2"]
    drive([
        case("baseline", "tiny", tmp_path / "run", [*words, "train.steps=3"]),
        case("megatron", "tiny", tmp_path / "run", [*words, "train.steps=6", "log.csv=true"]),
    ], 1)  # fmt: skip
    out = finished(tmp_path / "run")
    logged = lines(out)
    assert rows(out / "train.csv") == [line for line in logged if "loss" in line] and sorted(losses(out)) == list(range(1, 7))
    assert rows(out / "valid.csv") == [line for line in logged if "valid_loss" in line]

    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert set(board.Tags()["scalars"]) == {*trackers.GROUPS.values()}
    assert [event.step for event in board.Scalars("loss/train")] == list(range(1, 7))
    assert board.Scalars("loss/train")[0].value == pytest.approx(losses(out)[1]["loss"])
    texts = {tag: board.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in board.Tags()["tensors"]}
    assert "| stack | megatron |" in texts["run/model/text_summary"] and "layers: 4" in texts["run/config/text_summary"]


@pytest.mark.parametrize(("name", "tag"), [
    ("loss", "loss/train"), ("masked_lm_loss", "loss/masked_lm_loss"), ("valid_loss", "loss/valid"), ("valid_f1", "valid/f1"),
    ("tokens_per_s", "speed/tokens_per_s"), ("mem_bytes", "memory/peak_bytes"),
])  # fmt: skip
def test_curves_are_grouped(name: str, tag: str) -> None:
    assert trackers.grouped(name) == tag


def prepared(tmp_path: Path, settings: list[str]) -> Any:
    words = [*settings, "log.wandb=trial", "train.steps=4"]
    return preflight.prepare(str(ROOT / "recipes/gpt/configs/tiny.yaml"), str(tmp_path / "run"), words, "baseline", task, 1)


def test_wandb_that_is_not_installed_is_refused(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest))
    with pytest.raises(BadInput, match="log.wandb=trial: wandb is not installed; type bash scripts/setup.sh wandb"):
        prepared(tmp_path, settings)


def records(content: bytes) -> Iterator[bytes]:
    """Those of a .wandb file: LevelDB's log (doc/log_format.md there) behind a header of 7 bytes."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # the rest of a block
            place += 32768 - place % 32768
        _, size, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_offline(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, without network: what it has written is read back."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = prepared(tmp_path, settings)
    run.record["id"] = "abc123"
    run.out.mkdir()
    tracker = trackers.WandB(run, {"model": "a model"})
    for step in (1, 2):
        tracker.write(step, {"loss": 3.0 - step, "ms": 12.5})
    tracker.write(2, {"valid_loss": 0.5})
    tracker.close()
    [file] = (tmp_path / "run/wandb").glob("offline-run-*-abc123/run-abc123.wandb")
    history, started = {}, None
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            started = record.run
        if record.HasField("history"):
            values = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            history[values["_step"]] = values
    assert (started.project, started.display_name, started.notes) == ("trial", "run", "a model")
    assert {step: values["loss/train"] for step, values in history.items()} == {1: 2.0, 2: 1.0}
    assert history[2]["loss/valid"] == 0.5 and history[1]["speed/ms"] == 12.5


def test_wandb_without_a_key_is_one_line(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(wandb.Error("no\nkey")))
    run = prepared(tmp_path, settings)
    run.record["id"] = "abc123"
    with pytest.raises(BadInput, match="^log.wandb=trial: no key; WANDB_MODE=offline keeps the run on this disk$"):
        trackers.WandB(run, {"model": ""})
