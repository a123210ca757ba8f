"""ALiBi: a score falls linearly with distance, b = -m_h |i - j|, each head at its own slope.

m_h = 2^(-8 h / H) for h = 1 .. H when H is a power of two; otherwise the slopes of the power P
below, followed by every second slope of 2P: m_{P+h} = 2^(-8 (2h - 1) / 2P). Press et al., 2021,
arXiv:2108.12409, section 3 and appendix A. Popular code adds m_h j instead, which the softmax
cannot tell apart. In both directions the distance is absolute, which the paper leaves open.
"""

from typing import ClassVar

import torch
from torch import Tensor

from seqzoo.kernels.errors import check_positive
from seqzoo.layers.position import Position


class ALiBi(Position):
    """Attention with linear biases.

    Args:
        n_heads: heads H.
    """

    hooks: ClassVar[tuple[str, ...]] = ("bias",)

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        check_positive(n_heads=n_heads)
        self.n_heads = n_heads

    def slopes(self, device: torch.device | None = None) -> Tensor:
        """m_h, (H,) in float32."""
        power = 1 << (self.n_heads.bit_length() - 1)
        h = torch.arange(1, self.n_heads + 1, device=device, dtype=torch.float32)
        even = -8 * h / power
        between = -4 * (2 * (h - power) - 1) / power
        return torch.exp2(torch.where(h <= power, even, between))

    def bias(self, distance: Tensor) -> Tensor:
        """See `Position.bias`."""
        slopes = self.slopes(distance.device)[:, None, None]
        return -slopes * distance.abs()[..., None, :, :]
