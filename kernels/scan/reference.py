"""The definition of the diagonal recurrence: a loop over time."""

import torch
from torch import Tensor


def scan(a: Tensor, b: Tensor, initial_state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t, from h_{-1} = initial_state; in reverse, from the last token."""
    h, state = [], initial_state
    steps = list(zip(a.unbind(1), b.unbind(1), strict=True))
    for a_t, b_t in reversed(steps) if reverse else steps:
        state = a_t * state + b_t
        h.append(state)
    if not h:
        return b, state
    return torch.stack(h[::-1] if reverse else h, dim=1), state
