"""The causal depthwise convolution of a few taps, with a tail carried from pass to pass.

Carries the local mixing of Mamba, Mamba-2, RG-LRU, H3, Hyena and the delta rules, and token shift.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from seqzoo.kernels.dispatch import Backend, accumulator, choose, declare, full_precision
from seqzoo.kernels.errors import check_shape, unknown
from seqzoo.kernels.operator import operator
from seqzoo.kernels.short_conv.chunked import short_conv as chunked_short_conv
from seqzoo.kernels.short_conv.reference import short_conv as reference_short_conv

HALF = (torch.float16, torch.bfloat16)
MANY = "more than 16 taps"
SOME = "more than 4 taps"
declare(
    "short_conv",
    Backend(
        "causal_conv1d",
        ("cuda",),
        (torch.float32, *HALF),
        needs=("causal_conv1d",),
        lacks=frozenset({"reset", "mask", "so few tokens", "so many taps", MANY, "tracing"}),
    ),
    Backend(
        "native",
        ("cpu",),
        (torch.float32, torch.float64, *HALF),
        needs=("compiler",),
        lacks=frozenset({MANY}),
    ),
    Backend(
        "fused",
        ("cuda",),
        (torch.float32, *HALF),
        needs=("triton",),
        lacks=frozenset({SOME}),
    ),
    Backend("chunked"),
    Backend("reference"),
)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_j weight[:, W-1-j] x_{t-j}), j = 0 ... W-1.

    O(T W) time. The last column of `weight` meets the newest token, as in `nn.Conv1d`. Gu and Dao,
    "Mamba", arXiv:2312.00752, section 3.4; Fu et al., "H3", arXiv:2212.14052, section 3.1.

    Args:
        x: (B, T, D), any real floating dtype; sums are float32 or wider.
        weight: (D, W), W >= 1.
        bias: (D,); zero when None.
        activation: None or `silu`.
        initial_state: the W - 1 inputs before the first token, oldest first, (B, W-1, D); zeros
            when None.
        reset: (B, T) bool; True puts zeros before the token.
        mask: (B, T) bool; a token where it is False is skipped, and y there is 0. `reset` is never
            True there.
        backend: `causal_conv1d` (CUDA, 2 to 4 taps, neither reset nor mask, when that package is
            there), `native` (CPU, up to 16 taps), `fused` (CUDA, up to 4 taps), `chunked` or
            `reference`; the first that can serve the call when None.

    Returns:
        y: (B, T, D) in the dtype of `x`.
        tail: (B, W-1, D), the last W - 1 unmasked inputs as they came, zeros where the document has
            fewer; in the dtype of `x`, or that of `initial_state` when wider. Both are
            differentiable.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, or a backend that cannot serve
            the call.
    """
    _check(x, weight, bias, activation, reset, mask)
    B, T, D = x.shape
    W = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(B, W - 1, D)
    check_shape("initial_state", initial_state.shape, (B, W - 1, D), "(B, W-1, D)")
    given, kept = x.dtype, torch.promote_types(x.dtype, initial_state.dtype)
    wide = accumulator(torch.promote_types(x.dtype, weight.dtype))
    if wide != torch.float32:
        x = x.to(wide)
    chosen = choose("short_conv", x, backend, _features(T, W, reset, mask))
    if chosen == "causal_conv1d":
        from seqzoo.kernels.short_conv.causal_conv1d import short_conv as packaged_short_conv

        tail = initial_state.to(x.dtype)
        return packaged_short_conv(x, weight, bias, tail, activation)
    bias = weight.new_zeros(D) if bias is None else bias
    weight, bias, tail = (v.to(wide) for v in (weight, bias, initial_state))
    if chosen != "fused":  # which widens in registers
        x = x.to(wide)
    if chosen in ("native", "fused"):
        y, tail = _short_conv(x, weight, bias, tail, reset, mask, activation == "silu", chosen)
        return y.to(given), tail.to(kept)
    run = reference_short_conv if chosen == "reference" else chunked_short_conv
    if mask is not None:
        x = torch.where(mask[..., None], x, 0)
    with full_precision(x):
        y, tail = run(x, weight, bias, tail, reset, mask)
        y = silu(y) if activation == "silu" else y
    return y.to(given), tail.to(kept)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    reset: Tensor | None,
    mask: Tensor | None,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x is {tuple(x.shape)}; short_conv takes (B, T, D)")
    B, T, D = x.shape
    if weight.ndim != 2 or weight.shape[1] < 1:
        raise ValueError(f"weight is {tuple(weight.shape)}; short_conv takes (D, W), W >= 1")
    check_shape("weight", weight.shape, (D, weight.shape[1]), "(D, W)")
    if bias is not None:
        check_shape("bias", bias.shape, (D,), "(D,)")
    if activation not in (None, "silu"):
        raise unknown("activation of short_conv named", activation, ("silu",))
    for name, flags in (("reset", reset), ("mask", mask)):
        if flags is not None:
            check_shape(name, flags.shape, (B, T), "(B, T)")


@operator("seqzoo::short_conv", like=("x", "tail"))
def _short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    silu: bool,
    backend: str = "native",
) -> tuple[Tensor, Tensor]:
    y, last = _module(backend).forward(x, weight, bias, tail, reset, mask, silu)
    return y, last


@operator("seqzoo::short_conv_backward", like=("x", "weight", "bias", "tail"))
def _short_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    dy: Tensor,
    dtail: Tensor,
    silu: bool,
    backend: str = "native",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, dbias, dstart = _module(backend).backward(
        x, weight, bias, tail, reset, mask, dy, dtail, silu
    )
    return dx, dweight, dbias, dstart


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    *given, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(*given)


def _differentiate(ctx: Any, dy: Tensor, dtail: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    given = _short_conv_backward(*ctx.saved_tensors, dy, dtail, ctx.silu, ctx.backend)
    return *given, None, None, None, None


_short_conv.register_autograd(_differentiate, setup_context=_save)


def _module(backend: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}")


def _features(T: int, W: int, reset: Tensor | None, mask: Tensor | None) -> tuple[str, ...]:
    asked = {
        "reset": reset is not None,
        "mask": mask is not None,
        "so few tokens": max(W - 1, 1) > T,
        "so many taps": not 2 <= W <= 4,
        SOME: W > 4,
        MANY: W > 16,
        "tracing": torch.compiler.is_compiling(),
    }
    return tuple(name for name, is_asked in asked.items() if is_asked)
