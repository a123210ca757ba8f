"""Windows over a stream of documents that never ends, resumed to the window.

A place in the stream is small: where the source stood when the current block of windows began, the
tokens left over then, and how far into the block we are. Going on reads the block again, so that
shuffling inside it costs nothing to store.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from seqzoo.train.data.documents import causal_batch
from seqzoo.train.data.loader import Batch, Loader, as_built, generator, order, refuse_changes

Place = dict[str, Any]


class Blocks:
    """Blocks of windows from a source that Hugging Face's `datasets` streams.

    Args:
        source: an IterableDataset, already this rank's part.
        tokens: ids of a document with its end, from one example; empty for one to leave out.
        length: tokens of a window.
        size: windows of a block.
    """

    def __init__(
        self,
        source: Any,  # noqa: ANN401  # `datasets` may not be installed
        tokens: Callable[[dict[str, Any]], Tensor],
        length: int,
        size: int,
    ) -> None:
        self.source, self.tokens, self.length, self.size = source, tokens, length, size

    def run(self, place: Place | None) -> Iterator[tuple[Tensor, Place]]:
        """Blocks (size, length) from a place on, each with the place of its beginning.

        Raises:
            ValueError: a whole pass over the source gave no token.
        """
        place = place or {"source": {}, "rest": None, "pass": 0, "block": 0}
        source, passes, block = place["source"], place["pass"], place["block"]
        kept = [] if place["rest"] is None else [place["rest"]]
        # Not `set_epoch` for a new pass: workers share that number. An empty state begins again.
        self.source.load_state_dict(source)
        examples, fresh = iter(self.source), not source
        while True:
            start = {"source": source, "rest": place["rest"], "pass": passes, "block": block}
            count = sum(len(piece) for piece in kept)
            while count < self.size * self.length:
                example = next(examples, None)
                if example is None:
                    if fresh:
                        raise ValueError("the data set has no text for this rank or worker")
                    self.source.load_state_dict({})
                    passes, examples, fresh = passes + 1, iter(self.source), True
                    continue
                source = self.source.state_dict()
                kept.append(self.tokens(example))
                count += len(kept[-1])
                fresh = fresh and not len(kept[-1])
            tokens, used = torch.cat(kept), self.size * self.length
            yield tokens[:used].view(self.size, self.length), start
            kept, block = [tokens[used:].clone()], block + 1
            place = {"rest": kept[0]}


class WindowStream(IterableDataset[Any]):
    """Batches of one rank, each with the worker that made it and its place afterwards.

    Batch b of an epoch belongs to worker b mod W.
    """

    def __init__(
        self,
        blocks: Blocks,
        batch_size: int,
        batches: int,
        *,
        seed: int = 0,
        rank: int = 0,
        eos: int | None = None,
    ) -> None:
        self.blocks, self.batch_size, self.batches = blocks, batch_size, batches
        self.seed, self.rank, self.eos = seed, rank, eos
        self.places: list[Place | None] = []
        self.done = 0  # batches of this epoch that all workers together have handed over

    def __iter__(self) -> Iterator[tuple[int, Batch, Place] | None]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if worker < self.done % workers:
            yield None  # this worker's turn in the current round was before the resume
        left = len(range(worker, self.batches, workers)) - len(range(worker, self.done, workers))
        windows = self._windows(worker)
        for _ in range(left):
            rows = [next(windows) for _ in range(self.batch_size)]
            ids = torch.stack([row for row, _ in rows]).long()
            yield worker, causal_batch(ids, self.eos), rows[-1][1]

    def _windows(self, worker: int) -> Iterator[tuple[Tensor, Place]]:
        """Windows in shuffled order, each with the place behind it."""
        place = self.places[worker]
        first = place["row"] if place else 0
        for windows, start in self.blocks.run(place):
            key = hashlib.sha256(repr((self.seed, self.rank, worker)).encode()).digest()
            rows = order(len(windows), int.from_bytes(key[:6]), start["block"]).tolist()
            for i in range(first, len(rows)):
                yield windows[rows[i]], {**start, "row": i + 1}
            first = 0


class StreamLoader(Loader):
    """Hands over a stream's batches; an epoch is a fixed number of them, the next goes on."""

    def __init__(self, stream: WindowStream, *, num_workers: int = 0, world: int = 1) -> None:
        self.stream, self.num_workers, self.world = stream, num_workers, world
        self.batch_size = stream.batch_size
        self.places: list[Place | None] = [None] * max(1, num_workers)
        self.done = 0
        self._resumed = False

    def __len__(self) -> int:
        return self.stream.batches

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self.done = 0
        self._resumed = False
        self.stream.places, self.stream.done = list(self.places), self.done
        loader = DataLoader(
            self.stream,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=as_built,
            pin_memory=torch.cuda.is_available(),
            generator=generator(self.stream.seed),
        )
        for item in loader:
            if item is not None:
                worker, batch, self.places[worker] = item
                self.done += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """The places of every worker of every rank; all ranks must ask together."""
        batches = len(self) if self.limit is None else min(self.limit, len(self))
        places = [self.places]
        if self.world > 1:
            places = [[] for _ in range(self.world)]
            dist.all_gather_object(places, self.places)
        done = 0 if self.done >= batches else self.done
        return {"done": done, "places": [list(p) for p in places], **self._shape()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a stored place.

        Raises:
            ValueError: another number of ranks or workers, seed, length, batch or block size.
        """
        refuse_changes(state_dict, self._shape(), "the stream")
        self.places = list(state_dict["places"][self.stream.rank])
        self.done = state_dict["done"]
        self._resumed = True

    def _shape(self) -> dict[str, int]:
        stream = self.stream
        return {
            "seed": stream.seed,
            "batch_size": stream.batch_size,
            "length": stream.blocks.length,
            "shuffle": stream.blocks.size,
            "workers": self.num_workers,
            "ranks": self.world,
        }
