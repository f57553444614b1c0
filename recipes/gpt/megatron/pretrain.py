"""Pretrain GPT with Megatron Core: tensor, sequence, context, pipeline and data parallel, recompute.

bash recipes/gpt/megatron/pretrain.sh recipes/gpt/configs/tiny.yaml out/tiny_gpt megatron.tp=2
"""

from collections.abc import Callable, Iterator

from common.launch import processes

if __name__ == "__main__":
    processes.quiet()

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from common import preflight
from common.checkpoints import checkpoint, parameters, run_record, state
from common.data import batches
from common.huggingface import export
from common.stacks import cuda_stand_in, mcore
from common.training import optim
from common.training.log import Log

from .. import task
from . import model as megatron_model
from .parameter_map import parameter_map

SeededBatch = tuple[int, batches.MicroBatch]  # dropout seed (0: no dropout), micro batch


def main(argv: list[str]) -> None:
    # ---- config
    config_path, out, *overrides = argv
    ranks = processes.start()
    run = preflight.prepare(config_path, out, overrides, "megatron", task, ranks.world)
    cfg, layout = run.cfg, run.layout
    processes.set_numerics(cfg.train, ranks)

    # ---- ranks
    mcore.start(ranks, layout)
    dp_rank, dp_group = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_group()
    # the last stage's first tp rank reports the loss; with context parallelism, each reports that of its targets
    is_loss_rank = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0

    # ---- model
    model = mcore.wrap(megatron_model.build(cfg, layout), cfg, ranks)  # the chunks of layers of this rank's pipeline stage
    mapping = parameter_map(cfg.model)
    shapes = parameters.expected(cfg.model, task)  # {Hugging Face name: full shape}

    # ---- optimizer
    optimizer = mcore.optimizer_for(model, cfg, ranks)

    # ---- data
    schedule = get_forward_backward_func()  # for one or several pipeline stages

    def forward_step(
        seeded: Iterator[SeededBatch], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], mcore.StepLoss]]:
        """Run a micro batch on one chunk. Megatron's schedule calls this, and expects the output and a loss function."""
        seed, micro_batch = next(seeded)
        mcore.begin_micro_batch(seed, chunk)
        batch = megatron_model.own_part(task.make_batch(micro_batch, ranks.device))
        output = megatron_model.forward(chunk, batch)

        def loss_of(losses: torch.Tensor) -> mcore.StepLoss:
            """Losses (B, T) of the last stage -> their sum, the number of targets, and what the schedule collects."""
            total = (losses.float() * batch["loss_mask"]).sum()
            # a copy, since the schedule divides in place
            return total, batch["loss_mask"].sum().int(), {"loss": total.detach().clone()}

        return output, loss_of

    def run_schedule(seeded: list[SeededBatch], forward_only: bool) -> torch.Tensor:
        """Summed loss of the micro batches; zero on ranks that do not report it."""
        with cuda_stand_in.active(ranks):
            outputs = schedule(
                forward_step_func=forward_step, data_iterator=[iter(seeded) for _ in model], model=list(model),
                num_microbatches=len(seeded), seq_length=cfg.data.seq_len, micro_batch_size=layout.micro_batch,
                forward_only=forward_only,
            )  # fmt: skip
        zero = torch.zeros((), dtype=torch.float64, device=ranks.device)
        return sum((output["loss"].double() for output in outputs), zero) if is_loss_rank else zero

    @torch.no_grad()
    def evaluate(step: int) -> None:
        model.eval()
        micro_batches = list(batches.for_validation(run.valid, cfg.train.eval_samples, layout, dp_rank))
        loss = run_schedule([(0, micro_batch) for micro_batch in micro_batches], forward_only=True)
        dist.all_reduce(loss)
        targets, _ = processes.totals(task.counts(micro_batches), ranks, dp_group)
        log.valid(step, (loss / targets).item(), targets)
        model.train()

    def save(step: int, is_last: bool) -> None:
        pieces = mcore.pieces_of(model, optimizer, mapping, shapes)
        in_background = cfg.train.async_save and not is_last
        checkpoint.save(run.out, pieces, shapes, state.meta(run, step), cfg.train.keep, log.saved, in_background)

    # ---- resume
    step = run.resume.step if run.resume else 0
    mcore.load_state(model, optimizer, mapping, shapes, state.values(cfg, task, shapes, run.resume), step)
    dist.barrier()  # every rank has accepted the run
    if ranks.rank == 0:
        run_record.begin(run)
    log = Log(run, task, ranks)

    # ---- loop
    model.train()
    prefetched = batches.prefetch(run, step, dp_rank)
    while step < cfg.train.steps:
        step += 1
        log.begin_step()
        lr = optim.lr_at(step, cfg.optim)
        mcore.set_lr(optimizer, lr, cfg.optim.weight_decay)

        micro_batches = next(prefetched)
        targets, tokens = processes.totals(task.counts(micro_batches), ranks, dp_group)  # in the global batch
        seeds = [processes.seed_micro_batch(cfg.train.seed, step, micro, dp_rank) for micro in range(len(micro_batches))]
        # Megatron sums gradients over micro batches and ranks, and divides by the targets of the global batch (invariant 5)
        seeded = list(zip(seeds, micro_batches, strict=True))
        model.zero_grad_buffer()
        optimizer.zero_grad()
        share = run_schedule(seeded, forward_only=False) / targets
        [loss], stop = processes.reduce_step(share[None], ranks, step, run.samples(step))

        grad_norm = mcore.update(optimizer, ranks)
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
    export.to_hf(run, task, ranks)


if __name__ == "__main__":
    processes.run(main)
