"""Based: linear attention whose features are the second-order Taylor series of the exponential.

    phi(q) . phi(k) = 1 + s + s^2 / 2,  s = q . k / sqrt(d)
    S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t)
    o_t = S_t^T phi(q_t) / (z_t . phi(q_t)),  y_t = W_o o_t

O(T) time, a state of `(1 + d + d (d + 1) / 2) (d_model + n_heads)` floats. Arora et al., 2024,
arXiv:2402.18668, section 4; the paper alternates it with attention over a window of 64 tokens and
with short convolutions. Products of two channels are kept once, where the authors' code has both.
1 + s + s^2 / 2 is never below 1/2, so the normaliser is not either, and needs no eps.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

SMALLEST = 0.5  # of 1 + s + s^2 / 2


class BasedState(NamedTuple):
    """State of the heads, (B, H, F, V + 1); the last column is the sum of the keys' features."""

    S: Tensor


class Based(Mixer):
    """Linear attention with a second-order Taylor feature map and a normaliser (Based).

    Args:
        d_model: width D.
        n_heads: heads H.
        feature_dim: channels d of a query or key; its features are 1 + d + d (d + 1) / 2.
        bias: biases in the four projections.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2402.18668"
    kernel = "decay"
    variants = ({"n_heads": 2, "feature_dim": 5, "bias": True},)

    def __init__(
        self, d_model: int, *, n_heads: int = 4, feature_dim: int = 16, bias: bool = False
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads, feature_dim=feature_dim)
        if d_model % n_heads:
            raise not_divisible("d_model", d_model, "n_heads", n_heads)
        self.d_model, self.n_heads, self.feature_dim = d_model, n_heads, feature_dim
        self.features = 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
        self.q_proj = nn.Linear(d_model, n_heads * feature_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, n_heads * feature_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        projected = [project(x) for project in (self.q_proj, self.k_proj, self.v_proj)]
        wide = accumulator(x.dtype)
        q, k, v = (torch.unflatten(p.to(wide), -1, (self.n_heads, -1)) for p in projected)
        sums, S = decay(
            _taylor(q),
            _taylor(k),
            torch.cat([v, torch.ones_like(v[..., :1])], dim=-1),
            initial_state=None if state is None else state[0],
            reset=ctx.reset,
            mask=ctx.mask,
        )
        o = sums[..., :-1] / sums[..., -1:].clamp(min=SMALLEST)  # below only by rounding
        y = self.o_proj(o.flatten(-2).to(projected[0].dtype))
        return y, None if state is None else BasedState(S)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BasedState:
        """Zeros."""
        H, F, V = self.n_heads, self.features, self.d_model // self.n_heads
        return BasedState(self.zeros(batch_size, H, F, V + 1, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, keys = self.d_model, self.n_heads * self.feature_dim
        products = 2 * D * (keys + D)
        biases = 0 if self.q_proj.bias is None else 2 * (keys + D)
        state = self.features * (D + self.n_heads)
        return Cost(products + biases, 2 * length * (products + 2 * state), 4 * state)


def _taylor(x: Tensor) -> Tensor:
    """phi: (..., d) to (..., F): one, the channels, and all products of two over sqrt(2)."""
    x = x * x.shape[-1] ** -0.25
    return torch.cat([torch.ones_like(x[..., :1]), x, squares(x) * 0.5**0.5], dim=-1)


def squares(x: Tensor) -> Tensor:
    """Features whose dot product is (x . y)^2: squares, then sqrt(2) times each product of two."""
    d = x.shape[-1]
    first, second = torch.triu_indices(d, d, offset=1, device=x.device)
    products = (x[..., :, None] * x[..., None, :]).flatten(-2)
    pairs = products.index_select(-1, first * d + second)
    return torch.cat([x.square(), pairs * 2**0.5], dim=-1)
