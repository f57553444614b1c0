"""The reference loop for finetuning GPT: one process, the class, tokenizer and templates of transformers.

Each conversation goes through the model in a row by itself.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from common import config
from common.data.sampler import epoch_key, permute
from common.training import optim
from recipes.gpt import finetune, finetune_samples as samples
from tests.plain import clip

Document = tuple[list[int], list[bool]]  # ids, and which of them are targets


def answers(words: Any, chat: list[dict[str, str]], end: str) -> Document:
    """A conversation, and its answers up to and with the token `end` behind each."""
    template = words.chat_template or samples.DEFAULT_TEMPLATE
    given = {"chat_template": template, "return_dict": False}
    ids = words.apply_chat_template(chat, **given)
    is_target = [False] * len(ids)
    for k, message in enumerate(chat):
        if message["role"] == "assistant":
            first = len(words.apply_chat_template(chat[:k], add_generation_prompt=True, **given))
            last = ids.index(words.convert_tokens_to_ids(end), first)
            is_target[first : last + 1] = [True] * (last + 1 - first)
    return ids, is_target


def losses(
    config_path: Path, overrides: list[str], groups: list[list[Document]], prepare: Any = lambda net: net
) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of each step. groups: the documents of each sample. prepare: changes the
    model before training."""
    cfg = config.load(config_path, overrides, finetune.Config)
    net = prepare(AutoModelForCausalLM.from_pretrained(cfg.init.from_, dtype=torch.float32)).train()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trained if p.dim() > 1], "weight_decay": cfg.optim.weight_decay},
         {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0}],
        lr=cfg.optim.lr, betas=tuple(cfg.optim.betas), eps=cfg.optim.eps,
    )  # fmt: skip
    o = cfg.optim.model_copy(update={"decay_steps": cfg.optim.decay_steps or cfg.train.steps})
    curve, size = [], cfg.train.global_batch
    for step in range(1, cfg.train.steps + 1):
        numbers = np.arange((step - 1) * size, step * size)
        epoch, position = np.divmod(numbers, len(groups))
        chosen = permute(position, len(groups), epoch_key(cfg.train.seed, np.zeros_like(numbers), epoch)).tolist()
        documents = [document for i in chosen for document in groups[i]]
        # a row each; what pads the shorter ones stands behind, where a causal model does not see it
        longest = max(len(ids) for ids, _ in documents)
        tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in documents])
        mask = torch.tensor([is_target[1:] + [False] * (longest - len(is_target)) for _, is_target in documents])
        logits = net(tokens[:, :-1]).logits  # (documents, T, V)
        loss = F.cross_entropy(logits[mask], tokens[:, 1:][mask])
        optimizer.zero_grad()
        loss.backward()
        norm = clip(trained, o.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(step, o)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve
