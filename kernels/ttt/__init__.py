"""Test-time training: a linear model that learns from the tokens it reads, by gradient steps.

Carries TTT-linear. The state is what was learned, not the model: a reset goes back to W.
"""

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import Backend, accumulator, choose, declare, full_precision
from seqzoo.kernels.errors import check_positive, check_shape
from seqzoo.kernels.operator import operator
from seqzoo.kernels.ttt.chunked import arrange, step
from seqzoo.kernels.ttt.chunked import backward as chunked_backward
from seqzoo.kernels.ttt.chunked import forward as chunked_forward
from seqzoo.kernels.ttt.reference import ttt as reference_ttt

declare("ttt", Backend("chunked"), Backend("reference"))


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    share: Tensor,
    slot: Tensor,
    W: Tensor,
    b: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    mini_batch: int = 16,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = q_t W_t + b_t, of a model trained on |norm(k W + b) - v|^2 / 2 in mini-batches.

    Within a mini-batch that began with W, token i has W_i = W - share_i sum_{j <= i} rate_j k_j^T
    g_j, where g_j is the gradient with respect to k_j W + b; its last W_i begins the next. The same
    for b, with 1 for k. `norm` is a layer norm over V, with weight and bias. O(T K V) time. Sun et
    al., "Learning to (Learn at Test Time)", arXiv:2407.04620, sections 2.4 to 2.7. The eta
    of flash-linear-attention is `share` with a rate of one; the authors' code has both.

    Args:
        q: what the model is asked, (B, T, H, K).
        k: what it learns from, (B, T, H, K).
        v: what it shall answer, (B, T, H, V).
        rate: (B, T, H), the learning rate of each token's gradient.
        share: (B, T, H), what multiplies the sum of gradients where a token reads it.
        slot: (B, T), the place of each token in its mini-batch, from 0: the real tokens of a
            document counted modulo `mini_batch`; anything at masked tokens. The next mini-batch
            begins after the place `mini_batch - 1`.
        W: (H, K, V), the model before the first token of a document.
        b: (H, V).
        norm_weight: (H, V).
        norm_bias: (H, V).
        mini_batch: tokens whose gradients are taken at the same W.
        eps: of the norm.
        initial_state: (B, 2, H, K + 1, V): what was added to [W; b], and the sum of the gradients
            of the mini-batch in progress; zero when None.
        reset: (B, T) bool; True forgets what was learned before the token.
        mask: (B, T) bool; False leaves the state untouched, and o there means nothing.
        backend: `chunked` or `reference`; `chunked` when None.

    Returns:
        o: (B, T, H, V) in the dtype of `v`.
        state: (B, 2, H, K + 1, V), in float32 or wider. Both are differentiable.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot serve the call.
    """
    check_positive(mini_batch=mini_batch, eps=eps)
    _check(q, k, v, rate, share, slot, W, b, norm_weight, norm_bias, reset, mask)
    shape = (*v.shape[:1], 2, v.shape[2], k.shape[-1] + 1, v.shape[3])
    others = (q, k, rate, share, W, b, norm_weight, norm_bias)
    state = _begin(v, others, initial_state, shape)
    if v.shape[0] * v.shape[1] == 0:
        return v, state
    chosen, model = choose("ttt", v, backend), (W, b, norm_weight, norm_bias)
    with full_precision(v):
        inputs = (*_tokens(q, k, v, rate, share, mask, state.dtype), *_model(*model, state.dtype))
        if chosen == "chunked" and v.shape[1] > 1:
            o, state = _batches(*inputs, state, slot, reset, mask, mini_batch, eps)
        elif chosen == "chunked":
            o, state = step(*inputs, state, slot == mini_batch - 1, reset, mask, eps)
        else:
            o, state = reference_ttt(*inputs, state, slot == mini_batch - 1, reset, mask, eps)
    return o.to(v.dtype), state


def _begin(
    v: Tensor, others: tuple[Tensor, ...], initial_state: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """The state before the first token, in the dtype that everything is computed in."""
    wide = v.dtype
    for x in (*others, v if initial_state is None else initial_state):
        wide = torch.promote_types(wide, x.dtype)
    wide = accumulator(wide)
    if initial_state is None:
        return torch.zeros(shape, device=v.device, dtype=wide)
    check_shape("initial_state", initial_state.shape, shape, "(B, 2, H, K + 1, V)")
    return initial_state.to(wide)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    share: Tensor,
    slot: Tensor,
    W: Tensor,
    b: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> None:
    if v.ndim != 4 or k.ndim != 4:
        raise ValueError(f"k is {tuple(k.shape)}, v is {tuple(v.shape)}; ttt takes (B, T, H, K)")
    (B, T, H, V), K = v.shape, k.shape[-1]
    for name, x, shape, letters in (
        ("k", k, (B, T, H, K), "(B, T, H, K)"),
        ("q", q, (B, T, H, K), "(B, T, H, K)"),
        ("rate", rate, (B, T, H), "(B, T, H)"),
        ("share", share, (B, T, H), "(B, T, H)"),
        ("slot", slot, (B, T), "(B, T)"),
        ("W", W, (H, K, V), "(H, K, V)"),
        ("b", b, (H, V), "(H, V)"),
        ("norm_weight", norm_weight, (H, V), "(H, V)"),
        ("norm_bias", norm_bias, (H, V), "(H, V)"),
        ("reset", reset, (B, T), "(B, T)"),
        ("mask", mask, (B, T), "(B, T)"),
    ):
        if x is not None:
            check_shape(name, x.shape, shape, letters)


def _tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    share: Tensor,
    mask: Tensor | None,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B, T, H, ...), q and k with a one at the end, zeros at masked tokens: no NaN gets out."""
    one = torch.ones_like(k[..., :1])
    given = (torch.cat([q, one], -1), torch.cat([k, one], -1), v, rate[..., None], share[..., None])
    real = (x if mask is None else torch.where(mask[..., None, None], x, 0) for x in given)
    q, k, v, rate, share = (x.to(wide) for x in real)
    return q, k, v, rate, share


