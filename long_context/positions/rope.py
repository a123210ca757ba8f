"""RoPE: pairs of channels turn by an angle that grows with the position.

    (x_i, x_{i+r/2}) -> rotation by n theta_i,  theta_i = base^(-2i/r),  i < r/2

so that a score depends on n - m only. Su et al., 2021, arXiv:2104.09864. The pairs are the halves
of a head, as in Llama, where the paper pairs neighbours: the same up to a permutation of channels.
"""

from typing import ClassVar

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive
from seqzoo.layers.position import Position


class RoPE(Position):
    """Rotary position embedding.

    Args:
        head_dim: channels K of a head.
        base: the wavelengths go from 2 pi to 2 pi base.
        fraction: share of the channels that turn, from the first; the others carry no position.
    """

    hooks: ClassVar[tuple[str, ...]] = ("rotate",)

    def __init__(self, head_dim: int, *, base: float = 10000.0, fraction: float = 1.0) -> None:
        super().__init__()
        check_positive(head_dim=head_dim, base=base, fraction=fraction)
        width = round(head_dim * fraction)
        if fraction > 1 or width % 2:
            raise ValueError(
                f"head_dim={head_dim} times fraction={fraction} is {width} channels; rotation"
                f" needs an even number, at most head_dim"
            )
        self.width, self.base = width, base

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Position.rotate`; the results have the dtypes of `q` and `k`."""
        with full_precision(q):
            cos, sin = self.turns(positions, accumulator(q.dtype))
            first = positions.shape[1] - q.shape[1]
            return _turn(q, cos[:, first:], sin[:, first:]), _turn(k, cos, sin)

    def turns(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of n theta_i, (B, S, 1, r/2)."""
        angles = positions[..., None, None] * self.frequencies(positions.device)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def frequencies(self, device: torch.device) -> Tensor:
        """theta_i, (r/2,): in float64, for in float32 the angle at token 65,536 is 0.004 off."""
        i = torch.arange(0, self.width, 2, device=device, dtype=widest(device))
        return self.base ** (-i / self.width)


def widest(device: torch.device) -> torch.dtype:
    """The dtype for angles and exponents: what positions multiply must be exact."""
    return torch.float32 if device.type == "mps" else torch.float64


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of the first 2 r channels of (B, T, H, K)."""
    half = cos.shape[-1]
    sizes = [half, half, x.shape[-1] - 2 * half]
    a, b, rest = torch.split(x.to(cos.dtype), sizes, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)
