# Tuples grow inside kernels: a checker would call each an assignment of another type.
# mypy: disable-error-code="assignment"
"""wkv in Triton.

A program owns a row and a block of channels and walks from end to end with a, b and p in registers,
p as a pair of numbers: rounded to float32 at each step it would lose the low digits of the decay,
always the same ones. The states at block borders go to memory; backward, blocks come last to first,
each is walked again from its border and what the gradients need of its tokens stays in registers.

Gradients of w and u are summed by row, as pairs too, and added afterwards, in an order that never
changes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqzoo.kernels.fused import OPTIONS, Variant

BLOCK = 6  # steps: more of them would spill in the backward pass
CONFIG = {"STEPS": BLOCK, "BLOCK_D": 32, "num_warps": 1}
EMPTY = tl.constexpr(-1e38)


def forward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.wkv.chunked.forward`; all tensors are float32."""
    given = [x.contiguous() for x in (k, v, w, u, initial_state)]
    y, state = torch.empty_like(given[0]), torch.empty_like(given[4])
    borders = state.new_empty(triton.cdiv(k.shape[1], BLOCK), *state.shape)
    _launch(_forward, k, *given[:4], reset, mask, given[4], y, state, borders)
    return y, state, borders


def backward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    borders: Tensor,
    dy: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.wkv.chunked.backward`."""
    k, v, w, u, borders, dy, dstate = (x.contiguous() for x in (k, v, w, u, borders, dy, dstate))
    dk, dv, dstart = (torch.empty_like(x) for x in (k, v, dstate))
    dw, du = (w.new_empty(len(k), len(w)) for _ in range(2))  # by row of the batch
    made = (dk, dv, dw, du, dstart)
    _launch(_backward, k, k, v, w, u, reset, mask, borders, dy, dstate, *made)
    return dk, dv, dw.sum(0), du.sum(0), dstart


def _launch(kernel: triton.JITFunction, like: Tensor, *given: Tensor | None) -> None:
    B, T, D = like.shape
    if B == 0 or D == 0:
        return
    none = like.new_empty(0, dtype=torch.bool)
    flags = {
        name.upper() + "S": given[kernel.arg_names.index(name)] is not None
        for name in ("reset", "mask")
    }
    operands = (none if x is None else x.contiguous() for x in given)
    with torch.cuda.device_of(like):
        kernel[(B, triton.cdiv(D, CONFIG["BLOCK_D"]))](
            *operands, T, D, **flags, **CONFIG, **OPTIONS
        )


@triton.jit
def _weigh(difference):
    """e^(old - top) and e^(new - top), top the larger of the two, given new - old."""
    wins = difference > 0.0
    lesser = tl.exp(tl.where(wins, -difference, difference))
    return tl.where(wins, lesser, 1.0), tl.where(wins, 1.0, lesser), wins


@triton.jit
def _less(hi, lo, x):
    """The pair hi + lo, less x, as a pair."""
    t = lo - x
    after = hi + t
    part = after - hi
    return after, (hi - (after - part)) + (t - part)


@triton.jit
def _rest(lo):
    """What a and b take over, e^lo; where digits of hi are more than 1 apart, lo means nothing."""
    return tl.exp(tl.minimum(tl.maximum(lo, -1.0), 1.0))


@triton.jit
def _flags(reset, mask, row, t, T, RESETS: tl.constexpr, MASKS: tl.constexpr):
    """Whether token t is there, and whether the state is emptied before it."""
    at = tl.cast(row, tl.int64) * T + t
    there = t < T
    begins = tl.load(reset + at, mask=there, other=0) != 0 if RESETS else t < 0
    if MASKS:
        there = there & (tl.load(mask + at, mask=there, other=0) != 0)
    return there, begins


@triton.jit
def _forward(
    k,
    v,
    w,
    u,
    reset,
    mask,
    start,
    y,
    last,
    borders,
    T,
    D,
    RESETS: tl.constexpr,
    MASKS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    rows = tl.cast(tl.num_programs(0), tl.int64)
    wide = tl.cast(D, tl.int64)
    d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    w_d = tl.load(w + d, mask=inside, other=0.0)
    u_d = tl.load(u + d, mask=inside, other=0.0)
    at = row * 3 * wide + d
    a = tl.load(start + at, mask=inside, other=0.0)
    b = tl.load(start + at + wide, mask=inside, other=0.0)
    hi = tl.load(start + at + 2 * wide, mask=inside, other=0.0)
    for first in range(0, T, STEPS):
        border = (tl.cast(first // STEPS, tl.int64) * rows + row) * 3 * wide + d
        tl.store(borders + border, a, mask=inside)
        tl.store(borders + border + wide, b, mask=inside)
        tl.store(borders + border + 2 * wide, hi, mask=inside)
        keys, values, there, begins = (), (), (), ()
        for i in tl.static_range(STEPS):
            t = tl.cast(first, tl.int64) + i
            here, empty = _flags(reset, mask, row, t, T, RESETS, MASKS)
            real = d < tl.where(here, D, 0)
            keys += (tl.load(k + (row * T + t) * D + d, mask=real, other=0.0),)
            values += (tl.load(v + (row * T + t) * D + d, mask=real, other=0.0),)
            there += (here,)
            begins += (empty,)
        lo = tl.zeros((BLOCK_D,), tl.float32)
        made = ()  # stored below: no load waits behind a store
        for i in tl.static_range(STEPS):
            if RESETS:
                a = tl.where(begins[i], 0.0, a)
                b = tl.where(begins[i], 0.0, b)
                lo = tl.where(begins[i], 0.0, lo)
                hi = tl.where(begins[i], EMPTY, hi)
            # Of a token that is not there v is 0: it is all of its output and none of the state.
            old, new, wins = _weigh(tl.where(there[i], (keys[i] - hi - lo) + u_d, -EMPTY))
            made += ((old * a + new * values[i]) / (old * b + new),)
            next_hi, next_lo = _less(hi, lo, w_d)
            old, new, wins = _weigh(tl.where(there[i], keys[i] - next_hi - next_lo, EMPTY))
            a = old * a + new * values[i]
            b = old * b + new
            hi = tl.where(there[i], tl.where(wins, keys[i], next_hi), hi)
            lo = tl.where(there[i], tl.where(wins, 0.0, next_lo), lo)
        for i in tl.static_range(STEPS):
            t = tl.cast(first, tl.int64) + i
            tl.store(y + (row * T + t) * D + d, made[i], mask=d < tl.where(t < T, D, 0))
        scale = _rest(lo)
        a *= scale
        b *= scale
    tl.store(last + at, a, mask=inside)
    tl.store(last + at + wide, b, mask=inside)
    tl.store(last + at + 2 * wide, hi, mask=inside)


@triton.jit
def _backward(
    k,
    v,
    w,
    u,
    reset,
    mask,
    borders,
    dy,
    dlast,
    dk,
    dv,
    dw,
    du,
    dstart,
    T,
    D,
    RESETS: tl.constexpr,
    MASKS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients ga, gb of a and b are with p held; gp goes to whatever gives p its value."""
    row = tl.cast(tl.program_id(0), tl.int64)
    rows = tl.cast(tl.num_programs(0), tl.int64)
    wide = tl.cast(D, tl.int64)
    d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    w_d = tl.load(w + d, mask=inside, other=0.0)
    u_d = tl.load(u + d, mask=inside, other=0.0)
    state = row * 3 * wide + d
    ga = tl.load(dlast + state, mask=inside, other=0.0)
    gb = tl.load(dlast + state + wide, mask=inside, other=0.0)
    gp = tl.load(dlast + state + 2 * wide, mask=inside, other=0.0)
    dw_sum = tl.zeros((BLOCK_D,), tl.float32)
    du_sum = tl.zeros((BLOCK_D,), tl.float32)
    dw_low = tl.zeros((BLOCK_D,), tl.float32)
    du_low = tl.zeros((BLOCK_D,), tl.float32)
    blocks = tl.cdiv(T, STEPS)
    for back in range(blocks):
        block = tl.cast(blocks - 1 - back, tl.int64)
        border = (block * rows + row) * 3 * wide + d
        a = tl.load(borders + border, mask=inside, other=0.0)
        b = tl.load(borders + border + wide, mask=inside, other=0.0)
        hi = tl.load(borders + border + 2 * wide, mask=inside, other=0.0)
        lo = tl.zeros((BLOCK_D,), tl.float32)
        keys, values, wanted, there, begins = (), (), (), (), ()
        for i in tl.static_range(STEPS):
            t = block * STEPS + i
            here, empty = _flags(reset, mask, row, t, T, RESETS, MASKS)
            real = d < tl.where(here, D, 0)
            at = (row * T + t) * D + d
            keys += (tl.load(k + at, mask=real, other=0.0),)
            values += (tl.load(v + at, mask=real, other=0.0),)
            wanted += (tl.load(dy + at, mask=real, other=0.0),)
            there += (here,)
            begins += (empty,)
        tops, bottoms, outs, enters = (), (), (), ()
        for i in tl.static_range(STEPS):
            if RESETS:
                a = tl.where(begins[i], 0.0, a)
                b = tl.where(begins[i], 0.0, b)
                lo = tl.where(begins[i], 0.0, lo)
                hi = tl.where(begins[i], EMPTY, hi)
            out = tl.where(there[i], (keys[i] - hi - lo) + u_d, -EMPTY)
            next_hi, next_lo = _less(hi, lo, w_d)
            enter = tl.where(there[i], keys[i] - next_hi - next_lo, EMPTY)
            tops += (a,)
            bottoms += (b,)
            outs += (out,)
            enters += (enter,)
            old, new, wins = _weigh(enter)
            a = old * a + new * values[i]
            b = old * b + new
            hi = tl.where(there[i], tl.where(wins, keys[i], next_hi), hi)
            lo = tl.where(there[i], tl.where(wins, 0.0, next_lo), lo)
        scale = _rest(lo)
        ga *= scale
        gb *= scale
        dw_part = tl.zeros((BLOCK_D,), tl.float32)
        du_part = tl.zeros((BLOCK_D,), tl.float32)
        dkeys, dvalues = (), ()  # last to first
        for i in tl.static_range(STEPS - 1, -1, -1):
            old, new, wins = _weigh(outs[i])
            below = old * bottoms[i] + new
            y_t = (old * tops[i] + new * values[i]) / below
            q = wanted[i] / below
            bonus = new * q * (values[i] - y_t)
            kept, added, wins = _weigh(enters[i])
            du_part += bonus
            dvalues += (new * q + added * ga,)
            dkeys += (bonus + added * (ga * values[i] + gb) + tl.where(wins, gp, 0.0),)
            lost = tl.where(wins, 0.0, gp)
            through = kept * (ga * tops[i] + gb * bottoms[i]) + lost
            dw_part += tl.where(there[i], through, 0.0)
            ga = kept * ga + old * q
            gb = kept * gb - old * q * y_t
            gp = lost
            if RESETS:
                ga = tl.where(begins[i], 0.0, ga)
                gb = tl.where(begins[i], 0.0, gb)
                gp = tl.where(begins[i], 0.0, gp)
        for i in tl.static_range(STEPS):
            t = block * STEPS + i
            at = (row * T + t) * D + d
            tl.store(dk + at, dkeys[STEPS - 1 - i], mask=d < tl.where(t < T, D, 0))
            tl.store(dv + at, dvalues[STEPS - 1 - i], mask=d < tl.where(t < T, D, 0))
        dw_sum, dw_low = _less(dw_sum, dw_low, dw_part)
        du_sum, du_low = _less(du_sum, du_low, -du_part)
    tl.store(dw + row * wide + d, dw_sum + dw_low, mask=inside)
    tl.store(du + row * wide + d, du_sum + du_low, mask=inside)
    tl.store(dstart + state, ga, mask=inside)
    tl.store(dstart + state + wide, gb, mask=inside)
    tl.store(dstart + state + 2 * wide, gp, mask=inside)


def _variants() -> tuple[Variant, ...]:
    made = []
    for kernel in (_forward, _backward):
        for flags in (False, True):
            types = dict.fromkeys(kernel.arg_names[: kernel.arg_names.index("T")], "*fp32")
            types |= {"reset": "*i1", "mask": "*i1", "T": "i32", "D": "i32"}
            fixed = {"RESETS": flags, "MASKS": flags}
            made.append(Variant(kernel, types, fixed | CONFIG, not flags))
    return tuple(made)


KERNELS = _variants()
