"""Finetune GPT with plain data parallelism on accelerate, as one would write it by hand: the reference for the two stacks.

bash recipes/gpt/baseline/finetune.sh CONFIG OUT [KEY=VALUE ...]    # CONFIG: recipes/gpt/configs/finetune_*.yaml
"""

from contextlib import nullcontext
from pathlib import Path

from common.launch import processes

if __name__ == "__main__":
    processes.quiet()

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, init_empty_weights

from common import preflight
from common.checkpoints import checkpoint, run_record, state
from common.data import batches
from common.training import compiling, finetuning, init, lora, optim, sharding
from common.training.log import Log

from .. import finetune as task


def main(argv: list[str]) -> None:
    # ---- config
    config_path, out, *overrides = argv
    ranks = processes.start()
    run = preflight.prepare(config_path, out, overrides, "baseline", task, ranks.world)
    cfg, layout, system = run.cfg, run.layout, run.cfg.baseline
    processes.set_numerics(cfg.train, ranks)

    # ---- ranks
    # One replica per process. The gradients are views of DDP's buckets, which would else be a second copy of them.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=ranks.device.type == "cpu", mixed_precision="no", kwargs_handlers=[ddp])
    is_sharded = system.shard == "full"
    # bf16 means fp32 weights under autocast. accelerate's own would convert the logits to fp32. FSDP2 converts by itself.
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=cfg.train.dtype == "bf16" and not is_sharded)

    # ---- model
    with init_empty_weights():
        net = task.hf_model(cfg.model)
    lora.add(net, cfg)
    if system.recompute:
        net.activation_checkpointing_enable({"use_reentrant": False})
    if system.compile:
        compiling.layers(net)
    if is_sharded:
        model = sharding.shard(net, cfg.train.dtype, ranks)
    else:
        init.allocate(net, torch.float32)
        # alone, a process needs no DDP, which would add each gradient to a bucket
        model = accelerator.prepare(net) if ranks.world > 1 else torch.nn.Module.to(net, ranks.device)
    shapes = lora.expected(cfg, task)  # {Hugging Face name: full shape}

    # ---- optimizer
    optimizer = optim.build(net.named_parameters(), task.has_weight_decay, cfg.optim)

    # ---- data
    def loss_of(micro_batch: batches.MicroBatch) -> torch.Tensor:
        """Summed loss of one micro batch."""
        batch = task.make_batch(micro_batch, ranks.device)
        with autocast:
            logits = model(**task.model_inputs(batch)).logits  # (B, T, V)
        return task.loss_sum(logits, batch["targets"], batch["loss_mask"])

    @torch.no_grad()
    def evaluate(step: int) -> bool:
        """Evaluate on the validation set. Returns whether this is the best checkpoint so far."""
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, targets
        for micro_batch in batches.for_validation(run.valid, cfg.train.eval_samples, layout, ranks.rank):
            totals[0] += loss_of(micro_batch)
            totals[1] += task.counts([micro_batch])[0]
        dist.all_reduce(totals)
        model.train()
        if is_sharded:
            model.reshard()  # a backward pass would have done it
        return selection.judge(step, (totals[0] / totals[1]).item(), int(totals[1]))

    def save(out: Path, step: int, keep: int) -> None:
        pieces = state.torch_pieces(net.named_parameters(), optimizer)
        checkpoint.save(out, pieces, lora.trained(shapes, cfg), state.meta(run, step), keep)

    # ---- resume
    step = run.resume.step if run.resume else 0
    state.load(net, optimizer, shapes, lora.values(cfg, task, shapes, run.resume), step)
    dist.barrier()  # every rank has accepted the run
    if ranks.rank == 0:
        run_record.begin(run)
        task.before_start(run)
    log = Log(run, task, ranks)
    selection = finetuning.Selection(run, task, log)

    # ---- loop
    model.train()
    prefetched = batches.prefetch(run, step, ranks.rank)
    while step < cfg.train.steps and not selection.should_stop:
        step += 1
        log.begin_step()
        lr = optim.lr_at(step, cfg.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr

        micro_batches = next(prefetched)
        targets, tokens = processes.totals(task.counts(micro_batches), ranks)  # in the global batch
        share = torch.zeros((), dtype=torch.float64, device=ranks.device)  # this rank's part of the loss
        for micro, micro_batch in enumerate(micro_batches):
            processes.seed_micro_batch(cfg.train.seed, step, micro, ranks.rank)
            last_micro = micro + 1 == layout.accumulate
            with nullcontext() if last_micro or is_sharded else accelerator.no_sync(model):
                micro_loss = loss_of(micro_batch)
                # data parallelism averages gradients over the ranks; multiplying by dp turns that into a sum (invariant 5)
                accelerator.backward(micro_loss * layout.dp / targets)
            share += micro_loss.detach() / targets
        [loss], stop = processes.reduce_step(share[None], ranks, step, run.samples(step))

        grad_norm = optim.clip(optimizer, net.parameters(), cfg.optim.grad_clip)
        processes.must_be_finite("gradient norm", grad_norm, step, run.samples(step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=model is net)  # DDP's buckets stay

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
    finetuning.finish(run, task, ranks)
    task.after_export(run, ranks)


if __name__ == "__main__":
    processes.run(main)
