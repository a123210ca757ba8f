"""minGRU: a gated recurrent unit without a hidden-to-hidden map, so that it scans.

    z_t = sigmoid(W_z x_t),  h_t = (1 - z_t) h_{t-1} + z_t c_t,  y_t = W_o h_t

with a candidate c_t = W_h x_t, or its positive form g(W_h x_t), g(a) = a + 1/2 for a >= 0 and
sigmoid(a) below. O(T) time, a state of `expand * d_model` floats. Feng et al., 2024,
arXiv:2410.01201, section 3.1 and appendix B. The authors make c positive so as to sum logarithms;
here the recurrence itself is run, 1 - z is the sigmoid of the negated gate and loses no digits, and
either candidate is stable.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.kernels.scan import scan
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

CANDIDATES = ("positive", "linear")


class MinGRUState(NamedTuple):
    """h: (B, R), the hidden units after the last token."""

    h: Tensor


class MinGRU(Mixer):
    """Minimal GRU: one gate, a candidate that does not see the past, and a down projection.

    Args:
        d_model: width D.
        expand: hidden units R as a multiple of `d_model`; `expand * d_model` is rounded.
        candidate: `positive` as in appendix B, or `linear` as in section 3.1.
        bias: biases in the projections.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2410.01201"
    kernel = "scan"
    variants = ({"expand": 0.75, "candidate": "linear", "bias": False},)

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 2.0,
        candidate: Literal["positive", "linear"] = "positive",
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, expand=expand)
        if candidate not in CANDIDATES:
            raise unknown("candidate of mingru named", candidate, CANDIDATES)
        self.d_model, self.candidate = d_model, candidate
        self.width = max(1, round(expand * d_model))
        self.in_proj = nn.Linear(d_model, 2 * self.width, bias=bias)  # gates, candidates
        self.down_proj = nn.Linear(self.width, d_model, bias=bias)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        projected = self.in_proj(x)
        gate, candidate = torch.chunk(projected.to(accumulator(x.dtype)), 2, dim=-1)
        if self.candidate == "positive":
            candidate = candidate.clamp(min=0) + torch.sigmoid(candidate.clamp(max=0))
        start = None if state is None else state[0]
        keep, write = torch.sigmoid(-gate), torch.sigmoid(gate) * candidate
        h, last = scan(keep, write, initial_state=start, reset=ctx.reset, mask=ctx.mask)
        y = self.down_proj(h.to(projected.dtype))
        return y, None if state is None else MinGRUState(last)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MinGRUState:
        """Zeros."""
        return MinGRUState(self.zeros(batch_size, self.width, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        weights = 3 * self.d_model * self.width
        biases = 0 if self.in_proj.bias is None else 2 * self.width + self.d_model
        return Cost(weights + biases, 2 * length * weights, 4 * self.width)
