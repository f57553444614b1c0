"""The reference loop for GPT: one process, which shares with the recipes only data, initial values and schedule.

tests/test_oracles.py checks those against formulas, and has a loop that shares nothing.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F

from common import config
from common.training import init, optim
from recipes.gpt import task
from recipes.gpt.samples import Samples


def losses(config_path: Path, overrides: list[str], device: torch.device | str = "cpu") -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of each step: the whole global batch at once, fp32, dropout 0."""
    cfg = config.load(config_path, overrides, task.Config)
    data = cfg.data
    stream = Samples(
        data.train, data.seq_len, pack=data.pack, seed=cfg.train.seed, eod_mask_loss=data.eod_mask_loss,
        reset_attention=data.reset_attention,
    )  # fmt: skip
    model = cfg.model.resolve(cfg, stream.corpora[0].manifest["tokenizer_size"])
    net = task.hf_model(model).to(device).train()
    draw = init.scratch(cfg.train.seed, lambda name: task.initializer(model, name))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(draw(name, parameter.shape))
    matrices = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    o = cfg.optim.model_copy(update={"decay_steps": cfg.optim.decay_steps or cfg.train.steps})
    adam = torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay)
    curve = []
    for step in range(1, cfg.train.steps + 1):
        rows = stream.collate(range((step - 1) * cfg.train.global_batch, step * cfg.train.global_batch))
        on_device = {name: torch.from_numpy(values).to(device) for name, values in rows.items()}
        tokens, mask = on_device["tokens"], on_device["loss_mask"]
        inputs = {"input_ids": tokens[:, :-1]}
        if data.reset_attention:
            segment = on_device["segment"]
            sees = (segment[:, :, None] == segment[:, None, :]).tril()  # (B, T, T)
            inputs |= {"attention_mask": sees[:, None], "position_ids": on_device["position"]}
        logits = net(**inputs).logits  # (B, T, V)
        loss = F.cross_entropy(logits[mask], tokens[:, 1:][mask])
        adam.zero_grad()
        loss.backward()
        norm = clip(net.parameters(), o.grad_clip)
        for group in adam.param_groups:
            group["lr"] = optim.lr_at(step, o)
        adam.step()
        curve.append((loss.item(), norm.item()))
    return curve


@torch.no_grad()
def clip(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """As torch.nn.utils.clip_grad_norm_, with the norm () in fp64: in fp32, torch's is too low for large tensors on a CPU."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt()
    for gradient in gradients:
        gradient.mul_(min(max_norm / (norm.item() + 1e-6), 1.0))
    return norm
