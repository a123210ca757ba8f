"""RWKV-4's time mix: a decaying softmax-weighted average of every channel, and a gate.

    k_t, v_t, r_t = W_k x^k_t, W_v x^v_t, W_r x^r_t  with  x^c_t = mu_c x_t + (1 - mu_c) x_{t-1}
    wkv_t = (sum_{i<t} e^{k_i - (t-1-i) w} v_i + e^{u + k_t} v_t) / (the same without v)
    y_t = W_o (sigmoid(r_t) * wkv_t),  w = exp(time_decay),  u = time_first

O(T) time, state of one token and three numbers a channel. Peng et al., 2023, arXiv:2305.13048,
section 3.1. Its channel mix is `rwkv_channel`.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive
from seqzoo.kernels.wkv import no_tokens, wkv
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.token_shift import check_depth, no_token, ramp, time_constants, token_shift


class RWKV4State(NamedTuple):
    """The last token (B, 1, D), and numerator, denominator and log maximum (B, 3, R)."""

    previous: Tensor
    sums: Tensor


class RWKV4(Mixer):
    """RWKV-4's time mix: a softmax-weighted average with learned decays, and token shift.

    Args:
        d_model: width D.
        width: width R of keys, values and gate; `d_model` when None.
        depth: where in the stack it stands, 0 first and 1 last: decays and mu start accordingly.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2305.13048"
    kernel = "wkv"
    variants = ({"width": 48, "depth": 0},)
    ssm_parameters: ClassVar[tuple[str, ...]] = ("time_decay", "time_first")

    def __init__(self, d_model: int, *, width: int | None = None, depth: float = 0.5) -> None:
        super().__init__()
        width = d_model if width is None else width
        check_positive(d_model=d_model, width=width)
        check_depth(depth)
        self.d_model, self.width, self.depth = d_model, width, depth
        self.k_proj = nn.Linear(d_model, width, bias=False)
        self.v_proj = nn.Linear(d_model, width, bias=False)
        self.gate_proj = nn.Linear(d_model, width, bias=False)  # W_r
        self.o_proj = nn.Linear(width, d_model, bias=False)
        self.time_decay = nn.Parameter(torch.empty(width))
        self.time_first = nn.Parameter(torch.empty(width))
        self.mix_k = nn.Parameter(torch.empty(d_model))
        self.mix_v = nn.Parameter(torch.empty(d_model))
        self.mix_r = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published, decays log-spaced over channels and mu a power of i / D.

        The authors give layer l of L the depth l / (L - 1), and 1 - l / L for the 1 - depth here.
        The projections start as `nn.Linear` does; the authors start all but W_v at zero.
        """
        rise, zigzag = time_constants(self.width, self.depth)
        share = ramp(self.d_model)
        with torch.no_grad():
            self.time_decay.copy_(-5 + 8 * rise)
            self.time_first.copy_(math.log(0.3) + 0.5 * zigzag)
            self.mix_k.copy_(share ** (1 - self.depth))
            self.mix_v.copy_(share ** (1 - self.depth) + 0.3 * self.depth)
            self.mix_r.copy_(share ** (0.5 * (1 - self.depth)))

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        start, sums = state if state is not None else (None, None)
        previous, last = token_shift(x, start, ctx)
        average, sums = wkv(
            self.k_proj(torch.lerp(previous, x, self.mix_k.to(x.dtype))),
            self.v_proj(torch.lerp(previous, x, self.mix_v.to(x.dtype))),
            self.time_decay.to(accumulator(x.dtype)).exp(),
            self.time_first,
            initial_state=sums,
            reset=ctx.reset,
            mask=ctx.mask,
        )
        r = torch.sigmoid(self.gate_proj(torch.lerp(previous, x, self.mix_r.to(x.dtype))))
        return self.o_proj(r * average), None if state is None else RWKV4State(last, sums)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RWKV4State:
        """No tokens."""
        previous = no_token(batch_size, self.mix_k, device, dtype)
        wide = accumulator(previous.dtype)
        return RWKV4State(previous, no_tokens(batch_size, self.width, previous.device, wide))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, R = self.d_model, self.width
        return Cost(4 * D * R + 3 * D + 2 * R, 2 * length * 4 * D * R, 4 * D + 12 * R)
