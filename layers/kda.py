"""Kimi delta attention: the delta rule on a state whose key channels decay each at its own rate.

    q, k, v = silu(conv4(W x)),  q = q / |q|,  k = k / |k|,  beta_t = sigmoid(W_b x_t)
    log alpha_t = -exp(A_log) softplus(W_2 W_1 x_t + dt_bias), per key channel
    S_t = (1 - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T
    y_t = W_o (RMSNorm(S_t^T q_t / sqrt(K)) * sigmoid(W_4 W_3 x_t))

O(T) time, a state of `n_heads head_dim^2` floats and the convolution's tail. Kimi Team, 2025,
arXiv:2510.26692, sections 3 and 4.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive
from seqzoo.layers.base import Cost
from seqzoo.layers.deltanet import DeltaNet
from seqzoo.layers.gated_deltanet import draw_decays

A_MIN = 1.0  # decay rates start in [1, 16]


class KDA(DeltaNet):
    """The delta rule with a decay per key channel and a sigmoid output gate (Kimi Linear).

    Args:
        d_model: width D.
        n_heads: heads H.
        head_dim: key and query size K of a head; `d_model / n_heads` when None.
        expand_v: value size V of a head, as a multiple of K.
        gate_rank: rank R of the projections of decay and gate; V when None.
        d_conv: width W of the short convolution of queries, keys and values.
        negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    """

    paper = "arXiv:2510.26692"
    variants = (
        {
            "n_heads": 2,
            "head_dim": 6,
            "expand_v": 1.5,
            "gate_rank": 3,
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
        expand_v: float = 1.0,
        gate_rank: int | None = None,
        d_conv: int = 4,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            n_heads=n_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            d_conv=d_conv,
            negative_eigenvalues=negative_eigenvalues,
        )
        rank = self.value_size if gate_rank is None else gate_rank
        check_positive(gate_rank=rank)
        keys, values = n_heads * self.key_size, n_heads * self.value_size
        self.decay_down_proj = nn.Linear(d_model, rank, bias=False)
        self.decay_up_proj = nn.Linear(rank, keys, bias=False)
        self.gate_down_proj = nn.Linear(d_model, rank, bias=False)
        self.gate_up_proj = nn.Linear(rank, values, bias=False)
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(keys))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rates uniform in [1, 16] per head, step sizes log-uniform in [0.001, 0.1] per channel."""
        super().reset_parameters()
        draw_decays(self.A_log, self.dt_bias, A_MIN)

    def log_decay(self, x: Tensor) -> Tensor:
        """(B, T, H, K)."""
        f = self.decay_up_proj(self.decay_down_proj(x))
        wide = accumulator(f.dtype)
        dt = softplus(f.to(wide) + self.dt_bias.to(wide))
        rate = self.A_log.to(wide).exp()
        return -rate[:, None] * torch.unflatten(dt, -1, (self.n_heads, -1))

    def gated(self, o: Tensor, x: Tensor) -> Tensor:
        """See `DeltaNet.gated`."""
        gate = self.gate_up_proj(self.gate_down_proj(x)).to(o.dtype)
        return o * torch.sigmoid(torch.unflatten(gate, -1, o.shape[-2:]))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        parameters, flops, state_bytes = super().cost(length)
        D, H, rank = self.d_model, self.n_heads, self.decay_down_proj.out_features
        keys, values = H * self.key_size, H * self.value_size
        products = rank * (2 * D + keys + values)
        return Cost(parameters + products + H + keys, flops + 2 * length * products, state_bytes)
