"""Gated DeltaNet: the delta rule on a state that decays first, and a gated output.

    q, k, v = silu(conv4(W x)),  q = q / |q|,  k = k / |k|,  beta_t = sigmoid(W_b x_t)
    log alpha_t = -exp(A_log) softplus(W_a x_t + dt_bias)
    S_t = alpha_t (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)
    y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))

O(T) time, a state of `expand_v n_heads head_dim^2` floats and the convolution's tail. Yang, Kautz
and Hatamizadeh, 2024, arXiv:2412.06464, section 3. The layer of Qwen3-Next and OLMo-Hybrid.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from seqzoo.kernels.dispatch import accumulator
from seqzoo.layers.base import Cost
from seqzoo.layers.deltanet import DeltaNet

A_MIN, A_MAX = 0.01, 16.0  # the authors' range of decay rates, kept away from their 0
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4  # and of step sizes


class GatedDeltaNet(DeltaNet):
    """The delta rule with a decay per head and an output gate (Gated DeltaNet).

    Args:
        d_model: width D.
        n_heads: heads H.
        head_dim: key and query size K of a head; `3/4 d_model / n_heads` when None, rounded down.
        expand_v: value size V of a head, as a multiple of K.
        d_conv: width W of the short convolution of queries, keys and values.
        negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    """

    paper = "arXiv:2412.06464"
    variants = (
        {
            "n_heads": 2,
            "head_dim": 8,
            "expand_v": 1.5,
            "d_conv": 2,
            "negative_eigenvalues": True,
        },
    )
    ssm_parameters = ("A_log", "dt_bias")

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        d_conv: int = 4,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            n_heads=n_heads,
            head_dim=max(1, 3 * d_model // (4 * n_heads)) if head_dim is None else head_dim,
            expand_v=expand_v,
            d_conv=d_conv,
            negative_eigenvalues=negative_eigenvalues,
        )
        self.decay_proj = nn.Linear(d_model, n_heads, bias=False)
        self.gate_proj = nn.Linear(d_model, n_heads * self.value_size, bias=False)
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': rates uniform in (0, 16), step sizes log-uniform in [0.001, 0.1]."""
        super().reset_parameters()
        draw_decays(self.A_log, self.dt_bias, A_MIN)

    def log_decay(self, x: Tensor) -> Tensor:
        """(B, T, H)."""
        a = self.decay_proj(x)
        wide = accumulator(a.dtype)
        return -self.A_log.to(wide).exp() * softplus(a.to(wide) + self.dt_bias.to(wide))

    def gated(self, o: Tensor, x: Tensor) -> Tensor:
        """See `DeltaNet.gated`."""
        return o * silu(torch.unflatten(self.gate_proj(x).to(o.dtype), -1, o.shape[-2:]))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        parameters, flops, state_bytes = super().cost(length)
        H = self.n_heads
        products = self.d_model * H * (1 + self.value_size)
        return Cost(parameters + products + 2 * H, flops + 2 * length * products, state_bytes)


def draw_decays(A_log: Tensor, dt_bias: Tensor, low: float) -> None:
    """Fill in rates uniform in [low, 16] and step sizes log-uniform in [0.001, 0.1]."""
    with torch.no_grad():
        A_log.copy_(torch.empty_like(A_log).uniform_(low, A_MAX).log())
        log_dt = torch.empty_like(dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX))
        dt = log_dt.exp().clamp(min=DT_FLOOR)
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)
