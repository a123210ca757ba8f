"""The diagonal recurrence in Triton.

A program owns a row of the batch and a block of channels and walks along time in tiles: within a
tile an associative scan of the pairs (a, b), between tiles the carried state. Reading from the end
is a matter of indices. Whatever the inputs, sums and states are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqzoo.kernels.fused import OPTIONS, Variant

LONG = {"BLOCK_T": 64, "BLOCK_D": 32, "num_warps": 4}
SHORT = {"BLOCK_T": 16, "BLOCK_D": 64, "num_warps": 4}  # single steps and short passes


def forward(a: Tensor, b: Tensor, initial_state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.scan.scan`; h comes in the dtype of `b`, the state in float32."""
    a, b, start = a.contiguous(), b.contiguous(), initial_state.contiguous()
    h, state = torch.empty_like(b), torch.empty_like(start)
    _launch(_forward, b, reverse, a, b, start, h, state)
    return h, state


def backward(
    a: Tensor, h: Tensor, initial_state: Tensor, dh: Tensor, dstate: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the initial state, each in its dtype."""
    given = [x.contiguous() for x in (a, h, initial_state, dh, dstate)]
    da, db, dstart = (torch.empty_like(given[i]) for i in range(3))
    _launch(_backward, h, reverse, *given, da, db, dstart)
    return da, db, dstart


def _launch(kernel: triton.JITFunction, x: Tensor, reverse: bool, *tensors: Tensor) -> None:
    B, T, D = x.shape
    if B == 0 or D == 0:
        return
    config = LONG if SHORT["BLOCK_T"] < T else SHORT
    grid = (B, triton.cdiv(D, config["BLOCK_D"]))
    with torch.cuda.device_of(x):
        kernel[grid](*tensors, T, D, REVERSE=reverse, **config, **OPTIONS)


@triton.jit
def _after(a_left, b_left, a_right, b_right):
    """The map h -> a_right (a_left h + b_left) + b_right, as a pair."""
    return a_left * a_right, a_right * b_left + b_right


@triton.jit
def _forward(
    a,
    b,
    start,
    h,
    state,
    T,
    D,
    REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    carry = tl.load(start + row * D + d, mask=d < D, other=0.0)
    for first in range(0, T, BLOCK_T):
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
    tl.store(state + row * D + d, carry, mask=d < D)


@triton.jit
def _backward(
    a,
    h,
    start,
    dh,
    dstate,
    da,
    db,
    dstart,
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
    carry = tl.load(dstate + row * D + d, mask=d < D, other=0.0)
    for first in range(0, T, BLOCK_T):
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
    if T > 0:
        at = row * T + (T - 1 if REVERSE else 0)
        carry *= tl.load(a + at * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(dstart + row * D + d, carry, mask=d < D)


def _variants() -> tuple[Variant, ...]:
    inputs = ("a", "b", "h", "dh", "da", "db")
    made = []
    for kernel in (_forward, _backward):
        for config in (LONG, SHORT):
            for dtype, reverse in (("*fp32", True), ("*bf16", False)):
                types = {n: dtype if n in inputs else "*fp32" for n in kernel.arg_names[:-5]}
                types |= {"T": "i32", "D": "i32"}
                made.append(Variant(kernel, types, {"REVERSE": reverse, **config}, not reverse))
    return tuple(made)


KERNELS = _variants()
