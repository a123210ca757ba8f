"""The short convolution in vectorised torch: tap after tap, each over the whole sequence."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from seqzoo.kernels.tokens import take

SMALL = 2**14  # scalars below which the plain sum beats the set-up of a library convolution


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.short_conv.short_conv`; all tensors share one dtype.

    With a mask the unmasked slots of [tail, x] move to the right end of their row, in order, and
    the results move back: a tail's worth of them is always there, so no window meets a masked slot.
    """
    T, W = x.shape[1], weight.shape[1]
    x = torch.cat([tail, x], dim=1)
    if reset is not None:
        reset = torch.cat([reset.new_zeros(len(reset), W - 1), reset], dim=1)
    if mask is not None:
        order = torch.cat([mask.new_ones(len(mask), W - 1), mask], dim=1)
        order = order.byte().argsort(dim=1, stable=True)
        x = take(x, order)
        reset = None if reset is None else reset.gather(1, order)
    if reset is None:
        y, tail = _convolve(x, weight, bias), x[:, T:]
    else:
        y, tail = _convolve_documents(x, weight, bias, reset)
    if mask is not None:
        count = mask.long().cumsum(1)  # unmasked tokens so far fill the end of the row
        slot = (T - count[:, -1:] + count - 1).clamp(min=0)
        y = torch.where(mask[..., None], take(y, slot), 0)
    return y, tail.clone()  # a view would keep the whole sequence alive


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, W-1+T, D) -> (B, T, D)."""
    W = weight.shape[1]
    T = x.shape[1] - (W - 1)
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() >= SMALL:
        # As an image of height 1 with channels last, which oneDNN takes without a copy: measured 4
        # times faster than the sum below and than conv1d, which wants channels first.
        image = x.transpose(1, 2)[:, :, None]
        image = conv2d(image, weight[:, None, None], bias, groups=len(weight))
        return image[:, :, 0].transpose(1, 2)
    y = bias
    for j, column in enumerate(weight.unbind(1)):
        y = torch.addcmul(y, x[:, j : j + T], column)
    return y


def _convolve_documents(
    x: Tensor, weight: Tensor, bias: Tensor, reset: Tensor
) -> tuple[Tensor, Tensor]:
    """The same where tokens of another document count as zeros; also the tail."""
    W = weight.shape[1]
    T = x.shape[1] - (W - 1)
    document = reset.cumsum(1)
    ours = document[:, W - 1 :]
    y = bias.expand(len(x), T, -1)
    for j, column in enumerate(weight.unbind(1)):
        same = document[:, j : j + T] == ours
        y = torch.addcmul(y, torch.where(same[..., None], x[:, j : j + T], 0), column)
    same = document[:, T:] == document[:, -1:]
    return y, torch.where(same[..., None], x[:, T:], 0)
