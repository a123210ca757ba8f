"""Long-Range Arena: six tasks from 1,024 to 16,384 tokens, from files or from generators of ours.

Tay et al., 2020, arXiv:2011.04006. What a generator of ours made is named `-gen` wherever a figure
is: its difficulty is not that of the published sets.
"""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seqzoo.kernels.errors import unknown
from seqzoo.train.data.base import Tokens
from seqzoo.train.data.loader import Rows
from seqzoo.train.data.lra_sources import TASKS, Data, Found, Request, Task, fetch
from seqzoo.train.data.sequences import DocumentPairs, Images, Sequences
from seqzoo.train.lra.floors import floors
from seqzoo.train.lra.formats import Pairs, Ragged


class LRA(Tokens):
    """A task of the arena: sequences, or pairs of documents, with a class each.

    Batches hold `input_ids` (B, T), `attention_mask` (B, T) and `labels` (B,); of retrieval
    (B, 2, T), for `--model Retrieval`; with real-valued pixels `pixel_values` (B, T) too. Ids of
    texts are byte + 1, of images the 8-bit intensities, of ListOps its 15 symbols from 1.

    Args:
        task: listops, text, retrieval, image, pathfinder32, pathfinder64, pathfinder128,
            pathfinder256 or pathx, which is pathfinder128.
        root: folder with the archive `lra_release`, with MEGA's `input/` and `label/`, or with
            `imdb_*.parquet` and `cifar_gray_*.npz`; the variable SEQZOO_DATA when None.
        source: release, mega, packed, hub or generated; `auto` takes the first of the first three
            that is there, and without a root generates what can be generated.
        pixels: images as `tokens` or as real `values`.
        official_val: text only: train on all training texts and choose by the test texts, as was
            published, instead of holding a tenth out.
        difficulty: of Pathfinder: easy, intermediate or hard; the arena's is hard.
        samples: how many to generate of train, val and test.
        generator: other options of the generator; see `seqzoo.train.lra`.
        cache: where generated data are kept; ~/.cache/seqzoo/lra when None.
        processes: how many generate; one for each core when None.
        max_length: tokens of a row at most; the task's own when None.
        batch_size: rows of a batch on one device.
        num_workers: processes that build batches.
        seed: of the split, of the order and of generated samples.
    """

    def __init__(
        self,
        task: str,
        *,
        root: str | None = None,
        source: str = "auto",
        pixels: Literal["tokens", "values"] = "tokens",
        official_val: bool = False,
        difficulty: str = "hard",
        samples: dict[str, int] | None = None,
        generator: dict[str, Any] | None = None,
        cache: str | None = None,
        processes: int | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
        self.fixed: Task = TASKS[task]
        super().__init__(
            # Another name than `length`: the command line would hand the default data's 512 on.
            length=self.fixed.length if max_length is None else max_length,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        if source not in ("auto", *self.fixed.sources):
            raise unknown(f"source of {task} named", source, ("auto", *self.fixed.sources))
        if pixels not in ("tokens", "values"):
            raise unknown("kind of pixels", pixels, ("tokens", "values"))
        if pixels == "values" and not self.fixed.side:
            raise ValueError(f"pixels=values is not allowed; {task} has no pixels")
        if self.fixed.side and self.length != self.fixed.length:
            raise ValueError(
                f"max_length={max_length} is not allowed; images of {task} are "
                f"{self.fixed.length} tokens"
            )
        place = root or os.environ.get("SEQZOO_DATA")
        if root and not Path(root).expanduser().is_dir():
            raise ValueError(f"there is no folder {root}")
        self.pixels = pixels
        self.request = Request(
            task,
            source,
            Path(place).expanduser() if place else None,
            bool(root),
            official_val,
            difficulty,
            dict(generator or {}),
            samples,
            seed,
            cache,
            processes,
        )
        self._vocab_size = self.fixed.vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        if self.request.source in ("auto", "mega"):
            self.setup()  # MEGA's files have ids of their own
        return self._vocab_size

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return self.fixed.n_classes

    @property
    def real_valued(self) -> bool:
        """Whether batches hold `pixel_values`."""
        return self.pixels == "values"

    @property
    def towers(self) -> int:
        """Documents of a sample."""
        return 2 if self.request.task == "retrieval" else 1

    @property
    def mask_rate(self) -> float:
        """Share of the tokens that self-pretraining hides."""
        return self.fixed.mask_rate

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of a full batch on one device."""
        return self.batch_size * self.length * self.towers

    @property
    def suffix(self) -> str:
        """What every name of a figure ends in: `-gen` for generated samples."""
        self.setup()
        return "-gen" if self.facts["source"] == "generated" else ""

    @property
    def floors(self) -> dict[str, dict[str, float]]:
        """Accuracies that cost nothing, by split and name."""
        self.setup()
        found: dict[str, dict[str, float]] = self.facts["floors"]
        return found

    def build(self) -> None:
        """See `Tokens.build`."""
        found = fetch(self.request)
        if found.source == "mega" and not self.fixed.side:
            highest = max(int(part.tokens.max(initial=0)) for part in found.parts.values())  # type: ignore[union-attr]
            self._vocab_size = highest + 2
        self.rows = {part: self._rows(data, found) for part, data in found.parts.items()}
        for part, rows in self.rows.items():
            if not len(rows):
                raise ValueError(f"{found.name} from {found.source} has no {part} samples")
        labels = {part: data.labels for part, data in found.parts.items()}
        keys = {part: _first_tokens(data) for part, data in found.parts.items()}
        first = keys if self.request.task == "listops" else None
        self.facts = {
            **found.facts,
            "task": found.name,
            "source": found.source,
            "tokenizer": f"lra-{self.request.task}-{self._vocab_size}",
            "pixels": self.pixels,
            "classes": self.n_classes,
            "floors": floors(labels, first),
            "validated_on": "test" if self.request.official_val else "val",
        }

    def _rows(self, data: Data, found: Found) -> Rows:
        if isinstance(data, Ragged):
            own = self.request.task == "listops" and found.source != "mega"
            return Sequences(data, self.length, 0 if own else 1)
        if isinstance(data, Pairs):
            return DocumentPairs(data, self.length)
        scale = self.fixed.scale if self.real_valued else None
        return Images(data, self.fixed.side, scale)


def _first_tokens(data: Data) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The first token of every sequence; nothing for others."""
    if not isinstance(data, Ragged):
        return np.zeros(0, np.int64)
    starts = np.cumsum(data.lengths) - data.lengths
    return np.asarray(data.tokens[starts], np.int64)
