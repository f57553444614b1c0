"""The referee's referee for finetuning BERT: one process, transformers' own class, tokenizer and loss."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from common import config, init, optim
from common.corpus import epoch_key, permute
from recipes.bert import finetune


def losses(
    config_path: Path, overrides: list[str], texts: list[tuple[str, ...]], labels: list[Any]
) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of each step: the whole global batch at once, padded to its longest."""
    cfg = config.load(config_path, overrides, finetune.Config)
    folder = cfg.init.from_
    shapes = AutoConfig.from_pretrained(folder)
    shapes.num_labels = len(set(labels)) if isinstance(labels[0], int) else 1
    shapes.hidden_dropout_prob = shapes.attention_probs_dropout_prob = cfg.model.dropout
    shapes.pad_token_id = None  # its row of the embedding gets a gradient in Megatron too
    net = AutoModelForSequenceClassification.from_pretrained(folder, config=shapes).train()
    draw = init.scratch(cfg.train.seed, lambda name: "zeros" if name.endswith("bias") else 0.02)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith(("classifier.", "bert.pooler.")):  # the folders hold neither
                parameter.copy_(draw(name, parameter.shape))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(
        [{"params": [p for n, p in net.named_parameters() if p.dim() > 1], "weight_decay": cfg.optim.weight_decay},
         {"params": [p for n, p in net.named_parameters() if p.dim() == 1], "weight_decay": 0.0}],
        lr=cfg.optim.lr, betas=tuple(cfg.optim.betas), eps=cfg.optim.eps,
    )  # fmt: skip
    o = cfg.optim.model_copy(update={"decay_steps": cfg.optim.decay_steps or cfg.train.steps})
    made, size = [], cfg.train.global_batch
    for step in range(1, cfg.train.steps + 1):
        numbers = np.arange((step - 1) * size, step * size)
        epoch, place = np.divmod(numbers, len(texts))
        chosen = permute(place, len(texts), epoch_key(cfg.train.seed, np.zeros_like(numbers), epoch)).tolist()
        columns = [list(column) for column in zip(*(texts[i] for i in chosen), strict=True)]
        given = tokenizer(*columns, truncation=True, max_length=cfg.data.seq_len, padding=True, return_tensors="pt")
        loss = net(**given, labels=torch.tensor([labels[i] for i in chosen])).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), o.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(step, o)
        optimizer.step()
        made.append((loss.item(), norm.item()))
    return made
