"""Softmax attention: o_t = sum_s p_ts v_s, p_t = softmax_s(cap(scale q_t . k_s) + bias_ts).

The sum runs over the keys a token may see. Carries softmax attention with shared key heads (GQA,
MQA), sliding windows, block-sparse layouts, position biases, attention sinks, packed documents.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from seqzoo.kernels.attention.chunked import attention as chunked_attention
from seqzoo.kernels.attention.reference import attention as reference_attention
from seqzoo.kernels.dispatch import Backend, accumulator, choose, declare, full_precision
from seqzoo.kernels.errors import check_positive, check_shape, not_divisible

declare("attention", Backend("chunked"), Backend("reference"))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    layout: Tensor | None = None,
    bias: Tensor | Callable[[Tensor], Tensor] | None = None,
    document: Tensor | None = None,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    sinks: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """o_t = sum_s softmax_s(cap(scale q_t . k_s) + bias_ts) v_s over the keys that t may see.

    O(T S) time; O(T W) time and memory with a window (blocks of W queries against 2W keys); with a
    layout, the time of its densest row of blocks. Vaswani et al., arXiv:1706.03762; grouped key
    heads: Ainslie et al., arXiv:2305.13245; sinks: Xiao et al., arXiv:2309.17453.

    Args:
        q: (B, T, H, K).
        k: (B, S, G, K); G divides H, and query head h reads key head h // (H / G). When causal,
            S >= T and the queries stand in the last T of the S slots.
        v: (B, S, G, V).
        causal: no token sees a later slot.
        window: W: a token sees itself and the W - 1 real tokens before it (and, when not causal,
            the W - 1 after it).
        layout: bool, (Tb, Sb): which block of keys each block of queries may see, in blocks of
            T / Tb queries and S / Sb keys. Heads with layouts of their own are calls of their own.
        bias: added to the scores, finite: a tensor that broadcasts to (B, H, T, S), or a function
            from distances, int64 (..., T, S), query minus key, to (..., H, T, S). Only the
            function goes with O(T W) memory.
        document: (B, S) ids; a token sees its own document only.
        mask: (B, S) bool; False = that token is not there, neither as key nor as query.
        index: (B, S) int64, what the distances for `bias` are measured by, for keys whose
            neighbours have been dropped; the count of real tokens when None.
        sinks: this many first real tokens of a document are seen from beyond the window too.
        scale: K ** -0.5 when None.
        softcap: c: scaled scores become c tanh(score / c), before the bias.
        backend: `chunked` or `reference`; chosen when None.

    Returns:
        (B, T, H, V) in the dtype of `v`; zeros where a token sees nothing.

    Raises:
        ValueError: shapes or options that do not fit.
    """
    _check(q, k, v, causal, window, layout, bias, document, mask, index, sinks, softcap)
    if isinstance(bias, Tensor):
        bias = bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))
    chosen = choose("attention", v, backend)
    given = v.dtype
    wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    # Half precision is slow without hardware for it; a GPU keeps it and sums in float32.
    if chosen == "reference" or q.device.type == "cpu":
        wide = accumulator(wide)
    fast = chosen == "chunked" and q.numel() and k.numel()
    compute = chunked_attention if fast else reference_attention
    with full_precision(q):
        o = compute(
            q.to(wide),
            k.to(wide),
            v.to(wide),
            causal=causal,
            window=window,
            layout=layout,
            bias=bias,
            document=document,
            mask=mask,
            index=index,
            sinks=sinks or 0,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            softcap=softcap,
        )
    return o.to(given)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    layout: Tensor | None,
    bias: Tensor | Callable[[Tensor], Tensor] | None,
    document: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    sinks: int | None,
    softcap: float | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} is {tuple(x.shape)}; attention takes (B, T, H, K)")
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    check_shape("k", k.shape, (B, S, G, K), "(B, S, G, K)")
    check_shape("v", v.shape, (B, S, G, v.shape[3]), "(B, S, G, V)")
    if H % G:
        raise not_divisible("n_heads", H, "n_kv_heads", G)
    if causal and T > S:
        raise ValueError(f"T={T} queries cannot be the last of S={S} keys; causal needs S >= T")
    slotless = not causal and T != S
    if slotless and (window is not None or document is not None or callable(bias)):
        raise ValueError(
            f"T={T} queries have no place among S={S} keys when causal=False; window, document and"
            " a bias by distance need T == S"
        )
    for name, row in (("document", document), ("mask", mask), ("index", index)):
        if row is not None:
            check_shape(name, row.shape, (B, S), "(B, S)")
    if layout is not None:
        _check_layout(layout, T, S)
    if isinstance(bias, Tensor):
        _check_bias(bias, (B, H, T, S))
    if window is not None:
        check_positive(window=window)
    if softcap is not None:
        check_positive(softcap=softcap)
    if sinks is not None and sinks < 0:
        raise ValueError(f"sinks={sinks} is not allowed; it must be 0 or more")


def _check_layout(layout: Tensor, T: int, S: int) -> None:
    if layout.ndim != 2 or layout.dtype != torch.bool:
        raise ValueError(
            f"layout is {layout.dtype} {tuple(layout.shape)}; it must be bool (Tb, Sb)"
        )
    for name, length, by, blocks in zip(
        ("T", "S"), (T, S), ("query blocks", "key blocks"), layout.shape, strict=True
    ):
        if blocks == 0 or length % blocks:
            raise not_divisible(name, length, by, blocks)


def _check_bias(bias: Tensor, wanted: tuple[int, int, int, int]) -> None:
    shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if len(shape) != 4 or any(n not in (1, w) for n, w in zip(shape, wanted, strict=True)):
        raise ValueError(f"bias is {tuple(bias.shape)}; (B, H, T, S) here is {wanted}")
