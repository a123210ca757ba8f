"""Snakes on a board: how Pathfinder's curves grow without touching.

A board is kept with a frame around it, so that no dash is ever cut. It holds `mask`, the room that
dashes take (0 to 255), and `open`, 255 less the mask dilated by the margin. Everything is counted
in whole numbers: `snakes.c` gives the same snakes to the last pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqzoo.train.lra.dashes import ONE, Dash, Fan, Shape, dilate, fan, seed

Place = tuple[int, int, int, int]  # snake, y, x and which dash
Held = tuple[Dash, int, int]
CROWDED = 459  # 1.8 times 255: two masks that overlap in earnest
TAKEN = 77  # above 0.3 times 255 a pixel is taken
DEAD_END = 255 * ONE // 10_000  # the least total weight to go on
DASH_TRIES = 3
SNAKE_TRIES = 5
LEAST_FREE = 0.01  # of the pixels; below that no more distractors
WORD = (1 << 64) - 1


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

    @property
    def pad(self) -> int:
        """Width of the frame around a board."""
        return self.shape.reach + 2 * self.shape.margin + 3

    @property
    def side(self) -> int:
        """Of a board with its frame."""
        return self.size + 2 * self.pad


class Random:
    """SplitMix64 (Steele, Lea and Flood, 2014), so short that C and Python can share it."""

    def __init__(self, state: int) -> None:
        self.state = state & WORD

    def below(self, n: int) -> int:
        """A number in [0, n), for n below 2^32."""
        self.state = z = (self.state + 0x9E3779B97F4A7C15) & WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        return (((z ^ (z >> 31)) >> 32) * n) >> 32


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


@dataclass
class Snake:
    """One that grows.

    Attributes:
        number: its id.
        pivot: from where the next dash counts.
        before: which dash the newest one is.
        held: the newest dash, not yet on the snake's own board so as not to block the next.
    """

    number: int
    pivot: tuple[int, int]
    before: int
    held: Held

    @property
    def place(self) -> Place:
        """The newest dash."""
        return self.number, self.held[1], self.held[2], self.before


class Targets(NamedTuple):
    """Two whole targets and the board with both; places count the frame."""

    dashes: list[Place]
    board: Board


class Snakes:
    """Draws the snakes of images that follow the same rules."""

    def __init__(self, rules: Rules) -> None:
        self.rules, self.side, self.pad = rules, rules.side, rules.pad
        self.shift = int(rules.faithful)  # a pixel that the published code is off by
        self.fan: Fan = fan(rules.shape, rules.continuity)
        self.count = len(self.fan.ends)

    def dash(self, which: int) -> Dash:
        """One of the fan's, or from the fan's size on a seed of that degree."""
        if which < self.count:
            return self.fan.dashes[which]
        return seed(self.rules.shape, which - self.count, self.shift).dash

    def distractors(self, random: Random, board: Board) -> list[Place]:
        """As many dashes of distractors as find room on the board."""
        dashes: list[Place] = []
        for number in range(3, 3 + self.rules.distractors):
            for _ in range(SNAKE_TRIES):
                found = self._distractor(random, board, number)
                if found is not None:
                    dashes += found.dashes
                    board = found.board
                    break
        return dashes

    @cached_property
    def empty(self) -> Board:
        """Nothing but the padding at the edges is taken; no dash may end in the frame."""
        r, pad = self.rules, self.pad
        mask = np.zeros((self.side, self.side), np.int16)
        mask[pad:-pad, pad:-pad] = self._edge(r.padding) * 255
        taken = np.full((self.side, self.side), 255, np.uint8)
        taken[pad:-pad, pad:-pad] = mask[pad:-pad, pad:-pad]
        return Board(mask, 255 - dilate(taken, r.shape.margin).astype(np.int16))

    @cached_property
    def starts(self) -> list[list[int]]:
        """Where a first target may begin, for every degree; places in the flat board."""
        taken = self.empty.mask >= TAKEN
        taken[self.pad : -self.pad, self.pad : -self.pad] |= self._edge(self.rules.band)
        bits = _bits(taken)
        return [_places(self._free(bits, degree), self.side).tolist() for degree in range(360)]

    @cached_property
    def around(self) -> list[tuple[int, int]]:
        """From the first target's tip to the second's, for every degree."""
        angles = np.arange(360) * np.pi / 180
        circle = np.stack([np.sin(angles), np.cos(angles)], 1) * self.rules.seed_distance
        return [(int(y), int(x)) for y, x in np.round(np.round(circle, 9))]

    def targets(self, random: Random) -> Targets:
        """Two targets, begun again until both are whole."""
        while True:
            found = self._targets(random)
            if found is not None:
                return found

    def _targets(self, random: Random) -> Targets | None:
        """One attempt. Each target has a board of its own, which lacks its newest dash only.

        As published both share a board, which lacks the newest dash of either.
        """
        snakes = self._two_seeds(random)
        if snakes is None:
            return None
        apart = not self.rules.faithful
        boards = [self.empty.copy() for _ in range(1 + apart)]
        if apart:
            for snake, other in zip(snakes, boards[::-1], strict=True):
                other.put(*snake.held)
            if not boards[0].fits(*snakes[0].held):
                return None
        dashes = [snake.place for snake in snakes]
        for _ in range(self.rules.dashes - 1):
            for i, snake in enumerate(snakes):
                if not self._extend(random, boards[i * apart], snake):
                    return None
                dashes.append(snake.place)
                if apart:
                    boards[1 - i].put(*snake.held)
        # As published, the last dash of the first target takes no room.
        boards[0].put(*snakes[0 if apart else 1].held)
        return Targets(dashes, boards[0])

    def _two_seeds(self, random: Random) -> list[Snake] | None:
        for _ in range(DASH_TRIES):
            degree = random.below(360)
            free = self.starts[degree]
            if not free:
                return None
            y, x = divmod(free[random.below(len(free))], self.side)
            if self._within(degree, y, x):
                break
        else:
            return None
        first = self._begin(1, degree, y, x)
        for _ in range(DASH_TRIES):
            degree = random.below(360)
            dy, dx = self.around[random.below(360)]
            if self._within(degree, y + dy, x + dx):
                return [first, self._begin(2, degree, y + dy, x + dx)]
        return None

    def _extend(self, random: Random, board: Board, snake: Snake) -> bool:
        """One more dash; False at a dead end."""
        py, px = snake.pivot
        room = board.flat.take(self._flat_ends + (py * self.side + px))
        reached = (room * self.fan.weight[snake.before]).cumsum()
        total = int(reached[-1])
        if total < DEAD_END:
            return False
        for _ in range(DASH_TRIES):
            which = int(reached.searchsorted(random.below(total), "right"))
            dash = self.fan.dashes[which]
            dy, dx = self.fan.ends[which].tolist()
            if board.fits(dash, py + dy, px + dx):
                board.put(*snake.held)
                snake.held, snake.before = (dash, py + dy, px + dx), which
                dy, dx = self.fan.steps[which]
                snake.pivot = (py + dy, px + dx)
                return True
        return False

    def _distractor(self, random: Random, board: Board, number: int) -> Targets | None:
        """A distractor's dashes and the board with it; None when it found no room."""
        taken = _bits(board.mask >= TAKEN)
        if (self._inside & ~taken).bit_count() < LEAST_FREE * self.rules.size**2:
            return None
        snake = self._seed(random, taken, number)
        if snake is None or (not self.rules.faithful and not board.fits(*snake.held)):
            return None
        board, dashes = board.copy(), [snake.place]
        for _ in range(self.rules.distractor_dashes - 1):
            if not self._extend(random, board, snake):
                return None
            dashes.append(snake.place)
        board.put(*snake.held)
        return Targets(dashes, board)

    def _seed(self, random: Random, taken: int, number: int) -> Snake | None:
        """A snake somewhere in the room that is free; None when there is none."""
        for _ in range(DASH_TRIES):
            degree = random.below(360)
            places = _places(self._free(taken, degree), self.side)
            if not len(places):
                return None
            y, x = divmod(int(places[random.below(len(places))]), self.side)
            if self._within(degree, y, x):
                return self._begin(number, degree, y, x)
        return None

    def _free(self, taken: int, degree: int) -> int:
        """Pixels of the image where a seed's room is free."""
        blocked = taken
        for dy, dx in seed(self.rules.shape, degree, self.shift).room:
            shift = dy * self.side + dx
            blocked |= taken >> shift if shift >= 0 else taken << -shift
        return self._inside & ~blocked

    def _within(self, degree: int, y: int, x: int) -> bool:
        """Whether a first dash at (y, x) has its tip, its head and its pivot in the image."""
        begun = seed(self.rules.shape, degree, self.shift)
        low, high = self.pad, self.side - self.pad
        points: Sequence[tuple[int, int]] = ((0, 0), begun.head, begun.pivot)
        return all(low <= y + dy < high and low <= x + dx < high for dy, dx in points)

    def _begin(self, number: int, degree: int, y: int, x: int) -> Snake:
        begun, before = seed(self.rules.shape, degree, self.shift), self.count + degree
        dy, dx = self.fan.steps[before]
        pivot = (y + begun.pivot[0] + dy, x + begun.pivot[1] + dx)
        return Snake(number, pivot, before, (begun.dash, y, x))

    @cached_property
    def _flat_ends(self) -> NDArray[np.int64]:
        ends: NDArray[np.int64] = self.fan.ends @ np.array([self.side, 1])
        return ends

    @cached_property
    def _inside(self) -> int:
        mask = np.zeros((self.side, self.side), bool)
        mask[self.pad : -self.pad, self.pad : -self.pad] = True
        return _bits(mask)

    def _edge(self, width: int) -> NDArray[np.bool_]:
        """The rows and columns at the edges of an image."""
        edge = np.ones((self.rules.size,) * 2, bool)
        edge[width : self.rules.size - width, width : self.rules.size - width] = False
        return edge


def _bits(mask: NDArray[np.bool_]) -> int:
    """A picture as one number, its first pixel the lowest bit: shifting it moves the picture."""
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")


def _places(bits: int, side: int) -> NDArray[np.int64]:
    """The places of the bits that are set."""
    raw = np.frombuffer(bits.to_bytes((side * side + 7) // 8, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(raw, bitorder="little"))
