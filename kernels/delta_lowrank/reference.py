"""The definition of a diagonal-plus-low-rank state: a loop over time."""

import torch
from torch import Tensor

from seqzoo.kernels.delta.reference import _weight


def delta_lowrank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S_t = Diag(w_t) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T; o_t = q_t^T S_t."""
    state, o = initial_state, []
    for t in range(v.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], 0, state)
        removed = b[:, t, :, :, None] @ (a[:, t, :, None] @ state)
        after = _weight(log_decay[:, t]) * state + removed + k[:, t, :, :, None] @ v[:, t, :, None]
        o.append(q[:, t, :, None] @ after)
        state = after if mask is None else torch.where(mask[:, t, None, None, None], after, state)
    if not o:
        return v, state
    return torch.cat(o, dim=2).transpose(1, 2), state
