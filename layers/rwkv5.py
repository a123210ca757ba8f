"""RWKV-5 (Eagle): heads with matrix states, fixed decays, and a bonus for the current token.

    r_t, k_t, v_t, g_t = W_c (mu_c x_t + (1 - mu_c) x_{t-1}) for c = r, k, v, g
    o_t = r_t^T (S_{t-1} + Diag(u) k_t v_t^T),  S_t = Diag(w) S_{t-1} + k_t v_t^T
    y_t = W_o (GroupNorm(o_t) * swish(g_t)),  w = exp(-exp(time_decay)),  u = time_first

O(T) time, a state of one token and `width head_dim` floats. Peng et al., 2024, arXiv:2404.05892,
section 4. The norm of each head is a LayerNorm with eps = 64e-5, what the authors' division of o_t
by 8 makes of 1e-5. Its channel mix is `rwkv_channel`, which version 4 has too.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.token_shift import check_depth, no_token, ramp, time_constants, token_shift

EPS = 64e-5


class RWKVState(NamedTuple):
    """The last token (B, 1, D), and the state of the heads (B, H, K, K)."""

    previous: Tensor
    S: Tensor


class Projected(NamedTuple):
    """What a token's inputs are made into: four of (B, T, R), and the log decay (B or 1, T, R)."""

    r: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    log_decay: Tensor


class RWKV5(Mixer):
    """RWKV-5's time mix: matrix states with a fixed decay per channel, and token shift (Eagle).

    Args:
        d_model: width D.
        width: width R of receptance, keys, values and gate; `d_model` when None.
        head_dim: channels K of a head; must divide R. The greatest divisor of 64 and R when None.
        depth: where in the stack it stands, 0 first and 1 last: decays, bonus and mu start
            accordingly.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2404.05892"
    kernel = "decay"
    variants = ({"width": 48, "head_dim": 8, "depth": 0},)
    ssm_parameters: ClassVar[tuple[str, ...]] = ("time_decay", "time_first")
    mixed: ClassVar[tuple[str, ...]] = ("k", "v", "r", "g")  # what has a mu of its own

    def __init__(
        self,
        d_model: int,
        *,
        width: int | None = None,
        head_dim: int | None = None,
        depth: float = 0.5,
    ) -> None:
        super().__init__()
        width = d_model if width is None else width
        check_positive(d_model=d_model, width=width)
        head_dim = math.gcd(width, 64) if head_dim is None else head_dim
        check_positive(head_dim=head_dim)
        check_depth(depth)
        if width % head_dim:
            raise not_divisible("width", width, "head_dim", head_dim)
        self.d_model, self.width, self.head_dim, self.depth = d_model, width, head_dim, depth
        self.k_proj = nn.Linear(d_model, width, bias=False)
        self.v_proj = nn.Linear(d_model, width, bias=False)
        self.r_proj = nn.Linear(d_model, width, bias=False)
        self.gate_proj = nn.Linear(d_model, width, bias=False)
        self.o_proj = nn.Linear(width, d_model, bias=False)
        self.mix = nn.Parameter(torch.empty(len(self.mixed), d_model))  # as ordered in `mixed`
        self.time_decay = nn.Parameter(torch.empty(width))
        self.time_first = nn.Parameter(torch.empty(width))
        self.norm_weight = nn.Parameter(torch.empty(width))
        self.norm_bias = nn.Parameter(torch.empty(width))
        self._add_parameters()
        self.reset_parameters()

    def _add_parameters(self) -> None:
        """Those of a later version."""

    def reset_parameters(self) -> None:
        """As published, decays log-spaced over channels and mu a power of i / D.

        The authors give layer l of L the depth l / (L - 1), and 1 - l / L for the 1 - depth here.
        The projections start as `nn.Linear` does; the authors start W_o at zero and the others
        orthogonal.
        """
        rise, zigzag = time_constants(self.width, self.depth)
        slots = torch.arange(self.width, dtype=torch.float64, device="cpu")
        fall = 1 - slots / max(self.width - 1, 1)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        with torch.no_grad():
            self.time_decay.copy_(-6 + 5 * rise)
            self.time_first.copy_(self.depth * fall + 0.1 * zigzag)
            for mix, name in zip(self.mix, self.mixed, strict=True):
                mix.copy_(self._first_mix(name))

    def _first_mix(self, name: str) -> Tensor:
        """The share of token t itself in what `name` reads, as it starts."""
        power = (1 - self.depth) * (0.5 if name in "rg" else 1)
        share = ramp(self.d_model) ** power
        return share + 0.3 * self.depth if name == "v" else share

    def _project(self, x: Tensor, previous: Tensor) -> Projected:
        k, v, r, g = (torch.lerp(previous, x, mix) for mix in self.mix.to(x.dtype))
        log_decay = -self.time_decay.to(accumulator(x.dtype)).exp()
        return Projected(
            self.r_proj(r),
            self.k_proj(k),
            self.v_proj(v),
            self.gate_proj(g),
            log_decay.expand(1, x.shape[1], -1),
        )

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        start, S = state if state is not None else (None, None)
        previous, last = token_shift(x, start, ctx)
        projected = self._project(x, previous)
        wide, heads = accumulator(x.dtype), (-1, self.head_dim)
        r, k, v = (torch.unflatten(p, -1, heads) for p in projected[:3])
        o, S = decay(
            r,
            k,
            v.to(wide),
            torch.unflatten(projected.log_decay.expand(x.shape[0], -1, -1), -1, heads),
            bonus=torch.unflatten(self.time_first.to(wide), 0, heads),
            read="before",
            initial_state=S,
            reset=ctx.reset,
            mask=ctx.mask,
        )
        normed = layer_norm(o, o.shape[-1:], eps=EPS).flatten(-2)
        y = normed * self.norm_weight.to(wide) + self.norm_bias.to(wide)
        gate = projected.gate
        y = self.o_proj((y * silu(gate.to(wide))).to(gate.dtype))
        return y, None if state is None else RWKVState(last, S)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RWKVState:
        """No token, and zeros."""
        K = self.head_dim
        S = self.zeros(batch_size, self.width // K, K, K, device=device, dtype=dtype)
        return RWKVState(no_token(batch_size, self.mix[0], device, dtype), S)

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, R = self.d_model, self.width
        products, state = 5 * D * R, R * self.head_dim
        vectors = len(self.mixed) * D + 4 * R
        return Cost(products + vectors, 2 * length * (products + 2 * state), 4 * (D + state))
