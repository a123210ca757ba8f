"""Linear attention with a decaying state: S_t = Diag(w_t) S_{t-1} + k_t v_t^T, o_t = q_t^T S_t.

Carries Linear Transformer, causal Performer, cosFormer, Based, RetNet, Mamba-2, GLA, HGRN2,
RWKV-5 and -6, mLSTM and lightning attention.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from seqzoo.kernels.decay.chunked import step
from seqzoo.kernels.decay.operators import differentiate
from seqzoo.kernels.decay.reference import decay as reference_decay
from seqzoo.kernels.dispatch import Backend, accumulator, choose, declare, full_precision
from seqzoo.kernels.errors import check_shape, not_divisible, unknown
from seqzoo.kernels.operator import operator

SINGLE = (torch.float32, torch.float16, torch.bfloat16)
declare(
    "decay",
    Backend("native", ("cpu",), (*SINGLE, torch.float64), needs=("compiler",)),
    Backend("fused", ("cuda",), SINGLE, needs=("triton",)),
    Backend("chunked"),
    Backend("reference"),
)


def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    read: str = "after",
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = Diag(w_t) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t, w = exp(log_decay).

    With read="before", o_t = scale q_t^T (S_{t-1} + Diag(bonus) k_t v_t^T). O(T K V) time. Dao and
    Gu, "Transformers are SSMs", arXiv:2405.21060; Yang et al., "Gated Linear Attention",
    arXiv:2312.06635; Peng et al., "Eagle and Finch", arXiv:2404.05892.

    Args:
        q: queries (B, T, Hk, K); Hk divides H: each run of H / Hk value heads shares a q and a k.
        k: keys (B, T, Hk, K).
        v: values (B, T, H, V).
        log_decay: <= 0, -inf included; (B, T, H), (B, T, H, K) for a decay per key channel, or None
            for none.
        bonus: (H, K), the weight of the current token, with read="before"; it has none when None.
        read: `after` the token's own write, or `before` it (and before its decay).
        scale: factor of the output.
        initial_state: S before the first token, (B, H, K, V); zero when None.
        reset: (B, T) bool; True empties the state before the token.
        mask: (B, T) bool; False leaves the state untouched, and o there means nothing.
        backend: `native` (CPU), `fused` (CUDA), `chunked` or `reference`; the first that can serve
            the call when None.

    Returns:
        o: (B, T, H, V) in the dtype of `v`.
        state: (B, H, K, V), the last S, in float32 or wider. Both are differentiable.

    Raises:
        ValueError: shapes that do not fit, an unknown `read`, a bonus with read="after", or a
            backend that cannot serve the call.
    """
    _check(q, k, v, log_decay, bonus, read)
    B, T, H, V = v.shape
    for name, flags in (("reset", reset), ("mask", mask)):
        if flags is not None:
            check_shape(name, flags.shape, (B, T), "(B, T)")
    shape = (B, H, k.shape[-1], V)
    wide = v.dtype
    for x in (q, k, log_decay, initial_state):
        wide = wide if x is None else torch.promote_types(wide, x.dtype)
    wide = accumulator(wide)
    if initial_state is None:
        initial_state = torch.zeros(shape, device=v.device, dtype=wide)
    check_shape("initial_state", initial_state.shape, shape, "(B, H, K, V)")
    state = initial_state.to(wide)
    chosen = choose("decay", v if wide == torch.float32 else state, backend)
    before = read == "before"
    with full_precision(v):
        q = q if scale == 1 else q.to(wide) * scale
        if chosen == "reference":
            g, u = (x if x is None else x.to(wide) for x in (log_decay, bonus))
            q, k, values = q.to(wide), k.to(wide), v.to(wide)
            o, state = reference_decay(q, k, values, g, u, before, state, reset, mask)
        else:
            o, state = _vectorised(q, k, v, log_decay, bonus, before, state, reset, mask, chosen)
    return o.to(v.dtype), state


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, bonus: Tensor | None, read: str
) -> None:
    if v.ndim != 4 or k.ndim != 4:
        raise ValueError(f"k is {tuple(k.shape)}, v is {tuple(v.shape)}; decay takes (B, T, H, K)")
    B, T, H, _ = v.shape
    Hk, K = k.shape[2:]
    if H % max(Hk, 1):
        raise not_divisible("heads of v", H, "heads of k", Hk)
    check_shape("k", k.shape, (B, T, Hk, K), "(B, T, Hk, K)")
    check_shape("q", q.shape, (B, T, Hk, K), "(B, T, Hk, K)")
    if read not in (moments := ("after", "before")):
        raise unknown("read of decay named", read, moments)
    if bonus is not None:
        check_shape("bonus", bonus.shape, (H, K), "(H, K)")
        if read == "after":
            raise ValueError('bonus weighs the current token; it needs read="before"')
    if log_decay is not None and log_decay.ndim == 3:
        check_shape("log_decay", log_decay.shape, (B, T, H), "(B, T, H)")
    elif log_decay is not None:
        check_shape("log_decay", log_decay.shape, (B, T, H, K), "(B, T, H, K)")


