"""Copying what matters and skipping what does not."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from seqzoo.kernels.errors import check_positive
from seqzoo.train.tasks.base import Task, blank_labels
from seqzoo.train.tasks.draws import Draws, Ints


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Tokens scattered among blanks are to be repeated, in order, at the end of the row.

    `tokens` ids of 1 ... V-2 stand at different random places, 0 elsewhere; then `tokens` times the
    mark V-1, where the answers are asked. As in the authors' code (state-spaces/s4, copying.py,
    variable). Gu and Dao, 2023, arXiv:2312.00752, section 4.1.1 and appendix E.1 (T 4096, V 16, 16
    tokens; there T does not count the marks).

    Attributes:
        length: T, marks included.
        vocab_size: V, blank and mark included.
        tokens: to be copied.
    """

    length: int = 256
    vocab_size: int = 16
    tokens: int = 16

    name: ClassVar[str] = "selective_copying"
    paper: ClassVar[str] = "arXiv:2312.00752"

    def check(self) -> None:
        """See `Task.check`."""
        check_positive(tokens=self.tokens)
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size={self.vocab_size} is not allowed; it must be at least 4")
        if self.length < 2 * self.tokens:
            raise ValueError(
                f"length={self.length} is not allowed: tokens={self.tokens} and as many marks take "
                f"{2 * self.tokens}"
            )

    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """See `Task.rows`."""
        n = self.tokens
        data = 1 + draws.integers(self.vocab_size - 2, n)
        places = np.sort(draws.choose(self.length - n, n), axis=1)
        ids = np.zeros((draws.count, self.length), dtype=np.int64)
        np.put_along_axis(ids, places, data, axis=1)
        ids[:, -n:] = self.vocab_size - 1
        labels = blank_labels(ids)
        labels[:, -n:] = data
        return ids, labels

    @property
    def candidates(self) -> Ints:
        """All but blank and mark."""
        return np.arange(1, self.vocab_size - 1)


@dataclass(frozen=True, kw_only=True)
class MADSelectiveCopying(Task):
    """MAD's selective copying: the blanks fall between the tokens, then a mark, then blanks.

    Every blank picks a token at random to stand before. Ids 0 ... V-3 are data, V-2 the blank, V-1
    the mark; answers are asked at the `tokens` blanks after it. Poli et al., 2024,
    arXiv:2403.17844 (athms/mad-lab, instances.py; theirs draws the places from numpy's
    global generator).

    Attributes:
        length: T.
        vocab_size: V.
        tokens: to be copied.
    """

    length: int = 256
    vocab_size: int = 16
    tokens: int = 16

    name: ClassVar[str] = "mad_selective_copying"
    paper: ClassVar[str] = "arXiv:2403.17844"

    def check(self) -> None:
        """See `Task.check`."""
        check_positive(tokens=self.tokens)
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size={self.vocab_size} is not allowed; it must be at least 4")
        if self.length <= 2 * self.tokens + 1:
            raise ValueError(
                f"length={self.length} is not allowed with tokens={self.tokens}; it must be at "
                f"least {2 * self.tokens + 2}"
            )

    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """See `Task.rows`."""
        n, blank = self.tokens, self.vocab_size - 2
        data = draws.integers(blank, n)
        before = draws.integers(n, self.length - 2 * n - 1)  # the token each blank stands before
        numbers = np.arange(n)
        places = numbers + (before[:, :, None] <= numbers).sum(axis=1)
        ids = np.full((draws.count, self.length), blank)
        np.put_along_axis(ids, places, data, axis=1)
        ids[:, -n - 1] = self.vocab_size - 1
        labels = blank_labels(ids)
        labels[:, -n:] = data
        return ids, labels

    @property
    def candidates(self) -> Ints:
        """All but blank and mark."""
        return np.arange(self.vocab_size - 2)
