"""The reference loop for BERT: one process, the classes and forward of transformers, no line of the recipe's loss or head."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import BertForMaskedLM, BertForPreTraining, MegatronBertForMaskedLM, MegatronBertForPreTraining

from common import config
from common.training import init, optim
from recipes.bert import task
from tests.plain import clip

CLASSES = {
    ("bert", True): BertForPreTraining, ("bert", False): BertForMaskedLM,
    ("megatron-bert", True): MegatronBertForPreTraining, ("megatron-bert", False): MegatronBertForMaskedLM,
}  # fmt: skip


def losses(config_path: Path, overrides: list[str], device: torch.device | str = "cpu") -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of each step: the whole global batch at once, fp32, dropout 0."""
    cfg = config.load(config_path, overrides, task.Config)
    stream = task.dataset(cfg, cfg.data.train, shuffle=True)
    model = cfg.model.resolve(cfg, stream.corpora[0].manifest["tokenizer_size"])
    net = CLASSES[model.arch, model.pair_head](task.hf_config(model)).to(device).train()
    draw = init.scratch(cfg.train.seed, lambda name: task.initializer(model, name))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(draw(name, parameter.shape))
    o = cfg.optim.model_copy(update={"decay_steps": cfg.optim.decay_steps or cfg.train.steps})
    optimizer = torch_optimizer(net, o)
    curve = []
    for step in range(1, cfg.train.steps + 1):
        rows = stream.collate(range((step - 1) * cfg.train.global_batch, step * cfg.train.global_batch))
        on_device = {name: torch.from_numpy(values).to(device) for name, values in rows.items()}
        tokens = on_device["tokens"]
        seen = (torch.arange(tokens.shape[1], device=device) < on_device["lengths"][:, None]).long()
        out = net(tokens, token_type_ids=on_device["token_types"], attention_mask=seen)
        mask = on_device["mlm_mask"]
        logits = out.prediction_logits if model.pair_head else out.logits  # (B, T, V)
        loss = F.cross_entropy(logits[mask], on_device["labels"][mask])
        if model.pair_head:
            loss = loss + F.cross_entropy(out.seq_relationship_logits, on_device["pair_label"])
        optimizer.zero_grad()
        loss.backward()
        norm = clip(net.parameters(), o.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(step, o)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve


def torch_optimizer(net: torch.nn.Module, o: config.Optim) -> torch.optim.Optimizer:
    matrices = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if o.optimizer == "lamb":
        return PlainLamb(groups, o)
    return torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps)


class PlainLamb(torch.optim.Optimizer):
    """LAMB as its paper writes it (arXiv:1904.00962, algorithm 2), one parameter at a time."""

    def __init__(self, groups: list[dict], o: config.Optim):
        super().__init__(groups, {"lr": o.lr})
        self.o = o

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        beta1, beta2 = self.o.betas
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                s["t"] += 1
                s["m"] = beta1 * s["m"] + (1 - beta1) * p.grad
                s["v"] = beta2 * s["v"] + (1 - beta2) * p.grad**2
                corrected = self.o.lamb.bias_correction
                m = s["m"] / (1 - beta1 ** s["t"]) if corrected else s["m"]
                v = s["v"] / (1 - beta2 ** s["t"]) if corrected else s["v"]
                update = m / (v.sqrt() + self.o.eps) + group["weight_decay"] * p
                weight, length = p.double().norm(), update.double().norm()
                ratio = 1.0
                if weight > 0 and length > 0:
                    ratio = min(max((weight / length).item(), self.o.lamb.min_coeff), self.o.lamb.max_coeff)
                p -= group["lr"] * ratio * update
