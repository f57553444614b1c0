"""Which layers each stage of DeepSpeed's pipeline has."""

import random
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest

from common.stacks import stages


@pytest.mark.parametrize(
    ("partition", "pp", "expected"),
    [
        ("uniform", 2, [0, 3, 6]), ("uniform", 4, [0, 2, 3, 4, 6]), ([1, 3], 2, [0, 2, 6]), ([1, 1, 2], 3, [0, 2, 3, 6]),
        ("parameters", 2, [0, 3, 6]),
    ],
)  # fmt: skip
def test_bounds(partition, pp, expected):
    assert stages.bounds(partition, [9, 5, 5, 5, 5, 9], pp) == expected  # embedding, four layers, output


def test_a_large_vocabulary_gets_stages_of_its_own():
    assert stages.bounds("parameters", [20, 1, 1, 1, 1, 20], 4) == [0, 1, 4, 5, 6]  # none is empty


def test_the_largest_stage_is_as_small_as_it_can_be():
    rng = random.Random(0)

    def largest(sizes: list[int], bounds: Sequence[int]) -> int:
        return max(sum(sizes[start:stop]) for start, stop in pairwise(bounds))

    for _ in range(300):
        sizes = [rng.randint(1, 40) for _ in range(rng.randint(3, 10))]
        pp = rng.randint(1, len(sizes))
        bounds = stages.bounds("parameters", sizes, pp)
        ways = [(0, *inner, len(sizes)) for inner in combinations(range(1, len(sizes)), pp - 1)]  # all without an empty stage
        assert tuple(bounds) in ways
        assert largest(sizes, bounds) == min(largest(sizes, way) for way in ways)
