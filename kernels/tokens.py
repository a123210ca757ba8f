"""Picking tokens of each row: how masked ones are moved out of the way and back."""

from torch import Tensor


def take(x: Tensor, slots: Tensor) -> Tensor:
    """Tokens of each row of (B, T, D) at `slots` (B, S), as (B, S, D)."""
    return x.gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))
