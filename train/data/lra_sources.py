"""Where the samples of a Long-Range Arena task come from, and how they are split."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqzoo.kernels.errors import unknown
from seqzoo.train.data.labelled import READERS, hold_out
from seqzoo.train.lra import formats, listops
from seqzoo.train.lra.formats import Files, Pairs, Pictures, Ragged, ragged
from seqzoo.train.lra.generate import generate, load, read_manifest
from seqzoo.train.lra.listops import ListOps
from seqzoo.train.lra.pathfinder import LOOKS, Pathfinder

Data = Ragged | Pairs | Pictures | Files
Parts = dict[str, Data]
HUB = {"text": "stanfordnlp/imdb", "image": "uoft-cs/cifar10"}
MEGA = {"text": "imdb-4000", "image": "cifar10", "pathfinder32": "pathfinder", "pathx": "path-x"}


class Task(NamedTuple):
    """What is fixed for a task.

    Attributes:
        length: tokens of a row.
        vocab_size: ids; of sequences 0 pads.
        n_classes: classes.
        mask_rate: share of the tokens that self-pretraining hides.
        sources: where samples can come from, in the order in which they are looked for.
        side: pixels a side of an image; 0 for sequences.
        scale: mean and deviation of real-valued pixels.
    """

    length: int
    vocab_size: int
    n_classes: int
    mask_rate: float
    sources: tuple[str, ...]
    side: int = 0
    scale: tuple[float, float] = (0.5, 0.5)


PATHFINDERS = {f"pathfinder{side}": side for side in LOOKS} | {"pathx": 128}
TASKS = {
    "listops": Task(2000, listops.VOCAB_SIZE, 10, 0.10, ("release", "mega", "generated")),
    "text": Task(4000, 257, 2, 0.15, ("packed", "mega", "hub")),
    "retrieval": Task(4000, 257, 2, 0.15, ("release",)),
    "image": Task(1024, 256, 10, 0.50, ("packed", "mega", "hub"), 32, (0.48, 0.24)),
} | {
    name: Task(side * side, 256, 2, 0.50, ("release", "mega", "generated"), side)
    for name, side in PATHFINDERS.items()
}


class Request(NamedTuple):
    """What was asked for; see `seqzoo.train.data.lra.LRA`."""

    task: str
    source: str
    root: Path | None
    typed: bool  # whether the root was given, not taken from the environment
    official_val: bool
    difficulty: str
    generator: dict[str, Any]
    samples: dict[str, int] | None
    seed: int
    cache: str | None
    processes: int | None


class Found(NamedTuple):
    """Samples, and where they came from.

    Attributes:
        source: release, mega, packed, hub or generated.
        name: of the task; it ends in `-gen` for what was generated.
        parts: samples by split.
        facts: plain values, `digest` among them.
    """

    source: str
    name: str
    parts: Parts
    facts: dict[str, Any]


def fetch(request: Request) -> Found:
    """The samples.

    Raises:
        ValueError: they are not there; the message says where they were looked for.
    """
    allowed = TASKS[request.task].sources
    for source in allowed if request.source == "auto" else (request.source,):
        if source == "hub" and request.source == "auto":
            continue  # a download is asked for by name
        if source == "generated" and request.source == "auto":
            if request.typed:
                continue  # a folder was named: what is not in it is missing
            sys.stderr.write(
                f"seqzoo: no files of {request.task} are at hand; generating some, named "
                f"{request.task}-gen: no results to put beside published ones\n"
            )
        found = READ[source](request)
        if found is not None:
            return found
    where = f"in {request.root}" if request.root else "(no --data.root, and SEQZOO_DATA is not set)"
    raise ValueError(
        f"there are no samples of {request.task} {where}; looked for {LOOKED_FOR[request.task]}; "
        f"sources: {', '.join(allowed)}"
    )


def _released(request: Request) -> Found | None:
    root, task = request.root, request.task
    if root is None:
        return None
    if task in PATHFINDERS:
        if request.difficulty not in formats.SUBSETS:
            raise unknown("difficulty", request.difficulty, formats.SUBSETS)
        below = f"pathfinder{PATHFINDERS[task]}/{formats.SUBSETS[request.difficulty]}"
        folder = formats.find(root, below)
        if folder is None:
            return None
        return _found("release", task, _by_tenths(formats.index_pathfinder(folder)))
    names = RELEASED[task]
    paths = {part: formats.find(root, name) for part, name in names.items()}
    if not any(paths.values()):
        return None
    read: Callable[[Path], Data]
    read = formats.read_listops if task == "listops" else formats.index_pairs
    parts: Parts = {}
    for part, path in paths.items():
        if path is None:
            raise ValueError(f"there is no {names[part]} in {root}, where its relatives are")
        parts[part] = read(path)
    return _found("release", task, parts)


def _by_tenths(files: Files) -> Parts:
    """Eight tenths, one and one, in the order of the release, as its own builder cuts."""
    count = len(files.labels)
    cuts = {"train": (0, 8), "val": (8, 9), "test": (9, 10)}
    parts: Parts = {}
    for part, (a, b) in cuts.items():
        rows = slice(count * a // 10, count * b // 10)
        parts[part] = Files(files.folder, files.names[rows], files.labels[rows])
    return parts


def _mega(request: Request) -> Found | None:
    root, task = request.root, request.task
    if root is None:
        return None
    places = [root / name for name in (task, MEGA.get(task, task), "")]
    folder = next((p for p in places if (p / "input/train.src").is_file()), None)
    if folder is None:
        return None
    splits = {"train": "train", "val": "valid", "test": "test"}
    parts: Parts = {part: formats.read_mega(folder, name) for part, name in splits.items()}
    side = TASKS[task].side
    if side:
        parts = {part: _as_pictures(rows, side, folder) for part, rows in parts.items()}
    return _found("mega", task, parts)


def _as_pictures(data: Data, side: int, folder: Path) -> Pictures:
    assert isinstance(data, Ragged)
    wrong = data.lengths[data.lengths != side * side]
    if len(wrong) or data.tokens.min(initial=0) < 0 or data.tokens.max(initial=0) > 255:
        raise ValueError(f"{folder}: not every line is {side * side} numbers from 0 to 255")
    return Pictures(data.tokens.astype(np.uint8).reshape(-1, side * side), data.labels)


def _packed(request: Request) -> Found | None:
    root = request.root
    if root is None or not (root / LOOKED_FOR[request.task].partition(",")[0]).is_file():
        return None
    if request.task == "image":
        train, test = (formats.read_cifar(root / f"cifar_gray_{s}.npz") for s in ("train", "test"))
        # Packed files are sorted by class, so the last tenth would be one class.
        mixed = np.random.default_rng(request.seed).permutation(len(train.labels))
        train = Pictures(train.pixels[mixed], train.labels[mixed])
        return _found("packed", "image", _last_tenth(train, test))
    halves: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for part in ("train", "val", "test"):
        path = root / f"imdb_{part}.parquet"
        if part == "val" and not path.is_file():
            continue
        half = halves["test" if part == "test" else "train"]
        half += [(row["text"], str(row["label"])) for row in READERS[".parquet"](path)]
    return _found("packed", "text", _texts(halves["train"], halves["test"], request))


def _hub(request: Request) -> Found | None:
    name = HUB[request.task]
    columns = ("text", "label") if request.task == "text" else ("img", "label")
    train, test = (formats.read_hub(name, split, columns) for split in ("train", "test"))
    if request.task == "text":
        first, second = ([(text, str(y)) for text, y in rows] for rows in (train, test))
        return _found("hub", "text", _texts(first, second, request))
    shown, unseen = (
        Pictures(np.stack([formats.luma(x) for x, _ in rows]), np.array([y for _, y in rows]))
        for rows in (train, test)
    )
    return _found("hub", "image", _last_tenth(shown, unseen))


def _last_tenth(train: Pictures, test: Pictures) -> Parts:
    """The last tenth of the training images validates, as in the release."""
    cut = len(train.labels) * 9 // 10
    return {
        "train": Pictures(train.pixels[:cut], train.labels[:cut]),
        "val": Pictures(train.pixels[cut:], train.labels[cut:]),
        "test": test,
    }


def _texts(train: list[tuple[str, str]], test: list[tuple[str, str]], request: Request) -> Parts:
    """Bytes; a tenth of the training texts is held out, or as published the test texts are both."""
    train, val = (train, test) if request.official_val else hold_out(train, request.seed)
    parts: Parts = {}
    for part, samples in (("train", train), ("val", val), ("test", test)):
        # Files are sorted by class, and a look at some of the rows should see them all.
        mixed = np.random.default_rng(request.seed).permutation(len(samples))
        samples = [samples[i] for i in mixed]
        rows = [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text, _ in samples]
        parts[part] = ragged(rows, [int(label) for _, label in samples], np.uint8)
    return parts


def _generated(request: Request) -> Found:
    source = _source(request)
    sizes = dict(source.sizes) | (request.samples or {})
    if unwanted := set(sizes) - set(source.sizes):
        raise unknown("split", unwanted.pop(), source.sizes)
    folder = generate(
        source, sizes, seed=request.seed, cache=request.cache, processes=request.processes
    )
    manifest = read_manifest(folder)
    parts: Parts = {}
    for part in sizes:
        arrays = load(folder, part)
        labels = np.asarray(arrays["labels"], np.int64)
        if "tokens" in arrays:
            parts[part] = Ragged(arrays["tokens"], arrays["lengths"].astype(np.int64), labels)
        else:
            images = arrays["images"]
            parts[part] = Pictures(images.reshape(len(images), -1), labels)
    name = source.name.replace("pathfinder128", "pathx") if request.task == "pathx" else source.name
    digest = hashlib.sha256(repr(sorted(manifest["files"].items())).encode()).hexdigest()
    facts = {"digest": digest, "generator": manifest["parameters"], "folder": str(folder)}
    return Found("generated", name, parts, facts)


def _source(request: Request) -> ListOps | Pathfinder:
    """The generator of a task with the options that were given."""
    kind = ListOps if request.task == "listops" else Pathfinder
    options = dict(request.generator)
    for name in options:
        if name not in (allowed := [f.name for f in fields(kind)]):
            raise unknown(f"option of the generator of {request.task} named", name, allowed)
    if kind is Pathfinder:
        fixed = {"resolution": PATHFINDERS[request.task], "difficulty": request.difficulty}
        options = fixed | options
    return kind(**options)


def _found(source: str, name: str, parts: Parts) -> Found:
    total = hashlib.sha256()
    for part, data in parts.items():
        total.update(part.encode())
        for field in data:
            if isinstance(field, np.ndarray):
                total.update(np.ascontiguousarray(field).tobytes())
            elif isinstance(field, list):
                total.update("\0".join(field).encode())
        if isinstance(data, Pairs):
            total.update(str(data.path.stat().st_size).encode())
    return Found(source, name, parts, {"digest": total.hexdigest()})


READ: dict[str, Callable[[Request], Found | None]] = {
    "release": _released,
    "mega": _mega,
    "packed": _packed,
    "hub": _hub,
    "generated": _generated,
}
RELEASED = {
    "listops": {part: f"listops-1000/basic_{part}.tsv" for part in ("train", "val", "test")},
    "retrieval": {
        part: f"tsv_data/new_aan_pairs.{name}.tsv"
        for part, name in (("train", "train"), ("val", "eval"), ("test", "test"))
    },
}
LOOKED_FOR = {
    "listops": "listops-1000/basic_train.tsv, input/train.src",
    "text": "imdb_train.parquet, input/train.src",
    "retrieval": "tsv_data/new_aan_pairs.train.tsv",
    "image": "cifar_gray_train.npz, input/train.src",
} | {
    name: f"pathfinder{side}/curv_contour_length_14, input/train.src"
    for name, side in PATHFINDERS.items()
}
