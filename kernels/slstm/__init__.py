"""The sLSTM cell: an LSTM with an exponential input gate, a normaliser and recurrence per head.

Its gates read the output of the step before, so time is walked token by token whatever the backend.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import Backend, accumulator, choose, declare, full_precision
from seqzoo.kernels.errors import check_shape
from seqzoo.kernels.operator import operator
from seqzoo.kernels.slstm.reference import slstm as reference_slstm

declare("slstm", Backend("chunked"), Backend("reference"))


def slstm(
    gates: Tensor,
    recurrent: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(i, f, z, o)_t = gates_t + R h_{t-1}, then the stabilised cell.

        m_t = max(log sigmoid(f_t) + m_{t-1}, i_t)
        c_t = exp(log sigmoid(f_t) + m_{t-1} - m_t) c_{t-1} + exp(i_t - m_t) tanh(z_t)
        n_t = exp(log sigmoid(f_t) + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t)
        h_t = sigmoid(o_t) c_t / n_t

    A state of zeros is empty: where n is 0, m counts as minus infinity, so that the first token has
    m = i and n = 1. From there n >= 1, whatever the gates. O(T) time, and steps of it. Beck et al.,
    "xLSTM", arXiv:2405.04517, section 2.2 and appendix A.

    Args:
        gates: what the input gives to i, f, z and o, (B, T, 4, H, K), any real floating dtype.
        recurrent: R, (4, H, K, K): R[g, h, k, j] takes h_k of head h to unit j of its gate g.
        initial_state: h, c, n and m before the first token, (B, 4, H, K); empty when None.
        reset: (B, T) bool; True empties the state before the token.
        mask: (B, T) bool; False leaves the state untouched, and h there repeats it. `reset` is
            never True there.
        backend: `chunked` or `reference`; `chunked` when None.

    Returns:
        h: (B, T, H, K) in the dtype of `gates`.
        state: (B, 4, H, K), the last h, c, n and m, in float32 or wider. Both are differentiable.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot serve the call.
    """
    if gates.ndim != 5 or gates.shape[2] != 4:
        raise ValueError(f"gates is {tuple(gates.shape)}; slstm takes (B, T, 4, H, K)")
    B, T, _, H, K = gates.shape
    check_shape("recurrent", recurrent.shape, (4, H, K, K), "(4, H, K, K)")
    for name, flags in (("reset", reset), ("mask", mask)):
        if flags is not None:
            check_shape(name, flags.shape, (B, T), "(B, T)")
    given, wide = gates.dtype, accumulator(torch.promote_types(gates.dtype, recurrent.dtype))
    if initial_state is None:
        initial_state = gates.new_zeros(B, 4, H, K, dtype=wide)
    check_shape("initial_state", initial_state.shape, (B, 4, H, K), "(B, 4, H, K)")
    gates, recurrent, initial_state = (x.to(wide) for x in (gates, recurrent, initial_state))
    chosen = choose("slstm", gates, backend)
    with full_precision(gates):
        if chosen == "reference":
            h, state = reference_slstm(gates, recurrent, initial_state, reset, mask)
        else:
            h, state, _ = _slstm(gates, recurrent, initial_state, reset, mask, chosen)
    return h.to(given), state


@operator("seqzoo::slstm")
def _slstm(
    gates: Tensor,
    recurrent: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and what the backward pass needs: the state after every token."""
    h, state, states = _module(backend).forward(gates, recurrent, initial_state, reset, mask)
    return h, state, states


@_slstm.register_fake
def _(
    gates: Tensor,
    recurrent: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _, H, K = gates.shape
    return (
        gates.new_empty(B, T, H, K),
        initial_state.new_empty(initial_state.shape),
        gates.new_empty(T, 4, H, B, K),
    )


@operator("seqzoo::slstm_backward", like=("gates", "recurrent", "initial_state"))
def _slstm_backward(
    gates: Tensor,
    recurrent: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    states: Tensor,
    dh: Tensor,
    dstate: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dgates, drecurrent, dstart = _module(backend).backward(
        gates, recurrent, initial_state, reset, mask, states, dh, dstate
    )
    return dgates, drecurrent, dstart


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    gates, recurrent, initial_state, reset, mask, ctx.backend = inputs
    states = output[2]
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(gates, recurrent, initial_state, reset, mask, states)


def _differentiate(
    ctx: Any,  # noqa: ANN401  # torch's own type
    dh: Tensor,
    dstate: Tensor,
    _: Tensor,
) -> tuple[Tensor | None, ...]:
    with full_precision(dh):  # backward() may be called under autocast
        given = _slstm_backward(*ctx.saved_tensors, dh, dstate, ctx.backend)
    return *given, None, None, None


_slstm.register_autograd(_differentiate, setup_context=_save)


def _module(backend: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}")
