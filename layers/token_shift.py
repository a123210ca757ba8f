"""RWKV's token shift: what the token before was, one token late, whatever is masked or packed."""

import torch
from torch import Tensor

from seqzoo.kernels.short_conv import short_conv
from seqzoo.layers.base import Context


def token_shift(x: Tensor, start: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor]:
    """Each token's predecessor: the last real token of its document, zero for the first.

    Args:
        x: (B, T, D).
        start: (B, 1, D), the token before the pass; zero when None.
        ctx: the pass, for its mask and documents.

    Returns:
        previous: (B, T, D).
        last: (B, 1, D), what the pass after this one starts from.
    """
    shift = torch.eye(2, device=x.device, dtype=x.dtype)[0].expand(x.shape[-1], 2)
    return short_conv(x, shift, initial_state=start, reset=ctx.reset, mask=ctx.mask)


def no_token(
    batch_size: int, like: Tensor, device: torch.device | str | None, dtype: torch.dtype | None
) -> Tensor:
    """The state of `token_shift` before the first token, (B, 1, D) for `like` (D,)."""
    device, dtype = device or like.device, dtype or like.dtype
    return torch.zeros(batch_size, 1, like.shape[0], device=device, dtype=dtype)


def ramp(d_model: int) -> Tensor:
    """The share i / D of channel i, of which the published mu are powers; float64 on the CPU."""
    return torch.arange(d_model, dtype=torch.float64, device="cpu") / d_model


def check_depth(depth: float) -> None:
    """Refuse a place in the stack that is not from 0, the first layer, to 1, the last."""
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} is not allowed; it must be from 0 to 1")


def time_constants(width: int, depth: float) -> tuple[Tensor, Tensor]:
    """RWKV's ramp over channels, in [0, 1] and bent by the depth, and its zigzag of -1, 0, 1."""
    slots = torch.arange(width, dtype=torch.float64, device="cpu")
    return (slots / max(width - 1, 1)) ** (0.7 + 1.3 * depth), (slots + 1) % 3 - 1
