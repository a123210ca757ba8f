"""cosFormer: linear attention with non-negative features and a weight that falls with distance.

    w_ts = relu(q_t) . relu(k_s) cos(pi / 2 (t - s) / max_length)
    y_t = W_o (sum_s w_ts v_s / sum_s w_ts), s <= t

The cosine of a difference is cos cos + sin sin, so this is a recurrence over features of twice the
width. O(T) time, a state of `2 d_model (d_model / n_heads + 1)` floats. Qin et al., 2022,
arXiv:2202.08791, section 3. The authors divide by the current length, so that their outputs change
with every token that follows; `max_length` is fixed here. Sums of weights below 1e-6 count as 1e-6,
as in their code.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

EPS = 1e-6


class CosFormerState(NamedTuple):
    """State of the heads and the index of the next token in its document.

    S (B, H, 2 K, V + 1), whose last column is the sum of the keys' features, and (B,).
    """

    S: Tensor
    next: Tensor


class CosFormer(Mixer):
    """Linear attention over relu features, weighted by the cosine of the distance (cosFormer).

    Set `max_length` to the longest document in use: weights fall to 0 on its scale, over a small
    part of it they hardly differ, and beyond it they are negative and mean nothing.

    Args:
        d_model: width D.
        n_heads: heads H.
        max_length: the distance at which a weight is zero.
        bias: biases in the four projections.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2202.08791"
    kernel = "decay"
    variants = ({"n_heads": 2, "max_length": 110, "bias": False},)

    def __init__(
        self, d_model: int, *, n_heads: int = 4, max_length: int = 65_536, bias: bool = True
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads, max_length=max_length)
        if d_model % n_heads:
            raise not_divisible("d_model", d_model, "n_heads", n_heads)
        self.d_model, self.n_heads, self.max_length = d_model, n_heads, max_length
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_model, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        S, start = state if state is not None else (None, None)
        projected = [project(x) for project in (self.q_proj, self.k_proj, self.v_proj)]
        wide = accumulator(x.dtype)
        q, k, v = (torch.unflatten(p.to(wide), -1, (self.n_heads, -1)) for p in projected)
        index = ctx.index(x, start)
        turns = (index % (4 * self.max_length)).to(wide) / self.max_length  # 4 is once around
        angle = math.pi / 2 * turns[..., None, None]
        cos, sin = angle.cos(), angle.sin()
        q, k = (torch.cat([relu(y) * cos, relu(y) * sin], dim=-1) for y in (q, k))
        sums, S = decay(
            q,
            k,
            torch.cat([v, torch.ones_like(v[..., :1])], dim=-1),
            initial_state=S,
            reset=ctx.reset,
            mask=ctx.mask,
        )
        o = sums[..., :-1] / sums[..., -1:].clamp(min=EPS)
        y = self.o_proj(o.flatten(-2).to(projected[0].dtype))
        return y, None if state is None else CosFormerState(S, ctx.next_index(index, start))

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> CosFormerState:
        """Zeros."""
        H, K = self.n_heads, self.d_model // self.n_heads
        S = self.zeros(batch_size, H, 2 * K, K + 1, device=device, dtype=dtype)
        return CosFormerState(S, torch.zeros(batch_size, device=S.device, dtype=torch.long))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D = self.d_model
        biases = 0 if self.q_proj.bias is None else 4 * D
        state = 2 * D * (D // self.n_heads + 1)
        return Cost(4 * D * D + biases, 2 * length * (4 * D * D + 2 * state), 4 * state + 8)
