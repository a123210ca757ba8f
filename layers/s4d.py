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
from torch.nn.functional import gelu, glu, pad

from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.kernels.long_conv import long_conv
from seqzoo.kernels.scan import scan
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

BLOCK = 64  # exp(l log A') is exp(64 i log A') exp(j log A'): T / 64 + 64 exponentials, not T
STEPS = 16  # passes up to this length run the recurrence


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
        if ctx.mask is not None:
            u = torch.where(ctx.mask[..., None], u, 0)
        with full_precision(x):
            if x.shape[1] <= STEPS and (h is not None or ctx.mask is not None):
                y, h = self._recur(u, h, ctx)
            else:
                y, h = self._convolve(u, h, ctx)
        y = glu(self.out_proj(gelu(y).to(x.dtype)), dim=-1)
        return y, None if state is None or h is None else S4DState(torch.view_as_real(h))

    def _recur(self, u: Tensor, h: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor]:
        """The definition, token by token."""
        log_a, b, c = self._system()
        narrow = _complex(u)
        a = torch.exp(log_a).to(narrow).flatten().expand(*u.shape[:2], -1)
        inputs = (u[..., None] * b.to(narrow)).flatten(2)
        start = None if h is None else h.to(narrow).flatten(1)
        states, last = scan(a, inputs, initial_state=start, reset=ctx.reset, mask=ctx.mask)
        states = torch.unflatten(states, -1, c.shape)
        y = 2 * (states * c.to(narrow)).real.sum(-1) + self.skip.to(u.dtype) * u
        return y, torch.unflatten(last, -1, c.shape)

    def _convolve(self, u: Tensor, h: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """The same by convolution over the real tokens, which end at the end of the row."""
        T, mask, reset = u.shape[1], ctx.mask, ctx.reset
        log_a, b, c = self._system()
        document = None if reset is None else reset.cumsum(1)
        order = None if mask is None else mask.to(torch.int8).argsort(dim=1, stable=True)
        if order is not None:  # what is masked comes first, as zeros: nothing yet
            u = _take(u, order)
            document = None if document is None else document.gather(1, order)
        kernel = _response(b * c, log_a, max(T, 1), u)
        y = long_conv(u, kernel, skip=self.skip, document=document)
        if order is not None:
            y = _take(y, order.argsort(dim=1))
        if h is None:
            return y, None
        free = _response(log_a.exp() * c * h, log_a, T, u).transpose(1, 2)
        count = torch.full_like(u[:, 0, 0], T) if mask is None else mask.sum(1)
        if mask is not None:
            free = _take(free, (mask.cumsum(1) - 1).clamp(min=0))
        kept = torch.exp(log_a * count[:, None, None]).to(h.dtype) * h
        if reset is not None and document is not None:
            begun = reset.cumsum(1)
            free = torch.where(begun[..., None] == 0, free, 0)
            kept = torch.where(begun[:, -1, None, None] == 0, kept, 0)
            u = torch.where((document == begun[:, -1:])[..., None], u, 0)
        return y + free, kept + _collect(u, log_a) * b.to(h.dtype)

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """The logarithm of A', B' and C, (D, N/2).

        In complex128: an angle of log A' times thousands of steps has no digits left in float32.
        """
        dt = self.log_dt.double().exp()[:, None]
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        c = torch.view_as_complex(self.C.double())
        if self.discretisation == "zoh":
            return dt * A, torch.expm1(dt * A) / A, c
        half = dt * A / 2
        return torch.log((1 + half) / (1 - half)), dt / (1 - half), c

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
        kernel = 2 * D * N * BLOCK * -(-max(length, 1) // BLOCK)
        return Cost(parameters, kernel + length * 2 * D * 2 * D, 4 * D * N)


def _response(weight: Tensor, log_a: Tensor, length: int, like: Tensor) -> Tensor:
    """2 Re sum_n weight_n exp(l log_a_n), l < length: (..., D, length), real like `like`."""
    device, narrow = log_a.device, _complex(like)
    coarse = torch.arange(-(-length // BLOCK), device=device) * BLOCK
    slow = weight[..., None, :].to(narrow) * _powers(log_a, coarse).to(narrow)
    fast = _powers(log_a, torch.arange(BLOCK, device=device)).to(narrow).conj().resolve_conj()
    # Re(z w) is the product of the real pairs of z and conj(w).
    slow, fast = (torch.view_as_real(x).flatten(-2) for x in (slow, fast))
    return 2 * torch.einsum("...dim,djm->...dij", slow, fast).flatten(-2)[..., :length]


def _collect(u: Tensor, log_a: Tensor) -> Tensor:
    """sum_t exp((T - 1 - t) log_a) u_t: (B, D, N/2), through one partial sum a block of time."""
    T, device, narrow = u.shape[1], log_a.device, _complex(u)
    blocks = -(-T // BLOCK)
    u = torch.unflatten(pad(u, (0, 0, blocks * BLOCK - T, 0)), 1, (blocks, BLOCK))
    fast = _powers(log_a, torch.arange(BLOCK - 1, -1, -1, device=device)).to(narrow)
    slow = _powers(log_a, torch.arange(blocks - 1, -1, -1, device=device) * BLOCK).to(narrow)
    parts = torch.einsum("bijd,djm->bdim", u, torch.view_as_real(fast).flatten(-2))
    pairs = torch.unflatten(parts, -1, (-1, 2)).contiguous()
    return (torch.view_as_complex(pairs) * slow).sum(2)


def _powers(log_a: Tensor, steps: Tensor) -> Tensor:
    """exp(steps log_a), (D, S, N/2): the exponential of the product, never powers."""
    return torch.exp(log_a[:, None] * steps[:, None])


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of each row in `order` (B, T)."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def _complex(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.dtype == torch.float64 else torch.complex64


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
