"""Recall of what was bound in the row: MQAR, induction heads, passkey."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from seqzoo.kernels.errors import check_positive
from seqzoo.train.tasks.base import Floor, Task, blank_labels, check_even, shifted
from seqzoo.train.tasks.draws import Draws, Ints


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Multi-query associative recall: k_1 v_1 k_2 v_2 ..., then each key once, among filler.

    Ids 1 ... V/2-1 are keys and V/2 ... V-1 values, both without replacement within a row. Of the
    even places after the pairs, place i is taken with odds power * i^(power - 1) among those left:
    most queries come soon. The answer, asked at the query itself, is its value. The distribution
    is that of the authors' code (HazyResearch/zoology, multiquery_ar.py). Arora et al., 2023,
    arXiv:2312.04927.

    Attributes:
        length: T, even.
        vocab_size: V, above T.
        pairs: keys of a row.
        passes: how often the pairs are shown before the queries.
        power: 1 spreads queries evenly, small values bring them forward.
        random_filler: fill with ids drawn from all V; zeros when False.
    """

    vocab_size: int = 8192
    pairs: int = 4
    passes: int = 1
    power: float = 0.01
    random_filler: bool = True

    name: ClassVar[str] = "mqar"
    paper: ClassVar[str] = "arXiv:2312.04927"

    def check(self) -> None:
        """See `Task.check`."""
        check_positive(pairs=self.pairs, passes=self.passes, power=self.power)
        check_even(length=self.length)
        needed = 2 * self.pairs * (self.passes + 1)
        if needed > self.length:
            raise ValueError(
                f"length={self.length} is not allowed: pairs={self.pairs}, shown "
                f"{self.passes} times and asked once, take {needed} tokens"
            )
        least = max(self.length, 2 * self.pairs + 1)
        if self.vocab_size <= least:
            raise ValueError(f"vocab_size={self.vocab_size} is not allowed; it must exceed {least}")

    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """See `Task.rows`."""
        half, context = self.vocab_size // 2, 2 * self.pairs * self.passes
        keys = 1 + draws.choose(half - 1, self.pairs)
        values = half + draws.choose(self.vocab_size - half, self.pairs)
        places = np.arange(1, (self.length - context) // 2 + 1)
        odds = (self.power * places ** (self.power - 1.0)).astype(np.float64)
        queries = context + 2 * draws.choose_weighted(odds, self.pairs)
        ids = np.zeros((draws.count, self.length), dtype=np.int64)
        pairs = np.stack([keys, values], axis=-1).reshape(draws.count, 2 * self.pairs)
        ids[:, :context] = np.tile(pairs, (1, self.passes))
        np.put_along_axis(ids, queries, keys, axis=1)
        labels = blank_labels(ids)
        np.put_along_axis(labels, queries, values, axis=1)
        if self.random_filler:
            ids = np.where(ids == 0, draws.integers(self.vocab_size, self.length), ids)
        return ids, labels

    def at(self, length: int) -> "MQAR":
        """With as many pairs as take the same share of the row."""
        return replace(self, length=length, pairs=max(1, self.pairs * length // self.length))

    @property
    def floor(self) -> Floor:
        """A guess among the values shown."""
        return Floor(1 / self.pairs, "a guess among the values of the row")


@dataclass(frozen=True, kw_only=True)
class InductionHeads(Task):
    """A trigger stands somewhere in the row and again at its end: what came after it?

    Ids 0 ... V-2 are drawn evenly, V-1 is the trigger. One answer a row, at its last position. Gu
    and Dao, 2023, arXiv:2312.00752, section 4.1.2 and appendix E.1 (T 256, V 16).

    Attributes:
        length: T, at least 3.
        vocab_size: V, with the trigger.
    """

    length: int = 256
    vocab_size: int = 16

    name: ClassVar[str] = "induction"
    paper: ClassVar[str] = "arXiv:2312.00752"

    def check(self) -> None:
        """See `Task.check`."""
        for name, value, least in (("length", self.length, 3), ("vocab_size", self.vocab_size, 3)):
            if value < least:
                raise ValueError(f"{name}={value} is not allowed; it must be at least {least}")

    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """See `Task.rows`."""
        trigger, row = self.vocab_size - 1, np.arange(draws.count)
        ids = draws.integers(trigger, self.length)
        place = draws.integers(self.length - 2)
        ids[row, place] = ids[:, -1] = trigger
        labels = blank_labels(ids)
        labels[:, -1] = ids[row, place + 1]
        return ids, labels

    @property
    def candidates(self) -> Ints:
        """All but the trigger."""
        return np.arange(self.vocab_size - 1)


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """A number is said once in a long text of something else, and asked for at its end.

    filler, MARK d_1 ... d_n, filler, ASK d_1 ... d_n: answers are the digits after ASK, each given
    those before it. Ids 0 ... 9 are digits, 10 is MARK, 11 is ASK, the rest filler, drawn evenly.
    The task of Mohtashami and Jaggi, 2023, arXiv:2305.16300, without its English.

    Attributes:
        length: T.
        digits: of the number.
        fillers: how many ids the filler has.
        depth: where MARK stands, as a share of the places it can have; drawn evenly when None.
    """

    length: int = 256
    digits: int = 5
    fillers: int = 52
    depth: float | None = None

    name: ClassVar[str] = "passkey"
    paper: ClassVar[str] = "arXiv:2305.16300"

    def check(self) -> None:
        """See `Task.check`."""
        check_positive(digits=self.digits, fillers=self.fillers)
        if self._places < 1:
            needed = 2 * self.digits + 2
            raise ValueError(
                f"length={self.length} is not allowed; digits={self.digits} take {needed} tokens"
            )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth} is not allowed; it must be in [0, 1]")

    @property
    def vocab_size(self) -> int:
        """Digits, two marks, filler."""
        return 12 + self.fillers

    @property
    def _places(self) -> int:
        return self.length - 2 * self.digits - 1

    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """See `Task.rows`."""
        n = self.digits
        ids = 12 + draws.integers(self.fillers, self.length)
        number, place = draws.integers(10, n), draws.integers(self._places)
        if self.depth is not None:
            place = np.full_like(place, round(self.depth * (self._places - 1)))
        np.put_along_axis(ids, place[:, None], 10, axis=1)
        np.put_along_axis(ids, place[:, None] + np.arange(1, n + 1), number, axis=1)
        ids[:, -n - 1], ids[:, -n:] = 11, number
        asked = np.zeros(ids.shape, dtype=bool)
        asked[:, -n:] = True
        return ids, shifted(ids, asked)

    @property
    def candidates(self) -> Ints:
        """The ten digits."""
        return np.arange(10)
