"""HGRN2: a gated linear recurrence that writes what it forgets, with states of K channels a value.

    f_t = lower_bound + (1 - lower_bound) sigmoid(W_f x_t)
    S_t = Diag(f_t) S_{t-1} + (1 - f_t) (W_i x_t)^T,  o_t = S_t^T swish(W_q x_t)
    y_t = W_o RMSNorm(o_t)

O(T) time, a state of `d_state d_model` floats. Qin et al., 2024, arXiv:2404.07904, section 3.
The norm spans all heads together and follows no gate, as in the language models of
flash-linear-attention; their 1/sqrt(K), which that norm cancels up to its eps, is kept.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, rms_norm, silu, softplus

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

EPS = 1e-5


class HGRN2State(NamedTuple):
    """State of the heads, (B, H, N, V)."""

    S: Tensor


class HGRN2(Mixer):
    """Gated linear recurrence with outer-product state expansion and tied gates (HGRN2).

    In the paper the bounds are learned over the whole stack, as a cumulative softmax over its
    layers that is 0 in the first. A mixer knows nothing of its stack, so the bound is an option
    here; equal weights give l / L in layer l of L.

    Args:
        d_model: width D.
        d_state: the expansion ratio N: state channels of each value; the largest divisor of
            `d_model` up to 128 when None. There are D / N heads.
        lower_bound: the floor of the forget gate, in [0, 1).
        bias: biases in the projections.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2404.07904"
    kernel = "decay"
    variants = ({"d_state": 8, "lower_bound": 0.4, "bias": True},)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        lower_bound: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model)
        if d_state is None:
            d_state = next(n for n in range(min(d_model, 128), 0, -1) if d_model % n == 0)
        check_positive(d_state=d_state)
        if d_model % d_state:
            raise not_divisible("d_model", d_model, "d_state", d_state)
        if not 0 <= lower_bound < 1:
            raise ValueError(f"lower_bound={lower_bound} is not allowed; it must be in [0, 1)")
        self.d_model, self.d_state, self.lower_bound = d_model, d_state, lower_bound
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.forget_proj = nn.Linear(d_model, d_model, bias=bias)
        self.in_proj = nn.Linear(d_model, d_model, bias=bias)
        self.norm = nn.RMSNorm(d_model, eps=EPS)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        q, logits, v = self.q_proj(x), self.forget_proj(x), self.in_proj(x)
        dtype, wide = v.dtype, accumulator(x.dtype)
        q, logits, v = (
            torch.unflatten(p.to(wide), -1, (self.d_model // self.d_state, -1))
            for p in (q, logits, v)
        )
        o, S = decay(
            silu(q),
            (1 - self.lower_bound) * torch.sigmoid(-logits),  # 1 - f, to the last digit
            v,
            self._log_forget(logits),
            scale=self.d_state**-0.5,
            initial_state=None if state is None else state[0],
            reset=ctx.reset,
            mask=ctx.mask,
        )
        y = rms_norm(o.flatten(-2), (self.d_model,), self.norm.weight.to(wide), EPS)
        y = self.o_proj(y.to(dtype))
        return y, None if state is None else HGRN2State(S)

    def _log_forget(self, logits: Tensor) -> Tensor:
        """Log f, with all digits as f nears 1: f = sigmoid(l) (1 + lower_bound e^-l)."""
        if self.lower_bound == 0:
            return logsigmoid(logits)
        return logsigmoid(logits) + softplus(math.log(self.lower_bound) - logits, threshold=50)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HGRN2State:
        """Zeros."""
        heads, N = self.d_model // self.d_state, self.d_state
        return HGRN2State(self.zeros(batch_size, heads, N, N, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, N = self.d_model, self.d_state
        biases = 0 if self.q_proj.bias is None else 4 * D
        flops = 2 * length * (4 * D * D + 2 * D * N)
        return Cost(4 * D * D + biases + D, flops, 4 * D * N)
