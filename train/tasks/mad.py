"""The other five tasks of MAD: recall in three kinds, compression, memorization.

Poli et al., 2024, arXiv:2403.17844; defaults and distributions are those of the authors'
code (athms/mad-lab, mad/data/instances.py and configs/tasks). A row here has exactly `length`
tokens, where theirs loses the last one to the shift of its labels.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from seqzoo.kernels.errors import check_positive
from seqzoo.train.tasks.base import (
    FLOOR_ROWS,
    Floor,
    Task,
    blank_labels,
    check_even,
    commonest,
    shifted,
)
from seqzoo.train.tasks.draws import Draws, Ints

PAPER = "arXiv:2403.17844"


@dataclass(frozen=True, kw_only=True)
class InContextRecall(Task):
    """Key, value, key, value ...: what is the value of a key that has been seen before?

    Keys are the first half of the ids and are drawn evenly, with repeats; a map from keys to values
    (the second half) is drawn for each row. The last pair repeats a key. In training every next
    token is a label, as the authors have it; measured are the values of keys seen before.

    Attributes:
        length: T, even.
        vocab_size: V, even without the noise.
        noise_ids: ids of noise, the last of the vocabulary.
        noise: share of pairs that are noise instead.
        next_token: train on every next token; on the answers alone when False.
    """

    length: int = 128
    vocab_size: int = 16
    noise_ids: int = 0
    noise: float = 0.0
    next_token: bool = True

    name: ClassVar[str] = "in_context_recall"
    paper: ClassVar[str] = PAPER

    def check(self) -> None:
        """See `Task.check`."""
        check_even(length=self.length)
        if self.length < 4:
            raise ValueError(f"length={self.length} is not allowed; it must be at least 4")
        check_even(vocab_size_without_noise=self.vocab_size - self.noise_ids)
        check_positive(vocab_size_without_noise=self.vocab_size - self.noise_ids)
        least = 0 if self.noise == 0 else 1
        if self.noise_ids < least:
            raise ValueError(f"noise_ids={self.noise_ids} is not allowed with noise={self.noise}")
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise={self.noise} is not allowed; it must be in [0, 1)")

    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """See `Task.rows`."""
        half, pairs = self._half, self.length // 2
        row = np.arange(draws.count)
        keys, values = draws.integers(half, pairs), half + draws.integers(half, half)
        noisy = draws.uniform(pairs) < self.noise
        noisy[row, draws.integers(pairs - 1)] = False  # at least one pair before the last
        noisy[:, -1] = False
        seen = np.zeros((draws.count, half), dtype=bool)
        known = np.zeros((draws.count, pairs), dtype=bool)
        for i in range(pairs):
            if i == pairs - 1:  # asks for one of those seen, each as likely
                keys[:, i] = np.where(seen, draws.uniform(half), -1).argmax(axis=1)
            known[:, i] = seen[row, keys[:, i]] & ~noisy[:, i]
            seen[row, keys[:, i]] |= ~noisy[:, i]
        pair = np.stack([keys, np.take_along_axis(values, keys, axis=1)], axis=-1)
        if self.noise:
            noise = 2 * half + draws.integers(self.noise_ids, pairs, 2)
            pair = np.where(noisy[..., None], noise, pair)
        ids = pair.reshape(draws.count, self.length)
        asked = np.zeros(ids.shape, dtype=bool)
        asked[:, 1::2] = known
        return ids, shifted(ids, asked | (train and self.next_token))

    @property
    def candidates(self) -> Ints:
        """The values."""
        return np.arange(self._half, 2 * self._half)

    @property
    def _half(self) -> int:
        return (self.vocab_size - self.noise_ids) // 2


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """In-context recall with pairs of noise in between."""

    vocab_size: int = 32
    noise_ids: int = 16
    noise: float = 0.2

    name: ClassVar[str] = "noisy_recall"


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(Task):
    """In-context recall whose keys and values are one to `motif` different tokens.

    A motif's size is drawn first, then one of its permutations; when measured, keys have full size.
    Rows are filled with pairs until none fits, one of which is asked for again at the end, and
    padded on the left. Id V-1 pads; of the rest the first half, rounded down, makes keys. The pair
    that is asked for begins at a place from which it always fits (in the authors' code it can be
    missing).

    Attributes:
        length: T.
        vocab_size: V.
        motif: largest number of tokens of a key, and of a value.
        next_token: train on every next token; on the answers alone when False.
    """

    length: int = 128
    vocab_size: int = 16
    motif: int = 3
    next_token: bool = True

    name: ClassVar[str] = "fuzzy_recall"
    paper: ClassVar[str] = PAPER

    def check(self) -> None:
        """See `Task.check`."""
        check_positive(motif=self.motif)
        if (self.vocab_size - 1) // 2 < self.motif:
            raise ValueError(
                f"vocab_size={self.vocab_size} is not allowed with motif={self.motif}; it must be "
                f"at least {2 * self.motif + 1}"
            )
        if self.length < 8 * self.motif:
            raise ValueError(
                f"length={self.length} is not allowed with motif={self.motif}; it must be at least "
                f"{8 * self.motif}"
            )

    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """See `Task.rows`."""
        N, M = draws.count, self.motif
        row = np.arange(N)
        keys = _Motifs(np.arange(self._half), range(1 if train else M, M + 1))
        values = _Motifs(self.candidates, range(1, M + 1))
        value_of = values.draw(draws, len(keys.sizes))  # of each key, should it occur
        probe = keys.draw(draws, 1)[:, 0]
        size = keys.sizes[probe] + values.sizes[value_of[row, probe]]
        limit = self.length + 1 - size - 2 * M
        place = (draws.uniform() * (limit - 2 * M + 1)).astype(np.int64)
        steps = self.length // 2 + 1
        drawn = keys.draw(draws, steps)
        # Room behind the end for what one step writes; cut off below.
        ids = np.full((N, self.length + 1 + 4 * M), self.vocab_size - 1)
        asked = np.zeros(ids.shape, dtype=bool)
        seen = np.zeros((N, len(keys.sizes)), dtype=bool)
        end = np.zeros(N, dtype=np.int64)
        for i in range(steps):
            open_ = end < limit
            if not open_.any():
                break
            due = (end >= place) & ~seen[row, probe]
            key = np.where(due, probe, drawn[:, i])
            key_size = np.where(open_, keys.sizes[key], 0)
            value = value_of[row, key]
            value_size = np.where(open_, values.sizes[value], 0)
            _write(ids, end, keys.tokens[key], key_size)
            _write(ids, end + key_size, values.tokens[value], value_size)
            known = np.broadcast_to(seen[row, key][:, None], (N, M))
            _write(asked, end + key_size, known, value_size)
            seen[row, key] |= open_
            end += key_size + value_size
        value = value_of[row, probe]
        _write(ids, end, keys.tokens[probe], keys.sizes[probe])
        end += keys.sizes[probe]
        _write(ids, end, values.tokens[value], values.sizes[value])
        _write(asked, end, np.ones((N, M), dtype=bool), values.sizes[value])
        end += values.sizes[value]
        # To the right end: what is before the first token comes from behind the last, padding.
        turn = (np.arange(self.length + 1) + end[:, None] - self.length - 1) % ids.shape[1]
        ids, asked = (np.take_along_axis(x, turn, axis=1) for x in (ids, asked))
        labels = shifted(ids, asked | (train and self.next_token))
        return ids[:, :-1].copy(), labels[:, :-1].copy()

    @property
    def candidates(self) -> Ints:
        """The tokens of values."""
        return np.arange(self._half, self.vocab_size - 1)

    @property
    def _half(self) -> int:
        return (self.vocab_size - 1) // 2


class _Motifs:
    """All ordered choices of different tokens, by size."""

    def __init__(self, alphabet: Ints, sizes: range) -> None:
        every = [m for size in sizes for m in permutations(alphabet.tolist(), size)]
        self.sizes = np.array([len(m) for m in every])
        self.tokens = np.array([m + (0,) * (sizes[-1] - len(m)) for m in every])
        self._starts = np.searchsorted(self.sizes, list(sizes))
        self._counts = np.append(self._starts[1:], len(every)) - self._starts

    def draw(self, draws: Draws, count: int) -> Ints:
        """(N, count) numbers of motifs: the size first, each as likely, then the motif."""
        size = draws.integers(len(self._starts), count)
        number: Ints = (draws.uniform(count) * self._counts[size]).astype(np.int64)
        return number + self._starts[size]


def _write(target: NDArray[np.generic], start: Ints, what: NDArray[np.generic], size: Ints) -> None:
    """Put the first `size` columns of `what` into each row, from its `start` on."""
    for j in range(what.shape[1]):
        rows = np.nonzero(j < size)[0]
        target[rows, start[rows] + j] = what[rows, j]


@dataclass(frozen=True, kw_only=True)
class Memorization(Task):
    """Key, mark, key, mark ...: the value of each key, from a map that is the same in every row.

    It cannot be read in the row: it has to be in the weights. Id V-1 is the mark, at which the
    value is asked; of the rest the first half, rounded down, are keys and each has a value of its
    own among the others.

    Attributes:
        length: T, even.
        vocab_size: V.
        map_seed: of the map, which training and test share.
    """

    length: int = 32
    vocab_size: int = 256
    map_seed: int = 12345

    name: ClassVar[str] = "memorization"
    paper: ClassVar[str] = PAPER

    def check(self) -> None:
        """See `Task.check`."""
        check_even(length=self.length)
        if self.vocab_size < 3:
            raise ValueError(f"vocab_size={self.vocab_size} is not allowed; it must be at least 3")

    @property
    def values(self) -> Ints:
        """The value of each key."""
        draws = Draws((self.name, "map", self.map_seed), [0])
        others = self.vocab_size - 1 - self._keys
        chosen: Ints = draws.choose(others, self._keys)[0]
        return chosen + self._keys

    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """See `Task.rows`."""
        keys = draws.integers(self._keys, self.length // 2)
        ids = np.full((draws.count, self.length), self.vocab_size - 1)
        ids[:, 0::2] = keys
        labels = blank_labels(ids)
        labels[:, 1::2] = self.values[keys]
        return ids, labels

    @property
    def floor(self) -> Floor:
        """Always the same value."""
        return Floor(1 / self._keys, "always the same value")

    @property
    def _keys(self) -> int:
        return (self.vocab_size - 1) // 2


@dataclass(frozen=True, kw_only=True)
class Compression(Task):
    """The whole row is to be told from the vector at its last position alone.

    Ids 0 ... V-2 are drawn evenly, the last token is the mark V-1. The answer at each position
    before it is the token itself, so the model must be an autoencoder (`readout` is `last`). The
    authors count the mark as an answer too; here it is none.

    Attributes:
        length: T, mark included.
        vocab_size: V.
    """

    length: int = 32
    vocab_size: int = 16

    name: ClassVar[str] = "compression"
    paper: ClassVar[str] = PAPER
    readout: ClassVar[Literal["token", "last"]] = "last"

    def check(self) -> None:
        """See `Task.check`."""
        for name, value in (("length", self.length), ("vocab_size", self.vocab_size)):
            if value < 2:
                raise ValueError(f"{name}={value} is not allowed; it must be at least 2")

    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """See `Task.rows`."""
        ids = draws.integers(self.vocab_size - 1, self.length)
        labels = ids.copy()
        ids[:, -1], labels[:, -1] = self.vocab_size - 1, blank_labels(labels[:, -1])
        return ids, labels

    @cached_property
    def floor(self) -> Floor:
        """A vector that holds no more than the commonest token."""
        ids, labels = self.floor_rows(range(FLOOR_ROWS))
        guess = commonest(ids[:, :-1], np.arange(self.vocab_size - 1))[:, -1:]
        share = float((labels[:, :-1] == guess).mean())
        return Floor(share, f"always the commonest token of the row (on {FLOOR_ROWS} rows)")
