"""Which samples a rank reads: training by step (law 3), validation once through the file."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from common.config import Layout

if TYPE_CHECKING:
    from common.corpus import Stream

Rows = dict[str, np.ndarray]


def of_step(stream: "Stream", step: int, global_batch: int, layout: Layout, dp_rank: int) -> Iterator[Rows]:
    """The micro batches of one data-parallel replica for optimizer step `step` (the first is 1).

    Sample number of the run = (step - 1) x global_batch + place in the global batch, whatever the layout is.
    """
    first = (step - 1) * global_batch
    for micro in range(layout.accumulate):
        start = first + (micro * layout.dp + dp_rank) * layout.micro_batch
        yield stream.rows(np.arange(start, start + layout.micro_batch))


def of_validation(stream: "Stream", limit: int | None, layout: Layout, dp_rank: int) -> Iterator[Rows]:
    """Every validation sample once over all replicas (the first `limit`), the same number of batches on each.

    Places beyond the last sample repeat it with nothing to predict, so that no sample counts twice.
    """
    samples = min(limit or len(stream), len(stream))
    together = layout.micro_batch * layout.dp
    for first in range(0, samples, together):
        numbers = np.arange(layout.micro_batch) + first + dp_rank * layout.micro_batch
        rows = stream.rows(np.minimum(numbers, samples - 1))
        rows["loss_mask"] = rows["loss_mask"] & (numbers < samples)[:, None]
        yield rows


def targets(rows: list[Rows]) -> int:
    """How many tokens these micro batches predict."""
    return sum(int(r["loss_mask"].sum()) for r in rows)
