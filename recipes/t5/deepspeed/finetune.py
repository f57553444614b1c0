"""Finetune T5 with DeepSpeed: ZeRO stage 0 to 3, offload, recompute.

bash recipes/t5/deepspeed/finetune.sh CONFIG OUT [KEY=VALUE ...]    # CONFIG: recipes/t5/configs/finetune_*.yaml
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
from common.training import compiling, finetuning, lora, optim
from common.training.log import Log

from .. import finetune as task
from . import model as zero_model


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
    dp_rank = zero.dp_rank(layout, ranks)
    is_loss_rank = zero.reports_loss(layout, ranks)  # one rank of each replica

    # ---- model
    net = zero_model.build(cfg, ds_config, task)
    lora.add(net, cfg)
    if system.compile:
        compiling.layers(net)
    shapes = lora.expected(cfg, task)  # {Hugging Face name: full shape}

    # ---- optimizer
    optimizer = optim.build(net.named_parameters(), task.has_weight_decay, cfg.optim)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=ds_config)

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
        for micro_batch in batches.for_validation(run.valid, cfg.train.eval_samples, layout, dp_rank):
            totals[0] += loss_of(micro_batch)
            totals[1] += task.counts([micro_batch])[0]
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
    prefetched = batches.prefetch(run, step, dp_rank)
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
        for micro, micro_batch in enumerate(micro_batches):
            processes.seed_micro_batch(cfg.train.seed, step, micro, dp_rank)
            micro_loss = loss_of(micro_batch)
            engine.backward(micro_loss * layout.accumulate * layout.dp / targets)
            share += micro_loss.detach() / targets
            if micro + 1 < layout.accumulate:
                engine.step()  # before the last micro batch this only counts; it does not update
        [loss], stop = processes.reduce_step(share[None] * is_loss_rank, ranks, step, run.samples(step))

        grad_norm = zero.grad_norm(engine, shapes) if system.zero_stage == 0 else None
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
