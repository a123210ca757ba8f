"""The delta rule in Triton: what keys decide for all chunks at once, then a walk over the chunks.

A chunk's T, its decayed products and its decayed queries and keys come from
`seqzoo.kernels.delta.fused_keys`. A program then owns a head and a block of value channels and
walks from chunk to chunk: the error of what the state holds under the keys, u = T beta error, the
outputs, the next state. Backward, the state's gradient walks from the end and leaves T^T du, which
is all that values need; the rest is again for all chunks at once, from the states that the forward
pass has kept.

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
from seqzoo.kernels.delta.fused_keys import CHUNK, block, corrections, gradients, prepare
from seqzoo.kernels.delta.launch import MOST, PRECISION, WIDEST, launch, padded_width
from seqzoo.kernels.fused import Variant

NARROW = (torch.bfloat16,)  # dtypes whose matrix products are not float32


class Prepared(NamedTuple):
    """What keys and decays alone decide.

    Chunks lie side by side: (B H N, CHUNK, ...) in the dtype of the matrix products. `total` is the
    decay over each whole chunk, (B H N, WIDTH), float32.
    """

    weights: Tensor
    products: Tensor
    inverse: Tensor
    queries: Tensor
    keys: Tensor
    writes: Tensor
    total: Tensor


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.delta.chunked.forward`; o comes in the dtype of `v`."""
    q, k, v, beta, g = (x.contiguous() for x in (q, k, v, beta, g))
    made, width = _prepared(q, k, v, beta, g), {"WIDTH": padded_width(k)}
    (B, T, H, V), K, N = v.shape, k.shape[3], chunk_count(v.shape[1])
    states = initial_state.new_empty(1 + N, *initial_state.shape)
    states[0] = initial_state
    o = torch.empty_like(v)
    given: tuple[Tensor, ...] = (v, beta, made.weights, *made[2:], states, o)
    _launch(_forward, (B * H, V), made.keys, *given, T, H, K, V, N, **width)
    return o, states


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    states: Tensor,
    do: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.delta.chunked.backward`."""
    q, k, v, beta, g, states, do = (x.contiguous() for x in (q, k, v, beta, g, states, do))
    made, width = _prepared(q, k, v, beta, g), {"WIDTH": padded_width(k)}
    (B, T, H, V), K, N = v.shape, k.shape[3], len(states) - 1
    errors, written = (made.keys.new_empty(B * H * N, CHUNK, V) for _ in range(2))
    dA, dM = (states.new_empty(B * H * N, CHUNK, CHUNK) for _ in range(2))
    dstates = torch.empty_like(states)
    dstates[-1] = dstate
    dq, dk, dv, dbeta = (torch.empty_like(x) for x in (q, k, v, beta))
    sizes = (T, H, K, V, N)
    given: tuple[Tensor, ...] = (beta, do, made.weights, *made[2:])
    _launch(_backward, (B * H, V), made.keys, *given, errors, dv, dstates, *sizes, **width)
    given = (v, beta, do, made.products, made.inverse, made.keys, states, errors)
    given += (written, dA, dM, dbeta)
    _launch(corrections, (B * H * N,), made.keys, *given, *sizes, **width)
    given = (q, k, beta, g, made.weights, made.products, states, dstates[1:], do, written, errors)
    vector = g.shape[-1] > 1
    dg = torch.empty_like(g)
    if not vector:  # a part for each block of channels
        blocks = triton.cdiv(K, _config(gradients, made.keys.itemsize)["BLOCK_K"])
        dg = states.new_empty(blocks, *g.shape)
    given += (dA, dM, dq, dk, dg)
    _launch(gradients, (B * H * N, K), made.keys, *given, *sizes, VECTOR=vector)
    return dq, dk, dv, dbeta, dg if vector else dg.sum(0).to(g.dtype), dstates[0].clone()


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, (B, 1, ...); o comes in the dtype of `v`."""
    q, k, v, beta, g, state = (x.contiguous() for x in (q, k, v, beta, g, state))
    o, new = torch.empty_like(v), torch.empty_like(state)
    B, H, K, V = state.shape
    given = (q, k, v, beta, g, state, o, new, K, V)
    _launch(_step, (B * H, V), state, *given, VECTOR=g.shape[-1] > 1)
    return o, new


def _prepared(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Prepared:
    (B, T, H, K), N, width = k.shape, chunk_count(k.shape[1]), padded_width(k)
    tile, wide = torch.promote_types(k.dtype, v.dtype), torch.float32
    tile = tile if tile in NARROW else wide
    A, M, inverse = (k.new_empty(B * H * N, CHUNK, CHUNK, dtype=x) for x in (tile, wide, wide))
    queries, keys, writes = (k.new_empty(B * H * N, CHUNK, width, dtype=tile) for _ in range(3))
    total = k.new_empty(B * H * N, width, dtype=wide)
    made = Prepared(A, M, inverse, queries, keys, writes, total)
    options = {"VECTOR": g.shape[-1] > 1, "WIDTH": width}
    _launch(prepare, (B * H * N,), made.keys, q, k, beta, g, *made, T, H, K, N, **options)
    return made


def _config(kernel: triton.JITFunction, size: int) -> dict[str, Any]:
    """How a kernel is compiled for matrix products of numbers of so many bytes."""
    if kernel is _step:
        return {"BLOCK_K": 64, "BLOCK_V": 32, "num_warps": 4}
    blocks = {"BLOCK_T": CHUNK, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    if kernel in (corrections, gradients):
        blocks |= {"BLOCK_V": 16, "maxnreg": MOST}
    elif kernel is not prepare and size == 4:
        blocks |= {"BLOCK_V": 16, "num_warps": 2}
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
    """The second number of the grid counts channels, of keys in `gradients` and of values else."""
    by = "BLOCK_K" if kernel is gradients else "BLOCK_V"
    launch(kernel, grid, by, tile, given, _config(kernel, tile.itemsize) | options)


@triton.jit
def _forward(
    v,
    beta,
    weights,
    inverse,
    queries,
    keys,
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
        error = tl.load(v + at, mask=there, other=0.0).to(tl.float32)
        out = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for part in range(0, K, BLOCK_K):
            c, state, inside = block(row, part, w, K, V, BLOCK_K)
            held = tl.load(states + n * rows * K * V + state, mask=inside, other=0.0).to(tile)
            deep = here[:, None] * WIDTH + c[None, :]
            error -= tl.dot(tl.load(keys + deep), held, input_precision=PRECISION)
            out += tl.dot(tl.load(queries + deep), held, input_precision=PRECISION)
        error *= tl.load(beta + token, mask=t < T, other=0.0).to(tl.float32)[:, None]
        u = tl.dot(tl.load(inverse + square), error, input_precision=PRECISION).to(tile)
        out += tl.dot(tl.load(weights + square), u, input_precision=PRECISION)
        tl.store(o + at, out, mask=there)
        for part in range(0, K, BLOCK_K):
            c, state, inside = block(row, part, w, K, V, BLOCK_K)
            held = tl.load(states + n * rows * K * V + state, mask=inside, other=0.0)
            held *= tl.load(total + (row * N + n) * WIDTH + c)[:, None]
            turned = tl.trans(tl.load(writes + here[:, None] * WIDTH + c[None, :]))
            held += tl.dot(turned, u, input_precision=PRECISION)
            tl.store(states + (n + 1) * rows * K * V + state, held, mask=inside)
        tl.debug_barrier()  # the next chunk reads what this one has written


@triton.jit
def _backward(
    beta,
    do,
    weights,
    inverse,
    queries,
    keys,
    writes,
    total,
    errors,
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
    """Gradients of values and of states, in memory as in `_forward`; of beta error: R = T^T du."""
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
        du = tl.dot(tl.trans(tl.load(weights + square)), do_t, input_precision=PRECISION)
        for part in range(0, K, BLOCK_K):
            c, state, inside = block(row, part, w, K, V, BLOCK_K)
            dS = tl.load(dstates + (n + 1) * rows * K * V + state, mask=inside, other=0.0)
            k_t = tl.load(writes + here[:, None] * WIDTH + c[None, :])
            du += tl.dot(k_t, dS.to(tile), input_precision=PRECISION)
        derror = tl.dot(tl.trans(tl.load(inverse + square)), du, input_precision=PRECISION)
        tl.store(errors + here[:, None] * V + w[None, :], derror, mask=(w < V)[None, :])
        derror *= tl.load(beta + token, mask=t < T, other=0.0).to(tl.float32)[:, None]
        tl.store(dv + at, derror, mask=there)
        derror = derror.to(tile)
        for part in range(0, K, BLOCK_K):
            c, state, inside = block(row, part, w, K, V, BLOCK_K)
            dS = tl.load(dstates + (n + 1) * rows * K * V + state, mask=inside, other=0.0)
            dS *= tl.load(total + (row * N + n) * WIDTH + c)[:, None]
            deep = here[:, None] * WIDTH + c[None, :]
            dS += tl.dot(tl.trans(tl.load(queries + deep)), do_t, input_precision=PRECISION)
            dS -= tl.dot(tl.trans(tl.load(keys + deep)), derror, input_precision=PRECISION)
            tl.store(dstates + n * rows * K * V + state, dS, mask=inside)
        tl.debug_barrier()


@triton.jit
def _step(
    q,
    k,
    v,
    beta,
    g,
    state,
    o,
    new,
    K,
    V,
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    w = tl.cast(tl.program_id(1), tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    error = tl.load(v + row * V + w, mask=w < V, other=0.0).to(tl.float32)
    for first in range(0, K, BLOCK_K):
        c, at, inside = block(row, first, w, K, V, BLOCK_K)
        k_t = tl.load(k + row * K + c, mask=c < K, other=0.0).to(tl.float32)[:, None]
        left = tl.load(
            g + (row * K + c if VECTOR else row + tl.zeros_like(c)), mask=c < K, other=0.0
        )
        held = tl.load(state + at, mask=inside, other=0.0)
        error -= tl.sum(k_t * tl.exp(left.to(tl.float32))[:, None] * held, 0)
    u = tl.load(beta + row).to(tl.float32) * error
    out = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, K, BLOCK_K):
        c, at, inside = block(row, first, w, K, V, BLOCK_K)
        q_t = tl.load(q + row * K + c, mask=c < K, other=0.0).to(tl.float32)[:, None]
        k_t = tl.load(k + row * K + c, mask=c < K, other=0.0).to(tl.float32)[:, None]
        left = tl.load(
            g + (row * K + c if VECTOR else row + tl.zeros_like(c)), mask=c < K, other=0.0
        )
        held = tl.load(state + at, mask=inside, other=0.0)
        held = tl.exp(left.to(tl.float32))[:, None] * held + k_t * u[None, :]
        out += tl.sum(q_t * held, 0)
        tl.store(new + at, held, mask=inside)
    tl.store(o + row * V + w, out, mask=w < V)


def _variants() -> tuple[Variant, ...]:
    narrow = {"q", "k", "v", "o", "do", "weights", "queries", "keys", "writes", "errors", "written"}
    narrow |= {"dq", "dk", "dv"}
    made = []
    for kernel in (prepare, _forward, _backward, corrections, gradients, _step):
        kinds = (True, False) if "VECTOR" in kernel.arg_names and kernel is not _step else (True,)
        for dtype, vector in product(("*fp32", "*bf16"), kinds):
            config = _config(kernel, 4 if dtype == "*fp32" else 2)
            fixed = {"VECTOR": vector, "WIDTH": 128, "PRECISION": PRECISION}
            config |= {n: x for n, x in fixed.items() if n in kernel.arg_names}
            run_time = [n for n in kernel.arg_names if n not in config]
            types = {n: dtype if n in narrow else "*fp32" for n in run_time}
            types |= {n: "i32" for n in "THKVN" if n in run_time}
            made.append(Variant(kernel, types, config, dtype == "*bf16", kernel is not _step))
    return tuple(made)


KERNELS = _variants()
