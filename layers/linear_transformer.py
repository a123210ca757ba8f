"""Linear Transformer: attention whose softmax is a product of positive features, as a recurrence.

    S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  phi(x) = elu(x) + 1
    o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + eps),  y_t = W_o o_t

O(T) time, a state of `d_model^2 / n_heads + d_model` floats that never forgets. Katharopoulos et
al., 2020, arXiv:2006.16236, section 3. eps is the 1e-6 of the authors' code (fast-transformers);
it weighs only where all features of a query are nearly zero. No 1/sqrt(K): it would cancel.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

EPS = 1e-6


class LinearTransformerState(NamedTuple):
    """State of the heads, (B, H, K, V + 1); the last column is the sum of the keys' features."""

    S: Tensor


class LinearTransformer(Mixer):
    """Linear attention with the feature map elu + 1 and a normaliser (Linear Transformer).

    Args:
        d_model: width D.
        n_heads: heads H.
        bias: biases in the four projections.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2006.16236"
    kernel = "decay"
    variants = ({"n_heads": 2, "bias": True},)

    def __init__(self, d_model: int, *, n_heads: int = 4, bias: bool = False) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads)
        if d_model % n_heads:
            raise not_divisible("d_model", d_model, "n_heads", n_heads)
        self.d_model, self.n_heads = d_model, n_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_model, bias=bias)
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
            _features(q),
            _features(k),
            torch.cat([v, torch.ones_like(v[..., :1])], dim=-1),
            initial_state=None if state is None else state[0],
            reset=ctx.reset,
            mask=ctx.mask,
        )
        o = sums[..., :-1] / (sums[..., -1:] + EPS)
        y = self.o_proj(o.flatten(-2).to(projected[0].dtype))
        return y, None if state is None else LinearTransformerState(S)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LinearTransformerState:
        """Zeros."""
        H, K = self.n_heads, self.d_model // self.n_heads
        return LinearTransformerState(
            self.zeros(batch_size, H, K, K + 1, device=device, dtype=dtype)
        )

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D = self.d_model
        biases = 0 if self.q_proj.bias is None else 4 * D
        state = D * (D // self.n_heads + 1)
        return Cost(4 * D * D + biases, 2 * length * (4 * D * D + 2 * state), 4 * state)


def _features(x: Tensor) -> Tensor:
    """Elu(x) + 1, written so that the small values below zero keep their digits."""
    return relu(x) + x.clamp(max=0).exp()
