"""State tracking: the answer at every position is where a small automaton stands by then.

Merrill et al., 2024, arXiv:2404.08819; Grazzi et al., 2024, arXiv:2411.12537.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import permutations
from typing import ClassVar, Literal, Self

import numpy as np

from seqzoo.kernels.errors import unknown
from seqzoo.train.tasks.base import FLOOR_ROWS, Floor, Task, blank_labels
from seqzoo.train.tasks.draws import Draws, Ints
from seqzoo.zoo.losses import IGNORED


@dataclass(frozen=True, kw_only=True)
class StateTracking(Task):
    """What the tasks here share: symbols drawn at random, and the running result.

    Attributes:
        length: T.
        min_length: rows end after a number of symbols drawn evenly from `min_length` ... T, and are
            padded by one id more; every row has T when None. Measured are always full rows.
        every: ask at every position; at the last one only when False.
    """

    length: int = 40
    min_length: int | None = None
    every: bool = True

    def check(self) -> None:
        """See `Task.check`."""
        if self.min_length is not None and not 1 <= self.min_length <= self.length:
            raise ValueError(
                f"min_length={self.min_length} is not allowed; it must be from 1 to "
                f"length={self.length}"
            )

    @property
    def symbols(self) -> int:
        """Number of ids without padding."""
        raise NotImplementedError

    def run(self, draws: Draws) -> tuple[Ints, Ints]:
        """Symbols and running results, (N, T)."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Symbols, and padding where rows end early."""
        return self.symbols + (self.min_length is not None)

    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """See `Task.rows`."""
        ids, labels = self.run(draws)
        place = np.arange(self.length)
        end = np.full((draws.count, 1), self.length)
        if train and self.min_length is not None:
            end = self.min_length + draws.integers(self.length - self.min_length + 1, 1)
        if not self.every:
            asked = labels != IGNORED
            last = np.where(asked & (place < end), place, -1).max(axis=1, keepdims=True)
            labels = np.where(place == last, labels, IGNORED)
        return np.where(place < end, ids, self.symbols), np.where(place < end, labels, IGNORED)

    def at(self, length: int) -> Self:
        """See `Task.at`; with the same ids."""
        shorter = None if self.min_length is None else min(self.min_length, length)
        return replace(self, length=length, min_length=shorter)


@dataclass(frozen=True, kw_only=True)
class Parity(StateTracking):
    """Is the number of ones so far odd?"""

    name: ClassVar[str] = "parity"
    paper: ClassVar[str] = "arXiv:2411.12537"

    @property
    def symbols(self) -> int:
        """0 and 1."""
        return 2

    def run(self, draws: Draws) -> tuple[Ints, Ints]:
        """See `StateTracking.run`."""
        bits = draws.integers(2, self.length)
        return bits, bits.cumsum(axis=1) % 2

    @property
    def floor(self) -> Floor:
        """A coin."""
        return Floor(0.5, "a coin")


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(StateTracking):
    """Number, operator, number ...: the value so far modulo `modulus`, products before sums.

    Ids 0 ... m-1 are numbers, m, m+1 and m+2 are plus, minus and times; all are drawn evenly. Asked
    at the numbers. Without brackets, as in Delétang et al., 2022, arXiv:2207.02098, who ask at the
    end only (`every` False).

    Attributes:
        modulus: m.
    """

    modulus: int = 5

    name: ClassVar[str] = "modular_arithmetic"
    paper: ClassVar[str] = "arXiv:2207.02098"

    def check(self) -> None:
        """See `Task.check`."""
        super().check()
        if self.modulus < 2:
            raise ValueError(f"modulus={self.modulus} is not allowed; it must be at least 2")

    @property
    def symbols(self) -> int:
        """Numbers and three operators."""
        return self.modulus + 3

    def run(self, draws: Draws) -> tuple[Ints, Ints]:
        """See `StateTracking.run`."""
        m, terms = self.modulus, (self.length + 1) // 2
        numbers, operators = draws.integers(m, terms), draws.integers(3, terms)
        ids = np.stack([numbers, m + operators], axis=-1).reshape(draws.count, 2 * terms)
        labels = blank_labels(ids)
        total, term = np.zeros_like(numbers[:, 0]), numbers[:, 0]
        for i in range(terms):
            if i:
                operator, number = operators[:, i - 1], numbers[:, i]
                total = np.where(operator == 2, total, (total + term) % m)
                sign = np.where(operator == 1, -number, number)
                term = np.where(operator == 2, term * number, sign) % m
            labels[:, 2 * i] = (total + term) % m
        return ids[:, : self.length], labels[:, : self.length]

    @cached_property
    def floor(self) -> Floor:
        """Always the same number; a product hides what was before it, so 0 is a little common."""
        _, labels = self.floor_rows(range(FLOOR_ROWS))
        counts = np.bincount(labels[labels != IGNORED], minlength=self.modulus)
        share = float(counts.max() / counts.sum())
        return Floor(share, f"always the commonest answer (on {FLOOR_ROWS} rows)")


@dataclass(frozen=True, kw_only=True)
class GroupWords(StateTracking):
    """The word problem of a group: elements are drawn evenly; what is their product so far?

    Products are p_t = p_{t-1} x_t; of permutations, (p q)(i) = p(q(i)), and these are numbered in
    lexicographic order. Z60, A5 and S5 have 60, 60 and 120 elements; the first is commutative, the
    second is the smallest group that is not solvable.

    Attributes:
        group: `z60`, `a5` or `s5`.
    """

    group: Literal["z60", "a5", "s5"] = "s5"

    name: ClassVar[str] = "group_words"
    paper: ClassVar[str] = "arXiv:2404.08819"

    def check(self) -> None:
        """See `Task.check`."""
        super().check()
        if self.group not in GROUPS:
            raise unknown("group", self.group, GROUPS)

    @property
    def symbols(self) -> int:
        """Order of the group."""
        return len(table_of(self.group))

    def run(self, draws: Draws) -> tuple[Ints, Ints]:
        """See `StateTracking.run`."""
        table = table_of(self.group)
        ids = draws.integers(len(table), self.length)
        products = ids.copy()
        for t in range(1, self.length):
            products[:, t] = table[products[:, t - 1], ids[:, t]]
        return ids, products

    @property
    def floor(self) -> Floor:
        """A guess."""
        return Floor(1 / self.symbols, "a guess among the elements")


GROUPS = ("z60", "a5", "s5")


@cache
def table_of(group: str) -> Ints:
    """The multiplication table: entry (p, q) is the number of p q."""
    if group == "z60":
        return np.add.outer(np.arange(60), np.arange(60)) % 60
    every = [p for p in permutations(range(5)) if group == "s5" or _even(p)]
    number = {p: i for i, p in enumerate(every)}
    return np.array([[number[tuple(p[i] for i in q)] for q in every] for p in every])


def _even(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for i in range(5) for j in range(i + 1, 5)) % 2 == 0
