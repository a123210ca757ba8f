"""The diagonal recurrence in vectorised torch: one fused multiply-add a step into memory set aside.

No autograd graph a step: the backward pass is the same recurrence read from the other end.
"""

import torch
from torch import Tensor


def forward(a: Tensor, b: Tensor, initial_state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.scan.scan`; all tensors share one dtype."""
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    state = initial_state.clone()
    steps = list(zip(a.unbind(1), b.unbind(1), h.unbind(1), strict=True))
    for a_t, b_t, h_t in reversed(steps) if reverse else steps:
        torch.addcmul(b_t, a_t, state, out=h_t)
        state = h_t
    return h, state.clone()


def backward(
    a: Tensor, h: Tensor, initial_state: Tensor, dh: Tensor, dstate: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the initial state.

    With g_t the gradient of h_t through everything after it: g_t = dh_t + conj(a_{t+1}) g_{t+1},
    da_t = g_t conj(h_{t-1}), db_t = g_t.
    """
    da = torch.empty_like(h, memory_format=torch.contiguous_format)
    db = torch.empty_like(da)
    g = dstate.clone()
    a, h = a.conj().resolve_conj(), h.conj().resolve_conj()  # no copy when real
    start = initial_state.conj().resolve_conj()
    T = h.shape[1]
    before = ([*h.unbind(1)[1:], start] if reverse else [start, *h.unbind(1)])[:T]
    steps = list(zip(*(x.unbind(1) for x in (a, dh, da, db)), before, strict=True))
    for a_t, dh_t, da_t, db_t, h_before in steps if reverse else reversed(steps):
        torch.add(g, dh_t, out=db_t)
        torch.mul(db_t, h_before, out=da_t)
        g = a_t * db_t
    return da, db, g
