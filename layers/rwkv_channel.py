"""RWKV's channel mixes: squared-ReLU networks of a token and of the one before it.

    rwkv_channel, versions 4 and 5:
        k_t = W_k (mu_k x_t + (1 - mu_k) x_{t-1}),  r_t = W_r (mu_r x_t + (1 - mu_r) x_{t-1})
        y_t = sigmoid(r_t) * W_v relu(k_t)^2
    rwkv6_channel: the same function, with mu the share of x_{t-1}
    rwkv7_channel: y_t = W_v relu(W_k ((1 - mu) x_t + mu x_{t-1}))^2, without a gate

O(T) time, state of one token. Version 4: Peng et al., 2023, arXiv:2305.13048, equations 16 to 18.
Versions 5 and 6: Peng et al., 2024, arXiv:2404.05892, whose equations (section 4) are those of
version 4; the authors' hidden width is 4 D in versions 4 and 7, and 3.5 D, down to a multiple of
32, in between. Version 7: Peng et al., 2025, arXiv:2503.14456.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.errors import check_positive
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.mlp import hidden_width, relu2
from seqzoo.layers.token_shift import check_depth, no_token, ramp, token_shift


class RWKVChannelState(NamedTuple):
    """The last token: (B, 1, D)."""

    previous: Tensor


class RWKVChannel(Mixer):
    """RWKV-4's channel mix, which is RWKV-5's too, with token shift.

    Args:
        d_model: width D.
        expand: hidden width as a multiple of D.
        hidden: hidden width; from `expand` when None.
        depth: where in the stack it stands, 0 first and 1 last: mu starts accordingly.
    """

    caps = Caps(state="constant")
    kind = "channel"
    paper = "arXiv:2305.13048"
    kernel = "short_conv"
    gated = True

    def __init__(
        self, d_model: int, *, expand: float = 4, hidden: int | None = None, depth: float = 0.0
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model)
        check_depth(depth)
        self.d_model, self.hidden = d_model, hidden_width(d_model, expand, hidden, 1)
        self.depth = depth
        self.up_proj = nn.Linear(d_model, self.hidden, bias=False)  # W_k
        self.down_proj = nn.Linear(self.hidden, d_model, bias=False)  # W_v
        self.gate_proj = nn.Linear(d_model, d_model, bias=False) if self.gated else None  # W_r
        self.mix_k = nn.Parameter(torch.empty(d_model))
        self.mix_r = nn.Parameter(torch.empty(d_model)) if self.gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published, the share of the token itself a power of i / D; i / D in the first layer.

        The authors have 1 - l / L in layer l of L for the 1 - depth here. The projections start as
        `nn.Linear` does; the authors start W_v, and W_r where there is one, at zero.
        """
        mu = self.first_mix(1 - self.depth)
        with torch.no_grad():
            for mix in (self.mix_k, self.mix_r):
                if mix is not None:
                    mix.copy_(mu)

    def first_mix(self, remaining: float) -> Tensor:
        """What mu starts at, in a layer with that part of the stack still to come."""
        return ramp(self.d_model) ** remaining

    def mixed(self, x: Tensor, previous: Tensor, mix: Tensor) -> Tensor:
        """A token and the one before it."""
        return torch.lerp(previous, x, mix.to(x.dtype))

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        start = None if state is None else state[0]
        previous, last = token_shift(x, start, ctx or Context())
        y = self.down_proj(relu2(self.up_proj(self.mixed(x, previous, self.mix_k))))
        if self.gate_proj is not None and self.mix_r is not None:
            y = torch.sigmoid(self.gate_proj(self.mixed(x, previous, self.mix_r))) * y
        return y, None if state is None else RWKVChannelState(last)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RWKVChannelState:
        """Zeros."""
        return RWKVChannelState(no_token(batch_size, self.mix_k, device, dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, gates = self.d_model, 1 if self.gated else 0
        weights = 2 * D * self.hidden + gates * D * D
        return Cost(weights + (1 + gates) * D, 2 * length * weights, 4 * D)


class RWKV6Channel(RWKVChannel):
    """RWKV-6's channel mix: version 4's, with mu the share of the previous token.

    Args:
        d_model: width D.
        expand: hidden width as a multiple of D.
        hidden: hidden width; from `expand` when None.
        depth: where in the stack it stands, 0 first and 1 last: mu starts accordingly.
    """

    paper = "arXiv:2404.05892"

    def __init__(
        self, d_model: int, *, expand: float = 3.5, hidden: int | None = None, depth: float = 0.0
    ) -> None:
        super().__init__(d_model, expand=expand, hidden=hidden, depth=depth)

    def first_mix(self, remaining: float) -> Tensor:
        """See `RWKVChannel`."""
        return 1 - ramp(self.d_model) ** remaining

    def mixed(self, x: Tensor, previous: Tensor, mix: Tensor) -> Tensor:
        """A token and the one before it."""
        return torch.lerp(x, previous, mix.to(x.dtype))


class RWKV7Channel(RWKV6Channel):
    """RWKV-7's channel mix: squared ReLU and token shift, without a gate.

    Args:
        d_model: width D.
        expand: hidden width as a multiple of D.
        hidden: hidden width; from `expand` when None.
        depth: where in the stack it stands, 0 first and 1 last: mu starts accordingly.
    """

    paper = "arXiv:2503.14456"
    gated = False

    def __init__(
        self, d_model: int, *, expand: float = 4, hidden: int | None = None, depth: float = 0.0
    ) -> None:
        super().__init__(d_model, expand=expand, hidden=hidden, depth=depth)

    def first_mix(self, remaining: float) -> Tensor:
        """See `RWKVChannel`."""
        return super().first_mix(remaining**4)
