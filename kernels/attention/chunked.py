"""Softmax attention through torch's scaled_dot_product_attention, in blocks where that is cheaper.

Four ways, by what is asked. Nothing but causality: one call. A window: blocks of W queries against
the W slots before them and their own. A layout: blocks of queries against the blocks they see.
Anything else: blocks of rows with an explicit mask, up to the last key those rows may see.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

ROWS = 256  # queries whose mask and bias exist at a time


class Tokens(NamedTuple):
    """What decides who sees whom, each (B, S), or (1, S) where all rows agree; None: not asked."""

    slot: Tensor
    real: Tensor
    nth: Tensor | None = None  # among the real tokens, for windows
    place: Tensor | None = None  # for the distances of a bias
    document: Tensor | None = None
    sink: Tensor | None = None


class Rules(NamedTuple):
    """What is asked of every block."""

    causal: bool
    window: int | None
    sighted: bool  # every token sees at least itself
    layout: Tensor | None
    blocks: tuple[int, int]  # queries and keys in a block of the layout
    bias: Tensor | Callable[[Tensor], Tensor] | None
    scale: float
    softcap: float | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    layout: Tensor | None,
    bias: Tensor | Callable[[Tensor], Tensor] | None,
    document: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    sinks: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """See `seqzoo.kernels.attention.attention`; q, k and v share one dtype and are not empty."""
    T, S = q.shape[1], k.shape[1]
    if window is not None and window >= S:
        window = None
    ruled = any(x is not None for x in (window, layout, bias, document, mask, softcap))
    if not ruled and (not causal or T == S):
        return _sdpa(q, k, v, scale, None, causal)
    if not ruled and T == 1:
        return _sdpa(q, k, v, scale, None, False)
    blocks = (1, 1) if layout is None else (T // layout.shape[0], S // layout.shape[1])
    sighted = mask is None and layout is None
    rules = Rules(causal, window, sighted, layout, blocks, bias, scale, softcap)
    keys = _describe(k, rules, document, mask, index, sinks)
    queries = _slots(keys, S - T, S)
    if not causal and T != S:  # queries without a place among the keys are all there
        slot = torch.arange(T, device=q.device)[None]
        queries = Tokens(slot, slot >= 0)
    if isinstance(bias, Tensor):
        return _by_rows(q, k, v, queries, keys, rules)
    if layout is not None:
        return _by_layout(q, k, v, queries, keys, rules, layout)
    if window is None or window >= T or (sinks and document is not None):
        return _by_rows(q, k, v, queries, keys, rules)
    return _by_window(q, k, v, queries, keys, rules, window, mask is not None, min(sinks, S))


def _describe(
    k: Tensor,
    rules: Rules,
    document: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    sinks: int,
) -> Tokens:
    slot = torch.arange(k.shape[1], device=k.device)[None]
    real = slot >= 0 if mask is None else mask
    nth = slot if mask is None else mask.long().cumsum(1) - 1
    place = nth if index is None else index
    sink = None
    if rules.window is not None and sinks:
        sink = real & ((nth if document is None else _rank(document, real)) < sinks)
    return Tokens(
        slot,
        real,
        None if rules.window is None else nth,
        place if callable(rules.bias) else None,
        document,
        sink,
    )


def _rank(document: Tensor, real: Tensor) -> Tensor:
    """How many real tokens of its document stand before each token, (B, S)."""
    ids, order = document.sort(dim=1, stable=True)
    there = real.expand_as(ids).gather(1, order).long()
    before = there.cumsum(1) - there
    first = pad(ids[:, 1:] != ids[:, :-1], (1, 0))
    begun = torch.where(first, before, 0).cummax(dim=1).values
    return torch.zeros_like(ids).scatter(1, order, before - begun)


def _by_rows(
    q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens, rules: Rules
) -> Tensor:
    """Blocks of rows against all the keys up to the last one they may see."""
    T, S = q.shape[1], k.shape[1]
    whole = rules.bias
    if isinstance(whole, Tensor):
        whole = whole.expand(-1, -1, T, S)
    outputs = []
    for start in range(0, T, ROWS):
        stop = min(start + ROWS, T)
        end = S - T + stop if rules.causal else S
        visible, bias = _see(_slots(queries, start, stop), _slots(keys, 0, end), rules)
        if isinstance(whole, Tensor):
            bias = whole[..., start:stop, :end]
        outputs.append(
            _attend(q[:, start:stop], k[:, :end], v[:, :end], visible[:, None], bias, rules)
        )
    return torch.cat(outputs, dim=1)


def _by_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tokens,
    keys: Tokens,
    rules: Rules,
    W: int,
    masked: bool,
    sinks: int,
) -> Tensor:
    """Blocks of W queries against the W slots before them, their own, and W after if not causal."""
    T, S = q.shape[1], k.shape[1]
    n = -(-T // W)
    rows: list[Any] = [q, *queries]
    band: list[Any] = [k, v, *keys]
    first: list[Any] = []
    if keys.sink is not None:  # they get columns of their own, so they leave the band
        slots = (~keys.sink).to(torch.int8).argsort(dim=1, stable=True)[:, :sinks]
        first = _each(lambda x: _take(x, slots), [k, v, *keys._replace(real=keys.sink)])
        band = [k, v, *keys._replace(real=keys.real & ~keys.sink)]
    order = None
    if masked:  # real tokens side by side at the end, so that W slots hold the W tokens of a window
        sides = keys.real.to(torch.int8).argsort(dim=1, stable=True)
        order = queries.real.to(torch.int8).argsort(dim=1, stable=True)
        band, rows = _each(lambda x: _take(x, sides), band), _each(lambda x: _take(x, order), rows)
    band = _each(lambda x: _spans(x, W, n, S - T, T, rules.causal), band)
    rows = _each(lambda x: torch.unflatten(_pad(x, 0, n * W - T), 1, (n, W)), rows)
    if first:
        first = _each(lambda x: x[:, None].expand(-1, n, *x.shape[1:]), first)
        pairs = zip(first, band, strict=True)
        band = [None if b is None else torch.cat([a, b], dim=2) for a, b in pairs]
    rules = rules._replace(sighted=rules.sighted and n * W == T)
    o = _by_blocks(rows[0], band[0], band[1], Tokens(*rows[1:]), Tokens(*band[2:]), rules)
    o = o.flatten(1, 2)[:, :T]
    return o if order is None else _take(o, order.argsort(1))


def _spans(x: Tensor, W: int, n: int, offset: int, T: int, causal: bool) -> Tensor:
    """(B, S, ...) -> (B, n, 2W or 3W, ...): what each of n blocks of W queries reaches."""
    sides = 2 if causal else 3
    parts = torch.unflatten(_pad(x, W - offset, (n + sides - 2) * W - T), 1, (n + sides - 1, W))
    return torch.cat([parts[:, i : i + n] for i in range(sides)], dim=2)


def _pad(x: Tensor, left: int, right: int) -> Tensor:
    """Zeros (False) before and after dim 1; a negative number cuts."""
    return pad(x, (0, 0) * (x.ndim - 2) + (left, right))


def _by_layout(
    q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens, rules: Rules, layout: Tensor
) -> Tensor:
    """Blocks of queries against the blocks of keys in their row of the layout."""
    # How many blocks a row has is a matter of data, which a traced graph cannot ask.
    if layout.is_meta or torch.compiler.is_compiling():
        return _by_rows(q, k, v, queries, keys, rules)
    rows, columns = layout.shape
    height, width = rules.blocks
    if rules.causal:
        start = torch.arange(columns, device=layout.device) * width
        end = torch.arange(1, rows + 1, device=layout.device) * height + k.shape[1] - q.shape[1]
        layout = layout & (start < end[:, None])
    most = max(1, int(layout.sum(1).max()))
    if 2 * most > columns:
        return _by_rows(q, k, v, queries, keys, rules)
    blocks = (~layout).to(torch.int8).argsort(dim=1, stable=True)[:, :most]

    def gather(x: Tensor) -> Tensor:
        parts = torch.unflatten(x, 1, (columns, width)).index_select(1, blocks.flatten())
        return torch.unflatten(parts, 1, (rows, most)).flatten(2, 3)

    split = _each(lambda x: torch.unflatten(x, 1, (rows, height)), [q, *queries])
    taken = _each(gather, [k, v, *keys])
    o = _by_blocks(split[0], taken[0], taken[1], Tokens(*split[1:]), Tokens(*taken[2:]), rules)
    return o.flatten(1, 2)


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens, rules: Rules
) -> Tensor:
    """(B, n, t, ...) queries against (B, n, s, ...) keys, block by block."""
    visible, bias = _see(queries, keys, rules)
    B, n = q.shape[:2]
    visible = visible[:, :, None].expand(B, -1, -1, -1, -1).flatten(0, 1)
    if bias is not None:
        bias = bias.expand(B, n, -1, -1, -1).flatten(0, 1)
    o = _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), visible, bias, rules)
    return torch.unflatten(o, 0, (B, n))


def _see(queries: Tokens, keys: Tokens, rules: Rules) -> tuple[Tensor, Tensor | None]:
    """Who sees whom, (..., t, s), and the bias by distance, (..., H, t, s)."""

    def pairs(name: str) -> tuple[Tensor, Tensor]:
        return getattr(queries, name)[..., :, None], getattr(keys, name)[..., None, :]

    q, k = pairs("real")
    visible = q & k
    q, k = pairs("slot")
    if rules.causal:
        visible = visible & (k <= q)
    if rules.layout is not None:
        (height, width), (rows, columns) = rules.blocks, rules.layout.shape
        place = (q - (width * columns - height * rows) if rules.causal else q) // height
        visible = visible & rules.layout[place, k // width]
    if keys.document is not None:
        q, k = pairs("document")
        visible = visible & (q == k)
    if rules.window is not None:
        q, k = pairs("nth")
        near = k > q - rules.window
        if not rules.causal:
            near = near & (k < q + rules.window)
        visible = visible & (near if keys.sink is None else near | keys.sink[..., None, :])
    if not callable(rules.bias):
        return visible, None
    q, k = pairs("place")
    return visible, rules.bias(q - k)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None, rules: Rules
) -> Tensor:
    """(N, t, H, K), (N, s, G, K), (N, s, G, V) -> (N, t, H, V), `visible` (N, 1, t, s)."""
    seen = None if rules.sighted else visible.any(-1, keepdim=True)
    # The softmax of an empty row would be NaN; such rows see all, and are emptied below.
    mask = visible if seen is None else visible | ~seen
    if rules.softcap is None:
        if bias is not None:
            mask = torch.where(mask, bias.to(q.dtype), -torch.inf)
        o = _sdpa(q, k, v, rules.scale, mask, False)
    else:
        G, R = k.shape[2], q.shape[2] // k.shape[2]
        grouped = torch.unflatten(q, 2, (G, R))  # query heads by the key head they read
        scores = torch.einsum("btgrk,bsgk->bgrts", grouped, k).flatten(1, 2)
        scores = rules.softcap * torch.tanh(scores * (rules.scale / rules.softcap))
        if bias is not None:
            scores = scores + bias.to(q.dtype)
        weights = torch.unflatten(scores.masked_fill(~mask, -torch.inf).softmax(-1), 1, (G, R))
        o = torch.einsum("bgrts,bsgv->btgrv", weights, v).flatten(2, 3)
    return o if seen is None else torch.where(seen.transpose(1, 2), o, 0)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> Tensor:
    K, V = q.shape[-1], v.shape[-1]
    size = max(K, V)  # the fused CPU kernel wants one size; zeros change neither scores nor sums
    q, k, v = (x if x.shape[-1] == size else pad(x, (0, size - x.shape[-1])) for x in (q, k, v))
    o = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)[..., :V]


def _each(change: Callable[[Any], Any], given: Iterable[Any]) -> list[Any]:
    """The same change to all that is there."""
    return [None if x is None else change(x) for x in given]


def _slots(tokens: Tokens, start: int, stop: int) -> Tokens:
    return Tokens(*_each(lambda x: x[:, start:stop], tokens))


def _take(x: Tensor, slots: Tensor) -> Tensor:
    """Tokens of each row in `slots`, (B, n) or (1, n)."""
    B = max(x.shape[0], slots.shape[0])
    slots = slots.reshape(*slots.shape, *[1] * (x.ndim - 2)).expand(B, -1, *x.shape[2:])
    return x.expand(B, *x.shape[1:]).gather(1, slots)
