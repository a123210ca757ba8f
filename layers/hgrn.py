"""HGRN: a gated linear recurrence whose forget gate has a floor that rises with depth.

    f_t = lower_bound + (1 - lower_bound) sigmoid(W_f x_t)
    h_t = f_t e^{i theta} h_{t-1} + (1 - f_t) silu(W_i x_t),  y_t = W_o (LN(h_t) * silu(W_g x_t))

The recurrence is real (theta = 0), or complex with a learned angle per unit, where W_i gives pairs
and real and imaginary parts stand side by side after it. O(T) time, a state of `expand * d_model`
floats, twice that when complex. Qin et al., 2023, arXiv:2311.04823, section 3. Norm, gate
and biases are those of the authors' code (Doraemonzzz/hgru-pytorch).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive
from seqzoo.kernels.scan import scan
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State


class HGRNState(NamedTuple):
    """h: (B, R), or (B, R, 2) with real and imaginary part; the units after the last token."""

    h: Tensor


class HGRN(Mixer):
    """Hierarchically gated recurrence: forget gates bounded below by their layer's share (HGRN).

    In the paper the bounds are learned over the whole stack: layer l of L has the sum of the first
    l of L softmax weights, 0 in the first. A mixer knows nothing of its stack, so the bound is an
    option here; equal weights give l / L.

    Args:
        d_model: width D.
        expand: units R as a multiple of `d_model`.
        lower_bound: the floor of the forget gate, in [0, 1).
        complex_state: turn each unit by a learned angle; the paper's models do.
        bias: biases in the projections.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2311.04823"
    kernel = "scan"
    variants = ({"complex_state": True, "lower_bound": 0.4}, {"expand": 2, "bias": False})
    ssm_parameters = ("theta",)

    def __init__(
        self,
        d_model: int,
        *,
        expand: int = 1,
        lower_bound: float = 0.0,
        complex_state: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, expand=expand)
        if not 0 <= lower_bound < 1:
            raise ValueError(f"lower_bound={lower_bound} is not allowed; it must be in [0, 1)")
        self.d_model, self.width, self.lower_bound = d_model, expand * d_model, lower_bound
        features = 2 * self.width if complex_state else self.width
        self.in_proj = nn.Linear(d_model, features, bias=bias)
        self.forget_proj = nn.Linear(d_model, self.width, bias=bias)
        self.gate_proj = nn.Linear(d_model, features, bias=bias)
        self.norm = nn.LayerNorm(features)
        self.out_proj = nn.Linear(features, d_model, bias=bias)
        self.theta = nn.Parameter(torch.empty(self.width)) if complex_state else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Angles 10000^(-2 k / R) as in rotary embeddings; the projections as `nn.Linear` does."""
        if self.theta is not None:
            with torch.no_grad():
                k = torch.arange(self.width, dtype=torch.float64, device="cpu")
                self.theta.copy_(10000 ** (-2 * k / self.width))

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        inputs, gate = silu(self.in_proj(x)), silu(self.gate_proj(x))
        logits = self.forget_proj(x).to(accumulator(x.dtype))
        forget = self.lower_bound + (1 - self.lower_bound) * torch.sigmoid(logits)
        write = (1 - self.lower_bound) * torch.sigmoid(-logits)  # 1 - forget, to the last digit
        start = None if state is None else state[0]
        if self.theta is None:
            h, last = scan(
                forget, write * inputs, initial_state=start, reset=ctx.reset, mask=ctx.mask
            )
        else:
            theta = self.theta.to(forget.dtype)
            pairs = torch.unflatten(inputs.to(forget.dtype), -1, (-1, 2))
            turned, last = scan(
                torch.complex(forget * theta.cos(), forget * theta.sin()),
                torch.complex(write * pairs[..., 0], write * pairs[..., 1]),
                initial_state=None if start is None else torch.view_as_complex(start),
                reset=ctx.reset,
                mask=ctx.mask,
            )
            h, last = torch.cat([turned.real, turned.imag], dim=-1), torch.view_as_real(last)
        weight, bias = self.norm.weight.to(h.dtype), self.norm.bias.to(h.dtype)
        h = layer_norm(h, h.shape[-1:], weight, bias, self.norm.eps)
        y = self.out_proj(h.to(gate.dtype) * gate)
        return y, None if state is None else HGRNState(last)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HGRNState:
        """Zeros."""
        shape = (self.width,) if self.theta is None else (self.width, 2)
        return HGRNState(self.zeros(batch_size, *shape, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, R, F = self.d_model, self.width, self.in_proj.out_features
        weights = 3 * D * F + D * R
        biases = 0 if self.in_proj.bias is None else 2 * F + R + D
        angles = 0 if self.theta is None else R
        return Cost(weights + biases + 2 * F + angles, 2 * length * weights, 4 * F)
