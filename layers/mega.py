"""MEGA: attention within chunks, gated, over a damped moving average that carries what lies beyond.

    h_t = p beta x_t + (1 - p d) h_{t-1},  m_t = silu(sum_n gamma_n h_{t,n} / sqrt(N) + omega x_t)
    z = silu(W_z m),  q = scale_q z + bias_q,  k = scale_k z + bias_k,  v = silu(W_v x)
    o_t = sum_s softmax_s(q_t . k_s / sqrt(Z)) v_s over the tokens of t's chunk, up to t
    y = u (silu(W_h m + W_o (o silu(W_r m))) - x),  u = sigmoid(W_u m)

with N averages of every channel, p = sigmoid(alpha), d = sigmoid(delta), and one head. O(T C) time,
state of N floats a channel and at most C - 1 keys and values; O(T^2) and all of them without
chunks. Ma et al., 2022, arXiv:2209.10655, sections 3.1 to 3.5. The paper's layer is x + y: its gate
chooses between a candidate and the input, which here comes by the residual connection. Its relative
bias is any `position` scheme. Chunks count the real tokens of a document.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from seqzoo.kernels.attention import attention
from seqzoo.kernels.dispatch import accumulator, full_precision
from seqzoo.kernels.errors import check_positive
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.linear_system import Diagonal, kernel_flops, run_diagonal
from seqzoo.layers.position import create_position


class MegaState(NamedTuple):
    """The averages (B, D, N), and the tokens that later ones of the same chunk see.

    Keys (B, S, 1, Z) before rotation, values (B, S, 1, V), which of the S slots hold such a token
    (B, S), positions (B, S), and the position of the next token (B,). With chunks S is C - 1.
    """

    h: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    positions: Tensor
    next: Tensor


class Mega(Mixer):
    """Moving-average equipped gated attention, in chunks (MEGA-chunk) or over everything (MEGA).

    Args:
        d_model: width D.
        d_state: averages N of a channel.
        head_dim: channels Z of queries and keys.
        hidden: channels V of values; 2 D when None.
        chunk: tokens C of a chunk, at least 2; None attends to everything before.
        bias: biases in the projections.
        position: a scheme, by name or as {name, options}; see `seqzoo.layers.position`.
    """

    caps = Caps(state="window")
    paper = "arXiv:2209.10655"
    kernel = "long_conv"
    variants = ({"chunk": 9, "hidden": 24, "position": "rope", "bias": False},)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        head_dim: int = 64,
        hidden: int | None = None,
        chunk: int | None = 128,
        bias: bool = True,
        position: str | Mapping[str, Any] = "none",
    ) -> None:
        super().__init__()
        hidden = 2 * d_model if hidden is None else hidden
        check_positive(d_model=d_model, d_state=d_state, head_dim=head_dim, hidden=hidden)
        if chunk is not None and chunk < 2:
            raise ValueError(f"chunk={chunk} is not allowed; it must be at least 2")
        self.d_model, self.d_state, self.head_dim = d_model, d_state, head_dim
        self.hidden, self.chunk = hidden, chunk
        self.alpha = nn.Parameter(torch.empty(d_model, d_state))
        self.delta = nn.Parameter(torch.empty(d_model, d_state))
        self.beta = nn.Parameter(torch.empty(d_model, d_state))
        self.gamma = nn.Parameter(torch.empty(d_model, d_state))
        self.omega = nn.Parameter(torch.empty(d_model))
        self.v_proj = nn.Linear(d_model, hidden, bias=bias)
        self.in_proj = nn.Linear(d_model, 2 * d_model + head_dim + hidden, bias=bias)
        self.o_proj = nn.Linear(hidden, d_model, bias=False)
        self.qk_scale = nn.Parameter(torch.empty(2, head_dim))
        self.qk_bias = nn.Parameter(torch.empty(2, head_dim))
        self.position = create_position(position, n_heads=1, head_dim=head_dim, d_model=d_model)
        if "embed" in self.position.hooks:
            raise ValueError(
                f"position {position!r} is added to the embedding, not inside a mixer; give it to"
                " the decoder"
            )
        if chunk is None:
            self.caps = Caps(state="growing")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': beta about +1, -1, +1, ..., others normal, small scales of q and k.

        The projections start as `nn.Linear` does.
        """
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.delta, std=0.2)
        nn.init.normal_(self.beta, std=0.02)
        nn.init.normal_(self.gamma)
        nn.init.normal_(self.omega)
        nn.init.normal_(self.qk_scale, std=0.02)
        nn.init.zeros_(self.qk_bias)
        with torch.no_grad():
            self.beta[:, 0::2] += 1
            self.beta[:, 1::2] -= 1

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`.

        Positions given in the context turn queries and keys and set the distances of a bias.
        """
        ctx = ctx or Context()
        past = None if state is None else MegaState(*state)
        D, Z, V = self.d_model, self.head_dim, self.hidden
        m, h = self._average(x, None if past is None else past.h, ctx)
        u, z, r, candidate = torch.split(self.in_proj(m), [D, Z, V, D], dim=-1)
        z, v = silu(z)[:, :, None], silu(self.v_proj(x))[:, :, None]
        q, k = (z * self.qk_scale[i].to(z.dtype) + self.qk_bias[i].to(z.dtype) for i in (0, 1))
        o, after = self._attend(q, k, v, past, ctx)
        candidate = silu(candidate + self.o_proj(o[:, :, 0] * silu(r)))
        y = torch.sigmoid(u) * (candidate - x)
        return y, None if after is None or h is None else after._replace(h=h)

    def _average(self, x: Tensor, h: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """The moving averages, read, and their last values."""
        wide = accumulator(x.dtype)
        p, d = torch.sigmoid(self.alpha.double()), torch.sigmoid(self.delta.double())
        # A product that rounds to 1 forgets at once.
        log_a = torch.log1p(-p * d).clamp(min=-100)
        c = self.gamma.double() * self.d_state**-0.5
        system = Diagonal(
            *(torch.complex(a, torch.zeros_like(a)) for a in (log_a, p * self.beta, c))
        )
        start = None if h is None else torch.complex(h, torch.zeros_like(h))
        with full_precision(x):
            m, last = run_diagonal(system, x.to(wide), start, self.omega, ctx.mask, ctx.reset)
        return silu(m).to(x.dtype), None if last is None else last.real

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, past: MegaState | None, ctx: Context
    ) -> tuple[Tensor, MegaState | None]:
        """Attention within chunks, and what the next pass needs of them."""
        B, T = q.shape[:2]
        index = ctx.index(q, None if past is None else past.next).expand(B, T)
        mask, reset = ctx.mask, ctx.reset
        group = torch.zeros_like(index) if reset is None else reset.long().cumsum(1)
        following = group[:, -1:]
        if self.chunk is not None:
            # What a state keeps is the beginning of the chunk that goes on.
            begun = None if past is None else past.mask.sum(1)
            bare = Context(mask, ctx.document, ctx.last_document)
            place = bare.index(q, begun)
            then = bare.next_index(place, begun)[..., None]
            chunks = T // self.chunk + 2
            group = group * chunks + place // self.chunk
            following = following * chunks + then // self.chunk
        apart = reset is not None or self.chunk is not None
        if past is None:
            ids, gaps = group if apart else None, ctx.positions is not None
            return self._softmax(q, k, v, index, mask, ids, gaps), None
        group = torch.cat([torch.zeros_like(past.positions), group], dim=1)
        fresh = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
        seen = MegaState(
            past.h,
            torch.cat([past.k, k.to(past.k.dtype)], dim=1),
            torch.cat([past.v, v.to(past.v.dtype)], dim=1),
            torch.cat([past.mask, fresh], dim=1),
            torch.cat([past.positions, index], dim=1),
            ctx.next_index(index, past.next),
        )
        ids, k, v = group if apart else None, seen.k.to(k.dtype), seen.v.to(v.dtype)
        o = self._softmax(q, k, v, seen.positions, seen.mask, ids, True)
        kept = seen.mask & (group == following) if T else seen.mask
        return o, self._keep(seen._replace(mask=kept))

    def _softmax(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        mask: Tensor | None,
        group: Tensor | None,
        gaps: bool,
    ) -> Tensor:
        """Attention with positions; `gaps`: slots do not tell them."""
        hooks = self.position.hooks
        bias: Tensor | Callable[[Tensor], Tensor] | None = None
        if "bias" in hooks:
            bias = self.position.bias
        if "bias_from" in hooks:
            bias = self.position.bias_from(q, k, index, mask)
        if "rotate" in hooks:
            q, k = self.position.rotate(q, k, index)
        where = index if gaps else None
        return attention(
            q, k, v, window=self.chunk, bias=bias, document=group, mask=mask, index=where
        )

    def _keep(self, seen: MegaState) -> MegaState:
        """The tokens of the chunk that goes on, in the last of C - 1 slots; the others are zero."""
        if self.chunk is None:
            return seen
        slots = seen.mask.to(torch.int8).argsort(dim=1, stable=True)
        slots = slots[:, slots.shape[1] - self.chunk + 1 :]
        mask, where = seen.mask.gather(1, slots), slots[..., None, None]
        k, v = (x.gather(1, where.expand(-1, -1, 1, x.shape[-1])) for x in (seen.k, seen.v))
        k, v = (torch.where(mask[..., None, None], x, 0) for x in (k, v))
        positions = torch.where(mask, seen.positions.gather(1, slots), 0)
        return MegaState(seen.h, k, v, mask, positions, seen.next)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MegaState:
        """Nothing averaged and nothing seen."""
        S = 0 if self.chunk is None else self.chunk - 1
        h = self.zeros(batch_size, self.d_model, self.d_state, device=device, dtype=dtype)
        cached, device = dtype or self.v_proj.weight.dtype, h.device
        return MegaState(
            h,
            torch.zeros(batch_size, S, 1, self.head_dim, device=device, dtype=cached),
            torch.zeros(batch_size, S, 1, self.hidden, device=device, dtype=cached),
            torch.zeros(batch_size, S, device=device, dtype=torch.bool),
            torch.zeros(batch_size, S, device=device, dtype=torch.long),
            torch.zeros(batch_size, device=device, dtype=torch.long),
        )

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`; the definition computes all T x T scores, chunks or not."""
        D, N, Z, V, T = self.d_model, self.d_state, self.head_dim, self.hidden, length
        maps = D * V + D * (2 * D + Z + V) + V * D
        parameters = maps + 4 * D * N + D + 4 * Z
        if self.v_proj.bias is not None:
            parameters += V + 2 * D + Z + V
        parameters += sum(p.numel() for p in self.position.parameters())
        flops = T * 2 * maps + kernel_flops(D, N, T) + 2 * T * T * (Z + V)
        slots = T if self.chunk is None else self.chunk - 1
        return Cost(parameters, flops, 4 * D * N + slots * (4 * (Z + V) + 1 + 8) + 8)
