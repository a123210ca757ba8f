"""How the Triton kernels of both delta rules are launched."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import interpreting
from seqzoo.kernels.fused import OPTIONS

WIDEST = 64  # channels of keys in a block, at most
PRECISION = "bf16x6"  # of float32 factors
MOST = 255  # registers: else the assembler spills a little to have more programs at once


def padded_width(k: Tensor) -> int:
    """The keys' channels, filled up to whole blocks."""
    return -(-k.shape[3] // WIDEST) * WIDEST


def launch(
    kernel: Any,  # noqa: ANN401  # of triton.jit
    grid: tuple[int, ...],
    by: str,
    tile: Tensor,
    given: Sequence[Tensor | int],
    config: dict[str, Any],
) -> None:
    """Run a kernel where `tile` lies; the second number of the grid counts channels.

    Args:
        kernel: a jitted function.
        grid: programs, or programs and channels.
        by: which of `config` says how many channels a program takes.
        tile: a tensor of the device.
        given: run-time arguments, in order.
        config: all others by name, but for the precision; and the compiler's options.
    """
    if "PRECISION" in kernel.arg_names:
        config = config | {"PRECISION": "ieee" if interpreting() else PRECISION}
    if torch.version.hip:  # registers are bounded by NVIDIA's compiler alone
        config = {name: x for name, x in config.items() if name != "maxnreg"}
    if len(grid) > 1:
        grid = (grid[0], -(-grid[1] // config[by]))
    if all(grid):
        with torch.cuda.device_of(tile):  # type: ignore[no-untyped-call]
            kernel[grid](*given, **config, **OPTIONS)
