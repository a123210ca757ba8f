"""The definition of a mixture of experts: a loop over tokens and their experts."""

from collections.abc import Callable

import torch
from torch import Tensor


def experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_up: Tensor | None,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """y_t = sum_k weight_{t,k} f_e(x_t) with e = index_{t,k}; -1 is nobody, whose part is 0."""
    y = []
    for t in range(x.shape[0]):
        token, mixed = x[t : t + 1], x.new_zeros(1, w_out.shape[2])
        for k in range(index.shape[1]):
            e = index[t, k : k + 1].clamp(min=0)
            h = activation(token @ w_in.index_select(0, e)[0])
            if w_up is not None:
                h = h * (token @ w_up.index_select(0, e)[0])
            part = weight[t, k] * (h @ w_out.index_select(0, e)[0])
            mixed = mixed + torch.where(index[t, k] < 0, 0, part)
        y.append(mixed)
    return torch.cat(y) if y else x @ w_in[0] @ w_out[0]
