"""Pathfinder: are the two marked ends those of one dashed curve, or of two?

Two target snakes of n dashes grow together from seeds that lie `seed_distance` apart; shorter
distractors fill the room that is left. One marker sits at a target's first tip, the other at the
last tip of the same target (label 1) or of the other (label 0). Linsley et al., 2018,
arXiv:1805.08315; Kim et al., 2020, arXiv:1906.01558. The settings are those of Long-Range Arena.
"""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.train.lra.dashes import Patch, Shape, disc
from seqzoo.train.lra.native import NativeSnakes
from seqzoo.train.lra.snakes import Random, Rules, Snakes

Arrays = dict[str, NDArray[Any]]
LENGTHS = {"easy": 6, "intermediate": 9, "hard": 14}  # dashes of a target


class Look(NamedTuple):
    """What differs from one resolution to the next.

    Attributes:
        padding: rows and columns at the edge that stay empty.
        margins: free pixels around a dash; one is drawn for each image.
        length: of a dash.
        thickness: of a dash.
        radius: of a marker.
        seed_distance: between the first tips of the targets.
        continuity: how straight snakes are.
        distractor_dashes: of all distractors together.
        ink: contrast of a dash, of a marker's 1.
        faithful_ink: of a target's dashes in the published images, and of a distractor's.
    """

    padding: int
    margins: tuple[int, ...]
    length: int
    thickness: float
    radius: float
    seed_distance: int
    continuity: float
    distractor_dashes: int
    ink: float
    faithful_ink: tuple[float, float]


LOOKS = {
    32: Look(1, (1,), 2, 0.5, 1.5, 7, 1.0, 20, 0.75, (1.5, 2.0)),
    64: Look(1, (1,), 5, 1.0, 2.5, 12, 1.8, 22, 0.8, (0.8, 0.8)),
    128: Look(1, (2, 3), 5, 1.5, 3.0, 20, 1.8, 35, 0.9, (0.9, 0.9)),
    256: Look(22, (3,), 5, 2.0, 5.0, 27, 1.8, 30, 1.0, (1.0, 1.0)),
}
SCALE = 2  # dashes are drawn twice as large and shrunk


