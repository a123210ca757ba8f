"""Several delta-rule steps a token: a state transition that is a product of Householder matrices.

Carries DeltaProduct. n steps at T tokens are the delta rule at n T tokens.
"""

import torch
from torch import Tensor

from seqzoo.kernels.delta import delta
from seqzoo.kernels.errors import check_shape


def delta_product(
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
    """S = Diag(w_t) S_{t-1}; n times S += beta_ti k_ti (v_ti - S^T k_ti)^T; o_t = scale q_t^T S.

    With w = exp(log_decay): the state decays once a token, before its first step, and is read after
    its last. O(n T K V) time. Siems et al., "DeltaProduct", arXiv:2502.10297, section 3.

    Args:
        q: queries (B, T, H, K).
        k: keys of the n steps of each token, in order, (B, T, n, H, K), of norm 1.
        v: their values (B, T, n, H, V).
        beta: how much of what the key holds is replaced, (B, T, n, H), in [0, 2].
        log_decay: as in `seqzoo.kernels.delta.delta`: (B, T, H), (B, T, H, K) or None.
        scale: factor of the output.
        initial_state: S before the first token, (B, H, K, V); zero when None.
        reset: (B, T) bool; True empties the state before the token.
        mask: (B, T) bool; False leaves the state untouched, and o there means nothing.
        backend: one of `delta`.

    Returns:
        o: (B, T, H, V) in the dtype of `v`.
        state: (B, H, K, V), the last S, in float32 or wider. Both are differentiable.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot serve the call.
    """
    if k.ndim != 5 or k.shape[2] == 0:
        raise ValueError(f"k is {tuple(k.shape)}; delta_product takes (B, T, n, H, K), n >= 1")
    B, T, n, H, K = k.shape
    check_shape("q", q.shape, (B, T, H, K), "(B, T, H, K)")
    check_shape("v", v.shape, (B, T, n, H, v.shape[-1]), "(B, T, n, H, V)")
    check_shape("beta", beta.shape, (B, T, n, H), "(B, T, n, H)")
    for name, x in (("log_decay", log_decay), ("reset", reset), ("mask", mask)):
        if x is not None:
            check_shape(name, x.shape[:2], (B, T), "(B, T, ...)")
    o, state = delta(
        _at(n - 1, q, n),
        k.flatten(1, 2),
        v.flatten(1, 2),
        beta.flatten(1, 2),
        None if log_decay is None else _at(0, log_decay, n),
        scale=scale,
        initial_state=initial_state,
        reset=None if reset is None else _at(0, reset, n),
        mask=None if mask is None else mask.repeat_interleave(n, dim=1),
        backend=backend,
    )
    return o[:, n - 1 :: n], state


def _at(step: int, x: Tensor, n: int) -> Tensor:
    """(B, T, ...) as (B, n T, ...): each token's own at that step of it, zero at the others."""
    if n == 1:
        return x
    x = x[:, :, None]
    zeros = torch.zeros_like(x)
    return torch.cat([zeros] * step + [x] + [zeros] * (n - 1 - step), dim=2).flatten(1, 2)
