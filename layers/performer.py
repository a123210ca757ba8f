"""Performer: softmax attention through positive orthogonal random features (FAVOR+).

    phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(M),  x' = x / d^(1/4)
    o_t = sum_s (phi(q_t) . phi(k_s)) v_s / sum_s phi(q_t) . phi(k_s),  y_t = W_o o_t

over the tokens up to t, or all. The M rows of W are orthogonal in blocks of d, with the norms of
Gaussian vectors, so E phi(q) . phi(k) = exp(q . k / sqrt(d)). O(T) time, a state of
`n_features (d_model + n_heads)` floats. Choromanski et al., 2020, arXiv:2009.14794, section 2.

The authors' code subtracts the largest exponent of all keys before the exponential, which lets
earlier outputs see later keys, and adds 1e-4 after it, which is no longer this estimate. Here the
sums are multiples of exp(m_t), m_t the largest exponent of the keys so far: exact, and causal.
"""

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.kernels.maxplus import EMPTY, maxplus, stabilised
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

SMALLEST = 1e-20  # of a normaliser whose every term has underflown; its inverse must leave room


class PerformerState(NamedTuple):
    """Sums of the heads as multiples of exp(m), and m, the largest exponent of the keys so far.

    (B, H, M, V + 1), of which the last column is the sum of the keys' features; (B, H).
    """

    S: Tensor
    m: Tensor


