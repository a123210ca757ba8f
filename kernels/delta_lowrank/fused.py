"""A diagonal-plus-low-rank state in Triton: the tokens of all chunks, then a walk over the chunks.

With D the decay between tokens, S the state where a chunk begins, and a prime for what has decayed
since it began (q, a) or until it ends (k, b), from `seqzoo.kernels.delta_lowrank.fused_reads`:

    forward    Y = T (M V + a' S), with M = a D k^T, N = a D b^T, T = (1 - N)^-1
               O = (q D k^T) V + (q D b^T) Y + q' S
               S after the chunk = decayed S + k'^T V + b'^T Y
    backward   R = T^T ((q D b^T)^T dO + b' dS)
               dV = (q D k^T)^T dO + M^T R + k' dS
               dS before the chunk = decayed dS + q'^T dO + a'^T R

A program owns a head and a block of value channels and walks from chunk to chunk, backward from the
end; Y, R and the states are all that the other gradients need, for all chunks at once.

Matrix products of bfloat16 inputs round their factors to bfloat16 and sum in float32; T, decays and
states are float32 always. Of float16 inputs all is float32, which has the range that gradients of
states need. A float32 factor is split in three bfloat16 parts that keep its 24 bits.
"""

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqzoo.kernels.decay.chunked import chunk_count
from seqzoo.kernels.delta.fused_keys import CHUNK, block
from seqzoo.kernels.delta.launch import MOST, PRECISION, WIDEST, launch, padded_width
from seqzoo.kernels.delta_lowrank.fused_gradients import corrections, of_columns, of_rows
from seqzoo.kernels.delta_lowrank.fused_reads import prepare
from seqzoo.kernels.fused import Variant

NARROW = (torch.bfloat16,)  # dtypes whose matrix products are not float32


class Prepared(NamedTuple):
    """What queries, keys, reads, writes and decays alone decide.

    Chunks lie side by side: (B H N, CHUNK, ...) in the dtype of the matrix products; `inverse` and
    `total`, the decay over each whole chunk, (B H N, WIDTH), are float32.
    """

    qk: Tensor
    qb: Tensor
    ak: Tensor
    inverse: Tensor
    queries: Tensor
    keys: Tensor
    reads: Tensor
    writes: Tensor
    total: Tensor


def forward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.delta_lowrank.chunked.forward`; o comes in the dtype of `v`.

    Log decays are those of key channels, (B, T, H, K).
    """
    q, k, v, a, b, g = (x.contiguous() for x in (q, k, v, a, b, g))
    made = _prepared(q, k, v, a, b, g)
    (B, T, H, V), K, N = v.shape, k.shape[3], chunk_count(v.shape[1])
    states = initial_state.new_empty(1 + N, *initial_state.shape)
    states[0] = initial_state
    o = torch.empty_like(v)
    _launch(
        _forward, (B * H, V), made.keys, v, *made, states, o, T, H, K, V, N, WIDTH=padded_width(k)
    )
    return o, states


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    states: Tensor,
    do: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.delta_lowrank.chunked.backward`."""
    q, k, v, a, b, g = (x.contiguous() for x in (q, k, v, a, b, g))
    states, do = states.contiguous(), do.contiguous()
    made, width = _prepared(q, k, v, a, b, g), {"WIDTH": padded_width(k)}
    (B, T, H, V), K, N = v.shape, k.shape[3], len(states) - 1
    found, dfound = (made.keys.new_empty(B * H * N, CHUNK, V) for _ in range(2))
    squares = [states.new_empty(B * H * N, CHUNK, CHUNK) for _ in range(4)]
    dstates = torch.empty_like(states)
    dstates[-1] = dstate
    dq, dk, dv, da, db, dg = (torch.empty_like(x) for x in (q, k, v, a, b, g))
    sizes = (T, H, K, V, N)
    _launch(_backward, (B * H, V), made.keys, do, *made, dfound, dv, dstates, *sizes, **width)
    given: tuple[Tensor, ...] = (v, do, made.ak, made.inverse, made.reads, states)
    _launch(corrections, (B * H * N,), made.keys, *given, found, dfound, *squares, *sizes, **width)
    ends, (dqk, dqb, dak, dab) = dstates[1:], squares
    given = (q, k, a, b, g, states, ends, do, dfound, *squares, dq, da, dg)
    _launch(of_rows, (B * H * N, K), made.keys, *given, *sizes)
    given = (k, q, a, g, v, dfound, ends, dqk, dak, dk, dg)
    _launch(of_columns, (B * H * N, K), made.keys, *given, *sizes, KEYS=True)
    given = (b, q, a, g, found, dfound, ends, dqb, dab, db, dg)
    _launch(of_columns, (B * H * N, K), made.keys, *given, *sizes, KEYS=False)
    return dq, dk, dv, da, db, dg, dstates[0].clone()


def step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, (B, 1, ...); o comes in the dtype of `v`."""
    q, k, v, a, b, g, state = (x.contiguous() for x in (q, k, v, a, b, g, state))
    o, new = torch.empty_like(v), torch.empty_like(state)
    B, H, K, V = state.shape
    _launch(_step, (B * H, V), state, q, k, v, a, b, g, state, o, new, K, V)
    return o, new


