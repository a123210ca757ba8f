"""A data module over files: whole files to train on, whole files held out, fixed windows."""

from abc import abstractmethod

from seqzoo.train.data.base import Tokens
from seqzoo.train.data.documents import Document, Windows, digest, pack, split


class Corpus(Tokens):
    """Windows over documents packed end to end. A subclass says which documents.

    Args:
        length: tokens of a window.
        batch_size: windows of a batch on one device.
        num_workers: processes that build batches; what is in memory already needs none.
        seed: of the split and of the order.
        tokenizer: a folder or Hub id for AutoTokenizer; bytes when None.
        pack: give `document_ids` too, so that nothing crosses from one document into another.
    """

    def __init__(
        self,
        *,
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
        self.pack = pack

    @abstractmethod
    def documents(self) -> list[Document]:
        """Every document, in an order that only its name decides."""

    def build(self) -> None:
        """See `Tokens.build`."""
        documents = self.documents()
        size = sum(len(d.data) for d in documents)
        for part, chosen in split(documents, self.seed).items():
            tokens = pack((self.encoder(d.data) for d in chosen), self.encoder.eos)
            if len(tokens) < self.length:
                raise ValueError(
                    f"{self.place()} has {size} bytes, of which {len(tokens)} tokens are for "
                    f"{part}: not one window of length={self.length}; give more text, or a "
                    "smaller length"
                )
            self.rows[part] = Windows(tokens, self.length, self.encoder.eos if self.pack else None)
        self.facts = {"digest": digest(documents), "files": len(documents), "bytes": size}

    @abstractmethod
    def place(self) -> str:
        """Where the documents are, for messages."""
