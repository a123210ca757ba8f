"""The default corpus: the source of this Python's own standard library; nothing to download."""

import hashlib
import sysconfig
from pathlib import Path

from seqzoo.kernels.errors import check_positive
from seqzoo.train.data.corpus import Corpus
from seqzoo.train.data.documents import Document

# Installed packages are not the standard library, and tests would be half of it.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Stdlib(Corpus):
    """Source code as bytes, split by file.

    What it holds changes with the version of Python: `describe()` names the version and a digest.

    Args:
        max_bytes: files are taken in the order of a hash of their names until this many bytes, so
            that a part is a fair sample of the whole (about 20 MB).
        length: tokens of a window.
        batch_size: windows of a batch on one device.
        num_workers: processes that build batches; what is in memory already needs none.
        seed: of the split and of the order, not of the choice of files.
        pack: give `document_ids` too, so that nothing crosses from one document into another.
    """

    def __init__(
        self,
        *,
        max_bytes: int = 4_000_000,
        length: int = 512,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        pack: bool = False,
    ) -> None:
        super().__init__(
            length=length, batch_size=batch_size, num_workers=num_workers, seed=seed, pack=pack
        )
        check_positive(max_bytes=max_bytes)
        self.max_bytes = max_bytes

    def documents(self) -> list[Document]:
        """Files up to `max_bytes` in all, by name."""
        root = Path(self.place())
        names = [p.relative_to(root) for p in root.rglob("*.py")]
        kept = (n.as_posix() for n in names if not LEFT_OUT.intersection(n.parts))
        chosen: list[Document] = []
        size = 0
        for name in sorted(kept, key=lambda n: hashlib.sha256(n.encode()).digest()):
            data = (root / name).read_bytes()
            size += len(data)
            if size > self.max_bytes and chosen:
                break
            if data:
                chosen.append(Document(name, data))
        if not chosen:
            raise ValueError(f"this Python has no library sources under {root}; use data Text")
        return sorted(chosen)

    def place(self) -> str:
        """The folder of the standard library."""
        return sysconfig.get_path("stdlib")
