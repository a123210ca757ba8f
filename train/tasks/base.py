"""What a synthetic task is: rows of token ids, and answers: at some positions, or one a row."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.train.tasks.draws import Draws, Ints
from seqzoo.zoo.losses import IGNORED

Batch = dict[str, Tensor]
SPLITS = ("train", "val", "test")
FLOOR_ROWS = 4000  # on which a floor is measured where it has no closed form


class Floor(NamedTuple):
    """Accuracy that tells nothing: what can be had without doing the task, and how."""

    accuracy: float
    how: str


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Rows without end. Row i of a split is a function of (seed, split, i) and of the options.

    A subclass gives `name`, `paper`, `vocab_size`, `rows`, and `floor` or `candidates`.

    Attributes:
        length: tokens T of a row.
    """

    length: int = 64

    name: ClassVar[str]
    paper: ClassVar[str]
    # `token`: the answer is read at its own position; `last`: all are decoded from the last one;
    # `pooled`: a row has one answer, a class, read from the mean of its tokens.
    readout: ClassVar[Literal["token", "last", "pooled"]] = "token"
    n_classes: ClassVar[int] = 0  # of a pooled row

    def __post_init__(self) -> None:
        check_positive(length=self.length)
        self.check()

    def check(self) -> None:  # noqa: B027  # many tasks have nothing to refuse
        """Refuse options that do not fit together, in one line."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids, answers at tokens included."""

    @abstractmethod
    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """Token ids and labels, (N, T) each; -100 where no answer is asked. Pooled labels: (N,)."""

    def sample(self, seed: int, split: str, indices: Sequence[int] | range) -> Batch:
        """The samples of these numbers.

        Args:
            seed: of the data.
            split: `train`, `val` or `test`; no two of them share a stream of random numbers.
            indices: which samples, 0 or more.

        Returns:
            `input_ids` and `labels`, int64 (N, T). A label belongs to its own position: it is the
            answer that is to be given after reading up to there. It is -100 where none is asked.
            Of a pooled task `labels` are classes, (N,), and where rows end early `attention_mask`
            (N, T) is 0 at their padding.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        return self._batch(Draws((self.name, seed, split), indices), split == "train")

    def at(self, length: int) -> "Task":
        """The same task, to be measured at another length."""
        return dataclasses.replace(self, length=length)

    @cached_property
    def floor(self) -> Floor:
        """The share of answers that equal the commonest candidate of their row so far."""
        how = f"always the commonest candidate in the row so far (on {FLOOR_ROWS} rows)"
        right = count = 0
        for start in range(
            0, FLOOR_ROWS, 250
        ):  # counts of every candidate at every token are large
            ids, labels = self.floor_rows(range(start, start + 250))
            asked = labels != IGNORED
            right += int((commonest(ids, self.candidates) == labels)[asked].sum())
            count += int(asked.sum())
        return Floor(right / count, how)

    def floor_rows(self, indices: range) -> tuple[Ints, Ints]:
        """Ids and labels of a stream that no split shares."""
        return self.rows(Draws((self.name, "floor"), indices), False)

    @property
    def candidates(self) -> Ints:
        """The token ids that can be answers."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the name and every option; the inverse of `create_task`."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def _batch(self, draws: Draws, train: bool) -> Batch:
        ids, labels = self.rows(draws, train)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def commonest(ids: Ints, candidates: Ints) -> Ints:
    """(N, T): at each position the candidate read most often up to there; the first of equals."""
    counts = (ids[:, :, None] == candidates).cumsum(axis=1, dtype=np.int32)
    best: Ints = candidates[counts.argmax(axis=2)]
    return best


def shifted(ids: Ints, asked: NDArray[np.bool_]) -> Ints:
    """Labels that ask for the next token where that token is `asked`; (N, T) -> (N, T)."""
    labels = np.full_like(ids, IGNORED)
    labels[:, :-1] = np.where(asked[:, 1:], ids[:, 1:], IGNORED)
    return labels


def blank_labels(ids: Ints) -> Ints:
    """No answer asked anywhere."""
    return np.full_like(ids, IGNORED)


def check_even(**values: int) -> None:
    """Refuse the first odd number, by its name."""
    for name, value in values.items():
        if value % 2:
            raise ValueError(f"{name}={value} is odd; nearest: {value - 1}, {value + 1}")
