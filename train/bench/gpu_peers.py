"""What our kernels are compared with on a GPU: the CUDA and Triton kernels of other packages.

As in `peers.py`, each function loads what it needs; a package that is not there is told in the row.
Their own layouts and units are part of what they cost: a transpose or a logarithm that a package
wants is taken inside the measured call.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from seqzoo.train.bench.operations import Inputs, Run


def selective_scan() -> Run:
    """mamba-ssm's, channels first."""
    theirs = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def run(x: Inputs) -> Tensor:
        u, dt, B, C = (x[name].transpose(1, 2).contiguous() for name in ("u", "dt", "B", "C"))
        y: Tensor = theirs(u, dt, x["A"], B, C)
        return y.transpose(1, 2)

    return run


def ssd() -> Run:
    """mamba-ssm's chunks of Mamba-2, a B and a C for every head."""
    theirs = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def run(x: Inputs) -> Tensor:
        decay = -x["dt"].new_ones(x["v"].shape[2]).float()
        y: Tensor = theirs(x["v"], x["dt"], decay, x["k"], x["q"], chunk_size=256)
        return y

    return run


def causal_conv1d() -> Run:
    """The package's, on a transposed view, as it likes best."""
    theirs = import_module("causal_conv1d").causal_conv1d_fn

    def run(x: Inputs) -> Tensor:
        weight, bias = (x[name].to(x["x"].dtype) for name in ("weight", "bias"))
        y: Tensor = theirs(x["x"].transpose(1, 2), weight, bias)
        return y.transpose(1, 2)

    return run


def hgrn() -> Run:
    """flash-linear-attention's, which takes the logarithm of a."""
    theirs = import_module("fla.ops.hgrn").chunk_hgrn
    return lambda x: _first(theirs(x["b"], x["a"].log()))


def rwkv4() -> Run:
    """flash-linear-attention's, which takes log w and a state."""
    theirs = import_module("fla.ops.rwkv4").fused_recurrent_rwkv4

    def run(x: Inputs) -> Tensor:
        k = x["k"]
        start = k.new_zeros(k.shape[0], 3, 1, k.shape[2]).float()
        start[:, 2] = -1e38
        return _first(theirs(x["w"].log(), x["u"], k, x["v"], start))

    return run


def _fla(module: str, function: str, *names: str) -> Callable[[], Run]:
    """A function of flash-linear-attention that takes these inputs in this order."""

    def load() -> Run:
        theirs = getattr(import_module(f"fla.ops.{module}"), function)
        return lambda x: _first(theirs(*(x[name] for name in names), scale=1.0))

    load.__name__ = function
    return load


simple_gla = _fla("simple_gla", "chunk_simple_gla", "q", "k", "v", "g")
gla = _fla("gla", "chunk_gla", "q", "k", "v", "g")
delta_rule = _fla("delta_rule", "chunk_delta_rule", "q", "k", "v", "beta")
gated_delta_rule = _fla(
    "gated_delta_rule", "chunk_gated_delta_rule", "q", "k", "v", "log_decay", "beta"
)
kda = _fla("kda", "chunk_kda", "q", "k", "v", "log_decay", "beta")
lowrank = _fla(
    "generalized_delta_rule", "chunk_dplr_delta_rule", "q", "k", "v", "a", "b", "log_decay"
)


def _first(results: Any) -> Tensor:  # noqa: ANN401  # what packages return
    output: Tensor = results[0]
    return output
