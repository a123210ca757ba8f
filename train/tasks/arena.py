"""ListOps and Pathfinder of Long-Range Arena, made as they are read: one class a row.

Tay et al., 2020, arXiv:2011.04006. The generators are those of `seqzoo.train.lra`. What they make
is not the published data, so figures on it stand beside no published ones: hence `_gen` in every
table. `seqzoo fit -c configs/task/lra-listops.yaml` reads the published files.

Rows are without end, and no two splits share a stream of random numbers. Whether an expression
comes twice, which short ones do, is not looked for: a set on disk leaves duplicates out.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from seqzoo.train.lra.floors import by_key, majority
from seqzoo.train.lra.listops import N_CLASSES, VOCAB_SIZE, ListOps
from seqzoo.train.lra.pathfinder import LOOKS, Pathfinder
from seqzoo.train.tasks.base import FLOOR_ROWS, Batch, Floor, Task
from seqzoo.train.tasks.draws import Draws, Ints, Key, generator

BLOCK = 512  # expressions that share a random stream
MOST_ROOTS = 8192  # trees that are begun at once
RAREST = 1000  # one expression in so many must be kept
SIDES = {side * side: side for side in LOOKS}
LEVELS = 256  # of grey


@dataclass(frozen=True, kw_only=True)
class ListOpsGen(Task):
    """What does a nested expression of MIN, MAX, MED and SM over digits come to?

    Ids are those of `seqzoo.train.lra.listops`, 0 pads; the label is the value, 0 ... 9. The
    defaults are the arena's. `min_length=30, length=128, max_depth=5` is a size for a CPU.

    Attributes:
        length: tokens T of a padded row; expressions have fewer.
        min_length: expressions have more tokens than this.
        max_depth: deepest level, counted from 1 at the root.
        max_args: most arguments of an operator.
    """

    length: int = 2000
    min_length: int = 500
    max_depth: int = 10
    max_args: int = 10

    name: ClassVar[str] = "listops_gen"
    paper: ClassVar[str] = "arXiv:2011.04006"
    readout: ClassVar[Literal["token", "last", "pooled"]] = "pooled"
    n_classes: ClassVar[int] = N_CLASSES

    def check(self) -> None:
        """See `Task.check`."""
        if self.length < self.min_length + 2:
            raise ValueError(
                f"length={self.length} is not allowed; expressions have more tokens than "
                f"min_length={self.min_length} and fewer than length, which must be at least "
                f"{self.min_length + 2}"
            )
        if self.source.share < 1 / RAREST:
            raise ValueError(
                f"length={self.length} is not allowed with min_length={self.min_length}, "
                f"max_depth={self.max_depth}, max_args={self.max_args}: fewer than one expression "
                f"in {RAREST} has a length between"
            )

    @property
    def vocab_size(self) -> int:
        """Digits, operators, the bracket and padding."""
        return VOCAB_SIZE

    @cached_property
    def source(self) -> ListOps:
        """Where expressions come from."""
        return ListOps(self.min_length, self.length, self.max_depth, self.max_args)

    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """See `Task.rows`; the tree that an expression is has no say in which block it is of."""
        ids = np.zeros((draws.count, self.length), np.int64)
        labels = np.zeros(draws.count, np.int64)
        number, place = np.divmod(draws.indices, BLOCK)
        for block in np.unique(number).tolist():
            here = number == block
            tokens, values = _block(self, draws.key, block)
            ids[here], labels[here] = tokens[place[here]], values[place[here]]
        return ids, labels

    def at(self, length: int) -> Self:
        """See `Task.at`; the shortest expressions are longer in the same proportion."""
        return replace(self, length=length, min_length=self.min_length * length // self.length)

    @cached_property
    def floor(self) -> Floor:
        """A model that reads no further than the first operator."""
        parts = [self._first(range(at, at + BLOCK)) for at in range(0, 2 * FLOOR_ROWS, BLOCK)]
        first, labels = (np.concatenate(values) for values in zip(*parts, strict=True))
        fitted, rest = slice(FLOOR_ROWS), slice(FLOOR_ROWS, None)
        share = by_key(first[fitted], labels[fitted], first[rest], labels[rest])
        common = majority(labels[fitted], labels[rest])
        how = f"the commonest answer to the first operator, known from {FLOOR_ROWS} other rows"
        return Floor(share, f"{how}; always the commonest answer is right for {common:.3f}")

    def _first(self, indices: range) -> tuple[Ints, Ints]:
        ids, labels = self.floor_rows(indices)
        return ids[:, 0].copy(), labels

    def _batch(self, draws: Draws, train: bool) -> Batch:
        batch = super()._batch(draws, train)
        return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


@dataclass(frozen=True, kw_only=True)
class PathfinderGen(Task):
    """Are the two marked ends those of one dashed curve, or of two?

    A pixel is a token, row by row, its id the brightness, 0 ... 255; the label is 1 for one curve.
    At another length the image has another resolution, with the dashes that belong to it.

    Attributes:
        length: pixels T of an image: 1024, 4096, 16384 (Path-X) or 65536.
        difficulty: easy, intermediate or hard; the arena's is hard.
        faithful: as the published images were made; see `seqzoo.train.lra.pathfinder`.
    """

    length: int = 1024
    difficulty: str = "hard"
    faithful: bool = False

    name: ClassVar[str] = "pathfinder_gen"
    paper: ClassVar[str] = "arXiv:2011.04006"
    readout: ClassVar[Literal["token", "last", "pooled"]] = "pooled"
    n_classes: ClassVar[int] = 2

    def check(self) -> None:
        """See `Task.check`."""
        if self.length not in SIDES:
            raise ValueError(
                f"length={self.length} is not allowed; a row is a square image: "
                f"{', '.join(map(str, SIDES))}"
            )
        self.source  # noqa: B018  # it refuses what it cannot draw

    @property
    def vocab_size(self) -> int:
        """Levels of grey."""
        return LEVELS

    @cached_property
    def source(self) -> Pathfinder:
        """Where images come from, one at a time."""
        return Pathfinder(SIDES[self.length], self.difficulty, self.faithful, images=1)

    def rows(self, draws: Draws, train: bool) -> tuple[Ints, Ints]:
        """See `Task.rows`; each image has a random stream of its own."""
        made = [self.source.block(generator(draws.key, i)) for i in draws.indices.tolist()]
        ids = np.array([block["images"] for block in made], np.int64)
        labels = np.array([block["labels"] for block in made], np.int64)
        return ids.reshape(draws.count, self.length), labels.reshape(draws.count)

    @property
    def floor(self) -> Floor:
        """A coin."""
        return Floor(0.5, "a coin")


@lru_cache(maxsize=8)  # batches of 32 share a block; training, validation and a floor take turns
def _block(task: ListOpsGen, key: Key, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Expressions number * BLOCK and on of a stream: padded tokens (BLOCK, T), values (BLOCK,).

    As many trees are begun as most often give a block, and again until it is full.
    """
    roots = min(MOST_ROOTS, math.ceil(1.1 * BLOCK / task.source.share))
    source, random = replace(task.source, roots=roots), generator(key, number)
    tokens, values = np.zeros((BLOCK, task.length), np.uint8), np.zeros(BLOCK, np.uint8)
    done = 0
    while done < BLOCK:
        made = source.block(random)
        lengths = made["lengths"][: BLOCK - done]
        upto = done + len(lengths)
        real = np.arange(task.length) < lengths[:, None]
        tokens[done:upto][real] = made["tokens"][: lengths.sum()]
        values[done:upto] = made["labels"][: len(lengths)]
        done = upto
    return tokens, values
