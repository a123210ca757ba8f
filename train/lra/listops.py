"""ListOps: nested MIN, MAX, MED and SM over digits; the answer is a digit.

    node(depth): with probability 1/4 and depth < max_depth an operator with 2..max_args arguments
                 node(depth + 1), otherwise a digit; the root has depth 1
    kept when    min_length < tokens < max_length (an operator and its bracket count one each)

MED is the median truncated to a digit, SM the sum modulo 10. Nangia and Bowman, 2018,
arXiv:1804.06028; the lengths are those of Long-Range Arena, arXiv:2011.04006, section 2.2.1.

Whole batches of trees grow at once, a level at a time: the same process as one tree after another,
so the same distribution, without a Python call a node.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqzoo.kernels.errors import check_positive, unknown

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = (*"0123456789", *OPERATORS, "]")
IDS = {symbol: i + 1 for i, symbol in enumerate(SYMBOLS)}  # 0 pads
VOCAB_SIZE = len(SYMBOLS) + 1
N_CLASSES = 10
MIN, MAX, MED, SM = (IDS[name] for name in OPERATORS)
CLOSE = IDS["]"]

Ints = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]


class Level(NamedTuple):
    """Nodes of one depth, from left to right; the children of an operator stand side by side.

    Attributes:
        digit: value of each node where it is a digit, (N,).
        parents: indices of the operators among the nodes, (M,).
        operator: token of each operator, (M,).
        arity: number of its children, (M,).
    """

    digit: Ints
    parents: Ints
    operator: Ints
    arity: Ints

    @property
    def starts(self) -> Ints:
        """Index in the next level of each operator's first child, (M,)."""
        return np.cumsum(self.arity) - self.arity


@dataclass(frozen=True)
class ListOps:
    """Where random expressions come from.

    Attributes:
        min_length: expressions have more tokens than this.
        max_length: and fewer than this.
        max_depth: deepest level, counted from 1 at the root.
        max_args: most arguments of an operator.
        operator_chance: of a node above the deepest level.
        roots: trees that are begun for a block; about one in twelve of the default's is kept.
    """

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10
    operator_chance: float = 0.25
    roots: int = 8192

    name: ClassVar[str] = "listops-gen"
    sizes: ClassVar[dict[str, int]] = {"train": 96_000, "val": 2_000, "test": 2_000}

    def __post_init__(self) -> None:
        check_positive(min_length=self.min_length, max_depth=self.max_depth, roots=self.roots)
        if self.max_length <= self.min_length + 1:
            raise ValueError(
                f"max_length={self.max_length} is not allowed; it must be above min_length + 1 = "
                f"{self.min_length + 1}"
            )
        if self.max_args < 2:
            raise ValueError(f"max_args={self.max_args} is not allowed; it must be 2 or more")
        if not 0 < self.operator_chance < 1:
            raise ValueError(f"operator_chance={self.operator_chance} is not between 0 and 1")

    @cached_property
    def share(self) -> float:
        """Chance that a tree which is begun is kept: exact, from the law of lengths by level."""
        lengths = np.zeros(self.max_length)  # chance of each, those from max_length on left out
        lengths[1] = 1.0
        for _ in range(self.max_depth - 1):
            together, total = lengths, np.zeros(self.max_length)
            for _ in range(2, self.max_args + 1):
                together = _sum_law(together, lengths)
                total += together
            lengths = np.zeros(self.max_length)
            lengths[1] = 1 - self.operator_chance
            lengths[2:] += self.operator_chance / (self.max_args - 1) * total[:-2]
        return float(lengths[self.min_length + 1 :].sum())

    def facts(self) -> dict[str, Any]:
        """The parameters, as plain data."""
        return asdict(self)

    def block(self, rng: np.random.Generator) -> Arrays:
        """Expressions that were kept out of `roots` begun ones, in the order in which they came.

        Returns:
            `tokens`, all of them end to end, uint8; `lengths` (N,) int32; `labels` (N,) uint8.
        """
        levels = self._grow(rng)
        lengths = _lengths(levels)
        kept = (lengths[0] > self.min_length) & (lengths[0] < self.max_length)
        levels, lengths = _keep(levels, lengths, kept)
        return {
            "tokens": _write(levels, lengths),
            "lengths": lengths[0].astype(np.int32),
            "labels": _values(levels).astype(np.uint8),
        }

    def _grow(self, rng: np.random.Generator) -> list[Level]:
        levels, count = [], self.roots
        for depth in range(1, self.max_depth + 1):
            digit = rng.integers(0, 10, count)
            if depth == self.max_depth:
                parents = np.zeros(0, np.int64)
            else:
                parents = np.flatnonzero(rng.random(count) <= self.operator_chance)
            operator = MIN + rng.integers(0, len(OPERATORS), len(parents))
            arity = rng.integers(2, self.max_args + 1, len(parents))
            levels.append(Level(digit, parents, operator, arity))
            count = int(arity.sum())
            if not count:
                break
        return levels


