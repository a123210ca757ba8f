"""mLSTM, the xLSTM layer with matrix memories, exponential input gates and a normaliser.

    x'_t, z_t = W_up x_t,  u = silu(conv4(x')),  q, k = W_q u, W_k u / sqrt(K),  v = W_v x'
    C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T,  n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t
    h_t = C_t^T q_t / max(|n_t . q_t|, 1),  i_t, f_t = W [q, k, v] + b
    y_t = W_down ((LN_head(h_t) + skip * u_t) * silu(z_t))

with W_q, W_k, W_v block-diagonal in blocks of 4 channels. C and n are kept as multiples of
exp(m_t), m_t = max(log sigmoid(f_t) + m_{t-1}, i_t, 0), and divided by max(|n_t . q_t|, exp(-m_t))
+ 1e-6, so nothing overflows; h does not depend on m, which the paper does not hold above 0.

O(T) time, a state of `expand^2 d_model^2 / n_heads` floats and more. Beck et al., 2024,
arXiv:2405.04517, section 2.3 and figure 11. The layer of xLSTM 7B is `mlstm_large`, the one with
scalar memories `slstm`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, logsigmoid, silu

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.kernels.maxplus import stabilised
from seqzoo.kernels.short_conv import short_conv
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State

EPS = 1e-5  # of the norm
FLOOR = 1e-6  # what the authors add to the normaliser
FORGET_BIASES = 3.0, 6.0  # of the first head and the last


class Cell(NamedTuple):
    """C and n (B, H, K, V + 1), n the last column, as multiples of exp(m); and m (B, H)."""

    C: Tensor
    m: Tensor


class MLSTMState(NamedTuple):
    """Tail of the convolution (B, W-1, E); C and n (B, H, K, V + 1); m (B, H)."""

    tail: Tensor
    C: Tensor
    m: Tensor


def matrix_memory(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, cell: Cell | None, ctx: Context
) -> tuple[Tensor, Cell]:
    """The recurrence of the heads, for both forms of the layer.

    Args:
        q: (B, T, H, K).
        k: (B, T, H, K), unscaled.
        v: (B, T, H, V).
        gates: i and f before their activations, (B, T, 2, H).
        cell: the memory so far; empty when None.
        ctx: the pass.

    Returns:
        h: (B, T, H, V) in float32 or wider.
        cell: the memory after the pass.
    """
    wide = accumulator(q.dtype)
    i, f = gates.to(wide).unbind(2)
    C, m = cell if cell is not None else (None, i.new_zeros(i.shape[0], i.shape[2]))
    keep, write, level, m = stabilised(
        logsigmoid(f), i.clamp(min=0), initial_state=m, reset=ctx.reset, mask=ctx.mask
    )
    weight = (write + i.clamp(max=0)).exp()  # i - m, and not above zero where masked either
    v = v.to(wide)
    sums, C = decay(
        q,
        k.to(wide) * weight[..., None],
        torch.cat([v, torch.ones_like(v[..., :1])], dim=-1),
        keep,
        scale=q.shape[-1] ** -0.5,
        initial_state=C,
        reset=ctx.reset,
        mask=ctx.mask,
    )
    normaliser = torch.maximum(sums[..., -1:].abs(), (-level).exp()[..., None])
    return sums[..., :-1] / (normaliser + FLOOR), Cell(C, m)


class MLSTM(Mixer):
    """LSTM with matrix memories, exponential gating and a normaliser, in its block (xLSTM).

    Args:
        d_model: width D.
        n_heads: heads H; must divide the inner width.
        expand: the inner width is E = expand * d_model.
        d_conv: width W of the short convolution before queries and keys; 0 for none.
        block_size: channels of a block of the block-diagonal projections; must divide E.
        bias: biases in `in_proj` and `out_proj`.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2405.04517"
    kernel = "decay"
    variants = ({"n_heads": 2, "expand": 1, "d_conv": 0, "block_size": 8, "bias": True},)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand: int = 2,
        d_conv: int = 4,
        block_size: int = 4,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads, expand=expand, block_size=block_size)
        if d_conv < 0:
            raise ValueError(f"d_conv={d_conv} is not allowed; it must be at least 0")
        E = expand * d_model
        for name, divisor in (("n_heads", n_heads), ("block_size", block_size)):
            if E % divisor:
                raise not_divisible("expand * d_model", E, name, divisor)
        self.d_model, self.n_heads, self.inner, self.d_conv = d_model, n_heads, E, d_conv
        self.in_proj = nn.Linear(d_model, 2 * E, bias=bias)  # x', z
        self.conv_weight = nn.Parameter(torch.empty(E, d_conv)) if d_conv else None
        self.conv_bias = nn.Parameter(torch.empty(E)) if d_conv else None
        blocks = 3, E // block_size, block_size, block_size
        self.qkv_weight = nn.Parameter(torch.empty(blocks))  # (of q, k, v; block; out; in)
        self.gate_weight = nn.Parameter(torch.empty(2, n_heads, 3 * E))  # i, f
        self.gate_bias = nn.Parameter(torch.empty(2, n_heads))
        self.norm_weight = nn.Parameter(torch.empty(E))
        self.skip = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Linear(E, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': gates that read nothing yet, forget biases from 3 to 6 over the heads.

        Input biases are normal with deviation 0.1, the blocks normal with variance 2 / (5 D); the
        convolution starts as `nn.Conv1d` does, and in and out projection as `nn.Linear` does.
        """
        if self.conv_weight is not None and self.conv_bias is not None:
            bound = self.d_conv**-0.5
            nn.init.uniform_(self.conv_weight, -bound, bound)
            nn.init.uniform_(self.conv_bias, -bound, bound)
        nn.init.normal_(self.qkv_weight, std=(2 / (5 * self.d_model)) ** 0.5)
        nn.init.zeros_(self.gate_weight)
        nn.init.normal_(self.gate_bias, std=0.1)
        nn.init.ones_(self.norm_weight)
        nn.init.ones_(self.skip)
        with torch.no_grad():
            self.gate_bias[1].copy_(torch.linspace(*FORGET_BIASES, self.n_heads, device="cpu"))

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        tail, cell = (state[0], Cell(*state[1:])) if state is not None else (None, None)
        inner, z = self.in_proj(x).chunk(2, dim=-1)
        u = inner
        if self.conv_weight is not None:
            u, tail = short_conv(
                inner,
                self.conv_weight,
                self.conv_bias,
                activation="silu",
                initial_state=tail,
                reset=ctx.reset,
                mask=ctx.mask,
            )
        weights = self.qkv_weight.to(x.dtype)
        q, k, v = (_blocks(a, w) for a, w in zip((u, u, inner), weights, strict=True))
        joined = torch.cat([q, k, v], dim=-1)
        gates = linear(joined, self.gate_weight.to(x.dtype).flatten(0, 1))
        wide = accumulator(x.dtype)
        gates = torch.unflatten(gates.to(wide), -1, (2, -1)) + self.gate_bias.to(wide)
        q, k, v = (torch.unflatten(a, -1, (self.n_heads, -1)) for a in (q, k, v))
        h, cell = matrix_memory(q, k, v, gates, cell, ctx)
        normed = layer_norm(h, h.shape[-1:], eps=EPS).flatten(-2) * self.norm_weight.to(wide)
        y = (normed + self.skip.to(wide) * u.to(wide)) * silu(z.to(wide))
        y = self.out_proj(y.to(z.dtype))
        return y, None if state is None or tail is None else MLSTMState(tail, *cell)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MLSTMState:
        """Zeros: an empty memory."""
        H, K = self.n_heads, self.inner // self.n_heads
        C = self.zeros(batch_size, H, K, K + 1, device=device, dtype=dtype)
        m = self.zeros(batch_size, H, device=device, dtype=dtype)
        taps, like = max(self.d_conv - 1, 0), dtype or self.skip.dtype
        tail = torch.zeros(batch_size, taps, self.inner, device=C.device, dtype=like)
        return MLSTMState(tail, C, m)

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, E, H, W = self.d_model, self.inner, self.n_heads, self.d_conv
        products = 3 * D * E + self.qkv_weight.numel() + self.gate_weight.numel()
        biases = 2 * H + (0 if self.in_proj.bias is None else 2 * E + D)
        convolution = E * (W + 1) if W else 0
        memory = E * (E // H + 1)
        state = memory + H + E * max(W - 1, 0)
        flops = 2 * length * (products + 2 * memory)
        return Cost(products + biases + convolution + 2 * E, flops, 4 * state)


def _blocks(x: Tensor, weight: Tensor) -> Tensor:
    """(B, T, E) through blocks (E / S, out S, in S)."""
    blocks = torch.unflatten(x, -1, weight.shape[::2])
    return torch.einsum("btns,nos->btno", blocks, weight).flatten(-2)
