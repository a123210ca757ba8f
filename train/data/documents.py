"""A corpus: named documents, their split, and the windows a language model is trained on."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqzoo.train.data.loader import Batch, Rows

SHARES = {"val": 0.05, "test": 0.05}  # of the bytes; the rest is for training


class Document(NamedTuple):
    """A file: where it stands in its corpus, and what it holds."""

    name: str
    data: bytes


def digest(documents: Iterable[Document]) -> str:
    """SHA-256 over names, sizes and contents, in order."""
    total = hashlib.sha256()
    for name, data in documents:
        total.update(f"{name}\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()


def split(documents: Sequence[Document], seed: int) -> dict[str, list[Document]]:
    """Train, val and test: whole files, in the order of a seeded hash of their names.

    Files go to `val`, then `test`, until each has its share of the bytes. One or two files, or
    some so unequal that less than half would be left to train on, are cut by position instead:
    the last twentieth is the test, the one before it the validation text.
    """
    total = sum(len(d.data) for d in documents)
    left = sorted(documents, key=lambda d: hashlib.sha256(f"{seed}\0{d.name}".encode()).digest())
    parts: dict[str, list[Document]] = {}
    for part, share in SHARES.items():
        parts[part], size = [], 0
        while left and size < share * total:
            parts[part].append(left.pop(0))
            size += len(parts[part][-1].data)
    parts["train"] = left
    if len(documents) < 3 or 2 * sum(len(d.data) for d in left) < total:
        return _by_position(documents)
    return {part: sorted(chosen) for part, chosen in parts.items()}


def _by_position(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Every document cut in three, at the ends of lines where there are some."""
    parts: dict[str, list[Document]] = {"train": [], "val": [], "test": []}
    for name, data in documents:
        size = len(data)
        second = _line_end(data, round(size * (1 - SHARES["test"])))
        first = _line_end(data, round(size * (1 - SHARES["test"] - SHARES["val"])))
        for part, piece in (
            ("train", data[:first]),
            ("val", data[first:second]),
            ("test", data[second:]),
        ):
            parts[part].append(Document(f"{name}#{part}", piece))
    return parts


def _line_end(data: bytes, at: int) -> int:
    """`at`, moved behind the line that it falls into unless that is long."""
    end = data.find(b"\n", at, at + 256)
    return at if end < 0 else end + 1


def pack(documents: Iterable[Tensor], eos: int) -> Tensor:
    """Documents end to end, each followed by `eos`: (N,)."""
    pieces = [piece for ids in documents for piece in (ids, ids.new_tensor([eos]))]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int16)


class Windows(Rows):
    """Consecutive windows of `length` tokens that do not overlap; the tail is left out.

    A batch holds `input_ids` (B, T) and `labels` (B, T), the same ids: the model shifts. With
    `eos` it also holds `document_ids` (B, T), which count the documents of each window from 0, and
    the labels of a document's first token are -100: nothing came before it.
    """

    def __init__(self, tokens: Tensor, length: int, eos: int | None = None) -> None:
        count = len(tokens) // length
        super().__init__(input_ids=tokens[: count * length].view(count, length))
        self.eos = eos

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these windows."""
        return causal_batch(super().__getitems__(indices)["input_ids"], self.eos)


def causal_batch(ids: Tensor, eos: int | None) -> Batch:
    """What a causal language model takes, from (B, T) ids; see `Windows`."""
    if eos is None:
        return {"input_ids": ids, "labels": ids.clone()}
    ends = (ids == eos).long()
    document = ends.cumsum(1) - ends
    first = torch.zeros_like(ends, dtype=torch.bool)
    first[:, 1:] = ends[:, :-1].bool()
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(first, -100),
        "document_ids": document,
    }
