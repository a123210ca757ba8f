"""S5: one state-space model with many inputs and outputs, diagonal, run as a recurrence.

    h_t = A' h_{t-1} + B' u_t,  y_t = 2 Re(C h_t) + skip u_t
    out = gelu(y) * sigmoid(W_g gelu(y))

with P/2 complex states standing for P in conjugate pairs, A = A_real + i A_imag, a step exp(log_dt)
for each state, and (A', B') from (A, B) by zero-order hold or the bilinear rule. O(T) time, a state
of P floats. Smith et al., 2022, arXiv:2208.04933, sections 3 and 4, and appendix B. Re A is held
at -1e-4 or below, as the authors' code does for autoregressive tasks (`clip_eigs`), and GELU is by
its tanh formula, as theirs.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive, not_divisible, unknown
from seqzoo.kernels.scan import scan
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

SLOWEST = -1e-4  # the largest real part allowed to an eigenvalue
TRUNCATED = 0.87962566103423978  # standard deviation of a normal variable cut at +-2


class S5State(NamedTuple):
    """h: (B, P/2, 2), real and imaginary part of the state after the last token."""

    h: Tensor


class S5(Mixer):
    """Simplified state-space model: all channels share one diagonal system of P states (S5).

    Args:
        d_model: width D.
        d_state: states P of the whole layer; each block has an even number.
        n_blocks: blocks of the block-diagonal HiPPO-N matrix that A starts from.
        discretisation: `zoh` or `bilinear`.
        dt_min: smallest step at the start; steps are log-uniform.
        dt_max: largest step at the start.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2208.04933"
    kernel = "scan"
    variants = ({"d_state": 12, "n_blocks": 3, "discretisation": "bilinear"},)
    # A lower learning rate and no weight decay, as the authors train these.
    ssm_parameters = ("A_real", "A_imag", "B", "log_dt")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        n_blocks: int = 2,
        discretisation: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, d_state=d_state, n_blocks=n_blocks, dt_min=dt_min)
        if d_state % (2 * n_blocks):
            raise not_divisible("d_state", d_state, "2 * n_blocks", 2 * n_blocks)
        if dt_max < dt_min:
            raise ValueError(f"dt_max={dt_max} is not allowed; it must be at least dt_min={dt_min}")
        if discretisation not in ("zoh", "bilinear"):
            raise unknown("discretisation of s5 named", discretisation, ("zoh", "bilinear"))
        self.d_model, self.d_state, self.n_blocks = d_model, d_state, n_blocks
        self.discretisation, self.dt_range = discretisation, (dt_min, dt_max)
        self.A_real = nn.Parameter(torch.empty(d_state // 2))
        self.A_imag = nn.Parameter(torch.empty(d_state // 2))
        self.B = nn.Parameter(torch.empty(d_state // 2, d_model, 2))  # real, imaginary
        self.C = nn.Parameter(torch.empty(d_model, d_state // 2, 2))
        self.log_dt = nn.Parameter(torch.empty(d_state // 2))
        self.skip = nn.Parameter(torch.empty(d_model))
        self.gate_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': A the spectrum of HiPPO-N, B and C turned into its eigenvectors.

        Before that, entries of B and real and imaginary parts of C are truncated normal with
        variance 1/P, which is LeCun's rule as their code applies it. Steps are log-uniform, the
        skip normal; the gate starts as `nn.Linear` does.
        """
        J, D, n = self.n_blocks, self.d_model, self.d_state // self.n_blocks
        eigenvalues, V = _hippo_n(n)
        std = self.d_state**-0.5 / TRUNCATED
        draws = torch.empty(3, J, n, D, dtype=torch.float64, device="cpu")
        nn.init.trunc_normal_(draws, std=std, a=-2 * std, b=2 * std)
        B = (V.mH @ draws[0].to(V.dtype)).flatten(0, 1)
        C = (V.mT @ torch.complex(draws[1], draws[2])).flatten(0, 1).mT
        with torch.no_grad():
            self.A_real.copy_(eigenvalues.real.repeat(J))
            self.A_imag.copy_(eigenvalues.imag.repeat(J))
            self.B.copy_(torch.view_as_real(B))
            self.C.copy_(torch.view_as_real(C))
        low, high = (math.log(dt) for dt in self.dt_range)
        nn.init.uniform_(self.log_dt, low, high)
        nn.init.normal_(self.skip)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        wide = accumulator(x.dtype)
        u = x.to(wide)
        with full_precision(x):
            B, C = self.B.to(wide), self.C.to(wide)
            inputs = torch.complex(linear(u, B[..., 0]), linear(u, B[..., 1]))
            a, gain = (s.to(inputs.dtype) for s in self._discretised())
            h, last = scan(
                a,
                gain * inputs,
                initial_state=None if state is None else torch.view_as_complex(state[0]),
                reset=ctx.reset,
                mask=ctx.mask,
            )
            y = 2 * (linear(h.real, C[..., 0]) - linear(h.imag, C[..., 1]))
            y = gelu(y + self.skip.to(wide) * u, approximate="tanh").to(x.dtype)
        y = y * torch.sigmoid(self.gate_proj(y))
        return y, None if state is None else S5State(torch.view_as_real(last))

    def _discretised(self) -> tuple[Tensor, Tensor]:
        """A' and what B' is of B, (P/2,).

        In complex128: rounding the angle of A' adds up over the tokens that a state remembers.
        """
        A = torch.complex(self.A_real.double().clamp(max=SLOWEST), self.A_imag.double())
        dt = self.log_dt.double().exp()
        if self.discretisation == "zoh":
            return torch.exp(dt * A), torch.expm1(dt * A) / A
        half = dt * A / 2
        return (1 + half) / (1 - half), dt / (1 - half)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> S5State:
        """Zeros."""
        return S5State(self.zeros(batch_size, self.d_state // 2, 2, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, P = self.d_model, self.d_state
        parameters = 3 * (P // 2) + 2 * D * P + D + D * (D + 1)
        return Cost(parameters, length * 2 * (2 * D * P + D * D), 4 * P)


def _hippo_n(n: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n/2,) and eigenvectors (n, n/2) of the normal part of HiPPO-LegS, one a pair.

    That part is -1/2 plus a skew matrix.
    """
    root = torch.sqrt(2 * torch.arange(n, dtype=torch.float64, device="cpu") + 1)
    skew = 0.5 * root[:, None] * root
    skew = skew.triu(1) - skew.tril(-1)
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    frequencies = frequencies[n // 2 :]
    return torch.complex(torch.full_like(frequencies, -0.5), frequencies), vectors[:, n // 2 :]