class Performer(Mixer):
    """Softmax attention estimated by positive orthogonal random features (Performer, FAVOR+).

    The features are a persistent buffer: they are saved and loaded with the weights.

    Args:
        d_model: width D.
        n_heads: heads H, which share their features.
        n_features: random features M; d ln d, of a head's d channels, when None.
        causal: False sees both directions, and has no state.
        redraw_every: in training, forward passes after which the features are drawn anew; 0 for
            never. A compiled model takes 0, and calls of `redraw`.
        seed: from which every draw follows.
        bias: biases in the four projections.
    """

    caps = Caps(state="constant", bidirectional=True)
    paper = "arXiv:2009.14794"
    kernel = "decay"
    variants = ({"causal": False, "n_heads": 2, "n_features": 21, "bias": True},)
    projection: Tensor
    draws: Tensor
    passes: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_features: int | None = None,
        causal: bool = True,
        redraw_every: int = 0,
        seed: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads)
        if d_model % n_heads:
            raise not_divisible("d_model", d_model, "n_heads", n_heads)
        head_dim = d_model // n_heads
        if n_features is None:
            n_features = max(1, int(head_dim * math.log(head_dim)))
        check_positive(n_features=n_features)
        for name, value in (("redraw_every", redraw_every), ("seed", seed)):
            if value < 0:
                raise ValueError(f"{name}={value} is not allowed; it must be at least 0")
        self.d_model, self.n_heads, self.n_features = d_model, n_heads, n_features
        self.causal, self.redraw_every, self.seed = causal, redraw_every, seed
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_model, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)
        self.register_buffer("projection", torch.empty(n_features, head_dim))
        self.register_buffer("draws", torch.empty((), dtype=torch.long))  # how often it was redrawn
        self.register_buffer("passes", torch.empty((), dtype=torch.long))  # in training, since then
        if not causal:
            self.caps = Caps("none", prefix=False, state="none", bidirectional=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The first draw of the features; the projections start as `nn.Linear` does."""
        self.draws.zero_()
        self.passes.zero_()
        self._draw(0)

    def redraw(self) -> None:
        """Draw other features: the next of those that follow from the seed."""
        self.draws.add_(1)
        self.passes.zero_()
        self._draw(int(self.draws))

    def _draw(self, number: int) -> None:
        """Rows of Gaussian norm, orthogonal in blocks of d: the same on any device."""
        # Of a seed torch.Generator reads 32 bits, so the number may not just be added above them.
        bits = random.Random(f"{self.seed} {number}").getrandbits(32)
        generator = torch.Generator("cpu").manual_seed(bits)
        M, d = self.projection.shape
        normal = torch.randn(2, -(-M // d), d, d, generator=generator, device="cpu")
        q, r = torch.linalg.qr(normal[0])
        # Uniform over all rotations only with these signs; without them the estimate is biased.
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
        rows = (q * normal[1].norm(dim=-1, keepdim=True)).flatten(0, 1)[:M]
        # A new tensor: a backward pass to come may still need the old one.
        self.projection = rows.to(self.projection.device, self.projection.dtype)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`; a bidirectional pass takes no state."""
        if state and not self.causal:
            raise ValueError("performer with causal=False has no state to go on from; pass None")
        if self.training and self.redraw_every:
            if int(self.passes) == self.redraw_every:
                self.redraw()
            self.passes.add_(1)
        ctx = ctx or Context()
        projected = [project(x) for project in (self.q_proj, self.k_proj, self.v_proj)]
        wide = accumulator(x.dtype)
        q, k, v = (torch.unflatten(p.to(wide), -1, (self.n_heads, -1)) for p in projected)
        with full_precision(x):
            q, k = self._exponents(q), self._exponents(k)
        q = (q - q.detach().amax(-1, keepdim=True)).exp()  # a factor that the quotient cancels
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        if self.causal:
            sums, last = _forth(q, k, v, state, ctx)
        else:
            sums, last = _both_ways(q, k, v, ctx), None
        o = sums[..., :-1] / sums[..., -1:].clamp(min=SMALLEST)
        y = self.o_proj(o.flatten(-2).to(projected[0].dtype))
        return y, last if state else state

    def _exponents(self, x: Tensor) -> Tensor:
        """Logs of phi sqrt(M), (..., d) to (..., M)."""
        x = x * x.shape[-1] ** -0.25
        squares = x.square().sum(-1, keepdim=True)
        return x @ self.projection.to(x.dtype).T - squares / 2

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """No keys; () when bidirectional."""
        if not self.causal:
            return ()
        H, M, V = self.n_heads, self.n_features, self.d_model // self.n_heads
        S = self.zeros(batch_size, H, M, V + 1, device=device, dtype=dtype)
        return PerformerState(S, torch.full_like(S[..., 0, 0], EMPTY))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, H, M = self.d_model, self.n_heads, self.n_features
        biases = 0 if self.q_proj.bias is None else 4 * D
        state, passes = M * (D + H), 1 if self.causal else 2
        flops = 2 * length * (4 * D * D + 2 * D * M + passes * 2 * state)
        return Cost(4 * D * D + biases, flops, 4 * (state + H) if self.causal else 0)


def _forth(
    q: Tensor, k: Tensor, v: Tensor, state: State | None, ctx: Context
) -> tuple[Tensor, PerformerState]:
    """Sums over the tokens so far, from features of queries and exponents of keys."""
    S, m = state if state else (None, None)
    largest = k.amax(-1)
    gates = stabilised(
        torch.zeros_like(largest), largest, initial_state=m, reset=ctx.reset, mask=ctx.mask
    )
    k = (k - (largest - gates.log_write)[..., None]).exp()  # k - m, not above zero where masked
    sums, S = decay(q, k, v, gates.log_decay, initial_state=S, reset=ctx.reset, mask=ctx.mask)
    return sums, PerformerState(S, gates.state)


def _both_ways(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    """Sums over the tokens of a document: those so far, and in reverse those behind."""
    back, largest = ctx.flipped(), k.detach().amax(-1)
    none = torch.zeros_like(largest)
    before, _ = maxplus(none, largest, reset=ctx.reset, mask=ctx.mask)
    behind, _ = maxplus(none, largest.flip(1), reset=back.reset, mask=back.mask)
    level = torch.maximum(before, behind.flip(1))  # of the document, whose factor cancels
    k = (k - level[..., None]).clamp(max=0).exp()  # above only where masked
    forth, _ = decay(q, k, v, reset=ctx.reset, mask=ctx.mask)
    rest, _ = decay(
        q.flip(1), k.flip(1), v.flip(1), read="before", reset=back.reset, mask=back.mask
    )
    return forth + rest.flip(1)
