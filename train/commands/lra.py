"""Make ListOps or Pathfinder samples of Long-Range Arena, or measure how fast they are made.

seqzoo lra listops                      make 96,000 + 2,000 + 2,000 and keep them
seqzoo lra pathfinder32 --sheet s.png   and draw some
seqzoo lra pathx --measure 100          samples a second of one core; nothing is kept

`--data LRA` finds what was made here. Names end in -gen: no figures to put beside published ones.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from seqzoo.kernels.errors import unknown
from seqzoo.train.lra.floors import floors
from seqzoo.train.lra.generate import generate, load, read_manifest
from seqzoo.train.lra.listops import ListOps
from seqzoo.train.lra.pathfinder import LOOKS, Pathfinder

SIDES = {f"pathfinder{side}": side for side in LOOKS} | {"pathx": 128}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to make, how much of it, and where it goes."""
    parser.add_argument("task", help=f"listops, {', '.join(SIDES)}")
    parser.add_argument("--train", type=int, help="samples to train on; the arena's number if none")
    parser.add_argument("--val", type=int, help="samples to validate on")
    parser.add_argument("--test", type=int, help="samples to test on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--difficulty", default="hard", help="easy, intermediate or hard")
    parser.add_argument("--faithful", action="store_true", help="as the published images were made")
    parser.add_argument("--processes", type=int, help="one for each core if none is given")
    parser.add_argument("--cache", help="folder to keep them in; ~/.cache/seqzoo/lra")
    parser.add_argument("--sheet", help="PNG file for a sheet of test images")
    parser.add_argument("--measure", type=int, metavar="N", help="time about N samples instead")


def run(arguments: argparse.Namespace) -> None:
    """Make or measure, and say so."""
    source = _source(arguments)
    if arguments.measure is not None:
        sys.stdout.write(measure(source, arguments.measure, arguments.seed))
        return
    given = {part: getattr(arguments, part) for part in source.sizes}
    sizes = {part: given[part] or count for part, count in source.sizes.items()}
    folder = generate(
        source,
        sizes,
        seed=arguments.seed,
        cache=arguments.cache,
        processes=arguments.processes,
    )
    arrays = {part: load(folder, part) for part in read_manifest(folder)["sizes"]}
    if arguments.sheet:
        _draw(arrays["test"], Path(arguments.sheet))
    sys.stdout.write(f"{folder}\n")
    for part, values in _floors(arrays).items():
        known = ", ".join(f"{name} {value:.1%}" for name, value in values.items())
        sys.stdout.write(f"{source.name}, {part}: floors {known}\n")


def measure(source: ListOps | Pathfinder, count: int, seed: int) -> str:
    """Samples a second of processor time, after tables are made and code is compiled."""
    small = {"roots": 256} if isinstance(source, ListOps) else {"images": 4}
    type(source)(**source.facts() | small).block(np.random.default_rng(seed))
    if isinstance(source, Pathfinder):
        source = Pathfinder(**source.facts() | {"images": min(count, source.images)})
    done, index, start = 0, 0, time.process_time()
    while done < count:
        done += len(source.block(np.random.default_rng([seed, index]))["labels"])
        index += 1
    seconds = time.process_time() - start
    return f"{source.name}: {done} samples, {done / seconds:.0f} a second of one core\n"


def _source(arguments: argparse.Namespace) -> ListOps | Pathfinder:
    if arguments.task == "listops":
        return ListOps()
    if arguments.task not in SIDES:
        raise unknown("task that can be generated", arguments.task, ["listops", *SIDES])
    side = SIDES[arguments.task]
    return Pathfinder(side, arguments.difficulty, arguments.faithful)


def _floors(arrays: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    labels = {part: np.asarray(values["labels"], np.int64) for part, values in arrays.items()}
    keys = {
        part: np.asarray(v["tokens"][np.cumsum(v["lengths"]) - v["lengths"]], np.int64)
        for part, v in arrays.items()
        if "tokens" in v
    }
    return floors(labels, keys or None)


def _draw(test: dict[str, Any], path: Path) -> None:
    """Up to 32 images, eight a row; label 1 in the upper rows."""
    from PIL import Image

    if "images" not in test:
        raise ValueError("--sheet is not allowed; ListOps has no images")
    order = np.argsort(-np.asarray(test["labels"][:32], np.int64), kind="stable")
    images = np.pad(test["images"][:32][order], ((0, 0), (1, 1), (1, 1)), constant_values=96)
    rows = [np.concatenate(images[i : i + 8], 1) for i in range(0, len(images) // 8 * 8, 8)]
    if not rows:
        raise ValueError(f"--sheet needs 8 test images; there are {len(images)}")
    Image.fromarray(np.concatenate(rows)).save(path)
