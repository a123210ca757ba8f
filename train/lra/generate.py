"""Generated data sets on disk: made by several processes, whole or not there, the same every time.

A split is made of blocks, each with a random stream of its own that depends on the seed, the split
and the block's number only. Blocks are used in that order whoever made them, so the number of
processes changes nothing. A finished block is a file at once: a generation that was killed goes on
from those. `manifest.json` comes last; without it a folder is unfinished.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]  # it has no stubs

from seqzoo.kernels.errors import check_positive
from seqzoo.train.files import write_whole

Arrays = dict[str, NDArray[Any]]
FORMAT = 1  # of the folder; another number is made anew
MANIFEST = "manifest.json"
SPLITS = (
    "test",
    "val",
    "train",
)  # in this order: what is tested on does not depend on train's size


class Source(Protocol):
    """What can be generated: ListOps, Pathfinder."""

    @property
    def name(self) -> str:
        """Of the task; it ends in `-gen`."""

    def facts(self) -> dict[str, Any]:
        """Everything that decides the samples, but for the seed."""

    def block(self, rng: np.random.Generator) -> Arrays:
        """Some samples: arrays whose first axis counts them; `tokens` holds `lengths` of them."""


def default_cache() -> Path:
    """Where generated data lie: under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "seqzoo/lra"


