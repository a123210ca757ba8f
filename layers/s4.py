"""S4: a state-space model of every channel, its matrix normal plus low rank, started from HiPPO.

    h_t = A' h_{t-1} + B' u_t,  y_t = 2 Re(C h_t) + skip u_t,  out = GLU(W_o gelu(y))
    A h = Lambda h - sum_r P_r 2 Re(P_r^H h),  Lambda = -exp(log_A_real) + i A_imag

with N/2 complex states a channel standing for N in conjugate pairs, and (A', B') from (A, B) by the
bilinear rule with step exp(log_dt). O(T log T) time, O(N) a channel and token when streaming, state
of N floats a channel. Gu et al., 2021, arXiv:2111.00396, sections 2 and 3.

Both halves of the low-rank part are P, which keeps A' a contraction whatever is learned (Goel et
al., 2022, arXiv:2202.09729, section 4.2; the authors' code does so since). The paper learns
C (1 - A'^L), which ties its kernel to a length L, and evaluates a generating function at roots of
unity. Here C itself is learned, and the kernel is C A'^(64 i) times A'^j B' from repeated squares
of A', in float64: exact at every length, in O(N^3 log T) a channel on top of the convolution.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, pad

from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.linear_system import BLOCK, STEPS, complex_like, convolve

WITHIN = BLOCK.bit_length() - 1  # squares of A' that reach over one block
SLOWEST = 1e-4  # the least -Re Lambda at the start, where HiPPO has 0


class S4State(NamedTuple):
    """h: (B, D, N), the real parts of the state after the last token, then the imaginary ones."""

    h: Tensor


class S4(Mixer):
    """Structured state space: HiPPO's matrix, normal plus low rank, as a long convolution.

    Args:
        d_model: width D.
        d_state: states N of a channel, even.
        init: A and B at the start: `legs` (scaled Legendre), `legt` (Legendre polynomials on a
                window) or `fourier` (truncated Fourier series, arXiv:2206.12037).
        dt_min: smallest step at the start; steps are log-uniform.
        dt_max: largest step at the start.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2111.00396"
    kernel = "long_conv"
    variants = ({"init": "legt", "d_state": 6},)
    # Trained with a lower learning rate and without weight decay, section 4.3 of the paper.
    ssm_parameters: ClassVar[tuple[str, ...]] = ("log_dt", "log_A_real", "A_imag", "P", "B")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: Literal["legs", "legt", "fourier"] = "legs",
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
        if init not in HIPPO:
            raise unknown("init of s4 named", init, HIPPO)
        self.d_model, self.d_state = d_model, d_state
        self.init, self.dt_range = init, (dt_min, dt_max)
        pairs = (d_model, d_state // 2)
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_A_real = nn.Parameter(torch.empty(pairs))
        self.A_imag = nn.Parameter(torch.empty(pairs))
        self.P = nn.Parameter(torch.empty(2 if init == "legt" else 1, *pairs, 2))  # re, im
        self.B = nn.Parameter(torch.empty(*pairs, 2))
        self.C = nn.Parameter(torch.empty(*pairs, 2))
        self.skip = nn.Parameter(torch.empty(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A and B by `init`, log-uniform steps, standard complex normal C, normal skip.

        Where HiPPO's Lambda is purely imaginary, its real part starts at -1e-4, as in the authors'
        code.
        """
        low, high = (math.log(dt) for dt in self.dt_range)
        nn.init.uniform_(self.log_dt, low, high)
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.skip)
        eigenvalues, P, B = HIPPO[self.init](self.d_state)
        with torch.no_grad():
            self.log_A_real.copy_((-eigenvalues.real).clamp(min=SLOWEST).log())
            self.A_imag.copy_(eigenvalues.imag)
            self.P.copy_(torch.view_as_real(P)[:, None])
            self.B.copy_(torch.view_as_real(B))

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        h = None if state is None else state[0]
        u = x.to(accumulator(x.dtype))
        if ctx.mask is not None:
            u = torch.where(ctx.mask[..., None], u, 0)
        with full_precision(x):
            if x.shape[1] <= STEPS and h is not None:
                y, h = self._recur(u, h, ctx.mask, ctx.reset)
            else:
                y, h = convolve(self._dense(x.shape[1]), u, h, self.skip, ctx.mask, ctx.reset)
        y = glu(self.out_proj(gelu(y).to(x.dtype)), dim=-1)
        return y, None if h is None else S4State(h)

    def _recur(
        self, u: Tensor, h: Tensor, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The definition, token by token: h' = R (2 h + dt B u) - h."""
        narrow, pairs = complex_like(u), self.d_state // 2
        z = torch.complex(*torch.split(h.to(u.dtype), pairs, dim=-1))
        b, c = (torch.view_as_complex(x.double()).to(narrow) for x in (self.B, self.C))
        b = b * self.log_dt.double().exp()[:, None]
        scale, left, right = (x.to(narrow) for x in self._resolvent())
        b, outputs = b.to(narrow), []
        for t in range(u.shape[1]):
            if reset is not None:
                z = torch.where(reset[:, t, None, None], 0, z)
            given = 2 * z + b * u[:, t, :, None]
            inner = (right[:, None] * given).real.sum(-1, keepdim=True)  # (R, B, D, 1)
            after = scale * given - (left[:, None] * inner).sum(0) - z
            z = after if mask is None else torch.where(mask[:, t, None, None], after, z)
            outputs.append(2 * (c * z).real.sum(-1))
        y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u)
        return y + self.skip.to(u.dtype) * u, torch.cat([z.real, z.imag], dim=-1)

    def _resolvent(self) -> tuple[Tensor, Tensor, Tensor]:
        """R = (1 - dt/2 A)^-1 by Woodbury's identity: R z = scale z - sum_r left_r Re(right_r z).

        Shapes (D, N/2), (R, D, N/2) and the same, complex128; A' is 2 R - 1 and B' is dt R B.
        """
        half = self.log_dt.double().exp()[:, None] / 2
        scale = 1 / (
            1 - half * torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        )
        P = torch.view_as_complex(self.P.double())
        right = 2 * P.conj() * scale
        gram = (right[:, None] * P).real.sum(-1).permute(2, 0, 1)
        inner = torch.linalg.inv(torch.eye(len(P), device=P.device) + half[..., None] * gram)
        left = (inner.permute(1, 2, 0)[..., None] * P[:, None]).sum(0)
        return scale, half * scale * left, right

    def _dense(self, length: int) -> "Dense":
        """The discrete system as real matrices, float64."""
        scale, left, right = self._resolvent()
        top, bottom = torch.diag_embed(scale.real), torch.diag_embed(scale.imag)
        R = torch.cat([torch.cat([top, -bottom], dim=2), torch.cat([bottom, top], dim=2)], dim=1)
        left = torch.cat([left.real, left.imag], dim=-1)
        right = torch.cat([right.real, -right.imag], dim=-1)
        R = R - (left[..., :, None] * right[..., None, :]).sum(0)
        b, c = self.B.double().mT.flatten(1), 2 * self.C.double()
        b = self.log_dt.double().exp()[:, None] * (R * b[:, None]).sum(-1)
        c = torch.cat([c[..., 0], -c[..., 1]], dim=-1)
        return dense(2 * R - torch.eye(self.d_state, device=R.device), b, c, length)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> S4State:
        """Zeros."""
        shape = (batch_size, self.d_model, self.d_state)
        return S4State(self.zeros(*shape, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`; products are those of the kernel and of the output projection."""
        D, N, R = self.d_model, self.d_state, self.P.shape[0]
        parameters = 2 * D + D * N * (3 + R) + 2 * D * (D + 1)
        squares = max(length - 1, BLOCK - 1).bit_length()
        blocks = 2 ** (squares - WITHIN)
        powers = squares * N**3 + (BLOCK - 1 + blocks - 1) * N**2
        flops = 2 * D * (powers + blocks * BLOCK * N) + length * 2 * D * 2 * D
        return Cost(parameters, flops, 4 * D * N)


class Dense(NamedTuple):
    """A system given by what its matrix A to some powers is, all float64.

    A to the powers 1, 2, 4, ..., (D, N, N) each; c A^(64 i), (D, S, N); A^j b, (D, N, 64).
    """

    squares: list[Tensor]
    rows: Tensor
    columns: Tensor

    def kernel(self, length: int, like: Tensor) -> Tensor:
        """See `LinearSystem`."""
        return (self.rows.to(like.dtype) @ self.columns.to(like.dtype)).flatten(1)[:, :length]

    def free(self, h: Tensor, length: int, like: Tensor) -> Tensor:
        """See `LinearSystem`."""
        columns = torch.einsum("dnm,bdm->bdn", self.squares[0].to(h.dtype), h)[..., None]
        for square in self.squares[:WITHIN]:
            later = torch.einsum("dnm,bdmj->bdnj", square.to(h.dtype), columns)
            columns = torch.cat([columns, later], dim=-1)
        y = torch.einsum("din,bdnj->bdij", self.rows.to(like.dtype), columns.to(like.dtype))
        return y.flatten(2)[..., :length]

    def advance(self, h: Tensor, count: Tensor) -> Tensor:
        """See `LinearSystem`: one product for each binary digit of the count."""
        for digit, square in enumerate(self.squares):
            taken = (count >> digit & 1).bool()[:, None, None]
            h = torch.where(taken, torch.einsum("dnm,bdm->bdn", square.to(h.dtype), h), h)
        return h

    def collect(self, u: Tensor) -> Tensor:
        """See `LinearSystem`: one partial sum a block of time, then neighbours are merged."""
        blocks = self.rows.shape[1]
        u = pad(u, (0, 0, blocks * BLOCK - u.shape[1], 0))
        u = torch.unflatten(u, 1, (blocks, BLOCK))
        parts = torch.einsum("bijd,dnj->bdin", u, self.columns.flip(-1).to(u.dtype))
        for square in self.squares[WITHIN:-1]:
            earlier = torch.einsum("dnm,bdim->bdin", square.to(u.dtype), parts[:, :, 0::2])
            parts = earlier + parts[:, :, 1::2]
        return parts[:, :, 0]


def dense(A: Tensor, b: Tensor, c: Tensor, length: int) -> Dense:
    """The powers of A (D, N, N) that `length` tokens need, by squaring."""
    squares, reach = [A], 1
    columns, rows = b[..., None], c[:, None]
    while reach < max(length, BLOCK):
        if reach < BLOCK:
            columns = torch.cat([columns, squares[-1] @ columns], dim=-1)
        else:
            rows = torch.cat([rows, rows @ squares[-1]], dim=1)
        squares.append(squares[-1] @ squares[-1])
        reach *= 2
    return Dense(squares, rows, columns)


def _spectrum(normal: Tensor, P: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a normal matrix, minus a skew one plus a number: N/2 eigenvalues, and P and B there."""
    level = normal.diagonal().mean()
    skew = normal - level * torch.eye(len(B), dtype=normal.dtype, device="cpu")
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    half = len(B) // 2
    vectors = vectors[:, half:].mH
    eigenvalues = torch.complex(level.expand(half), frequencies[half:])
    return eigenvalues, P.to(vectors.dtype) @ vectors.mT, vectors @ B.to(vectors.dtype)


def _legs(n_states: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS: A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it; B_n = sqrt(2n+1)."""
    n = torch.arange(n_states, dtype=torch.float64, device="cpu")
    B = torch.sqrt(2 * n + 1)
    A = -(B[:, None] * B).tril(-1) - torch.diag(n + 1)
    P = torch.sqrt(n + 0.5)
    return _spectrum(A + P[:, None] * P, P[None], B)


def _legt(n_states: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegT: A_nk = -sqrt((2n+1)(2k+1)), times (-1)^(n-k) above the diagonal; B as in LegS."""
    n = torch.arange(n_states, dtype=torch.float64, device="cpu")
    B = torch.sqrt(2 * n + 1)
    sign = 1 - 2 * ((n[:, None] - n) % 2)
    A = -(B[:, None] * B) * torch.where(n[:, None] < n, sign, 1)
    even = n % 2 == 0
    P = torch.stack([torch.where(even, B, 0), torch.where(even, 0, B)])
    return _spectrum(A + P.mT @ P, P, B)


def _fourier(n_states: int) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated Fourier series: rotations by 2 pi k, minus B B^T / 2; B = 2 sqrt(2) on cosines."""
    k = torch.arange(n_states // 2, dtype=torch.float64, device="cpu")
    # One eigenvector of each rotation is (1, -i) / sqrt(2); the constant has B = 2.
    B = (torch.where(k == 0, 0.5, 0 * k + 1).sqrt() * 2).to(torch.complex128)
    return torch.complex(0 * k, 2 * math.pi * k), B[None] * math.sqrt(0.5), B


HIPPO = {"legs": _legs, "legt": _legt, "fourier": _fourier}
