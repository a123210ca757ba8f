"""Loaders that resume to the sample, whatever the number of workers.

What a loader stores counts the batches it handed over, not those a worker fetched ahead. Both are
plain iterables: Lightning then puts no distributed sampler of its own over their order.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]


def order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of `count` samples that belongs to an epoch; nothing else decides it."""
    return torch.randperm(count, generator=generator(seed, epoch))


def generator(*key: int) -> torch.Generator:
    """A generator of its own, so that no draw of a loader touches the global one."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


class Loader(ABC):
    """Batches of one rank for training, and where they stand.

    Attributes:
        limit: batches after which an epoch counts as finished; all when None.
    """

    limit: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Batches of an epoch."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """The rest of an epoch just resumed, otherwise the next one."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts, in plain types; the same on every rank."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a stored place."""


class EpochLoader(Loader):
    """Shuffled batches of a data set, epoch after epoch; the order is f(seed, epoch).

    Ranks take turns, sample by sample, so that what all have seen is always the beginning of the
    epoch's order: `position` counts samples of all ranks together. Every epoch but for a tail
    smaller than the number of ranks is seen whole.

    Args:
        dataset: gives a whole batch for a list of indices (`__getitems__`).
        batch_size: rows of a batch on one rank.
        seed: of the order.
        num_workers: processes that build batches.
        world: number of ranks.
        rank: this one.
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        batch_size: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        self.source, self.batch_size, self.seed = dataset, batch_size, seed
        self.num_workers, self.world, self.rank = num_workers, world, rank
        self.count = len(dataset)  # type: ignore[arg-type]  # a map-style data set has a length
        self.epoch = self.position = 0
        self._resumed = False

    def __len__(self) -> int:
        return -(-(self.count // self.world) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self.position and not self._resumed:
            self.epoch, self.position = self.epoch + 1, 0
        self._resumed = False
        for batch in self._batches():
            self.position += self.batch_size * self.world
            yield batch

    def _batches(self) -> DataLoader[Batch]:
        """What is left of the epoch."""
        usable = self.count - self.count % self.world
        left = order(self.count, self.seed, self.epoch)[self.position + self.rank : usable]
        rows = left[:: self.world].tolist()
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        return DataLoader(
            self.source,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=as_built,
            pin_memory=torch.cuda.is_available(),
            generator=generator(self.seed, self.epoch),
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts; the end of an epoch is the start of the next."""
        batches = len(self) if self.limit is None else min(self.limit, len(self))
        done = self.position >= batches * self.batch_size * self.world
        epoch, position = (self.epoch + 1, 0) if done else (self.epoch, self.position)
        return {"epoch": epoch, "position": position, **self._shape()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a stored place.

        Raises:
            ValueError: in the middle of an epoch, another seed, sample count, batch size or number
                of ranks: samples would come twice or never.
        """
        if state_dict["position"]:
            refuse_changes(state_dict, self._shape(), f"the middle of epoch {state_dict['epoch']}")
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]
        self._resumed = True

    def _shape(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "samples": self.count,
            "batch_size": self.batch_size,
            "ranks": self.world,
        }


def refuse_changes(was: dict[str, Any], now: dict[str, Any], place: str) -> None:
    """Refuse to resume when samples would come twice or never.

    Raises:
        ValueError: every name whose value differs, with both values.
    """
    changed = [
        f"{name} was {was.get(name)} and is {value}"
        for name, value in now.items()
        if was.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"cannot resume in {place}: {'; '.join(changed)}; set them back, or start a new run"
        )


def fixed_loader(dataset: Dataset[Batch], batch_size: int, num_workers: int) -> DataLoader[Batch]:
    """Every sample once, in order: for validation, test and prediction."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=as_built,
        pin_memory=torch.cuda.is_available(),
        generator=generator(0),
    )


class Rows(Dataset[Batch]):
    """A data set of tensors that are indexed together; a list of indices gives a batch."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> Batch:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these rows, token ids widened to int64."""
        chosen = torch.as_tensor(indices)
        return {name: column[chosen].long() for name, column in self.columns.items()}


def as_built(batch: Any) -> Batch:  # noqa: ANN401  # DataLoader's own signature
    """The data sets here give whole batches."""
    return batch  # type: ignore[no-any-return]
