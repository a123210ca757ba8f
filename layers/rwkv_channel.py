"""RWKV-4's channel mix: a squared-ReLU network and a gate, both reading token and previous token.

    k_t = W_k (mu_k x_t + (1 - mu_k) x_{t-1}),  r_t = W_r (mu_r x_t + (1 - mu_r) x_{t-1})
    y_t = sigmoid(r_t) * W_v relu(k_t)^2

O(T) time, state of one token. Peng et al., 2023, arXiv:2305.13048, equations 16 to 18.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.errors import check_positive
from seqzoo.kernels.short_conv import short_conv
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.mlp import hidden_width, relu2


class RWKVChannelState(NamedTuple):
    """The last token: (B, 1, D)."""

    previous: Tensor


class RWKVChannel(Mixer):
    """RWKV-4's channel mix with token shift.

    Args:
        d_model: width D.
        expand: hidden width as a multiple of D.
        hidden: hidden width; from `expand` when None.
    """

    caps = Caps(state="constant")
    kind = "channel"
    paper = "arXiv:2305.13048"
    kernel = "short_conv"

    def __init__(self, d_model: int, *, expand: float = 4, hidden: int | None = None) -> None:
        super().__init__()
        check_positive(d_model=d_model)
        self.d_model, self.hidden = d_model, hidden_width(d_model, expand, hidden, 1)
        self.up_proj = nn.Linear(d_model, self.hidden, bias=False)  # W_k
        self.down_proj = nn.Linear(self.hidden, d_model, bias=False)  # W_v
        self.gate_proj = nn.Linear(d_model, d_model, bias=False)  # W_r
        self.mix_k = nn.Parameter(torch.empty(d_model))
        self.mix_r = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both mu at i / D, what the authors give the first layer."""
        slots = torch.arange(self.d_model, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            for mix in (self.mix_k, self.mix_r):
                mix.copy_(slots / self.d_model)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        shift = torch.eye(2, device=x.device, dtype=x.dtype)[0].expand(self.d_model, 2)
        start = None if state is None else state[0]
        previous, last = short_conv(x, shift, initial_state=start, reset=ctx.reset, mask=ctx.mask)
        h = relu2(self.up_proj(torch.lerp(previous, x, self.mix_k.to(x.dtype))))
        r = torch.sigmoid(self.gate_proj(torch.lerp(previous, x, self.mix_r.to(x.dtype))))
        return r * self.down_proj(h), None if state is None else RWKVChannelState(last)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RWKVChannelState:
        """Zeros."""
        like = self.mix_k
        shape = (batch_size, 1, self.d_model)
        device, dtype = device or like.device, dtype or like.dtype
        return RWKVChannelState(torch.zeros(shape, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D = self.d_model
        weights = 2 * D * self.hidden + D * D
        return Cost(weights + 2 * D, 2 * length * weights, 4 * D)
