"""A causal depthwise convolution of a few taps, as an entry of its own.

    y_t = act(bias + sum_j w_j x_{t-j}), j = 0 ... W-1, channel by channel

O(T W) time, a state of W - 1 tokens. Many sequence mixers carry one inside (Mamba, DeltaNet, H3),
and much of what they are credited with in recall is its work. Before a mixer that has none
(`pattern: [short_conv, attention]`) it makes the two comparable. So et al., 2021, arXiv:2109.08668,
put it behind the projections of attention; here it has norm and residual of its own.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.kernels.short_conv import short_conv
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

ACTIVATIONS = ("silu",)


class ShortConvState(NamedTuple):
    """The last W - 1 tokens, oldest first: (B, W-1, D)."""

    tail: Tensor


class ShortConv(Mixer):
    """A causal depthwise convolution of a few taps, to put before another mixer.

    Args:
        d_model: width D.
        d_conv: taps W.
        bias: a bias of each channel.
        activation: None or `silu`.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2109.08668"
    kernel = "short_conv"
    variants = ({"d_conv": 2, "bias": True, "activation": "silu"},)

    def __init__(
        self,
        d_model: int,
        *,
        d_conv: int = 4,
        bias: bool = False,
        activation: Literal["silu"] | None = None,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, d_conv=d_conv)
        if activation is not None and activation not in ACTIVATIONS:
            raise unknown("activation of short_conv named", activation, ACTIVATIONS)
        self.d_model, self.activation = d_model, activation
        self.conv_weight = nn.Parameter(torch.empty(d_model, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(d_model)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Conv1d` starts."""
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.conv_bias is not None:
            nn.init.uniform_(self.conv_bias, -bound, bound)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        y, tail = short_conv(
            x,
            self.conv_weight,
            self.conv_bias,
            activation=self.activation,
            initial_state=None if state is None else state[0],
            reset=ctx.reset,
            mask=ctx.mask,
        )
        return y, None if state is None else ShortConvState(tail)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ShortConvState:
        """Zeros."""
        D, W = self.conv_weight.shape
        like = self.conv_weight
        device, dtype = device or like.device, dtype or like.dtype
        return ShortConvState(torch.zeros(batch_size, W - 1, D, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`; there is no matrix product."""
        D, W = self.conv_weight.shape
        return Cost(D * W + (0 if self.conv_bias is None else D), 0, 4 * D * (W - 1))
