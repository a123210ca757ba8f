"""RetNet: linear attention whose heads forget at fixed rates and whose keys turn with position.

    S_t = gamma_h S_{t-1} + R_t k_t v_t^T,  o_t = S_t^T R_t q_t / sqrt(K),  gamma_h = 1 - 2^(-5-h)
    y_t = W_o (RMSNorm(o_t) * swish(W_g x_t)),  R_t turns each pair of channels by t theta_i

O(T) time, a state of `expand_v d_model^2 / n_heads` floats. Sun et al., 2023, arXiv:2307.08621,
section 2. As in the authors' code (torchscale) the angles theta_i = 10000^(-i / (K/2 - 1)) reach
both ends of their range, and the norm of a head is an RMS norm without weights. The row sums by
which that code divides the scores cancel in the norm, up to its eps; there are none here.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.position import create_position

EPS = 1e-5
BASE = 10000.0


class RetNetState(NamedTuple):
    """State of the heads, (B, H, K, V), and the index of the next token in its document, (B,)."""

    S: Tensor
    next: Tensor


class RetNet(Mixer):
    """Multi-scale retention: a fixed decay per head, rotary positions, a gated output (RetNet).

    Args:
        d_model: width D; also the width of all keys together.
        n_heads: heads H; each has an even number of key channels.
        expand_v: width of all values together, as a multiple of `d_model`.
        bias: biases in the five projections.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2307.08621"
    kernel = "decay"
    variants = ({"n_heads": 2, "expand_v": 1, "bias": True},)

    def __init__(
        self, d_model: int, *, n_heads: int = 4, expand_v: int = 2, bias: bool = False
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads, expand_v=expand_v)
        if d_model % n_heads:
            raise not_divisible("d_model", d_model, "n_heads", n_heads)
        self.d_model, self.n_heads, self.value_dim = d_model, n_heads, expand_v * d_model
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_model, bias=bias)
        self.v_proj = nn.Linear(d_model, self.value_dim, bias=bias)
        self.gate_proj = nn.Linear(d_model, self.value_dim, bias=bias)
        self.o_proj = nn.Linear(self.value_dim, d_model, bias=bias)
        pairs = d_model // n_heads // 2
        # RoPE has base^(-i / pairs); this base makes that 10000^(-i / (pairs - 1)).
        base = BASE ** (pairs / (pairs - 1)) if pairs > 1 else BASE
        self.position = create_position(
            {"name": "rope", "base": base},
            n_heads=n_heads,
            head_dim=d_model // n_heads,
            d_model=d_model,
        )

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        S, start = state if state is not None else (None, None)
        wide = accumulator(x.dtype)
        q, k, v = (
            torch.unflatten(project(x).to(wide), -1, (self.n_heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        gate = self.gate_proj(x)
        index = ctx.index(x, start)
        q, k = self.position.rotate(q, k, index)
        heads = torch.arange(self.n_heads, device=x.device, dtype=wide)
        log_decay = torch.log1p(-torch.exp2(-5 - heads))
        o, S = decay(
            q,
            k,
            v,
            log_decay.expand(*x.shape[:2], -1),
            scale=q.shape[-1] ** -0.5,
            initial_state=S,
            reset=ctx.reset,
            mask=ctx.mask,
        )
        y = rms_norm(o, o.shape[-1:], eps=EPS).flatten(-2) * silu(gate.to(wide))
        y = self.o_proj(y.to(gate.dtype))
        return y, None if state is None else RetNetState(S, ctx.next_index(index, start))

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RetNetState:
        """Zeros."""
        K, V = self.d_model // self.n_heads, self.value_dim // self.n_heads
        S = self.zeros(batch_size, self.n_heads, K, V, device=device, dtype=dtype)
        return RetNetState(S, torch.zeros(batch_size, device=S.device, dtype=torch.long))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, values = self.d_model, self.value_dim
        products = 2 * D * D + 3 * D * values
        biases = 0 if self.o_proj.bias is None else 3 * D + 2 * values
        state = D * values // self.n_heads
        return Cost(products + biases, 2 * length * (products + 2 * state), 4 * state + 8)
