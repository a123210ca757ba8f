"""Synthetic tasks: small languages that tell mixers apart, made as they are read.

With them Long-Range Arena's two tasks that can be made; their names end in `_gen`.
"""

import dataclasses
from typing import Any

from seqzoo.kernels.errors import unknown
from seqzoo.train.tasks.arena import ListOpsGen, PathfinderGen
from seqzoo.train.tasks.base import Floor as Floor
from seqzoo.train.tasks.base import Task as Task
from seqzoo.train.tasks.copying import MADSelectiveCopying, SelectiveCopying
from seqzoo.train.tasks.mad import (
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    NoisyRecall,
)
from seqzoo.train.tasks.recall import MQAR, InductionHeads, Passkey
from seqzoo.train.tasks.state_tracking import GroupWords, ModularArithmetic, Parity

SYNTHETIC: dict[str, type[Task]] = {
    cls.name: cls
    for cls in (
        # recall
        MQAR,
        InductionHeads,
        Passkey,
        # selective copying, as in Mamba's paper
        SelectiveCopying,
        # MAD
        InContextRecall,
        NoisyRecall,
        FuzzyRecall,
        MADSelectiveCopying,
        Compression,
        Memorization,
        # state tracking
        Parity,
        ModularArithmetic,
        GroupWords,
        # Long-Range Arena, from generators of ours
        ListOpsGen,
        PathfinderGen,
    )
}


def create_task(name: str, **options: Any) -> Task:  # noqa: ANN401
    """A task by name: `create_task("mqar", length=64, pairs=8)`.

    Raises:
        ValueError: an unknown name or option, or a value that the task refuses.
    """
    if name not in SYNTHETIC:
        raise unknown("synthetic task", name, SYNTHETIC)
    fields = {f.name: f for f in dataclasses.fields(SYNTHETIC[name])}
    for option, value in options.items():
        if option not in fields:
            raise unknown(f"option of task {name!r} named", option, fields)
        kind = type(fields[option].default)
        whole = kind is int and (not isinstance(value, int) or isinstance(value, bool))
        if whole or (kind is float and not isinstance(value, int | float)):
            raise ValueError(f"{option}={value!r} is not allowed; it must be a number")
    return SYNTHETIC[name](**options)
