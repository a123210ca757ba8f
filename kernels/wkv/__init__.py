"""The running softmax-weighted average of RWKV-4, in log space.

Carries RWKV-4 and, without decay, AFT-simple.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import Backend, accumulator, choose, declare
from seqzoo.kernels.errors import check_shape
from seqzoo.kernels.operator import operator
from seqzoo.kernels.wkv.reference import wkv as reference_wkv

REAL = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
declare(
    "wkv",
    Backend("native", ("cpu",), (*REAL, *HALF), needs=("compiler",)),
    Backend("fused", ("cuda",), (torch.float32,), needs=("triton",)),
    Backend("chunked"),
    Backend("reference"),
)
EMPTY = -1e38  # the log maximum of no tokens


def wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = (sum_{i<t} e^{k_i - (t-1-i) w} v_i + e^{u + k_t} v_t) / (the same without v).

    O(T) time, and of the states only those at block borders outlive the forward pass. Peng et al.,
    "RWKV", arXiv:2305.13048, section 3.1.

    The state holds what the sums over i < t would be at the next token: numerator a e^p and
    denominator b e^p, where p is the largest exponent so far. It means the same as
    (a e^c, b e^c, p - c) for any c. Gradients are the derivatives of the three numbers as returned,
    p a maximum; of whatever depends on the state by its meaning alone they are exact at ties too.

    Args:
        k: (B, T, D), any real floating dtype; exponents, sums and states are float32 or wider.
        v: (B, T, D).
        w: decay, (D,), not below 0.
        u: bonus of the current token, (D,).
        initial_state: (B, 3, D), see above; (0, 0, -1e38), no tokens, when None.
        reset: (B, T) bool; True empties the state before the token.
        mask: (B, T) bool; False leaves the state untouched, and y there is 0. `reset` is never
            True there.
        backend: `native`, `fused`, `chunked` or `reference`; chosen by device and dtype when None.

    Returns:
        y: (B, T, D) in the dtype of `v`.
        state: (B, 3, D), float32 or wider. Both are differentiable.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot serve the call.
    """
    if k.ndim != 3:
        raise ValueError(f"k is {tuple(k.shape)}; wkv takes (B, T, D)")
    B, T, D = k.shape
    check_shape("v", v.shape, (B, T, D), "(B, T, D)")
    check_shape("w", w.shape, (D,), "(D,)")
    check_shape("u", u.shape, (D,), "(D,)")
    for name, flags in (("reset", reset), ("mask", mask)):
        if flags is not None:
            check_shape(name, flags.shape, (B, T), "(B, T)")
    given, wide = v.dtype, accumulator(torch.promote_types(k.dtype, v.dtype))
    if initial_state is None:
        initial_state = no_tokens(B, D, k.device, wide)
    check_shape("initial_state", initial_state.shape, (B, 3, D), "(B, 3, D)")
    k, v, w, u, initial_state = (x.to(wide) for x in (k, v, w, u, initial_state))
    chosen = choose("wkv", k, backend)
    if chosen == "reference":
        y, state = reference_wkv(k, v, w, u, initial_state, reset, mask)
    else:
        y, state, _ = _wkv(k, v, w, u, initial_state, reset, mask, chosen)
    return y.to(given), state


def no_tokens(
    batch_size: int, channels: int, device: torch.device | str | None, dtype: torch.dtype
) -> Tensor:
    """The state before the first token, (B, 3, D)."""
    sums = torch.zeros(batch_size, 2, channels, device=device, dtype=dtype)
    return torch.cat([sums, torch.full_like(sums[:, :1], EMPTY)], dim=1)


@operator("seqzoo::wkv")
def _wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and what the backward pass needs: the states before each block."""
    y, state, borders = _module(backend).forward(k, v, w, u, initial_state, reset, mask)
    return y, state, borders


@_wkv.register_fake
def _(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    step = _module(backend).BLOCK
    blocks = (k.shape[1] + step - 1) // step
    return (
        k.new_empty(k.shape),
        initial_state.new_empty(initial_state.shape),
        initial_state.new_empty(blocks, *initial_state.shape),
    )


@operator("seqzoo::wkv_backward", like=("k", "v", "w", "u", "dstate"))
def _wkv_backward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    borders: Tensor,
    dy: Tensor,
    dstate: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dk, dv, dw, du, dstart = _module(backend).backward(k, v, w, u, reset, mask, borders, dy, dstate)
    return dk, dv, dw, du, dstart


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    k, v, w, u, start, reset, mask, ctx.backend = inputs
    _, state, borders = output
    ctx.mark_non_differentiable(borders)
    ctx.save_for_backward(k, v, w, u, start, reset, mask, state, borders)


def _differentiate(
    ctx: Any,  # noqa: ANN401  # torch's own type
    dy: Tensor,
    dstate: Tensor,
    _: Tensor,
) -> tuple[Tensor | None, ...]:
    """Backends see gradients of a and b with p held, and of p with a e^p and b e^p held."""
    k, v, w, u, start, reset, mask, state, borders = ctx.saved_tensors
    dstate = _add_to_p(dstate, state, -1)
    given = _wkv_backward(k, v, w, u, reset, mask, borders, dy, dstate, ctx.backend)
    return *given[:4], _add_to_p(given[4], start, 1), None, None, None


def _add_to_p(gradient: Tensor, state: Tensor, sign: int) -> Tensor:
    """Add what p does to a e^p and b e^p: a da + b db."""
    dsums, dp = gradient[:, :2], gradient[:, 2:]
    return torch.cat([dsums, dp + sign * (state[:, :2] * dsums).sum(1, keepdim=True)], dim=1)


_wkv.register_autograd(_differentiate, setup_context=_save)


def _module(backend: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}")
