# Tuples grow inside kernels: a checker would call each an assignment of another type.
# mypy: disable-error-code="assignment"
"""The short convolution in Triton.

A program owns a row, a block of channels and a stretch of time, and has all inputs of a few tokens'
windows in registers. Backward, it makes the outputs of these tokens and of the W - 1 behind them
again and gathers, for each input, from those that saw it. Gradients of weights are summed by
program and added afterwards, in an order that never changes. More taps would not fit in registers.

Documents arrive as the age of each token in its own, as far as a window reaches. With a mask the
unmasked tokens move together first, as in `seqzoo.kernels.short_conv.chunked`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from seqzoo.kernels.fused import OPTIONS, Variant

TAPS = 4  # the most
FORWARD = {"STEPS": 8, "BLOCK_D": 128, "num_warps": 2}
BACKWARD = {"STEPS": 4, "BLOCK_T": 64, "BLOCK_D": 128, "num_warps": 2}


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.short_conv.short_conv`.

    x, and with it y, are float32, float16 or bfloat16, the other numbers float32.
    """
    if mask is not None:
        order = _order(mask, tail)
        y, last = forward(*_packed(x, weight, bias, tail, reset, mask, order), None, silu)
        y = functional.pad(y, (0, 0, tail.shape[1], 0))
        return _unpacked(y, order, mask, tail)[0].to(x.dtype), last
    x, weight, bias, tail = (v.contiguous() for v in (x, weight, bias, tail))
    y, last = torch.empty_like(x), tail.clone()
    if x.numel():
        ages = _ages(x, weight, reset)
        _launch(_forward, x.shape[1], x, weight, bias, tail, ages, y, last, silu=silu)
    return y, last


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    dy: Tensor,
    dtail: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the tail that came in, each in its dtype."""
    if mask is not None:
        order = _order(mask, tail)
        packed = _packed(x, weight, bias, tail, reset, mask, order)
        dy = _packed(dy, weight, bias, torch.zeros_like(tail), None, mask, order)[0]
        dx, dweight, dbias, dstart = backward(*packed, None, dy, dtail, silu)
        dx, dstart = _unpacked(torch.cat([dstart, dx], dim=1), order, mask, tail)
        return dx.to(x.dtype), dweight, dbias, dstart
    (B, T, D), W = x.shape, weight.shape[1]
    given = [v.contiguous() for v in (x, weight, bias, tail)]
    dy, dlast, dx = dy.contiguous(), dtail.contiguous(), torch.empty_like(given[0])
    dstart = dlast.clone()
    if x.numel() == 0:
        return dx, torch.zeros_like(given[1]), torch.zeros_like(bias), dstart
    tiles = triton.cdiv(T + W - 1, BACKWARD["BLOCK_T"])
    sums = weight.new_empty(B * tiles, W + 1, D)  # bias last
    made = (dx, sums, dstart)
    _launch(_backward, T + W - 1, *given, _ages(x, weight, reset), dy, dlast, *made, silu=silu)
    total = sums.sum(0)
    return dx, total[:W].t().contiguous(), total[W].clone(), dstart


def _ages(x: Tensor, weight: Tensor, reset: Tensor | None) -> Tensor:
    """Tokens since the last reset, (B, T) int8, at most W; empty when nothing is ever reset."""
    if reset is None:
        return x.new_empty(0, dtype=torch.int8)
    W = weight.shape[1]
    now = torch.arange(x.shape[1], device=x.device)
    begun = torch.where(reset, now, -W).cummax(1).values
    return (now - begun).clamp(max=W).to(torch.int8)


def _order(mask: Tensor, tail: Tensor) -> Tensor:
    """Slots of [tail, x] with the masked ones first, each kind in its order, (B, W-1+T)."""
    return functional.pad(mask, (tail.shape[1], 0), value=True).byte().argsort(dim=1, stable=True)


def _packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor,
    reset: Tensor | None,
    mask: Tensor,
    order: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The same convolution at the right end of each row; no window there meets a masked slot."""
    past = tail.shape[1]
    x = torch.where(mask[..., None], x, 0).to(tail.dtype)
    x = torch.cat([tail, x], dim=1).gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    if reset is not None:
        reset = functional.pad(reset, (past, 0)).gather(1, order)[:, past:]
    return x[:, past:], weight, bias, x[:, :past], reset


