"""Finetune BERT with DeepSpeed: ZeRO stage 0 to 3, AutoTP, offload, recompute.

bash recipes/bert/deepspeed/finetune.sh recipes/bert/configs/finetune_mrpc.yaml out/mrpc init.from=HF_DIR task.data=DIR
"""

from pathlib import Path

from common.launch import processes

if __name__ == "__main__":
    processes.quiet()

import deepspeed
import torch
import torch.distributed as dist

from common import preflight
from common.checkpoints import checkpoint, parameters, run_record, state
from common.data import batches
from common.stacks import zero
from common.training import finetuning, optim
from common.training.log import Log

from .. import finetune as task
from . import model as zero_model


def main(argv: list[str]) -> None:
    # ---- config
    config_path, out, *overrides = argv
    ranks = processes.start()
    run = preflight.prepare(config_path, out, overrides, "deepspeed", task, ranks.world)
    cfg, layout, system = run.cfg, run.layout, run.cfg.deepspeed
    head = cfg.model.task_head  # its loss and predictions
    processes.check_dtype(cfg.train.dtype, ranks.device)

    # ---- ranks
    zero.start(ranks)
    ds_config = zero.ds_config(cfg, layout)
    dp_rank = ranks.rank // layout.tp
    reports = zero.tp_rank(layout, ranks) == 0  # one rank of each replica tells the loss

    # ---- model
    net = zero_model.build(cfg, ds_config, task)
    shapes = parameters.expected(cfg.model, task)  # of each parameter, by Hugging Face name

    # ---- optimizer
    optimizer = optim.build(net.named_parameters(), task.has_weight_decay, cfg.optim)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=ds_config)

    # ---- data
    def loss_of(rows: batches.MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss of one micro batch, and predictions (B, width)."""
        batch = task.make_batch(rows, ranks.device)
        logits = task.logits_of(engine(**task.model_inputs(batch)))
        return head.loss_sum(logits, batch), head.predictions(logits.detach(), batch)

    @torch.no_grad()
    def evaluate(step: int) -> bool:
        """Is this the best so far?"""
        engine.eval()
        found = finetuning.Predictions(run, ranks, head.prediction_width(cfg.data.seq_len))
        for rows in batches.for_validation(run.valid, cfg.train.eval_samples, layout, dp_rank):
            found.add(rows, *loss_of(rows))
        found.totals *= reports
        found.gather()
        engine.train()
        return task.judge(run, selection, log, step, found)

    def save(out: Path, step: int, keep: int) -> None:
        checkpoint.save(out, zero.gather_state(engine, ranks, shapes), shapes, state.meta(run, step), keep)

    # ---- resume
    step = run.resume.step if run.resume else 0
    zero.load_state(engine, shapes, state.values(cfg, task, shapes, run.resume), step)
    dist.barrier()  # no rank refuses the run from here on
    if ranks.rank == 0:
        run_record.begin(run)
    log, selection = Log(run, task, ranks), finetuning.Selection(run, task.selection_metric(cfg))

    # ---- loop
    engine.train()
    prefetched = batches.prefetch(run, step, dp_rank)
    while step < cfg.train.steps and not selection.is_over:
        step += 1
        log.begin_step()
        lr = optim.lr_at(step, cfg.optim)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr

        rows = next(prefetched)
        counts = [batches.targets(rows) * reports, batches.tokens(rows) * reports]
        targets, tokens = processes.totals(counts, device=ranks.device)  # of the global batch
        loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for micro, micro_rows in enumerate(rows):
            processes.seed_micro_batch(cfg.train.seed, step, micro, dp_rank)
            micro_loss, _ = loss_of(micro_rows)
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


if __name__ == "__main__":
    processes.run(main)
