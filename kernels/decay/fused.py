"""Decayed linear attention in Triton, in chunks; and one kernel for a single token.

    forward    carry    S, the state before each chunk
               scores   A, the weights of a chunk's values in its outputs
               outputs  o = A v + (q decayed) S
    backward   carry    dS, the gradient of the state behind each chunk
               outputs  dv = A^T do + (k decayed) dS
               scores   dA
               inner    what dA gives q, k and g, under a decay for each key channel
               borders  the rest of dq, dk and dg

Only `carry` walks, from chunk to chunk with a tile of the state in registers; all others work on
all chunks at once. Where rows and heads do not fill a GPU the walk is cut in stretches, as in
`scan`. The decay from token j to token i of a chunk is a product of two factors that meet at the
border between the halves of a block, for blocks of 2, 4, ... tokens, as in `chunked.py`: exponents
are sums of log decays and never differences, so that none is above zero, nothing cancels and -inf
is an ordinary value. A scalar decay is summed for each pair of tokens by itself.

Sums, states and decays are float32. Factors of matrix products are made of bfloat16 parts, which
have the range of float32: for v in bfloat16 one part, and two of a left factor that is not exact
(or the worst row would be off by more than may be); for float16 two parts of both factors, for
float32 three, which keep 16 or 24 bits, and there chunks are shorter, or the parts would not fit.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqzoo.kernels.decay.programs import borders, carry, inner, outputs, scores
from seqzoo.kernels.dispatch import interpreting
from seqzoo.kernels.fused import OPTIONS, Variant, stretch
from seqzoo.kernels.scan.fused import forward as scan

CHUNKS = {torch.bfloat16: 64, torch.float16: 32, torch.float32: 32}
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "bf16x3", torch.float32: "bf16x6"}


def chunk_count(length: int, dtype: torch.dtype) -> int:
    """Into how many chunks a sequence is cut whose values have this dtype."""
    return -(-length // CHUNKS[dtype])


class Sizes(NamedTuple):
    """Of a call, as the programs name them."""

    B: int
    T: int
    H: int
    HK: int
    K: int
    V: int
    vector: bool  # a decay for each key channel
    dtype: torch.dtype  # of v


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.decay.chunked.forward`; the states are float32, o is what q and v are."""
    q, k, v, g, start = (x.contiguous() for x in (q, k, v, g, initial_state))
    sizes = _sizes(k, v, g)
    states = start.new_empty(1 + chunk_count(sizes.T, v.dtype), *start.shape)
    o = v.new_empty(v.shape, dtype=torch.promote_types(q.dtype, v.dtype))
    if not start.numel():
        return o.zero_(), states
    _walk(sizes, k, v, g, start, states[:-1], states[-1], BACK=False)
    A = _weights(sizes, q, k, g)
    _launch(outputs, sizes, q, v, g, A, states, o, BACK=False)
    return o, states


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, states: Tensor, do: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and the initial state, from the states of `forward`."""
    q, k, v, g, do, dend = (x.contiguous() for x in (q, k, v, g, do, dstate))
    dq, dk, dv, dstart = (torch.empty_like(x) for x in (q, k, v, dend))
    sizes = _sizes(k, v, g)
    if not dend.numel():
        return dq.zero_(), dk.zero_(), dv.zero_(), torch.zeros_like(g), dstart
    dstates = torch.empty_like(states[1:])
    _walk(sizes, q, do, g, dend, dstates, dstart, BACK=True)
    A = _weights(sizes, q, k, g)
    _launch(outputs, sizes, k, do, g, A, dstates, dv, BACK=True)
    # A scalar decay has a part from the scores, and one from each block of key channels.
    blocks = triton.cdiv(sizes.K, _config(borders, sizes)["BLOCK_K"])
    dg = g.new_empty(1 if sizes.vector else 1 + blocks, *g.shape, dtype=torch.float32)
    dA, over = torch.empty_like(A), sizes._replace(HK=sizes.H, K=sizes.V)
    decay = "none" if sizes.vector else "scalar"
    _launch(scores, over, do, v, g, dA, A, dg, DECAY=decay, BACK=True)
    within = q.new_empty(q.shape, dtype=torch.float32) if sizes.vector else q
    for back, x, y, w, dy in ((False, do, q, k, dq), (True, v, k, q, dk)):
        ends, others = (dstates, states) if back else (states, dstates)
        if sizes.vector:
            _launch(inner, sizes, y, w, g, dA, within, dg, BACK=back)
        given = (x, y, w, g, ends, others, dA, within, dy, dg if sizes.vector else dg[1:])
        _launch(borders, sizes, *given, BACK=back)
    return dq, dk, dv, (dg[0] if sizes.vector else dg.sum(0)).to(g.dtype), dstart


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, before: bool
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.decay.chunked.step`; without gradients."""
    q, k, v, g, state = (x.contiguous() for x in (q, k, v, g, state))
    o, new = v.new_zeros(v.shape, dtype=torch.float32), torch.empty_like(state)
    if state.numel():
        _launch(_step, _sizes(k, v, g), q, k, v, g, state, o, new, BEFORE=before)
    return o, new


