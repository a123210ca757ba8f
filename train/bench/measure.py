"""Medians of things that run in turn, so that what else the machine does falls on all alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


class Timing(NamedTuple):
    """Median milliseconds, and of how many runs."""

    ms: float
    runs: int


def interleaved(
    steps: Mapping[Key, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    seconds: float = float("inf"),
) -> dict[Key, Timing]:
    """Time of each step, all taken in turn.

    Args:
        steps: what to run, by any key; each should have run once before.
        repeats: rounds.
        device: where they run; a GPU is waited for.
        seconds: a step that has taken longer in all sits the other rounds out.
    """
    taken: dict[Key, list[float]] = {key: [] for key in steps}
    for _ in range(repeats):
        for key, step in steps.items():
            if sum(taken[key]) < seconds:
                taken[key].append(_seconds(step, device))
    return {key: Timing(1000 * statistics.median(t), len(t)) for key, t in taken.items()}


def training_step(
    run: Callable[[], Tensor], sources: Sequence[Tensor]
) -> Callable[[], tuple[Tensor | None, ...]]:
    """Forward, and the gradients of `sources` when that of every output is 1; runs forward once."""
    dy = torch.ones_like(run().detach(), memory_format=torch.contiguous_format)

    def step() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(run(), sources, dy, allow_unused=True)

    return step


def _seconds(step: Callable[[], object], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
