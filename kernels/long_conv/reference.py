"""The definition of the causal long convolution: for each token, the sum over those before it."""

import torch
from torch import Tensor


def long_conv(u: Tensor, kernel: Tensor, runs: Tensor | None) -> Tensor:
    """y_t = sum_s kernel[:, t - s] u_s over s <= t, t - s < L and s in the document of t.

    Args:
        u: (B, T, D).
        kernel: (D, L).
        runs: (B, T) number of each token's document, or None.
    """
    T, L = u.shape[1], kernel.shape[1]
    y = []
    for t in range(T):
        first = max(0, t - L + 1)
        terms = kernel[:, : t - first + 1].flip(1).t() * u[:, first : t + 1]
        if runs is not None:
            same = runs[:, first : t + 1] == runs[:, t : t + 1]
            terms = terms * same[..., None]
        y.append(terms.sum(1))
    return torch.stack(y, dim=1) if y else u * kernel[:, 0]
