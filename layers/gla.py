"""Gated linear attention: linear attention whose keys decay by a data-dependent gate per channel.

    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/16)
    S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)
    y_t = W_o (RMSNorm(o_t) * swish(W_g x_t))

O(T) time, a state of `expand_k expand_v d_model^2 / n_heads` floats. Yang et al., 2023,
arXiv:2312.06635, section 4.4. The norm of each head is an RMS norm with weights, as in the authors'
code; the paper writes LayerNorm, and a bias on the output gate.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, rms_norm, silu

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

EPS = 1e-5


class GLAState(NamedTuple):
    """State of the heads, (B, H, K, V)."""

    S: Tensor


class GLA(Mixer):
    """Gated linear attention: a decay per key channel, computed from the input (GLA).

    Args:
        d_model: width D.
        n_heads: heads H.
        expand_k: width of all keys together, as a multiple of `d_model`.
        expand_v: width of all values together, as a multiple of `d_model`.
        gate_rank: rank of the gate's projection.
        gate_divisor: the log of the sigmoid is divided by this; the larger, the longer the memory.
        bias: biases in the projections; the gate's second one always has one.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2312.06635"
    kernel = "decay"
    variants = (
        {"n_heads": 2, "expand_k": 1.0, "expand_v": 0.5, "gate_rank": 3, "bias": True},
        {"gate_divisor": 4.0},
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_divisor: float = 16.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads, expand_k=expand_k, expand_v=expand_v)
        check_positive(gate_rank=gate_rank, gate_divisor=gate_divisor)
        self.key_dim = _width("expand_k", expand_k, d_model, n_heads)
        self.value_dim = _width("expand_v", expand_v, d_model, n_heads)
        self.d_model, self.n_heads, self.gate_divisor = d_model, n_heads, gate_divisor
        self.q_proj = nn.Linear(d_model, self.key_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, self.key_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, self.value_dim, bias=bias)
        self.gate_proj = nn.Linear(d_model, self.value_dim, bias=bias)
        self.decay_down_proj = nn.Linear(d_model, gate_rank, bias=False)
        self.decay_up_proj = nn.Linear(gate_rank, self.key_dim)
        self.norm = nn.RMSNorm(self.value_dim // n_heads, eps=EPS)
        self.o_proj = nn.Linear(self.value_dim, d_model, bias=bias)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        q, k, v, gate = (
            project(x).unflatten(-1, (self.n_heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj)
        )
        logits = self.decay_up_proj(self.decay_down_proj(x)).unflatten(-1, (self.n_heads, -1))
        log_decay = logsigmoid(logits.to(accumulator(logits.dtype))) / self.gate_divisor
        o, S = decay(
            q,
            k,
            v.to(log_decay.dtype),
            log_decay,
            scale=q.shape[-1] ** -0.5,
            initial_state=None if state is None else state[0],
            reset=ctx.reset,
            mask=ctx.mask,
        )
        # In the precision of the sums, whatever `.to(bfloat16)` made of the weight.
        y = rms_norm(o, o.shape[-1:], self.norm.weight.to(o.dtype), EPS) * silu(gate.to(o.dtype))
        y = self.o_proj(y.to(gate.dtype).flatten(-2))
        return y, None if state is None else GLAState(S)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GLAState:
        """Zeros."""
        K, V = self.key_dim // self.n_heads, self.value_dim // self.n_heads
        return GLAState(self.zeros(batch_size, self.n_heads, K, V, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, keys, values, H = self.d_model, self.key_dim, self.value_dim, self.n_heads
        rank = self.decay_down_proj.out_features
        products = 2 * D * keys + 3 * D * values + rank * (D + keys)
        biases = keys if self.q_proj.bias is None else 3 * keys + 2 * values + D
        state = keys * values // H
        flops = 2 * length * (products + 2 * state)
        return Cost(products + biases + values // H, flops, 4 * state)


def _width(option: str, factor: float, d_model: int, n_heads: int) -> int:
    """Factor * d_model, refused unless it is a whole number that the heads divide."""
    width = round(factor * d_model)
    if abs(width - factor * d_model) > 1e-6 * width:
        raise ValueError(
            f"{option}={factor} times d_model={d_model} is {factor * d_model}, not a whole number; "
            f"nearest: {width / d_model}"
        )
    if width == 0 or width % n_heads:
        raise not_divisible(f"{option} * d_model", width, "n_heads", n_heads)
    return width
