"""What T5 refuses besides GPT's list (test_bad_input.py): corpora, objectives, folders to begin from, layouts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_bad_input import Try, attempt, place, refused  # noqa: F401 (fixtures)

from common import families
from common.data.indexed_dataset import IndexedDatasetWriter, write_manifest

TEXT = """\
model: {arch: t5_v1_1, layers: 2, decoder_layers: 1, hidden: 32, heads: 2, ffn: 64}
data: {train: spans/train, valid: spans/valid, seq_len: 64, target_len: 16}
optim: {lr: 1.0e-3, warmup_steps: 2}
train: {steps: 4, global_batch: 6}
baseline: {micro_batch: 2}
deepspeed: {micro_batch: 2, zero_stage: 1}
megatron: {micro_batch: 2}
"""


@pytest.fixture
def home(place: Path, spans: Path) -> Path:  # noqa: F811
    """The folder one stands in: t5.yaml and its corpus, `spans`."""
    (place / "t5.yaml").write_text(TEXT)
    shutil.copytree(spans, place / "spans")
    return place


def of_sequences(prefix: Path, lengths: list[int]) -> None:
    """A corpus of the same tokenizer, whose documents are of so many sequences."""
    manifest = json.loads((prefix.parent / "train.json").read_text())
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for count in lengths:
        writer.add_sentences([np.arange(100, 112)] * count)
    writer.finish()
    keep = ("tokenizer", "tokenizer_hash", "tokenizer_size")
    write_manifest(prefix, {key: manifest[key] for key in keep} | {"eod_id": None, "sentences": sum(lengths)})


def bert_tokenizer(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def folder(home: Path, **changes: object) -> None:
    """hf: config.json of the very model with `changes`, and another model's weights."""
    words = {"num_layers": 2, "num_decoder_layers": 1, "d_model": 32, "num_heads": 2, "d_kv": 16, "d_ff": 64, "vocab_size": 768,
             "feed_forward_proj": "gated-gelu"}  # fmt: skip
    (home / "hf").mkdir()
    hf_config = {"model_type": "t5", **words, "tie_word_embeddings": False} | changes
    (home / "hf/config.json").write_text(json.dumps(hf_config))
    save_file({"other": np.zeros(1, np.float32)}, home / "hf/model.safetensors")


