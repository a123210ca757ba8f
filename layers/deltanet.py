"""DeltaNet: linear attention that replaces what a key holds instead of adding to it.

    q, k, v = silu(conv4(W x)),  q = q / |q|,  k = k / |k|,  beta_t = sigmoid(W_b x_t)
    S_t = (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)
    y_t = W_o RMSNorm(o_t)

O(T) time, a state of `n_heads head_dim^2` floats and the convolution's tail. Yang et al., 2024,
arXiv:2406.06484, section 3.4. `negative_eigenvalues` doubles beta, so that a write can turn the
sign of what it finds: Grazzi et al., 2024, arXiv:2411.12537.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from seqzoo.kernels.delta import delta
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.kernels.short_conv import short_conv
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

EPS = 1e-5  # of the norm of what a head gives
UNIT_EPS = 1e-6  # of the norm of queries and keys, inside the root


class DeltaNetState(NamedTuple):
    """Tail of the convolution (B, W-1, 2 H K + H V) and state of the heads (B, H, K, V)."""

    tail: Tensor
    S: Tensor


class DeltaNet(Mixer):
    """The delta rule: each token replaces what its key holds (DeltaNet).

    Its gated relatives are this class with other `log_decay` and `gated`, DeltaProduct with other
    projections and `recurrence`.

    Args:
        d_model: width D.
        n_heads: heads H.
        head_dim: key and query size K of a head; `d_model / n_heads` when None.
        expand_v: value size V of a head, as a multiple of K.
        d_conv: width W of the short convolution of queries, keys and values.
        negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    """

    caps = Caps(state="constant")
    paper = "arXiv:2406.06484"
    kernel = "delta"
    n_householder = 1  # steps a token
    variants = (
        {
            "n_heads": 2,
            "head_dim": 6,
            "expand_v": 1.5,
            "d_conv": 2,
            "negative_eigenvalues": True,
        },
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        d_conv: int = 4,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads, expand_v=expand_v, d_conv=d_conv)
        if head_dim is None and d_model % n_heads:
            raise not_divisible("d_model", d_model, "n_heads", n_heads)
        K = d_model // n_heads if head_dim is None else head_dim
        check_positive(head_dim=K)
        V = round(expand_v * K)
        if V == 0 or abs(V - expand_v * K) > 1e-6 * V:
            raise ValueError(
                f"expand_v={expand_v} times head_dim={K} is {expand_v * K}, not a whole number; "
                f"nearest: {max(V, 1) / K}"
            )
        self.d_model, self.n_heads, self.key_size, self.value_size = d_model, n_heads, K, V
        self.negative_eigenvalues = negative_eigenvalues
        self.q_proj = nn.Linear(d_model, n_heads * K, bias=False)
        self.k_proj = nn.Linear(d_model, n_heads * K, bias=False)
        self.v_proj = nn.Linear(d_model, n_heads * V, bias=False)
        self.beta_proj = nn.Linear(d_model, n_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(n_heads * (2 * K + V), d_conv))
        self.norm_weight = nn.Parameter(torch.empty(V))
        self.o_proj = nn.Linear(n_heads * V, d_model, bias=False)
        DeltaNet.reset_parameters(self)

    def reset_parameters(self) -> None:
        """The convolution starts as `nn.Conv1d` does, the norm at one."""
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.ones_(self.norm_weight)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        tail, S = state if state is not None else (None, None)
        reset, mask, wide = ctx.reset, ctx.mask, accumulator(x.dtype)
        u, tail = short_conv(
            torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1),
            self.conv_weight,
            activation="silu",
            initial_state=tail,
            reset=reset,
            mask=mask,
        )
        H, K, V, n = self.n_heads, self.key_size, self.value_size, self.n_householder
        q, k, v = torch.split(u.to(wide), [H * K, n * H * K, n * H * V], dim=-1)
        beta = torch.sigmoid(self.beta_proj(x).to(wide))
        o, S = self.recurrence(
            _unit(torch.unflatten(q, -1, (H, K))),
            _unit(torch.unflatten(k, -1, (n * H, K))),
            torch.unflatten(v, -1, (n * H, V)),
            2 * beta if self.negative_eigenvalues else beta,
            self.log_decay(x),
            scale=K**-0.5,
            initial_state=S,
            reset=reset,
            mask=mask,
        )
        o = rms_norm(o, (V,), eps=EPS) * self.norm_weight.to(o.dtype)
        y = self.o_proj(self.gated(o, x).to(u.dtype).flatten(-2))
        return y, None if state is None else DeltaNetState(tail, S)

    def recurrence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        **carried: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """What the heads read and the last state, see `delta`."""
        return delta(q, k, v, beta, log_decay, **carried)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """What becomes of the state before the token: (B, T, H), (B, T, H, K), or None."""
        return None

    def gated(self, o: Tensor, x: Tensor) -> Tensor:
        """The normed output (B, T, H, V) of the heads through the output gate, if there is one."""
        return o

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DeltaNetState:
        """Zeros."""
        width, W = self.conv_weight.shape
        shape = (batch_size, self.n_heads, self.key_size, self.value_size)
        S = self.zeros(*shape, device=device, dtype=dtype)
        tail = torch.zeros(
            batch_size, W - 1, width, device=S.device, dtype=dtype or self.conv_weight.dtype
        )
        return DeltaNetState(tail, S)

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, H, K, V = self.d_model, self.n_heads, self.key_size, self.value_size
        width, W = self.conv_weight.shape
        n = self.n_householder
        products = D * (width + n * H + H * V)
        flops = 2 * length * (products + 3 * n * H * K * V)
        return Cost(products + width * W + V, flops, 4 * (width * (W - 1) + H * K * V))


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)
