"""Our kernels as they are measured: random inputs of a length, and a call.

Batch 4, width 256 (or 4 heads of 64), 16 states, 4 taps, a window of 128, float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, softplus

from seqzoo.kernels.attention import attention
from seqzoo.kernels.decay import decay
from seqzoo.kernels.delta import delta
from seqzoo.kernels.long_conv import long_conv
from seqzoo.kernels.scan import scan
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.short_conv import short_conv
from seqzoo.kernels.wkv import wkv

B, D, H, P, N, W, WINDOW = 4, 256, 4, 64, 16, 4, 128
SIZES = {"batch": B, "width": D, "heads": H, "head width": P, "states": N, "taps": W}
SIZES["window"] = WINDOW
Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]


class Operation(NamedTuple):
    """How to make the inputs of so many tokens, and how to call the kernel on them."""

    make: Callable[[int], Inputs]
    run: Run


def _for_selective_scan(T: int) -> Inputs:
    u, dt = torch.randn(B, T, D), softplus(torch.randn(B, T, D) - 4)
    A = -torch.arange(1.0, N + 1).repeat(D, 1)
    return {"u": u, "dt": dt, "A": A, "B": torch.randn(B, T, N), "C": torch.randn(B, T, N)}


def _for_decay(T: int) -> Inputs:
    q, k, v = torch.randn(3, B, T, H, P).unbind()
    return {"q": q, "k": k, "v": v, "dt": softplus(torch.randn(B, T, H) - 2)}


def _for_delta(T: int) -> Inputs:
    q, k, v = torch.randn(3, B, T, H, P).unbind()
    return {"q": q, "k": normalize(k, dim=-1), "v": v, "beta": torch.rand(B, T, H)}


def _for_gated_delta(T: int, *channels: int) -> Inputs:
    return _for_delta(T) | {"log_decay": -softplus(torch.randn(B, T, H, *channels) - 2)}


def _delta(x: Inputs) -> Tensor:
    return delta(*x.values(), scale=P**-0.5)[0]


def _mamba2(x: Inputs) -> Tensor:
    return decay(x["q"], x["k"], x["v"] * x["dt"][..., None], -x["dt"])[0]


def _for_form(*decay: int) -> Callable[[int], Inputs]:
    """Queries, keys and values, and log decays of the gate of GLA, (B, T, H, *decay) of them."""

    def make(T: int) -> Inputs:
        q, k, v = torch.randn(3, B, T, H, P).unbind()
        return {"q": q, "k": k, "v": v, "g": logsigmoid(torch.randn(B, T, H, *decay)) / 16}

    return make


OPERATIONS = {
    "scan": Operation(
        lambda T: {"a": torch.rand(B, T, D), "b": torch.randn(B, T, D)},
        lambda x: scan(*x.values())[0],
    ),
    "selective_scan": Operation(_for_selective_scan, lambda x: selective_scan(*x.values())[0]),
    "wkv": Operation(
        lambda T: {
            "k": torch.randn(B, T, D),
            "v": torch.randn(B, T, D),
            "w": torch.rand(D),
            "u": torch.randn(D),
        },
        lambda x: wkv(*x.values())[0],
    ),
    "short_conv": Operation(
        lambda T: {"x": torch.randn(B, T, D), "weight": torch.randn(D, W), "bias": torch.randn(D)},
        lambda x: short_conv(*x.values())[0],
    ),
    "long_conv": Operation(
        lambda T: {"u": torch.randn(B, T, D), "kernel": torch.randn(D, T)},
        lambda x: long_conv(*x.values()),
    ),
    "decay": Operation(_for_decay, _mamba2),
    "delta": Operation(_for_delta, _delta),
    "attention": Operation(
        lambda T: dict(zip("qkv", torch.randn(3, B, T, H, P).unbind(), strict=True)),
        lambda x: attention(x["q"], x["k"], x["v"], window=WINDOW),
    ),
}
# Other uses of a kernel, by name.
FORMS = {
    "linear attention": Operation(
        lambda T: dict(zip("qkv", torch.randn(3, B, T, H, P).unbind(), strict=True)),
        lambda x: decay(x["q"], x["k"], x["v"])[0],
    ),
    "Mamba-2": Operation(_for_form(), lambda x: decay(*x.values())[0]),
    "GLA": Operation(_for_form(P), lambda x: decay(*x.values())[0]),
    "Gated DeltaNet": Operation(_for_gated_delta, _delta),
    "KDA": Operation(lambda T: _for_gated_delta(T, P), _delta),
    "no compiler": Operation(
        _for_selective_scan, lambda x: selective_scan(*x.values(), backend="chunked")[0]
    ),
}
