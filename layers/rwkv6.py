"""RWKV-6 (Finch): RWKV-5 whose decays and token shift depend on the token.

    ddlerp_c = x_t + (x_{t-1} - x_t) * (mu_c + tanh(z_t A_c) B_c),  z_t = x_t + (x_{t-1} - x_t) mu_x
    r_t, k_t, v_t, g_t = W_c ddlerp_c for c = r, k, v, g
    w_t = exp(-exp(time_decay + tanh(ddlerp_w A) B))
    o_t = r_t^T (S_{t-1} + Diag(u) k_t v_t^T),  S_t = Diag(w_t) S_{t-1} + k_t v_t^T
    y_t = W_o (GroupNorm(o_t) * swish(g_t)),  u = time_first

O(T) time, a state of one token and `width head_dim` floats. Peng et al., 2024, arXiv:2404.05892,
section 4, as in the authors' code: mu is the share of x_{t-1}, where version 5 has that of x_t, and
eps of the norm is 64e-5. Its channel mix is `rwkv6_channel`.
"""

import torch
from torch import Tensor, nn

from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive
from seqzoo.layers.base import Cost
from seqzoo.layers.rwkv5 import RWKV5, Projected


class RWKV6(RWKV5):
    """RWKV-6's time mix: decays and token shift that read the token (Finch).

    Args:
        d_model: width D.
        width: width R of receptance, keys, values and gate; `d_model` when None.
        head_dim: channels K of a head; must divide R. The greatest divisor of 64 and R when None.
        mix_rank: rank of each of the five maps that move the token shift.
        decay_rank: rank of the map that moves the decays.
        depth: where in the stack it stands, 0 first and 1 last: decays, bonus and mu start
            accordingly.
    """

    variants = ({"width": 48, "head_dim": 8, "mix_rank": 3, "decay_rank": 5, "depth": 0},)
    mixed = ("w", "k", "v", "r", "g")

    def __init__(
        self,
        d_model: int,
        *,
        width: int | None = None,
        head_dim: int | None = None,
        mix_rank: int = 32,
        decay_rank: int = 64,
        depth: float = 0.5,
    ) -> None:
        check_positive(mix_rank=mix_rank, decay_rank=decay_rank)
        self._ranks = mix_rank, decay_rank  # which the base class comes back for
        super().__init__(d_model, width=width, head_dim=head_dim, depth=depth)

    def _add_parameters(self) -> None:
        D, (rank, decay_rank) = self.d_model, self._ranks
        self.mix_x = nn.Parameter(torch.empty(D))
        self.mix_down = nn.Parameter(torch.empty(D, len(self.mixed) * rank))
        self.mix_up = nn.Parameter(torch.empty(len(self.mixed), rank, D))
        self.decay_down = nn.Parameter(torch.empty(D, decay_rank))
        self.decay_up = nn.Parameter(torch.empty(decay_rank, self.width))

    def reset_parameters(self) -> None:
        """As `RWKV5`, with mu the other share; the low-rank maps start at zero, as published."""
        super().reset_parameters()
        nn.init.zeros_(self.mix_down)
        nn.init.zeros_(self.decay_down)
        nn.init.uniform_(self.mix_up, -0.01, 0.01)
        nn.init.uniform_(self.decay_up, -0.01, 0.01)
        with torch.no_grad():
            self.mix_x.copy_(self._first_mix("x"))

    def _first_mix(self, name: str) -> Tensor:
        return 1 - super()._first_mix(name)

    def _project(self, x: Tensor, previous: Tensor) -> Projected:
        delta = previous - x
        down, up = self.mix_down.to(x.dtype), self.mix_up.to(x.dtype)
        z = torch.tanh((x + delta * self.mix_x.to(x.dtype)) @ down)
        z = torch.unflatten(z, -1, (len(self.mixed), -1)).movedim(-2, 0)  # (5, B, T, rank)
        moved = torch.unflatten(z.flatten(1, 2) @ up, 1, x.shape[:2])
        mixes = moved + self.mix.to(moved.dtype)[:, None, None]
        w, k, v, r, g = (x + delta * mix.to(x.dtype) for mix in mixes)
        low = torch.tanh(w @ self.decay_down.to(w.dtype)) @ self.decay_up.to(w.dtype)
        wide = accumulator(x.dtype)
        log_decay = -(self.time_decay.to(wide) + low.to(wide)).exp()
        return Projected(
            self.r_proj(r), self.k_proj(k), self.v_proj(v), self.gate_proj(g), log_decay
        )

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        base, (rank, decay_rank) = super().cost(length), self._ranks
        products = 2 * len(self.mixed) * self.d_model * rank + decay_rank * (
            self.d_model + self.width
        )
        return base._replace(
            parameters=base.parameters + products + self.d_model,
            flops=base.flops + 2 * length * products,
        )
