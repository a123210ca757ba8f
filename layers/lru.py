"""The linear recurrent unit: a diagonal complex recurrence between two dense maps.

    h_t = lambda h_{t-1} + exp(gamma_log) (B u_t),  lambda = exp(-exp(nu_log) + i exp(theta_log))
    y_t = Re(C h_t) + skip u_t,  out = GLU(W_o gelu(y))

with N complex states, B (N, D) and C (D, N) complex, and a skip per channel. O(T) time, a state of
2 N floats. Orvieto et al., 2023, arXiv:2303.06349, sections 3.2 to 3.4. What follows the recurrence
is that of NicolasZucchet/minimal-LRU, GELU by its tanh formula included.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, linear

from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive
from seqzoo.kernels.scan import scan
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State


class LRUState(NamedTuple):
    """h: (B, N, 2), real and imaginary part of the state after the last token."""

    h: Tensor


class LRU(Mixer):
    """Linear recurrent unit: complex eigenvalues started on a ring, inputs normalised (LRU).

    Args:
        d_model: width D.
        d_state: complex states N; `d_model` when None.
        r_min: smallest |lambda| at the start.
        r_max: largest |lambda| at the start, at most 1; for long memories both are near 1.
        max_phase: largest angle of lambda at the start, in radians.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2303.06349"
    kernel = "scan"
    variants = ({"d_state": 24, "r_min": 0.9, "r_max": 0.999, "max_phase": 0.3},)
    # A lower learning rate and no weight decay, as the authors train what makes the recurrence.
    ssm_parameters = ("nu_log", "theta_log", "gamma_log", "B")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state = d_model, d_model if d_state is None else d_state
        check_positive(d_model=d_model, d_state=self.d_state, max_phase=max_phase)
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"r_min={r_min}, r_max={r_max}: allowed is 0 <= r_min < r_max <= 1")
        self.ring, self.max_phase = (r_min, r_max), max_phase
        self.nu_log = nn.Parameter(torch.empty(self.d_state))
        self.theta_log = nn.Parameter(torch.empty(self.d_state))
        self.gamma_log = nn.Parameter(torch.empty(self.d_state))
        self.B = nn.Parameter(torch.empty(self.d_state, d_model, 2))  # real, imaginary
        self.C = nn.Parameter(torch.empty(d_model, self.d_state, 2))
        self.skip = nn.Parameter(torch.empty(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': lambda uniform by area on the ring, gamma^2 = 1 - |lambda|^2.

        Parts of B and C are normal with variances 1 / (2 D) and 1 / N, the skip is standard normal.
        The output projection starts as `nn.Linear` does.
        """
        low, high = (r**2 for r in self.ring)
        draws = torch.empty(2, self.d_state, dtype=torch.float64, device=self.nu_log.device)
        square, turn = draws.uniform_().clamp(min=1e-12)
        with torch.no_grad():
            nu = -0.5 * torch.log(low + (high - low) * square)
            self.nu_log.copy_(nu.log())
            self.theta_log.copy_(torch.log(self.max_phase * turn))
            self.gamma_log.copy_(0.5 * torch.log(-torch.expm1(-2 * nu)))
        nn.init.normal_(self.B, std=(2 * self.d_model) ** -0.5)
        nn.init.normal_(self.C, std=self.d_state**-0.5)
        nn.init.normal_(self.skip)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        wide = accumulator(x.dtype)
        u = x.to(wide)
        # In float64: rounding the angle of lambda adds up over the tokens that a state remembers.
        nu, theta = self.nu_log.double().exp(), self.theta_log.double().exp()
        eigenvalue = torch.exp(torch.complex(-nu, theta))
        with full_precision(x):
            B, C, gamma = self.B.to(wide), self.C.to(wide), self.gamma_log.to(wide).exp()
            inputs = torch.complex(gamma * linear(u, B[..., 0]), gamma * linear(u, B[..., 1]))
            h, last = scan(
                eigenvalue.to(inputs.dtype),
                inputs,
                initial_state=None if state is None else torch.view_as_complex(state[0]),
                reset=ctx.reset,
                mask=ctx.mask,
            )
            y = linear(h.real, C[..., 0]) - linear(h.imag, C[..., 1]) + self.skip.to(wide) * u
        y = glu(self.out_proj(gelu(y, approximate="tanh").to(x.dtype)), dim=-1)
        return y, None if state is None else LRUState(torch.view_as_real(last))

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LRUState:
        """Zeros."""
        return LRUState(self.zeros(batch_size, self.d_state, 2, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, N = self.d_model, self.d_state
        parameters = 3 * N + 4 * D * N + D + 2 * D * (D + 1)
        return Cost(parameters, length * 2 * (4 * D * N + 2 * D * D), 4 * 2 * N)
