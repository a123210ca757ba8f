"""RG-LRU, the recurrent block of Hawk and Griffin.

    r_t = sigmoid(W_a x_t),  i_t = sigmoid(W_x x_t),  log a_t = -8 softplus(Lambda) r_t
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t),  y_t = W_o (h_t * gelu(W_y u_t))

with x = conv4(W_in u) and block-diagonal W_a, W_x. O(T) time, state of `width` floats and the
convolution's tail. De et al., 2024, arXiv:2402.19427, section 2.4. As in the authors' code, the
first token of a document enters with multiplier 1 instead of sqrt(1 - a^2).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, softplus

from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.kernels.scan import scan
from seqzoo.kernels.short_conv import short_conv
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State


class RGLRUState(NamedTuple):
    """Tail of the convolution (B, W-1, R), recurrent state (B, R), tokens of the document (B,)."""

    tail: Tensor
    h: Tensor
    seen: Tensor


class RGLRU(Mixer):
    """Real-gated linear recurrent unit with a short convolution and a GELU branch (Hawk, Griffin).

    Args:
        d_model: width D.
        width: width R of the recurrence; `d_model` when None.
        n_heads: blocks of the block-diagonal gates; must divide the width.
        d_conv: width W of the short convolution.
        bias: biases in the three projections.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2402.19427"
    kernel = "scan"
    variants = ({"width": 24, "n_heads": 3, "d_conv": 1, "bias": False},)
    ssm_parameters = ("decay_param",)

    def __init__(
        self,
        d_model: int,
        *,
        width: int | None = None,
        n_heads: int = 4,
        d_conv: int = 4,
        bias: bool = True,
    ) -> None:
        super().__init__()
        width = width or d_model
        check_positive(d_model=d_model, width=width, n_heads=n_heads, d_conv=d_conv)
        if width % n_heads:
            raise not_divisible("width", width, "n_heads", n_heads)
        self.d_model, self.width, self.n_heads = d_model, width, n_heads
        self.gate_proj = nn.Linear(d_model, width, bias=bias)
        self.in_proj = nn.Linear(d_model, width, bias=bias)
        self.out_proj = nn.Linear(width, d_model, bias=bias)
        self.conv_weight = nn.Parameter(torch.empty(width, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(width))
        block = width // n_heads
        self.gate_weight = nn.Parameter(torch.empty(2, n_heads, block, block))  # recurrence, input
        self.gate_bias = nn.Parameter(torch.empty(2, width))
        self.decay_param = nn.Parameter(torch.empty(width))  # Lambda
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: normal gates, a small convolution, a at r = 1 in [0.9, 0.999].

        The square of that a is uniform, as by area on a ring. This is the paper's range; the
        authors' code gives it to a at r = 1/8. The projections start as `nn.Linear` does.
        """
        block = self.width // self.n_heads
        nn.init.normal_(self.gate_weight, std=block**-0.5)
        nn.init.zeros_(self.gate_bias)
        nn.init.normal_(self.conv_weight, std=0.1 * self.conv_weight.shape[1] ** -0.5)
        nn.init.zeros_(self.conv_bias)
        with torch.no_grad():
            square = torch.empty_like(self.decay_param).uniform_(0.9**2 + 1e-8, 0.999**2 + 1e-8)
            # softplus^-1(-log(a) / 8), with log(a) = log(square) / 2
            self.decay_param.copy_(torch.log(torch.expm1(-square.log() / 16)))

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        tail, h, start = state if state is not None else (None, None, None)
        reset, index = ctx.reset, ctx.index(x, start)
        gate = gelu(self.gate_proj(x), approximate="tanh")
        u, tail = short_conv(
            self.in_proj(x),
            self.conv_weight,
            self.conv_bias,
            initial_state=tail,
            reset=reset,
            mask=ctx.mask,
        )
        log_a, gated = self._gates(u)
        fresh = (index == 0)[..., None]
        weight = torch.where(fresh, 1, _sqrt(-torch.expm1(2 * log_a)))
        h, last = scan(log_a.exp(), weight * gated, initial_state=h, reset=reset, mask=ctx.mask)
        y = self.out_proj(h.to(x.dtype) * gate)
        if state is None:
            return y, None
        return y, RGLRUState(tail, last, ctx.next_index(index, start))

    def _gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of a, and i * u, in float32 or wider."""
        wide = accumulator(u.dtype)
        blocks = u.reshape(*u.shape[:2], self.n_heads, self.width // self.n_heads)
        gates = torch.einsum("bthi,ghij->gbthj", blocks, self.gate_weight.to(u.dtype)).flatten(-2)
        r, i = torch.sigmoid(gates.to(wide) + self.gate_bias[:, None, None].to(wide))
        return -8 * softplus(self.decay_param.to(wide)) * r, i * u

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RGLRUState:
        """Zeros."""
        W = self.conv_weight.shape[1]
        h = self.zeros(batch_size, self.width, device=device, dtype=dtype)
        tail = torch.zeros(
            batch_size, W - 1, self.width, device=h.device, dtype=dtype or self.conv_weight.dtype
        )
        return RGLRUState(tail, h, torch.zeros(batch_size, device=h.device, dtype=torch.long))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, R, W = self.d_model, self.width, self.conv_weight.shape[1]
        biases = 0 if self.in_proj.bias is None else 2 * R + D
        block = R // self.n_heads
        parameters = 3 * D * R + biases + R * (W + 1) + 2 * R * (block + 1) + R
        flops = length * (3 * 2 * D * R + 2 * 2 * R * block)
        return Cost(parameters, flops, 4 * R * W + 8)


def _sqrt(x: Tensor) -> Tensor:
    """The square root, its slope bounded by 1000 as the authors do: 1 - a^2 may be next to 0."""
    edge = 0.25e-6  # where the slope is 1000
    bounded = x.clamp(min=edge).sqrt() + 1000 * (x.clamp(max=edge) - edge)
    return bounded + (x.sqrt() - bounded).detach()
