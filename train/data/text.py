"""Your own text: files or folders, UTF-8 or any other bytes."""

from pathlib import Path

from seqzoo.train.data.corpus import Corpus
from seqzoo.train.data.documents import Document


class Text(Corpus):
    """Files of the user, split by file, or by position when there are fewer than three.

    Args:
        path: a file or a folder, or several. Of a folder every file that `glob` finds, but for
            hidden ones.
        glob: which files of a folder.
        length: tokens of a window.
        batch_size: windows of a batch on one device.
        num_workers: processes that build batches; what is in memory already needs none.
        seed: of the split and of the order.
        tokenizer: a folder or Hub id for AutoTokenizer; bytes when None.
        pack: give `document_ids` too, so that nothing crosses from one document into another.
    """

    def __init__(
        self,
        path: str | list[str],
        *,
        glob: str = "**/*",
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
            pack=pack,
        )
        self.paths = [path] if isinstance(path, str) else list(path)
        self.glob = glob

    def documents(self) -> list[Document]:
        """The files that hold anything, by name."""
        found = [Document(name, file.read_bytes()) for name, file in self._files()]
        kept = sorted(d for d in found if d.data)
        if not kept:
            raise ValueError(f"{self.place()} holds no text: {len(found)} files, all empty")
        return kept

    def place(self) -> str:
        """The paths given."""
        return ", ".join(self.paths) or "path=[]"

    def _files(self) -> list[tuple[str, Path]]:
        """Each file with its name relative to the path it was found under."""
        files = []
        for given in self.paths:
            path = Path(given).expanduser()
            if path.is_file():
                files.append((path.name, path))
            elif path.is_dir():
                inside = (p for p in path.glob(self.glob) if p.is_file())
                named = ((p.relative_to(path), p) for p in inside)
                files += [(n.as_posix(), p) for n, p in named if not _hidden(n)]
            else:
                raise ValueError(f"there is no file or folder {given}")
        return files


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)
