"""The files of Long-Range Arena as they were released, and two packed forms of what it lacks.

What a reader gives is plain arrays; nothing is unpickled. Traps that each reader knows of:

- ListOps: a header line, binary brackets that are no tokens.
- AAN: no header, labels written as "0.0" and "1.0", and no quoting: texts hold lone quotes.
- Pathfinder: metadata named `.npy` that are text (the present generator writes arrays of strings),
  and an image of the easy set that is empty.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seqzoo.train.lra.listops import parse

ARCHIVE = ("", "lra_release", "lra_release/lra_release")  # where the archive's folders may lie
SUBSETS = {
    "easy": "curv_baseline",
    "intermediate": "curv_contour_length_9",
    "hard": "curv_contour_length_14",
}
AAN_BYTES = 10_000  # what the release's own reader keeps of a document
MAGIC = b"\x93NUMPY"


class Ragged(NamedTuple):
    """Sequences end to end.

    Attributes:
        tokens: all of them, (total,).
        lengths: of each, (N,).
        labels: (N,).
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]


class Pairs(NamedTuple):
    """Two documents and a label a line, left where they are.

    Attributes:
        path: the file.
        spans: first and last byte of each document, (N, 2, 2).
        labels: (N,).
    """

    path: Path
    spans: NDArray[np.int64]
    labels: NDArray[np.int64]


class Pictures(NamedTuple):
    """Grey images.

    Attributes:
        pixels: (N, P) uint8.
        labels: (N,).
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


class Files(NamedTuple):
    """Grey images, left where they are.

    Attributes:
        folder: of all of them.
        names: below it.
        labels: (N,).
    """

    folder: Path
    names: list[str]
    labels: NDArray[np.int64]


def find(root: Path, below: str) -> Path | None:
    """A file or folder of the archive, however deep it was unpacked."""
    return next((p for a in ARCHIVE if (p := root / a / below).exists()), None)


def read_listops(path: Path) -> Ragged:
    """A `basic_*.tsv`: a header, then an expression, a tab and its value a line.

    Raises:
        ValueError: a line of another form.
    """
    rows: list[list[int]] = []
    labels: list[int] = []
    with path.open(encoding="utf-8") as lines:
        if next(lines, "").split() != ["Source", "Target"]:
            raise ValueError(f"{path} does not begin with the header Source, Target")
        for number, line in enumerate(lines, 2):
            source, tab, target = line.rstrip("\n").partition("\t")
            if not (tab and target.strip().isdigit() and int(target) < 10):
                raise ValueError(f"{path}, line {number}: no expression, tab and digit")
            rows.append(parse(source))
            labels.append(int(target))
    return ragged(rows, labels, np.uint8)


def index_pairs(path: Path) -> Pairs:
    """An AAN `.tsv`: label, two ids and two texts a line, tabs between, nothing quoted.

    Only places are kept: the training file has 8.5 GB.

    Raises:
        ValueError: a line of another form.
    """
    spans, labels, at = [], [], 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            end = len(line.rstrip(b"\r\n"))
            if end:
                fields = line[:end].split(b"\t")
                if len(fields) != 5 or float(fields[0]) not in (0, 1):
                    raise ValueError(
                        f"{path}, line {number}: {len(fields)} columns; there must be a label of 0 "
                        "or 1, two ids and two texts"
                    )
                labels.append(int(float(fields[0])))
                second = at + end - len(fields[4])
                first = second - 1 - len(fields[3])
                spans.append([[first, second - 1], [second, at + end]])
            at += len(line)
    if not labels:
        raise ValueError(f"{path} holds no pairs")
    return Pairs(path, np.array(spans, np.int64), np.array(labels, np.int64))


def index_pathfinder(folder: Path) -> Files:
    """A difficulty's folder, `imgs/SHARD/sample_I.png` and `metadata/SHARD.npy`, in order.

    Images of zero bytes are left out.

    Raises:
        ValueError: no metadata, or metadata of another form.
    """
    shards = sorted((folder / "metadata").glob("*.npy"), key=lambda p: (len(p.stem), p.stem))
    names, labels = [], []
    for shard in shards:
        for number, fields in enumerate(_metadata(shard), 1):
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise ValueError(f"{shard}, line {number}: no folder, file, number and label")
            name = f"{fields[0]}/{fields[1]}"
            if not (folder / name).is_file():
                raise ValueError(f"{shard}, line {number}: there is no image {folder / name}")
            if (folder / name).stat().st_size:
                names.append(name)
                labels.append(int(fields[3]))
    if not names:
        raise ValueError(f"{folder} holds no images with metadata")
    return Files(folder, names, np.array(labels, np.int64))


def _metadata(path: Path) -> Iterator[list[str]]:
    """Fields of every image; text in the release, arrays of strings from the present generator."""
    data = path.read_bytes()
    if data.startswith(MAGIC):
        array = np.load(io.BytesIO(data), allow_pickle=False)
        yield from ([str(value) for value in row] for row in array)
        return
    for line in data.decode("utf-8").splitlines():
        if line.strip():
            yield line.split()


def read_picture(path: Path, side: int) -> NDArray[np.uint8]:
    """A grey image as (side * side,).

    Raises:
        ValueError: no image, or one of another size.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
    except OSError as error:
        raise ValueError(f"{path} is no image: {error}") from error
    if pixels.shape != (side, side):
        raise ValueError(f"{path} is {pixels.shape}; it must be {(side, side)}")
    return pixels.reshape(-1)