def _sizes(k: Tensor, v: Tensor, g: Tensor) -> Sizes:
    B, T, H, V = v.shape
    return Sizes(B, T, H, k.shape[2], k.shape[3], V, g.shape[-1] > 1, v.dtype)


def _walk(
    sizes: Sizes,
    x: Tensor,
    z: Tensor,
    g: Tensor,
    start: Tensor,
    states: Tensor,
    end: Tensor,
    **options: bool,
) -> None:
    """Fill in the states (chunks, B, H, K, V) that chunks begin with, or their gradients."""
    config, chunk = _config(carry, sizes), CHUNKS[sizes.dtype]
    tiles = triton.cdiv(sizes.K, config["BLOCK_K"]) * triton.cdiv(sizes.V, config["BLOCK_V"])
    length = triton.cdiv(stretch(sizes.T, sizes.B * sizes.H * tiles, chunk), chunk)
    count = triton.cdiv(len(states), length)
    starts, kept = start[None], end
    if count > 1:
        ends, kept = start.new_empty(count, *start.shape), start.new_empty(count, *start.shape[:3])
        given = (x, z, g, starts, states, ends, kept)
        _launch(carry, sizes, *given, LENGTH=length, ENDS=True, **options)
        kept = kept[..., None].expand_as(ends)
        after = scan(kept.reshape(1, count, -1), ends.view(1, count, -1), start.view(1, -1), False)
        starts = torch.cat((starts, after[0].view_as(ends)[:-1]))
    given = (x, z, g, starts, states, end, kept)
    _launch(carry, sizes, *given, LENGTH=length, ENDS=False, **options)


