"""Labelled text: sequences and classes from jsonl, csv, tsv or parquet files."""

import csv
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.errors import unknown
from seqzoo.train.data.base import Tokens
from seqzoo.train.data.documents import Document, digest
from seqzoo.train.data.loader import Batch, Rows

Sample = tuple[str, str]  # text and label


class Labelled(Tokens):
    """Sequences with a class each, cut or padded on the right to `length`.

    A batch holds `input_ids` (B, T), `attention_mask` (B, T), 1 at real tokens, and `labels` (B,).
    Classes are the labels of the training file, sorted: as numbers when all are whole numbers.

    Args:
        train: file with the training samples.
        val: file with the validation samples; when None, a tenth of the training file, chosen by a
            seeded hash of the text.
        test: file with the test samples.
        text: column of the text.
        label: column of the label.
        length: tokens of a row.
        batch_size: rows of a batch on one device.
        num_workers: processes that build batches; what is in memory already needs none.
        seed: of the split and of the order.
        tokenizer: a folder or Hub id for AutoTokenizer; bytes when None.
    """

    def __init__(
        self,
        train: str,
        *,
        val: str | None = None,
        test: str | None = None,
        text: str = "text",
        label: str = "label",
        length: int = 512,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(
            length=length,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            tokenizer=tokenizer,
        )
        self.files = {"train": train} | {k: v for k, v in (("val", val), ("test", test)) if v}
        self.text, self.label = text, label
        self._classes: list[str] = []

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their ids."""
        self.setup()
        return self._classes

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def build(self) -> None:
        """See `Tokens.build`."""
        parts = {part: self._read(path) for part, path in self.files.items()}
        if "val" not in parts:
            parts["train"], parts["val"] = hold_out(parts["train"], self.seed)
        self._classes = _sorted_labels({label for _, label in parts["train"]})
        for part, samples in parts.items():
            if not samples:
                raise ValueError(f"{self.files['train']} is too small: nothing is left for {part}")
            self.rows[part] = self._rows(samples)
        contents = [Document(y, x.encode("utf-8", "replace")) for p in parts.values() for x, y in p]
        self.facts = {"digest": digest(contents), "files": len(self.files)}
        self.facts |= {"classes": self._classes, "bytes": sum(len(d.data) for d in contents)}

    def _rows(self, samples: Sequence[Sample]) -> "LabelledRows":
        encoded = [self.encoder(x.encode("utf-8", "replace"))[: self.length] for x, _ in samples]
        ids = encoded[0].new_full((len(samples), self.length), self.encoder.pad)
        for row, tokens in zip(ids, encoded, strict=True):
            row[: len(tokens)] = tokens
        lengths = torch.tensor([len(tokens) for tokens in encoded])
        number = {name: i for i, name in enumerate(self._classes)}
        for _, label in samples:
            if label not in number:
                raise unknown("class named", label, number)
        return LabelledRows(ids, lengths, torch.tensor([number[label] for _, label in samples]))

    def _read(self, path: str) -> list[Sample]:
        """Text and label of every row of a file."""
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"there is no file {path}")
        reader = READERS.get(file.suffix)
        if reader is None:
            raise unknown("reader for files ending in", file.suffix, READERS)
        samples = []
        for number, row in enumerate(reader(file), 1):
            for column in (self.text, self.label):
                if row.get(column) is None:
                    has = ", ".join(str(name) for name in row)
                    raise ValueError(f"{path}, row {number}: no column {column!r}; it has {has}")
            samples.append((str(row[self.text]), str(row[self.label])))
        if not samples:
            raise ValueError(f"{path} holds no rows")
        return samples


class LabelledRows(Rows):
    """Padded ids (N, T), their lengths (N,) and classes (N,)."""

    def __init__(self, ids: Tensor, lengths: Tensor, labels: Tensor) -> None:
        super().__init__(input_ids=ids, labels=labels, lengths=lengths)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these rows."""
        batch = super().__getitems__(indices)
        place = torch.arange(batch["input_ids"].shape[1])
        mask = place < batch.pop("lengths")[:, None]
        return {**batch, "attention_mask": mask.long()}


def hold_out(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Nine tenths and one; equal texts fall on the same side."""
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        key = hashlib.sha256(f"{seed}\0{sample[0]}".encode("utf-8", "replace")).digest()
        parts[int.from_bytes(key[:8]) < 2**64 // 10].append(sample)
    return parts


def _sorted_labels(labels: set[str]) -> list[str]:
    try:
        return sorted(labels, key=int)
    except ValueError:
        return sorted(labels)


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from error


def _table(path: Path) -> Iterable[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")


def _parquet(path: Path) -> Iterable[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid  # type: ignore[import-untyped]  # it has no stubs
        from pyarrow.parquet import read_table  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: pip install 'seqzoo[hub]'") from error
    try:
        yield from read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not parquet: {error}") from error


READERS = {".jsonl": _jsonl, ".csv": _table, ".tsv": _table, ".parquet": _parquet}
