"""Finetune BERT with Megatron Core: tensor, sequence, pipeline and data parallel, distributed optimizer, recompute.

bash recipes/bert/megatron/finetune.sh recipes/bert/configs/finetune_mrpc.yaml out/mrpc init.from=HF_DIR task.data=DIR
"""

from collections.abc import Callable, Iterator
from pathlib import Path

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
from common.stacks import cuda_stand_in, mcore
from common.training import finetuning, optim
from common.training.log import Log

from .. import finetune as task
from . import model as megatron_model
from .parameter_map import parameter_map


def main(argv: list[str]) -> None:
    # ---- config
    config_path, out, *overrides = argv
    ranks = processes.start()
    run = preflight.prepare(config_path, out, overrides, "megatron", task, ranks.world)
    cfg, layout = run.cfg, run.layout
    head = cfg.model.task_head  # its loss and predictions
    processes.check_dtype(cfg.train.dtype, ranks.device)

    # ---- ranks
    mcore.start(ranks, layout)
    dp_rank, dp_group = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_group()
    # one rank of each replica tells the loss: the last stage's first tp rank
    reports = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0

    # ---- model
    net = megatron_model.build_headed(cfg, layout)
    model = mcore.wrap(net.config, net, cfg, ranks)
    mapping = parameter_map(cfg.model)
    shapes = parameters.expected(cfg.model, task)  # of each parameter, by Hugging Face name

    # ---- optimizer
    optimizer = mcore.optimizer_for(model, cfg, ranks)

    # ---- data
    zero = torch.zeros((), dtype=torch.float64, device=ranks.device)
    schedule = get_forward_backward_func()  # with or without pipeline

    def forward(
        micro_batches: Iterator[tuple[int, batches.MicroBatch]], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable]:
        """One micro batch on this stage, as Megatron's schedules call it: output, and the loss function."""
        seed, rows = next(micro_batches)
        mcore.begin_micro_batch(seed)
        batch = task.make_batch(rows, ranks.device)
        mask = ~batch["attention_mask"][:, None, None]  # (B, 1, 1, T), True: masked out
        output = model(batch["tokens"], batch["token_types"], mask)

        def loss_of(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            """logits of the last stage -> summed loss, number of targets, what the schedule returns."""
            total = head.loss_sum(logits, batch)
            # the schedule divides in place: give it a value of its own
            told = {"loss": total.detach().clone(), "predictions": head.predictions(logits.detach(), batch)}
            return total, batch["loss_mask"].sum().int(), told

        return output, loss_of

    def run_schedule(micro_batches: list[tuple[int, batches.MicroBatch]], forward_only: bool) -> list[dict[str, torch.Tensor]]:
        """Loss and predictions of each micro batch; none on ranks that do not tell them."""
        with cuda_stand_in.active(ranks):
            told = schedule(
                forward_step_func=forward, data_iterator=iter(micro_batches), model=[model],
                num_microbatches=len(micro_batches), seq_length=cfg.data.seq_len,
                micro_batch_size=layout.micro_batch * head.sequences, forward_only=forward_only,
            )  # fmt: skip
        return told if reports else []

    @torch.no_grad()
    def evaluate(step: int) -> bool:
        """Is this the best so far?"""
        model.eval()
        rows = list(batches.for_validation(run.valid, cfg.train.eval_samples, layout, dp_rank))
        found = finetuning.Predictions(run, ranks, head.prediction_width(cfg.data.seq_len))
        for micro_rows, told in zip(rows, run_schedule([(0, r) for r in rows], forward_only=True), strict=False):
            found.add(micro_rows, told["loss"], told["predictions"])
        found.gather()
        model.train()
        return task.judge(run, selection, log, step, found)

    def save(out: Path, step: int, keep: int) -> None:
        checkpoint.save(out, mcore.gather_state(model, optimizer, mapping), shapes, state.meta(run, step), keep)

    # ---- resume
    step = run.resume.step if run.resume else 0
    mcore.load_state(model, optimizer, mapping, shapes, state.values(cfg, task, shapes, run.resume), step)
    dist.barrier()  # no rank refuses the run from here on
    if ranks.rank == 0:
        run_record.begin(run)
    log, selection = Log(run, task, ranks), finetuning.Selection(run, task.selection_metric(cfg))

    # ---- loop
    model.train()
    prefetched = batches.prefetch(run, step, dp_rank)
    while step < cfg.train.steps and not selection.is_over:
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
        told = run_schedule(list(zip(seeds, rows, strict=True)), forward_only=False)
        loss = sum((t["loss"].double() for t in told), zero) / targets
        [loss], stop = processes.reduce_step(loss[None], ranks, step, run.samples(step))

        grad_norm = mcore.update(optimizer, ranks)
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
    finetuning.finish(run, task, ranks)


if __name__ == "__main__":
    processes.run(main)
