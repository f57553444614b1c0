"""Evaluation of language models: protocols against their published constants and plain references, real runs, many ranks."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import case
from hypothesis import given, strategies as st
from transformers import GPT2LMHeadModel

from common.data import tokenizer as tokenizers
from common.errors import BadInput
from common.evaluation import language
from tests import warm


@given(st.integers(2, 3000), st.integers(2, 600), st.integers(1, 600))
def test_every_token_but_the_first_is_scored_once(tokens: int, length: int, step: int):
    windows = language.overlapping(tokens, length, min(step, length))
    scored = [t for w in windows for t in range(w.start + w.first + 1, w.start + w.length + 1)]
    assert scored == list(range(1, tokens))
    assert all(w.length <= length for w in windows)
    assert all(w.first == w.length - step for w in windows[1:-1] if step <= length)


@given(st.integers(2, 3000), st.integers(2, 600))
def test_windows_apart_predict_all_but_their_first(tokens: int, length: int):
    """End to end, without the target that stands in the next."""
    windows = language.overlapping(tokens, length, length)
    scored = [range(w.start + 1, w.start + w.length + 1) for w in windows]
    assert [t for within in scored for t in within[: length - 1]] == [t for t in range(tokens) if t % length]
    assert [t for within in scored for t in within[length - 1 :]] == [t for t in range(1, tokens) if t % length == 0]


def test_published_constants(source: Path):
    """T_o of Megatron-LM (arXiv:1909.08053, appendix E), and LAMBADA's lines."""
    words = (source / "wikitext2/wiki.test.tokens").read_text(encoding="utf-8")
    assert language.words_of(words) == language.WIKITEXT_WORDS == 245_566
    assert len(language.lambada(source / "lambada/lambada_test.jsonl")) == 5153


@pytest.mark.parametrize("name", ["wiki.test.tokens", "wiki.test.raw"])
def test_the_hubs_rows_are_the_file(name: str, source: Path):
    """Salesforce/wikitext: one row per line, '' where the line is blank."""
    text = (source / "wikitext2" / name).read_text(encoding="utf-8")
    rows = [line if line.strip() else "" for line in text.splitlines(keepends=True)]
    assert "" in rows and language.of_hub(rows) == text


@pytest.mark.parametrize("text", ["", '{"text": ""}', '{"text": 5}', '{"text": "one"}', '{"word": "a b"}', "[1]", "{"])
def test_passages_that_are_none(text: str, tmp_path: Path):
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "two words"}\n' * bool(text) + text)
    with pytest.raises(BadInput, match="not JSON lines with a `text` of two words or more each"):
        language.lambada(tmp_path / "lambada_test.jsonl")


DETOKENIZED = {
    "the players ' union": "the players' union",
    "a 12 @-@ year @-@ old with 1 @,@ 000 or 2 @.@ 5": "a 12-year-old with 1,000 or 2.5",
    "one , two ; three : four . Five ! six ? end": "one, two; three: four. Five! six? end",
    "both . , and": "both., and",
    "( in brackets ) [ square ] { curly }": "(in brackets) [square] {curly}",
    "said \" so \" and ' in '": "said \"so\" and 'in'",
    " = = = Third = = = \n": " === Third ===\n",
    "at 5 ° C": "at 5°C",
    "line \n next": "line\nnext",
    "it 's N now": "it's 1 now",
}


@pytest.mark.parametrize("words", DETOKENIZED)
def test_words_become_running_text(words: str):
    assert language.detokenized(words) == DETOKENIZED[words]


