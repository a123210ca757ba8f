"""The causal long convolution by FFT, a block of channels at a time so that spectra stay in cache.

With documents, time is halved again and again: across the middle of a stretch of 2m tokens only one
document reaches, so its part of the left half is convolved into its part of the right half, and
the halves are stretches of their own. The masks are then a factor of the input and one of the
output, which FFTs allow, and a transform of 2m points does: what wraps around it lands in the left
half of the result, which is not read.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fft import irfft, rfft
from torch.nn.functional import pad

CACHE = 1 << 19  # numbers in a block: 2 MB of float32; whole tensors take up to twice the time
SMALL = 32  # halves up to here are multiplied by Toeplitz matrices, a third of the FFT's time
WHOLE = 1 << 26  # numbers in a block on a GPU, where only memory bounds it


def forward(u: Tensor, kernel: Tensor, runs: Tensor | None) -> Tensor:
    """See `seqzoo.kernels.long_conv.long_conv`; `runs` numbers the documents of each row."""
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    for c in _blocks(u, kernel):
        x, k = u[..., c].transpose(1, 2), kernel[c]
        part = _convolve(x, k) if runs is None else _convolve_runs(x, k, runs)
        y[..., c] = part.transpose(1, 2)
    return y


def backward(u: Tensor, kernel: Tensor, runs: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u and kernel.

    du_s = sum_{t >= s} kernel_{t-s} dy_t and dkernel_l = sum_t dy_t u_{t-l}: both are products with
    a conjugate spectrum.
    """
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    dkernel = torch.zeros_like(kernel, memory_format=torch.contiguous_format)
    for c in _blocks(u, kernel):
        x, k, dx = u[..., c].transpose(1, 2), kernel[c], dy[..., c].transpose(1, 2)
        parts = _correlate(x, k, dx) if runs is None else _correlate_runs(x, k, dx, runs)
        du[..., c], dkernel[c] = parts[0].transpose(1, 2), parts[1]
    return du, dkernel


def _convolve(x: Tensor, k: Tensor) -> Tensor:
    """(B, C, T) with (C, L)."""
    n = _size(x.shape[2] + k.shape[1] - 1)
    y: Tensor = irfft(rfft(x, n).mul_(rfft(k, n)), n)
    return y[..., : x.shape[2]]


def _correlate(x: Tensor, k: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    T, L = x.shape[2], k.shape[1]
    n = _size(T + L - 1)
    spectrum = rfft(dy, n)
    dk = irfft((spectrum * rfft(x, n).conj()).sum(0), n)[:, :L]
    return irfft(spectrum.mul_(rfft(k, n).conj()), n)[..., :T], dk


def _convolve_runs(x: Tensor, k: Tensor, runs: Tensor) -> Tensor:
    T = x.shape[2]
    y = _even(k[:, :1] * x)
    x, k = _even(x), pad(k, (0, max(0, y.shape[2] - k.shape[1])))
    for m, left, right in _levels(runs):
        inputs, lags = torch.where(left, _halves(x, m)[..., :m], 0), k[:, : 2 * m]
        if m <= SMALL:
            part = inputs @ lags[:, _toeplitz(m, x.device)]
        else:
            spectrum = rfft(inputs, 2 * m).mul_(rfft(lags, 2 * m)[:, None])
            part = irfft(spectrum, 2 * m)[..., m:]
        _halves(y, m)[..., m:] += torch.where(right, part, 0)
    return y[..., :T]


def _correlate_runs(x: Tensor, k: Tensor, dy: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    T, L = x.shape[2], k.shape[1]
    dx, same_time = _even(k[:, :1] * dy), (x * dy).sum((0, 2))
    x, dy, k = _even(x), _even(dy), pad(k, (0, max(0, dx.shape[2] - L)))
    dk = torch.zeros_like(k)
    dk[:, 0] = same_time
    for m, left, right in _levels(runs):
        inputs, lags = torch.where(left, _halves(x, m)[..., :m], 0), k[:, : 2 * m]
        outputs = torch.where(right, _halves(dy, m)[..., m:], 0)
        if m <= SMALL:
            lag = _toeplitz(m, x.device)
            part = outputs @ lags[:, lag].mT
            pairs = torch.einsum("bcns,bcnt->cst", inputs, outputs)
            dk.index_add_(1, lag.flatten(), pairs.flatten(1))
        else:
            spectrum = rfft(pad(outputs, (m, 0)), 2 * m)
            across = (spectrum * rfft(inputs, 2 * m).conj()).sum((0, 2))
            dk[:, : 2 * m] += irfft(across, 2 * m)
            part = irfft(spectrum.mul_(rfft(lags, 2 * m).conj()[:, None]), 2 * m)[..., :m]
        _halves(dx, m)[..., :m] += torch.where(left, part, 0)
    return dx[..., :T], dk[:, :L]


def _toeplitz(m: int, device: torch.device) -> Tensor:
    """(m, m): the lag from each token of a left half to each of its right half."""
    step = torch.arange(m, device=device)
    return m + step - step[:, None]


def _levels(runs: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each half-length m: which tokens of left and right halves are in the middle document."""
    T = runs.shape[1]
    runs = _even(runs[:, None] + 1)  # padding is of no document
    m = 1
    while m < T:
        halves = _halves(runs, m)
        middle = halves[..., m - 1 : m]
        yield m, halves[..., :m] == middle, halves[..., m:] == middle
        m *= 2


def _halves(x: Tensor, m: int) -> Tensor:
    """(B, C, T) as stretches of 2m: a view (B, C, T / 2m, 2m)."""
    return torch.unflatten(x, 2, (-1, 2 * m))


def _even(x: Tensor) -> Tensor:
    """Time padded with zeros to a power of two."""
    T = x.shape[2]
    return pad(x, (0, (1 << (T - 1).bit_length()) - T)).contiguous()


def _blocks(u: Tensor, kernel: Tensor) -> Iterator[slice]:
    """Slices of channels."""
    B, T, D = u.shape
    if u.numel() == 0:
        return
    room = CACHE if u.device.type == "cpu" else WHOLE
    width = max(1, room // (B * (T + kernel.shape[1])))
    for first in range(0, D, width):
        yield slice(first, first + width)


def _size(least: int) -> int:
    """The smallest even 2^a 3^b 5^c that is at least `least`: such sizes transform fast."""
    best = 1 << max(least - 1, 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = 2 * three
            while two < least:
                two *= 2
            best = min(best, two)
            three *= 3
        five *= 5
    return best
