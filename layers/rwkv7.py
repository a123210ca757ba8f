"""RWKV-7 (Goose): a state that forgets what a key held and writes anew, each channel at its rate.

    x^c_t = x_t + mu_c (x_{t-1} - x_t)  for c = r, w, k, v, a, g
    r, k, v = W_c x^c,  a = sigmoid(a_0 + x^a A_1 A_2),  g = sigmoid(x^g G_1) G_2
    w = exp(-e^{-1/2} sigmoid(w_0 + tanh(x^w D_1) D_2))
    v = v + (v^first - v) sigmoid(v_0 + x^v V_1 V_2),  v^first that of the first such layer
    n = k * k_k / |k * k_k|,  k' = k (1 + (a - 1) k_a)
    S_t = (Diag(w) - (a * n) n^T) S_{t-1} + k' v^T
    y_t = W_o ((GroupNorm(S_t^T r) + (r . (r_k * k')) v) * g)

O(T) time, a state of one token and `d_model head_dim` floats. Peng et al., 2025, arXiv:2503.14456,
section 4. The first layer of a stack hands its values to the later ones through `Context.shared`;
it has no use for v_0, V_1 and V_2, which stay as they are, as in the authors' code.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from seqzoo.kernels.delta_lowrank import delta_lowrank
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, check_shape, not_divisible
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.token_shift import check_depth, token_shift

EPS = 64e-5  # of the norm of a head, as published
SLOWEST = math.exp(-0.5)  # no decay is below exp(-SLOWEST)


class RWKV7State(NamedTuple):
    """The last token (B, 1, D) and the state of the heads (B, H, K, K)."""

    previous: Tensor
    S: Tensor


class RWKV7(Mixer):
    """RWKV-7's time mix: a generalised delta rule with rates per channel (Goose).

    Args:
        d_model: width D, also of receptance, keys and values.
        head_dim: channels K of a head; must divide D. The greatest divisor of 64 and D when None.
        decay_rank: rank of the map that moves the decays; as published, about 1.8 sqrt(D), when
            None.
        rate_rank: of the one that moves the rates a; as `decay_rank`.
        value_rank: of the one that mixes in the first layer's values; about 1.3 sqrt(D).
        gate_rank: of the output gate; about 0.6 D^0.8.
        depth: where in the stack it stands, 0 first and 1 last: mu and decays start accordingly.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2503.14456"
    kernel = "delta_lowrank"
    variants = (
        {
            "head_dim": 8,
            "decay_rank": 3,
            "rate_rank": 4,
            "value_rank": 5,
            "gate_rank": 6,
            "depth": 0,
        },
    )
    ssm_parameters = ("time_decay",)

    def __init__(
        self,
        d_model: int,
        *,
        head_dim: int | None = None,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        depth: float = 0.5,
    ) -> None:
        super().__init__()
        head_dim = math.gcd(d_model, 64) if head_dim is None else head_dim
        decay_rank = _rank(1.8 * d_model**0.5) if decay_rank is None else decay_rank
        rate_rank = _rank(1.8 * d_model**0.5) if rate_rank is None else rate_rank
        value_rank = _rank(1.3 * d_model**0.5) if value_rank is None else value_rank
        gate_rank = _rank(0.6 * d_model**0.8) if gate_rank is None else gate_rank
        check_positive(
            d_model=d_model,
            head_dim=head_dim,
            decay_rank=decay_rank,
            rate_rank=rate_rank,
            value_rank=value_rank,
            gate_rank=gate_rank,
        )
        if d_model % head_dim:
            raise not_divisible("d_model", d_model, "head_dim", head_dim)
        check_depth(depth)
        self.d_model, self.head_dim, self.depth = d_model, head_dim, depth
        self.r_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.mix = nn.Parameter(torch.empty(6, d_model))  # mu of r, w, k, v, a, g
        self.time_decay = nn.Parameter(torch.empty(d_model))  # w_0
        self.decay_down = nn.Parameter(torch.empty(d_model, decay_rank))
        self.decay_up = nn.Parameter(torch.empty(decay_rank, d_model))
        self.rate_bias = nn.Parameter(torch.empty(d_model))  # a_0
        self.rate_down = nn.Parameter(torch.empty(d_model, rate_rank))
        self.rate_up = nn.Parameter(torch.empty(rate_rank, d_model))
        self.value_bias = nn.Parameter(torch.empty(d_model))  # v_0
        self.value_down = nn.Parameter(torch.empty(d_model, value_rank))
        self.value_up = nn.Parameter(torch.empty(value_rank, d_model))
        self.gate_down = nn.Parameter(torch.empty(d_model, gate_rank))
        self.gate_up = nn.Parameter(torch.empty(gate_rank, d_model))
        self.removal = nn.Parameter(torch.empty(d_model))  # k_k
        self.replacement = nn.Parameter(torch.empty(d_model))  # k_a
        self.bonus = nn.Parameter(torch.empty(d_model))  # r_k
        self.norm_weight = nn.Parameter(torch.empty(d_model))
        self.norm_bias = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' (RWKV-LM, version 7): low-rank maps give nothing at first.

        The projections start as `nn.Linear` does; the authors start them smaller, W_o at zero.
        """
        D, K, after = self.d_model, self.head_dim, 1 - self.depth
        slots = torch.arange(D, dtype=torch.float64, device="cpu")
        share = slots / max(D - 1, 1)
        zigzag = 2 * (slots % K) / max(K - 1, 1) - 1
        zigzag = zigzag * zigzag.abs()
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2], dtype=torch.float64, device="cpu")
        with torch.no_grad():
            self.mix.copy_(1 - (slots / D) ** (powers[:, None] * after))
            self.time_decay.copy_(-5.5 + 6 * share ** (1 + self.depth**0.3) + 2.5 * zigzag)
            self.rate_bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (share - 0.5))
            self.value_bias.copy_(0.73 - 0.4 * (share - 0.5))
            self.removal.copy_(0.71 - 0.1 * (share - 0.5))
        for p, value in (
            (self.replacement, 1.02),
            (self.bonus, -0.04),
            (self.norm_weight, 1.0),
            (self.norm_bias, 0.0),
        ):
            nn.init.constant_(p, value)
        for part in ("decay", "rate", "value", "gate"):
            nn.init.zeros_(self.get_parameter(f"{part}_down"))
            up = self.get_parameter(f"{part}_up")
            wide = torch.empty_like(up, dtype=torch.float32)  # no QR in half precision
            nn.init.orthogonal_(wide, gain=0.1 * max(1.0, up.shape[0] / D) ** 0.5)
            with torch.no_grad():
                up.copy_(wide)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        reset, wide = ctx.reset, accumulator(x.dtype)
        start, S = state if state is not None else (None, None)
        previous, last = token_shift(x, start, ctx)
        r, w, k, v, a, g = (torch.lerp(x, previous, mu) for mu in self.mix.to(x.dtype))
        w = self.time_decay.to(wide) + low_rank(w, self.decay_down, self.decay_up, torch.tanh)
        a = torch.sigmoid(self.rate_bias.to(wide) + low_rank(a, self.rate_down, self.rate_up))
        g = low_rank(g, self.gate_down, self.gate_up, torch.sigmoid)
        r, k, v = self.r_proj(r).to(wide), self.k_proj(k).to(wide), self._values(v, ctx)
        n = normalize(self._heads(k * self.removal.to(wide)), dim=-1)
        k = k * (1 + (a - 1) * self.replacement.to(wide))
        own = self._heads(r * self.bonus.to(wide) * k).sum(-1, keepdim=True)
        r, w, k, v, a = (self._heads(y) for y in (r, -SLOWEST * torch.sigmoid(w), k, v, a))
        o, S = delta_lowrank(r, k, v, -n, a * n, w, initial_state=S, reset=reset, mask=ctx.mask)
        o = layer_norm(o, o.shape[-1:], eps=EPS)
        o = o * self._heads(self.norm_weight.to(wide)) + self._heads(self.norm_bias.to(wide))
        y = self.o_proj(((o + own * v).flatten(-2) * g).to(x.dtype))
        return y, None if state is None else RWKV7State(last, S)

    def _values(self, x: Tensor, ctx: Context) -> Tensor:
        """The layer's own, and a share of those of the first such layer in the stack."""
        wide = accumulator(x.dtype)
        v: Tensor = self.v_proj(x).to(wide)
        name = "values of the first rwkv7" + (", reversed" if ctx.reversed else "")
        first = ctx.shared.get(name)
        if first is None:
            ctx.shared[name] = v
            return v
        check_shape(name, first.shape, tuple(v.shape), "(B, T, D)")
        share = self.value_bias.to(wide) + low_rank(x, self.value_down, self.value_up)
        return torch.lerp(v, first.to(wide), torch.sigmoid(share))

    def _heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (-1, self.head_dim))

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RWKV7State:
        """Zeros."""
        D, K = self.d_model, self.head_dim
        S = self.zeros(batch_size, D // K, K, K, device=device, dtype=dtype)
        previous = torch.zeros(batch_size, 1, D, device=S.device, dtype=dtype or self.mix.dtype)
        return RWKV7State(previous, S)

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`; FLOPs of the first such layer, later ones mix their values as well."""
        D, K = self.d_model, self.head_dim
        ranks = sum(m.shape[1] for m in (self.decay_down, self.rate_down, self.gate_down))
        products = 4 * D * D + 2 * D * ranks
        parameters = products + 2 * D * self.value_down.shape[1] + 14 * D
        return Cost(parameters, 2 * length * (products + 4 * D * K), 4 * D * (1 + K))


def low_rank(
    x: Tensor, down: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """activation(x down) up, (B, T, D), in float32 or wider."""
    y = x @ down.to(x.dtype)
    y = y if activation is None else activation(y)
    return (y @ up.to(y.dtype)).to(accumulator(x.dtype))


def _rank(size: float) -> int:
    """The nearest multiple of 32, at least 32."""
    return max(32, 32 * round(size / 32))
