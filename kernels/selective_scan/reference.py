"""The definition of the selective scan: a loop over time."""

import torch
from torch import Tensor


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t . h_t, from h_{-1} = initial_state."""
    y, h = [], initial_state
    for t, (u_t, dt_t, B_t, C_t) in enumerate(
        zip(*(x.unbind(1) for x in (u, dt, B, C)), strict=True)
    ):
        if reset is not None:
            h = torch.where(reset[:, t, None, None], 0, h)
        decay = torch.exp(dt_t[..., None] * A)  # (B, D, N)
        h = decay * h + (dt_t * u_t)[..., None] * B_t[:, None]
        y.append(torch.einsum("bdn,bn->bd", h, C_t))
    return (torch.stack(y, dim=1) if y else u), h
