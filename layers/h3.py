"""H3: two state-space models between products, which remember keys and compare them with queries.

    k' = shift(K),  s = diag(k' v^T),  o = q^T s,  y = W_o o  with  q, K, v = W_q u, W_k u, W_v u
    shift:  y_t = sum_{j < S} taps_j K_{t-j} + shift_skip K_t
    diag:   h_t = A' h_{t-1} + B' x_t,  y_t = 2 Re(C h_t) + skip x_t

with heads of P channels, so that k' v^T is P x P, one diagonal system of N/2 complex states a head,
B = 1 and A = -exp(log_A_real) + i A_imag. O(T log T) time, O(1) a token when streaming, state of
P N floats a channel and S - 1 keys. Fu et al., 2022, arXiv:2212.14052, section 3.1: the input
matrix of the shift model is the first unit vector, so its C is a convolution. The authors' code
learns that vector too; its discretisation is the bilinear rule.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive, not_divisible, unknown
from seqzoo.kernels.short_conv import short_conv
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.linear_system import Diagonal, discretise, kernel_flops, run_diagonal
from seqzoo.layers.s4d import FREQUENCIES


class H3State(NamedTuple):
    """Keys in the shift model's memory (B, S-1, D); state of the diagonal one (B, P P, H, N/2, 2).

    The last dimension is the real and the imaginary part.
    """

    tail: Tensor
    h: Tensor


class H3(Mixer):
    """Hungry Hungry Hippos: a shift and a diagonal state-space model with multiplicative gates.

    Args:
        d_model: width D.
        d_state: states N of the diagonal model, even.
        d_conv: taps S of the shift model; `d_state` when None, as published.
        head_dim: channels P of a head; 1 makes all products elementwise.
        init: A at the start: `lin`, `inv` or `legs`, as in `s4d`.
        discretisation: `bilinear` or `zoh`.
        dt_min: smallest step at the start; steps are log-uniform.
        dt_max: largest step at the start.
        bias: biases in the four projections.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2212.14052"
    kernel = "long_conv"
    variants = ({"head_dim": 4, "d_state": 6, "discretisation": "zoh", "bias": False},)
    # A lower learning rate and no weight decay, as in the authors' code.
    ssm_parameters: ClassVar[tuple[str, ...]] = ("log_dt", "log_A_real", "A_imag")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_conv: int | None = None,
        head_dim: int = 1,
        init: Literal["lin", "inv", "legs"] = "lin",
        discretisation: Literal["bilinear", "zoh"] = "bilinear",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        d_conv = d_state if d_conv is None else d_conv
        check_positive(d_model=d_model, d_state=d_state, d_conv=d_conv, head_dim=head_dim)
        check_positive(dt_min=dt_min)
        if d_state % 2:
            near = f"{d_state - 1}, {d_state + 1}"
            raise ValueError(f"d_state={d_state} is odd; states come in pairs; nearest: {near}")
        if d_model % head_dim:
            raise not_divisible("d_model", d_model, "head_dim", head_dim)
        if dt_max < dt_min:
            raise ValueError(f"dt_max={dt_max} is not allowed; it must be at least dt_min={dt_min}")
        if init not in FREQUENCIES:
            raise unknown("init of h3 named", init, FREQUENCIES)
        if discretisation not in ("zoh", "bilinear"):
            raise unknown("discretisation of h3 named", discretisation, ("zoh", "bilinear"))
        self.d_model, self.d_state, self.head_dim = d_model, d_state, head_dim
        self.init, self.discretisation, self.dt_range = init, discretisation, (dt_min, dt_max)
        H = d_model // head_dim
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_model, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)
        self.shift_taps = nn.Parameter(torch.empty(d_model, d_conv))  # the newest token's first
        self.shift_skip = nn.Parameter(torch.empty(d_model))
        self.log_dt = nn.Parameter(torch.empty(H))
        self.log_A_real = nn.Parameter(torch.empty(H, d_state // 2))
        self.A_imag = nn.Parameter(torch.empty(H, d_state // 2))
        self.C = nn.Parameter(torch.empty(H, d_state // 2, 2))  # real, imaginary
        self.skip = nn.Parameter(torch.empty(H))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': taps as in `nn.Conv1d`, the diagonal model as in `s4d`, normal skips."""
        bound = self.shift_taps.shape[1] ** -0.5
        nn.init.uniform_(self.shift_taps, -bound, bound)
        low, high = (math.log(dt) for dt in self.dt_range)
        nn.init.uniform_(self.log_dt, low, high)
        nn.init.constant_(self.log_A_real, math.log(0.5))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.shift_skip)
        nn.init.normal_(self.skip)
        with torch.no_grad():
            self.A_imag.copy_(FREQUENCIES[self.init](self.d_state))

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        tail, h = state if state is not None else (None, None)
        wide, mask, reset = accumulator(x.dtype), ctx.mask, ctx.reset
        q, k, v = (proj(x).to(wide) for proj in (self.q_proj, self.k_proj, self.v_proj))
        taps = self.shift_taps.to(wide)
        taps = torch.cat([taps[:, :1] + self.shift_skip.to(wide)[:, None], taps[:, 1:]], dim=1)
        k, tail = short_conv(k, taps.flip(1), initial_state=tail, reset=reset, mask=mask)
        B, P = x.shape[0], self.head_dim
        q, k, v = (torch.unflatten(a, -1, (-1, P)) for a in (q, k, v))
        # The P P entries of k v^T share their head's system: they are rows of a batch.
        pairs = (k[..., None] * v[..., None, :]).permute(0, 3, 4, 1, 2).flatten(0, 2)
        rows = [None if a is None else a.repeat_interleave(P * P, 0) for a in (mask, reset)]
        start = None if h is None else torch.view_as_complex(h.flatten(0, 1))
        with full_precision(x):
            s, last = run_diagonal(self._system(), pairs, start, self.skip, *rows)
        s = torch.unflatten(s, 0, (B, P, P)).permute(0, 3, 4, 1, 2)
        o = (q[..., None] * s).sum(-2)
        y = self.o_proj(o.flatten(-2).to(x.dtype))
        if h is None or last is None:
            return y, None
        return y, H3State(tail, torch.unflatten(torch.view_as_real(last), 0, (B, P * P)))

    def _system(self) -> Diagonal:
        """The diagonal model of every head."""
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        log_a, b = discretise(A, self.log_dt.double().exp()[:, None], self.discretisation)
        return Diagonal(log_a, b, 2 * torch.view_as_complex(self.C.double()))

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> H3State:
        """Zeros."""
        S = self.shift_taps.shape[1]
        h = self.zeros(batch_size, self.head_dim**2, *self.C.shape, device=device, dtype=dtype)
        return H3State(h.new_zeros(batch_size, S - 1, self.d_model), h)

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`; products are those of the projections and the kernel."""
        D, N, P, S = self.d_model, self.d_state, self.head_dim, self.shift_taps.shape[1]
        H = D // P
        biases = 0 if self.q_proj.bias is None else 4 * D
        parameters = 4 * D * D + biases + D * (S + 1) + 2 * H + 2 * H * N
        flops = length * (4 * 2 * D * D) + kernel_flops(H, N // 2, length)
        return Cost(parameters, flops, 4 * (P * D * N + (S - 1) * D))
