"""sLSTM, the xLSTM layer with scalar memories that mix within a head from step to step.

    i_t, f_t = W u_t + R h_{t-1} + b,  z_t, o_t = W x_t + R h_{t-1} + b,  u = silu(conv4(x))
    c_t = sigmoid(f_t) c_{t-1} + exp(i_t) tanh(z_t),  n_t = sigmoid(f_t) n_{t-1} + exp(i_t)
    h_t = sigmoid(o_t) c_t / n_t,  y_t = LN_head(h_t)

with W and R block-diagonal over the heads, and c, n kept as multiples of exp(m_t) so that nothing
overflows. O(T) time, token after token; a state of 4 D floats and the convolution's tail. Beck et
al., 2024, arXiv:2405.04517, section 2.2 and appendix A. The layer ends with the norm: the gated
up and down projection that the authors put behind it is a channel mixer (`swiglu`).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.kernels.short_conv import short_conv
from seqzoo.kernels.slstm import slstm
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

EPS = 1e-5


class SLSTMState(NamedTuple):
    """Tail of the convolution (B, W-1, D); h, c, n and m of the cell (B, 4, H, K)."""

    tail: Tensor
    cell: Tensor


class SLSTM(Mixer):
    """LSTM with exponential gating, a normaliser and recurrent weights within heads (xLSTM).

    Args:
        d_model: width D.
        n_heads: heads H; must divide the width.
        d_conv: width W of the short convolution before the input and forget gates; 0 for none.
        depth: where the layer stands in its stack, 0 the first and 1 the last; it shapes the
            initial forget biases.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2405.04517"
    kernel = "slstm"
    variants = ({"n_heads": 2, "d_conv": 0, "depth": 1.0},)

    def __init__(
        self, d_model: int, *, n_heads: int = 4, d_conv: int = 4, depth: float = 0.0
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads)
        if d_conv < 0:
            raise ValueError(f"d_conv={d_conv} is not allowed; it must be at least 0")
        if not 0 <= depth <= 1:
            raise ValueError(f"depth={depth} is not allowed; it must be in [0, 1]")
        if d_model % n_heads:
            raise not_divisible("d_model", d_model, "n_heads", n_heads)
        self.d_model, self.n_heads, self.d_conv, self.depth = d_model, n_heads, d_conv, depth
        K = d_model // n_heads
        self.conv_weight = nn.Parameter(torch.empty(d_model, d_conv)) if d_conv else None
        self.conv_bias = nn.Parameter(torch.empty(d_model)) if d_conv else None
        self.gate_weight = nn.Parameter(torch.empty(4, n_heads, K, K))  # i, f, z, o
        self.gate_bias = nn.Parameter(torch.empty(4, n_heads, K))
        self.recurrent_weight = nn.Parameter(torch.empty(4, n_heads, K, K))
        self.norm_weight = nn.Parameter(torch.empty(n_heads, K))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': no recurrence, forget biases from 5 down to -7 along each head.

        The bias of unit j of K is 5 - 12 (j / (K - 1))^(0.3 + 1.3 depth). Input maps are normal
        with variance 2 / (5 D), other biases zero; the convolution starts as `nn.Conv1d` does.
        """
        if self.conv_weight is not None and self.conv_bias is not None:
            bound = self.d_conv**-0.5
            nn.init.uniform_(self.conv_weight, -bound, bound)
            nn.init.uniform_(self.conv_bias, -bound, bound)
        nn.init.normal_(self.gate_weight, std=(2 / (5 * self.d_model)) ** 0.5)
        nn.init.zeros_(self.recurrent_weight)
        nn.init.zeros_(self.gate_bias)
        nn.init.ones_(self.norm_weight)
        K = self.d_model // self.n_heads
        along = torch.arange(K, dtype=torch.float64, device="cpu") / max(K - 1, 1)
        with torch.no_grad():
            self.gate_bias[1].copy_(5 - 12 * along ** (0.3 + 1.3 * self.depth))

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        tail, cell = state if state is not None else (None, None)
        u, reset = x, ctx.reset
        if self.conv_weight is not None:
            u, tail = short_conv(
                x,
                self.conv_weight,
                self.conv_bias,
                activation="silu",
                initial_state=tail,
                reset=reset,
                mask=ctx.mask,
            )
        weight = self.gate_weight.to(x.dtype)
        gates = torch.cat([self._map(u, weight[:2]), self._map(x, weight[2:])], dim=2)
        gates = gates.to(accumulator(x.dtype)) + self.gate_bias
        h, cell = slstm(
            gates, self.recurrent_weight, initial_state=cell, reset=reset, mask=ctx.mask
        )
        y = layer_norm(h, h.shape[-1:], eps=EPS) * self.norm_weight
        y = y.flatten(-2).to(x.dtype)
        return y, None if state is None or tail is None else SLSTMState(tail, cell)

    def _map(self, x: Tensor, weight: Tensor) -> Tensor:
        """(B, T, D) through block-diagonal maps (G, H, K, K): (B, T, G, H, K)."""
        heads = torch.unflatten(x, -1, (self.n_heads, -1))
        return torch.einsum("bthk,ghkj->btghj", heads, weight)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SLSTMState:
        """Zeros: an empty cell."""
        shape = (batch_size, *self.gate_bias.shape)
        cell = self.zeros(*shape, device=device, dtype=dtype)
        taps, like = max(self.d_conv - 1, 0), dtype or self.gate_bias.dtype
        tail = torch.zeros(batch_size, taps, self.d_model, device=cell.device, dtype=like)
        return SLSTMState(tail, cell)

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, W, K = self.d_model, self.d_conv, self.d_model // self.n_heads
        convolution = D * (W + 1) if W else 0
        flops = length * 2 * 2 * 4 * D * K
        return Cost(convolution + 2 * 4 * D * K + 5 * D, flops, 4 * D * (4 + max(W - 1, 0)))
