"""Mamba: a gated block around a short convolution and a selective state space (S6).

    u, z = W_in x,  u = silu(conv4(u)),  [r, B, C] = W_x u,  dt = softplus(W_dt r + b)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,  y = W_out ((C_t . h_t + D u_t) * silu(z_t))

with A = -exp(A_log). O(T) time, a state of `expand d_model d_state` floats and the convolution's
tail. Gu and Dao, 2023, arXiv:2312.00752, section 3. The bias of dt is a parameter beside `dt_proj`,
not in it, so that it is added in float32 under autocast. `norms` is Falcon-Mamba's change: RMS
norms without weights on r, B and C (Zuo et al., 2024, arXiv:2410.05355).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu, softplus

from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.short_conv import short_conv
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4  # the authors' range of step sizes at initialisation


class MambaState(NamedTuple):
    """Tail of the convolution (B, W-1, E) and state of the scan (B, E, N)."""

    tail: Tensor
    h: Tensor


class Mamba(Mixer):
    """Selective state space with input-dependent step size, input and output (Mamba, S6).

    Args:
        d_model: width D.
        d_state: states N of each channel.
        d_conv: width W of the short convolution.
        expand: the inner width is E = expand * d_model.
        dt_rank: rank R of the step size's projection; ceil(d_model / 16) when None.
        bias: biases in `in_proj` and `out_proj`.
        conv_bias: a bias in the convolution.
        norms: RMS norms on the step size's input, B and C, as in Falcon-Mamba.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2312.00752"
    kernel = "selective_scan"
    variants = ({"norms": True, "d_conv": 1, "bias": True, "conv_bias": False},)
    ssm_parameters = ("A_log", "dt_bias")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        norms: bool = False,
    ) -> None:
        super().__init__()
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        check_positive(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=rank)
        self.d_model, self.d_state, self.rank, self.norms = d_model, d_state, rank, norms
        inner = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv_weight = nn.Parameter(torch.empty(inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(inner)) if conv_bias else None
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': A = -(1 ... N), step sizes log-uniform in [0.001, 0.1], D = 1.

        The convolution starts as `nn.Conv1d` does. So do the projections as `nn.Linear` does, which
        for `dt_proj` is the authors' uniform in +-R^-0.5.
        """
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.conv_bias is not None:
            nn.init.uniform_(self.conv_bias, -bound, bound)
        nn.init.ones_(self.D)
        with torch.no_grad():
            log_dt = torch.empty_like(self.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX))
            dt = log_dt.exp().clamp(min=DT_FLOOR)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)
            self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log())

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        tail, h = state if state is not None else (None, None)
        reset, mask = ctx.reset, ctx.mask
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, tail = short_conv(
            u,
            self.conv_weight,
            self.conv_bias,
            activation="silu",
            initial_state=tail,
            reset=reset,
            mask=mask,
        )
        dt, B, C = self._select(u)
        A = -self.A_log.to(dt.dtype).exp()
        y, h = selective_scan(u, dt, A, B, C, self.D, initial_state=h, reset=reset, mask=mask)
        y = self.out_proj(y * silu(z))
        return y, None if state is None else MambaState(tail, h)

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (B, T, E) in float32 or wider, B and C (B, T, N)."""
        r, B, C = self.x_proj(u).split([self.rank, self.d_state, self.d_state], dim=-1)
        if self.norms:
            r, B, C = (
                rms_norm(v.to(accumulator(v.dtype)), v.shape[-1:], eps=1e-6) for v in (r, B, C)
            )
        r = self.dt_proj(r.to(u.dtype))
        wide = accumulator(r.dtype)
        return softplus(r.to(wide) + self.dt_bias.to(wide)), B, C

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """Zeros."""
        E, W = self.conv_weight.shape
        h = self.zeros(batch_size, E, self.d_state, device=device, dtype=dtype)
        tail = torch.zeros(
            batch_size, W - 1, E, device=h.device, dtype=dtype or self.conv_weight.dtype
        )
        return MambaState(tail, h)

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, N, R = self.d_model, self.d_state, self.rank
        E, W = self.conv_weight.shape
        products = 3 * D * E + E * (2 * R + 2 * N)  # the four projections
        biases = 0 if self.in_proj.bias is None else 2 * E + D
        convolution = E * W if self.conv_bias is None else E * (W + 1)
        parameters = products + biases + convolution + E * (N + 2)
        flops = 2 * length * (products + E * N)
        return Cost(parameters, flops, 4 * E * (W - 1 + N))
