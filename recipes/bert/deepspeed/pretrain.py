"""Pretrain BERT with DeepSpeed: ZeRO stage 0 to 3, offload, recompute, pipeline.

bash recipes/bert/deepspeed/pretrain.sh recipes/bert/configs/tiny.yaml out/tiny_bert deepspeed.zero_stage=2
"""

from functools import partial
from typing import Any

from common.launch import heartbeat, processes

if __name__ == "__main__":
    processes.quiet()

import deepspeed
import torch
import torch.distributed as dist

from common import preflight
from common.checkpoints import checkpoint, parameters, run_record, state
from common.data import batches
from common.huggingface import export
from common.stacks import zero
from common.training import compiling, optim
from common.training.log import Log

from .. import task
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
    dp_rank, stage = zero.dp_rank(layout, ranks), zero.stage_of(layout, ranks)
    is_loss_rank = zero.reports_loss(layout, ranks)  # one rank of each replica

    # ---- model
    net: Any = pipeline.build(cfg, layout, ranks) if layout.pp > 1 else zero_model.build(cfg, ds_config)
    if system.compile:
        compiling.layers(net)
    shapes = parameters.expected(cfg.model, task)  # {Hugging Face name: full shape}

    # ---- optimizer
    optimizer = optim.build(net.named_parameters(), task.has_weight_decay, cfg.optim)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=ds_config)

    # ---- data
    zeros = torch.zeros(2, len(task.loss_names(cfg)), dtype=torch.float64, device=ranks.device)  # (losses and hits, P)

    def sums_of(micro_batch: batches.MicroBatch) -> torch.Tensor:
        """Summed losses and hits (correct predictions) of one micro batch, (2, P)."""
        batch = task.make_batch(micro_batch, ranks.device)
        mlm, pairs = engine(**task.model_inputs(batch))  # (N, V), (B, 2)
        return task.loss_sums(mlm, pairs, batch)

    @torch.no_grad()
    def evaluate(step: int) -> None:
        engine.eval()
        sums = zeros.clone()
        micro_batches = list(batches.for_validation(run.valid, cfg.train.eval_samples, layout, dp_rank))
        if layout.pp > 1:
            net.begin(lambda micro: heartbeat.beat("evaluation"))
            fed = pipeline.feed(micro_batches, ranks.device, torch.ones_like(sums[0]))
            engine.eval_batch(fed, reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches))
        for micro_sums in net.results if layout.pp > 1 else map(sums_of, micro_batches):
            sums += micro_sums * is_loss_rank
        counts = torch.tensor(task.counts(micro_batches)[:-1], device=ranks.device) * is_loss_rank
        dist.all_reduce(sums)
        dist.all_reduce(counts)
        loss, parts = task.named_losses(cfg, (sums / counts).flatten().tolist())
        log.valid(step, loss, int(counts[0]), **parts)
        engine.train()

    def save(step: int, is_last: bool) -> None:
        pieces = zero.pieces_of(engine, shapes)
        in_background = cfg.train.async_save and not is_last
        checkpoint.save(run.out, pieces, shapes, state.meta(run, step), cfg.train.keep, log.saved, in_background)

    # ---- resume
    step = run.resume.step if run.resume else 0
    zero.load_state(engine, shapes, state.values(cfg, task, shapes, run.resume), step)
    dist.barrier()  # every rank has accepted the run
    if ranks.rank == 0:
        run_record.begin(run)
    log = Log(run, task, ranks)

    # ---- loop
    engine.train()
    prefetched = batches.prefetch(run, step, dp_rank)
    while step < cfg.train.steps:
        step += 1
        log.begin_step()
        lr = optim.lr_at(step, cfg.optim)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr

        micro_batches = next(prefetched)
        counts = [count * is_loss_rank for count in task.counts(micro_batches)]
        # numbers of targets of each part of the loss, and number of tokens, in the global batch
        *target_counts, tokens = processes.totals(counts, ranks)
        targets = processes.on_device(torch.tensor(target_counts), ranks.device)  # (P,)
        shares = zeros.clone()  # this rank's part of the losses and hit rates
        # the engine divides by the number of micro batches and averages over the ranks; the factors undo both (invariant 5)
        if layout.pp > 1:
            weight = layout.accumulate * layout.dp / targets
            net.begin(partial(processes.seed_micro_batch, cfg.train.seed, step, dp_rank=dp_rank, stage=stage))
            engine.train_batch(pipeline.feed(micro_batches, ranks.device, weight))  # all passes, and the update
            for sums in net.results:
                shares += sums / targets
        else:
            for micro, micro_batch in enumerate(micro_batches):
                processes.seed_micro_batch(cfg.train.seed, step, micro, dp_rank)
                sums = sums_of(micro_batch)
                engine.backward((sums[0] / targets).sum() * layout.accumulate * layout.dp)
                shares += sums.detach() / targets
                if micro + 1 < layout.accumulate:
                    engine.step()  # before the last micro batch this only counts; it does not update
        is_updated = layout.pp > 1
        values, stop = processes.reduce_step(shares.flatten() * is_loss_rank, ranks, step, run.samples(step), is_updated)
        loss, parts = task.named_losses(cfg, values)

        grad_norm = zero.grad_norm(engine, shapes) if system.zero_stage == 0 else None
        if not is_updated:
            engine.step()
        grad_norm = zero.grad_norm(engine, shapes) if grad_norm is None else grad_norm
        processes.must_be_finite("gradient norm", grad_norm, step, run.samples(step))

        log.step(step, loss, grad_norm, lr, tokens, **parts)
        last = step == cfg.train.steps
        if run.valid and (last or (cfg.train.eval_every and step % cfg.train.eval_every == 0)):
            evaluate(step)
        if last or stop or (cfg.train.save_every and step % cfg.train.save_every == 0):
            save(step, is_last=bool(last or stop))
        if stop and not last:
            raise processes.stopped(stop, step)

    # ---- export
    log.close()
    engine.destroy()
    export.to_hf(run, task, ranks)


if __name__ == "__main__":
    processes.run(main)