@dataclass(frozen=True)
class Pathfinder:
    """Where random images come from.

    Attributes:
        resolution: 32, 64, 128 or 256 pixels a side.
        difficulty: easy, intermediate or hard: targets of 6, 9 or 14 dashes. Long-Range Arena is
            the hard one.
        faithful: as the published images were made. There, at 32 pixels targets are darker than
            distractors, and a dash may touch the newest dash of the other target. By default all
            dashes are equally bright and none touch.
        central: first tips keep `2 * seed_distance` away from the edges, as published; when False,
            the padding.
        images: of a block.
    """

    resolution: int = 32
    difficulty: str = "hard"
    faithful: bool = False
    central: bool = True
    images: int = 250

    sizes: ClassVar[dict[str, int]] = {"train": 160_000, "val": 20_000, "test": 20_000}

    def __post_init__(self) -> None:
        if self.resolution not in LOOKS:
            raise ValueError(
                f"resolution={self.resolution} is not allowed; it must be one of "
                f"{', '.join(map(str, LOOKS))}"
            )
        if self.difficulty not in LENGTHS:
            raise unknown("difficulty", self.difficulty, LENGTHS)
        check_positive(images=self.images)

    @property
    def name(self) -> str:
        """`pathfinder32-gen`, and what differs from the task of the arena."""
        kind = "" if self.difficulty == "hard" else f"-{self.difficulty}"
        return f"pathfinder{self.resolution}{kind}-gen"

    def facts(self) -> dict[str, Any]:
        """The parameters, as plain data."""
        return asdict(self)

    @property
    def look(self) -> Look:
        """What belongs to the resolution."""
        return LOOKS[self.resolution]

    @property
    def length(self) -> int:
        """Dashes of a target."""
        return LENGTHS[self.difficulty]

    def rules(self, margin: int) -> Rules:
        """Of the snakes of an image."""
        look, n = self.look, self.length
        return Rules(
            size=self.resolution,
            shape=Shape(look.length, look.thickness, margin, SCALE),
            continuity=look.continuity,
            padding=look.padding,
            band=2 * look.seed_distance if self.central else look.padding,
            seed_distance=look.seed_distance,
            dashes=n,
            distractors=look.distractor_dashes // (n // 3),
            distractor_dashes=n // 3,
            faithful=self.faithful,
        )

    def block(self, rng: np.random.Generator) -> Arrays:
        """Images in the order in which they came.

        Returns:
            `images` (N, R, R) uint8; `labels` (N,) uint8; `margins` (N,) uint8, the free pixels
            around a dash; and the truth: `dashes` (N, K, 4) int16, of every dash its snake (1 and 2
            are the targets), the row and column of its end or, of a snake's first dash, its tip,
            and which one of the fan it is or, from the fan's size on, its degree; rows of zeros
            fill up; `markers` (N, 2, 3) int16, of each marker its snake, row and column.
        """
        most = max(self.rules(margin).most for margin in self.look.margins)
        made: dict[str, list[NDArray[Any]]] = {"images": [], "dashes": [], "markers": []}
        labels, margins = [], []
        for _ in range(self.images):
            label, first = int(rng.integers(2)), int(rng.integers(2))
            margin = self.look.margins[int(rng.integers(len(self.look.margins)))]
            snakes, random = snakes_of(self.rules(margin)), Random(int(rng.integers(2**63)))
            targets = snakes.targets(random)
            dashes = targets.dashes + snakes.distractors(random, targets.board)
            rows = np.zeros((most, 4), np.int16)
            rows[: len(dashes)] = np.array(dashes) - [0, snakes.pad, snakes.pad, 0]
            tips = rows[[first, 2 * self.length - 2 + (first if label else 1 - first)]]
            made["markers"].append(tips[:, :3])
            made["dashes"].append(rows)
            made["images"].append(self.paint(rows, tips[:, :3], margin))
            labels.append(label)
            margins.append(margin)
        arrays = {name: np.stack(values) for name, values in made.items()}
        small = {"labels": labels, "margins": margins}
        return arrays | {name: np.array(values, np.uint8) for name, values in small.items()}

    def paint(
        self, dashes: NDArray[np.int16], markers: NDArray[np.int16], margin: int
    ) -> NDArray[np.uint8]:
        """The image of these dashes and markers, (R, R)."""
        pictures = snakes_of(self.rules(margin))
        look, pad = self.look, pictures.pad
        image = np.zeros((self.resolution + 2 * pad,) * 2)
        target, distractor = look.faithful_ink if self.faithful else (look.ink, look.ink)
        for snake, y, x, which in dashes.tolist():
            if snake:
                contrast = target if snake <= 2 else distractor
                _paste(image, pictures.dash(which).ink, y + pad, x + pad, contrast)
        full = max(1.0, target, distractor)  # markers are as bright as anything gets
        for _, y, x in markers.tolist():
            _paste(image, disc(look.radius, SCALE), y + pad, x + pad, full)
        inner = image[pad:-pad, pad:-pad]
        return np.round(inner / full).astype(np.uint8)

    def snake_map(self, dashes: NDArray[np.int16], margin: int) -> NDArray[np.uint8]:
        """Which snake each pixel belongs to, (R, R); 0 is nobody's."""
        pictures = snakes_of(self.rules(margin))
        pad = pictures.pad
        owner, best = (np.zeros((self.resolution + 2 * pad,) * 2, np.uint8) for _ in range(2))
        for snake, y, x, which in dashes[dashes[:, 0] > 0].tolist():
            ink = pictures.dash(which).ink
            seen, strongest = (ink.over(a, y + pad, x + pad) for a in (owner, best))
            seen[ink.pixels > strongest] = snake
            np.maximum(strongest, ink.pixels, out=strongest)
        return owner[pad:-pad, pad:-pad]


@cache
def snakes_of(rules: Rules) -> Snakes:
    """What draws them, made once a process."""
    return NativeSnakes(rules)


def _paste(image: NDArray[np.float64], patch: Patch, y: int, x: int, contrast: float) -> None:
    part = patch.over(image, y, x)
    np.maximum(part, patch.pixels * contrast, out=part)
