"""Checkpoint files that survive a kill at any moment and notice a flipped bit.

A file is written beside its target, flushed to the disk and renamed over it; `name.ckpt.sha256`
beside it holds its size, step and hash in the form that `sha256sum -c` reads. Between the two
renames a kill must leave a valid pair, so the hash file first names both contents, the old one and
the new, then the file changes, then the old one is forgotten.
"""

import fcntl
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

SUFFIX = ".sha256"
SPARE = 1 << 24  # bytes that stay free beyond the new file


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or must not be trusted; one line."""


class Seal(NamedTuple):
    """What a file should be."""

    size: int
    step: int
    sha256: str

    def lines(self, name: str) -> str:
        """A comment with size and step, and the line that `sha256sum -c` reads."""
        return f"# size={self.size} step={self.step}\n{self.sha256}  {name}\n"


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as files on a local disk, whole or not there.

    Loading never runs code: `weights_only=True` always, and a checkpoint that could not be loaded
    that way is refused while it is written.

    Args:
        verify: compare size and hash on load.
    """

    def __init__(self, *, verify: bool = True) -> None:
        self.verify = verify
        self._swept: set[Path] = set()

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: object = None,
    ) -> None:
        """Write, or leave what was there.

        Raises:
            CheckpointError: no space, a path that is not local, or contents other than tensors
                and plain types.
        """
        target = _local(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent not in self._swept:
            sweep(target.parent)
            self._swept.add(target.parent)
        _check_space(checkpoint, target)
        with _beside(target) as (temporary, file):
            hashing = _Hashing(file)
            try:
                torch.save(checkpoint, hashing)  # type: ignore[arg-type]  # all it does is write
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise CheckpointError(f"cannot write {target}: {error}") from error
            _check_plain(temporary, target)
            seal = Seal(file.tell(), int(checkpoint.get("global_step", -1)), hashing.hexdigest())
            _seal(target, [seal, *_current(target)])
            temporary.replace(target)
        _flush_folder(target.parent)
        _seal(target, [seal])

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | torch.device | str | None = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read what is whole.

        Raises:
            CheckpointError: a file that is missing, damaged, or holds more than tensors and plain
                types; the message names the newest good one beside it.
        """
        target = _local(path).resolve()
        if weights_only is False:
            raise CheckpointError(f"{target} may run code if loaded with weights_only=False")
        fault = damage(target) if self.verify or not target.is_file() else ""
        if not fault:
            try:
                loaded: dict[str, Any] = torch.load(
                    target, map_location=map_location, weights_only=True
                )
            # Five types of exceptions come from truncated files alone.
            except Exception as error:
                fault = f"it cannot be read: {_first_line(error)}"
            else:
                return loaded
        good = next((p for p in _newest(target.parent) if p != target and not damage(p)), None)
        hint = f"the newest good one is {good}" if good else "there is no good one beside it"
        raise CheckpointError(f"checkpoint {target}: {fault}; {hint}")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the file, then its hash."""
        target = _local(path)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        _seal_path(target).unlink(missing_ok=True)


def find_last(folder: str | Path) -> Path | None:
    """The newest whole checkpoint directly in a folder; None when there is none at all.

    Damaged ones are passed over, with a warning each.

    Raises:
        CheckpointError: there are checkpoints and none of them is whole.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    sweep(folder)
    faults: list[str] = []
    for path in _newest(folder):
        fault = damage(path)
        if not fault:
            for line in faults:
                warnings.warn(f"{line}; going on with {path.name}", stacklevel=2)
            return path
        faults.append(f"checkpoint {path}: {fault}")
    if faults:
        raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(faults)}")
    return None


def damage(path: Path) -> str:
    """What is wrong with a file, in words; empty when it is whole or nothing is known of it."""
    path = path.resolve()
    if not path.is_file():
        return "there is no such file"
    try:
        expected = seals(path)
    except CheckpointError as error:
        return str(error)
    if not expected:
        return "" if path.stat().st_size else "it is empty"
    size = path.stat().st_size
    if size not in [seal.size for seal in expected]:
        return f"it is damaged: expected {expected[0].size} bytes, found {size}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found not in [seal.sha256 for seal in expected]:
        return f"it is damaged: expected SHA-256 {expected[0].sha256}, found {found}"
    return ""


def seals(path: Path) -> list[Seal]:
    """What the file may be: one content, or two after a kill in the middle of a save.

    Raises:
        CheckpointError: a hash file that cannot be read.
    """
    try:
        lines = _seal_path(path).read_text().splitlines()
        pairs = zip(lines[::2], lines[1::2], strict=True)
        fields = [(dict(f.split("=") for f in a[2:].split()), b.split()[0]) for a, b in pairs]
        return [Seal(int(known["size"]), int(known["step"]), sha) for known, sha in fields]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{_seal_path(path)} is damaged: {error}") from error


def sweep(folder: Path) -> None:
    """Remove files that a killed process left half-written; those being written are locked."""
    for orphan in folder.glob(".*.partial"):
        try:
            with orphan.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                orphan.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError):
            continue


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self._hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def _beside(target: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A locked file in the same folder, gone afterwards unless renamed."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield temporary, file
    finally:
        temporary.unlink(missing_ok=True)


def _seal(target: Path, contents: list[Seal]) -> None:
    """Write the hash file of a target in one step."""
    path = _seal_path(target)
    with _beside(path) as (temporary, file):
        file.write("".join(seal.lines(target.name) for seal in contents).encode())
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)
    _flush_folder(path.parent)


def _current(target: Path) -> list[Seal]:
    """What the file is known to be before it changes."""
    if not target.is_file():
        return []
    try:
        known = seals(target)
    except CheckpointError:
        return []  # nothing to keep: the file cannot be trusted
    if known:
        return known
    with target.open("rb") as file:
        return [Seal(target.stat().st_size, -1, hashlib.file_digest(file, "sha256").hexdigest())]


def _seal_path(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _flush_folder(folder: Path) -> None:
    """Make renames in a folder last through a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _newest(folder: Path) -> list[Path]:
    """Checkpoints of a folder, the newest first; of the same moment, the higher step first."""
    files = [p for p in folder.glob("*.ckpt") if p.is_file()]
    return sorted(files, key=lambda p: (p.stat().st_mtime_ns, p.name == "last.ckpt"), reverse=True)


def _check_space(checkpoint: dict[str, Any], target: Path) -> None:
    needed = _bytes(checkpoint) + SPARE
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise CheckpointError(
            f"no space for {target}: it needs about {needed >> 20} MiB, the disk has "
            f"{free >> 20} MiB free; the checkpoints that are there were left alone"
        )


def _bytes(value: object) -> int:
    """Bytes of the tensors in a nest of containers."""
    if isinstance(value, Tensor):
        return value.nelement() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes(v) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(v) for v in value)
    return 0


def _check_plain(temporary: Path, target: Path) -> None:
    """Refuse now what could not be loaded later; reads the structure, not the tensors."""
    try:
        torch.load(temporary, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{target} would hold more than tensors and plain types, so it could not be loaded "
            f"again: {_first_line(error)}"
        ) from error


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise CheckpointError(f"{path} is not on a local disk; give a folder of this machine")
    return Path(path)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
