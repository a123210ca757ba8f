"""The definition of the delta rule: a loop over time."""

import torch
from torch import Tensor


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S = Diag(w_t) S_{t-1}; S_t = S + beta_t k_t (v_t - S^T k_t)^T; o_t = q_t^T S_t."""
    state, o = initial_state, []
    for t in range(v.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], 0, state)
        S = state if log_decay is None else _weight(log_decay[:, t]) * state
        error = v[:, t, :, None] - k[:, t, :, None] @ S
        after = S + k[:, t, :, :, None] @ (beta[:, t, :, None, None] * error)
        o.append(q[:, t, :, None] @ after)
        state = after if mask is None else torch.where(mask[:, t, None, None, None], after, state)
    if not o:
        return v, state
    return torch.cat(o, dim=2).transpose(1, 2), state


def _weight(log_decay: Tensor) -> Tensor:
    """From log w, (B, H) or (B, H, K), to w (B, H, 1 or K, 1)."""
    w = log_decay.exp()
    return w[..., None] if w.ndim == 3 else w[..., None, None]
