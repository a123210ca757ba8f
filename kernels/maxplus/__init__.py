"""The running maximum m_t = max(a_t + m_{t-1}, b_t), which keeps exponential gates from overflow.

Carries mLSTM and causal Performer: what they sum with weights exp(b_s), decayed, they keep as a
multiple of exp(m_t), see `stabilised`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import Backend, accumulator, choose, declare, full_precision
from seqzoo.kernels.errors import check_shape
from seqzoo.kernels.maxplus.chunked import backward as chunked_backward
from seqzoo.kernels.maxplus.chunked import forward as chunked_forward
from seqzoo.kernels.maxplus.reference import maxplus as reference_maxplus
from seqzoo.kernels.operator import operator

declare("maxplus", Backend("chunked"), Backend("reference"))
EMPTY = -1e38  # the maximum of no tokens


def maxplus(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """m_t = max(a_t + m_{t-1}, b_t): the linear recurrence of the max-plus algebra.

    O(T) time. The stabiliser of Beck et al., "xLSTM", arXiv:2405.04517, equation 15.

    Args:
        a: (B, T, D), below infinity; -inf forgets what came before. Any real floating dtype.
        b: (B, T, D), below infinity.
        initial_state: m before the first token, (B, D); -1e38, the maximum of nothing, when None.
        reset: (B, T) bool; True forgets what came before the token.
        mask: (B, T) bool; False leaves the state untouched, and m there repeats it.
        backend: `chunked` or `reference`; `chunked` when None.

    Returns:
        m: (B, T, D) in float32 or wider.
        state: (B, D), the last m. Both are differentiable; at a tie each side has half a gradient.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot serve the call.
    """
    if b.ndim != 3:
        raise ValueError(f"b is {tuple(b.shape)}; maxplus takes (B, T, D)")
    B, T, D = b.shape
    check_shape("a", a.shape, (B, T, D), "(B, T, D)")
    wide = accumulator(torch.promote_types(a.dtype, b.dtype))
    if initial_state is None:
        initial_state = torch.full((B, D), EMPTY, device=b.device, dtype=wide)
    check_shape("initial_state", initial_state.shape, (B, D), "(B, D)")
    a, b, initial_state = a.to(wide), b.to(wide), initial_state.to(wide)
    if reset is not None:
        check_shape("reset", reset.shape, (B, T), "(B, T)")
        a = torch.where(reset[..., None], -torch.inf, a)
    if mask is not None:
        check_shape("mask", mask.shape, (B, T), "(B, T)")
        a, b = torch.where(mask[..., None], a, 0), torch.where(mask[..., None], b, -torch.inf)
    if T == 0:
        return b, initial_state
    if choose("maxplus", b, backend) == "reference":
        return reference_maxplus(a, b, initial_state)
    m = _maxplus(a, b, initial_state)
    return m, m[:, -1]


class Stabilised(NamedTuple):
    """Of sums kept as multiples of exp(m): all (B, T, D), the logs not above zero.

    Attributes:
        log_decay: of the sums, from the multiple before to the multiple after a token.
        log_write: weight of what the token adds.
        m: log of the multiple.
        state: the last m, (B, D).
    """

    log_decay: Tensor
    log_write: Tensor
    m: Tensor
    state: Tensor


def stabilised(
    log_decay: Tensor,
    log_write: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Stabilised:
    """Gates of s_t = f_t s_{t-1} + i_t u_t when s is kept as a multiple of exp(m_t).

    With m_t = max(log f_t + m_{t-1}, log i_t) the multiple has the gates exp(log f_t + m_{t-1} -
    m_t) and exp(log i_t - m_t), of which one is 1, exactly. At a token that `reset` or `mask` picks
    the decay means nothing: give both to the kernel that sums.

    Args:
        log_decay: log f, (B, T, D), not above zero.
        log_write: log i, (B, T, D), below infinity.
        initial_state: m before the first token, (B, D); -1e38 when None.
        reset: see `maxplus`.
        mask: see `maxplus`.
        backend: see `maxplus`.
    """
    m, state = maxplus(
        log_decay,
        log_write,
        initial_state=initial_state,
        reset=reset,
        mask=mask,
        backend=backend,
    )
    start = torch.full_like(state, EMPTY) if initial_state is None else initial_state.to(m.dtype)
    before = torch.cat([start[:, None], m], dim=1)[:, :-1]
    carried = log_write < m  # the rounding of m must not decay what has just been carried over
    decay = torch.where(carried, 0, (log_decay + before - m).clamp(max=0))
    return Stabilised(decay, (log_write - m).clamp(max=0), m, state)


@operator("seqzoo::maxplus", like=("b",))
def _maxplus(a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    return chunked_forward(a, b, initial_state)


@operator("seqzoo::maxplus_backward", like=("b", "b", "initial_state"))
def _maxplus_backward(
    a: Tensor, b: Tensor, m: Tensor, initial_state: Tensor, dm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with full_precision(b):
        return chunked_backward(a, b, m, initial_state, dm)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    a, b, initial_state = inputs
    ctx.save_for_backward(a, b, output, initial_state)


def _differentiate(ctx: Any, dm: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
    a, b, m, initial_state = ctx.saved_tensors
    da, db, dstart = _maxplus_backward(a, b, m, initial_state, dm)
    return da, db, dstart


_maxplus.register_autograd(_differentiate, setup_context=_save)
