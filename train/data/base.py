"""What every data module has: batches of token ids, fixed held-out samples, exact resume."""

import platform
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from seqzoo.kernels.errors import check_positive
from seqzoo.train.data.loader import Batch, EpochLoader, Loader, Rows, fixed_loader
from seqzoo.train.tokenizer import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokens(LightningDataModule):
    """Rows of `length` token ids. A subclass gives `build`, which fills `rows` and `facts`.

    Training samples come in an order that is f(seed, epoch), resumed to the sample; validation and
    test samples are fixed, the same for every model.

    Args:
        length: tokens of a row.
        batch_size: rows of a batch on one device.
        num_workers: processes that build batches; what is in memory already needs none.
        seed: of the split and of the order.
        tokenizer: a folder or Hub id for AutoTokenizer; bytes when None.
    """

    def __init__(
        self,
        *,
        length: int = 512,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        check_positive(length=length, batch_size=batch_size)
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is not allowed; it must be 0 or more")
        self.length, self.batch_size, self.num_workers = length, batch_size, num_workers
        self.seed, self.encoder = seed, Encoder(tokenizer)
        self.rows: dict[str, Rows] = {}  # by split: train, val, test
        self.facts: dict[str, Any] = {}  # plain values; `digest` among them

    @abstractmethod
    def build(self) -> None:
        """Read the data: fill `rows` and `facts`.

        Raises:
            ValueError: data that are missing, empty or too short for one row; the path is named.
        """

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, as transformers has it."""
        return self.encoder.tokenizer

    @property
    def tokenizer_name(self) -> str | None:
        """Where the tokenizer comes from, to be stored with a model; None reads bytes."""
        return self.encoder.name

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.encoder.vocab_size

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of a full batch on one device."""
        return self.batch_size * self.length

    def describe(self) -> dict[str, Any]:
        """Plain facts recorded with a run: what was read, its digest, how it was split."""
        self.setup()
        return {
            "data": type(self).__name__,
            "python": platform.python_version(),
            "tokenizer": self.encoder.name or "bytes",
            "vocab_size": self.vocab_size,
            "length": self.length,
            "seed": self.seed,
            "rows": {part: len(rows) for part, rows in self.rows.items()},
            **self.facts,
        }

    def setup(self, stage: str = "fit") -> None:
        """Read the data, once."""
        if not self.facts:
            self.build()

    def train_dataloader(self) -> Loader:
        """Shuffled batches, resumable."""
        self.setup()
        trainer = self.trainer
        ranks = (trainer.distributed_sampler_kwargs if trainer else None) or {}
        loader = self.train_loader(int(ranks.get("num_replicas", 1)), int(ranks.get("rank", 0)))
        limit = trainer.limit_train_batches if trainer else None
        if limit is not None:
            loader.limit = limit if isinstance(limit, int) else int(limit * len(loader))
        return loader

    def train_loader(self, world: int, rank: int) -> Loader:
        """The training batches of one rank."""
        return EpochLoader(
            self.rows["train"],
            self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            world=world,
            rank=rank,
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The fixed validation samples."""
        return self._fixed("val")

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The fixed test samples."""
        return self._fixed("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test samples."""
        return self._fixed("test")

    def state_dict(self) -> dict[str, Any]:
        """The facts, so that a resumed run can tell whether it reads the same data."""
        return self.describe()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare.

        Raises:
            ValueError: training would go on with data other than those it began with.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        now = self.describe()
        changed = [k for k in ("digest", "tokenizer", "length") if state_dict.get(k) != now.get(k)]
        if fitting and changed:
            was, is_now = ({k: facts.get(k) for k in changed} for facts in (state_dict, now))
            raise ValueError(
                f"the checkpoint was trained on other data: {was} then (Python "
                f"{state_dict.get('python')}), {is_now} now (Python {now['python']}); "
                "restore the data, or start a new run"
            )

    def _fixed(self, part: str) -> DataLoader[Batch]:
        self.setup()
        if part not in self.rows:
            raise ValueError(f"{type(self).__name__} has no {part} samples; name a {part} split")
        return fixed_loader(self.rows[part], self.batch_size, self.num_workers)
