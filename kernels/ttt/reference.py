"""The definition of test-time training of a linear model: a loop over time."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    share: Tensor,
    W: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor,
    last: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.ttt.ttt`.

    Here q and k end in a one, rate and share are (B, T, H, 1), W (H, K, V) has b for its last row,
    weight and bias are (H, 1, V), and `last` (B, T) says where a mini-batch ends.
    """
    learned, G = initial_state.unbind(1)
    o = []
    for t in range(v.shape[1]):
        if reset is not None:
            learned, G = (torch.where(reset[:, t, None, None, None], 0, x) for x in (learned, G))
        Q, K, V, eta, s = (x[:, t, :, None] for x in (q, k, v, rate, share))
        g = gradient(K @ (W + learned), V, weight, bias, eps)
        after = G + K.mT @ (eta * g)
        moved = learned - s * after
        o.append(Q @ (W + moved))
        ends = last[:, t, None, None, None]
        new, rest = torch.where(ends, moved, learned), torch.where(ends, 0, after)
        if mask is not None:
            real = mask[:, t, None, None, None]
            new, rest = torch.where(real, new, learned), torch.where(real, rest, G)
        learned, G = new, rest
    return torch.cat(o, dim=2).transpose(1, 2), torch.stack([learned, G], dim=1)


def gradient(Z: Tensor, v: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Of |weight norm(Z) + bias - v|^2 / 2 with respect to Z, over the last dimension."""
    size = Z.shape[-1:]
    x = layer_norm(Z, size, eps=eps)
    e = weight * (weight * x + bias - v)
    std = (Z.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return (e - e.mean(-1, keepdim=True) - x * (e * x).mean(-1, keepdim=True)) / std
