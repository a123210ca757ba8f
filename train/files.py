"""Files that are whole or not there, whenever the process dies."""

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the target, then rename: no reader and no crash meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
