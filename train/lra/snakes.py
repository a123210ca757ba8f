"""Snakes on a board: how Pathfinder's curves grow without touching.

A board is kept with a frame around it, so that no dash is ever cut. It holds `mask`, the room that
dashes take (0 to 255), and `open`, 255 less the mask dilated by the margin.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqzoo.train.lra.dashes import Dash, Fan, Shape, dilate, fan, seed

Places = list[tuple[int, ...]]
CROWDED = 459  # 1.8 times 255: two masks that overlap in earnest
TAKEN = 77  # above 0.3 times 255 a pixel is taken
DEAD_END = 255e-4  # the least total weight to go on
DASH_TRIES = 3
SNAKE_TRIES = 5
LEAST_FREE = 0.01  # of the pixels; below that no more distractors


@dataclass(frozen=True)
class Rules:
    """Of the snakes of an image; see `seqzoo.train.lra.pathfinder`.

    Attributes:
        size: of the image, pixels a side.
        shape: of a dash.
        continuity: how straight snakes are.
        padding: rows and columns at the edge that stay empty.
        band: rows and columns at the edge that a target does not start in.
        seed_distance: between the first tips of the targets.
        dashes: of a target.
        distractors: how many.
        distractor_dashes: of a distractor.
        faithful: as published, where the newest dash of the other target is no obstacle.
    """

    size: int
    shape: Shape
    continuity: float
    padding: int
    band: int
    seed_distance: int
    dashes: int
    distractors: int
    distractor_dashes: int
    faithful: bool

    @property
    def most(self) -> int:
        """Dashes of an image at most."""
        return 2 * self.dashes + self.distractors * self.distractor_dashes


class Drawn(NamedTuple):
    """The snakes of an image.

    Attributes:
        dashes: (snake, y, x, which) of every dash.
        first: (y, x) of each target's first tip.
        last: (y, x) of each target's last tip.
    """

    dashes: Places
    first: list[tuple[int, int]]
    last: list[tuple[int, int]]


class Board:
    """The room that is taken, with a frame around it."""

    def __init__(self, mask: NDArray[np.int16], opened: NDArray[np.int16]) -> None:
        self.mask, self.open = mask, opened
        self.flat = opened.reshape(-1)

    def copy(self) -> "Board":
        """Another one like this."""
        return Board(self.mask.copy(), self.open.copy())

    def put(self, dash: Dash, y: int, x: int) -> None:
        """Take the room of a dash."""
        part = dash.mask.over(self.mask, y, x)
        np.maximum(part, dash.mask.pixels, out=part)
        part = dash.halo.over(self.open, y, x)
        np.minimum(part, 255 - dash.halo.pixels, out=part)

    def fits(self, dash: Dash, y: int, x: int) -> bool:
        """Whether the room of a dash is free."""
        return int((dash.mask.over(self.mask, y, x) + dash.mask.pixels).max()) < CROWDED


class Snake:
    """One that grows: its newest dash is held back from its own board, so as not to block the next."""

    def __init__(self, number: int, pivot: tuple[int, int], before: int) -> None:
        self.number, self.pivot, self.before = number, pivot, before
        self.held: tuple[Dash, int, int] | None = None
        self.tip = pivot


class Snakes:
    """Draws the snakes of images that follow the same rules."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.fan: Fan = fan(rules.shape, rules.continuity)
        self.count = len(self.fan.ends)
        self.pad = rules.shape.reach + 2 * rules.shape.margin + 3
        self.side = rules.size + 2 * self.pad

    def dash(self, which: int) -> Dash:
        """One of the fan's, or from the fan's size on a seed of that degree."""
        if which < self.count:
            return self.fan.dashes[which]
        return seed(self.rules.shape, which - self.count, 0).dash

    def draw(self, rng: np.random.Generator) -> Drawn:
        """Two targets, begun again until both are whole, and as many distractors as find room."""
        dashes: Places = []
        uniform = Uniform(rng)
        while True:
            found = self._targets(uniform)
            if found is not None:
                break
        dashes, first, last, board = found
        for number in range(3, 3 + self.rules.distractors):
            for _ in range(SNAKE_TRIES):
                snake = self._distractor(uniform, board, number)
                if snake is not None:
                    dashes += snake[0]
                    board = snake[1]
                    break
        at = [tuple(int(v) - self.pad for v in tip) for tip in (*first, *last)]
        places = [(n, y - self.pad, x - self.pad, which) for n, y, x, which in dashes]
        return Drawn(places, at[:2], at[2:])  # type: ignore[arg-type]  # pairs

    @cached_property
    def _empty(self) -> Board:
        """Nothing but the padding at the edges is taken."""
        r, pad = self.rules, self.pad
        mask = np.zeros((self.side, self.side), np.int16)
        inner = mask[pad:-pad, pad:-pad]
        inner[...] = 255
        inner[r.padding : r.size - r.padding, r.padding : r.size - r.padding] = 0
        taken = np.full_like(mask, 255)
        taken[pad:-pad, pad:-pad] = inner  # a dash does not end in the frame
        halo = dilate(taken.astype(np.uint8), r.shape.margin)
        return Board(mask, (255 - halo.astype(np.int16)))

    @cached_property
    def _start(self) -> int:
        """Pixels where a target's first dash may lie, as bits."""
        r, pad = self.rules, self.pad
        mask = self._empty.mask.copy()
        inner = mask[pad:-pad, pad:-pad]
        for edge in (inner[: r.band], inner[r.size - r.band :], inner[:, : r.band], inner[:, r.size - r.band :]):
            edge[...] = 255
        return _bits(mask >= TAKEN)

    @cached_property
    def _inside(self) -> int:
        """The pixels of the image, as bits."""
        mask = np.zeros((self.side, self.side), bool)
        mask[self.pad : -self.pad, self.pad : -self.pad] = True
        return _bits(mask)

    def _targets(
        self, uniform: "Uniform"
    ) -> tuple[Places, list[tuple[int, int]], list[tuple[int, int]], Board] | None:
        seeds = self._two_seeds(uniform)
        if seeds is None:
            return None
        snakes, dashes = seeds
        first = [(y, x) for _, y, x, _ in dashes]
        boards = [self._empty.copy()]
        if not self.rules.faithful:
            boards.append(self._empty.copy())
            for snake, other in zip(snakes, boards[::-1], strict=True):
                dash, y, x = snake.held  # type: ignore[misc]  # a seed is held
                other.put(dash, y, x)
            dash, y, x = snakes[0].held  # type: ignore[misc]
            if not boards[0].fits(dash, y, x):
                return None
        for _ in range(self.rules.dashes - 1):
            for i, snake in enumerate(snakes):
                added = self._extend(uniform, boards[i % len(boards)], snake)
                if added is None:
                    return None
                dashes.append(added)
                if not self.rules.faithful:
                    boards[1 - i].put(*snake.held)  # type: ignore[misc]
        for i, snake in enumerate(snakes):
            # As published, the last dash of the first target takes no room.
            if i or not self.rules.faithful:
                boards[0].put(*snake.held)  # type: ignore[misc]
        return dashes, first, [snake.tip for snake in snakes], boards[0]

    def _two_seeds(self, uniform: "Uniform") -> tuple[list[Snake], Places] | None:
        first = self._seed(uniform, self._start, 1)
        if first is None:
            return None
        snake, placed = first
        for _ in range(DASH_TRIES):
            degree, around = int(uniform() * 360), int(uniform() * 360) * np.pi / 180
            distance = self.rules.seed_distance
            y = placed[1] + round(distance * float(np.sin(around)))
            x = placed[2] + round(distance * float(np.cos(around)))
            if self._within(degree, y, x):
                other = self._begin(2, degree, y, x)
                return [snake, other[0]], [placed, other[1]]
        return None

    def _seed(
        self, uniform: "Uniform", taken: int, number: int
    ) -> tuple[Snake, tuple[int, int, int, int]] | None:
        """A snake's first dash somewhere in the room that is free; None when there is none."""
        for _ in range(DASH_TRIES):
            degree = int(uniform() * 360)
            blocked = taken
            for dy, dx in seed(self.rules.shape, degree, int(self.rules.faithful)).room:
                shift = dy * self.side + dx
                blocked |= taken << shift if shift >= 0 else taken >> -shift
            free = self._inside & ~blocked
            count = free.bit_count()
            if not count:
                return None
            y, x = divmod(_nth_bit(free, int(uniform() * count), self.side * self.side), self.side)
            if self._within(degree, y, x):
                return self._begin(number, degree, y, x)
        return None

    def _within(self, degree: int, y: int, x: int) -> bool:
        """Whether a first dash at (y, x) has its tip, its head and its pivot in the image."""
        begun = seed(self.rules.shape, degree, int(self.rules.faithful))
        points = [(0, 0), begun.head, begun.pivot]
        low, high = self.pad, self.side - self.pad
        return all(low <= y + dy < high and low <= x + dx < high for dy, dx in points)

    def _begin(
        self, number: int, degree: int, y: int, x: int
    ) -> tuple[Snake, tuple[int, int, int, int]]:
        begun = seed(self.rules.shape, degree, int(self.rules.faithful))
        dy, dx = self.fan.seed_steps[degree]
        pivot = (y + begun.pivot[0] + dy, x + begun.pivot[1] + dx)
        snake = Snake(number, pivot, self.count + degree)
        snake.held = (begun.dash, y, x)
        return snake, (number, y, x, self.count + degree)

    @cached_property
    def _flat_ends(self) -> NDArray[np.int64]:
        ends: NDArray[np.int64] = self.fan.ends @ np.array([self.side, 1])
        return ends

    def _extend(
        self, uniform: "Uniform", board: Board, snake: Snake
    ) -> tuple[int, int, int, int] | None:
        """One more dash, written to the snake; None at a dead end."""
        py, px = snake.pivot
        weight = board.flat.take(self._flat_ends + (py * self.side + px)) * self.fan.weight[snake.before]
        reached = weight.cumsum()
        total = float(reached[-1])
        if total < DEAD_END:
            return None
        for _ in range(DASH_TRIES):
            which = int(reached.searchsorted(uniform() * total, "right"))
            dash = self.fan.dashes[which]
            dy, dx = self.fan.ends[which].tolist()
            y, x = py + dy, px + dx
            if board.fits(dash, y, x):
                board.put(*snake.held)  # type: ignore[misc]  # a seed at least
                snake.held, snake.tip, snake.before = (dash, y, x), (y, x), which
                dy, dx = self.fan.steps[which]
                snake.pivot = (py + dy, px + dx)
                return snake.number, y, x, which
        return None

    def _distractor(
        self, uniform: "Uniform", board: Board, number: int
    ) -> tuple[Places, Board] | None:
        """A distractor's dashes and the board with it; None when it found no room."""
        taken = _bits(board.mask >= TAKEN)
        free = (self._inside & ~taken).bit_count()
        if free < LEAST_FREE * self.rules.size**2:
            return None
        begun = self._seed(uniform, taken, number)
        if begun is None:
            return None
        snake, placed = begun
        if not self.rules.faithful and not board.fits(*snake.held):  # type: ignore[misc]
            return None
        board, dashes = board.copy(), [placed]
        for _ in range(self.rules.distractor_dashes - 1):
            added = self._extend(uniform, board, snake)
            if added is None:
                return None
            dashes.append(added)
        board.put(*snake.held)  # type: ignore[misc]
        return list(dashes), board


class Uniform:
    """Numbers in [0, 1), fetched many at a time."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self._next: Callable[[], float] = iter(()).__next__

    def __call__(self) -> float:
        try:
            return self._next()
        except StopIteration:
            self._next = iter(self.rng.random(256).tolist()).__next__
            return self._next()


def _bits(mask: NDArray[np.bool_]) -> int:
    """A picture as one number, its first pixel the lowest bit: shifting it moves the picture."""
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")


def _nth_bit(bits: int, n: int, size: int) -> int:
    """The place of the n-th of the bits that are set."""
    raw = np.frombuffer(bits.to_bytes((size + 7) // 8, "little"), np.uint8)
    return int(np.flatnonzero(np.unpackbits(raw, bitorder="little"))[n])
