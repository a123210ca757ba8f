"""Rows of Long-Range Arena as batches: ragged sequences, pairs of documents, images.

A batch holds `input_ids`, `attention_mask` (1 at real tokens) and `labels` (B,). Sequences are
padded on the right with 0 to the longest of the batch.
"""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqzoo.train.data.loader import Batch, Rows
from seqzoo.train.lra.formats import AAN_BYTES, Files, Pairs, Pictures, Ragged, read_picture


class Sequences(Rows):
    """Ragged sequences, each cut to `length`; ids are the tokens plus `shift`."""

    def __init__(self, data: Ragged, length: int, shift: int = 0) -> None:
        self.tokens, self.length, self.shift = data.tokens, length, shift
        self.starts = np.cumsum(data.lengths) - data.lengths
        self.lengths = np.minimum(data.lengths, length)
        super().__init__(labels=torch.from_numpy(np.asarray(data.labels, np.int64)))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these rows."""
        rows = []
        for i in indices:
            start = int(self.starts[i])
            rows.append(self.tokens[start : start + int(self.lengths[i])].astype(np.int64))
        ids, mask = padded([row + self.shift for row in rows])
        labels = self.columns["labels"][torch.as_tensor(indices)]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class DocumentPairs(Rows):
    """Pairs of documents as bytes, id = byte + 1: `input_ids` and the mask are (B, 2, T)."""

    def __init__(self, data: Pairs, length: int) -> None:
        self.path, self.spans, self.length = data.path, data.spans, min(length, AAN_BYTES)
        self._map: mmap.mmap | None = None
        super().__init__(labels=torch.from_numpy(data.labels))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these rows."""
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = []
        for i in indices:
            for start, end in self.spans[i].tolist():
                text = self._map[start : min(end, start + self.length)]
                rows.append(np.frombuffer(text, np.uint8).astype(np.int64) + 1)
        ids, mask = padded(rows)
        shape = (len(rows) // 2, 2, ids.shape[1])
        labels = self.columns["labels"][torch.as_tensor(indices)]
        return {
            "input_ids": ids.view(shape),
            "attention_mask": mask.view(shape),
            "labels": labels,
        }

    def __getstate__(self) -> dict[str, Any]:
        """A map of a file does not travel to a worker; each opens its own."""
        return {**self.__dict__, "_map": None}


class Images(Rows):
    """Grey images as sequences of 8-bit intensities, and as real numbers too where asked for.

    Args:
        data: in memory, or files that are read when their batch is built.
        side: pixels a side.
        scale: (mean, deviation) of the real numbers, on a scale from 0 to 1; None gives none.
    """

    def __init__(
        self, data: Pictures | Files, side: int, scale: tuple[float, float] | None
    ) -> None:
        self.data, self.side, self.scale = data, side, scale
        super().__init__(labels=torch.from_numpy(np.asarray(data.labels, np.int64)))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these rows; with `scale` also `pixel_values` (B, T)."""
        pixels = torch.from_numpy(self._pixels(indices).astype(np.int64))
        batch = {
            "input_ids": pixels,
            "attention_mask": torch.ones_like(pixels),
            "labels": self.columns["labels"][torch.as_tensor(indices)],
        }
        if self.scale is not None:
            mean, deviation = self.scale
            batch["pixel_values"] = (pixels / 255 - mean) / deviation
        return batch

    def _pixels(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        if isinstance(self.data, Pictures):
            return np.asarray(self.data.pixels[np.asarray(indices)])
        paths = [Path(self.data.folder, self.data.names[i]) for i in indices]
        return np.stack([read_picture(path, self.side) for path in paths])


def padded(rows: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """Rows as (B, T) ids and their mask; T is at least 1."""
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.zeros((len(rows), max(1, int(lengths.max(initial=0)))), np.int64)
    for row, own in zip(ids, rows, strict=True):
        row[: len(own)] = own
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