def _prepared(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Prepared:
    (B, T, H, K), N, width, wide = k.shape, chunk_count(k.shape[1]), padded_width(k), torch.float32
    dtypes = {x.dtype for x in (k, v, a, b)}
    tile = k.dtype if len(dtypes) == 1 and k.dtype in NARROW else wide
    squares = [k.new_empty(B * H * N, CHUNK, CHUNK, dtype=x) for x in (tile, tile, tile, wide)]
    decayed = [k.new_empty(B * H * N, CHUNK, width, dtype=tile) for _ in range(4)]
    total = k.new_empty(B * H * N, width, dtype=wide)
    made = Prepared._make((*squares, *decayed, total))
    _launch(prepare, (B * H * N,), made.keys, q, k, a, b, g, *made, T, H, K, N, WIDTH=width)
    return made


def _config(kernel: triton.JITFunction, size: int) -> dict[str, Any]:
    """How a kernel is compiled for matrix products of numbers of so many bytes."""
    if kernel is _step:
        return {"BLOCK_K": 64, "BLOCK_V": 32, "num_warps": 4}
    blocks = {"BLOCK_T": CHUNK, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    if kernel in (corrections, of_rows, of_columns):
        blocks |= {"BLOCK_V": 16, "maxnreg": MOST}
    elif kernel is not prepare and size == 4:
        blocks |= {"BLOCK_V": 16, "num_warps": 4 if kernel is _backward else 2}
    elif kernel is not prepare:
        blocks |= {"BLOCK_K": WIDEST, "BLOCK_V": 32}
    return blocks


def _launch(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    tile: Tensor,
    *given: Tensor | int,
    **options: bool | int,
) -> None:
    """The second number of the grid counts channels: of keys for gradients, of values else."""
    by = "BLOCK_K" if kernel in (of_rows, of_columns) else "BLOCK_V"
    launch(kernel, grid, by, tile, given, _config(kernel, tile.itemsize) | options)


@triton.jit
def _forward(
    v,
    qk,
    qb,
    ak,
    inverse,
    queries,
    keys,
    reads,
    writes,
    total,
    states,
    o,
    T,
    H,
    K,
    V,
    N,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state goes through memory, where it is kept for the backward pass anyway."""
    row = tl.cast(tl.program_id(0), tl.int64)
    rows = tl.cast(tl.num_programs(0), tl.int64)
    i = tl.arange(0, BLOCK_T)
    w = tl.cast(tl.program_id(1), tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = queries.dtype.element_ty
    for chunk in range(N):
        n = tl.cast(chunk, tl.int64)
        t = n * BLOCK_T + i
        here = (row * N + n) * BLOCK_T + i
        token = (row // H * T + t) * H + row % H
        square = here[:, None] * BLOCK_T + i[None, :]
        at, there = token[:, None] * V + w[None, :], (t < T)[:, None] & (w < V)[None, :]
        v_t = tl.load(v + at, mask=there, other=0.0).to(tile)
        y = tl.dot(tl.load(ak + square), v_t, input_precision=PRECISION)
        out = tl.dot(tl.load(qk + square), v_t, input_precision=PRECISION)
        for part in range(0, K, BLOCK_K):
            c, state, inside = block(row, part, w, K, V, BLOCK_K)
            held = tl.load(states + n * rows * K * V + state, mask=inside, other=0.0).to(tile)
            deep = here[:, None] * WIDTH + c[None, :]
            y += tl.dot(tl.load(reads + deep), held, input_precision=PRECISION)
            out += tl.dot(tl.load(queries + deep), held, input_precision=PRECISION)
        y = tl.dot(tl.load(inverse + square), y, input_precision=PRECISION).to(tile)
        out += tl.dot(tl.load(qb + square), y, input_precision=PRECISION)
        tl.store(o + at, out, mask=there)
        for part in range(0, K, BLOCK_K):
            c, state, inside = block(row, part, w, K, V, BLOCK_K)
            held = tl.load(states + n * rows * K * V + state, mask=inside, other=0.0)
            held *= tl.load(total + (row * N + n) * WIDTH + c)[:, None]
            deep = here[:, None] * WIDTH + c[None, :]
            held += tl.dot(tl.trans(tl.load(keys + deep)), v_t, input_precision=PRECISION)
            held += tl.dot(tl.trans(tl.load(writes + deep)), y, input_precision=PRECISION)
            tl.store(states + (n + 1) * rows * K * V + state, held, mask=inside)
        tl.debug_barrier()  # the next chunk reads what this one has written


@triton.jit
def _backward(
    do,
    qk,
    qb,
    ak,
    inverse,
    queries,
    keys,
    reads,
    writes,
    total,
    dfound,
    dv,
    dstates,
    T,
    H,
    K,
    V,
    N,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of values and of states, in memory as in `_forward`; R."""
    row = tl.cast(tl.program_id(0), tl.int64)
    rows = tl.cast(tl.num_programs(0), tl.int64)
    i = tl.arange(0, BLOCK_T)
    w = tl.cast(tl.program_id(1), tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = queries.dtype.element_ty
    for back in range(N):
        n = tl.cast(N - 1 - back, tl.int64)
        t = n * BLOCK_T + i
        here = (row * N + n) * BLOCK_T + i
        token = (row // H * T + t) * H + row % H
        square = here[:, None] * BLOCK_T + i[None, :]
        at, there = token[:, None] * V + w[None, :], (t < T)[:, None] & (w < V)[None, :]
        do_t = tl.load(do + at, mask=there, other=0.0).to(tile)
        dy = tl.dot(tl.trans(tl.load(qb + square)), do_t, input_precision=PRECISION)
        dv_t = tl.dot(tl.trans(tl.load(qk + square)), do_t, input_precision=PRECISION)
        for part in range(0, K, BLOCK_K):
            c, state, inside = block(row, part, w, K, V, BLOCK_K)
            dS = tl.load(dstates + (n + 1) * rows * K * V + state, mask=inside, other=0.0).to(tile)
            deep = here[:, None] * WIDTH + c[None, :]
            dy += tl.dot(tl.load(writes + deep), dS, input_precision=PRECISION)
            dv_t += tl.dot(tl.load(keys + deep), dS, input_precision=PRECISION)
        dy = tl.dot(tl.trans(tl.load(inverse + square)), dy, input_precision=PRECISION).to(tile)
        tl.store(dfound + here[:, None] * V + w[None, :], dy, mask=(w < V)[None, :])
        dv_t += tl.dot(tl.trans(tl.load(ak + square)), dy, input_precision=PRECISION)
        tl.store(dv + at, dv_t, mask=there)
        for part in range(0, K, BLOCK_K):
            c, state, inside = block(row, part, w, K, V, BLOCK_K)
            dS = tl.load(dstates + (n + 1) * rows * K * V + state, mask=inside, other=0.0)
            dS *= tl.load(total + (row * N + n) * WIDTH + c)[:, None]
            deep = here[:, None] * WIDTH + c[None, :]
            dS += tl.dot(tl.trans(tl.load(queries + deep)), do_t, input_precision=PRECISION)
            dS += tl.dot(tl.trans(tl.load(reads + deep)), dy, input_precision=PRECISION)
            tl.store(dstates + n * rows * K * V + state, dS, mask=inside)
        tl.debug_barrier()


@triton.jit
def _step(
    q,
    k,
    v,
    a,
    b,
    g,
    state,
    o,
    new,
    K,
    V,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    w = tl.cast(tl.program_id(1), tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    y = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, K, BLOCK_K):
        c, at, inside = block(row, first, w, K, V, BLOCK_K)
        a_t = tl.load(a + row * K + c, mask=c < K, other=0.0).to(tl.float32)
        y += tl.sum(a_t[:, None] * tl.load(state + at, mask=inside, other=0.0), 0)
    v_t = tl.load(v + row * V + w, mask=w < V, other=0.0).to(tl.float32)
    out = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, K, BLOCK_K):
        c, at, inside = block(row, first, w, K, V, BLOCK_K)
        left = tl.exp(tl.load(g + row * K + c, mask=c < K, other=0.0).to(tl.float32))
        b_t = tl.load(b + row * K + c, mask=c < K, other=0.0).to(tl.float32)
        k_t = tl.load(k + row * K + c, mask=c < K, other=0.0).to(tl.float32)
        held = left[:, None] * tl.load(state + at, mask=inside, other=0.0)
        held += b_t[:, None] * y[None, :] + k_t[:, None] * v_t[None, :]
        q_t = tl.load(q + row * K + c, mask=c < K, other=0.0).to(tl.float32)
        out += tl.sum(q_t[:, None] * held, 0)
        tl.store(new + at, held, mask=inside)
    tl.store(o + row * V + w, out, mask=w < V)


def _variants() -> tuple[Variant, ...]:
    narrow = {"q", "k", "v", "a", "b", "o", "do", "dq", "dk", "dv", "da", "db", "x", "z", "dx"}
    narrow |= {"qk", "qb", "ak", "queries", "keys", "reads", "writes", "found", "dfound"}
    made = []
    for kernel in (prepare, _forward, _backward, corrections, of_rows, of_columns, _step):
        kinds = (True, False) if kernel is of_columns else (True,)
        for dtype, keys in product(("*fp32", "*bf16"), kinds):
            config = _config(kernel, 4 if dtype == "*fp32" else 2)
            fixed = {"KEYS": keys, "WIDTH": 128, "PRECISION": PRECISION}
            config |= {n: x for n, x in fixed.items() if n in kernel.arg_names}
            run_time = [n for n in kernel.arg_names if n not in config]
            types = {n: dtype if n in narrow else "*fp32" for n in run_time}
            types |= {n: "i32" for n in "THKVN" if n in run_time}
            made.append(Variant(kernel, types, config, dtype == "*bf16", kernel is not _step))
    return tuple(made)


KERNELS = _variants()
