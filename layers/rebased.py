"""ReBased: linear attention whose kernel is a learned quadratic of normalised queries and keys.

    phi(q) . phi(k) = (q' . k')^2 / d,  q' = gamma * norm(q) + beta,  k' = gamma * norm(k) + beta
    S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t)
    o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + eps),  y_t = W_o o_t

with norm over the channels of a head, to mean 0 and variance 1. O(T) time, a state of
`d (d + 1) / 2 (d_model + n_heads)` numbers. Aksenov et al., 2024, arXiv:2402.10644, section 4; the
paper alternates it with short convolutions, as Based. gamma and beta are shared by queries, keys
and heads and products of two channels are kept once, as in the authors' code; eps is 1e-6.

Sums are float64. Where a query is nearly orthogonal to the few keys so far, z . phi(q) is small and
its terms are not: in float32 single steps were off by 3e-3 on the first tokens of the worst of 64
rows, where float64 has 1e-6.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from seqzoo.kernels.decay import decay
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.based import squares

EPS = 1e-6
NORM_EPS = 1e-5
WIDE = torch.float64


class ReBasedState(NamedTuple):
    """State of the heads, (B, H, F, V + 1) in float64; the last column sums the keys' features."""

    S: Tensor


class ReBased(Mixer):
    """Linear attention with a learned quadratic kernel and a normaliser (ReBased).

    Args:
        d_model: width D.
        n_heads: heads H.
        feature_dim: channels d of a query or key; its features are d (d + 1) / 2.
        bias: biases in the four projections.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2402.10644"
    kernel = "decay"
    variants = ({"n_heads": 2, "feature_dim": 5, "bias": True},)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        feature_dim: int = 16,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads, feature_dim=feature_dim)
        if d_model % n_heads:
            raise not_divisible("d_model", d_model, "n_heads", n_heads)
        self.d_model, self.n_heads, self.feature_dim = d_model, n_heads, feature_dim
        self.features = feature_dim * (feature_dim + 1) // 2
        self.q_proj = nn.Linear(d_model, n_heads * feature_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, n_heads * feature_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)
        self.gamma = nn.Parameter(torch.empty(feature_dim))
        self.beta = nn.Parameter(torch.empty(feature_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gamma 1 and beta 0."""
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        projected = [project(x) for project in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = (torch.unflatten(p.to(WIDE), -1, (self.n_heads, -1)) for p in projected)
        sums, S = decay(
            self._features(q),
            self._features(k),
            torch.cat([v, torch.ones_like(v[..., :1])], dim=-1),
            initial_state=None if state is None else state[0],
            reset=ctx.reset,
            mask=ctx.mask,
        )
        o = sums[..., :-1] / (sums[..., -1:].clamp(min=0) + EPS)  # below only by rounding
        y = self.o_proj(o.flatten(-2).to(projected[0].dtype))
        return y, None if state is None else ReBasedState(S)

    def _features(self, x: Tensor) -> Tensor:
        """phi: (..., d) to (..., F)."""
        x = layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        x = x * self.gamma.to(x.dtype) + self.beta.to(x.dtype)
        return squares(x * self.feature_dim**-0.25)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ReBasedState:
        """Zeros."""
        H, F, V = self.n_heads, self.features, self.d_model // self.n_heads
        return ReBasedState(self.zeros(batch_size, H, F, V + 1, device=device, dtype=WIDE))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, keys = self.d_model, self.n_heads * self.feature_dim
        products = 2 * D * (keys + D)
        biases = 0 if self.q_proj.bias is None else 2 * (keys + D)
        state = self.features * (D + self.n_heads)
        parameters = products + biases + 2 * self.feature_dim
        return Cost(parameters, 2 * length * (products + 2 * state), 8 * state)
