"""The causal long convolution through `native.c`: real, no documents."""

from ctypes import CDLL
from functools import lru_cache
from math import pi
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native import BRIEF, REALS, build, call, threads

SOURCE = Path(__file__).with_name("native.c").read_text()
VECTOR = 64  # bytes in a vector of the source


def forward(u: Tensor, kernel: Tensor, runs: Tensor | None) -> Tensor:
    """See `seqzoo.kernels.long_conv.chunked.forward`; `runs` is None."""
    assert runs is None, "native kernels know no documents"
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    if u.numel():
        sizes, tables, room = _prepared(u, kernel, arrays=2)
        given = (u.contiguous(), kernel.contiguous(), *tables)
        call(_library(u), "long_conv_forward", *given, y, room, *sizes)
    return y


def backward(u: Tensor, kernel: Tensor, runs: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.long_conv.chunked.backward`; `runs` is None."""
    assert runs is None, "native kernels know no documents"
    if not u.numel():
        return torch.zeros_like(u), torch.zeros_like(kernel)
    du, dkernel = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, kernel))
    sizes, tables, room = _prepared(u, kernel, arrays=4)
    given = (u.contiguous(), kernel.contiguous(), dy.contiguous(), *tables)
    call(_library(u), "long_conv_backward", *given, du, dkernel, room, *sizes)
    return du, dkernel


def _prepared(
    u: Tensor, kernel: Tensor, arrays: int
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor], Tensor]:
    """Sizes, factors, and room for so many arrays of complex vectors a thread."""
    (B, T, D), L = u.shape, kernel.shape[1]
    lanes = VECTOR // u.element_size()
    n = 1 << max(1, (T + L - 2).bit_length() - 1)  # 2 n >= T + L - 1
    workers = min(threads(u.numel()), (D + lanes - 1) // lanes)
    room = u.new_empty(workers * arrays * n * 2 * lanes)
    return (B, T, D, L, n, workers), _tables(n, u.dtype), room


@lru_cache(maxsize=8)
def _tables(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Powers of e^(-2 pi i / n) for the steps of each size, and of each place for the products."""
    sizes = [n >> s for s in range(0, n.bit_length() - 2, 2)]
    steps = [torch.outer(_range(size // 4), _range(4)[1:]) / size for size in sizes]
    place = _range(1)
    while len(place) < n:
        place = torch.cat([2 * place, 2 * place + 1])  # bits reversed
    all_steps = torch.cat([_range(0), *(step.flatten() for step in steps)])
    return _circle(all_steps).to(dtype), _circle(place / n).to(dtype)


def _range(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64, device="cpu")


def _circle(turns: Tensor) -> Tensor:
    """e^(-2 pi i x) as pairs of real numbers."""
    return torch.stack([(2 * pi * turns).cos(), -(2 * pi * turns).sin()], dim=1).flatten()


def _library(x: Tensor) -> CDLL:
    return build(SOURCE, REALS[x.dtype], BRIEF)