REFUSED = [  # name, what is done, overrides, messages: one entry per line
    ("a corpus of BPE", None, "data.train=corpus/train data.valid=null",
     ["corpus/train: its tokenizer is not known, so the sentinels are not either; give data.tokenizer=DIR"]),
    ("three sequences", lambda h: of_sequences(h / "spans/three", [3, 3]), "data.train=spans/three",
     ["spans/three: has documents of several sequences, but not of two (input, target); build it"]),
    ("no manifest", lambda h: [(h / f"spans/{n}.json").unlink() for n in ("train", "valid")], "",
     ["spans/train: its tokenizer is not known", "spans/valid: its tokenizer is not known"]),
    ("targets that do not fit", None, "data.target_len=10",
     ["data.target_len=10: spans of data.seq_len=64 make 14 tokens; give 14"]),
    ("inputs of two tokens", None, "data.seq_len=2", ["data.seq_len=2: objective.kind=span needs 3 or more"]),
    ("a prefix of one token", None, "objective.kind=prefix data.target_len=1",
     ["data.target_len=1: objective.kind=prefix needs 2 or more"]),
    ("a distance within the buckets", None, "model.max_distance=16",
     ["model.max_distance=16: must be above half of model.buckets=32"]),
    ("an input that no corpus fills", None, "data.seq_len=200000000 data.target_len=50000000",
     ["data.seq_len=200000000: a sample has"]),
    ("the tokenizer of BERT", lambda h: bert_tokenizer(h / "words"), "data.tokenizer=words",
     ["data.tokenizer=words: its tokenizer has no </s> or no sentinels"]),
    ("no such tokenizer", None, "data.tokenizer=nowhere", ["nowhere"]),
    ("too many spans", None, "data.seq_len=4096 data.target_len=1000", ["data.seq_len=4096: a sample has"]),
    ("no target_len", lambda h: (h / "t5.yaml").write_text(TEXT.replace(", target_len: 16", "")), "",
     ["data.target_len: is missing; add it, or give data.target_len=VALUE on the command line"]),
    ("no noise", None, "objective.noise_density=0", ["objective.noise_density=0: should be greater than 0"]),
    ("noise alone", None, "objective.noise_density=1", ["objective.noise_density=1: should be less than 1"]),
    ("spans of less than a token", None, "objective.mean_noise_span_length=0.5", ["_length=0.5: should be greater"]),
    ("unknown objective", None, "objective.kind=mlm", ["objective.kind=\"mlm\": should be 'span' or 'prefix'"]),
    ("unknown architecture", None, "model.arch=t5_1_1", ["model.arch=\"t5_1_1\": should be 't5' or 't5_v1_1'"]),
    ("fp16", None, "train.dtype=fp16", ["train.dtype=\"fp16\": should be 'fp32' or 'bf16'"]),
    ("a key of BERT", None, "objective.pair=nsp", ["objective.pair: unknown key"]),
    ("a vocabulary below the tokenizer's", None, "model.vocab_size=128",
     ["data.train: spans/train holds token id", "data.valid: spans/valid holds token id",
      "model.vocab_size=128 is below the tokenizer's 700 ids"]),
    ("a folder of T5 1.0", lambda h: folder(h, feed_forward_proj="relu", tie_word_embeddings=True), "init.from=hf",
     [f"init.from=hf: its config.json has {key}, the model gives {value!r}" for key, value in (
         ("feed_forward_proj='relu'", "gated-gelu"), ("dense_act_fn='relu'", "gelu_new"), ("is_gated_act=False", True),
         ("scale_decoder_outputs=True", False))]),
    ("a folder of scaled logits", lambda h: folder(h, scale_decoder_outputs=True), "init.from=hf",
     ["init.from=hf: its config.json has scale_decoder_outputs=True, the model gives False"]),
    ("a folder of another depth", lambda h: folder(h, num_decoder_layers=2), "init.from=hf",
     ["init.from=hf: its config.json has num_decoder_layers=2, the model gives 1"]),
    ("a folder of GPT", lambda h: folder(h, model_type="gpt2"), "init.from=hf",
     ["init.from=hf: is a 'gpt2' model, the config's model.arch is 't5_v1_1' ('t5' in its config.json)"]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "overrides", "messages"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_corpora_keys_and_folders(damage, overrides: str, messages: list[str], home: Path, attempt: Try) -> None:  # noqa: F811
    if damage:
        damage(home)
    refused(home, lambda: attempt(*overrides.split(), config="t5.yaml", family="t5"), *messages)


LAYOUTS = [
    ("deepspeed", 2, "deepspeed.sp=2", "deepspeed.sp=2: transformers computes T5's relative biases of all heads"),
    ("deepspeed", 1, "optim.optimizer=adafactor", "optim.optimizer=adafactor with deepspeed.zero_stage=1: it keeps the mean"),
    ("deepspeed", 2, "optim.optimizer=adafactor deepspeed.zero_stage=0 deepspeed.tp=2", "optim.optimizer=adafactor with deep"),
    ("megatron", 1, "optim.optimizer=adafactor", "optim.optimizer=adafactor on megatron: it keeps the mean squares"),
    (
        "deepspeed",
        2,
        "deepspeed.pp=2",
        "deepspeed.pp=2: a layer of DeepSpeed's pipeline sees only what the one before it returns",
    ),
    ("megatron", 1, "megatron.vpp=2", "megatron.vpp=2: megatron-core no longer splits an encoder and a decoder over pipeline"),
    ("megatron", 2, "megatron.pp=2", "megatron.pp=2: megatron-core no longer splits an encoder and a decoder over pipeline"),
    ("megatron", 2, "megatron.cp=2", "megatron.cp=2: megatron-core's T5 cuts no sequence among ranks, and its relative biases"),
    ("megatron", 3, "megatron.tp=3 model.ffn=66", "megatron.tp=3 does not divide model.heads=2"),
    ("megatron", 2, "megatron.tp=2 megatron.sequence_parallel=true data.target_len=15", "does not divide data.target_len=15"),
    ("megatron", 1, "megatron.transformer_engine=true", "megatron.transformer_engine=true: T5's relative biases and norms"),
]


@pytest.mark.parametrize(("stack", "nproc", "overrides", "message"), LAYOUTS, ids=[f"{r[0]} {r[2]}" for r in LAYOUTS])
def test_layouts(stack, nproc, overrides, message, home: Path, attempt: Try) -> None:  # noqa: F811
    refused(home, lambda: attempt(*overrides.split(), config="t5.yaml", family="t5", stack=stack, nproc=nproc), message)


def test_the_config_itself_starts(home: Path, attempt: Try) -> None:  # noqa: F811
    for stack in families.stacks("t5"):
        attempted = attempt(config="t5.yaml", family="t5", stack=stack, nproc=1)
        assert (attempted.code, attempted.started) == (0, True), attempted.lines
