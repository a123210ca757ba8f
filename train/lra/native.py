"""The two targets through `snakes.c`: the same ones, some sixty times sooner."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqzoo.kernels.native import build, call, works
from seqzoo.train.lra.dashes import seed
from seqzoo.train.lra.snakes import (
    CROWDED,
    DASH_TRIES,
    DEAD_END,
    Board,
    Random,
    Snakes,
    Targets,
)

SOURCE = Path(__file__).with_name("snakes.c").read_text()


class NativeSnakes(Snakes):
    """Snakes whose targets grow in C, where a compiler is at hand."""

    def targets(self, random: Random) -> Targets:
        """See `Snakes.targets`."""
        if works():
            return super().targets(random)
        apart = not self.rules.faithful
        boards = self._tables["empty"].repeat(1 + apart, 1, 1, 1)
        state = torch.from_numpy(np.array([random.state], np.uint64).view(np.int64))
        dashes = torch.zeros(2 * self.rules.dashes, 4, dtype=torch.int64)
        call(
            build(SOURCE, "float"), "seqzoo_targets", *self._tables.values(), boards, state, dashes
        )
        random.state = int(state.numpy().view(np.uint64)[0])
        mask, opened = boards[0].numpy()
        return Targets([tuple(row) for row in dashes.tolist()], Board(mask, opened))

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        """In the order of the C function's arguments."""
        apart = int(not self.rules.faithful)
        low, high = self.pad, self.side - self.pad
        rules = [self.count, self.side, low, high, self.rules.dashes, apart]
        rules += [DASH_TRIES, CROWDED, DEAD_END]
        seeds = [seed(self.rules.shape, degree, self.shift) for degree in range(360)]
        pictures, rows, at = [], [], 0
        for which in range(self.count + 360):
            for picture in self.dash(which)[1:]:  # mask and halo
                pictures.append(picture.pixels.astype(np.int16).ravel())
                rows.append([picture.y, picture.x, *picture.pixels.shape, at])
                at += len(pictures[-1])
        first = np.cumsum([0, *map(len, self.starts)])
        tables: dict[str, Any] = {
            "rules": rules,
            "ends": self.fan.ends,
            "steps": self.fan.steps,
            "weight": self.fan.weight,
            "seeds": [(*s.head, *s.pivot) for s in seeds],
            "first": first,
            "places": [place for places in self.starts for place in places],
            "around": self.around,
            "patches": rows,
        }
        wide = {name: _tensor(np.array(values, np.int64)) for name, values in tables.items()}
        empty = np.stack([self.empty.mask, self.empty.open])
        return wide | {"pixels": _tensor(np.concatenate(pictures)), "empty": _tensor(empty)}


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
