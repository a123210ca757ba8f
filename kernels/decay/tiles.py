"""What the Triton programs of decayed linear attention do with tiles: rows are a chunk's tokens."""

import triton
import triton.language as tl


@triton.jit
def product(x, y, PRECISION: tl.constexpr, EXACT: tl.constexpr = False):
    """X y in float32, with factors in parts as `fused.py` says; EXACT: one part is all of x."""
    if PRECISION == "bf16":
        y = y.to(tl.bfloat16)
        part = x.to(tl.bfloat16)
        made = tl.dot(part, y, input_precision="ieee")
        if not EXACT:
            rest = (x - part.to(tl.float32)).to(tl.bfloat16)
            made = tl.dot(rest, y, made, input_precision="ieee")
        return made
    else:
        return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def sums(counted, x, PRECISION: tl.constexpr):
    """Row s: the sum of rows t of x with counted[s, t]; in 16 bits, or in 24 for float32."""
    if PRECISION == "ieee":
        return tl.dot(tl.where(counted, 1.0, 0.0), x, input_precision="ieee")
    else:
        ones = tl.where(counted, 1.0, 0.0).to(tl.bfloat16)
        part = x.to(tl.bfloat16)
        rest = x - part.to(tl.float32)
        less = rest.to(tl.bfloat16)
        made = tl.dot(ones, less, input_precision="ieee")
        if PRECISION == "bf16x6":
            least = (rest - less.to(tl.float32)).to(tl.bfloat16)
            made += tl.dot(ones, least, input_precision="ieee")
        return made + tl.dot(ones, part, input_precision="ieee")


@triton.jit
def rows(x, b, t, h, c, LIMIT, T, H, D):
    """Tokens t and channels c of head h of x (B, T, H, D), with zeros from LIMIT and D on."""
    at = ((tl.cast(b, tl.int64) * T + t) * H + h)[:, None] * D + c[None, :]
    there = (t < LIMIT)[:, None] & (c < D)[None, :]
    return tl.load(x + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def square(BACK: tl.constexpr, BLOCK_T: tl.constexpr):
    """Where a chunk's scores lie, from its first; with BACK transposed."""
    r = tl.cast(tl.arange(0, BLOCK_T), tl.int64)
    if BACK:
        return r[:, None] + r[None, :] * BLOCK_T
    else:
        return r[:, None] * BLOCK_T + r[None, :]


@triton.jit
def gates(g, b, t, h, c, first, T, H, D, UNTIL: tl.constexpr, BLOCK_T: tl.constexpr):
    """Log decays whose running sum is what a token keeps: from the chunk's begin, or to its end."""
    end = tl.minimum(first + BLOCK_T, T)
    return rows(g, b, t + 1 if UNTIL else t, h, c, end, T, H, D)


@triton.jit
def is_right(level, BLOCK_T: tl.constexpr):
    """Whether a token is in the right half of its block, (BLOCK_T, 1)."""
    return (((tl.arange(0, BLOCK_T) >> level) & 1) == 1)[:, None]


@triton.jit
def climb(since, until, level, BLOCK_T: tl.constexpr):
    """Exponents from the border behind and to the border ahead, for blocks twice as large."""
    r = tl.arange(0, BLOCK_T)
    last = (((r >> level) ^ 1) << level) + (1 << level) - 1
    beside = tl.gather(since, tl.broadcast_to(last[:, None], since.shape), 0)
    right = is_right(level, BLOCK_T)
    return tl.where(right, since + beside, since), tl.where(right, until, until + beside)


@triton.jit
def running(x, BLOCK_T: tl.constexpr):
    """Row s: the sum of the rows up to s. A single column as a vector: 3.6 fails to compile it."""
    if x.shape[1] == 1:
        return tl.cumsum(tl.reshape(x, (BLOCK_T,)), 0)[:, None]
    else:
        return tl.cumsum(x, 0)


@triton.jit
def sum_before(x, BLOCK_T: tl.constexpr, OWN: tl.constexpr):
    """Row s: the sum of the rows of x before it, with OWN its own too."""
    summed = running(x, BLOCK_T)
    if OWN:
        return summed
    else:
        r = tl.arange(0, BLOCK_T)
        last = tl.broadcast_to(tl.maximum(r - 1, 0)[:, None], x.shape)
        return tl.where((r == 0)[:, None], 0.0, tl.gather(summed, last, 0))


@triton.jit
def sum_behind(x, BLOCK_T: tl.constexpr, OWN: tl.constexpr):
    """Row s: the sum of the rows of x behind it, with OWN its own too; (BLOCK_T, ...)."""
    r = tl.arange(0, BLOCK_T)
    turned = tl.broadcast_to((BLOCK_T - 1 - r)[:, None], x.shape)
    summed = running(tl.gather(x, turned, 0), BLOCK_T)
    if OWN:
        return tl.gather(summed, turned, 0)
    else:
        return tl.where(
            (r == BLOCK_T - 1)[:, None], 0.0, tl.gather(summed, tl.maximum(turned - 1, 0), 0)
        )
