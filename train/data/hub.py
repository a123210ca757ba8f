"""Any text data set of the Hugging Face Hub, streamed and packed."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.errors import check_positive
from seqzoo.train.data.base import Tokens
from seqzoo.train.data.documents import Windows
from seqzoo.train.data.stream import Blocks, StreamLoader, WindowStream
from seqzoo.train.tokenizer import Encoder

VAL_SHARE = 0.05  # of the documents, when the data set has no validation split


class Hub(Tokens):
    """Windows over documents as they stream in; nothing is stored but what is validated on.

    `Hub("Salesforce/wikitext", config="wikitext-103-raw-v1", val_split="validation")` reads from
    the Hub; `Hub("folder/")` and `Hub("json", data_files={"train": "my.jsonl"})` from disk. An
    epoch is a fixed number of batches, the next one goes on where it ended.

    Args:
        dataset: id on the Hub, folder, or a format (`json`, `parquet`, `text`) with `data_files`.
        config: name of the data set's configuration.
        data_files: files by split, for a format.
        revision: branch, tag or commit of the data set.
        column: column of the text.
        train_split: split to train on.
        val_split: split to validate on; when None, a twentieth of the documents of the training
            split, chosen by a seeded hash of the text, is held out.
        test_split: split to test on; None for no test.
        epoch_batches: batches of an epoch on one device.
        val_windows: windows of validation and test, from the beginning of their splits.
        shuffle: windows of a block that is shuffled as a whole; 1 keeps the order of the source.
        length: tokens of a window.
        batch_size: windows of a batch on one device.
        num_workers: processes that stream, each its own files of the data set.
        seed: of the split and of the order.
        tokenizer: a folder or Hub id for AutoTokenizer; bytes when None.
        pack: give `document_ids` too, so that nothing crosses from one document into another.
    """

    def __init__(
        self,
        dataset: str,
        *,
        config: str | None = None,
        data_files: dict[str, str] | None = None,
        revision: str | None = None,
        column: str = "text",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        epoch_batches: int = 1000,
        val_windows: int = 256,
        shuffle: int = 256,
        length: int = 512,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer: str | None = None,
        pack: bool = False,
    ) -> None:
        super().__init__(
            length=length,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            tokenizer=tokenizer,
        )
        check_positive(epoch_batches=epoch_batches, val_windows=val_windows, shuffle=shuffle)
        self.source = {"path": dataset, "name": config, "data_files": data_files}
        self.source |= {"revision": revision}
        self.column, self.pack = column, pack
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.epoch_batches, self.val_windows, self.shuffle = epoch_batches, val_windows, shuffle

    def build(self) -> None:
        """See `Tokens.build`."""
        for part in ("val", "test"):
            if part == "val" or self.splits[part]:
                self.rows[part] = self._held_out(part)
        seen = hashlib.sha256(repr((self.source, self.splits, self.column)).encode())
        for rows in self.rows.values():
            seen.update(rows.columns["input_ids"].numpy().tobytes())
        self.facts = {"digest": seen.hexdigest(), **self.source, "splits": dict(self.splits)}

    def train_loader(self, world: int, rank: int) -> StreamLoader:
        """See `Tokens.train_loader`."""
        source = self._stream(self.splits["train"])
        if world > 1:
            from datasets.distributed import split_dataset_by_node

            source = split_dataset_by_node(source, rank=rank, world_size=world)
        if self.num_workers > max(1, source.num_shards):
            raise ValueError(
                f"num_workers={self.num_workers} is not allowed; {self.source['path']} has "
                f"{source.num_shards} files for this rank, and a worker needs one of its own"
            )
        blocks = Blocks(source, self._tokens("train"), self.length, self.shuffle)
        stream = WindowStream(
            blocks,
            self.batch_size,
            self.epoch_batches,
            seed=self.seed,
            rank=rank,
            eos=self.encoder.eos if self.pack else None,
        )
        return StreamLoader(stream, num_workers=self.num_workers, world=world)

    def _held_out(self, part: str) -> Windows:
        """The first windows of a split, in memory."""
        tokens, pieces, count = self._tokens(part), [torch.zeros(0, dtype=torch.int32)], 0
        for example in self._stream(self.splits[part] or self.splits["train"]):
            pieces.append(tokens(example).int())
            count += len(pieces[-1])
            if count >= self.val_windows * self.length:
                break
        if count < self.length:
            raise ValueError(
                f"{self.source['path']} has {count} tokens for {part}: not one window of "
                f"length={self.length}; give another split, or a smaller length"
            )
        ids = torch.cat(pieces)[: self.val_windows * self.length]
        return Windows(ids, self.length, self.encoder.eos if self.pack else None)

    def _tokens(self, part: str) -> "ExampleTokens":
        share = 0.0 if self.splits["val"] or part == "test" else VAL_SHARE
        return ExampleTokens(self.encoder, self.column, self.seed, share, part == "val")

    def _stream(self, split: str | None) -> Any:  # noqa: ANN401  # `datasets` is optional
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                "data Hub needs the package datasets: pip install 'seqzoo[hub]'"
            ) from error
        try:
            return load_dataset(**self.source, split=split, streaming=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"cannot stream split {split!r} of data set {self.source['path']!r}: {reason}"
            ) from error


@dataclass
class ExampleTokens:
    """Ids of an example's text and its end; empty for what belongs to the other side of a split.

    Attributes:
        encoder: text to ids.
        column: column of the text.
        seed: of the split.
        share: of the documents that is held out for validation.
        held_out: which side to give.
    """

    encoder: Encoder
    column: str
    seed: int
    share: float
    held_out: bool

    def __call__(self, example: dict[str, Any]) -> Tensor:
        """(N,) ids."""
        if not isinstance(example.get(self.column), str):
            raise ValueError(
                f"the data set has no text in column {self.column!r}; columns: {', '.join(example)}"
            )
        data = example[self.column].encode("utf-8", "replace")
        key = hashlib.sha256(f"{self.seed}\0".encode() + data).digest()
        outside = int.from_bytes(key[:8]) < self.share * 2**64
        if not data or (self.share and outside != self.held_out):
            return torch.zeros(0, dtype=torch.int32)
        ids = self.encoder(data)
        return torch.cat([ids, ids.new_tensor([self.encoder.eos])])
