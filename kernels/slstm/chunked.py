"""The sLSTM cell without an autograd graph a step.

A step needs the output of the one before, so both passes walk along time; whatever does not hang on
that (gates, slopes, the gradient of the recurrent weights) is computed for all tokens at once.
Inside, time is the first dimension and gates are i, f, z, o.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def forward(
    gates: Tensor,
    recurrent: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.slstm.slstm`.

    Returns:
        h, the last state, and the states after every token, (T, 4, H, B, K).
    """
    B, T, _, H, K = gates.shape
    x, weight = _time_first(gates), _fused(recurrent)
    states = x.new_empty(T, 4, H, B, K)
    state = initial_state.permute(1, 2, 0, 3).contiguous()
    for t, after in enumerate(states):
        if reset is not None:
            state = torch.where(reset[:, t, None], 0, state)
        h, c, n, m = state
        raw = x[t] + torch.unflatten(torch.bmm(h, weight), -1, (4, K)).permute(2, 0, 1, 3)
        i, f, z, o = raw
        kept = torch.where(n == 0, -torch.inf, logsigmoid(f) + m)
        top = torch.maximum(kept, i, out=after[3])
        forget, write = torch.exp(kept - top), torch.exp(i - top)
        torch.addcmul(forget * c, write, torch.tanh(z), out=after[1])
        torch.addcmul(write, forget, n, out=after[2])
        torch.div(torch.sigmoid(o) * after[1], after[2], out=after[0])
        if mask is not None:
            after.copy_(torch.where(mask[:, t, None], after, state))
        state = after
    h = states[:, 0].permute(2, 0, 1, 3).clone(memory_format=torch.contiguous_format)
    return h, state.permute(2, 0, 1, 3).clone(memory_format=torch.contiguous_format), states


def backward(
    gates: Tensor,
    recurrent: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    states: Tensor,
    dh: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gates, recurrent weights and initial state; the stabiliser m is not left out.

    Outputs do not depend on m, but the final state that a caller may differentiate does.
    """
    T = states.shape[0]
    before = torch.cat([initial_state.permute(1, 2, 0, 3)[None], states])[:T]
    if reset is not None:
        before = torch.where(reset.T[:, None, None, :, None], 0, before)
    there = None if mask is None else mask.T[:, None, :, None]  # (T, 1, B, 1)
    weight = _fused(recurrent)
    factors = _slopes(_time_first(gates), weight, before, states, there)
    draw = torch.empty_like(states)  # gradient of the gates
    gh, gc, gn, gm = dstate.permute(1, 2, 0, 3).clone().unbind(0)
    outer = dh.permute(1, 2, 0, 3)
    for t in range(T - 1, -1, -1):
        forget, write, tanh_z, by_c, by_n, by_f, by_z, by_o, keeps = (x[t] for x in factors)
        gh = gh + outer[t]
        gc, gn = gc + gh * by_c, gn - gh * by_n
        held = forget * (gc * before[t, 1] + gn * before[t, 2])
        entered = write * (gc * tanh_z + gn)
        gm = gm - held - entered  # of m as the larger of the two exponents
        held, entered = held + gm * keeps, entered + gm * (1 - keeps)
        passed = gh
        torch.stack([entered, held * by_f, gc * by_z, gh * by_o], out=draw[t])
        gh = torch.bmm(draw[t].permute(1, 2, 0, 3).flatten(2), weight.mT)
        gc, gn, gm = gc * forget, gn * forget, held
        if there is not None:
            gh = torch.where(there[t], gh, passed)
        if reset is not None:
            gh = torch.where(reset[:, t, None], 0, gh)
    dweight = torch.einsum("thbk,tghbj->ghkj", before[:, 0], draw)
    dstart = torch.stack([gh, gc, gn, gm]).permute(2, 0, 1, 3).contiguous()
    return draw.permute(3, 0, 1, 2, 4).contiguous(), dweight.contiguous(), dstart


def _slopes(
    x: Tensor, weight: Tensor, before: Tensor, states: Tensor, there: Tensor | None
) -> tuple[Tensor, ...]:
    """What the backward pass multiplies by, (T, H, B, K) each, all tokens at once.

    The forget and write gates, tanh(z); dh/dc and -dh/dn; the slopes of log sigmoid(f) by f, of c
    by z and of h by o; and where m follows the forget gate rather than the input gate. At masked
    tokens: what passes every gradient by.
    """
    h, c, n = states[:, 0], states[:, 1], states[:, 2]
    products = torch.unflatten(before[:, 0] @ weight, -1, (4, states.shape[-1])).permute(
        0, 3, 1, 2, 4
    )
    i, f, z, o = (x + products).unbind(1)
    kept = torch.where(before[:, 2] == 0, -torch.inf, logsigmoid(f) + before[:, 3])
    keeps = (kept >= i).to(x.dtype)
    top = torch.maximum(kept, i)
    forget, write = torch.exp(kept - top), torch.exp(i - top)
    tanh_z, sigmoid_o = torch.tanh(z), torch.sigmoid(o)
    slopes = (
        (forget, 1),
        (write, 0),
        (tanh_z, 0),
        (sigmoid_o / n, 0),
        (h / n, 0),
        (torch.sigmoid(-f), 0),
        (write * (1 - tanh_z.square()), 0),
        (c / n * sigmoid_o * (1 - sigmoid_o), 0),
        (keeps, 1),
    )
    if there is None:
        return tuple(x for x, _ in slopes)
    return tuple(torch.where(there, x, otherwise) for x, otherwise in slopes)


def _time_first(gates: Tensor) -> Tensor:
    """(B, T, 4, H, K) -> (T, 4, H, B, K)."""
    return gates.permute(1, 2, 3, 0, 4)


def _fused(recurrent: Tensor) -> Tensor:
    """(4, H, K, K) -> (H, K, 4 K): one product a step for all four gates."""
    return recurrent.permute(1, 2, 0, 3).flatten(2)
