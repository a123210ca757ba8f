"""The dashes that Pathfinder's snakes are made of: small pictures, drawn once and then looked up.

A dash ends at one of the pixels on a circle around a pivot and points at the pivot, so there are as
many dashes as such pixels, wherever they are drawn. Angles are in radians; y grows downward.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Bytes = NDArray[np.uint8]
ONE = 1 << 16  # the weight of going straight on


class Patch(NamedTuple):
    """A small picture and where its corner lies, from the point it belongs to.

    Attributes:
        y: row of the corner.
        x: column of the corner.
        pixels: 0 to 255, (h, w).
    """

    y: int
    x: int
    pixels: NDArray[Any]

    def over(self, image: NDArray[Any], y: int, x: int) -> NDArray[Any]:
        """The part of an image that the picture covers when it belongs to (y, x); a view."""
        y, x = y + self.y, x + self.x
        h, w = self.pixels.shape
        return image[y : y + h, x : x + w]


class Dash(NamedTuple):
    """A dash of one direction.

    Attributes:
        ink: what is seen, full coverage 255.
        mask: the room it takes: the line and the margin around it.
        halo: the mask and another margin around it, where no dash may end.
    """

    ink: Patch
    mask: Patch
    halo: Patch


class Shape(NamedTuple):
    """What decides how dashes look.

    Attributes:
        length: of the line in pixels.
        thickness: of the line in pixels.
        margin: free pixels around it.
        scale: dashes are drawn so many times larger and then shrunk.
    """

    length: int
    thickness: float
    margin: int
    scale: int

    @property
    def reach(self) -> int:
        """Pixels from a dash's anchor to the edge of its picture."""
        return self.length + int(np.ceil(self.thickness)) + self.margin


class Seed(NamedTuple):
    """A snake's first dash, drawn from its tail, which is the snake's tip.

    Attributes:
        dash: as seen from the tail.
        head: where its line ends, from the tail.
        pivot: from where it counts as drawn, from the tail.
        room: pixels, from the tail, that must be free.
    """

    dash: Dash
    head: tuple[int, int]
    pivot: tuple[int, int]
    room: list[tuple[int, int]]


class Fan:
    """Every way in which a snake can go on from a pivot.

    Attributes:
        ends: where the next dash may end, from the pivot, (C, 2).
        dashes: as seen from those ends.
        steps: from the pivot to the next one, after the dash, (C + 360, 2).
        weight: of each end given the direction before, (C + 360, C) whole numbers: the rows are
            those of `ends`, then whole degrees from 0. Whole, so that a choice is the same on every
            machine and in every language.
    """

    def __init__(self, shape: Shape, continuity: float) -> None:
        radius = shape.length + shape.margin
        around = np.arange(0, 360, 360 / (2 * radius * np.pi)) * np.pi / 180
        rim = np.floor(_clean(radius * np.stack([np.sin(around), np.cos(around)], 1)))
        self.ends = np.unique(rim.astype(np.int64), axis=0)
        angles = np.arctan2(self.ends[:, 0], self.ends[:, 1])
        back = np.where(angles < 0, angles + np.pi, angles - np.pi)
        self.dashes = [draw(shape, float(a)) for a in back]
        step = shape.length + 2 * shape.margin
        self.steps = [displace(float(a), step) for a in angles]
        self.steps += [displace(_radians(d), step) for d in range(360)]
        before = np.concatenate([angles, [_radians(d) for d in range(360)]])
        turn = np.abs(angles - before[:, None])
        turn = np.minimum(np.minimum(turn, 2 * np.pi - turn) * continuity, np.pi / 2)
        self.weight = np.round(np.maximum(_clean(np.cos(turn)), 0) ** 2 * ONE).astype(np.int64)


@cache
def fan(shape: Shape, continuity: float) -> Fan:
    """The fan of these dashes, made once a process."""
    return Fan(shape, continuity)


@lru_cache(maxsize=4096)
def seed(shape: Shape, degree: int, shift: int) -> Seed:
    """A snake's first dash at a whole degree; `shift` moves the room it asks for."""
    angle = _radians(degree)
    dash = draw(shape, angle)
    head = displace(angle, shape.length)
    behind = displace(angle + np.pi, shape.length + shape.margin)
    ys, xs = np.nonzero(dash.mask.pixels == 255)
    corner = (dash.mask.y + shift, dash.mask.x + shift)
    places = ((int(y) + corner[0], int(x) + corner[1]) for y, x in zip(ys, xs, strict=True))
    limit = shape.length + shape.margin  # of the window in which the room was looked for
    room = [(y, x) for y, x in places if max(abs(y), abs(x)) <= limit]
    return Seed(dash, head, (head[0] + behind[0], head[1] + behind[1]), room)


def displace(angle: float, distance: float) -> tuple[int, int]:
    """Whole pixels (y, x) to a point at a distance, rounded up."""
    y, x = np.ceil(_clean(distance * np.array([np.sin(angle), np.cos(angle)])))
    return int(y), int(x)


@lru_cache(maxsize=4096)
def draw(shape: Shape, angle: float) -> Dash:
    """The dash from an anchor in a direction, as seen from the anchor."""
    center, size = shape.reach * shape.scale, 2 * shape.reach + 1
    wide = Image.new("L", (2 * center + 1, 2 * center + 1))
    y, x = displace(angle, shape.length * shape.scale)
    line = [(center, center), (center + x, center + y)]
    ImageDraw.Draw(wide).line(line, fill=255, width=round(shape.thickness * shape.scale))
    room = dilate(np.asarray(wide), shape.margin * shape.scale)
    ink, mask = (_shrink(Image.fromarray(a), size) for a in (np.asarray(wide), room))
    halo = dilate(np.pad(mask, shape.margin), shape.margin)
    reach = shape.reach
    return Dash(
        _trim(ink, reach), _trim(mask.astype(np.int16), reach), _trim(halo, reach + shape.margin)
    )


@cache
def disc(radius: float, scale: int) -> Patch:
    """A marker, as seen from the pixel it marks."""
    reach = int(np.ceil(radius)) + 1
    side = np.arange(-reach * scale, (reach + 1) * scale)
    inside = side[:, None] ** 2 + side[None] ** 2 <= (radius * scale) ** 2
    wide = Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))
    return _trim(_shrink(wide, 2 * reach + 1), reach)


def dilate(image: Bytes, radius: int) -> Bytes:
    """Each pixel becomes the largest within a disc."""
    h, w = image.shape
    padded = np.pad(image, radius)
    side = range(-radius, radius + 1)
    shifts = [(y, x) for y in side for x in side if y * y + x * x <= radius * radius]
    views = [padded[radius + y : radius + y + h, radius + x : radius + x + w] for y, x in shifts]
    found: Bytes = np.max(views, axis=0)
    return found


def _shrink(image: Image.Image, size: int) -> Bytes:
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def _trim(image: NDArray[Any], anchor: int) -> Patch:
    """Without empty rows and columns at its edges."""
    ys, xs = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    cut = image[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    return Patch(int(ys[0]) - anchor, int(xs[0]) - anchor, np.ascontiguousarray(cut))


def _radians(degree: int) -> float:
    """Between -pi and pi."""
    return float(((degree + 180) % 360 - 180) * np.pi / 180)


def _clean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without the last digits, so that no rounding hangs on a sine's last bit."""
    return np.round(values, 9)
