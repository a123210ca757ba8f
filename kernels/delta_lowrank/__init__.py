"""A state that decays, moves something of itself elsewhere, and takes a write: diagonal + low rank.

Carries RWKV-7.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.decay.operators import differentiate
from seqzoo.kernels.delta import SINGLE
from seqzoo.kernels.delta.inputs import begin, check_heads, columns, empty_outputs, where_real
from seqzoo.kernels.delta_lowrank.chunked import step
from seqzoo.kernels.delta_lowrank.reference import delta_lowrank as reference_delta_lowrank
from seqzoo.kernels.dispatch import Backend, choose, declare, full_precision
from seqzoo.kernels.operator import operator

declare(
    "delta_lowrank",
    Backend("fused", ("cuda",), SINGLE, needs=("triton",)),
    Backend("chunked"),
    Backend("reference"),
)


def delta_lowrank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = (Diag(w_t) + b_t a_t^T) S_{t-1} + k_t v_t^T; o_t = scale q_t^T S_t.

    With w = exp(log_decay). O(T K V) time. What a reads has not decayed yet at its token. The
    caller keeps the transition from growing: RWKV-7 has a = -n and b = n * gate, n the normalised
    removal key and the gate in [0, 1] a key channel. The delta rule is a = -w * k, b = beta k, with
    beta v for v. Peng et al., "RWKV-7 Goose", arXiv:2503.14456, section 4.

    Args:
        q: queries (B, T, H, K); RWKV-7 calls them r.
        k: keys (B, T, H, K).
        v: values (B, T, H, V).
        a: what is read of the state, (B, T, H, K).
        b: where what was read is added, (B, T, H, K).
        log_decay: <= 0, -inf included; (B, T, H, K) or (B, T, H).
        scale: factor of the output.
        initial_state: S before the first token, (B, H, K, V); zero when None.
        reset: (B, T) bool; True empties the state before the token.
        mask: (B, T) bool; False leaves the state untouched, and o there means nothing.
        backend: `fused` (CUDA), `chunked` or `reference`; the first that can serve the call when
            None.

    Returns:
        o: (B, T, H, V) in the dtype of `v`.
        state: (B, H, K, V), the last S, in float32 or wider. Both are differentiable.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot serve the call.
    """
    check_heads("delta_lowrank", v, k, log_decay, q=q, a=a, b=b)
    state = begin(v, k.shape[-1], (q, k, a, b, log_decay), initial_state, reset, mask)
    wide = state.dtype
    chosen = choose("delta_lowrank", v if wide == torch.float32 else state, backend)
    with full_precision(v):
        q = q if scale == 1 else q.to(wide) * scale
        if chosen == "reference":
            q, k, values, a, b, g = (x.to(wide) for x in (q, k, v, a, b, log_decay))
            o, state = reference_delta_lowrank(q, k, values, a, b, g, state, reset, mask)
        else:
            o, state = _fast(q, k, v, a, b, log_decay, state, reset, mask, chosen)
    return o.to(v.dtype), state


def _fast(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Everything said with a, b, keys and decays alone, then the chunks."""
    if v.shape[0] * v.shape[1] == 0:
        return v, state
    k, a, b, g = where_real(mask, k, a, b, columns(log_decay, v))
    if reset is not None:  # a reads before the decay
        g = torch.where(reset[..., None, None], -torch.inf, g)
        a = torch.where(reset[..., None, None], 0, a)
    if backend == "fused":  # whose decays are those of channels
        g = g.to(state.dtype).expand(k.shape)
    if v.shape[1] == 1:
        if backend == "fused":
            o, last = _step(q, k, v, a, b, g, state, backend)
            return o, last
        return step(q, k, v, a, b, g, state)
    o, last, _ = _chunks(q, k, v, a, b, g, state, backend)
    return o, last


@operator("seqzoo::delta_lowrank")
def _chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    initial_state: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    o, states = _module(backend).forward(q, k, v, a, b, g, initial_state)
    return o, states[-1].clone(), states


@_chunks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    return empty_outputs(v, *others[-2:])


@operator("seqzoo::delta_lowrank_backward", like=("q", "k", "v", "a", "b", "g", "dstate"))
def _chunks_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    states: Tensor,
    do: Tensor,
    dstate: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with full_precision(v):
        dq, dk, dv, da, db, dg, dstart = _module(backend).backward(
            q, k, v, a, b, g, states, do, dstate
        )
    return dq, dk, dv, da, db, dg, dstart


@operator("seqzoo::delta_lowrank_step", like=("v", "initial_state"))
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    initial_state: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """One token, without the states that a chunk would keep."""
    o, state = _module(backend).step(q, k, v, a, b, g, initial_state)
    return o, state


differentiate(_chunks, _chunks_backward, _step)


def _module(backend: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}")
