"""The definition of wkv: a loop over time that carries its running maximum."""

import torch
from torch import Tensor


def wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.wkv.wkv`; all tensors share one dtype."""
    y, (a, b, p) = [], initial_state.unbind(1)
    for t, (k_t, v_t) in enumerate(zip(k.unbind(1), v.unbind(1), strict=True)):
        if reset is not None:
            begins = reset[:, t, None]
            a, b, p = (
                torch.where(begins, empty, x)
                for empty, x in zip((0, 0, -1e38), (a, b, p), strict=True)
            )
        top = torch.maximum(p, u + k_t)
        old, new = torch.exp(p - top), torch.exp(u + k_t - top)
        y_t = (old * a + new * v_t) / (old * b + new)
        top = torch.maximum(p - w, k_t)
        old, new = torch.exp(p - w - top), torch.exp(k_t - top)
        after = old * a + new * v_t, old * b + new, top
        if mask is not None:
            there = mask[:, t, None]
            y_t = torch.where(there, y_t, 0)
            a, b, p = (torch.where(there, x, z) for x, z in zip(after, (a, b, p), strict=True))
        else:
            a, b, p = after
        y.append(y_t)
    return (torch.stack(y, dim=1) if y else v), torch.stack([a, b, p], dim=1)
