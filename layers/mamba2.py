"""Mamba-2: a state space with one decay per head, written as decayed linear attention (SSD).

    z, u, dt = W_in x,  [x, B, C] = silu(conv4(u)),  dt = clamp(softplus(dt + b)),  a = -exp(A_log)
    S_t = exp(dt_t a) S_{t-1} + B_t (dt_t x_t)^T,  y_t = C_t^T S_t + D x_t
    out = W_out (RMSNorm(y * silu(z)))

O(T) time, a state of `expand d_model d_state` floats and the convolution's tail. Dao and Gu, 2024,
arXiv:2405.21060, section 7. As in the authors' code, the norm comes after the gate and is taken
over each of the `n_groups` groups of heads that share B and C.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu, softplus

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.kernels.short_conv import short_conv
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4  # the authors' range of step sizes at initialisation
A_MIN, A_MAX = 1.0, 16.0  # and of decay rates
EPS = 1e-5


class Mamba2State(NamedTuple):
    """Tail of the convolution (B, W-1, E + 2 G N) and state of the heads (B, H, N, P)."""

    tail: Tensor
    S: Tensor


class Mamba2(Mixer):
    """State-space duality: heads with a scalar decay, which share their B and C (Mamba-2).

    Args:
        d_model: width D.
        d_state: states N of each channel.
        d_conv: width W of the short convolution.
        expand: the inner width is E = expand * d_model.
        head_dim: channels P of a head; must divide E. The greatest divisor of 64 and E when None.
        n_groups: groups G of heads; those of a group share B and C. Must divide the heads.
        bias: biases in `in_proj` and `out_proj`.
        conv_bias: a bias in the convolution.
        dt_limit: smallest and largest step size.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2405.21060"
    kernel = "decay"
    variants = (
        {"d_state": 5, "head_dim": 4, "n_groups": 2, "bias": True, "conv_bias": False},
        {"d_state": 8, "head_dim": 16, "d_conv": 1, "dt_limit": (0.01, 0.5)},
    )
    ssm_parameters = ("A_log", "dt_bias")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int | None = None,
        n_groups: int = 1,
        bias: bool = False,
        conv_bias: bool = True,
        dt_limit: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        inner = expand * d_model
        head_dim = math.gcd(inner, 64) if head_dim is None else head_dim
        check_positive(head_dim=head_dim, n_groups=n_groups)
        heads = inner // head_dim
        if inner % head_dim:
            raise not_divisible("expand * d_model", inner, "head_dim", head_dim)
        if heads % n_groups:
            raise not_divisible("heads (expand * d_model / head_dim)", heads, "n_groups", n_groups)
        low, high = dt_limit
        if not 0 <= low < high:
            raise ValueError(f"dt_limit={tuple(dt_limit)} is not allowed; it needs 0 <= low < high")
        self.d_model, self.inner, self.heads = d_model, inner, heads
        self.d_state, self.n_groups, self.dt_limit = d_state, n_groups, (low, high)
        width = inner + 2 * n_groups * d_state
        self.in_proj = nn.Linear(d_model, inner + width + heads, bias=bias)  # z, [x, B, C], dt
        self.conv_weight = nn.Parameter(torch.empty(width, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(width)) if conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': -a uniform in [1, 16], step sizes log-uniform in [0.001, 0.1], D = 1.

        The convolution starts as `nn.Conv1d` does.
        """
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.conv_bias is not None:
            nn.init.uniform_(self.conv_bias, -bound, bound)
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm_weight)
        with torch.no_grad():
            self.A_log.copy_(torch.empty_like(self.A_log).uniform_(A_MIN, A_MAX).log())
            log_dt = torch.empty_like(self.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX))
            dt = log_dt.exp().clamp(min=DT_FLOOR)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        tail, S = state if state is not None else (None, None)
        reset, mask = ctx.reset, ctx.mask
        width = self.conv_weight.shape[0]
        z, u, dt = torch.split(self.in_proj(x), [self.inner, width, self.heads], dim=-1)
        u, tail = short_conv(
            u,
            self.conv_weight,
            self.conv_bias,
            activation="silu",
            initial_state=tail,
            reset=reset,
            mask=mask,
        )
        shared = self.n_groups * self.d_state
        u, B, C = torch.split(u, [self.inner, shared, shared], dim=-1)
        wide = accumulator(x.dtype)
        dt = softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.dt_limit)
        log_decay = -dt * self.A_log.to(wide).exp()
        u = torch.unflatten(u.to(wide), -1, (self.heads, -1))
        B, C = (torch.unflatten(v, -1, (self.n_groups, -1)) for v in (B, C))
        y, S = decay(C, B, dt[..., None] * u, log_decay, initial_state=S, reset=reset, mask=mask)
        y = y + self.D.to(wide)[:, None] * u
        y = self.out_proj(self._gated_norm(y.flatten(-2), z))
        return y, None if state is None else Mamba2State(tail, S)

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """RMSNorm(y * silu(z)) in the dtype of `y`, returned in that of `z`."""
        groups = torch.unflatten(y * silu(z.to(y.dtype)), -1, (self.n_groups, -1))
        y = rms_norm(groups, groups.shape[-1:], eps=EPS).flatten(-2)
        return (y * self.norm_weight.to(y.dtype)).to(z.dtype)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Mamba2State:
        """Zeros."""
        width, W = self.conv_weight.shape
        P = self.inner // self.heads
        S = self.zeros(batch_size, self.heads, self.d_state, P, device=device, dtype=dtype)
        tail = torch.zeros(
            batch_size, W - 1, width, device=S.device, dtype=dtype or self.conv_weight.dtype
        )
        return Mamba2State(tail, S)

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, E, H, N = self.d_model, self.inner, self.heads, self.d_state
        width, W = self.conv_weight.shape
        projected = E + width + H
        products = D * projected + E * D
        biases = 0 if self.in_proj.bias is None else projected + D
        convolution = width * W if self.conv_bias is None else width * (W + 1)
        parameters = products + biases + convolution + 3 * H + E
        flops = 2 * length * (products + 2 * E * N)
        return Cost(parameters, flops, 4 * (width * (W - 1) + E * N))
