"""The delta rule: a state that corrects what it holds under a key, S += beta k (v - S^T k)^T.

Carries DeltaNet, Gated DeltaNet and Kimi delta attention.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.decay.operators import differentiate
from seqzoo.kernels.delta.chunked import step
from seqzoo.kernels.delta.inputs import begin, check_heads, columns, empty_outputs, where_real
from seqzoo.kernels.delta.reference import delta as reference_delta
from seqzoo.kernels.dispatch import Backend, choose, declare, full_precision
from seqzoo.kernels.errors import check_shape
from seqzoo.kernels.operator import operator

SINGLE = (torch.float32, torch.float16, torch.bfloat16)
declare(
    "delta",
    Backend("native", ("cpu",), (*SINGLE, torch.float64), needs=("compiler",)),
    Backend("fused", ("cuda",), SINGLE, needs=("triton",)),
    Backend("chunked"),
    Backend("reference"),
)


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """S = Diag(w_t) S_{t-1}; S_t = S + beta_t k_t (v_t - S^T k_t)^T; o_t = scale q_t^T S_t.

    With w = exp(log_decay). O(T K V) time. The caller normalises the keys: the state stays bounded
    while beta |k|^2 is in [0, 2], and explodes beyond. Yang et al., "Parallelizing Linear
    Transformers with the Delta Rule", arXiv:2406.06484; "Gated Delta Networks", arXiv:2412.06464;
    Kimi Team, "Kimi Linear", arXiv:2510.26692; above beta = 1, Grazzi et al., arXiv:2411.12537.

    Args:
        q: queries (B, T, H, K).
        k: keys (B, T, H, K), of norm 1.
        v: values (B, T, H, V).
        beta: how much of what the key holds is replaced, (B, T, H), in [0, 2].
        log_decay: <= 0, -inf included; (B, T, H), (B, T, H, K) for a decay per key channel, or None
            for none.
        scale: factor of the output.
        initial_state: S before the first token, (B, H, K, V); zero when None.
        reset: (B, T) bool; True empties the state before the token.
        mask: (B, T) bool; False leaves the state untouched, and o there means nothing.
        backend: `native` (CPU), `fused` (CUDA), `chunked` or `reference`; the first that can serve
            the call when None.

    Returns:
        o: (B, T, H, V) in the dtype of `v`.
        state: (B, H, K, V), the last S, in float32 or wider. Both are differentiable.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot serve the call.
    """
    check_heads("delta", v, k, log_decay, q=q)
    check_shape("beta", beta.shape, v.shape[:3], "(B, T, H)")
    state = begin(v, k.shape[-1], (q, k, beta, log_decay), initial_state, reset, mask)
    wide = state.dtype
    chosen = choose("delta", v if wide == torch.float32 else state, backend)
    with full_precision(v):
        q = q if scale == 1 else q.to(wide) * scale
        if chosen == "reference":
            g = None if log_decay is None else log_decay.to(wide)
            q, k, values, beta = (x.to(wide) for x in (q, k, v, beta))
            o, state = reference_delta(q, k, values, beta, g, state, reset, mask)
        else:
            o, state = _fast(q, k, v, beta, log_decay, state, reset, mask, chosen)
    return o.to(v.dtype), state


def _fast(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Everything said with keys, betas and decays alone, then the chunks."""
    if v.shape[0] * v.shape[1] == 0:
        return v, state
    k, beta, g = where_real(mask, k, beta[..., None], columns(g, beta))
    if reset is not None:
        g = torch.where(reset[..., None, None], -torch.inf, g)
    if v.shape[1] == 1:
        if backend == "fused":
            o, last = _step(q, k, v, beta, g, state, backend)
            return o, last
        return step(q, k, v, beta, g, state)
    o, last, _ = _chunks(q, k, v, beta, g, state, backend)
    return o, last


@operator("seqzoo::delta")
def _chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    initial_state: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    o, states = _module(backend).forward(q, k, v, beta, g, initial_state)
    return o, states[-1].clone(), states


@_chunks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    return empty_outputs(v, *others[-2:])


@operator("seqzoo::delta_backward", like=("q", "k", "v", "beta", "g", "dstate"))
def _chunks_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    states: Tensor,
    do: Tensor,
    dstate: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with full_precision(v):
        dq, dk, dv, dbeta, dg, dstart = _module(backend).backward(
            q, k, v, beta, g, states, do, dstate
        )
    return dq, dk, dv, dbeta, dg, dstart


@operator("seqzoo::delta_step", like=("v", "initial_state"))
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    initial_state: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """One token, without the states that a chunk would keep."""
    o, state = _module(backend).step(q, k, v, beta, g, initial_state)
    return o, state


differentiate(_chunks, _chunks_backward, _step)


def _module(backend: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}")
