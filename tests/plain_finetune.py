"""The reference loop for finetuning BERT: one process, the classes, tokenizer and losses of transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from common import config
from common.data.sampler import epoch_key, permute
from common.evaluation import glue
from common.training import init, optim
from recipes.bert import finetune
from tests.plain import clip

Encode = Callable[[list[int]], dict[str, torch.Tensor]]  # numbers of examples -> what the class takes


def losses(path: Path, overrides: list[str], auto: str, outputs: int, size: int, encode: Encode) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of each step: the whole global batch at once, padded to its longest. size: of the
    training set."""
    cfg = config.load(path, overrides, finetune.Config)
    folder = cfg.init.from_
    shapes = AutoConfig.from_pretrained(folder)
    shapes.num_labels = outputs
    shapes.hidden_dropout_prob = shapes.attention_probs_dropout_prob = cfg.model.dropout
    shapes.pad_token_id = None  # its row of the embedding gets a gradient in Megatron too
    net = getattr(transformers, auto).from_pretrained(folder, config=shapes).train()
    draw = init.scratch(cfg.train.seed, lambda name: "zeros" if name.endswith("bias") else 0.02)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith(("classifier.", "qa_outputs.", "bert.pooler.")):  # the folders hold none of them
                parameter.copy_(draw(name, parameter.shape))
    optimizer = torch.optim.AdamW(
        [{"params": [p for n, p in net.named_parameters() if p.dim() > 1], "weight_decay": cfg.optim.weight_decay},
         {"params": [p for n, p in net.named_parameters() if p.dim() == 1], "weight_decay": 0.0}],
        lr=cfg.optim.lr, betas=tuple(cfg.optim.betas), eps=cfg.optim.eps,
    )  # fmt: skip
    o = cfg.optim.model_copy(update={"decay_steps": cfg.optim.decay_steps or cfg.train.steps})
    curve, batch = [], cfg.train.global_batch
    for step in range(1, cfg.train.steps + 1):
        numbers = np.arange((step - 1) * batch, step * batch)
        epoch, position = np.divmod(numbers, size)
        chosen = permute(position, size, epoch_key(cfg.train.seed, np.zeros_like(numbers), epoch)).tolist()
        inputs = encode(chosen)
        output = net(**inputs)
        loss = output.loss if "start_logits" not in output else of_spans(output, inputs)
        optimizer.zero_grad()
        loss.backward()
        norm = clip(net.parameters(), o.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(step, o)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve


def of_spans(output: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """As transformers' loss, but over the positions that are no padding."""
    visible = inputs["attention_mask"].bool()
    ends = ((output.start_logits, inputs["start_positions"]), (output.end_logits, inputs["end_positions"]))
    return sum(torch.nn.functional.cross_entropy(s.masked_fill(~visible, -1e30), p) for s, p in ends) / 2


def of_task(name: str, path: Path, data: Path, folder: Path, seq_len: int) -> list[tuple[float, float]]:
    """The same for a task's files in `data`, read and encoded here by transformers' tokenizer."""
    words = AutoTokenizer.from_pretrained(folder)
    options = {"truncation": True, "max_length": seq_len, "padding": True, "return_tensors": "pt"}
    if name in glue.TASKS:
        examples = glue.read(name, data, "train")

        def encode(chosen: list[int]) -> dict[str, Any]:
            columns = [[column[i] for i in chosen] for column in examples.texts]
            return {**words(*columns, **options), "labels": torch.from_numpy(examples.labels[chosen])}

        outputs = len(glue.TASKS[name].labels) or 1
        return losses(path, [], "AutoModelForSequenceClassification", outputs, len(examples.labels), encode)
    if name == "race":
        files = [path for level in ("middle", "high") for path in sorted((data / "train" / level).glob("*.txt"))]
        items = [json.loads(path.read_text()) for path in files]
        each = [(i["article"], q, four) for i in items for q, four in zip(i["questions"], i["options"], strict=True)]
        asked = [(article, f"{question} {option}") for article, question, four in each for option in four]
        right = ["ABCD".index(a) for i in items for a in i["answers"]]

        def encode(chosen: list[int]) -> dict[str, Any]:
            pairs = [asked[4 * i + c] for i in chosen for c in range(4)]
            encoded = words([a for a, _ in pairs], [b for _, b in pairs], **options)
            labels = torch.tensor([right[i] for i in chosen])
            return {name: values.view(len(chosen), 4, -1) for name, values in encoded.items()} | {"labels": labels}

        return losses(path, [], "AutoModelForMultipleChoice", 1, len(right), encode)
    if name == "ner":
        blocks = [[line.split() for line in block.splitlines()] for block in (data / "train.txt").read_text().split("\n\n")]
        tags = ["O", "B-X", "I-X"]

        def encode(chosen: list[int]) -> dict[str, Any]:
            encoded = words([[w for w, _ in blocks[i]] for i in chosen], is_split_into_words=True, **options)
            labels = torch.full(encoded["input_ids"].shape, -100)
            for row, i in enumerate(chosen):
                before = None
                for position, word in enumerate(encoded.word_ids(row)):
                    if word is not None and word != before:
                        labels[row, position] = tags.index(blocks[i][word][1])
                    before = word
            return {**encoded, "labels": labels}

        return losses(path, [], "AutoModelForTokenClassification", 3, len(blocks), encode)
    paragraphs = json.loads((data / "train-v1.1.json").read_text())["data"][0]["paragraphs"]
    asked = [(q["question"], p["context"], q["answers"][0]) for p in paragraphs for q in p["qas"]]

    def encode(chosen: list[int]) -> dict[str, Any]:
        rows = [asked[i] for i in chosen]
        encoded = words([q for q, _, _ in rows], [c for _, c, _ in rows], **options)
        ends = [(a["answer_start"], a["answer_start"] + len(a["text"]) - 1) for _, _, a in rows]
        positions = [[encoded.char_to_token(row, at, 1) for at in pair] for row, pair in enumerate(ends)]
        begin, end = torch.tensor(positions).unbind(1)
        return {**encoded, "start_positions": begin, "end_positions": end}

    return losses(path, [], "AutoModelForQuestionAnswering", 2, len(asked), encode)
