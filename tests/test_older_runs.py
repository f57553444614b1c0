"""Runs, exports and configs of an earlier version: keys that have other names now.

tests/files/bert_run_of_a374757.tar.gz is what commit a374757 made: a corpus of random words, tiny.yaml, and OUT of
`bash recipes/bert/baseline/pretrain.sh tiny.yaml out` (without tensorboard/), two steps and a phase of two more.
"""

import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, Drive, losses
from test_bad_input import Try, attempt, place, refused  # noqa: F401 (fixtures)

from common import config, preflight
from common.checkpoints import checkpoint, integrity, run_record
from common.errors import BadInput
from common.huggingface import interchange
from common.launch import lock
from recipes.bert import finetune as bert_finetune, task
from recipes.gpt import finetune as gpt_finetune
from recipes.t5 import finetune as t5_finetune, task as t5

OLD_NAMES = {"mask_share": "masked_lm_prob", "short_share": "short_seq_prob"}


@pytest.fixture
def older(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The folder one stands in: old.yaml as it was, tiny.yaml with the names of today, the corpus, and OUT."""
    with tarfile.open(ROOT / "tests/files/bert_run_of_a374757.tar.gz") as archive:
        archive.extractall(place, filter="data")
    text = (place / "tiny.yaml").read_text()
    (place / "old.yaml").write_text(text)
    for old, new in OLD_NAMES.items():
        text = text.replace(old, new)
    (place / "tiny.yaml").write_text(text)
    return place


def test_an_older_run_goes_on(older: Path, drive: Drive) -> None:
    """From step 2 on: the losses that the earlier version had, in the phase whose key had another name."""
    before = losses(older / "out")
    shutil.rmtree(older / "out/step_4")
    shutil.rmtree(older / "out/hf")
    words = {"module": "recipes.bert.baseline.pretrain", "config": str(older / "tiny.yaml"), "out": str(older / "out")}
    paths = [f"data.train={older}/train", f"data.valid={older}/valid"]
    drive([words | {"overrides": paths, "expect": 0}], 1)
    after = losses(older / "out")
    assert [after[step]["loss"] for step in (3, 4)] == pytest.approx([before[step]["loss"] for step in (3, 4)], abs=1e-6)
    recorded = checkpoint.latest(older / "out").hyperparameters
    assert (recorded["objective.masked_lm_prob"], recorded["phases"]) == (0.2, [{"objective.masked_lm_prob": 0.4}])
    assert integrity.problems(older / "out/hf", "hf") == []


def test_a_finished_older_run_is_finished(older: Path) -> None:
    run = preflight.prepare("tiny.yaml", "out", [], "baseline", task, 1)
    assert run_record.finished(run) == "complete: out is at its last step, 4; its export is out/hf"
    run_record.begin(run)
    lock.release()
    assert "masked_lm_prob" in (older / "out/config.yaml").read_text()


def test_other_values_of_a_renamed_key_are_another_run(older: Path) -> None:
    with pytest.raises(BadInput, match=re.escape("objective.masked_lm_prob was 0.2, is 0.3; choose another OUT")):
        preflight.prepare("tiny.yaml", "out", ["objective.masked_lm_prob=0.3"], "baseline", task, 1)


def test_an_older_run_is_exported_and_its_export_read(older: Path) -> None:
    interchange.to_hf(older / "out", older / "again", task)
    old, new = (json.loads((older / folder / "twinstack.json").read_text()) for folder in ("out/hf", "again"))
    assert new["files"]["model.safetensors"] == old["files"]["model.safetensors"]
    assert integrity.problems(older / "out/hf", "hf") == []
    run = preflight.prepare("tiny.yaml", "other", ["init.from=out/hf"], "baseline", task, 1)
    assert run.record["init"] == {"id": old["id"], "step": 4}


def test_an_older_config_is_refused_with_the_new_names(older: Path, attempt: Try) -> None:  # noqa: F811
    refused(
        older, lambda: attempt(config="old.yaml", out="new", family="bert"),
        "old.yaml: objective.mask_share: this key is called objective.masked_lm_prob now; give objective.masked_lm_prob=0.2",
        "old.yaml: objective.short_share: this key is called objective.short_seq_prob now; give objective.short_seq_prob=0.0",
    )  # fmt: skip
    refused(
        older, lambda: attempt("phases=[{train.steps: 4, objective.mask_share: 0.4}]", out="new", family="bert"),
        "tiny.yaml: phases[0]: objective.mask_share: this key is called objective.masked_lm_prob now",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "path", "override", "now"),
    [
        (task, "bert/configs/tiny", "objective.short_share=0.5", "objective.short_seq_prob=0.5"),
        (t5, "t5/configs/tiny", "objective.noise_share=0.2", "objective.noise_density=0.2"),
        (t5, "t5/configs/tiny", "objective.mean_span=2", "objective.mean_noise_span_length=2"),
        (t5_finetune, "t5/configs/finetune_xsum", "task.write_batch=8", "task.generation_batch_size=8"),
        (gpt_finetune, "gpt/configs/finetune_sft", "task.answer_tokens=64", "task.max_new_tokens=64"),
    ],
)
def test_an_override_of_an_older_key_names_the_new_one(schema: object, path: str, override: str, now: str) -> None:
    old, new = override.partition("=")[0], now.partition("=")[0]
    with pytest.raises(BadInput, match=re.escape(f"{old}: this key is called {new} now; give {now}")):
        config.load(ROOT / f"recipes/{path}.yaml", [override, "init.from=scratch"], schema.Config)


def test_a_finetuned_bert_of_an_earlier_version(tmp_path: Path) -> None:
    """model.kind=text is model.task_type=sequence_classification now: the same run, by its config.yaml and its state.json."""
    text = "model: {layers: 1, hidden: 8, heads: 1, positions: 16, vocab_size: 128, KEY, labels: ['0', '1']}\n"
    text += "task: {name: sst2}\ndata: {seq_len: 16}\noptim: {lr: 1.0e-4}\ntrain: {steps: 1, global_batch: 1}\n"
    (tmp_path / "config.yaml").write_text(text.replace("KEY", "kind: text"))
    (tmp_path / "now.yaml").write_text(text.replace("KEY", "task_type: sequence_classification"))
    cfg = config.load(tmp_path / "now.yaml", ["data.length_window=0"], bert_finetune.Config)
    assert config.recorded(tmp_path / "config.yaml", bert_finetune.Config) == cfg
    before = config.hyperparameters(cfg) | {"model.kind": "text"}
    last = checkpoint.Checkpoint(tmp_path / "step_1", {"step": 1, "science": before})
    assert preflight._continues(cfg, last) == []
    assert preflight._continues(cfg, last._replace(meta={"step": 1, "science": before | {"task.name": "cola"}})) != []
    with pytest.raises(BadInput, match="model.kind"):
        config.load(tmp_path / "config.yaml", [], bert_finetune.Config)
