"""What our kernels are compared with: other people's code for the same sums, and plain torch.

Each function loads what it needs and returns the computation, on the inputs in `operations.py`. The
ImportError of a package that is not there is told in the row.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import torch
from torch import Tensor
from torch.fft import irfft, rfft
from torch.nn.functional import conv1d, scaled_dot_product_attention

from seqzoo.train.bench.operations import WINDOW, Inputs, Run


def add() -> Run:
    """Reads what the scan reads and writes what it writes."""
    return lambda x: torch.add(x["a"], x["b"])


def transformers_selective_scan() -> Run:
    """Its loop over tokens."""
    slow = import_module("transformers.models.mamba.modeling_mamba").mamba_selective_scan

    def run(x: Inputs) -> Tensor:
        u, dt, B, C = (x[name].transpose(1, 2) for name in ("u", "dt", "B", "C"))
        # Its module hands these two over as they lie after a convolution and a product.
        y: Tensor = slow(u.contiguous(), dt.contiguous(), x["A"], B, C)
        return y.transpose(1, 2)

    return run


def mambapy_selective_scan() -> Run:
    """Its parallel scan, and around it the sums as its model has them."""
    pscan = import_module("mambapy.pscan").pscan

    def run(x: Inputs) -> Tensor:
        dt = x["dt"][..., None]
        h = pscan(torch.exp(dt * x["A"]), dt * x["B"][:, :, None] * x["u"][..., None])
        y: Tensor = (h @ x["C"][..., None]).squeeze(-1)
        return y

    return run


def transformers_wkv() -> Run:
    """Its loop over tokens."""
    slow = import_module("transformers.models.rwkv.modeling_rwkv").rwkv_linear_attention_cpu

    def run(x: Inputs) -> Tensor:
        y: Tensor = slow(x["w"].log(), x["u"], x["k"], x["v"])[0]
        return y

    return run


def transformers_mamba2() -> Run:
    """Its default, chunks of 256."""
    slow = import_module("transformers.models.mamba2.modeling_mamba2").mamba2_chunk_scan

    def run(x: Inputs) -> Tensor:
        A = x["dt"].new_full(x["dt"].shape[-1:], -1.0)
        y: Tensor = slow(x["v"], x["dt"], A, x["k"], x["q"], chunk_size=256)
        return y

    return run


def fla_delta() -> Run:
    """Its plain PyTorch, in chunks of 32: that file alone, since the package wants Triton."""
    package = find_spec("fla")
    if package is None or not package.submodule_search_locations:
        raise ImportError("the package fla-core is not installed")
    folder = Path(package.submodule_search_locations[0])
    slow = run_path(str(folder / "ops/delta_rule/naive.py"))["delta_rule_chunkwise"]

    def run(x: Inputs) -> Tensor:
        y: Tensor = slow(*(x[name].transpose(1, 2) for name in ("q", "k", "v", "beta")))[0]
        return y.transpose(1, 2)

    return run


def conv1d_transposed() -> Run:
    """Torch's own convolution, which wants channels first."""

    def run(x: Inputs) -> Tensor:
        (D, W), T = x["weight"].shape, x["x"].shape[1]
        rows, weight = x["x"].transpose(1, 2), x["weight"][:, None]
        y = conv1d(rows, weight, x["bias"], padding=W - 1, groups=D)
        return y[..., :T].transpose(1, 2)

    return run


def whole_fft() -> Run:
    """One FFT of the whole tensor."""

    def run(x: Inputs) -> Tensor:
        T = x["u"].shape[1]
        product = rfft(x["u"].transpose(1, 2), 2 * T) * rfft(x["kernel"], 2 * T)
        y: Tensor = irfft(product, 2 * T)[..., :T]
        return y.transpose(1, 2)

    return run


def causal_sdpa() -> Run:
    """Torch's attention to all tokens before."""

    def run(x: Inputs) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def masked_sdpa() -> Run:
    """Torch's attention with the window as a mask."""

    def run(x: Inputs) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        t = torch.arange(q.shape[2], device=q.device)
        distance = t[:, None] - t
        seen = (distance >= 0) & (distance < WINDOW)
        return scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)

    return run
