"""Synthetic tasks as data: fresh samples at every step, or a fixed number of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from seqzoo.kernels.errors import check_positive
from seqzoo.train.data.base import Tokens
from seqzoo.train.data.loader import (
    Batch,
    Loader,
    Rows,
    as_built,
    fixed_loader,
    generator,
    refuse_changes,
)
from seqzoo.train.tasks import Task, create_task


class Synthetic(Tokens):
    """Rows of a synthetic task: `input_ids` and `labels` (B, T), -100 where no answer is asked.

    A label belongs to its own position. Sample i of a split is a function of (seed, split, i), so
    batches are the same whatever the number of workers; validation and test rows are fixed.

    Args:
        task: name of a task that asks at tokens; see `seqzoo list --tasks`.
        length: tokens of a row; the task's own default when None.
        options: the task's other options.
        test_lengths: lengths to validate and test at besides `length`.
        samples: training rows, shuffled anew in each epoch; None trains on fresh rows for ever.
        epoch_batches: batches of an epoch where rows are fresh.
        val_samples: validation rows, at each length.
        test_samples: test rows, at each length.
        batch_size: rows of a batch on one device.
        num_workers: processes that build batches.
        seed: of the samples and their order.
    """

    def __init__(
        self,
        task: str,
        *,
        length: int | None = None,
        options: dict[str, Any] | None = None,
        test_lengths: list[int] | None = None,
        samples: int | None = None,
        epoch_batches: int = 1000,
        val_samples: int = 512,
        test_samples: int = 2048,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        given = {"length": length} if length is not None else {}
        self.task = create_task(task, **given, **(options or {}))
        if self.task.readout == "pooled":
            raise ValueError(
                f"task={task} is not allowed: its rows have one answer each, and `seqzoo fit` "
                "takes such data from LRA: -c configs/task/lra-*.yaml"
            )
        super().__init__(
            length=self.task.length, batch_size=batch_size, num_workers=num_workers, seed=seed
        )
        check_positive(epoch_batches=epoch_batches)
        check_positive(val_samples=val_samples, test_samples=test_samples)
        if samples is not None:
            check_positive(samples=samples)
        others = sorted(set(test_lengths or []) - {self.length})
        self.tasks = {n: self.task.at(n) for n in (self.length, *others)}
        self.samples, self.epoch_batches = samples, epoch_batches
        self.held_out = {"val": val_samples, "test": test_samples}

    def build(self) -> None:
        """See `Tokens.build`."""
        endless = self.epoch_batches * self.batch_size
        self.rows["train"] = Samples(self.task, self.seed, "train", self.samples or endless)
        for part, count in self.held_out.items():
            self.rows[part] = Samples(self.task, self.seed, part, count)
        floor = self.task.floor
        self.facts = {
            "digest": f"{self.task.to_dict()} seed {self.seed} samples {self.samples}",
            "task": self.task.to_dict(),
            "floor": floor.accuracy,
            "floor_is": floor.how,
            "fresh": self.samples is None,
        }

    @property
    def vocab_size(self) -> int:
        """Number of token ids, answers included."""
        return self.task.vocab_size

    @property
    def readout(self) -> str:
        """Where the model's answers are read: at each `token`, or all from the `last` one."""
        return self.task.readout

    def describe(self) -> dict[str, Any]:
        """See `Tokens.describe`; there is no tokenizer."""
        return {**super().describe(), "tokenizer": None}

    def train_loader(self, world: int, rank: int) -> Loader:
        """See `Tokens.train_loader`."""
        if self.samples is not None:
            return super().train_loader(world, rank)
        return FreshLoader(
            self.rows["train"],
            self.batch_size,
            self.epoch_batches,
            seed=self.seed,
            num_workers=self.num_workers,
            world=world,
            rank=rank,
        )

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """The fixed validation samples, at each length."""
        return self._at_each_length("val")

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """The fixed test samples, at each length."""
        return self._at_each_length("test")

    def _at_each_length(self, part: str) -> list[DataLoader[Batch]]:
        count = self.held_out[part]
        rows = [Samples(task, self.seed, part, count) for task in self.tasks.values()]
        return [fixed_loader(r, self.batch_size, self.num_workers) for r in rows]


class Samples(Rows):
    """The first `count` samples of a split, made when they are asked for."""

    def __init__(self, task: Task, seed: int, split: str, count: int) -> None:
        super().__init__()
        self.task, self.seed, self.split, self.count = task, seed, split, count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these rows."""
        return self.task.sample(self.seed, self.split, indices)


class FreshLoader(Loader):
    """Rows that were never seen before, batch after batch; batch b is the same in every run.

    Args:
        dataset: gives a whole batch for a list of indices, however large.
        batch_size: rows of a batch on one rank.
        batches: of an epoch.
        seed: of the data, to be compared on resume.
        num_workers: processes that build batches.
        world: number of ranks; they take turns, batch by batch.
        rank: this one.
    """

    def __init__(
        self,
        dataset: Rows,
        batch_size: int,
        batches: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        self.source, self.batch_size, self.batches = dataset, batch_size, batches
        self.seed, self.num_workers, self.world, self.rank = seed, num_workers, world, rank
        self.total = self.done = 0  # batches handed over, in all and in this epoch
        self._resumed = False

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self.done = 0
        self._resumed = False
        left = range(self.total, self.total + self.batches - self.done)
        loader = DataLoader(
            self.source,
            batch_sampler=[self._numbers(b) for b in left],
            num_workers=self.num_workers,
            collate_fn=as_built,
            pin_memory=torch.cuda.is_available(),
            generator=generator(self.seed),
        )
        for batch in loader:
            self.total, self.done = self.total + 1, self.done + 1
            yield batch

    def _numbers(self, batch: int) -> list[int]:
        start = (batch * self.world + self.rank) * self.batch_size
        return list(range(start, start + self.batch_size))

    def state_dict(self) -> dict[str, Any]:
        """Batches handed over; the end of an epoch is the start of the next."""
        batches = len(self) if self.limit is None else min(self.limit, len(self))
        done = 0 if self.done >= batches else self.done
        return {"total": self.total, "done": done, **self._shape()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a stored place.

        Raises:
            ValueError: another seed, batch size or number of ranks.
        """
        refuse_changes(state_dict, self._shape(), "the stream of samples")
        self.total, self.done = state_dict["total"], state_dict["done"]
        self._resumed = True

    def _shape(self) -> dict[str, int]:
        return {"seed": self.seed, "batch_size": self.batch_size, "ranks": self.world}
