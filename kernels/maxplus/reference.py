"""The definition of the running maximum: a loop over time."""

import torch
from torch import Tensor


def maxplus(a: Tensor, b: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """m_t = max(a_t + m_{t-1}, b_t), from m_{-1} = initial_state."""
    m, state = [], initial_state
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        state = torch.maximum(a_t + state, b_t)
        m.append(state)
    if not m:
        return b, state
    return torch.stack(m, dim=1), state
