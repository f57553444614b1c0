"""The order of examples in finetuning, with steps of similar lengths: a pure function of (seed, step) (invariant 3)."""

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from common import config, preflight
from common.data import batches, examples
from common.errors import BadInput
from common.layout import Layout
from recipes.bert import finetune

SIZE, BATCH, WINDOW = 3668, 32, 50  # as MRPC


class Numbered(examples.Examples):
    def collate(self, numbers):
        indices = self.indices(numbers)
        return {"indices": indices, "lengths": self.lengths[indices]}


def opened(size=SIZE, window=WINDOW, batch=BATCH, seed=1234, shuffle=True):
    words = SimpleNamespace(hash="", size=1)
    drawn = random.Random(0)
    lengths = np.array([8 + int(60 * drawn.random() ** 2) for _ in range(size)])
    source = examples.Source("here", "", ".", words, 0)
    return Numbered(source, lengths, seed=seed, shuffle=shuffle, length_window=window, global_batch=batch)


def step_lengths(dataset, steps):
    return [dataset.lengths[dataset.indices(range(s * BATCH, (s + 1) * BATCH))] for s in range(steps)]


@pytest.mark.parametrize(
    "size, window, batch", [(SIZE, WINDOW, BATCH), (100, 50, 32), (31, 3, 8), (5, 2, 8), (1, 1, 1), (97, 0, 8)]
)
def test_every_pass_has_each_example_once(size, window, batch):
    dataset = opened(size, window, batch)
    passes = [dataset.indices(range(e * size, (e + 1) * size)).tolist() for e in range(3)]
    assert all(sorted(order) == list(range(size)) for order in passes)
    assert size < 31 or passes[0] != passes[1] != passes[2]


def test_a_window_has_the_samples_that_it_has_without_lengths():
    """Samples are exchanged within windows of 50 steps, and within a pass."""
    dataset, plain = opened(), opened(window=0)
    ends = sorted({*range(0, 3 * SIZE, WINDOW * BATCH), *range(0, 3 * SIZE + 1, SIZE)})
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        numbers = range(begin, end)
        assert Counter(dataset.indices(numbers).tolist()) == Counter(plain.indices(numbers).tolist())


def test_steps_have_similar_lengths_in_random_order():
    dataset = opened()
    first = step_lengths(dataset, WINDOW)
    bounds = sorted((int(lengths.min()), int(lengths.max())) for lengths in first)
    assert all(before[1] <= after[0] for before, after in zip(bounds[:-1], bounds[1:], strict=True)), "as if sorted and cut"
    longest = [int(lengths.max()) for lengths in first]
    assert abs(np.corrcoef(np.arange(WINDOW), longest)[0, 1]) < 0.4
    other = [int(lengths.max()) for lengths in step_lengths(opened(seed=1), WINDOW)]
    assert longest != other and sorted(longest) != longest
    padding = [sum(lengths.max() * len(lengths) for lengths in step_lengths(opened(window=w), 300)) for w in (0, WINDOW)]
    assert padding[1] < 0.6 * padding[0]


@pytest.mark.parametrize("dp, micro", [(1, 32), (1, 4), (2, 8), (4, 2)])
def test_layouts_and_interruptions_do_not_change_a_step(dp, micro):
    """What the replicas read in a step is one global batch, wherever the run is continued, also across passes and windows."""
    whole, dataset = opened(), opened()
    cfg = SimpleNamespace(train=SimpleNamespace(steps=200))
    layout = Layout(world=dp, dp=dp, tp=1, pp=1, micro_batch=micro, accumulate=BATCH // dp // micro)
    for step in (199, 1, 114, 115, 50, 51, 2):
        run = SimpleNamespace(
            train=dataset, cfg=cfg, layout=layout, samples=lambda step: range((step - 1) * BATCH, step * BATCH)
        )
        ranks = [next(batches.prefetch(run, step - 1, rank)) for rank in range(dp)]
        read = [micro_batch["indices"].tolist() for rank in ranks for micro_batch in rank]
        assert sorted(sum(read, [])) == sorted(whole.indices(range((step - 1) * BATCH, step * BATCH)).tolist())
        together = [np.concatenate([rank[m]["lengths"] for rank in ranks]) for m in range(layout.accumulate)]
        assert all(before.max() <= after.min() for before, after in zip(together[:-1], together[1:], strict=True))


def test_a_sample_is_a_function_of_its_number():
    dataset, again = opened(), opened()
    numbers = [7, 7000, 3667, 3668, 1599, 1600, 2**40]
    together = dataset.indices(numbers).tolist()
    assert together == [int(again.indices([number])[0]) for number in numbers[::-1]][::-1]
    assert opened(shuffle=False).indices(range(5)).tolist() == [0, 1, 2, 3, 4]


CONFIG = """
model: {layers: 1, hidden: 8, heads: 1, positions: 16, vocab_size: 128}
task: {name: sst2}
data: {seq_len: 16}
optim: {lr: 1.0e-4}
train: {steps: 1, global_batch: 2}
phases: [{train.steps: 2, train.global_batch: 4}]
"""


def test_a_run_of_an_earlier_version_has_no_window(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.split("phases")[0])
    assert config.load(tmp_path / "config.yaml", [], finetune.Config).data.length_window == 50
    before = config.recorded(tmp_path / "config.yaml", finetune.Config)
    assert before.data.length_window == 0
    problems = preflight._other_run("out", {"data.length_window": 50}, config.hyperparameters(before))
    assert any("data.length_window=0" in line for line in problems)


def test_phases_with_other_batches_need_no_window(tmp_path):
    (tmp_path / "phases.yaml").write_text(CONFIG)
    with pytest.raises(BadInput, match="train.global_batch changes.*give data.length_window=0"):
        config.load(tmp_path / "phases.yaml", [], finetune.Config)
    config.load(tmp_path / "phases.yaml", ["data.length_window=0"], finetune.Config)
