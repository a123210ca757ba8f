"""Mamba-3: a state space by the trapezoidal rule, whose keys and queries turn as the input says.

    z, x, B, C, dt, a, l, theta = W_in u,  dt_t = softplus(dt + b_dt),  lambda_t = sigmoid(l)
    alpha_t = exp(dt_t A_t),  A_t = -max(softplus(a), 1e-4)
    R_t turns channel pairs by phi_t = phi_{t-1} + dt_t pi tanh(theta_t)
    k_t = R_t (RMSNorm(B_t) + b_B),  q_t = R_t (RMSNorm(C_t) + b_C)
    S_t = alpha_t (S_{t-1} + (1 - lambda_t) dt_t k_{t-1} x_{t-1}^T) + lambda_t dt_t k_t x_t^T
    y_t = W_out ((S_t^T q_t + D x_t) * silu(z_t))

O(T) time, a state of `expand d_model d_state` floats, the angles and the last token's k and x; no
short convolution. Lahoti et al., 2026, arXiv:2603.15569, section 3, with one input and one output
(SISO). Published code differs on two points. A is -softplus(a) here, as in the authors' release and
in flash-linear-attention; the authors also have -(1 + a) above zero and -1 / (1 - a) below, which
is heavier in the tail. The pairs that turn are neighbours, as in the authors' SISO kernels; their
MIMO kernels pair channel i with i + N/2.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu, softplus

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.kernels.scan import scan
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.rotary import turn_neighbours
from seqzoo.layers.token_shift import token_shift

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4  # the authors' range of step sizes at initialisation
A_FLOOR = 1e-4
EPS = 1e-5


class Mamba3State(NamedTuple):
    """Angles (B, H, R), heads (B, H, N, P), and k (B, H, N) and x (B, H, P) of the last token."""

    angle: Tensor
    S: Tensor
    k: Tensor
    x: Tensor


class Mamba3(Mixer):
    """Trapezoidal state space with data-dependent rotations and no convolution (Mamba-3).

    Args:
        d_model: width D.
        d_state: states N of each channel.
        expand: the inner width is E = expand * d_model.
        head_dim: channels P of a head; must divide E. The greatest divisor of 64 and E when None.
        n_groups: groups G of heads; those of a group share B and C. Must divide the heads.
        rope_fraction: share of the states that turn, from the first; R pairs of them.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2603.15569"
    kernel = "decay"
    variants = ({"d_state": 7, "head_dim": 8, "n_groups": 2, "rope_fraction": 1.0},)
    ssm_parameters = ("dt_bias",)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        expand: int = 2,
        head_dim: int | None = None,
        n_groups: int = 1,
        rope_fraction: float = 0.5,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, d_state=d_state, expand=expand, n_groups=n_groups)
        inner = expand * d_model
        head_dim = math.gcd(inner, 64) if head_dim is None else head_dim
        check_positive(head_dim=head_dim)
        heads = inner // head_dim
        if inner % head_dim:
            raise not_divisible("expand * d_model", inner, "head_dim", head_dim)
        if heads % n_groups:
            raise not_divisible("heads (expand * d_model / head_dim)", heads, "n_groups", n_groups)
        pairs = int(d_state * rope_fraction) // 2
        if not 0 < rope_fraction <= 1 or pairs == 0:
            raise ValueError(
                f"rope_fraction={rope_fraction} is not allowed; it is above 0, at most 1, and must "
                f"leave 2 of d_state={d_state} states to turn"
            )
        self.d_model, self.inner, self.heads = d_model, inner, heads
        self.d_state, self.n_groups, self.pairs = d_state, n_groups, pairs
        shared = n_groups * d_state
        self.widths = [inner, inner, shared, shared, heads, heads, heads, pairs]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.B_norm = nn.Parameter(torch.empty(d_state))
        self.C_norm = nn.Parameter(torch.empty(d_state))
        self.B_bias = nn.Parameter(torch.empty(heads, d_state))
        self.C_bias = nn.Parameter(torch.empty(heads, d_state))
        self.D = nn.Parameter(torch.empty(heads))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': step sizes log-uniform in [0.001, 0.1], norms, biases and D at one."""
        for p in (self.B_norm, self.C_norm, self.B_bias, self.C_bias, self.D):
            nn.init.ones_(p)
        with torch.no_grad():
            log_dt = torch.empty_like(self.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX))
            dt = log_dt.exp().clamp(min=DT_FLOOR)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        reset, mask, wide = ctx.reset, ctx.mask, accumulator(x.dtype)
        given = Mamba3State(*state) if state is not None else None
        z, v, B, C, dt, a, trapezoid, theta = torch.split(self.in_proj(x), self.widths, dim=-1)
        v = torch.unflatten(v.to(wide), -1, (self.heads, -1))
        dt = softplus(dt.to(wide) + self.dt_bias.to(wide))
        log_decay = -dt * softplus(a.to(wide)).clamp(min=A_FLOOR)
        own, earlier = (dt * torch.sigmoid(s * trapezoid.to(wide)) for s in (1, -1))
        turn = dt[..., None] * math.pi * torch.tanh(theta.to(wide))[:, :, None]
        angle, last_angle = self._angles(turn, given and given.angle, reset, mask)
        k = turn_neighbours(self._features(B, self.B_norm, self.B_bias), angle)
        q = turn_neighbours(self._features(C, self.C_norm, self.C_bias), angle)
        # `earlier` weighs the token before: what a token writes is known at the next one, and read
        # there before its own write (see the equation of S).
        following, first = self._shifted(earlier.flip(1), None if mask is None else mask.flip(1))
        S = None
        if given is not None:
            S = given.S + first[:, 0, :, None, None] * given.k[..., None] * given.x[:, :, None]
        o, S = decay(
            log_decay.exp()[..., None] * q,
            k,
            (own + following.flip(1))[..., None] * v,
            log_decay,
            read="before",
            initial_state=S,
            reset=reset,
            mask=mask,
        )
        o = o + (own[..., None] * (q * k).sum(-1, keepdim=True) + self.D.to(wide)[:, None]) * v
        y = self.out_proj((o.flatten(-2) * silu(z.to(wide))).to(z.dtype))
        if given is None:
            return y, None
        before = torch.cat([given.k, given.x], dim=-1).flatten(1)
        tokens = torch.cat([k, v], dim=-1)
        last = self._shifted(tokens.flatten(-2), mask, before[:, None])[1]
        parts = torch.unflatten(last[:, 0], -1, tokens.shape[2:])
        return y, Mamba3State(
            last_angle, S, *torch.split(parts, [k.shape[-1], v.shape[-1]], dim=-1)
        )

    def _features(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Normed states of each head before they turn, (B, T, H, N)."""
        wide = accumulator(x.dtype)
        x = torch.unflatten(x.to(wide), -1, (self.n_groups, -1))
        x = rms_norm(x, (self.d_state,), eps=EPS) * weight.to(wide)
        return x.repeat_interleave(self.heads // self.n_groups, dim=2) + bias.to(wide)

    def _angles(
        self, turn: Tensor, start: Tensor | None, reset: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Angles of every token and after the last, in [0, 2 pi), from what each token adds.

        The sum is in float64: in float32 the angle at token 65,536 would be 0.001 off.
        """
        exact = torch.float32 if turn.device.type == "mps" else torch.float64
        angle, last = scan(
            torch.ones_like(turn[..., :1, :1].flatten(-2), dtype=exact),
            turn.flatten(-2).to(exact),
            initial_state=None if start is None else start.flatten(-2).to(exact),
            reset=reset,
            mask=mask,
        )
        sizes = turn.shape[-2:]
        angle, last = (torch.unflatten(x % (2 * math.pi), -1, sizes) for x in (angle, last))
        return angle.to(turn.dtype), last.to(turn.dtype)

    def _shifted(
        self, x: Tensor, mask: Tensor | None, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The token before each one, masked ones left out, and the last one of all."""
        return token_shift(x, start, Context(mask=mask))

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Mamba3State:
        """Zeros."""
        H, N, P = self.heads, self.d_state, self.inner // self.heads
        shapes = ((H, self.pairs), (H, N, P), (H, N), (H, P))
        return Mamba3State(
            *(self.zeros(batch_size, *s, device=device, dtype=dtype) for s in shapes)
        )

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, E, H, N, P = self.d_model, self.inner, self.heads, self.d_state, self.inner // self.heads
        products = D * sum(self.widths) + E * D
        flops = 2 * length * (products + 2 * E * N)
        return Cost(
            products + 2 * H + 2 * N + 2 * H * N, flops, 4 * H * (self.pairs + N * P + N + P)
        )