def _sum_law(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The law of a sum of two independent numbers, as far as the laws given go; (N,) each."""
    size = 2 * len(a)
    law: NDArray[np.float64] = np.fft.irfft(np.fft.rfft(a, size) * np.fft.rfft(b, size), size)
    return law[: len(a)]


def _lengths(levels: Sequence[Level]) -> list[Ints]:
    """Tokens of every node's expression, level by level."""
    found: list[Ints] = []
    for level in reversed(levels):
        lengths = np.ones(len(level.digit), np.int64)
        if len(level.parents):
            lengths[level.parents] = 2 + np.add.reduceat(found[-1], level.starts)
        found.append(lengths)
    return found[::-1]


def _keep(
    levels: Sequence[Level], lengths: Sequence[Ints], kept: NDArray[np.bool_]
) -> tuple[list[Level], list[Ints]]:
    """The trees of the roots that are kept."""
    trees, sizes = [], []
    for level, size in zip(levels, lengths, strict=True):
        stay = kept[level.parents]
        place = np.cumsum(kept) - 1
        parents = place[level.parents[stay]]
        trees.append(Level(level.digit[kept], parents, level.operator[stay], level.arity[stay]))
        sizes.append(size[kept])
        kept = np.repeat(stay, level.arity)
    return trees, sizes


def _values(levels: Sequence[Level]) -> Ints:
    """What each root comes to, (N,)."""
    below: Ints = np.zeros(0, np.int64)
    for level in reversed(levels):
        values = level.digit.copy()
        if len(level.parents):
            starts, arity = level.starts, level.arity
            total = np.add.reduceat(below, starts) % 10
            # Sorted within each operator's children: the keys of one follow those of another.
            ranked = np.sort(np.repeat(np.arange(len(arity)) * 10, arity) + below) % 10
            middle = (ranked[starts + (arity - 1) // 2] + ranked[starts + arity // 2]) // 2
            choices = [ranked[starts], ranked[starts + arity - 1], middle, total]
            values[level.parents] = np.choose(level.operator - MIN, choices)
        below = values
    return below


def _write(levels: Sequence[Level], lengths: Sequence[Ints]) -> NDArray[np.uint8]:
    """The tokens of all trees, end to end."""
    tokens = np.zeros(int(lengths[0].sum()), np.uint8)
    at = np.cumsum(lengths[0]) - lengths[0]
    for depth, level in enumerate(levels):
        tokens[at] = level.digit + 1
        own = at[level.parents]
        tokens[own] = level.operator
        tokens[own + lengths[depth][level.parents] - 1] = CLOSE
        if len(level.parents):
            size = lengths[depth + 1]
            before = np.cumsum(size) - size  # of all children to the left, of other parents too
            at = before + np.repeat(own + 1 - before[level.starts], level.arity)
    return tokens


def parse(source: str) -> list[int]:
    """Token ids of an expression as the release writes it; its parentheses are dropped.

    Raises:
        ValueError: a word that is no symbol.
    """
    words = source.replace("(", " ").replace(")", " ").split()
    try:
        return [IDS[word] for word in words]
    except KeyError as error:
        raise unknown("ListOps symbol", error.args[0], SYMBOLS) from None


def write(tokens: Iterable[int]) -> str:
    """Token ids as the release writes them, with its binary brackets: ( ( ( [OP a ) b ) ] )."""
    stack: list[list[str]] = [[]]
    for token in tokens:
        symbol = SYMBOLS[int(token) - 1]
        if symbol in OPERATORS:
            stack.append([symbol])
        elif symbol == "]":
            items = [*stack.pop(), symbol]
            joined = items[0]
            for item in items[1:]:
                joined = f"( {joined} {item} )"
            stack[-1].append(joined)
        else:
            stack[-1].append(symbol)
    return " ".join(stack[0])


def evaluate(tokens: Iterable[int]) -> int:
    """What an expression comes to, one token after another.

    Raises:
        ValueError: no expression, or more than one.
    """
    stack: list[list[int]] = [[]]
    for token in (int(t) for t in tokens):
        if MIN <= token <= SM:
            stack.append([token])
        elif token == CLOSE and len(stack) > 1 and len(stack[-1]) > 1:
            operator, *values = stack.pop()
            stack[-1].append(_apply(operator, values))
        elif 1 <= token <= 10 and (len(stack) > 1 or not stack[0]):
            stack[-1].append(token - 1)
        else:
            raise ValueError(f"token {token} does not belong where it stands in an expression")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError("an expression is not closed")
    return stack[0][0]


def _apply(operator: int, values: Sequence[int]) -> int:
    if operator == MED:
        ranked = sorted(values)
        return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) // 2
    return sum(values) % 10 if operator == SM else min(values) if operator == MIN else max(values)
