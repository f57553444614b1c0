"""The order in which samples are read: pure functions of (seed, pass) that need no index and no state.

Letters in shapes: B requested samples.
"""

from collections.abc import Sequence

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)
_WORD = 2**64 - 1
_ROUNDS = 6
FEW = 12  # numbers that one by one walk faster than an array of them


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, in place: every bit of the result depends on every bit of x, (...) uint64."""
    x ^= x >> _30
    x *= _FIRST
    x ^= x >> _27
    x *= _SECOND
    x ^= x >> _31
    return x


def permute(i: np.ndarray | Sequence[int], n: int, key: np.ndarray | int) -> np.ndarray:
    """The images of i under a random permutation of 0..n-1: (B,) int64 in [0, n). O(1) memory, no table.

    i: (B,), each in [0, n). key: the permutation's number, one for all or (B,), read as uint64.

    A Feistel network permutes 0..2^bits-1, the smallest such range that contains 0..n-1. A result of n or more goes through the
    network again until it is below n (cycle walking). That gives a permutation of 0..n-1, in at most 2 turns on average.
    """
    x = np.array(i, dtype=np.uint64, ndmin=1)
    keys = np.array(key, dtype=np.uint64, ndmin=1)
    shared = bool((keys == keys[:1]).all())
    rounds = _GOLDEN * np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None]
    keys = _mix(keys[: 1 if shared else None] + rounds)  # (rounds, 1 or B)
    bits = max(1, (n - 1).bit_length())
    shift = np.uint64(bits // 2)
    low, high = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    todo = np.arange(len(x))
    while len(todo):
        y = x[todo]
        left, right = y >> shift, y & low
        round_keys = keys if shared else keys[:, todo]
        for r in range(0, _ROUNDS, 2):
            left ^= _mix(right + round_keys[r]) & high
            right ^= _mix(left + round_keys[r + 1]) & low
        x[todo] = y = (left << shift) | right
        todo = todo[y >= n]
        if len(todo) <= FEW:
            break
    for row in todo.tolist():
        x[row] = _walk(int(x[row]), n, keys[:, 0 if shared else row].tolist())
    return x.astype(np.int64)


def _walk(x: int, n: int, keys: Sequence[int]) -> int:
    """The same for one number, until it is below n."""
    bits = max(1, (n - 1).bit_length())
    shift = bits // 2
    low, high = (1 << shift) - 1, (1 << bits - shift) - 1
    while x >= n:
        left, right = x >> shift, x & low
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left ^= _mix_one(right + even) & high
            right ^= _mix_one(left + odd) & low
        x = left << shift | right
    return x


def _mix_one(x: int) -> int:
    x &= _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


def epoch_key(seed: int, corpus: np.ndarray, epoch: np.ndarray) -> np.ndarray:
    """One key for `permute` per (seed, corpus number, epoch), (B,) uint64."""
    start = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    return _mix(_mix(start + _GOLDEN * corpus.astype(np.uint64)) ^ (epoch.astype(np.uint64) * _GOLDEN))


class BlendPattern:
    """Which corpus sample i of a blend comes from: a cycle of `length`, in which each corpus has its exact share.

    Each position goes to the corpus that is furthest behind its share, so every prefix of the cycle is close to the shares too.
    """

    def __init__(self, weights: Sequence[float], length: int = 10_000):
        exact = np.array(weights, dtype=np.float64) / np.sum(weights) * length
        self.counts = np.floor(exact).astype(np.int64)  # positions of each corpus in a cycle
        rest = length - int(self.counts.sum())
        self.counts[np.argsort(self.counts - exact, kind="stable")[:rest]] += 1
        self.length = length
        self.corpus = np.empty(length, dtype=np.int64)  # corpus at each position
        self.rank = np.empty(length, dtype=np.int64)  # how often that corpus comes before it in the cycle
        shares, assigned = [int(c) for c in self.counts], [0] * len(self.counts)
        for position in range(length):
            c = max(range(len(shares)), key=lambda c: shares[c] * (position + 1) - assigned[c] * length)
            self.corpus[position], self.rank[position] = c, assigned[c]
            assigned[c] += 1

    def assign(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (B,) -> the corpus of each, and how many samples of that corpus come before it."""
        cycle, position = np.divmod(i, self.length)
        corpus = self.corpus[position]
        return corpus, cycle * self.counts[corpus] + self.rank[position]
