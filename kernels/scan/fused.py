"""The diagonal recurrence in Triton.

A program owns a row of the batch, a block of channels and a stretch of time, and walks in tiles:
within a tile an associative scan of the pairs (a, b), between tiles the carried state. Reading from
the end is a matter of indices. Whatever the inputs, sums and states are float32.

Where rows and channels do not fill a GPU, time is cut: a first pass takes each stretch from zero to
its end, a scan over these ends gives each stretch what comes into it, and the second pass is whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqzoo.kernels.fused import OPTIONS, Variant, stretch

LONG = {"BLOCK_T": 64, "BLOCK_D": 32, "num_warps": 4}
SHORT = {"BLOCK_T": 16, "BLOCK_D": 64, "num_warps": 4}  # single steps and short passes


def forward(a: Tensor, b: Tensor, initial_state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.scan.scan`; h comes in the dtype of `b`, the state in float32."""
    a, b, start = a.contiguous(), b.contiguous(), initial_state.contiguous()
    h, state = torch.empty_like(b), torch.empty_like(start)
    length, count = _stretches(b)
    starts = start if count == 1 else _carried(a, b, start, length, count, reverse, False)
    _launch(_forward, b, count, a, b, starts, h, state, length, REVERSE=reverse)
    return h, state


def backward(
    a: Tensor, h: Tensor, initial_state: Tensor, dh: Tensor, dstate: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the initial state, each in its dtype."""
    a, h, start, dh, dstate = (x.contiguous() for x in (a, h, initial_state, dh, dstate))
    da, db, dstart = (torch.empty_like(x) for x in (a, h, start))
    length, count = _stretches(h)
    ends = dstate if count == 1 else _carried(a, dh, dstate, length, count, not reverse, True)
    _launch(_backward, h, count, a, h, start, dh, ends, da, db, dstart, length, REVERSE=reverse)
    return da, db, dstart


def _stretches(x: Tensor) -> tuple[int, int]:
    """Steps of a stretch, and how many there are."""
    B, T, D = x.shape
    length = stretch(T, B * triton.cdiv(D, LONG["BLOCK_D"]), LONG["BLOCK_T"])
    return length, max(1, triton.cdiv(T, max(length, 1)))


def _carried(
    a: Tensor, b: Tensor, start: Tensor, length: int, count: int, reverse: bool, shift: bool
) -> Tensor:
    """What comes into each stretch, (B, count, D) in order of the scan; `shift` as in `_ends`."""
    decays, ends = (start.new_empty(len(start), count, start.shape[1]) for _ in range(2))
    _launch(_ends, b, count, a, b, decays, ends, length, REVERSE=reverse, SHIFT=shift)
    after = forward(decays, ends, start, False)[0]
    return torch.cat((start[:, None], after[:, :-1]), dim=1)


def _launch(
    kernel: triton.JITFunction, x: Tensor, count: int, *given: Tensor | int, **options: bool
) -> None:
    B, T, D = x.shape
    if B == 0 or D == 0:
        return
    config = LONG if SHORT["BLOCK_T"] < T else SHORT
    grid = (B, triton.cdiv(D, config["BLOCK_D"]), count)
    with torch.cuda.device_of(x):
        kernel[grid](*given, T, D, **options, **config, **OPTIONS)


@triton.jit
def _after(a_left, b_left, a_right, b_right):
    """The map h -> a_right (a_left h + b_left) + b_right, as a pair."""
    return a_left * a_right, a_right * b_left + b_right


@triton.jit
def _ends(
    a,
    b,
    decays,
    ends,
    LENGTH,
    T,
    D,
    REVERSE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Where each stretch ends when it starts at zero, and how much of its start it keeps.

    With SHIFT a step keeps not by its own a but by that of the step before it (the first step, all
    of it): gradients walk so.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.program_id(2) * LENGTH
    until = tl.minimum(begin + LENGTH, T)
    kept = tl.full((BLOCK_D,), 1.0, tl.float32)
    carry = tl.zeros((BLOCK_D,), tl.float32)
    back = (-D if REVERSE else D) if SHIFT else 0
    for first in range(begin, until, BLOCK_T):
        i = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_T)
        t = T - 1 - i if REVERSE else i
        at = (row * T + t)[:, None] * D + d[None, :]
        there = (i < until)[:, None] & (d < D)[None, :]
        keeps = there & (i > 0)[:, None] if SHIFT else there
        a_t = tl.load(a + at - back, mask=keeps, other=1.0).to(tl.float32)
        b_t = tl.load(b + at, mask=there, other=0.0).to(tl.float32)
        decay, inner = tl.associative_scan((a_t, b_t), 0, _after)
        h_t = inner + decay * carry[None, :]
        last = (i == first + BLOCK_T - 1)[:, None]
        carry = tl.sum(tl.where(last, h_t, 0.0), 0)
        kept *= tl.sum(tl.where(last, decay, 0.0), 0)
    at = (row * tl.num_programs(2) + tl.program_id(2)) * D + d
    tl.store(decays + at, kept, mask=d < D)
    tl.store(ends + at, carry, mask=d < D)


@triton.jit
def _forward(
    a,
    b,
    starts,
    h,
    state,
    LENGTH,
    T,
    D,
    REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mine = row * tl.num_programs(2) + tl.program_id(2)
    carry = tl.load(starts + mine * D + d, mask=d < D, other=0.0)
    begin = tl.program_id(2) * LENGTH
    for first in range(begin, tl.minimum(begin + LENGTH, T), BLOCK_T):
        i = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_T)
        t = T - 1 - i if REVERSE else i
        at = (row * T + t)[:, None] * D + d[None, :]
        there = (i < T)[:, None] & (d < D)[None, :]
        # Behind the end: the identity, so that the last row of the tile holds the last state.
        a_t = tl.load(a + at, mask=there, other=1.0).to(tl.float32)
        b_t = tl.load(b + at, mask=there, other=0.0).to(tl.float32)
        decay, inner = tl.associative_scan((a_t, b_t), 0, _after)
        h_t = inner + decay * carry[None, :]
        tl.store(h + at, h_t, mask=there)
        carry = tl.sum(tl.where((i == first + BLOCK_T - 1)[:, None], h_t, 0.0), 0)
    if tl.program_id(2) == tl.num_programs(2) - 1:
        tl.store(state + row * D + d, carry, mask=d < D)


@triton.jit
def _backward(
    a,
    h,
    start,
    dh,
    ends,
    da,
    db,
    dstart,
    LENGTH,
    T,
    D,
    REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """g_i = dh_i + a_{i+1} g_{i+1}, da_i = g_i h_{i-1}, db_i = g_i, with i in order of the scan."""
    row = tl.cast(tl.program_id(0), tl.int64)
    d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    step = -D if REVERSE else D
    h_start = tl.load(start + row * D + d, mask=d < D, other=0.0)
    mine = row * tl.num_programs(2) + tl.program_id(2)
    carry = tl.load(ends + mine * D + d, mask=d < D, other=0.0)
    begin = tl.program_id(2) * LENGTH  # counted from the end of the scan
    for first in range(begin, tl.minimum(begin + LENGTH, T), BLOCK_T):
        i = T - 1 - tl.cast(first, tl.int64) - tl.arange(0, BLOCK_T)
        t = T - 1 - i if REVERSE else i
        at = (row * T + t)[:, None] * D + d[None, :]
        there = (i >= 0)[:, None] & (d < D)[None, :]
        later = there & (i < T - 1)[:, None]  # the last step hands on dstate as it is
        a_after = tl.load(a + at + step, mask=later, other=1.0).to(tl.float32)
        dh_t = tl.load(dh + at, mask=there, other=0.0).to(tl.float32)
        decay, inner = tl.associative_scan((a_after, dh_t), 0, _after)
        g = inner + decay * carry[None, :]
        before = tl.load(h + at - step, mask=there & (i > 0)[:, None], other=0.0)
        before = tl.where((i == 0)[:, None], h_start[None, :], before.to(tl.float32))
        tl.store(da + at, g * before, mask=there)
        tl.store(db + at, g, mask=there)
        carry = tl.sum(tl.where((i == T - first - BLOCK_T)[:, None], g, 0.0), 0)
    if tl.program_id(2) == tl.num_programs(2) - 1:
        if T > 0:
            at = row * T + (T - 1 if REVERSE else 0)
            carry *= tl.load(a + at * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(dstart + row * D + d, carry, mask=d < D)


def _variants() -> tuple[Variant, ...]:
    inputs = ("a", "b", "h", "dh", "da", "db")
    made = []
    for kernel in (_ends, _forward, _backward):
        names = kernel.arg_names[: kernel.arg_names.index("LENGTH")]
        for config in (LONG,) if kernel is _ends else (LONG, SHORT):
            for dtype, reverse in (("*fp32", True), ("*bf16", False)):
                types = {n: dtype if n in inputs else "*fp32" for n in names}
                types |= {"LENGTH": "i32", "T": "i32", "D": "i32"}
                fixed = {"REVERSE": reverse} | ({"SHIFT": reverse} if kernel is _ends else {})
                made.append(Variant(kernel, types, fixed | config, not reverse))
    return tuple(made)


KERNELS = _variants()
