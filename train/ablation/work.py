"""What a worker does with a cell: train it, or say why not."""

import os
from typing import Any

import torch

from seqzoo.train.cells import train_cell
from seqzoo.train.meters import metered

MEMORY = ("out of memory", "can't allocate memory", "DefaultCPUAllocator")


def attempt(description: dict[str, Any], alone: bool = False) -> dict[str, Any]:
    """The record of a cell: `status` done with its `result`, or failed with a `reason`.

    `alone` says that no other cell runs on this machine meanwhile; only then energy is counted.
    """
    try:
        with metered(alone=alone) as used:
            result = train_cell(description)
    except Exception as error:
        return failed(reason_of(error))
    return {"status": "done", "reason": "", "worker": os.getpid(), "result": result, **used}


def failed(reason: str) -> dict[str, Any]:
    """The record of a cell that came to nothing."""
    return {"status": "failed", "reason": reason, "worker": os.getpid(), "result": None}


def reason_of(error: Exception) -> str:
    """An error in one line, at most 300 characters."""
    words = " ".join(str(error).split())
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(m in words for m in MEMORY):
        return "out of memory"
    return (words if isinstance(error, ValueError) else f"{type(error).__name__}: {words}")[:300]
