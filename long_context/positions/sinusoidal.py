"""Sinusoidal positions, added to the token embedding.

    e(n)_{2i} = sin(n base^(-2i/D)),  e(n)_{2i+1} = cos(n base^(-2i/D))

Vaswani et al., 2017, arXiv:1706.03762, section 3.5.
"""

from typing import ClassVar

import torch
from torch import Tensor

from seqzoo.kernels.errors import check_positive
from seqzoo.layers.position import Position
from seqzoo.long_context.positions.rope import widest


class Sinusoidal(Position):
    """Fixed sines and cosines of the position.

    Args:
        d_model: width D.
        base: the wavelengths go from 2 pi to 2 pi base.
    """

    hooks: ClassVar[tuple[str, ...]] = ("embed",)

    def __init__(self, d_model: int, *, base: float = 10000.0) -> None:
        super().__init__()
        check_positive(d_model=d_model, base=base)
        self.d_model, self.base = d_model, base

    def embed(self, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Position.embed`; float32."""
        device = positions.device
        i = torch.arange(0, self.d_model, 2, device=device, dtype=widest(device))
        angles = positions[..., None] * self.base ** (-i / self.d_model)
        waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        return waves[..., : self.d_model].float()
