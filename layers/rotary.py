"""Rotations of neighbouring channels, whose angles a mixer computes itself."""

import torch
from torch import Tensor


def turn_neighbours(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the first R pairs of neighbours of (B, T, H, K) by (B, T, H or 1, R)."""
    width = 2 * angle.shape[-1]
    turning, rest = torch.split(x, [width, x.shape[-1] - width], dim=-1)
    a, b = torch.unflatten(turning, -1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)
