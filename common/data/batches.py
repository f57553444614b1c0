"""Which samples a rank reads: training by step (law 3), validation once through the file."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from common.errors import BadInput
from common.launch import heartbeat
from common.layout import Layout

if TYPE_CHECKING:
    from common.contract import Dataset
    from common.preflight import Run

MicroBatch = dict[str, np.ndarray]


def for_step(stream: "Dataset", numbers: range, layout: Layout, dp_rank: int) -> Iterator[MicroBatch]:
    """The micro batches of one data-parallel replica for the step that has the samples `numbers` (`Run.samples`).

    Which samples a step has, and so what it learns, is the same whatever the layout is.
    """
    arranged = stream.batch_order(numbers)
    for micro in range(layout.accumulate):
        start = (micro * layout.dp + dp_rank) * layout.micro_batch
        yield rows_of(stream, arranged[start : start + layout.micro_batch])


def rows_of(stream: "Dataset", numbers: np.ndarray) -> MicroBatch:
    """`dataset.collate`. BadInput, naming the sample, for an id that the model's embedding does not hold: with tensor
    parallelism Megatron masks such an id and trains on, elsewhere it is a fault of the kernel. Reading a corpus finds its own
    (IndexedDataset.read); this is the last line, for examples of finetuning and special tokens too."""
    rows = stream.collate(numbers)
    for name in ("tokens", "inputs", "targets") if stream.vocab_size is not None else ():
        if name in rows and rows[name].size:
            ids = rows[name].view(f"u{rows[name].itemsize}")  # unsigned: ids below 0 become large
            if int(ids.max()) >= stream.vocab_size:
                row, place = np.argwhere(ids.reshape(len(ids), -1) >= stream.vocab_size)[0]
                raise BadInput(
                    f"{stream.where(int(numbers[row]))} holds token id {int(rows[name].reshape(len(ids), -1)[row, place]):,}, "
                    f"the model knows ids from 0 to {stream.vocab_size - 1:,}; tokenize with the model's tokenizer, or set "
                    "model.vocab_size above it"
                )
    return rows


def for_validation(stream: "Dataset", limit: int | None, layout: Layout, dp_rank: int) -> Iterator[MicroBatch]:
    """Every validation sample once over all replicas (the first `limit`), the same number of batches on each.

    Places beyond the last sample repeat it with nothing to predict, so that no sample counts twice.
    """
    samples = min(limit or len(stream), len(stream))
    together = layout.micro_batch * layout.dp
    arranged = stream.batch_order(range(samples))
    for first in range(0, samples, together):
        heartbeat.beat("evaluation")
        numbers = np.arange(layout.micro_batch) + first + dp_rank * layout.micro_batch
        rows = rows_of(stream, arranged[np.minimum(numbers, samples - 1)])
        for name in [name for name in rows if name.endswith("_mask")]:  # which targets count: (B, ...) bool
            real = (numbers < samples).reshape(-1, *[1] * (rows[name].ndim - 1))
            rows[name] = rows[name] & real
        yield rows


def targets(rows: list[MicroBatch], mask: str = "loss_mask") -> int:
    """How many targets of one part of the loss these micro batches hold."""
    return sum(int(r[mask].sum()) for r in rows)


def tokens(rows: list[MicroBatch]) -> int:
    """How many tokens these micro batches hold, padding left out."""
    return sum(int(r["lengths"].sum()) for r in rows)


def prefetch(run: "Run", step: int, dp_rank: int) -> Iterator[list[MicroBatch]]:
    """`for_step` of the steps after `step`, each made by a thread while the one before trains: for samples that take work."""
    with ThreadPoolExecutor(1) as pool:

        def begin(step: int) -> Future[list[MicroBatch]]:
            return pool.submit(lambda: list(for_step(run.train, run.samples(step), run.layout, dp_rank)))

        made = begin(step + 1)
        for following in range(step + 2, run.cfg.train.steps + 2):
            rows = made.result()
            if following <= run.cfg.train.steps:
                made = begin(following)
            yield rows
