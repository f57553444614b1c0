"""Pretrain T5 with Megatron Core: tensor, sequence, pipeline and data parallel, distributed optimizer, recompute.

bash recipes/t5/megatron/pretrain.sh recipes/t5/configs/tiny.yaml out/tiny_t5 megatron.tp=2
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


def main(argv: list[str]) -> None:
    # ---- config
    config_path, out, *overrides = argv
    ranks = processes.start()
    run = preflight.prepare(config_path, out, overrides, "megatron", task, ranks.world)
    cfg, layout = run.cfg, run.layout
    processes.check_dtype(cfg.train.dtype, ranks.device)

    # ---- ranks
    mcore.start(ranks, layout)
    dp_rank, dp_group = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_group()
    # one rank of each replica tells the loss: the last stage's first tp rank
    reports = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0

    # ---- model
    net = megatron_model.build(cfg, layout)
    model = mcore.wrap(net.config, net, cfg, ranks)
    mapping = parameter_map(cfg.model)
    shapes = parameters.expected(cfg.model, task)  # of each parameter, by Hugging Face name

    # ---- optimizer
    optimizer = mcore.optimizer_for(model, cfg, ranks)

    # ---- data
    schedule = get_forward_backward_func()

    def forward(
        micro_batches: Iterator[tuple[int, batches.MicroBatch]], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable]:
        """One micro batch on this stage, as Megatron's schedules call it: output, and the loss function."""
        seed, rows = next(micro_batches)
        mcore.begin_micro_batch(seed)
        batch = task.make_batch(rows, ranks.device)
        mask = ~batch["attention_mask"][:, None, None]  # (B, 1, 1, T), True: masked out
        output = model(batch["inputs"], batch["decoder_inputs"], mask, labels=batch["targets"])

        def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            """losses (B, S) -> sum, number of targets, what the schedule returns."""
            total = (losses.float() * batch["loss_mask"]).sum()
            # the schedule divides in place: give it a value of its own
            return total, batch["loss_mask"].sum().int(), {"loss": total.detach().clone()}

        return output, loss_of

    def run_schedule(micro_batches: Iterator[tuple[int, batches.MicroBatch]], number: int, forward_only: bool) -> torch.Tensor:
        """The summed loss of `number` micro batches; zero on ranks that do not tell it."""
        with cuda_stand_in.active(ranks):
            told = schedule(
                forward_step_func=forward, data_iterator=micro_batches, model=[model], num_microbatches=number,
                seq_length=cfg.data.seq_len, micro_batch_size=layout.micro_batch, forward_only=forward_only,
            )  # fmt: skip
        zero = torch.zeros((), dtype=torch.float64, device=ranks.device)
        return sum((t["loss"].double() for t in told), zero) if reports else zero

    @torch.no_grad()
    def evaluate(step: int) -> None:
        model.eval()
        rows = list(batches.for_validation(run.valid, cfg.train.eval_samples, layout, dp_rank))
        loss = run_schedule(iter([(0, r) for r in rows]), len(rows), forward_only=True)
        totals = torch.stack([loss, torch.full_like(loss, batches.targets(rows) * reports)])
        dist.all_reduce(totals)
        log.valid(step, (totals[0] / totals[1]).item(), int(totals[1]))
        model.train()

    def save(step: int) -> None:
        checkpoint.save(run.out, mcore.gather_state(model, optimizer, mapping), shapes, state.meta(run, step), cfg.train.keep)

    # ---- resume
    step = run.resume.step if run.resume else 0
    mcore.load_state(model, optimizer, mapping, shapes, state.values(cfg, task, shapes, run.resume), step)
    dist.barrier()  # no rank refuses the run from here on
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

        rows = next(prefetched)
        counts = [batches.targets(rows), batches.tokens(rows)]
        targets, tokens = processes.totals(counts, dp_group, ranks.device)  # of the global batch
        seeds = [processes.seed_micro_batch(cfg.train.seed, step, micro, dp_rank) for micro in range(len(rows))]
        model.zero_grad_buffer()
        optimizer.zero_grad()
        # sums gradients over micro batches and ranks, and divides them by the targets of the global batch (law 5)
        loss = run_schedule(iter(zip(seeds, rows, strict=True)), layout.accumulate, forward_only=False) / targets
        [loss], stop = processes.reduce_step(loss[None], ranks, step, run.samples(step))

        grad_norm = mcore.update(optimizer, ranks)
        processes.must_be_finite("gradient norm", grad_norm, step, run.samples(step))

        log.step(step, loss, grad_norm, lr, tokens)
        last = step == cfg.train.steps
        if run.valid and (last or (cfg.train.eval_every and step % cfg.train.eval_every == 0)):
            evaluate(step)
        if last or stop or (cfg.train.save_every and step % cfg.train.save_every == 0):
            save(step)
        if stop and not last:
            raise processes.stopped(stop, step)

    # ---- export
    log.close()
    export.to_hf(run, task, ranks)


if __name__ == "__main__":
    processes.run(main)