def _unpacked(x: Tensor, order: Tensor, mask: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Slots (B, W-1+T, D) back in their places: those of the tokens, and those of the tail."""
    past = tail.shape[1]
    x = torch.empty_like(x).scatter_(1, order[..., None].expand_as(x), x)
    return torch.where(mask[..., None], x[:, past:], 0), x[:, :past].contiguous()


def _launch(kernel: triton.JITFunction, length: int, *given: Tensor, silu: bool) -> None:
    x, weight, _, _, ages = given[:5]
    B, T, D = x.shape
    config = _config(kernel, weight.shape[1]) | {"SILU": silu, "RESETS": ages.numel() > 0}
    tiles = triton.cdiv(length, config.get("BLOCK_T", config["STEPS"]))
    with torch.cuda.device_of(x):
        kernel[(B * tiles, triton.cdiv(D, config["BLOCK_D"]))](
            *given, tiles, T, D, **config, **OPTIONS
        )


def _config(kernel: triton.JITFunction, taps: int) -> dict[str, int]:
    config = FORWARD if kernel is _forward else BACKWARD
    return config | {"TAPS": taps}


@triton.jit
def _input(x, tail, row, t, T, D, d, TAPS: tl.constexpr, PAST: tl.constexpr):
    """The input of token t; below 0, and only with PAST, out of the tail."""
    at = tl.cast(row, tl.int64) * T + t
    here = d < tl.where((t >= 0) & (t < T), D, 0)
    x_t = tl.load(x + at * D + d, mask=here, other=0.0).to(tl.float32)
    if PAST:
        slot = tl.cast(row, tl.int64) * (TAPS - 1) + t + (TAPS - 1)
        here = d < tl.where((t < 0) & (t > -TAPS), D, 0)
        x_t += tl.load(tail + slot * D + d, mask=here, other=0.0)
    return x_t


@triton.jit
def _weights(weight, bias, D, d, TAPS: tl.constexpr):
    """The weight of each tap, oldest first, then the bias."""
    d = tl.cast(d, tl.int64)
    made = ()
    for j in tl.static_range(TAPS):
        made += (tl.load(weight + d * TAPS + j, mask=d < D, other=0.0),)
    made += (tl.load(bias + d, mask=d < D, other=0.0),)
    return made


@triton.jit
def _window(x_t, age, distance: tl.constexpr, RESETS: tl.constexpr):
    """An input as a token of that age sees it from a distance."""
    return tl.where(age >= distance, x_t, 0.0) if RESETS else x_t


@triton.jit
def _forward(
    x,
    weight,
    bias,
    tail,
    ages,
    y,
    last,
    tiles,
    T,
    D,
    SILU: tl.constexpr,
    RESETS: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.cast(tl.program_id(0) // tiles, tl.int64)
    tile = tl.cast(tl.program_id(0) % tiles, tl.int64)
    d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    weights = _weights(weight, bias, D, d, TAPS)
    first = tile * STEPS
    inputs = ()
    for i in tl.static_range(TAPS - 1 + STEPS):
        t = first + (i - (TAPS - 1))
        inputs += (_input(x, tail, row, t, T, D, d, TAPS, i < TAPS - 1),)
    made = ()  # stored below: no load waits behind a store
    for i in tl.static_range(STEPS):
        t = first + i
        age = tl.load(ages + row * T + t, mask=t < T, other=0) if RESETS else 0
        z = weights[TAPS]
        for j in tl.static_range(TAPS):
            z += weights[j] * _window(inputs[i + j], age, TAPS - 1 - j, RESETS)
        made += (z * tl.sigmoid(z) if SILU else z,)
    for i in tl.static_range(STEPS):
        t = first + i
        tl.store(y + (row * T + t) * D + d, made[i], mask=d < tl.where(t < T, D, 0))
    if tile == tiles - 1:
        oldest = tl.load(ages + row * T + (T - 1)) if RESETS else 0
        for j in tl.static_range(TAPS - 1):
            t = tl.cast(T, tl.int64) - (TAPS - 1) + j
            x_t = _input(x, tail, row, t, T, D, d, TAPS, True)
            x_t = _window(x_t, oldest, TAPS - 2 - j, RESETS)
            tl.store(last + (row * (TAPS - 1) + j) * D + d, x_t, mask=d < D)


@triton.jit
def _backward(
    x,
    weight,
    bias,
    tail,
    ages,
    dy,
    dlast,
    dx,
    sums,
    dstart,
    tiles,
    T,
    D,
    SILU: tl.constexpr,
    RESETS: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Time begins with the tail, at -(TAPS - 1): its inputs have gradients too."""
    mine = tl.cast(tl.program_id(0), tl.int64)
    row = tl.cast(tl.program_id(0) // tiles, tl.int64)
    begin = tl.cast(tl.program_id(0) % tiles, tl.int64) * BLOCK_T - (TAPS - 1)
    d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    weights = _weights(weight, bias, D, d, TAPS)
    total = ()
    for _ in tl.static_range(TAPS + 1):
        total += (tl.zeros((BLOCK_D,), tl.float32),)
    oldest = tl.load(ages + row * T + (T - 1)) if RESETS else TAPS
    for part in range(0, tl.minimum(BLOCK_T, T - begin), STEPS):
        first = begin + part
        inputs, seen, gradients = (), (), ()
        for i in tl.static_range(STEPS + 2 * (TAPS - 1)):
            t = first + (i - (TAPS - 1))
            inputs += (_input(x, tail, row, t, T, D, d, TAPS, i < 2 * (TAPS - 1)),)
        for i in tl.static_range(STEPS + TAPS - 1):  # of each output before the activation
            t = first + i
            here = (t >= 0) & (t < T)
            age = tl.load(ages + row * T + t, mask=here, other=0) if RESETS else 0
            seen += (age,)
            dz = tl.load(dy + (row * T + t) * D + d, mask=d < tl.where(here, D, 0), other=0.0)
            dz = dz.to(tl.float32)
            if SILU:
                z = weights[TAPS]
                for j in tl.static_range(TAPS):
                    z += weights[j] * _window(inputs[i + j], age, TAPS - 1 - j, RESETS)
                s = tl.sigmoid(z)
                dz *= s * (1.0 + z * (1.0 - s))
            gradients += (dz,)
        added = ()
        for j in tl.static_range(TAPS + 1):
            summed = tl.zeros((BLOCK_D,), tl.float32)
            for i in tl.static_range(STEPS):
                if j < TAPS:
                    x_t = _window(inputs[i + j], seen[i], TAPS - 1 - j, RESETS)
                    summed += gradients[i] * x_t
                else:
                    summed += gradients[i]
            added += (total[j] + summed,)
        total = added
        made = ()
        for i in tl.static_range(STEPS):
            t = first + i
            g = tl.zeros((BLOCK_D,), tl.float32)
            for j in tl.static_range(TAPS):
                g += weights[TAPS - 1 - j] * _window(gradients[i + j], seen[i + j], j, RESETS)
            if TAPS > 1:
                slot = t - T + (TAPS - 1)
                kept = (slot >= 0) & (t < T) & (T - 1 - t <= oldest)
                at = row * (TAPS - 1) + slot
                g += tl.load(dlast + at * D + d, mask=d < tl.where(kept, D, 0), other=0.0)
            made += (g,)
        for i in tl.static_range(STEPS):
            t = first + i
            here = d < tl.where((t >= 0) & (t < T), D, 0)
            tl.store(dx + (row * T + t) * D + d, made[i], mask=here)
            if i < TAPS - 1:
                at = row * (TAPS - 1) + t + (TAPS - 1)
                tl.store(dstart + at * D + d, made[i], mask=d < tl.where(t < 0, D, 0))
    for j in tl.static_range(TAPS + 1):
        tl.store(sums + (mine * (TAPS + 1) + j) * D + d, total[j], mask=d < D)


def _variants() -> tuple[Variant, ...]:
    narrow = ("x", "y", "dy", "dx")
    made = []
    for kernel in (_forward, _backward):
        for dtype, plain in (("*bf16", True), ("*fp32", False)):
            names = kernel.arg_names[: kernel.arg_names.index("tiles")]
            types = {n: dtype if n in narrow else "*fp32" for n in names}
            types |= {"ages": "*i8", "tiles": "i32", "T": "i32", "D": "i32"}
            fixed = {"SILU": True, "RESETS": not plain}
            made.append(Variant(kernel, types, fixed | _config(kernel, TAPS), plain))
    return tuple(made)


KERNELS = _variants()
