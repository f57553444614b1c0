"""Finetune GPT with DeepSpeed: ZeRO stage 0 to 3, offload, recompute, pipeline.

bash recipes/gpt/deepspeed/finetune.sh CONFIG OUT [KEY=VALUE ...]    # CONFIG: recipes/gpt/configs/finetune_*.yaml
"""

from functools import partial
from pathlib import Path
from typing import Any

from common.launch import heartbeat, processes

if __name__ == "__main__":
    processes.quiet()

import deepspeed
import torch
import torch.distributed as dist

from common import preflight
from common.checkpoints import checkpoint, run_record, state
from common.data import batches
from common.stacks import zero
from common.training import compiling, finetuning, lora, optim
from common.training.log import Log

from .. import finetune as task
from . import model as zero_model, pipeline


def main(argv: list[str]) -> None:
    # ---- config
    config_path, out, *overrides = argv
    ranks = processes.start()
    run = preflight.prepare(config_path, out, overrides, "deepspeed", task, ranks.world)
    cfg, layout, system = run.cfg, run.layout, run.cfg.deepspeed
    processes.set_numerics(cfg.train, ranks)

    # ---- ranks
    zero.start(ranks)
    ds_config = zero.ds_config(cfg, layout)
    dp_rank, sp_rank, stage = zero.dp_rank(layout, ranks), zero.sp_rank(layout, ranks), zero.stage_of(layout, ranks)
    is_loss_rank = zero.reports_loss(layout, ranks)  # one rank of each replica

    # ---- model
    net: Any = pipeline.build(cfg, layout, ranks, task) if layout.pp > 1 else zero_model.build(cfg, ds_config, task)
    lora.add(net, cfg)
    if system.compile:
        compiling.layers(net)
    shapes = lora.expected(cfg, task)  # {Hugging Face name: full shape}

    # ---- optimizer
    optimizer = optim.build(net.named_parameters(), task.has_weight_decay, cfg.optim)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=ds_config, mpu=zero.mpu(layout))

    # ---- data
    def loss_of(micro_batch: batches.MicroBatch) -> torch.Tensor:
        """Summed loss of one micro batch."""
        batch = task.make_batch(micro_batch, ranks.device)
        logits = engine(**task.model_inputs(batch)).logits  # (B, T, V)
        return task.loss_sum(logits, batch["targets"], batch["loss_mask"])

    @torch.no_grad()
    def evaluate(step: int) -> bool:
        """Evaluate on the validation set. Returns whether this is the best checkpoint so far."""
        engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, targets
        micro_batches = list(batches.for_validation(run.valid, cfg.train.eval_samples, layout, dp_rank, sp_rank))
        if layout.pp > 1:
            net.begin(lambda micro: heartbeat.beat("evaluation"))
            fed = pipeline.feed(micro_batches, ranks.device, 1.0, task)
            engine.eval_batch(fed, reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches))
        for micro_loss in net.results if layout.pp > 1 else map(loss_of, micro_batches):
            totals[0] += micro_loss
        totals[1] = task.counts(micro_batches)[0]
        totals *= is_loss_rank
        dist.all_reduce(totals)
        engine.train()
        return selection.judge(step, (totals[0] / totals[1]).item(), int(totals[1]))

    def save(out: Path, step: int, keep: int) -> None:
        pieces = zero.pieces_of(engine, shapes)
        checkpoint.save(out, pieces, lora.trained(shapes, cfg), state.meta(run, step), keep)

    # ---- resume
    step = run.resume.step if run.resume else 0
    zero.load_state(engine, shapes, lora.values(cfg, task, shapes, run.resume), step)
    dist.barrier()  # every rank has accepted the run
    if ranks.rank == 0:
        run_record.begin(run)
        task.before_start(run)
    log = Log(run, task, ranks)
    selection = finetuning.Selection(run, task, log)

    # ---- loop
    engine.train()
    averaged = zero.averaging_ranks(layout, system.zero_stage)
    prefetched = batches.prefetch(run, step, dp_rank, sp_rank)
    while step < cfg.train.steps and not selection.should_stop:
        step += 1
        log.begin_step()
        lr = optim.lr_at(step, cfg.optim)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr

        micro_batches = next(prefetched)
        counts = [count * is_loss_rank for count in task.counts(micro_batches)]
        targets, tokens = processes.totals(counts, ranks)  # in the global batch
        share = torch.zeros((), dtype=torch.float64, device=ranks.device)  # this rank's part of the loss
        # the engine divides by the number of micro batches and averages over the ranks; the factors undo both (invariant 5)
        if layout.pp > 1:
            weight = layout.accumulate * layout.dp / targets
            net.begin(partial(processes.seed_micro_batch, cfg.train.seed, step, dp_rank=dp_rank, stage=stage))
            engine.train_batch(pipeline.feed(micro_batches, ranks.device, weight, task))  # all passes, and the update
            for micro_loss in net.results:
                share += micro_loss / targets
        else:
            for micro, micro_batch in enumerate(micro_batches):
                processes.seed_micro_batch(cfg.train.seed, step, micro, dp_rank * layout.sp + sp_rank)
                micro_loss = loss_of(micro_batch)
                engine.backward(micro_loss * layout.accumulate * averaged / targets)
                share += micro_loss.detach() / targets
                if micro + 1 < layout.accumulate:
                    engine.step()  # before the last micro batch this only counts; it does not update
        is_updated = layout.pp > 1
        [loss], stop = processes.reduce_step(share[None] * is_loss_rank, ranks, step, run.samples(step), is_updated)

        grad_norm = zero.grad_norm(engine, shapes) if system.zero_stage == 0 else None
        if not is_updated:
            engine.step()
        grad_norm = zero.grad_norm(engine, shapes) if grad_norm is None else grad_norm
        processes.must_be_finite("gradient norm", grad_norm, step, run.samples(step))

        log.step(step, loss, grad_norm, lr, tokens)
        last = step == cfg.train.steps
        if (last or (cfg.train.eval_every and step % cfg.train.eval_every == 0)) and evaluate(step):
            save(finetuning.best_folder(run), step, finetuning.BEST_KEPT)
        last = last or selection.should_stop
        if last or stop or (cfg.train.save_every and step % cfg.train.save_every == 0):
            save(run.out, step, cfg.train.keep)
        if stop and not last:
            raise processes.stopped(stop, step)

    # ---- export
    log.close()
    engine.destroy()
    finetuning.finish(run, task, ranks)
    task.after_export(run, ranks)


if __name__ == "__main__":
    processes.run(main)
