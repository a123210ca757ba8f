"""The selective scan in vectorised torch: steps inside blocks that stay in the cache.

Only the states at block borders outlive the forward pass; the backward pass computes each block's
states again. Blocks are time-major, (S, B, D, N), so that a step is one contiguous slice.
"""

import torch
from torch import Tensor

BLOCK = 16  # steps


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output y, the last state, and the states before each block (blocks, B, D, N); one dtype."""
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    T, state, borders = u.shape[1], initial_state.clone(), []
    for block in (slice(start, start + BLOCK) for start in range(0, T, BLOCK)):
        borders.append(state)
        h = _states(u, dt, A, B, state, reset, block)[1]
        y[:, block] = (h @ C[:, block].transpose(0, 1)[..., None])[..., 0].transpose(0, 1)
        state = h[-1].clone()
    stacked = torch.stack(borders) if borders else state.new_empty(0, *state.shape)
    return y, state.clone(), stacked


def backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    reset: Tensor | None,
    borders: Tensor,
    dy: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C and the initial state.

    With a_t = exp(dt_t A) and g_t the gradient of h_t through everything after it:
    g_t = C_t dy_t + a_{t+1} g_{t+1}; w_t = dt_t u_t gets B_t . g_t; dt_t A gets a_t g_t h_{t-1}.
    """
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt, B, C)]
    dA, carry, ones = torch.zeros_like(A), dstate, A.new_ones(A.shape[1])
    starts = range(0, u.shape[1], BLOCK)
    for start, before in zip(reversed(starts), reversed(borders.unbind(0)), strict=True):
        block = slice(start, start + BLOCK)
        u_, dt_, B_, C_, dy_ = (x[:, block].transpose(0, 1) for x in (u, dt, B, C, dy))
        du, ddt, dB, dC = (x[:, block].transpose(0, 1) for x in made)
        a, h = _states(u, dt, A, B, before, reset, block)
        g = dy_[..., None] * C_[:, :, None]
        g[-1] += carry
        later = zip(a.unbind(0)[:0:-1], g.unbind(0)[:0:-1], g.unbind(0)[-2::-1], strict=True)
        for a_next, g_next, g_t in later:
            g_t.addcmul_(a_next, g_next)
        carry = a[0] * g[0]
        dw = (g @ B_[..., None])[..., 0]
        dB.copy_(((dt_ * u_)[..., None, :] @ g)[..., 0, :])
        dC.copy_((dy_[..., None, :] @ h)[..., 0, :])
        a *= g
        a[1:] *= h[:-1]
        a[0] *= before
        torch.mul(dw, dt_, out=du)
        torch.addcmul((a * A) @ ones, dw, u_, out=ddt)
        dA += torch.mul(a, dt_[..., None], out=g).sum((0, 1))
    du, ddt, dB, dC = made
    return du, ddt, dA, dB, dC, carry.clone()


def _states(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    state: Tensor,
    reset: Tensor | None,
    block: slice,
) -> tuple[Tensor, Tensor]:
    """Decays and states of one block, (S, B, D, N)."""
    u, dt, B = (x[:, block].transpose(0, 1) for x in (u, dt, B))
    a = (dt[..., None] * A).exp_()
    if reset is not None:
        a.masked_fill_(reset[:, block].T[..., None, None], 0)
    h = (dt * u)[..., None] * B[:, :, None]
    for a_t, h_t in zip(a.unbind(0), h.unbind(0), strict=True):
        state = h_t.addcmul_(a_t, state)
    return a, h
