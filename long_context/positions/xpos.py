"""xPos: RoPE whose pairs also fade with distance.

    q_n -> zeta^(n/512) R(n theta) q_n,  k_m -> zeta^(-m/512) R(m theta) k_m,
    zeta_i = (2i/K + 0.4) / 1.4

so that pair i of a score is multiplied by zeta_i^((n-m)/512). Sun et al., 2022, arXiv:2212.10554,
equations 8 to 10. The exponents are counted from the middle of the queries, which the score does
not notice: float32 then holds 65,536 queries in a pass, and any number of keys before them.
"""

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive
from seqzoo.long_context.positions.rope import RoPE, widest


class XPos(RoPE):
    """Rotation with exponential decay; causal attention only, for it grows towards the future.

    Args:
        head_dim: channels K of a head.
        base: as in RoPE.
        scale_base: tokens over which pair i fades by zeta_i.
    """

    def __init__(
        self,
        head_dim: int,
        causal: bool = True,
        *,
        base: float = 10000.0,
        scale_base: float = 512.0,
    ) -> None:
        super().__init__(head_dim, base=base)
        check_positive(scale_base=scale_base)
        if not causal:
            raise ValueError("position 'xpos' needs causal=True: it grows towards the future")
        self.scale_base = scale_base

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Position.rotate`; float16 comes back as float32, for the scales leave its range."""
        if q.shape[1] == 0:
            return q, k
        with full_precision(q):
            wide = accumulator(q.dtype)
            kept = wide if q.dtype == torch.float16 else q.dtype
            mine = positions[:, positions.shape[1] - q.shape[1] :]
            middle = (mine.amin(1, keepdim=True) + mine.amax(1, keepdim=True)) // 2
            q, k = super().rotate(q.to(wide), k.to(wide), positions)
            q = q * self.scales(mine - middle).to(wide)
            k = k * self.scales(middle - positions).to(wide)
            return q.to(kept), k.to(kept)

    def scales(self, n: Tensor) -> Tensor:
        """zeta_i^(n/512) for both channels of each pair, (B, S, 1, K)."""
        i = torch.arange(0, self.width, 2, device=n.device, dtype=widest(n.device))
        zeta = (i / self.width + 0.4) / 1.4
        return torch.exp(zeta.log() * (n[..., None, None] / self.scale_base)).repeat(1, 1, 1, 2)
