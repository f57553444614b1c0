"""What the passes of a step say of it, on all ranks: who computes, communicates or waits, and what the schedule alone predicts.

Torch-free. The spans come from common/comparison/passes.py.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

PASSES = ("forward", "backward")
COMMUNICATION = ("exchange", "sum", "collective")  # between stages; of gradients, by the schedule; any other collective


class Span(NamedTuple):
    kind: str  # of PASSES or COMMUNICATION
    begin: float  # seconds, on a clock that all ranks share
    end: float
    micro: int = 0  # which micro batch of the step, on this rank
    chunk: int = 0  # which of the layer chunks of this stage

    @property
    def seconds(self) -> float:
        return self.end - self.begin


Step = Sequence[Sequence[Span]]  # the spans of each rank
Task = tuple[int, str, int, int]  # stage, kind, micro batch, chunk
Order = Sequence[Sequence[tuple[str, int, int]]]  # of each stage, its passes in turn: kind, micro batch, chunk


class Share(NamedTuple):
    """Seconds of one stage in a step. From the first forward to the last backward pass of all stages it computes, exchanges or
    idles; `sums` comes after it."""

    forward: float
    backward: float
    exchange: float  # in calls that send or receive, when what the next pass needs was computed
    idle: float  # the rest: waiting for another stage, and what the host does between two calls
    sums: float  # of gradients, when all stages are done with their passes

    @property
    def compute(self) -> float:
        return self.forward + self.backward


def passes(spans: Sequence[Span]) -> list[Span]:
    return sorted((span for span in spans if span.kind in PASSES), key=lambda span: span.begin)


def compute_seconds(spans: Sequence[Span]) -> float:
    """Seconds of a rank's forward and backward passes, without the collectives in them."""
    own = passes(spans)
    return sum(span.seconds for span in own) - sum(_collectives_in(span, spans) for span in own)


def _collectives_in(one: Span, spans: Sequence[Span]) -> float:
    return sum(s.seconds for s in spans if s.kind in COMMUNICATION and one.begin <= s.begin and s.end <= one.end)


def window(step: Step) -> tuple[float, float]:
    """From the first forward to the last backward pass."""
    own = [span for spans in step for span in passes(spans)]
    return min(span.begin for span in own), max(span.end for span in own)


