"""Every gradient of the recurrent kernels and convolutions over 16,384 tokens, in float32."""

import pytest
import torch
from torch import Tensor

from seqzoo.kernels.dispatch import BACKENDS
from seqzoo.kernels.long_conv import long_conv
from seqzoo.kernels.scan import scan
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.short_conv import short_conv
from seqzoo.kernels.wkv import wkv
from tests.tolerances import relative_error

T, D, N = 16_384, 4, 4
ALLOWED = 1e-5
Given = dict[str, Tensor]


def given_scan() -> Given:
    a = torch.sigmoid(torch.randn(1, T, D) + 4)
    return {"a": a, "b": torch.randn(1, T, D), "initial_state": torch.randn(1, D)}


def given_complex_scan() -> Given:
    angle = torch.randn(1, T, D)
    a = torch.polar(torch.sigmoid(torch.randn(1, T, D) + 4), angle)
    b, start = (torch.randn(1, n, D, dtype=torch.complex64) for n in (T, 1))
    return {"a": a, "b": b, "initial_state": start[:, 0]}


def given_selective_scan() -> Given:
    u, dt = torch.randn(1, T, D), torch.rand(1, T, D) * 0.1
    A, start = -torch.arange(1.0, N + 1).repeat(D, 1), torch.randn(1, D, N)
    B, C = torch.randn(2, 1, T, N).unbind()
    return {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": torch.randn(D), "initial_state": start}


def given_wkv() -> Given:
    k, v = torch.randn(2, 1, T, D).unbind()
    start = torch.cat([torch.randn(1, 1, D), torch.rand(1, 1, D), torch.zeros(1, 1, D)], dim=1)
    return {"k": k, "v": v, "w": torch.rand(D) * 0.1, "u": torch.randn(D), "initial_state": start}


def given_short_conv() -> Given:
    x, start = torch.randn(1, T, D), torch.randn(1, 3, D)
    return {"x": x, "weight": torch.randn(D, 4), "bias": torch.randn(D), "initial_state": start}


def given_long_conv() -> Given:
    return {"u": torch.randn(1, T, 1), "kernel": torch.randn(1, T), "skip": torch.randn(1)}


KERNELS = {
    "scan": (scan, given_scan),
    "scan, complex": (scan, given_complex_scan),
    "selective_scan": (selective_scan, given_selective_scan),
    "wkv": (wkv, given_wkv),
    "short_conv": (short_conv, given_short_conv),
    "long_conv": (long_conv, given_long_conv),
}


def differentiated(name: str, given: Given, backend: str) -> Given:
    """Outputs and gradients; the last state counts in the loss as well."""
    run = KERNELS[name][0]
    leaves = {k: x.detach().requires_grad_() for k, x in given.items()}
    made = run(**leaves, backend=backend)
    outputs = (made,) if isinstance(made, Tensor) else made
    generator = torch.Generator().manual_seed(1)
    wanted = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    wanted = [w.to(x.dtype) for w, x in zip(wanted, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), wanted, materialize_grads=True)
    return {f"output {i}": x for i, x in enumerate(outputs)} | dict(zip(leaves, grads, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_float32_stays_within_1e_5_of_the_float64_definition(name: str) -> None:
    given = KERNELS[name][1]()
    wide = {
        k: x.to(torch.complex128 if x.is_complex() else torch.float64) for k, x in given.items()
    }
    right = differentiated(name, wide, "reference")
    like = next(iter(given.values()))
    for backend in BACKENDS[name.partition(",")[0]]:
        served = backend.name in ("native", "chunked")  # Triton's interpreter would take hours
        if not served or backend.refusal("cpu", like.dtype, ()):
            continue
        for key, x in differentiated(name, given, backend.name).items():
            error = relative_error(x, right[key])
            assert error <= ALLOWED, f"{key} of {name}, {backend.name}, is off by {error:.1e}"
