"""The selective scan by the package mamba-ssm: its CUDA kernels, without a state that comes in."""

from typing import Any

import torch
from torch import Tensor


def selective_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.selective_scan.selective_scan`; from zero, and without resets.

    Raises:
        RuntimeError: a backward pass through the state, which the package would take for zero.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    # It takes channels first, each with its tokens side by side, and inputs of one dtype.
    rows = (x.to(u.dtype).transpose(1, 2).contiguous() for x in (u, dt, B, C))
    u, dt, B, C = rows
    y, last = selective_scan_fn(u, dt, A, B, C, return_last_state=True)
    state: Tensor = _WithoutGradient.apply(last.detach(), y)  # type: ignore[no-untyped-call]
    return y.transpose(1, 2), state


class _WithoutGradient(torch.autograd.Function):
    """A state that hangs on the graph of y, so that asking for its gradient is noticed."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, y: Tensor) -> Tensor:  # noqa: ANN401
        return state.clone()

    @staticmethod
    def backward(ctx: Any, dstate: Tensor) -> tuple[None, None]:  # noqa: ANN401
        raise RuntimeError(
            "backend 'mamba_ssm' of selective_scan has no gradient of the last state; use fused"
        )