def _vectorised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    before: bool,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Everything said with keys, queries and decays alone, then the chunks."""
    if bonus is not None:  # used twice: gradients are added before they are rounded
        q, k = q.to(state.dtype), k.to(state.dtype)
        if backend != "fused":  # whose matrix products are as precise as v is
            v = v.to(state.dtype)
    T, H, read = v.shape[1], v.shape[2], q
    if g is None:
        g = state.new_zeros(v.shape[:3])
    g = g[..., None] if g.ndim == 3 else g
    if mask is not None:
        k = torch.where(mask[..., None, None], k, 0)
        g = torch.where(mask[..., None, None], g, 0)
    if reset is not None:
        g = torch.where(reset[..., None, None], -torch.inf, g)
        if before:  # what the token reads is empty
            read = torch.where(reset[..., None, None], 0, read)
    if v.shape[0] * T == 0:
        return v, state
    if T == 1:
        inputs = (read, k, v, g, state)
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        o, last = (step if trained or backend != "fused" else _step)(*inputs, before)
    elif before:  # token t reads what token t - 1 reads after its write
        o, _ = step(read[:, :1], k[:, :1], v[:, :1], g[:, :1], state, before)
        late = torch.cat([read[:, 1:], torch.zeros_like(read[:, :1])], dim=1)
        rest, last, _ = _chunks(late, k, v, g, state, backend)
        o = torch.cat([o, rest[:, :-1]], dim=1)
    else:
        o, last, _ = _chunks(read, k, v, g, state, backend)
    if bonus is not None:
        own = (q * k).repeat_interleave(H // k.shape[2], dim=2) * bonus
        o = o + own.sum(-1, keepdim=True) * v
    return o, last


@operator("seqzoo::decay")
def _chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    o, states = _module(backend).forward(q, k, v, g, initial_state)
    return o, states[-1].clone(), states


@_chunks.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    fused, count = backend == "fused", _module(backend).chunk_count
    chunks = count(v.shape[1], v.dtype) if fused else count(v.shape[1])
    states = initial_state.new_empty(1 + chunks, *initial_state.shape)
    made = torch.promote_types(q.dtype, v.dtype) if fused else states.dtype
    return v.new_empty(v.shape, dtype=made), states.new_empty(states.shape[1:]), states


@operator("seqzoo::decay_backward", like=("q", "k", "v", "g", "dstate"))
def _chunks_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    states: Tensor,
    do: Tensor,
    dstate: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with full_precision(v):
        dq, dk, dv, dg, dstart = _module(backend).backward(q, k, v, g, states, do, dstate)
    return dq, dk, dv, dg, dstart


differentiate(_chunks, _chunks_backward)


@operator("seqzoo::decay_step")
def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, before: bool
) -> tuple[Tensor, Tensor]:
    """One token in one launch, without gradients."""
    o, new = _module("fused").step(q, k, v, g, state, before)
    return o, new


@_step.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, before: bool
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape, dtype=state.dtype), state.new_empty(state.shape)


def _module(backend: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}")
