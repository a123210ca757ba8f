"""The mLSTM layer of xLSTM 7B: narrow keys, soft-capped gates that read the input, no convolution.

    q, k, v, o = W x,  i, f = cap tanh((W x + b) / cap)
    C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T,  n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t
    h_t = C_t^T q_t / max(|n_t . q_t|, 1),  y_t = W_o (sigmoid(o_t) * LN_head(h_t))

O(T) time, a state of `qk_factor d_model^2 / n_heads` floats and more. Beck et al., 2025,
arXiv:2503.13427, section 3, which puts `swiglu` behind each. How C and n are kept from overflow:
`seqzoo.layers.mlstm`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.mlstm import FORGET_BIASES, Cell, matrix_memory

EPS = 1e-6
INPUT_BIAS = -10.0


class MLSTMLargeState(NamedTuple):
    """C and n (B, H, K, V + 1), n the last column, as multiples of exp(m); and m (B, H)."""

    C: Tensor
    m: Tensor


class MLSTMLarge(Mixer):
    """The mLSTM layer of xLSTM 7B: no up-projection, gates from the input, soft-capped.

    Args:
        d_model: width D; also the width of all values together.
        n_heads: heads H.
        qk_factor: width of all queries (or keys) together, as a multiple of `d_model`.
        softcap: c: gates become c tanh(gate / c) before their activations.
        bias: biases in the projections; the gates i and f always have them.
    """

    caps = Caps(state="constant")
    paper = "arXiv:2503.13427"
    kernel = "decay"
    variants = ({"n_heads": 2, "qk_factor": 1.0, "softcap": 3.0, "bias": True},)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        qk_factor: float = 0.5,
        softcap: float = 15.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_heads=n_heads, qk_factor=qk_factor, softcap=softcap)
        keys = int(qk_factor * d_model)
        for name, width in (("d_model", d_model), ("qk_factor * d_model", keys)):
            if width == 0 or width % n_heads:
                raise not_divisible(name, width, "n_heads", n_heads)
        self.d_model, self.n_heads, self.key_dim, self.softcap = d_model, n_heads, keys, softcap
        self.q_proj = nn.Linear(d_model, keys, bias=bias)
        self.k_proj = nn.Linear(d_model, keys, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        self.out_gate_proj = nn.Linear(d_model, d_model, bias=bias)
        self.gate_weight = nn.Parameter(torch.empty(2, n_heads, d_model))  # i, f
        self.gate_bias = nn.Parameter(torch.empty(2, n_heads))
        self.norm_weight = nn.Parameter(torch.empty(d_model))
        self.norm_bias = nn.Parameter(torch.empty(d_model)) if bias else None
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': gates that read nothing yet, i closed at -10, f from 3 to 6 over the heads.

        The projections start as `nn.Linear` does.
        """
        nn.init.zeros_(self.gate_weight)
        nn.init.ones_(self.norm_weight)
        if self.norm_bias is not None:
            nn.init.zeros_(self.norm_bias)
        with torch.no_grad():
            self.gate_bias[0].fill_(INPUT_BIAS)
            self.gate_bias[1].copy_(torch.linspace(*FORGET_BIASES, self.n_heads, device="cpu"))

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        wide = accumulator(x.dtype)
        gates = linear(x, self.gate_weight.to(x.dtype).flatten(0, 1)).to(wide)
        gates = torch.unflatten(gates, -1, (2, -1)) + self.gate_bias.to(wide)
        gates = self.softcap * torch.tanh(gates / self.softcap)
        q, k, v = (
            torch.unflatten(project(x), -1, (self.n_heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        gate = self.out_gate_proj(x)
        cell = None if state is None else Cell(*state)
        h, cell = matrix_memory(q, k, v, gates, cell, ctx or Context())
        y = layer_norm(h, h.shape[-1:], eps=EPS).flatten(-2) * self.norm_weight.to(wide)
        if self.norm_bias is not None:
            y = y + self.norm_bias.to(wide)
        y = self.o_proj((torch.sigmoid(gate.to(wide)) * y).to(gate.dtype))
        return y, None if state is None else MLSTMLargeState(*cell)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MLSTMLargeState:
        """Zeros: an empty memory."""
        H, K, V = self.n_heads, self.key_dim // self.n_heads, self.d_model // self.n_heads
        C = self.zeros(batch_size, H, K, V + 1, device=device, dtype=dtype)
        return MLSTMLargeState(C, self.zeros(batch_size, H, device=device, dtype=dtype))

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`."""
        D, H, keys = self.d_model, self.n_heads, self.key_dim
        products = 2 * D * keys + 3 * D * D + 2 * H * D
        biases = 2 * H + (0 if self.q_proj.bias is None else 2 * keys + 4 * D)
        memory = keys * (D // H + 1)
        flops = 2 * length * (products + 2 * memory)
        return Cost(products + biases + D, flops, 4 * (memory + H))
