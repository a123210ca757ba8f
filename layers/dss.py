"""DSS: a diagonal state-space model without B, whose kernel is a sum of weighted exponentials.

    exp:      K_l = Re sum_n W_n (exp(A_n dt) - 1) / A_n exp(l A_n dt)
    softmax:  K_l = Re sum_n W_n / A_n softmax over l of (l A_n dt),  0 <= l < max_length
    y = K * u + skip u,  out = W_o gelu(y)

with N complex eigenvalues A shared by all channels, and a step dt = exp(log_dt) and weights W for
each. O(T log T) time, O(1) a token when streaming, state of 2 N floats a channel. Gupta et al.,
2022, arXiv:2203.14343, sections 3.1 to 3.3. In `exp`, Re A = -exp(log_A_real). In `softmax` it is
free: where it is positive, the kernel grows towards its far end. The softmax of the paper is over
the length of the sequence, so that a prefix changes as the sequence goes on; here it is over
`max_length`. Beyond that the exponentials go on, so keep within it where some of them grow.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.linear_system import Diagonal, discretise, kernel_flops, run_diagonal
from seqzoo.layers.s4d import FREQUENCIES

VERSIONS = ("exp", "softmax")
SAFE = 1e-7  # 1 / x is conj(x) / (|x|^2 + SAFE), as published
STEEPEST = 60.0  # a kernel grows by e^60 at most over `max_length`, which float32 states can hold


class DSSState(NamedTuple):
    """h: (B, D, N, 2), real and imaginary part of the state after the last token."""

    h: Tensor


class DSS(Mixer):
    """Diagonal state space: S4 without the low-rank part and without B.

    Args:
        d_model: width D.
        d_state: complex states N of a channel.
        version: `exp` or `softmax`.
        max_length: positions over which `softmax` normalises; `exp` has no use for it.
        init: imaginary part of A at the start: `legs`, N positive frequencies of the normal part of
            HiPPO-LegS with 2 N states, or `lin`, pi n, or `inv`.
        dt_min: smallest step at the start; steps are log-uniform.
        dt_max: largest step at the start.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2203.14343"
    kernel = "long_conv"
    variants = ({"version": "softmax", "max_length": 80, "d_state": 6, "init": "lin"},)
    # A lower learning rate and no weight decay, as in the authors' code.
    ssm_parameters: ClassVar[tuple[str, ...]] = ("log_dt", "log_A_real", "A_real", "A_imag", "W")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        version: Literal["exp", "softmax"] = "exp",
        max_length: int = 4096,
        init: Literal["legs", "lin", "inv"] = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, d_state=d_state, dt_min=dt_min)
        if max_length < 2:
            raise ValueError(f"max_length={max_length} is not allowed; it must be at least 2")
        if dt_max < dt_min:
            raise ValueError(f"dt_max={dt_max} is not allowed; it must be at least dt_min={dt_min}")
        if version not in VERSIONS:
            raise unknown("version of dss named", version, VERSIONS)
        if init not in FREQUENCIES:
            raise unknown("init of dss named", init, FREQUENCIES)
        self.d_model, self.d_state, self.version = d_model, d_state, version
        self.max_length, self.init, self.dt_range = max_length, init, (dt_min, dt_max)
        self.log_dt = nn.Parameter(torch.empty(d_model))
        if version == "exp":
            self.log_A_real = nn.Parameter(torch.empty(d_state))
        else:
            self.A_real = nn.Parameter(torch.empty(d_state))
        self.A_imag = nn.Parameter(torch.empty(d_state))
        self.W = nn.Parameter(torch.empty(d_model, d_state, 2))  # real, imaginary
        self.skip = nn.Parameter(torch.empty(d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Re A = -1/2, Im A by `init`, log-uniform steps, standard normal parts of W and skip."""
        low, high = (math.log(dt) for dt in self.dt_range)
        nn.init.uniform_(self.log_dt, low, high)
        if self.version == "exp":
            nn.init.constant_(self.log_A_real, math.log(0.5))
        else:
            nn.init.constant_(self.A_real, -0.5)
        nn.init.normal_(self.W)
        nn.init.normal_(self.skip)
        with torch.no_grad():
            self.A_imag.copy_(FREQUENCIES[self.init](2 * self.d_state))

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        h = None if state is None else torch.view_as_complex(state[0])
        u = x.to(accumulator(x.dtype))
        with full_precision(x):
            y, h = run_diagonal(self._system(), u, h, self.skip, ctx.mask, ctx.reset)
        y = self.out_proj(gelu(y).to(x.dtype))
        return y, None if state is None or h is None else DSSState(torch.view_as_real(h))

    def _system(self) -> Diagonal:
        """What gives the kernel: A' = exp(A dt), everything else in b and c."""
        dt, imag = self.log_dt.double().exp()[:, None], self.A_imag.double()
        W = torch.view_as_complex(self.W.double())
        if self.version == "exp":
            log_a, b = discretise(torch.complex(-self.log_A_real.double().exp(), imag), dt, "zoh")
            return Diagonal(log_a, b, W)
        last = self.max_length - 1
        real = (self.A_real.double() * dt).clamp(max=STEEPEST / last)
        log_a = torch.complex(real, imag * dt)
        # Where the terms grow they are counted from the last, which is the largest.
        grows = real > 0
        falling = torch.where(grows, -log_a, log_a)
        total = torch.expm1(falling * self.max_length) * (log_a / dt)
        c = W * torch.expm1(falling) * total.conj() / ((total * total.conj()).real + SAFE)
        return Diagonal(log_a, torch.exp(-last * torch.where(grows, log_a, 0)), c)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DSSState:
        """Zeros."""
        shape = (batch_size, *self.W.shape)
        return DSSState(self.zeros(*shape, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`; products are those of the kernel and of the output projection."""
        D, N = self.d_model, self.d_state
        parameters = 2 * D + 2 * N + 2 * D * N + D * (D + 1)
        return Cost(parameters, kernel_flops(D, N, length) + length * 2 * D * D, 4 * 2 * D * N)