def generate(
    source: Source,
    sizes: dict[str, int],
    *,
    seed: int = 0,
    cache: str | Path | None = None,
    processes: int | None = None,
    progress: bool = True,
) -> Path:
    """Make a data set, or find the one that was made before.

    Args:
        source: what to make.
        sizes: samples of each split: train, val, test.
        seed: of all of them.
        cache: the folder goes in here; `default_cache()` when None.
        processes: how many work; one for each core this process may use when None.
        progress: show a bar.

    Returns:
        The folder: `SPLIT-FIELD.npy` files and `manifest.json`.

    Raises:
        ValueError: sizes that are not above zero.
    """
    check_positive(**{f"samples for {name}": count for name, count in sizes.items()})
    wanted = {
        "format": FORMAT,
        "name": source.name,
        "seed": seed,
        "parameters": source.facts(),
        "sizes": {name: sizes[name] for name in SPLITS if name in sizes},
    }
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache or default_cache()).expanduser() / f"{source.name}-{key}"
    if is_whole(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock"):
        if not is_whole(folder):
            _make(source, wanted, folder, processes or len(os.sched_getaffinity(0)), progress)
    return folder


def load(folder: Path, split: str) -> Arrays:
    """The arrays of a split, mapped from the disk.

    Raises:
        ValueError: a split that was not made, or a file that is not what the manifest says.
    """
    manifest = read_manifest(folder)
    files = {name: sha for name, sha in manifest["files"].items() if name.startswith(f"{split}-")}
    if not files:
        raise ValueError(f"{folder} has no {split} samples")
    arrays: Arrays = {}
    for name, sha in files.items():
        if not (folder / name).is_file() or _digest(folder / name) != sha:
            raise ValueError(f"{folder / name} is damaged; remove the folder to make it again")
        field = name.removeprefix(f"{split}-").removesuffix(".npy")
        arrays[field] = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    return arrays


def read_manifest(folder: Path) -> dict[str, Any]:
    """Parameters, sizes, versions, and the SHA-256 of every file."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def is_whole(folder: Path) -> bool:
    """Whether a folder's generation was finished."""
    return (folder / MANIFEST).is_file()


def _make(
    source: Source, wanted: dict[str, Any], folder: Path, processes: int, progress: bool
) -> None:
    for orphan in folder.glob("*.partial"):
        orphan.unlink()
    blocks = folder / "blocks"
    blocks.mkdir(exist_ok=True)
    seen: set[bytes] = set()
    total = sum(wanted["sizes"].values())
    bar = tqdm(total=total, desc=source.name, unit=" samples", disable=not progress)
    files: dict[str, str] = {}
    with bar, _workers(processes) as pool:
        for split, count in wanted["sizes"].items():
            make = partial(_block, source, blocks, wanted["seed"], split)
            stream = _in_order(pool, make, 2 * processes)
            files |= _write_split(folder, split, count, stream, seen, bar)
    manifest = {**wanted, "numpy": np.__version__, "files": files}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    shutil.rmtree(blocks)


def _write_split(
    folder: Path,
    split: str,
    count: int,
    stream: Iterator[Arrays],
    seen: set[bytes],
    bar: tqdm,
) -> dict[str, str]:
    """The first `count` samples that no split has yet, as files; their digests."""
    writers: dict[str, _Writer] = {}
    done = 0
    with ExitStack() as files:
        for block in stream:
            fresh = _fresh(block, seen, count - done)
            done += len(fresh["labels"])
            for field, values in fresh.items():
                if field not in writers:
                    path = folder / f"{split}-{field}.npy"
                    writers[field] = files.enter_context(_Writer(path))
                writers[field].add(values)
            bar.update(len(fresh["labels"]))
            if done == count:
                break
    return {writer.path.name: writer.finish() for writer in writers.values()}


def _fresh(block: Arrays, seen: set[bytes], room: int) -> Arrays:
    """The samples of a block that were not seen before, at most `room`; they are seen now."""
    lengths = block.get("lengths")
    data = block["tokens"] if "tokens" in block else block["images"]
    stops = np.cumsum(lengths) if lengths is not None else np.arange(1, len(data) + 1)
    kept = np.zeros(len(stops), bool)
    start = 0
    for i, stop in enumerate(stops.tolist()):
        key = hashlib.blake2b(data[start:stop].tobytes(), digest_size=16).digest()
        if key not in seen and room:
            seen.add(key)
            kept[i], room = True, room - 1
        start = stop
    if kept.all():
        return block
    wide = kept if lengths is None else np.repeat(kept, lengths)
    return {f: v[wide] if f == "tokens" else v[kept] for f, v in block.items()}


class _Writer:
    """An .npy file that grows; its header is written when its length is known."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self.body = path.with_name(f".{path.name}.body.partial")
        self.file = self.body.open("wb")
        self.like: NDArray[Any] | None = None

    def add(self, values: NDArray[Any]) -> None:
        self.like, self.rows = values[:0], self.rows + len(values)
        self.file.write(np.ascontiguousarray(values).tobytes())

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def finish(self) -> str:
        """Put the file in its place and return its SHA-256."""
        assert self.like is not None
        temporary = self.path.with_name(f".{self.path.name}.partial")
        with temporary.open("wb") as file, self.body.open("rb") as body:
            header = {
                "descr": np.lib.format.dtype_to_descr(self.like.dtype),
                "fortran_order": False,
                "shape": (self.rows, *self.like.shape[1:]),
            }
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(body, file, 1 << 24)
            file.flush()
            os.fsync(file.fileno())
        digest = _digest(temporary)
        temporary.replace(self.path)
        self.body.unlink()
        return digest


def _block(source: Source, folder: Path, seed: int, split: str, index: int) -> Path:
    """One block as a file, whose name says what its bytes are."""
    for path in folder.glob(f"{split}-{index:06d}-*.npz"):
        if path.stem.endswith(_digest(path)[:16]):
            return path
        path.unlink()  # damaged
    stream = np.random.SeedSequence([seed, SPLITS.index(split), index])
    made = source.block(np.random.default_rng(stream))
    temporary = folder / f".{split}-{index:06d}.{os.getpid()}.partial"
    with temporary.open("wb") as file:
        np.savez(file, **made)  # type: ignore[arg-type]  # numpy's own stub
    path = folder / f"{split}-{index:06d}-{_digest(temporary)[:16]}.npz"
    temporary.replace(path)
    return path


def _in_order(pool: Executor | None, make: Any, ahead: int) -> Iterator[Arrays]:  # noqa: ANN401
    """Blocks 0, 1, ... without end; a pool works on so many ahead."""
    index = 0
    if pool is None:
        while True:
            yield _read(make(index))
            index += 1
    waiting: deque[Future[Path]] = deque()
    try:
        while True:
            while len(waiting) < ahead:
                waiting.append(pool.submit(make, index))
                index += 1
            yield _read(waiting.popleft().result())
    finally:
        for future in waiting:
            future.cancel()


def _read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@contextmanager
def _workers(processes: int) -> Iterator[Executor | None]:
    """A pool, or None for one process: this one."""
    if processes == 1:
        yield None
        return
    # torch's threads do not survive a fork, and a fork server would not know of this sys.path.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield pool


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the others wait and find what it made."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write(f"seqzoo: another process is making {path.parent}; waiting for it\n")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
