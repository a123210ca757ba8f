"""Mamba's selective scan (S6): a diagonal state space whose step, input and output vary in time.

Carries Mamba, Falcon-Mamba and Jamba.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import Backend, accumulator, choose, declare, full_precision
from seqzoo.kernels.errors import check_shape
from seqzoo.kernels.operator import operator
from seqzoo.kernels.selective_scan.reference import selective_scan as reference_selective_scan

SINGLE = (torch.float32, torch.float16, torch.bfloat16)
MANY = "more than 64 states a channel"
declare(
    "selective_scan",
    Backend("native", ("cpu",), SINGLE, needs=("compiler",), lacks=frozenset([MANY])),
    Backend("fused", ("cuda",), SINGLE, needs=("triton",), lacks=frozenset([MANY])),
    Backend(
        "mamba_ssm",
        ("cuda",),
        SINGLE,
        needs=("mamba_ssm",),
        lacks=frozenset({"initial_state", "reset", "tracing"}),
    ),
    Backend("chunked"),
    Backend("reference"),
)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t for each channel and state; y_t = C_t . h_t + D u_t.

    O(T) time, and no tensor of (B, T, D, N): the backward pass computes states again from those at
    block borders. Gu and Dao, arXiv:2312.00752, algorithm 2; B is Euler's, as in the authors' code.

    Args:
        u: (B, T, D), any real floating dtype; states and sums are float32 or wider.
        dt: step sizes > 0, (B, T, D); 0 leaves the state as it is.
        A: (D, N), below 0.
        B: (B, T, N).
        C: (B, T, N).
        D: (D,), weight of the skip; none when None.
        initial_state: h before the first token, (B, D, N); zero when None.
        reset: (B, T) bool; True empties the state before the token.
        mask: (B, T) bool; False leaves the state untouched; y there means nothing. `reset` is never
            True there.
        backend: `native` (CPU), `fused` (CUDA), `mamba_ssm` (CUDA, when that package is there;
            neither initial_state nor reset, and no gradient of the state), `chunked` or
            `reference`; the first that can serve the call when None.

    Returns:
        y: (B, T, D) in the dtype of `u`.
        state: (B, D, N), the last h, in float32 or wider. Both are differentiable.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot serve the call.
    """
    _check(u, dt, A, B, C, D, reset, mask)
    rows, T, channels = u.shape
    N = A.shape[1]
    if mask is not None:
        dt = torch.where(mask[..., None], dt, 0)
    given = u.dtype
    wide = accumulator(torch.promote_types(u.dtype, A.dtype))
    features = _features(N, initial_state, reset)
    if initial_state is None:
        initial_state = u.new_zeros(rows, channels, N, dtype=wide)
    check_shape("initial_state", initial_state.shape, (rows, channels, N), "(B, D, N)")
    A, initial_state = A.to(wide), initial_state.to(wide)
    if wide != torch.float32:
        u = u.to(wide)
    chosen = choose("selective_scan", u, backend, features)
    if T == 1:
        chosen = "reference"  # a single step needs no block
    if chosen not in ("fused", "mamba_ssm"):  # which widen in registers
        u, dt, B, C = (x.to(wide) for x in (u, dt, B, C))
    with full_precision(u):
        if chosen == "reference":
            y, state = reference_selective_scan(u, dt, A, B, C, initial_state, reset)
        elif chosen == "mamba_ssm":
            from seqzoo.kernels.selective_scan.mamba_ssm import selective_scan as packaged

            y, state = packaged(u, dt, A, B, C)
        else:
            inputs = (u, dt, A, B, C, initial_state)
            trained = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
            keep = trained or chosen != "native"
            y, state, _ = _selective_scan(*inputs, reset, chosen, keep)
        y = y if D is None else torch.addcmul(y, u, D.to(wide))
    return y.to(given), state


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    reset: Tensor | None,
    mask: Tensor | None,
) -> None:
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(
            f"u is {tuple(u.shape)}, A is {tuple(A.shape)}; selective_scan takes (B, T, D), (D, N)"
        )
    rows, T, channels = u.shape
    N = A.shape[1]
    check_shape("dt", dt.shape, (rows, T, channels), "(B, T, D)")
    check_shape("A", A.shape, (channels, N), "(D, N)")
    check_shape("B", B.shape, (rows, T, N), "(B, T, N)")
    check_shape("C", C.shape, (rows, T, N), "(B, T, N)")
    if D is not None:
        check_shape("D", D.shape, (channels,), "(D,)")
    for name, flags in (("reset", reset), ("mask", mask)):
        if flags is not None:
            check_shape(name, flags.shape, (rows, T), "(B, T)")


def _features(N: int, initial_state: Tensor | None, reset: Tensor | None) -> tuple[str, ...]:
    asked = {
        MANY: N > 64,
        "initial_state": initial_state is not None,
        "reset": reset is not None,
        "tracing": torch.compiler.is_compiling(),
    }
    return tuple(name for name, is_asked in asked.items() if is_asked)


@operator("seqzoo::selective_scan")
def _selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    backend: str,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and what the backward pass needs: the states before each block.

    All in the dtype of the states: the skip is added before the output is rounded. `native` alone
    knows how not to keep the states.
    """
    options = {} if keep else {"keep": False}
    y, state, borders = _module(backend).forward(u, dt, A, B, C, initial_state, reset, **options)
    return y, state, borders


@_selective_scan.register_fake
def _(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    backend: str,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    step = _module(backend).BLOCK
    blocks = (u.shape[1] + step - 1) // step if keep else 0
    y = initial_state.new_empty(u.shape)
    return (
        y,
        initial_state.new_empty(initial_state.shape),
        initial_state.new_empty(blocks, *initial_state.shape),
    )


@operator("seqzoo::selective_scan_backward", like=("u", "dt", "A", "B", "C", "dstate"))
def _selective_scan_backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    reset: Tensor | None,
    borders: Tensor,
    dy: Tensor,
    dstate: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddt, dA, dB, dC, dstart = _module(backend).backward(
        u, dt, A, B, C, reset, borders, dy, dstate
    )
    return du, ddt, dA, dB, dC, dstart


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    u, dt, A, B, C, _, reset, ctx.backend, _ = inputs
    borders = output[2]
    ctx.mark_non_differentiable(borders)
    ctx.save_for_backward(u, dt, A, B, C, reset, borders)


def _differentiate(
    ctx: Any,  # noqa: ANN401  # torch's own type
    dy: Tensor,
    dstate: Tensor,
    _: Tensor,
) -> tuple[Tensor | None, ...]:
    with full_precision(dy):  # backward() may be called under autocast
        given = _selective_scan_backward(*ctx.saved_tensors, dy, dstate, ctx.backend)
    return *given, None, None, None


_selective_scan.register_autograd(_differentiate, setup_context=_save)


def _module(backend: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}")