def test_last_word():
    assert language.last_word("He said hello to Ann") == ("He said hello to", " Ann")
    assert language.last_word("to be or to  \n be ") == ("to be or to", " be")


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(drive, settings, tmp_path_factory) -> Path:
    """OUT of a Megatron run with tp 2, which nobody has converted; 32 tokens per sample."""
    out = tmp_path_factory.mktemp("evaluated") / "tp2"
    drive([case("megatron", "tiny", out, [*settings, "train.steps=3", "megatron.tp=2"])], 2)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Files named as the protocols name theirs: 6 kB of Python's own text."""
    folder = tmp_path_factory.mktemp("texts")
    text = Path(json.__file__).read_text(encoding="utf-8")
    (folder / "wiki.test.tokens").write_text(f" = Title = \n {text[:5000]} it 's 1 @,@ 000 . \n", encoding="utf-8")
    (folder / "wiki.test.raw").write_text(text[:6000], encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if len(line.split()) > 4][:21]
    (folder / "lambada_test.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    return folder


def evaluate(*arguments: object, ranks: int = 0, code: int = 0) -> str:
    """What the command printed, on one process or as many ranks as are given."""
    done = warm.run(["-m", "scripts.evaluate", *arguments], nproc=ranks, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


TASKS = ("wikitext103", "wikitext2-raw", "lambada")


@pytest.fixture(scope="module")
def results(run: Path, data: Path) -> dict[tuple[str, str], dict]:
    output = evaluate(run, *TASKS, "--data", data, "--batch", 4)
    assert f"results   {run}/eval.json" in output
    return by_metric(run)


def by_metric(out: Path) -> dict[tuple[str, str], dict]:
    rows = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    assert all(row.keys() == {"task", "metric", "value", "n", "protocol"} for row in rows)
    by_name = {(row["task"], row["metric"]): row for row in rows}
    assert len(by_name) == len(rows)
    return by_name


def test_values_are_those_of_a_reference_loop(run: Path, data: Path, results):
    net = GPT2LMHeadModel.from_pretrained(run / "hf").eval()
    words = tokenizers.load(run / "hf")
    length = net.config.n_positions

    def loss(ids: list[int], label_from: int) -> torch.Tensor:
        """Losses of the targets ids[label_from:]."""
        given = torch.tensor([ids])
        logits = net(given[:, :-1]).logits[0, label_from - 1 :]
        return torch.nn.functional.cross_entropy(logits, given[0, label_from:], reduction="none").double()

    raw = (data / "wiki.test.raw").read_text(encoding="utf-8")
    ids = words.encode(raw)
    with torch.no_grad():
        plain = [loss(ids[i : i + length], 1) for i in range(0, len(ids), length) if len(ids[i : i + length]) > 1]
        total, count = torch.cat(plain).sum().item(), sum(map(len, plain))
        assert math.isclose(results["wikitext2-raw", "token_perplexity"]["value"], math.exp(total / count), rel_tol=1e-6)
        every = [loss(ids[i : i + length + 1], 1) for i in range(0, len(ids) - 1, length)]
        assert sum(map(len, every)) == len(ids) - 1 > count
        bits = torch.cat(every).sum().item() / math.log(2) / len(raw.encode())
        assert math.isclose(results["wikitext2-raw", "bits_per_byte"]["value"], bits, rel_tol=1e-6)

        text = (data / "wiki.test.tokens").read_text(encoding="utf-8")
        ids, pieces = words.encode(language.detokenized(text)), len(text.strip().split(" "))
        total = 0.0
        for target in range(1, len(ids)):  # each token from the window in which it is among the last 32
            end = length if target <= length else length + -(-(target - length) // 32) * 32
            start = max(0, end - length)
            total += loss(ids[start : target + 1], target - start).item()
        value = results["wikitext103", "word_perplexity"]
        assert math.isclose(value["value"], math.exp(total / (pieces - 1)), rel_tol=1e-5) and value["n"] == pieces - 1
        assert f"T_o {pieces:,}, T {len(ids):,}; not the published test file" in value["protocol"]

        right, last = [], []
        for line in (data / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"]
            context, word = text.rsplit(None, 1)
            ids, label = words.encode(context.strip()), words.encode(" " + word)
            right.append(net(torch.tensor([ids + label])).logits[0, len(ids) - 1 : -1].argmax(-1).tolist() == label)
            ids = words.encode(text)
            last.append(net(torch.tensor([ids[:-1]])).logits[0, -1].argmax().item() == ids[-1])
    assert results["lambada", "accuracy"]["value"] == sum(right) / len(right)
    assert results["lambada", "last_token_accuracy"]["value"] == sum(last) / len(last)
    lines = [json.loads(line) for line in (run / "predictions/lambada.jsonl").read_text().splitlines()]
    assert [line["right"] for line in lines] == right


def test_a_beginning_of_text_stands_first_in_every_window(run: Path, data: Path, tmp_path: Path):
    """Against a reference loop: every token is predicted once, the first of a window from the beginning alone."""
    evaluate(run, "wikitext2-raw", "wikitext103", "--bos", "--data", data, "--batch", 4, "--out", tmp_path)
    scores, words = by_metric(tmp_path), tokenizers.load(run / "hf")
    net = GPT2LMHeadModel.from_pretrained(run / "hf").eval()
    length, raw = net.config.n_positions, (data / "wiki.test.raw").read_text(encoding="utf-8")
    total, ids = 0.0, words.encode(raw)
    with torch.no_grad():
        for begin in range(0, len(ids), length):
            targets = torch.tensor(ids[begin : begin + length])
            logits = net(torch.tensor([[words.eod_id, *targets[:-1].tolist()]])).logits[0]
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    for metric, expected, n in (
        ("token_perplexity", math.exp(total / len(ids)), len(ids)),
        ("bits_per_byte", total / math.log(2) / len(raw.encode()), len(raw.encode())),
    ):
        row = scores["wikitext2-raw", metric]
        assert math.isclose(row["value"], expected, rel_tol=1e-6) and row["n"] == n
        assert ", <|endoftext|> first in every window" in row["protocol"]
    row = scores["wikitext103", "word_perplexity"]
    assert row["n"] == language.words_of((data / "wiki.test.tokens").read_text(encoding="utf-8"))
    assert ", <|endoftext|> first in every window" in row["protocol"]


def test_two_ranks_give_what_one_gives(run: Path, data: Path, results, tmp_path: Path):
    evaluate(run, *TASKS, "--data", data, "--batch", 4, "--out", tmp_path, ranks=2)
    assert by_metric(tmp_path) == results
    assert (tmp_path / "predictions/lambada.jsonl").read_bytes() == (run / "predictions/lambada.jsonl").read_bytes()


def test_a_part_says_so_and_stands_beside_the_whole(run: Path, data: Path, results, tmp_path: Path):
    (tmp_path / "eval.json").write_text((run / "eval.json").read_text())
    evaluate(run, "lambada", "wikitext2-raw", "--data", data, "--limit", 3, "--out", tmp_path, "--batch", 4)
    rows = json.loads((tmp_path / "eval.json").read_text())
    assert len(rows) == len(results) + 3  # bits per byte of a part is not known
    evaluate(run, "wikitext103", "--data", data, "--limit", 2, "--out", tmp_path / "part", "--batch", 4)
    assert [row["metric"] for row in json.loads((tmp_path / "part/eval.json").read_text())] == ["token_perplexity"]
    assert any(row["protocol"] == "lambada-strict, the first 3 of 21 passages, step 3" and row["n"] == 3 for row in rows)


REFUSED = [
    (["nosuch"], "nosuch: no such task; there is wikitext103, wikitext2, wikitext2-raw, lambada, text"),
    (["text"], "text: give the file to evaluate on: --data FILE"),
    (["lambada", "--data", "recipes"], "--data recipes: holds no lambada/lambada_test.jsonl and no lambada_test.jsonl"),
    (["lambada", "--data", "none"], "--data none: no such file or folder"),
    (["text", "--data", "README.md", "--seq-len", "4096"], "--seq-len 4096: the model has 64 positions; give at most 64"),
    (["text", "--data", "README.md", "--batch", "0"], "--batch 0: must be 1 or more"),
    (["lambada", "--bos", "--data", "README.md"], "--bos: is for perplexities, and lambada has none; leave it out"),
    (["text", "--data", "x" * 300], f"{'x' * 100}...: File name too long; give a path whose parts are shorter"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED])
def test_what_is_refused(arguments: list[str], message: str, run: Path):
    lines = evaluate(run, *arguments, code=2).splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {message}"), lines


def test_a_corpus_is_not_a_text(run: Path, tmp_path: Path):
    (tmp_path / "valid.idx").touch()
    message = f"--data {tmp_path}/valid: is a tokenized corpus, and text takes text; give a text file, or score the run on its "
    assert message in evaluate(run, "text", "--data", tmp_path / "valid", code=2)


def test_an_eval_json_that_is_none_is_kept(run: Path, data: Path, tmp_path: Path):
    (tmp_path / "eval.json").write_text("my notes")
    output = evaluate(run, "lambada", "--data", data, "--out", tmp_path, code=2)
    assert "eval.json: is not a list of results; move it away" in output
    assert (tmp_path / "eval.json").read_text() == "my notes"


def test_folders_that_are_no_language_model(run: Path, tmp_path: Path):
    assert "no config.json and no run.json there" in evaluate(tmp_path, "lambada", code=2)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"]}))
    lines = evaluate(tmp_path, "lambada", code=2).splitlines()
    expected = ["is BertForMaskedLM, and these tasks", "holds no tokenizer", "no *.safetensors there"]
    expected = [f"error: {tmp_path}: {words}" for words in expected]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "run.json").write_text(json.dumps({"family": "gpt"}))
    assert "python -m recipes.gpt.convert to-hf" in evaluate(unfinished, "lambada", code=2)


def test_weights_that_are_not_the_models_are_refused(run: Path, data: Path, tmp_path: Path):
    """transformers begins what is lacking at random, drops what is too much, and says nothing that is heard."""
    folder = tmp_path / "hf"
    shutil.copytree(run / "hf", folder)
    (folder / "twinstack.json").unlink()  # what is changed on purpose
    stored = json.loads((folder / "config.json").read_text())
    text = [folder, "text", "--data", data / "wiki.test.raw", "--limit", 1]
    for change, message in (
        ({"n_layer": stored["n_layer"] + 1}, f"lack transformer.h.{stored['n_layer']}.attn.c_attn.bias and 11 more"),
        ({"n_layer": stored["n_layer"] - 1}, f"hold transformer.h.{stored['n_layer'] - 1}.attn.c_attn.weight and 10 more"),
        ({"n_positions": 8}, "its transformer.wpe.weight is (64, 64), by its config.json (8, 64)"),
    ):
        (folder / "config.json").write_text(json.dumps(stored | change))
        assert message in evaluate(*text, "--out", tmp_path / "out", code=2) and not (tmp_path / "out").exists()
    done = warm.run(["-m", "scripts.generate", folder])
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    for change, message in (({"architectures": 5}, "is of no class"), ({"n_layer": "x"}, "n_layer")):
        (folder / "config.json").write_text(json.dumps(stored | change))
        assert message in (error := evaluate(*text, code=2)) and "Traceback" not in error
    (folder / "config.json").write_text("[" * 100_000)
    assert "its config.json cannot be read" in evaluate(*text, code=2)


def test_json_is_all_that_is_printed(run: Path, data: Path, tmp_path: Path):
    printed = evaluate(run, "lambada", "--data", data, "--limit", 2, "--json", "--out", tmp_path)
    assert json.loads(printed) == json.loads((tmp_path / "eval.json").read_text())


def test_where_results_cannot_go(run: Path, data: Path, tmp_path: Path):
    (tmp_path / "a/eval.json").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/predictions").touch()
    for out, message in (("a", "Is a directory"), ("b", "is in the way, not a folder"), ("b/predictions/c", "is not a folder")):
        assert message in evaluate(run, "lambada", "--data", data, "--out", tmp_path / out, code=2)


def test_generate_streams_the_same_text_from_the_run_and_its_export(run: Path):
    texts = []
    for given_model in (run, run / "hf"):
        done = warm.run(["-m", "scripts.generate", given_model, "--prompt", "def ", "--tokens", 12], timeout=100)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout.split("\n", 1)[1])
    assert texts[0] == texts[1] and texts[0].startswith("def ") and len(texts[0]) > 6
