"""The selective scan in Triton.

A program owns a row, a block of channels and a stretch of time, holds the states (N, channels) in
registers and walks: no scan tree, one exponential a state and step. Forward, the states at block
borders go to memory. Backward, blocks come last to first: from its border a block is walked once,
leaving a state every HELD steps in a scratch of the program's own; from each of these, HELD
states and decays are made again in registers, and then undone. Nothing is divided by a decay.

Sums over channels (dB, dC) and rows (dA) are written by program and added afterwards, in an order
that never changes. Inside, channels and states are filled up with zeros to what programs hold, and
states lie with channels last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from seqzoo.kernels.fused import OPTIONS, Variant, stretch
from seqzoo.kernels.scan.fused import forward as carry

BLOCK = 64  # steps between the states that are kept
CHANNELS = 32
STATES = (16, 32, 64)
HELD = 2  # steps whose states and decays the backward pass has in registers
LOG2_E = tl.constexpr(1.4426950408889634)


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.selective_scan.chunked.forward`.

    A, the states and y are float32, the rest float32, float16 or bfloat16. The borders lie in
    memory as (blocks, B, N, D), whatever their shape says: only `backward` reads them.
    """
    D, N = A.shape
    u, dt, A, B, C, flags = _filled(u, dt, A, B, C, reset)
    start = _fill(initial_state.mT, A.shape)
    length, count = _stretches(u)
    starts = start[None]
    if count > 1:
        starts = _carried((u, dt, A, B, flags), start, length, count, reverse=False)
    y, end = start.new_empty(u.shape), torch.empty_like(start)
    borders = start.new_empty(triton.cdiv(u.shape[1], BLOCK), *start.shape)
    _launch(_forward, count, u, dt, A, B, C, flags, starts, y, end, borders, length)
    y, end = y[..., :D].contiguous(), end[..., :N, :D].mT.contiguous()
    return y, end, borders[..., :N, :D].reshape(len(borders), *end.shape)


def backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    reset: Tensor | None,
    borders: Tensor,
    dy: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.selective_scan.chunked.backward`; gradients in the inputs' dtypes."""
    D, N = A.shape
    u, dt, A, B, C, flags = _filled(u, dt, A, B, C, reset)
    dy, dend = _fill(dy, u.shape[-1:]), _fill(dstate.mT, A.shape)
    borders = _fill(borders.reshape(len(borders), len(u), N, D), A.shape)
    length, count = _stretches(u)
    dends = dend[None]
    if count > 1:
        dends = _carried((dy, dt, A, C, flags), dend, length, count, reverse=True)
    groups = u.shape[2] // CHANNELS
    du, ddt, dstart = (torch.empty_like(x) for x in (u, dt, dend))
    dA = A.new_empty(count * len(u), *A.shape)
    dB, dC = (A.new_empty(groups, *x.shape) for x in (B, C))
    scratch = A.new_empty(count, len(u), BLOCK // HELD, *A.shape)
    made = (du, ddt, dA, dB, dC, dstart)
    inputs = (u, dt, A, B, C, flags, borders, dy, dends, scratch)
    _launch(_backward, count, *inputs, *made, length)
    dB, dC = (x.sum(0)[..., :N].to(y.dtype, copy=True) for x, y in ((dB, B), (dC, C)))
    dA, dstart = (x[..., :N, :D].mT.contiguous() for x in (dA.sum(0), dstart))
    return du[..., :D].contiguous(), ddt[..., :D].contiguous(), dA, dB, dC, dstart


def _filled(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reset: Tensor | None
) -> tuple[Tensor, ...]:
    D = triton.cdiv(A.shape[0], CHANNELS) * CHANNELS
    N = next(n for n in STATES if n >= A.shape[1])
    flags = u.new_empty(0, dtype=torch.bool) if reset is None else reset.contiguous()
    wide = (_fill(u, (D,)), _fill(dt, (D,)), _fill(A.mT, (N, D)))
    return *wide, _fill(B, (N,)), _fill(C, (N,)), flags


def _fill(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Contiguous, with zeros behind so that the last dimensions have these sizes."""
    more = [m for i, n in enumerate(reversed(sizes)) for m in (0, n - x.shape[-1 - i])]
    return functional.pad(x, more) if any(more) else x.contiguous()


def _stretches(u: Tensor) -> tuple[int, int]:
    """Steps of a stretch, and how many there are."""
    rows, T, D = u.shape
    length = stretch(T, rows * D // CHANNELS, BLOCK)
    return length, max(1, triton.cdiv(T, max(length, 1)))


def _carried(
    given: tuple[Tensor, ...],
    start: Tensor,
    length: int,
    count: int,
    reverse: bool,
) -> Tensor:
    """What comes into each stretch, (count, B, N, D): the same recurrence, over the stretches."""
    ends, decays = (start.new_empty(count, *start.shape) for _ in range(2))
    _launch(_ends, count, *given, ends, decays, length, REVERSE=reverse)
    over = (decays.view(1, count, -1), ends.view(1, count, -1), start.view(1, -1))
    after = carry(*over, reverse)[0].view_as(ends)
    return torch.cat((after[1:], start[None]) if reverse else (start[None], after[:-1]))


def _launch(
    kernel: triton.JITFunction,
    count: int,
    *given: Tensor | int,
    **options: bool,
) -> None:
    x, A, flags = (given[kernel.arg_names.index(name)] for name in ("dt", "A", "reset"))
    rows, T, D = x.shape
    if rows and D:
        config = _config(kernel, len(A)) | {"RESETS": flags.numel() > 0}
        with torch.cuda.device_of(x):
            kernel[(rows, D // CHANNELS, count)](*given, T, D, **options, **config, **OPTIONS)


def _config(kernel: triton.JITFunction, states: int) -> dict[str, int]:
    steps = HELD if kernel is _backward else 4
    config = {"BLOCK_N": states, "BLOCK_D": CHANNELS, "STEPS": steps, "num_warps": states // 8}
    return config if kernel is _ends else config | {"BLOCK_T": BLOCK}


@triton.jit
def _advance(
    h, exponent, u, dt, B, reset, row, t, T, D, d, n, RESETS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The decay of token t, and the state after it."""
    at = tl.cast(row, tl.int64) * T + t
    here, state = d < tl.where(t < T, D, 0), n < tl.where(t < T, BLOCK_N, 0)
    u_t = tl.load(u + at * D + d, mask=here, other=0.0).to(tl.float32)
    dt_t = tl.load(dt + at * D + d, mask=here, other=0.0).to(tl.float32)
    B_t = tl.load(B + at * BLOCK_N + n, mask=state, other=0.0).to(tl.float32)
    decay = tl.exp2(exponent * dt_t[None, :])
    if RESETS:
        decay = tl.where(tl.load(reset + at, mask=t < T, other=0) != 0, 0.0, decay)
    return decay, decay * h + B_t[:, None] * (dt_t * u_t)[None, :]


@triton.jit
def _forward(
    u,
    dt,
    A,
    B,
    C,
    reset,
    starts,
    y,
    end,
    borders,
    LENGTH,
    T,
    D,
    RESETS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    rows = tl.cast(tl.num_programs(0), tl.int64)
    mine = tl.cast(tl.program_id(2), tl.int64) * rows + row
    d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.cast(tl.arange(0, BLOCK_N), tl.int64)
    tile = n[:, None] * D + d[None, :]
    exponent = tl.load(A + tile) * LOG2_E
    h = tl.load(starts + mine * BLOCK_N * D + tile)
    begin = tl.cast(tl.program_id(2), tl.int64) * LENGTH
    for first in range(begin, tl.minimum(begin + LENGTH, T), STEPS):
        if first % BLOCK_T == 0:
            border = tl.cast(first // BLOCK_T, tl.int64) * rows + row
            tl.store(borders + border * BLOCK_N * D + tile, h)
        made = ()  # stored below: no load waits behind a store
        for i in tl.static_range(STEPS):
            t = tl.cast(first, tl.int64) + i
            _, h = _advance(h, exponent, u, dt, B, reset, row, t, T, D, d, n, RESETS, BLOCK_N)
            at = row * T + t
            state = n < tl.where(t < T, BLOCK_N, 0)
            C_t = tl.load(C + at * BLOCK_N + n, mask=state, other=0.0).to(tl.float32)
            made += (tl.sum(h * C_t[:, None], 0),)  # type: ignore[assignment]
        for i in tl.static_range(STEPS):
            t = tl.cast(first, tl.int64) + i
            tl.store(y + (row * T + t) * D + d, made[i], mask=d < tl.where(t < T, D, 0))
    if tl.program_id(2) == tl.num_programs(2) - 1:
        tl.store(end + row * BLOCK_N * D + tile, h)


@triton.jit
def _backward(
    u,
    dt,
    A,
    B,
    C,
    reset,
    borders,
    dy,
    dends,
    scratch,
    du,
    ddt,
    dA,
    dB,
    dC,
    dstart,
    LENGTH,
    T,
    D,
    RESETS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
):
    """g_t = C_t dy_t + a_{t+1} g_{t+1}: dt_t u_t gets B_t . g_t, dt_t A gets a_t g_t h_{t-1}."""
    row = tl.cast(tl.program_id(0), tl.int64)
    rows = tl.cast(tl.num_programs(0), tl.int64)
    mine = tl.cast(tl.program_id(2), tl.int64) * rows + row
    group = tl.cast(tl.program_id(1), tl.int64)
    d = group * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.cast(tl.arange(0, BLOCK_N), tl.int64)
    tile = n[:, None] * D + d[None, :]
    rates = tl.load(A + tile)
    exponent = rates * LOG2_E
    held = mine * (BLOCK_T // STEPS)
    g = tl.load(dends + mine * BLOCK_N * D + tile)
    dA_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    begin = tl.cast(tl.program_id(2), tl.int64) * LENGTH
    until = tl.minimum(begin + LENGTH, T)
    for back in range(0, until - begin, BLOCK_T):
        block = tl.cast((until - 1 - back) // BLOCK_T, tl.int64)
        h = tl.load(borders + (block * rows + row) * BLOCK_N * D + tile)
        parts = tl.cdiv(tl.minimum(BLOCK_T, T - block * BLOCK_T), STEPS)
        for part in range(parts):
            tl.store(scratch + (held + part) * BLOCK_N * D + tile, h)
            for i in tl.static_range(STEPS):
                t = block * BLOCK_T + tl.cast(part, tl.int64) * STEPS + i
                _, h = _advance(h, exponent, u, dt, B, reset, row, t, T, D, d, n, RESETS, BLOCK_N)
        tl.debug_barrier()  # the scratch is written
        for part_back in range(parts):
            part = parts - 1 - part_back
            h = tl.load(scratch + (held + part) * BLOCK_N * D + tile)
            before, decays = (), ()
            for i in tl.static_range(STEPS):
                t = block * BLOCK_T + tl.cast(part, tl.int64) * STEPS + i
                before += (h,)  # type: ignore[assignment]
                decay, h = _advance(
                    h, exponent, u, dt, B, reset, row, t, T, D, d, n, RESETS, BLOCK_N
                )
                decays += (decay,)  # type: ignore[assignment]
            for i in tl.static_range(STEPS):
                t = block * BLOCK_T + tl.cast(part, tl.int64) * STEPS + (STEPS - 1 - i)
                at = row * T + t
                here, state = d < tl.where(t < T, D, 0), n < tl.where(t < T, BLOCK_N, 0)
                u_t = tl.load(u + at * D + d, mask=here, other=0.0).to(tl.float32)
                dt_t = tl.load(dt + at * D + d, mask=here, other=0.0).to(tl.float32)
                dy_t = tl.load(dy + at * D + d, mask=here, other=0.0).to(tl.float32)
                B_t = tl.load(B + at * BLOCK_N + n, mask=state, other=0.0).to(tl.float32)
                C_t = tl.load(C + at * BLOCK_N + n, mask=state, other=0.0).to(tl.float32)
                g += C_t[:, None] * dy_t[None, :]
                dw = tl.sum(B_t[:, None] * g, 0)
                sums = (group * rows * T + at) * BLOCK_N + n
                tl.store(dB + sums, tl.sum(g * (dt_t * u_t)[None, :], 1), mask=state)
                tl.store(dC + sums, tl.sum(h * dy_t[None, :], 1), mask=state)
                h = before[STEPS - 1 - i]
                g *= decays[STEPS - 1 - i]
                through = g * h
                dA_sum += through * dt_t[None, :]
                tl.store(du + at * D + d, dw * dt_t, mask=here)
                tl.store(ddt + at * D + d, dw * u_t + tl.sum(through * rates, 0), mask=here)
        tl.debug_barrier()  # and read, before the next block writes there
    tl.store(dA + mine * BLOCK_N * D + tile, dA_sum)
    if tl.program_id(2) == 0:
        tl.store(dstart + row * BLOCK_N * D + tile, g)


@triton.jit
def _ends(
    x,
    dt,
    A,
    V,
    reset,
    ends,
    decays,
    LENGTH,
    T,
    D,
    REVERSE: tl.constexpr,
    RESETS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Where each stretch ends when it starts at zero, and how much of its start it keeps.

    x V is u B; in reverse it is dy C, and what walks is the gradient of the state.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    mine = tl.cast(tl.program_id(2), tl.int64) * tl.num_programs(0) + row
    d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.cast(tl.arange(0, BLOCK_N), tl.int64)
    tile = n[:, None] * D + d[None, :]
    exponent = tl.load(A + tile) * LOG2_E
    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    elapsed = tl.zeros((BLOCK_D,), tl.float32)
    kept = 1.0
    begin = tl.cast(tl.program_id(2), tl.int64) * LENGTH
    length = tl.minimum(LENGTH, T - begin)
    for first in range(0, length, STEPS):
        for i in tl.static_range(STEPS):
            step = first + i
            there = step < length
            t = tl.cast(begin, tl.int64) + (length - 1 - step if REVERSE else step)
            at = row * T + t
            here, state = d < tl.where(there, D, 0), n < tl.where(there, BLOCK_N, 0)
            x_t = tl.load(x + at * D + d, mask=here, other=0.0).to(tl.float32)
            dt_t = tl.load(dt + at * D + d, mask=here, other=0.0).to(tl.float32)
            V_t = tl.load(V + at * BLOCK_N + n, mask=state, other=0.0).to(tl.float32)
            decay = tl.exp2(exponent * dt_t[None, :])
            elapsed += dt_t
            if RESETS:
                empty = tl.load(reset + at, mask=there, other=0) != 0
                decay = tl.where(empty, 0.0, decay)
                kept = tl.where(empty, 0.0, kept)
            if REVERSE:
                h = decay * (h + V_t[:, None] * x_t[None, :])
            else:
                h = decay * h + V_t[:, None] * (dt_t * x_t)[None, :]
    tl.store(ends + mine * BLOCK_N * D + tile, h)
    tl.store(decays + mine * BLOCK_N * D + tile, kept * tl.exp2(exponent * elapsed[None, :]))


def _variants() -> tuple[Variant, ...]:
    narrow = ("x", "V", "u", "dt", "B", "C", "du", "ddt")
    made = []
    for kernel in (_ends, _forward, _backward):
        for states, dtype in zip(STATES, ("*bf16", "*fp32", "*bf16"), strict=True):
            names = kernel.arg_names[: kernel.arg_names.index("LENGTH")]
            types = {n: dtype if n in narrow else "*fp32" for n in names}
            types |= {"reset": "*i1", "LENGTH": "i32", "T": "i32", "D": "i32"}
            fixed = {"RESETS": dtype == "*fp32"} | ({"REVERSE": True} if kernel is _ends else {})
            made.append(Variant(kernel, types, fixed | _config(kernel, states)))
    return tuple(made)


KERNELS = _variants()
