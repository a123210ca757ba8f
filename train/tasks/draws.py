"""Random numbers of samples by their index: sample i gets the same whoever asks, and in any order.

Number s of sample i is mix(row(i) xor column(s)), where `mix` is the finaliser of SplitMix64
(Steele et al., 2014, doi 10.1145/2660193.2660195) and rows and columns are hashed themselves. There
is no generator to be advanced, so nothing to store, to share between workers or to skip on resume.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
Key = tuple[str | int, ...]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """Draws of N samples at once; row n of each depends on the key and on `indices[n]` alone.

    Args:
        key: what the stream belongs to: plain values.
        indices: N sample numbers, 0 or more.
    """

    def __init__(self, key: Key, indices: Sequence[int] | Ints) -> None:
        self.key, self.indices = key, np.asarray(indices, dtype=np.int64)
        digest = hashlib.sha256(repr(key).encode()).digest()
        start, self._place = np.frombuffer(digest[:8], dtype="<u8"), 0
        numbers = self.indices.astype(np.uint64)
        self._rows = _mix(_mix(start + numbers * GOLDEN) ^ np.frombuffer(digest[8:16], "<u8"))
        self.count = len(self._rows)

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """(N, *shape) in [0, 1)."""
        size = int(np.prod(shape, dtype=np.int64))
        slots = np.arange(self._place + 1, self._place + size + 1, dtype=np.uint64)
        self._place += size
        words = _mix(self._rows[:, None] ^ _mix(slots * GOLDEN))
        wide: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64)
        return (wide * 2.0**-53).reshape(self.count, *shape)

    def integers(self, high: int, *shape: int) -> Ints:
        """(N, *shape) of 0 ... high - 1, each as likely."""
        return (self.uniform(*shape) * high).astype(np.int64)

    def choose(self, n: int, k: int) -> Ints:
        """(N, k) different ones of 0 ... n - 1 in random order; every order is as likely."""
        chances, pool = self.uniform(k), np.tile(np.arange(n), (self.count, 1))
        rows = np.arange(self.count)
        for i in range(k):  # the first k steps of Fisher and Yates' shuffle
            j = i + (chances[:, i] * (n - i)).astype(np.int64)
            pool[rows, i], pool[rows, j] = pool[rows, j], pool[rows, i]
        return pool[:, :k]

    def choose_weighted(self, weights: NDArray[np.float64], k: int) -> Ints:
        """(N, k) different slots, drawn one after the other with odds `weights` among those left.

        Clocks that ring at rate w ring first with odds w: Efraimidis and Spirakis, 2006.
        """
        clocks = -np.log1p(-self.uniform(len(weights))) / weights
        first = np.argpartition(clocks, k - 1, axis=1)[:, :k]
        order = np.take_along_axis(clocks, first, 1).argsort(axis=1)
        return np.take_along_axis(first, order, 1)


def generator(key: Key, number: int) -> np.random.Generator:
    """A generator for one number of a stream, for what takes an unknown count of draws.

    It is numpy's own, whose draws another release of numpy may change.
    """
    digest = hashlib.sha256(repr((*key, number)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _mix(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
