"""Pathfinder solved from the image alone: dash by dash from one marker, as a person would.

Known are the rules of the drawing (how long dashes are, how far apart, how they look), not which
dashes were drawn. A chain goes on with every dash whose picture the image contains at one of the
places where the next dash may end; the answer is yes when a chain of the right number of dashes
leads from the first tip at one marker to a last tip at the other.
"""

import numpy as np

from seqzoo.train.lra.dashes import disc
from seqzoo.train.lra.pathfinder import SCALE, snakes_of

STRONG = 0.4  # of the ink of a dash: no other dash has a say there


class Tracer:
    """For images of one generator and one margin, with dashes that are equally bright."""

    def __init__(self, pathfinder, margin):
        self.snakes = snakes_of(pathfinder.rules(margin))
        self.length, self.ink = pathfinder.length, pathfinder.look.ink
        self.pad, self.count = self.snakes.pad, self.snakes.count
        self.marker = disc(pathfinder.look.radius, SCALE)
        inks = [self.snakes.dash(i).ink for i in range(self.count + 360)]
        # What each dash needs to be in the image, from its anchor: places, values, and the strong.
        self.needs = []
        for ink in inks:
            ys, xs = np.nonzero(ink.pixels)
            values = np.round(ink.pixels[ys, xs] * self.ink).astype(np.int16)
            place = (ys + ink.y) * self.snakes.side + xs + ink.x
            self.needs.append((place, values, values >= STRONG * self.ink * 255))
        # Seeds of neighbouring degrees often look the same and lead to the same pivot.
        self.seeds = {}
        for degree in range(360):
            which, snake = self.count + degree, self.snakes._begin(0, degree, 0, 0)
            picture = tuple(a.tobytes() for a in self.needs[which])
            self.seeds.setdefault(picture, {}).setdefault(snake.pivot, []).append(which)

    def connected(self, image):
        """Whether the markers are at the tips of one snake; None when they cannot be told apart."""
        padded = np.pad(image.astype(np.int16), self.pad)
        markers = self._markers(padded)
        if len(markers) != 2:
            return None
        flat, hidden = padded.reshape(-1), np.ones(padded.size, bool)  # no one sees the frame
        hidden.reshape(padded.shape)[self.pad : -self.pad, self.pad : -self.pad] = False
        for y, x in markers:
            part = self.marker.over(hidden.reshape(padded.shape), y, x)
            part |= self.marker.pixels > 0
        return any(self._chains(flat, hidden, a, b) for a, b in (markers, markers[::-1]))

    def _markers(self, image):
        """Where a disc brighter than any dash lies."""
        ys, xs = np.nonzero(self.marker.pixels > 255 * self.ink + 1)
        values = self.marker.pixels[ys, xs].astype(np.int16)
        corner = [self.marker.y, self.marker.x]
        bright = np.flatnonzero(values == values.max())
        found = set()
        for cy, cx in np.argwhere(image >= values.max()).tolist():
            y, x = cy - int(ys[bright[0]]) - corner[0], cx - int(xs[bright[0]]) - corner[1]
            if (image[ys + y + corner[0], xs + x + corner[1]] >= values).all():
                found.add((y, x))
        return sorted(found)

    def _fits(self, flat, hidden, which, place):
        need, values, strong = self.needs[which]
        seen, out = flat[need + place], hidden[need + place]
        return bool((out | (seen == values) | (~strong & (seen > values))).all())

    def _chains(self, flat, hidden, start, end):
        side, fan = self.snakes.side, self.snakes.fan
        goal = end[0] * side + end[1]
        todo = []
        for pivots in self.seeds.values():
            first = next(iter(pivots.values()))[0]
            if self._fits(flat, hidden, first, start[0] * side + start[1]):
                for (y, x), alike in pivots.items():
                    todo += [((start[0] + y, start[1] + x), which, 1) for which in alike]
        seen = set()
        while todo:
            (py, px), before, length = todo.pop()
            if ((py, px), before, length) in seen:
                continue
            seen.add(((py, px), before, length))
            for which in np.flatnonzero(fan.weight[before]).tolist():
                y, x = py + int(fan.ends[which, 0]), px + int(fan.ends[which, 1])
                inside = self.pad <= min(y, x) and max(y, x) < side - self.pad
                if not (inside and self._fits(flat, hidden, which, y * side + x)):
                    continue
                if length + 1 == self.length:
                    if y * side + x == goal:
                        return True
                    continue
                dy, dx = fan.steps[which]
                todo.append(((py + dy, px + dx), which, length + 1))
        return False
