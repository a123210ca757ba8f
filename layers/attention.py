"""Softmax attention with any number of key heads, a window, and any scheme of positions.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s over the tokens that t may see

O(T^2) time and a cache of every key and value; O(T W) time and the last W - 1 tokens with a window.
Vaswani et al., 2017, arXiv:1706.03762; grouped key heads: Ainslie et al., 2023, arXiv:2305.13245;
sinks: Xiao et al., 2023, arXiv:2309.17453, at their true positions, where the authors renumber what
is in the cache.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.attention import attention
from seqzoo.kernels.errors import check_positive, not_divisible
from seqzoo.layers.base import Caps, Context, Cost, Mixer, State
from seqzoo.layers.position import create_position


class AttentionState(NamedTuple):
    """The tokens of the current document that later ones may see, before rotation.

    Keys and values (B, S, G, K), which of the S slots hold such a token (B, S), positions (B, S),
    and the position of the next token (B,). With a window, S is always sinks + W - 1, the slots
    fill up from the end, and unused ones are zero.
    """

    k: Tensor
    v: Tensor
    mask: Tensor
    positions: Tensor
    next: Tensor


class Attention(Mixer):
    """Softmax attention: MHA, GQA or MQA, full, windowed or bidirectional.

    Args:
        d_model: width D.
        n_heads: query heads H.
        n_kv_heads: key and value heads G, a divisor of H; H when None, 1 for MQA.
        head_dim: channels K of a head; D / H when None.
        window: W: a token sees itself and the W - 1 before it.
        sinks: with a window, the first tokens of a document that stay visible.
        causal: False sees both directions, and has no state.
        bias: biases in the four projections.
        qk_norm: RMSNorm of queries and keys, head by head.
        softcap: c: scores become c tanh(score / c).
        position: a scheme, by name or as {name, options}; see `seqzoo.layers.position`.
    """

    caps = Caps(state="growing", bidirectional=True)
    paper = "arXiv:1706.03762"
    kernel = "attention"
    variants = (
        {"n_kv_heads": 2, "position": "rope", "qk_norm": True, "bias": True},
        {"window": 16, "sinks": 2, "position": "alibi", "softcap": 5.0},
        {"window": 64, "n_kv_heads": 1, "position": "xpos"},
        {"causal": False, "position": "alibi"},
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        sinks: int = 0,
        causal: bool = True,
        bias: bool = False,
        qk_norm: bool = False,
        softcap: float | None = None,
        position: str | Mapping[str, Any] = "none",
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        check_positive(d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads)
        if n_heads % n_kv_heads:
            raise not_divisible("n_heads", n_heads, "n_kv_heads", n_kv_heads)
        if head_dim is None and d_model % n_heads:
            raise not_divisible("d_model", d_model, "n_heads", n_heads)
        K = d_model // n_heads if head_dim is None else head_dim
        check_positive(head_dim=K)
        for name, value in (("window", window), ("softcap", softcap)):
            if value is not None:
                check_positive(**{name: value})
        if sinks < 0 or (sinks and window is None):
            raise ValueError(f"sinks={sinks} is not allowed; it must be 0, or more with a window")
        self.d_model, self.n_heads, self.n_kv_heads, self.head_dim = d_model, n_heads, n_kv_heads, K
        self.window, self.sinks, self.causal, self.softcap = window, sinks, causal, softcap
        self.q_proj = nn.Linear(d_model, n_heads * K, bias=bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * K, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * K, bias=bias)
        self.o_proj = nn.Linear(n_heads * K, d_model, bias=bias)
        self.q_norm = nn.RMSNorm(K, eps=1e-6) if qk_norm else None
        self.k_norm = nn.RMSNorm(K, eps=1e-6) if qk_norm else None
        self.position = create_position(
            position, n_heads=n_heads, head_dim=K, d_model=d_model, causal=causal
        )
        if "embed" in self.position.hooks:
            raise ValueError(
                f"position {position!r} is added to the embedding, not inside a mixer; give it to"
                " the decoder"
            )
        if not causal:
            self.caps = Caps("none", prefix=False, state="none", bidirectional=True)
        elif window is not None:
            self.caps = Caps(state="window", bidirectional=True)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Context | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`; a bidirectional pass takes no state.

        Positions given in the context turn queries and keys and set the distances of a bias; a
        window always counts real tokens.
        """
        if state and not self.causal:
            raise ValueError("attention with causal=False has no state to go on from; pass None")
        ctx = ctx or Context()
        q = torch.unflatten(self.q_proj(x), -1, (self.n_heads, self.head_dim))
        k = torch.unflatten(self.k_proj(x), -1, (self.n_kv_heads, self.head_dim))
        v = torch.unflatten(self.v_proj(x), -1, (self.n_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        reset = ctx.reset
        document = None if reset is None else reset.long().cumsum(1)
        if not state:
            y = self._attend(q, k, v, ctx.index(x), ctx.mask, document, ctx.positions is not None)
            return y, state
        past = AttentionState(*state)
        B, T, S = *x.shape[:2], past.mask.shape[1]
        fresh = x.new_ones(B, T, dtype=torch.bool) if ctx.mask is None else ctx.mask
        index = ctx.index(x, past.next)
        if document is not None:
            document = torch.cat([document.new_zeros(B, S), document], dim=1)
        # The cache keeps its dtype, the products have that of the pass.
        seen = AttentionState(
            torch.cat([past.k, k.to(past.k.dtype)], dim=1),
            torch.cat([past.v, v.to(past.v.dtype)], dim=1),
            torch.cat([past.mask, fresh], dim=1),
            torch.cat([past.positions, index], dim=1),
            ctx.next_index(index, past.next),
        )
        y = self._attend(
            q, seen.k.to(k.dtype), seen.v.to(v.dtype), seen.positions, seen.mask, document, True
        )
        return y, self._keep(seen, document)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        mask: Tensor | None,
        document: Tensor | None,
        gaps: bool,
    ) -> Tensor:
        """Attention and the output projection; `gaps`: slots do not tell the positions."""
        hooks = self.position.hooks
        bias: Tensor | Callable[[Tensor], Tensor] | None = None
        if "bias" in hooks:
            bias = self.position.bias
        if "bias_from" in hooks:
            bias = self.position.bias_from(q, k, index, mask)
        if "rotate" in hooks:
            q, k = self.position.rotate(q, k, index)
        o = attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            sinks=self.sinks,
            bias=bias,
            document=document,
            mask=mask,
            index=index if gaps else None,
            softcap=self.softcap,
        )
        y: Tensor = self.o_proj(o.flatten(-2))
        return y

    def _keep(self, seen: AttentionState, document: Tensor | None) -> AttentionState:
        """What later tokens may see: the current document, within reach of the window."""
        mask = seen.mask
        if document is not None:
            mask = mask & (document == document[:, -1:])
        if self.window is None:
            return seen._replace(mask=mask)
        rank = mask.long().cumsum(1)  # what is kept starts with the sinks, so the rank finds them
        first, recent = mask & (rank <= self.sinks), mask & (rank > self.sinks)
        slots = torch.cat([_last(first, self.sinks), _last(recent, self.window - 1)], dim=1)
        kept = torch.cat(
            [
                first.gather(1, slots[:, : self.sinks]),
                recent.gather(1, slots[:, self.sinks :]),
            ],
            dim=1,
        )
        heads = slots[..., None, None].expand(-1, -1, self.n_kv_heads, self.head_dim)
        k, v = (torch.where(kept[..., None, None], x.gather(1, heads), 0) for x in (seen.k, seen.v))
        index = torch.where(kept, seen.positions.gather(1, slots), 0)
        return AttentionState(k, v, kept, index, seen.next)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Nothing seen; () when bidirectional."""
        if not self.causal:
            return ()
        S = 0 if self.window is None else self.sinks + self.window - 1
        like = self.q_proj.weight
        device, dtype = device or like.device, dtype or like.dtype
        shape = (batch_size, S, self.n_kv_heads, self.head_dim)
        return AttentionState(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(batch_size, S, device=device, dtype=torch.bool),
            torch.zeros(batch_size, S, device=device, dtype=torch.long),
            torch.zeros(batch_size, device=device, dtype=torch.long),
        )

    def cost(self, length: int) -> Cost:
        """See `Mixer.cost`; the definition computes all T x T scores, window or not."""
        D, K, T = self.d_model, self.head_dim, length
        H, G = self.n_heads * K, self.n_kv_heads * K
        parameters = 2 * D * (H + G)
        if self.q_proj.bias is not None:
            parameters += H + 2 * G + D
        if self.q_norm is not None:
            parameters += 2 * K
        parameters += sum(p.numel() for p in self.position.parameters())
        flops = 2 * T * 2 * D * (H + G) + 2 * T * T * 2 * H
        slots = length if self.window is None else self.sinks + self.window - 1
        state_bytes = slots * (2 * 4 * G + 1 + 8) + 8 if self.causal else 0
        return Cost(parameters, flops, state_bytes)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """In the precision of the weight, whatever autocast made of `x`."""
    y: Tensor = norm(x.to(norm.weight.dtype))
    return y.to(x.dtype)


def _last(mask: Tensor, n: int) -> Tensor:
    """Slots (B, n) of each row's last n True tokens, in order, after junk where there are fewer."""
    order = mask.to(torch.int8).argsort(dim=1, stable=True)
    return order[:, order.shape[1] - n :]
