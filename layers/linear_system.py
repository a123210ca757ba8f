"""Linear time-invariant systems of every channel, run as a convolution that carries a state.

    h_t = A h_{t-1} + b u_t,  y_t = c h_t + skip u_t

What S4, S4D, DSS, H3 and the moving average of MEGA share. A system says what its kernel c A^l b
is, how a state sounds when nothing comes in, how it decays, and what state the inputs leave; from
these `convolve` gives outputs and final state in O(T log T), through masks and documents.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqzoo.kernels.long_conv import long_conv
from seqzoo.kernels.scan import scan
from seqzoo.kernels.tokens import take

BLOCK = 64  # exp(l log A) is exp(64 i log A) exp(j log A): T / 64 + 64 exponentials, not T
STEPS = 16  # passes up to this length run the recurrence


class LinearSystem(Protocol):
    """One system a channel, with states (B, D, M), real or complex."""

    def kernel(self, length: int, like: Tensor) -> Tensor:
        """The kernel c A^l b, l < length: (D, length), in the real dtype of `like`."""

    def free(self, h: Tensor, length: int, like: Tensor) -> Tensor:
        """What the state h sounds like alone, c A^(t+1) h, t < length: (B, D, length)."""

    def advance(self, h: Tensor, count: Tensor) -> Tensor:
        """What is left of the state, A^count h, count (B,) int64."""

    def collect(self, u: Tensor) -> Tensor:
        """What inputs u (B, T, D) leave behind, sum_t A^(T-1-t) b u_t: (B, D, M)."""


class Diagonal(NamedTuple):
    """A system with diagonal A = exp(log_a) and y = Re(c h); each (D, M), complex128.

    In complex128: an angle of log A times thousands of steps has no digits left in float32.
    """

    log_a: Tensor
    b: Tensor
    c: Tensor

    def kernel(self, length: int, like: Tensor) -> Tensor:
        """See `LinearSystem`."""
        return response(self.b * self.c, self.log_a, length, like)

    def free(self, h: Tensor, length: int, like: Tensor) -> Tensor:
        """See `LinearSystem`."""
        return response(self.log_a.exp() * self.c * h, self.log_a, length, like)

    def advance(self, h: Tensor, count: Tensor) -> Tensor:
        """See `LinearSystem`."""
        return torch.exp(self.log_a * count[:, None, None]).to(h.dtype) * h

    def collect(self, u: Tensor) -> Tensor:
        """See `LinearSystem`: one partial sum a block of time."""
        T, device, narrow = u.shape[1], u.device, complex_like(u)
        blocks = -(-T // BLOCK)
        u = torch.unflatten(pad(u, (0, 0, blocks * BLOCK - T, 0)), 1, (blocks, BLOCK))
        fast = _powers(self.log_a, torch.arange(BLOCK - 1, -1, -1, device=device)).to(narrow)
        coarse = torch.arange(blocks - 1, -1, -1, device=device) * BLOCK
        slow = _powers(self.log_a, coarse).to(narrow)
        parts = torch.einsum("bijd,djm->bdim", u, torch.view_as_real(fast).flatten(-2))
        pairs = torch.unflatten(parts, -1, (-1, 2)).contiguous()
        return (torch.view_as_complex(pairs) * slow).sum(2) * self.b.to(narrow)


def run_diagonal(
    system: Diagonal,
    u: Tensor,
    h: Tensor | None,
    skip: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Outputs and final state: the recurrence over few tokens, `convolve` over many."""
    u = u if mask is None else torch.where(mask[..., None], u, 0)
    if u.shape[1] > STEPS or (h is None and mask is None):
        return convolve(system, u, h, skip, mask, reset)
    narrow = complex_like(u)
    log_a, b, c = system
    a = torch.exp(log_a).to(narrow).flatten().expand(*u.shape[:2], -1)
    inputs = (u[..., None] * b.to(narrow)).flatten(2)
    start = None if h is None else h.to(narrow).flatten(1)
    states, last = scan(a, inputs, initial_state=start, reset=reset, mask=mask)
    y = (torch.unflatten(states, -1, c.shape) * c.to(narrow)).real.sum(-1) + skip.to(u.dtype) * u
    return y, torch.unflatten(last, -1, c.shape)


def convolve(
    system: LinearSystem,
    u: Tensor,
    h: Tensor | None,
    skip: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Outputs and final state by convolution over the real tokens, brought to the row's end.

    Args:
        system: one system a channel.
        u: (B, T, D), float32 or wider, zero where `mask` is False.
        h: state before the first token, (B, D, M); None starts at zero and asks for none back.
        skip: (D,).
        mask: (B, T) bool, False = the token is not there.
        reset: (B, T) bool, True empties the state before the token.
    """
    T = u.shape[1]
    document = None if reset is None else reset.cumsum(1)
    begun = document
    order = None if mask is None else mask.to(torch.int8).argsort(dim=1, stable=True)
    if order is not None:  # what is masked comes first, as zeros: nothing yet
        u = take(u, order)
        document = None if document is None else document.gather(1, order)
    y = long_conv(u, system.kernel(max(T, 1), u), skip=skip, document=document)
    if order is not None:
        y = take(y, order.argsort(dim=1))
    if h is None:
        return y, None
    free = system.free(h, T, u).transpose(1, 2)
    count = torch.full_like(u[:, 0, 0], T, dtype=torch.long) if mask is None else mask.sum(1)
    if mask is not None:
        free = take(free, (mask.cumsum(1) - 1).clamp(min=0))
    kept = system.advance(h, count)
    if begun is not None and document is not None:
        free = torch.where(begun[..., None] == 0, free, 0)
        kept = torch.where(begun[:, -1, None, None] == 0, kept, 0)
        u = torch.where((document == begun[:, -1:])[..., None], u, 0)
    return y + free, kept + system.collect(u)


def discretise(A: Tensor, dt: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """The logarithm of A' and what b' is of b, for diagonal A under `rule`, `zoh` or `bilinear`."""
    if rule == "zoh":
        return dt * A, torch.expm1(dt * A) / A
    half = dt * A / 2
    return torch.log((1 + half) / (1 - half)), dt / (1 - half)


def response(weight: Tensor, log_a: Tensor, length: int, like: Tensor) -> Tensor:
    """Re sum_n weight_n exp(l log_a_n), l < length: (..., D, length), real like `like`."""
    device, narrow = log_a.device, complex_like(like)
    coarse = torch.arange(-(-length // BLOCK), device=device) * BLOCK
    slow = weight[..., None, :].to(narrow) * _powers(log_a, coarse).to(narrow)
    fast = _powers(log_a, torch.arange(BLOCK, device=device)).to(narrow).conj().resolve_conj()
    # Re(z w) is the product of the real pairs of z and conj(w).
    slow, fast = (torch.view_as_real(x).flatten(-2) for x in (slow, fast))
    return torch.einsum("...dim,djm->...dij", slow, fast).flatten(-2)[..., :length]


def kernel_flops(channels: int, states: int, length: int) -> int:
    """FLOPs of `response` without a batch, for `states` complex states a channel."""
    return 2 * channels * 2 * states * BLOCK * -(-max(length, 1) // BLOCK)


def complex_like(x: Tensor) -> torch.dtype:
    """The complex dtype whose parts have the precision of `x`."""
    return torch.complex128 if x.dtype == torch.float64 else torch.complex64


def _powers(log_a: Tensor, steps: Tensor) -> Tensor:
    """exp(steps log_a), (D, S, M): the exponential of the product, never powers."""
    return torch.exp(log_a[:, None] * steps[:, None])
