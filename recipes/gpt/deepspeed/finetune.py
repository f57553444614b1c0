"""Finetune GPT with DeepSpeed: ZeRO stage 0 to 3, offload, recompute.

bash recipes/gpt/deepspeed/finetune.sh recipes/gpt/configs/finetune_sft.yaml out/sft init.from=HF_DIR task.data=DIR
"""

from pathlib import Path

from common.launch import processes

if __name__ == "__main__":
    processes.quiet()

import deepspeed
import torch
import torch.distributed as dist

from common import preflight
from common.checkpoints import checkpoint, run_record, state
from common.data import batches
from common.stacks import zero
from common.training import finetuning, lora, optim
from common.training.log import Log

from .. import finetune as task
from . import model as zero_model


def main(argv: list[str]) -> None:
    # ---- config
    config_path, out, *overrides = argv
    ranks = processes.start()
    run = preflight.prepare(config_path, out, overrides, "deepspeed", task, ranks.world)
    cfg, layout, system = run.cfg, run.layout, run.cfg.deepspeed
    processes.check_dtype(cfg.train.dtype, ranks.device)

    # ---- ranks
    zero.start(ranks)
    ds_config = zero.ds_config(cfg, layout)
    dp_rank = ranks.rank // layout.tp
    reports = zero.tp_rank(layout, ranks) == 0  # one rank of each replica tells the loss

    # ---- model
    net = zero_model.build(cfg, ds_config)
    lora.add(net, cfg, task)
    shapes = lora.expected(cfg, task)  # of each parameter, by Hugging Face name

    # ---- optimizer
    optimizer = optim.build(net.named_parameters(), task.has_weight_decay, cfg.optim)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=ds_config)

    # ---- data
    def loss_of(rows: batches.MicroBatch) -> torch.Tensor:
        """Summed loss of one micro batch."""
        batch = task.make_batch(rows, ranks.device)
        logits = engine(**task.model_inputs(batch)).logits  # (B, T, V)
        return task.loss_sum(logits, batch["targets"], batch["loss_mask"])

    @torch.no_grad()
    def evaluate(step: int) -> bool:
        """Is this the best so far?"""
        engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, targets
        for rows in batches.for_validation(run.valid, cfg.train.eval_samples, layout, dp_rank):
            totals[0] += loss_of(rows)
            totals[1] += batches.targets([rows])
        totals *= reports
        dist.all_reduce(totals)
        engine.train()
        return task.is_best(run, selection, log, step, (totals[0] / totals[1]).item(), int(totals[1]))

    def save(out: Path, step: int, keep: int) -> None:
        checkpoint.save(out, zero.gather_state(engine, ranks, shapes), lora.trained(shapes, cfg), state.meta(run, step), keep)

    # ---- resume
    step = run.resume.step if run.resume else 0
    zero.load_state(engine, shapes, lora.values(cfg, task, shapes, run.resume), step)
    dist.barrier()  # no rank refuses the run from here on
    if ranks.rank == 0:
        run_record.begin(run)
        task.keep_template(run)
    log, selection = Log(run, task, ranks), finetuning.Selection(run, "loss")

    # ---- loop
    engine.train()
    while step < cfg.train.steps and not selection.is_over:
        step += 1
        log.begin_step()
        lr = optim.lr_at(step, cfg.optim)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr

        rows = list(batches.for_step(run.train, run.samples(step), layout, dp_rank))
        counts = [batches.targets(rows) * reports, batches.tokens(rows) * reports]
        targets, tokens = processes.totals(counts, device=ranks.device)  # of the global batch
        loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for micro, micro_rows in enumerate(rows):
            processes.seed_micro_batch(cfg.train.seed, step, micro, dp_rank)
            micro_loss = loss_of(micro_rows)
            # the engine divides by the micro batches and averages over the ranks: undo both for a sum (law 5)
            engine.backward(micro_loss * layout.accumulate * layout.dp / targets)
            loss += micro_loss.detach() / targets
            if micro + 1 < layout.accumulate:
                engine.step()  # not a boundary: counts the micro batch, no update
        [loss], stop = processes.reduce_step(loss[None] * reports, ranks, step, run.samples(step))

        grad_norm = zero.grad_norm(engine, shapes) if system.zero_stage == 0 else None
        engine.step()
        grad_norm = grad_norm if system.zero_stage == 0 else zero.grad_norm(engine, shapes)
        processes.must_be_finite("gradient norm", grad_norm, step, run.samples(step))

        log.step(step, loss, grad_norm, lr, tokens)
        last = step == cfg.train.steps
        if (last or (cfg.train.eval_every and step % cfg.train.eval_every == 0)) and evaluate(step):
            save(finetuning.best_folder(run), step, finetuning.BEST_KEPT)
        last = last or selection.is_over
        if last or stop or (cfg.train.save_every and step % cfg.train.save_every == 0):
            save(run.out, step, cfg.train.keep)
        if stop and not last:
            raise processes.stopped(stop, step)

    # ---- export
    log.close()
    engine.destroy()
    finetuning.finish(run, task, ranks)
    task.answer(run, ranks)


if __name__ == "__main__":
    processes.run(main)
