"""The causal long convolution, y_t = sum_{s <= t} kernel_{t-s} u_s, with one kernel a channel.

Carries S4, S4D, DSS, H3, Hyena and MEGA.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import Backend, accumulator, choose, declare
from seqzoo.kernels.errors import check_shape
from seqzoo.kernels.long_conv.reference import long_conv as reference_long_conv
from seqzoo.kernels.operator import operator

REAL = (torch.float32, torch.float64)
DOCUMENTS = "documents"
declare(
    "long_conv",
    Backend("native", ("cpu",), REAL, needs=("compiler",), lacks=frozenset([DOCUMENTS])),
    Backend("chunked"),
    Backend("reference"),
)


def long_conv(
    u: Tensor,
    kernel: Tensor,
    *,
    skip: Tensor | None = None,
    document: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y_t = sum_{s <= t} kernel[:, t - s] u_s + skip u_t.

    O(T log T) time by FFT. The FFT rounds: a future token moves past outputs by some 1e-7 of the
    largest input, and an infinite or NaN one reaches its whole row. With `document`: O(T log^2 T),
    and exactly causal, since each FFT goes from earlier tokens to later ones alone.
    Gu et al., "Efficiently Modeling Long Sequences with Structured State Spaces", arXiv:2111.00396,
    section 2.4.

    Args:
        u: (B, T, D), any real floating dtype; half precision is computed in float32.
        kernel: (D, L), L >= 1; zero beyond L, cut when L > T.
        skip: (D,) weight of the input itself; none when None.
        document: (B, T) integers; a change of value from one token to the next starts a document,
            and no term of the sum crosses into another one.
        backend: `native` and `chunked` (FFT) or `reference` (the explicit sum); the first that can
            serve the call when None.

    Returns:
        y: (B, T, D) in the dtype of `u`.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot serve the call.
    """
    if u.ndim != 3:
        raise ValueError(f"u is {tuple(u.shape)}; long_conv takes (B, T, D)")
    B, T, D = u.shape
    if kernel.ndim != 2 or kernel.shape[1] < 1:
        raise ValueError(f"kernel is {tuple(kernel.shape)}; long_conv takes (D, L) with L >= 1")
    check_shape("kernel", kernel.shape, (D, kernel.shape[1]), "(D, L)")
    if skip is not None:
        check_shape("skip", skip.shape, (D,), "(D,)")
    runs = None
    if document is not None:
        check_shape("document", document.shape, (B, T), "(B, T)")
        runs = (document[:, 1:] != document[:, :-1]).cumsum(1)
        runs = torch.cat([torch.zeros_like(document[:, :1], dtype=runs.dtype), runs], dim=1)
    given, wide = u.dtype, accumulator(torch.promote_types(u.dtype, kernel.dtype))
    u, kernel = u.to(wide), kernel[:, : max(T, 1)].to(wide)
    chosen = choose("long_conv", u, backend, () if runs is None else (DOCUMENTS,))
    if chosen == "reference":
        y = reference_long_conv(u, kernel, runs)
    else:
        y = _long_conv(u, kernel, runs, chosen)
    if skip is not None:
        y = y + skip.to(wide) * u
    return y.to(given)


@operator("seqzoo::long_conv", like=("u",))
def _long_conv(u: Tensor, kernel: Tensor, runs: Tensor | None, backend: str) -> Tensor:
    y: Tensor = _module(backend).forward(u, kernel, runs)
    return y


@operator("seqzoo::long_conv_backward", like=("u", "kernel"))
def _long_conv_backward(
    u: Tensor, kernel: Tensor, runs: Tensor | None, dy: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    du, dkernel = _module(backend).backward(u, kernel, runs, dy)
    return du, dkernel


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    u, kernel, runs = ctx.saved_tensors
    return *_long_conv_backward(u, kernel, runs, dy, ctx.backend), None, None


_long_conv.register_autograd(_differentiate, setup_context=_save)


def _module(backend: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}")
