"""Pretrain T5 with DeepSpeed: ZeRO stage 0 to 3, offload, recompute.

bash recipes/t5/deepspeed/pretrain.sh recipes/t5/configs/tiny.yaml out/tiny_t5 deepspeed.zero_stage=2
"""

from common.launch import processes

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
    net = zero_model.build(cfg, ds_config)
    if system.compile:
        compiling.layers(net)
    shapes = parameters.expected(cfg.model, task)  # {Hugging Face name: full shape}

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
    def evaluate(step: int) -> None:
        engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, targets
        for micro_batch in batches.for_validation(run.valid, cfg.train.eval_samples, layout, dp_rank):
            totals[0] += loss_of(micro_batch)
            totals[1] += task.counts([micro_batch])[0]
        totals *= is_loss_rank
        dist.all_reduce(totals)
        log.valid(step, (totals[0] / totals[1]).item(), int(totals[1]))
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