def _model(
    W: Tensor, b: Tensor, norm_weight: Tensor, norm_bias: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """W (H, K, V) with b, which the ones meet, for its last row; the norm's (H, 1, V)."""
    W = torch.cat([W.to(wide), b[:, None].to(wide)], dim=1)
    return W, norm_weight[:, None].to(wide), norm_bias[:, None].to(wide)


@operator("seqzoo::ttt", like=("v", "state"))
def _batches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    share: Tensor,
    W: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: Tensor,
    slot: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    size: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    layout = arrange(slot, reset, mask, size)
    return chunked_forward(q, k, v, rate, share, W, weight, bias, state, layout, eps)


@operator(
    "seqzoo::ttt_backward", like=("q", "k", "v", "rate", "share", "W", "weight", "bias", "state")
)
def _batches_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    share: Tensor,
    W: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: Tensor,
    slot: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    size: int,
    eps: float,
    do: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with full_precision(v):
        layout = arrange(slot, reset, mask, size)
        given = (q, k, v, rate, share, W, weight, bias, state)
        dq, dk, dv, drate, dshare, dW, dweight, dbias, dstart = chunked_backward(
            *given, layout, eps, do, dstate
        )
    return dq, dk, dv, drate, dshare, dW, dweight, dbias, dstart


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    *tensors, ctx.size, ctx.eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any,  # noqa: ANN401  # torch's own type
    do: Tensor | None,
    dstate: Tensor | None,
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    do = torch.zeros_like(tensors[2]) if do is None else do
    dstate = torch.zeros_like(tensors[8]) if dstate is None else dstate
    gradients = _batches_backward(*tensors, ctx.size, ctx.eps, do, dstate)
    return *gradients, None, None, None, None, None


_batches.register_autograd(_differentiate, setup_context=_save)