def read_mega(folder: Path, split: str) -> Ragged:
    """MEGA's re-release: `input/SPLIT.src`, whole numbers, and `label/SPLIT.label`.

    Raises:
        ValueError: a file that is missing, or files that do not fit together.
    """
    sources, targets = folder / f"input/{split}.src", folder / f"label/{split}.label"
    for path in (sources, targets):
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
    with sources.open() as lines:
        rows = [[int(word) for word in line.split()] for line in lines]
    labels = [int(line) for line in targets.read_text().split()]
    if len(rows) != len(labels):
        raise ValueError(f"{sources} has {len(rows)} lines and {targets} {len(labels)}")
    return ragged(rows, labels, np.int32)


def read_cifar(path: Path) -> Pictures:
    """A packed file of grey CIFAR-10: `x` uint8 (N, 32, 32) and `y` (N,).

    Raises:
        ValueError: an archive without them.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, BadZipFile) as error:
        raise ValueError(f"{path} is no archive of plain arrays: {error}") from error
    if not {"x", "y"} <= set(arrays):
        raise ValueError(f"{path} holds {', '.join(arrays)}; it must hold x and y")
    x, y = arrays["x"], arrays["y"]
    if x.dtype != np.uint8 or x.shape[1:] != (32, 32) or len(x) != len(y):
        raise ValueError(f"{path}: x is {x.dtype} {x.shape}; it must be uint8 (N, 32, 32)")
    return Pictures(x.reshape(len(x), -1), y.astype(np.int64))


def read_hub(name: str, split: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """Rows of a data set of the Hugging Face Hub; images as grey arrays.

    Raises:
        ValueError: the package, the data set or a column is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            "source hub needs the package datasets: pip install 'seqzoo[hub]'"
        ) from error
    try:
        data = load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot read split {split!r} of data set {name!r}: {reason}") from error
    missing = [column for column in columns if column not in data.column_names]
    if missing:
        has = ", ".join(data.column_names)
        raise ValueError(f"{name} has no column {missing[0]!r}; it has {has}")
    return [tuple(row[column] for column in columns) for row in data]


def luma(image: Image.Image) -> NDArray[np.uint8]:
    """ITU-R 601 luma of an image, cut to whole numbers, (P,)."""
    colours = np.asarray(image.convert("RGB"), np.float64)
    return (colours @ [0.2989, 0.5870, 0.1140]).astype(np.uint8).reshape(-1)


def ragged(rows: Sequence[Any], labels: Sequence[int], dtype: Any) -> Ragged:  # noqa: ANN401
    """Sequences put end to end."""
    lengths = np.array([len(row) for row in rows], np.int64)
    tokens = np.concatenate([np.zeros(0, dtype), *(np.asarray(row, dtype) for row in rows)])
    return Ragged(tokens, lengths, np.array(labels, np.int64))
