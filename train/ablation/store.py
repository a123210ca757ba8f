"""Results on disk: one file a cell, one JSON line in it, named by the hash of the cell."""

import json
from pathlib import Path
from typing import Any

from seqzoo.train.files import write_whole


class Store:
    """The cells that are done, of one folder.

    Args:
        folder: results/NAME; made when it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.cells = folder, folder / "cells"
        self.cells.mkdir(parents=True, exist_ok=True)
        for orphan in self.cells.glob(".*.partial"):  # of a process that was killed
            orphan.unlink(missing_ok=True)
        self.done: dict[str, dict[str, Any]] = {}
        for path in sorted(self.cells.glob("*.json")):
            self.done[path.stem] = _read(path)

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Keep what became of a cell."""
        write_whole(self.cells / f"{key}.json", (json.dumps(record) + "\n").encode())
        self.done[key] = record

    def forget_failures(self) -> int:
        """Drop cells that failed, so that they run again; how many."""
        failed = [key for key, record in self.done.items() if record["status"] == "failed"]
        for key in failed:
            (self.cells / f"{key}.json").unlink()
            del self.done[key]
        return len(failed)


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record["status"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: delete it, and its cell runs again") from error
    return record
