"""TTT-linear: the state is a linear model, and reading a token is a step of training it.

    q, k, v = W_q x, W_k x, W_v x, with q and k turned by the token's place in its mini-batch
    f(z) = LN(z W + b),  loss_j = |f(k_j) - (v_j - k_j)|^2 / 2,  eta_j = sigmoid(w_eta . x_j) / K
    W_i = W - max(1 / (i + 1) + tau_i, 0) sum_{j <= i} eta_j dloss_j / dW,  the same for b
    o_i = q_i + f_i(q_i),  y = W_o LayerNorm(o)

Tokens come in mini-batches of `mini_batch`; i is the place in one, all gradients are taken at the W
it began with, and its last W begins the next. O(T) time, a state of twice `n_heads K (K + 1)`
floats: what was learned, and the gradients of a mini-batch in progress, so that a sequence may be
cut anywhere. Sun et al., 2024, arXiv:2407.04620, section 2, with the Transformer backbone, as in
the authors' code. There the step is the product of 1 / (i + 1) + tau_i, with a learned tau, where a
token reads, and of eta where a gradient came from; flash-linear-attention has one eta, that of the
token that reads, and adds to f(q) not q but q W + b.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.kernels.ttt import ttt
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.rotary import turn_neighbours

BASE = 10000.0  # of the rotation, whose positions are places in a mini-batch
EPS = 1e-6
STD = 0.02


class TTTLinearState(NamedTuple):
    """What was learned and gradients of the mini-batch in progress, (B, 2, H, K + 1, K).

    `next` (B,) is the place of the next token in its mini-batch.
    """

    S: Tensor
    next: Tensor


class TTTLinear(Mixer):
    """Test-time training of a linear model by gradient steps on a reconstruction (TTT-linear).

    Args:
        d_model: width D.
        n_heads: heads H, each with a model of its own; must divide D into an even K.
        mini_batch: tokens C whose gradients are taken at the same W.
        base_lr: factor of the learning rates eta.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2407.04620"
    kernel = "ttt"
    variants = ({"n_heads": 2, "mini_batch": 5, "base_lr": 0.5},)

    def __init__(
        self, d_model: int, *, n_heads: int = 4, mini_batch: int = 16, base_lr: float = 1.0
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads, mini_batch=mini_batch, base_lr=base_lr)
        if d_model % (2 * n_heads):
            raise not_divisible("d_model", d_model, "2 * n_heads", 2 * n_heads)
        H, K = n_heads, d_model // n_heads
        self.d_model, self.n_heads, self.head_dim = d_model, H, K
        self.mini_batch, self.base_lr = mini_batch, base_lr
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.lr_weight = nn.Parameter(torch.empty(H, d_model))
        self.lr_bias = nn.Parameter(torch.empty(H))
        self.share_bias = nn.Parameter(torch.empty(mini_batch))  # tau
        self.W = nn.Parameter(torch.empty(H, K, K))
        self.b = nn.Parameter(torch.empty(H, K))
        self.norm_weight = nn.Parameter(torch.empty(H, K))
        self.norm_bias = nn.Parameter(torch.empty(H, K))
        self.norm = nn.LayerNorm(d_model, eps=EPS)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': W and the map to learning rates normal of deviation 0.02, norms plain."""
        nn.init.normal_(self.lr_weight, std=STD)
        nn.init.normal_(self.W, std=STD)
        nn.init.ones_(self.norm_weight)
        for p in (self.lr_bias, self.share_bias, self.b, self.norm_bias):
            nn.init.zeros_(p)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx, wide = ctx or Context(), accumulator(x.dtype)
        S, start = state if state is not None else (None, None)
        ctx = replace(ctx, positions=None)  # mini-batches are counted, wherever the tokens stand
        index = ctx.index(x, start)
        slot = index % self.mini_batch
        angle = slot[..., None, None] * self._frequencies(x.device, wide)
        q, k, v = (
            torch.unflatten(p(x).to(wide), -1, (self.n_heads, -1))
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (turn_neighbours(y, angle) for y in (q, k))
        rate = torch.sigmoid(linear(x, self.lr_weight.to(x.dtype)).to(wide) + self.lr_bias.to(wide))
        places = torch.arange(1, self.mini_batch + 1, device=x.device, dtype=wide)
        share = (1 / places + self.share_bias.to(wide)).clamp(min=0)[slot]
        weight, bias = self.norm_weight.to(wide), self.norm_bias.to(wide)
        z, S = ttt(
            q,
            k,
            v - k,
            self.base_lr / self.head_dim * rate,
            share[..., None].expand_as(rate),
            slot,
            self.W,
            self.b,
            weight,
            bias,
            mini_batch=self.mini_batch,
            eps=EPS,
            initial_state=S,
            reset=ctx.reset,
            mask=ctx.mask,
        )
        o = q + layer_norm(z, z.shape[-1:], eps=EPS) * weight + bias
        y = self.o_proj(self.norm(o.flatten(-2).to(x.dtype)))
        if state is None:
            return y, None
        return y, TTTLinearState(S, ctx.next_index(index, start) % self.mini_batch)

    def _frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Angles of a step of one place, (K / 2,)."""
        i = torch.arange(0, self.head_dim, 2, device=device, dtype=dtype)
        return torch.exp(-math.log(BASE) / self.head_dim * i)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TTTLinearState:
        """Nothing learned."""
        shape = (batch_size, 2, self.n_heads, self.head_dim + 1, self.head_dim)
        S = self.zeros(*shape, device=device, dtype=dtype)
        return TTTLinearState(S, torch.zeros(batch_size, device=S.device, dtype=torch.long))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, H, K = self.d_model, self.n_heads, self.head_dim
        products, model = 4 * D * D + H * D, D * (K + 1)
        parameters = products + model + 4 * D + H + self.mini_batch
        return Cost(parameters, 2 * length * (products + 3 * model), 4 * 2 * model + 8)
