"""One matrix product a group, written straight into its place.

On a CPU this takes the time of torch's own grouped_mm, which knows neither float64 nor widths that
are not a multiple of 16 bytes; and unlike indexing a stack of weights under autograd, no product
costs a gradient of the whole stack.
"""

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """See `seqzoo.kernels.experts.grouped_matmul`."""
    groups = sizes.tolist()
    y = x.new_empty(x.shape[0], weight.shape[2])
    y[sum(groups) :] = 0
    for x_e, w_e, y_e in zip(_split(x, groups), weight, _split(y, groups), strict=True):
        torch.mm(x_e, w_e, out=y_e)
    return y


def backward(x: Tensor, weight: Tensor, sizes: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; that of an expert without tokens is zero."""
    groups = sizes.tolist()
    dx = x.new_empty(x.shape)
    dx[sum(groups) :] = 0
    dweight = weight.new_empty(weight.shape)
    inputs, outputs = (_split(t, groups) for t in (x, dx))
    for x_e, w_e, dy_e, dx_e, dw_e in zip(
        inputs, weight, _split(dy, groups), outputs, dweight, strict=True
    ):
        torch.mm(dy_e, w_e.t(), out=dx_e)
        torch.mm(x_e.t(), dy_e, out=dw_e)
    return dx, dweight


def _split(x: Tensor, groups: list[int]) -> tuple[Tensor, ...]:
    return torch.split(x[: sum(groups)], groups)
