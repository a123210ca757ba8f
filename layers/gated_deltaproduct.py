"""Gated DeltaProduct: n delta-rule steps a token, so that a token can rotate the state.

    q, k_i, v_i = silu(conv4(W x)),  q = q / |q|,  k_i = k_i / |k_i|,  beta_ti = 2 sigmoid(W_b x_t)
    S = alpha_t S_{t-1};  for i = 1 ... n:  S += beta_ti k_ti (v_ti - S^T k_ti)^T;  S_t = S
    y_t = W_o (RMSNorm(S_t^T q_t / sqrt(K)) * silu(W_g x_t)),  alpha as in Gated DeltaNet

A product of n Householder matrices is a rotation in up to n dimensions, where one is a reflection:
with n = 1 this is Gated DeltaNet. O(n T) time, a state of `expand_v n_heads head_dim^2` floats and
the convolution's tail. Siems et al., 2025, arXiv:2502.10297, sections 3 and 4; sizes and initial
values are those of Gated DeltaNet, as in the authors' code.
"""

from typing import Any

import torch
from torch import Tensor, nn

from seqzoo.kernels.delta.product import delta_product
from seqzoo.kernels.errors import check_positive
from seqzoo.layers.gated_deltanet import GatedDeltaNet


class GatedDeltaProduct(GatedDeltaNet):
    """Several delta-rule steps a token, after a decay, and an output gate (DeltaProduct).

    Args:
        d_model: width D.
        n_householder: steps n a token, each with a key, a value and a beta of its own.
        n_heads: heads H.
        head_dim: key and query size K of a head; `3/4 d_model / n_heads` when None, rounded down.
        expand_v: value size V of a head, as a multiple of K.
        d_conv: width W of the short convolution of queries, keys and values.
        negative_eigenvalues: beta in (0, 2), the paper's, instead of (0, 1).
    """

    paper = "arXiv:2502.10297"
    variants = (
        {
            "n_householder": 3,
            "n_heads": 2,
            "head_dim": 8,
            "expand_v": 1.5,
            "d_conv": 2,
            "negative_eigenvalues": False,
        },
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_householder: int = 2,
        n_heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        d_conv: int = 4,
        negative_eigenvalues: bool = True,
    ) -> None:
        check_positive(n_householder=n_householder)
        super().__init__(
            d_model,
            n_heads=n_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            d_conv=d_conv,
            negative_eigenvalues=negative_eigenvalues,
        )
        H, K, V, n = n_heads, self.key_size, self.value_size, n_householder
        self.n_householder = n
        self.k_proj = nn.Linear(d_model, n * H * K, bias=False)
        self.v_proj = nn.Linear(d_model, n * H * V, bias=False)
        self.beta_proj = nn.Linear(d_model, n * H, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(H * K + n * H * (K + V), d_conv))
        self.reset_parameters()

    def recurrence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        **carried: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """See `DeltaNet.recurrence`; heads stand side by side, step after step."""
        steps = (self.n_householder, self.n_heads)
        k, v = torch.unflatten(k, 2, steps), torch.unflatten(v, 2, steps)
        return delta_product(q, k, v, torch.unflatten(beta, 2, steps), log_decay, **carried)
