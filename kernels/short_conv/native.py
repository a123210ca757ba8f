"""The short convolution through `native.c`, compiled once for each number of taps."""

from ctypes import CDLL
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native import REALS, build, call, threads

SOURCE = Path(__file__).with_name("native.c").read_text()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.short_conv.short_conv`; all tensors but the flags share one dtype."""
    given = _plain(x, weight, bias, tail, reset, mask)
    y, last = torch.empty_like(given[0]), torch.empty_like(given[3])
    sizes = (*x.shape, int(silu), threads(x.numel()))
    call(library(x.dtype, weight.shape[1]), "short_conv_forward", *given, y, last, *sizes)
    return y, last


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    dy: Tensor,
    dtail: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the tail that came in."""
    given = _plain(x, weight, bias, tail, reset, mask)
    dx, dstart = torch.empty_like(given[0]), torch.empty_like(given[3])
    (B, T, D), W = x.shape, weight.shape[1]
    made = (dx, x.new_empty(B, W + 1, D), dstart)  # in the middle: weight and bias, row by row
    sizes = (B, T, D, int(silu), threads(x.numel()))
    gradients = (dy.contiguous(), dtail.contiguous())
    call(library(x.dtype, W), "short_conv_backward", *given, *gradients, *made, *sizes)
    dweight = made[1].sum(0)
    return dx, dweight[:W].t().contiguous(), dweight[W].clone(), dstart


def library(dtype: torch.dtype, taps: int) -> CDLL:
    """What is called; the number of taps is known to the compiler."""
    return build(f"#define W {taps}\n{SOURCE}", REALS[dtype])


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """What C reads: weights with the taps first, flags that are no flags as null pointers."""
    none = x.new_empty(0, dtype=torch.bool)
    flags = (none if f is None else f.contiguous() for f in (reset, mask))
    return x.contiguous(), weight.t().contiguous(), bias.contiguous(), tail.contiguous(), *flags
