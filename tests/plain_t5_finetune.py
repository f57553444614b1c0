"""The reference loop for finetuning T5: one process, the class, tokenizer, loss and beam search of transformers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration

from common import config
from common.data.sampler import epoch_key, permute
from common.training import optim
from recipes.t5 import finetune
from tests.plain import clip
from tests.plain_t5 import Kinks, Step, torch_optimizer


def losses(config_path: Path, overrides: list[str], pairs: list[tuple[str, str]]) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of each step."""
    return [(loss, norm) for loss, norm, _ in steps(config_path, overrides, pairs)]


def steps(config_path: Path, overrides: list[str], pairs: list[tuple[str, str]]) -> Iterator[Step]:
    """Each step of the whole global batch at once, padded to its longest."""
    cfg = config.load(config_path, overrides, finetune.Config)
    net, tokenizer = loaded(cfg.init.from_, cfg.model.dropout)
    o = cfg.optim.model_copy(update={"decay_steps": cfg.optim.decay_steps or cfg.train.steps})
    optimizer, kinks, size = torch_optimizer(net.train(), o), Kinks(net), cfg.train.global_batch
    for step in range(1, cfg.train.steps + 1):
        numbers = np.arange((step - 1) * size, step * size)
        epoch, position = np.divmod(numbers, len(pairs))
        chosen = permute(position, len(pairs), epoch_key(cfg.train.seed, np.zeros_like(numbers), epoch)).tolist()
        sources, targets = (list(column) for column in zip(*(pairs[i] for i in chosen), strict=True))
        inputs = tokenizer(sources, truncation=True, max_length=cfg.data.seq_len, padding=True, return_tensors="pt")
        encoded_targets = tokenizer(targets, truncation=True, max_length=cfg.data.target_len, padding=True, return_tensors="pt")
        labels = encoded_targets["input_ids"].masked_fill(encoded_targets["attention_mask"] == 0, -100)
        loss = net(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norm = clip(net.parameters(), o.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(step, o)
        optimizer.step()
        yield loss.item(), norm.item(), kinks.stake(norm.item())


def loaded(folder: str, dropout: float = 0.0) -> tuple[T5ForConditionalGeneration, AutoTokenizer]:
    shapes = AutoConfig.from_pretrained(folder)
    shapes.dropout_rate = dropout
    return T5ForConditionalGeneration.from_pretrained(folder, config=shapes), AutoTokenizer.from_pretrained(folder)


def written(folder: Path, sources: list[str], seq_len: int, tokens: int, beams: int, length_penalty: float) -> list[str]:
    """Beam search, one text at a time, without padding."""
    net, tokenizer = loaded(str(folder))
    texts = []
    for source in sources:
        inputs = tokenizer(source, truncation=True, max_length=seq_len, return_tensors="pt")
        ids = net.eval().generate(
            **inputs, num_beams=beams, length_penalty=length_penalty, max_new_tokens=tokens, do_sample=False
        )
        texts.append(" ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split()))
    return texts