def _weights(sizes: Sizes, q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """A, (chunks, B, H, chunk, chunk)."""
    chunk = CHUNKS[sizes.dtype]
    shape = (chunk_count(sizes.T, sizes.dtype), sizes.B, sizes.H, chunk, chunk)
    A = q.new_empty(shape, dtype=torch.float32)
    decay = "vector" if sizes.vector else "scalar"
    _launch(scores, sizes, q, k, g, A, A, A, DECAY=decay, BACK=False)
    return A


def _launch(
    kernel: triton.JITFunction, sizes: Sizes, *given: Tensor, **options: int | bool | str
) -> None:
    config = _config(kernel, sizes)
    B, T, H, HK, K, V = sizes[:6]
    named = sizes._asdict() | options | {"ROWS": B * H, "VECTOR": sizes.vector}
    named["PRECISION"] = "ieee" if interpreting() else PRECISIONS[sizes.dtype]
    chunks = 1 if kernel is _step else chunk_count(T, sizes.dtype)
    blocks_k = triton.cdiv(K, config["BLOCK_K"])
    blocks_v = triton.cdiv(V, config.get("BLOCK_V", V))
    grid: tuple[int, ...] = (chunks * B * H, blocks_v)  # outputs, _step
    if kernel is carry:
        grid = (triton.cdiv(chunks, options["LENGTH"]) * B * H, blocks_k, blocks_v)
    elif kernel is scores:
        grid = (chunks * B * H,)
    elif kernel is inner or kernel is borders:
        grid = (chunks * B * HK, blocks_k)
    asked = {n: x for n, x in named.items() if n in kernel.arg_names}
    with torch.cuda.device_of(given[0]):
        kernel[grid](*given, **asked, **config, **OPTIONS)


@triton.jit
def _step(
    q,
    k,
    v,
    g,
    state,
    o,
    new,
    H,
    HK,
    K,
    V,
    BEFORE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token, read before or after its own write."""
    row = tl.cast(tl.program_id(0), tl.int64)
    keys = row // H * HK + row % H // (H // HK)
    j = tl.cast(tl.program_id(1), tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    v_t = tl.load(v + row * V + j, mask=j < V, other=0.0).to(tl.float32)
    made = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, K, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        q_t = tl.load(q + keys * K + i, mask=i < K, other=0.0).to(tl.float32)
        k_t = tl.load(k + keys * K + i, mask=i < K, other=0.0).to(tl.float32)
        g_t = tl.load(
            g + (row * K + i if VECTOR else row + tl.zeros_like(i)), mask=i < K, other=0.0
        )
        at = (row * K + i)[:, None] * V + j[None, :]
        inside = (i < K)[:, None] & (j < V)[None, :]
        old = tl.load(state + at, mask=inside, other=0.0)
        after = tl.exp(g_t.to(tl.float32))[:, None] * old + k_t[:, None] * v_t[None, :]
        made += tl.sum(q_t[:, None] * (old if BEFORE else after), 0)
        tl.store(new + at, after, mask=inside)
    tl.store(o + row * V + j, made, mask=j < V)


def _config(kernel: triton.JITFunction, sizes: Sizes) -> dict[str, int]:
    half = sizes.dtype == torch.bfloat16
    config, chunk = CONFIGS[kernel.__name__][half], CHUNKS[sizes.dtype]
    if kernel is outputs and half and sizes.V <= 64:
        config = config | {"BLOCK_V": 64}
    if not torch.version.hip:  # or the compiler spills to have fewer than there are
        config = config | {"maxnreg": 255}
    fixed = {"BLOCK_T": chunk, "LEVELS": chunk.bit_length() - 1}
    return config | {n: x for n, x in fixed.items() if n in kernel.arg_names}


def _tiles(k: int, v: int, warps: int, stages: int = 1) -> dict[str, int]:
    blocks = {"BLOCK_K": k, "BLOCK_V": v} if v else {"BLOCK_K": k}
    return blocks | {"num_warps": warps, "num_stages": stages}


CONFIGS = {  # for v in float16 and float32, and in bfloat16
    "carry": (_tiles(32, 32, 8, 2), _tiles(64, 64, 8, 2)),
    "scores": (_tiles(16, 0, 4), _tiles(32, 0, 8)),
    "outputs": (_tiles(32, 64, 4), _tiles(32, 128, 8)),
    "inner": (_tiles(32, 0, 4), _tiles(16, 0, 8)),
    "borders": (_tiles(16, 32, 4), _tiles(32, 64, 4)),
    "_step": (_tiles(64, 32, 4), _tiles(64, 32, 4)),
}
LISTED: tuple[tuple[triton.JITFunction, dict[str, Any]], ...] = (  # a decay of each kind
    (carry, {"BACK": False, "ENDS": False, "VECTOR": True}),
    (carry, {"BACK": True, "ENDS": True, "VECTOR": False}),
    (scores, {"DECAY": "vector", "BACK": False}),
    (scores, {"DECAY": "scalar", "BACK": True}),
    (outputs, {"BACK": True, "VECTOR": True}),
    (outputs, {"BACK": False, "VECTOR": False}),
    (inner, {"BACK": True}),
    (borders, {"BACK": True, "VECTOR": True}),
    (borders, {"BACK": False, "VECTOR": False}),
    (_step, {"BEFORE": False, "VECTOR": True}),
)


def _variants() -> tuple[Variant, ...]:
    of_dtype = ("q", "k", "v", "x", "y", "z", "w", "do", "dq", "dk", "dv", "dy", "out")
    made = []
    for dtype, word in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        for kernel, options in LISTED:
            for width in (128, 64) if kernel is outputs and word == "*bf16" else (128,):
                names = kernel.arg_names
                types = dict.fromkeys((n for n in names if n.islower()), "*fp32")
                types |= {n: word for n in names if n in of_dtype}
                types |= {n: "i32" for n in ("LENGTH", "T", "ROWS", *Sizes._fields) if n in names}
                config = options | _config(kernel, Sizes(1, 1, 1, 1, width, width, True, dtype))
                if "PRECISION" in names:
                    config["PRECISION"] = PRECISIONS[dtype]
                made.append(Variant(kernel, types, config, matrix=kernel is not _step))
    return tuple(made)


KERNELS = _variants()
