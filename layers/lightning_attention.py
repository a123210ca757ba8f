"""Lightning attention: linear attention whose heads forget at fixed rates, without a normaliser.

    q, k, v = swish(W_q x), swish(W_k x), swish(W_v x)
    S_t = e^{-s_h} S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t,  s_h = slope_scale 2^{-8h/H}, h = 1..H
    y_t = W_o (sigmoid(W_g x_t) * RMSNorm(o_t))

O(T) time, a state of `d_model^2 / n_heads` floats. Qin et al., 2024, arXiv:2401.04658; gate, norm
and slopes are those of MiniMax-01, arXiv:2501.08313, section 2.2. The norm spans all heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

EPS = 1e-6


class LightningAttentionState(NamedTuple):
    """State of the heads, (B, H, K, K)."""

    S: Tensor


class LightningAttention(Mixer):
    """Linear attention with a fixed decay per head, as in MiniMax-01 (lightning attention).

    MiniMax-01 lets deeper layers remember longer: layer l of L, counted from 0, has a slope scale
    of about 1 - l / (L - 1). A mixer knows nothing of its stack, so that is an option here.

    Args:
        d_model: width D.
        n_heads: heads H.
        slope_scale: factor of all decay rates; 0 never forgets.
        bias: biases in the five projections.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2401.04658"
    kernel = "decay"
    variants = ({"n_heads": 2, "slope_scale": 0.1, "bias": True},)

    def __init__(
        self, d_model: int, *, n_heads: int = 4, slope_scale: float = 1.0, bias: bool = False
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads)
        if d_model % n_heads:
            raise not_divisible("d_model", d_model, "n_heads", n_heads)
        if not slope_scale >= 0:
            raise ValueError(f"slope_scale={slope_scale} is not allowed; it must be 0 or more")
        self.d_model, self.n_heads, self.slope_scale = d_model, n_heads, slope_scale
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_model, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        self.gate_proj = nn.Linear(d_model, d_model, bias=bias)
        self.norm = nn.RMSNorm(d_model, eps=EPS)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        wide, H = accumulator(x.dtype), self.n_heads
        q, k, v = (
            torch.unflatten(silu(project(x).to(wide)), -1, (H, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        gate = self.gate_proj(x)
        slopes = torch.exp2(-8 / H * torch.arange(1, H + 1, device=x.device, dtype=wide))
        o, S = decay(
            q,
            k,
            v,
            (-self.slope_scale * slopes).expand(*x.shape[:2], -1),
            initial_state=None if state is None else state[0],
            reset=ctx.reset,
            mask=ctx.mask,
        )
        y = rms_norm(o.flatten(-2), (self.d_model,), self.norm.weight.to(wide), EPS)
        y = self.o_proj((y * torch.sigmoid(gate.to(wide))).to(gate.dtype))
        return y, None if state is None else LightningAttentionState(S)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LightningAttentionState:
        """Zeros."""
        H, K = self.n_heads, self.d_model // self.n_heads
        return LightningAttentionState(self.zeros(batch_size, H, K, K, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D = self.d_model
        biases = 0 if self.q_proj.bias is None else 5 * D
        state = D * D // self.n_heads
        return Cost(5 * D * D + biases + D, 2 * length * (5 * D * D + 2 * state), 4 * state)
