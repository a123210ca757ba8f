"""Our kernels as they are measured: random inputs of a length, and a call."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, softplus

from seqzoo.kernels.attention import attention
from seqzoo.kernels.decay import decay
from seqzoo.kernels.delta import delta
from seqzoo.kernels.delta_lowrank import delta_lowrank
from seqzoo.kernels.long_conv import long_conv
from seqzoo.kernels.scan import scan
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.short_conv import short_conv
from seqzoo.kernels.wkv import wkv

WINDOW = 128
Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]


class Sizes(NamedTuple):
    """Batch B, width D, or heads H of width P; N states, W taps."""

    batch: int
    width: int
    heads: int
    head_width: int
    states: int = 16
    taps: int = 4


SIZES = {"cpu": Sizes(4, 256, 4, 64), "cuda": Sizes(8, 2048, 16, 128)}


class Operation(NamedTuple):
    """How to make the inputs of so many tokens, and how to call the kernel on them."""

    make: Callable[[int, Sizes], Inputs]
    run: Run


def _for_scan(T: int, s: Sizes) -> Inputs:
    shape = (s.batch, T, s.width)
    return {"a": torch.rand(shape), "b": torch.randn(shape)}


def _for_selective_scan(T: int, s: Sizes) -> Inputs:
    wide, narrow = (s.batch, T, s.width), (s.batch, T, s.states)
    u, dt = torch.randn(wide), softplus(torch.randn(wide) - 4)
    A = -torch.arange(1.0, s.states + 1).repeat(s.width, 1)
    return {"u": u, "dt": dt, "A": A, "B": torch.randn(narrow), "C": torch.randn(narrow)}


def _for_wkv(T: int, s: Sizes) -> Inputs:
    k, v = torch.randn(2, s.batch, T, s.width).unbind()
    return {"k": k, "v": v, "w": torch.rand(s.width), "u": torch.randn(s.width)}


def _for_short_conv(T: int, s: Sizes) -> Inputs:
    x, weight = torch.randn(s.batch, T, s.width), torch.randn(s.width, s.taps)
    return {"x": x, "weight": weight, "bias": torch.randn(s.width)}


def _for_long_conv(T: int, s: Sizes) -> Inputs:
    return {"u": torch.randn(s.batch, T, s.width), "kernel": torch.randn(s.width, T)}


def _for_attention(T: int, s: Sizes) -> Inputs:
    parts = torch.randn(3, s.batch, T, s.heads, s.head_width).unbind()
    return dict(zip("qkv", parts, strict=True))


def _for_mamba2(T: int, s: Sizes) -> Inputs:
    dt = softplus(torch.randn(s.batch, T, s.heads) - 2)
    return _for_attention(T, s) | {"dt": dt}


def _for_gla(T: int, s: Sizes, *channels: int) -> Inputs:
    """Log decays of the gate of GLA, a head's or, with `channels`, a channel's."""
    gate = logsigmoid(torch.randn(s.batch, T, s.heads, *channels))
    return _for_attention(T, s) | {"g": gate / 16}


def _for_delta(T: int, s: Sizes) -> Inputs:
    made = _for_attention(T, s)
    keys = {"k": normalize(made["k"], dim=-1)}
    return made | keys | {"beta": torch.rand(s.batch, T, s.heads)}


def _for_gated_delta(T: int, s: Sizes, *channels: int) -> Inputs:
    gate = -softplus(torch.randn(s.batch, T, s.heads, *channels) - 2)
    return _for_delta(T, s) | {"log_decay": gate}


def _for_lowrank(T: int, s: Sizes) -> Inputs:
    """As RWKV-7 has them: what is removed, and how much of it at each key channel."""
    made, shape = _for_attention(T, s), (s.batch, T, s.heads, s.head_width)
    removed = normalize(torch.randn(shape), dim=-1)
    gate = -softplus(torch.randn(shape) - 2)
    return made | {"a": -removed, "b": removed * torch.rand(shape), "log_decay": gate}


def _delta(x: Inputs) -> Tensor:
    return delta(*x.values(), scale=x["q"].shape[-1] ** -0.5)[0]


def _mamba2(x: Inputs) -> Tensor:
    return decay(x["q"], x["k"], x["v"] * x["dt"][..., None], -x["dt"])[0]


OPERATIONS = {
    "scan": Operation(_for_scan, lambda x: scan(*x.values())[0]),
    "selective_scan": Operation(_for_selective_scan, lambda x: selective_scan(*x.values())[0]),
    "wkv": Operation(_for_wkv, lambda x: wkv(*x.values())[0]),
    "short_conv": Operation(_for_short_conv, lambda x: short_conv(*x.values())[0]),
    "long_conv": Operation(_for_long_conv, lambda x: long_conv(*x.values())),
    "decay": Operation(_for_mamba2, _mamba2),
    "delta": Operation(_for_delta, _delta),
    "delta_lowrank": Operation(_for_lowrank, lambda x: delta_lowrank(*x.values())[0]),
    "attention": Operation(
        _for_attention, lambda x: attention(x["q"], x["k"], x["v"], window=WINDOW)
    ),
}
# Other uses of a kernel, by name.
FORMS = {
    "linear attention": Operation(_for_attention, lambda x: decay(x["q"], x["k"], x["v"])[0]),
    "Mamba-2": Operation(_for_gla, lambda x: decay(*x.values())[0]),
    "GLA": Operation(lambda T, s: _for_gla(T, s, s.head_width), lambda x: decay(*x.values())[0]),
    "Gated DeltaNet": Operation(_for_gated_delta, _delta),
    "KDA": Operation(lambda T, s: _for_gated_delta(T, s, s.head_width), _delta),
    "no compiler": Operation(
        _for_selective_scan, lambda x: selective_scan(*x.values(), backend="chunked")[0]
    ),
}