def needs(task: Task, stages: int, chunks: int) -> Task | None:
    """The pass whose output this one needs. Chunk c of stage s has place c x stages + s on a micro batch's way
    (arXiv:2104.04473, section 2.2)."""
    stage, kind, micro, chunk = task
    place = chunk * stages + stage
    if kind == "backward" and place == stages * chunks - 1:
        return stage, "forward", micro, chunk
    before = place + (1 if kind == "backward" else -1)
    return (before % stages, kind, micro, before // stages) if before >= 0 else None


def chunks_of(step: Step) -> int:
    return 1 + max(span.chunk for spans in step for span in passes(spans))


def exchanges(step: Step) -> list[list[Span]]:
    """What each stage of a pipeline sends and receives: the time in such calls when what its next pass needs is computed.

    Before that a receive waits for another stage, which is idle time.
    """
    begin, end = window(step)
    stages, chunks = len(step), chunks_of(step)
    done = {(s, span.kind, span.micro, span.chunk): span.end for s, spans in enumerate(step) for span in passes(spans)}
    found = []
    for stage, spans in enumerate(step):
        free, between = begin, list[tuple[float, float]]()
        for following in passes(spans):
            source = needs((stage, following.kind, following.micro, following.chunk), stages, chunks)
            between.append((max(free, done[source] if source in done else free), following.begin))
            free = following.end
        between.append((free, end))  # it sends its last gradients
        calls = [span for span in spans if span.kind == "exchange"]
        found.append([part for limits in between for part in _cut(calls, *limits)])
    return found


def shares(step: Step) -> list[Share]:
    """Of each stage of a pipeline, whose stages are the ranks."""
    begin, end = window(step)
    found = []
    for spans, sent in zip(step, exchanges(step), strict=True):
        seconds = {kind: sum(span.seconds for span in passes(spans) if span.kind == kind) for kind in PASSES}
        exchange = sum(span.seconds for span in sent)
        sums = sum(span.seconds for span in _cut([span for span in spans if span.kind == "sum"], end, math.inf))
        idle = end - begin - sum(seconds.values()) - exchange
        found.append(Share(seconds["forward"], seconds["backward"], exchange, idle, sums))
    return found


def _cut(spans: Sequence[Span], begin: float, end: float) -> list[Span]:
    """The parts of spans between two times."""
    parts = [span._replace(begin=max(span.begin, begin), end=min(span.end, end)) for span in spans]
    return [span for span in parts if span.end > span.begin]


def waits(step: Step) -> list[float]:
    """Seconds for which each rank's gradients wait for those of the slowest rank."""
    ends = []
    for spans in step:
        last = passes(spans)[-1]
        ends.append(last.end - _collectives_in(last, spans))  # DeepSpeed sums gradients in its backward pass
    return [max(ends) - end for end in ends]


def bubble(step: Step) -> float:
    """Share of the stages' time, from the first forward to the last backward pass, without either."""
    begin, end = window(step)
    return 1 - statistics.mean(compute_seconds(spans) for spans in step) / (end - begin)


def imbalance(step: Step) -> float:
    """Passes of the slowest rank, to the mean over the ranks."""
    seconds = [compute_seconds(spans) for spans in step]
    return max(seconds) / statistics.mean(seconds)


# ---- what the schedule predicts


def bubble_of_equal_stages(stages: int, micro_batches: int, chunks: int) -> float:
    """(p - 1) / (m v + p - 1), arXiv:2104.04473, section 2.2, as a share of the whole time."""
    return (stages - 1) / (micro_batches * chunks + stages - 1)


def order_of(step: Step) -> list[list[tuple[str, int, int]]]:
    return [[(span.kind, span.micro, span.chunk) for span in passes(spans)] for spans in step]


def median_seconds(steps: Sequence[Step]) -> dict[tuple[int, str, int], float]:
    """(stage, kind, chunk) -> median seconds of such a pass."""
    found: dict[tuple[int, str, int], list[float]] = {}
    for step in steps:
        for stage, spans in enumerate(step):
            for span in passes(spans):
                found.setdefault((stage, span.kind, span.chunk), []).append(span.seconds)
    return {key: statistics.median(values) for key, values in found.items()}


def simulated(order: Order, seconds: dict[tuple[int, str, int], float]) -> list[list[Span]]:
    """The step in which every stage makes its passes in this order, each as soon as what it needs is computed.

    Exchanges take no time. seconds: as of `median_seconds`. ValueError for an order in which stages wait for each other.
    """
    stages, chunks = len(order), 1 + max(chunk for tasks in order for _, _, chunk in tasks)
    step: list[list[Span]] = [[] for _ in order]
    done: dict[Task, float] = {}
    left = sum(map(len, order))
    while left:
        before = left
        for stage, tasks in enumerate(order):
            while len(step[stage]) < len(tasks):
                kind, micro, chunk = tasks[len(step[stage])]
                source = needs((stage, kind, micro, chunk), stages, chunks)
                if source is not None and source not in done:
                    break
                begin = max(step[stage][-1].end if step[stage] else 0.0, done[source] if source else 0.0)
                span = Span(kind, begin, begin + seconds[stage, kind, chunk], micro, chunk)
                step[stage].append(span)
                done[stage, kind, micro, chunk] = span.end
                left -= 1
        if left == before:
            raise ValueError("the stages wait for each other")
    return step


# ---- a slow rank


class Slow(NamedTuple):
    rank: int
    times: float  # as long as the others take, for the same work

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.times:.1f} x the others"


def slow_ranks(steps: Sequence[Step], work: Sequence[float], limit: float) -> list[Slow]:
    """The ranks whose passes take more than `limit` times as long as those of the other ranks, for the same work.

    work: of each rank, in any unit; equal for copies of a model. The first quartile over the steps decides, so that a rank
    that was disturbed in some of them is not named; the line says the median.
    """
    found = []
    for rank, amount in enumerate(work):
        ratios = []
        for step in steps:
            rates = [compute_seconds(spans) / own for spans, own in zip(step, work, strict=True)]
            ratios.append(rates[rank] / statistics.mean(rates[:rank] + rates[rank + 1 :]))
        low = statistics.quantiles(ratios, n=4, method="inclusive")[0] if len(ratios) > 1 else ratios[0]
        if low > limit and amount:
            found.append(Slow(rank, statistics.median(ratios)))
    return found


def steps_of(lines: Sequence[Sequence[Sequence[Sequence[Any]]]]) -> Iterator[list[list[Span]]]:
    """Steps of each rank, as passes.py writes them -> the steps of all ranks."""
    for ranks in zip(*lines, strict=True):
        yield [[Span(*span) for span in spans] for spans in ranks]
