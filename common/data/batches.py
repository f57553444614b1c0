"""Which samples a rank reads: training by step (invariant 3), validation once through the dataset."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from common import screen
from common.errors import BadInput
from common.launch import heartbeat, processes, startup
from common.layout import Layout

if TYPE_CHECKING:
    import torch

    from common.contract import Dataset
    from common.preflight import Run

MicroBatch = dict[str, np.ndarray]


def for_step(dataset: "Dataset", numbers: range, layout: Layout, dp_rank: int, sp_rank: int = 0) -> Iterator[MicroBatch]:
    """The micro batches of one data-parallel replica for the step that has the samples `numbers` (`Run.samples`); of a rank
    that shares them with others (layout.sp), its part.

    A step has the same samples under every layout, and so the same update.
    """
    order = dataset.batch_order(numbers)
    for micro in range(layout.accumulate):
        start = (micro * layout.dp + dp_rank) * layout.micro_batch
        batch = collate_checked(dataset, order[start : start + layout.micro_batch])
        yield sequence_part(batch, sp_rank, layout.sp)


def collate_checked(dataset: "Dataset", numbers: np.ndarray) -> MicroBatch:
    """`dataset.collate`. BadInput, which names the sample, for a token id that is outside the model's embedding.

    With tensor parallelism Megatron masks such an id and trains on; elsewhere the kernel fails. A corpus is checked when it is
    read (IndexedDataset.read); this check also covers finetuning examples and special tokens.
    """
    batch = dataset.collate(numbers)
    vocab_size = dataset.vocab_size
    if vocab_size is None:
        return batch
    for name in ("tokens", "inputs", "targets"):
        if name in batch and batch[name].size:
            ids = batch[name].reshape(len(batch[name]), -1)
            unsigned = ids.view(f"u{ids.itemsize}")  # ids below 0 become large
            if int(unsigned.max()) >= vocab_size:
                row, column = np.argwhere(unsigned >= vocab_size)[0]
                raise BadInput(
                    f"{dataset.where(int(numbers[row]))} holds token id {int(ids[row, column]):,}, "
                    f"the model knows ids from 0 to {vocab_size - 1:,}; tokenize with the model's tokenizer, or set "
                    "model.vocab_size above it"
                )
    return batch


def sequence_part(batch: MicroBatch, part: int, parts: int) -> MicroBatch:
    """The positions of one of `parts` ranks that share each sample of a micro batch of a language model.

    tokens (B, T + 1) -> (B, T / parts + 1): its last target is the next rank's first input. loss_mask, position (B, T) -> (B,
    T / parts); lengths (B,), of these positions. segment (B, T) stays whole: attention is over all positions.
    """
    if parts == 1:
        return batch
    length = batch["loss_mask"].shape[1]
    begin, end = part * length // parts, (part + 1) * length // parts
    position = batch.get("position", np.broadcast_to(np.arange(length), batch["loss_mask"].shape))
    own = {name: values[:, begin:end] for name, values in (("loss_mask", batch["loss_mask"]), ("position", position))}
    own |= {"tokens": batch["tokens"][:, begin : end + 1], "lengths": np.clip(batch["lengths"] - begin, 0, end - begin)}
    return batch | {name: np.ascontiguousarray(values) for name, values in own.items()}


def for_validation(
    dataset: "Dataset | None", limit: int | None, layout: Layout, dp_rank: int, sp_rank: int = 0
) -> Iterator[MicroBatch]:
    """Every validation sample once over all replicas (the first `limit`), with the same number of batches on each replica.

    Numbers beyond the last sample repeat it without targets, so that no sample counts twice. Without a dataset there are none.
    """
    if dataset is None:
        return
    samples = min(limit or len(dataset), len(dataset))
    together = layout.micro_batch * layout.dp
    order = dataset.batch_order(range(samples))
    steps = -(-samples // (together * layout.group)) * layout.group
    with screen.progress("valid", steps, "batches", os.environ.get("RANK", "0") == "0") as report:
        for step in range(steps):
            heartbeat.beat("evaluation")
            positions = np.arange(layout.micro_batch) + step * together + dp_rank * layout.micro_batch
            batch = collate_checked(dataset, order[np.minimum(positions, samples - 1)])
            for name in [name for name in batch if name.endswith("_mask")]:  # which targets count: (B, ...) bool
                real = (positions < samples).reshape(-1, *[1] * (batch[name].ndim - 1))
                batch[name] = batch[name] & real
            yield sequence_part(batch, sp_rank, layout.sp)
            report(step + 1)


def to_device(arrays: Mapping[str, np.ndarray], device: "torch.device | str") -> "dict[str, torch.Tensor]":
    """The arrays as tensors on `device`; the copies to a GPU run beside its kernels."""
    import torch

    return {name: processes.on_device(torch.from_numpy(array), device) for name, array in arrays.items()}


def targets(micro_batches: Sequence[MicroBatch], mask: str = "loss_mask") -> int:
    """How many targets of one part of the loss these micro batches hold."""
    return sum(int(batch[mask].sum()) for batch in micro_batches)


def tokens(micro_batches: Sequence[MicroBatch]) -> int:
    """How many tokens these micro batches hold, without padding."""
    return sum(int(batch["lengths"].sum()) for batch in micro_batches)


def prefetch(run: "Run", step: int, dp_rank: int, sp_rank: int = 0) -> Iterator[list[MicroBatch]]:
    """`for_step` of the steps after `step`. A thread prepares each step while the one before it trains."""
    dataset = run.train
    if dataset is None:
        raise ValueError("a dry run has no training data")
    with ThreadPoolExecutor(1) as pool:

        def begin(step: int) -> Future[list[MicroBatch]]:
            return pool.submit(lambda: list(for_step(dataset, run.samples(step), run.layout, dp_rank, sp_rank)))

        pending = begin(step + 1)
        for following in range(step + 2, run.cfg.train.steps + 2):
            micro_batches = pending.result()
            if following == step + 2:
                startup.done("first batch")
            if following <= run.cfg.train.steps:
                pending = begin(following)
            yield micro_batches
