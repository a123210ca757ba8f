"""The definition of decayed linear attention: a loop over time."""

import torch
from torch import Tensor


def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    before: bool,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S_t = Diag(w_t) S_{t-1} + k_t v_t^T; o_t = q_t^T S_t, or q_t^T (S_{t-1} + u k_t v_t^T)."""
    H, state, o = v.shape[2], initial_state, []
    q, k = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (q, k))
    for t in range(v.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], 0, state)
        write = k[:, t, :, :, None] @ v[:, t, :, None, :]
        after = write + (state if log_decay is None else _weight(log_decay[:, t]) * state)
        if bonus is not None:
            read = state + bonus[..., None] * write
        else:
            read = state if before else after
        o.append(q[:, t, :, None, :] @ read)
        state = after if mask is None else torch.where(mask[:, t, None, None, None], after, state)
    if not o:
        return v, state
    return torch.cat(o, dim=2).transpose(1, 2), state


def _weight(log_decay: Tensor) -> Tensor:
    """From log w, (B, H) or (B, H, K), to w (B, H, 1 or K, 1)."""
    w = log_decay.exp()
    return w[..., None] if w.ndim == 3 else w[..., None, None]
