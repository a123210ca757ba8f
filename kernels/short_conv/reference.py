"""The definition of the short convolution: a window that moves over time."""

import torch
from torch import Tensor


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight[:, W-1-j] x_{t-j}; see `seqzoo.kernels.short_conv`."""
    y = []
    for t, x_t in enumerate(x.unbind(1)):
        before = tail
        if reset is not None:
            before = torch.where(reset[:, t, None, None], 0, before)
        window = torch.cat([before, x_t[:, None]], dim=1)  # (B, W, D), oldest first
        y_t = (window * weight.T).sum(1) + bias
        after = window[:, 1:]
        if mask is not None:
            y_t = torch.where(mask[:, t, None], y_t, 0)
            after = torch.where(mask[:, t, None, None], after, tail)
        y.append(y_t)
        tail = after
    return (torch.stack(y, dim=1) if y else x), tail
