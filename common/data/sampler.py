"""The order of samples: pure functions of (seed, pass) that need no index and no state.

Letters in shapes: B samples asked for.
"""

from collections.abc import Sequence

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: every bit of the result depends on every bit of x, (...) uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(i: np.ndarray | Sequence[int], n: int, key: np.ndarray | int) -> np.ndarray:
    """Where a random permutation of 0..n-1 puts each i: (B,) int64 in [0, n). O(1) memory, no table.

    i: (B,), each in [0, n). key: the permutation's number, one for all or (B,), read as uint64.

    A Feistel network permutes 0..2^bits-1, the smallest such range that holds n. A result beyond n is put through it
    again until it lies below (cycle walking): that leaves a permutation of 0..n-1, at most 2 turns on average.
    """
    x = np.array(i, dtype=np.uint64, ndmin=1)
    keys = np.array(key, dtype=np.uint64, ndmin=1)[:, None]
    keys = np.broadcast_to(_mix(keys + _GOLDEN * np.arange(1, _ROUNDS + 1, dtype=np.uint64)), (len(x), _ROUNDS))
    bits = max(1, (n - 1).bit_length())
    shift = np.uint64(bits // 2)
    low, high = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> shift, x[todo] & low
        for r in range(0, _ROUNDS, 2):
            left = left ^ (_mix(right + keys[todo, r]) & high)
            right = right ^ (_mix(left + keys[todo, r + 1]) & low)
        x[todo] = (left << shift) | right
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


def epoch_key(seed: int, corpus: np.ndarray, epoch: np.ndarray) -> np.ndarray:
    """One key for each (seed, corpus number, epoch), (B,) uint64."""
    start = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    return _mix(_mix(start + _GOLDEN * corpus.astype(np.uint64)) ^ (epoch.astype(np.uint64) * _GOLDEN))


class BlendPattern:
    """Which corpus sample i of a blend comes from: a cycle of `length`, in which each corpus has its exact share.

    The next place goes to the corpus that lags its share most, so every prefix is close to the shares too.
    """

    def __init__(self, weights: Sequence[float], length: int = 10_000):
        exact = np.array(weights, dtype=np.float64) / np.sum(weights) * length
        self.counts = np.floor(exact).astype(np.int64)  # places of each corpus in a cycle
        rest = length - int(self.counts.sum())
        self.counts[np.argsort(self.counts - exact, kind="stable")[:rest]] += 1
        self.length = length
        self.corpus = np.empty(length, dtype=np.int64)  # corpus at each place
        self.rank = np.empty(length, dtype=np.int64)  # how often it came before in the cycle
        shares, placed = [int(c) for c in self.counts], [0] * len(self.counts)
        for place in range(length):
            c = max(range(len(shares)), key=lambda c: shares[c] * (place + 1) - placed[c] * length)
            self.corpus[place], self.rank[place] = c, placed[c]
            placed[c] += 1

    def locate(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (B,) -> corpus of each, and how many samples of that corpus came before."""
        cycle, place = np.divmod(i, self.length)
        corpus = self.corpus[place]
        return corpus, cycle * self.counts[corpus] + self.rank[place]
