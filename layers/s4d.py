"""S4D: a diagonal linear time-invariant state-space model of every channel.

    h_t = A' h_{t-1} + B' u_t,  y_t = 2 Re(C h_t) + skip u_t,  out = GLU(W_o gelu(y))

with N/2 complex states a channel standing for N in conjugate pairs, B = 1,
A = -exp(log_A_real) + i A_imag, and (A', B') from (A, B) by zero-order hold or the bilinear rule
with step exp(log_dt). The same map is a convolution with K_l = 2 Re sum_n C_n B'_n A'_n^l:
O(T log T) time, O(1) a token when streaming, state of N floats a channel. Gu et al., 2022,
arXiv:2206.11893, sections 3 and 4.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu

from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.linear_system import Diagonal, discretise, kernel_flops, run_diagonal


class S4DState(NamedTuple):
    """h: (B, D, N/2, 2), real and imaginary part of the state after the last token."""

    h: Tensor


class S4D(Mixer):
    """Diagonal state-space model: a long convolution in training, a recurrence when streaming.

    Args:
        d_model: width D.
        d_state: states N of a channel, even.
        init: A at the start: `lin` -1/2 + i pi n, `inv` -1/2 + i N/pi (N/(2n+1) - 1), or `legs`,
            the eigenvalues of the normal part of HiPPO-LegS.
        discretisation: `zoh` or `bilinear`.
        dt_min: smallest step at the start; steps are log-uniform.
        dt_max: largest step at the start.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2206.11893"
    kernel = "long_conv"
    variants = ({"init": "legs", "discretisation": "bilinear", "d_state": 6}, {"init": "inv"})
    # Trained with a lower learning rate and without weight decay, section 4.3 of arXiv:2111.00396.
    ssm_parameters: ClassVar[tuple[str, ...]] = ("log_dt", "log_A_real", "A_imag")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: Literal["lin", "inv", "legs"] = "lin",
        discretisation: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, d_state=d_state, dt_min=dt_min)
        if d_state % 2:
            near = f"{d_state - 1}, {d_state + 1}"
            raise ValueError(f"d_state={d_state} is odd; states come in pairs; nearest: {near}")
        if dt_max < dt_min:
            raise ValueError(f"dt_max={dt_max} is not allowed; it must be at least dt_min={dt_min}")
        if init not in FREQUENCIES:
            raise unknown("init of s4d named", init, FREQUENCIES)
        if discretisation not in ("zoh", "bilinear"):
            raise unknown("discretisation of s4d named", discretisation, ("zoh", "bilinear"))
        self.d_model, self.d_state = d_model, d_state
        self.init, self.discretisation, self.dt_range = init, discretisation, (dt_min, dt_max)
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_A_real = nn.Parameter(torch.empty(d_model, d_state // 2))
        self.A_imag = nn.Parameter(torch.empty(d_model, d_state // 2))
        self.C = nn.Parameter(torch.empty(d_model, d_state // 2, 2))  # real, imaginary
        self.skip = nn.Parameter(torch.empty(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A by `init`, Re A = -1/2, log-uniform steps, standard complex normal C, normal skip."""
        low, high = (math.log(dt) for dt in self.dt_range)
        nn.init.uniform_(self.log_dt, low, high)
        nn.init.constant_(self.log_A_real, math.log(0.5))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.skip)
        with torch.no_grad():
            self.A_imag.copy_(FREQUENCIES[self.init](self.d_state))

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        h = None if state is None else torch.view_as_complex(state[0])
        u = x.to(accumulator(x.dtype))
        with full_precision(x):
            log_a, b, c = self._system()
            system = Diagonal(log_a, b, 2 * c)
            y, h = run_diagonal(system, u, h, self.skip, ctx.mask, ctx.reset)
        y = glu(self.out_proj(gelu(y).to(x.dtype)), dim=-1)
        return y, None if state is None or h is None else S4DState(torch.view_as_real(h))

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """The logarithm of A', B' and C, (D, N/2), complex128."""
        dt = self.log_dt.double().exp()[:, None]
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        c = torch.view_as_complex(self.C.double())
        log_a, b = discretise(A, dt, self.discretisation)
        return log_a, b, c

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> S4DState:
        """Zeros."""
        shape = (batch_size, *self.C.shape)
        return S4DState(self.zeros(*shape, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`; products are those of the kernel and of the output projection."""
        D, N = self.d_model, self.d_state
        parameters = 2 * D + 2 * D * N + 2 * D * (D + 1)
        flops = kernel_flops(D, N // 2, length) + length * 2 * D * 2 * D
        return Cost(parameters, flops, 4 * D * N)


def _lin(n_states: int) -> Tensor:
    return math.pi * torch.arange(n_states // 2, dtype=torch.float64, device="cpu")


def _inv(n_states: int) -> Tensor:
    n = torch.arange(n_states // 2, dtype=torch.float64, device="cpu")
    return n_states / math.pi * (n_states / (2 * n + 1) - 1)


def _legs(n_states: int) -> Tensor:
    """HiPPO-LegS plus its rank-one part is -1/2 + a skew matrix; its eigenvalues, upper half."""
    root = torch.sqrt(2 * torch.arange(n_states, dtype=torch.float64, device="cpu") + 1)
    skew = 0.5 * root[:, None] * root
    skew = skew.triu(1) - skew.tril(-1)
    eigenvalues: Tensor = torch.linalg.eigvalsh(1j * skew)
    return eigenvalues[n_states // 2 :]


FREQUENCIES = {"lin": _lin, "inv": _inv, "legs": _legs}
