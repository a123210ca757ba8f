"""Which backend runs a kernel: the one place that knows what is installed.

A kernel lists its backends in order of preference, each with what it can do. `choose` takes the
first that can serve the call. Two ways to steer it: `backend="chunked"` in a call demands (and
raises when that backend cannot); the environment variable SEQZOO_BACKEND prefers, for the kernels
that have such a backend and the calls it can serve.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from seqzoo.kernels.errors import unknown
from seqzoo.kernels.native import works

NAMES = ("native", "fused", "causal_conv1d", "mamba_ssm", "chunked", "reference")


@dataclass(frozen=True)
class Backend:
    """One way to compute a kernel, and what it can do; empty fields mean no limit."""

    name: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    needs: tuple[str, ...] = ()  # "compiler" (one that works), "triton", or a package
    lacks: frozenset[str] = field(default_factory=frozenset)  # features of a call it cannot serve

    def refusal(self, device: str, dtype: torch.dtype, features: Sequence[str]) -> str:
        """Why this backend cannot serve such a call; empty when it can."""
        devices = self.devices
        if "triton" in self.needs and interpreting():
            devices = (*devices, "cpu")
        if devices and device not in devices:
            return f"it runs on {' and '.join(devices)}, not on {device}"
        if self.dtypes and dtype not in self.dtypes:
            return f"it takes {', '.join(_short(d) for d in self.dtypes)}, not {_short(dtype)}"
        if "triton" in self.needs and interpreting() and dtype == torch.bfloat16:
            return "Triton's interpreter computes wrong numbers in bfloat16"
        lacking = [f for f in features if f in self.lacks]
        if lacking:
            return f"it cannot do {', '.join(lacking)}"
        return next((reason for need in self.needs if (reason := missing(need))), "")


BACKENDS: dict[str, tuple[Backend, ...]] = {}  # by kernel, in order of preference


def declare(kernel: str, *backends: Backend) -> None:
    """Say once, where the kernel is defined, which backends it has."""
    BACKENDS[kernel] = backends


def choose(
    kernel: str, x: Tensor, requested: str | None = None, features: tuple[str, ...] = ()
) -> str:
    """Name of the backend that serves a call on tensors like `x`.

    Raises:
        ValueError: the requested backend does not exist or cannot serve the call.
    """
    device = "cpu" if x.device.type == "meta" else x.device.type
    if requested is not None:
        return _demand(kernel, requested, device, x.dtype, features)
    return _prefer(kernel, device, x.dtype, features)


def _constant(function: Callable[..., str]) -> Callable[..., str]:
    """Let torch.compile take the answer as a constant: what is installed does not change.

    It is torch.compiler.assume_constant_result, which would import the whole compiler (a second).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _demand(
    kernel: str, requested: str, device: str, dtype: torch.dtype, features: tuple[str, ...]
) -> str:
    backends = BACKENDS[kernel]
    by_name = {b.name: b for b in backends}
    if requested not in by_name:
        raise unknown(f"backend of {kernel} named", requested, by_name)
    reason = by_name[requested].refusal(device, dtype, features)
    if reason:
        able = [b.name for b in backends if not (_slow(b) or b.refusal(device, dtype, features))]
        hint = f"; use {' or '.join(able)}" if able else ""
        raise ValueError(f"backend {requested!r} of {kernel} cannot serve this: {reason}{hint}")
    return requested


@_constant
def _prefer(kernel: str, device: str, dtype: torch.dtype, features: tuple[str, ...]) -> str:
    preferred = os.environ.get("SEQZOO_BACKEND", "")
    if preferred and preferred not in NAMES:
        raise unknown("backend in SEQZOO_BACKEND", preferred, NAMES)
    for backend in sorted(BACKENDS[kernel], key=lambda b: b.name != preferred):
        wanted = backend.name == preferred or not _slow(backend)
        if wanted and not backend.refusal(device, dtype, features):
            return backend.name
    raise ValueError(f"no backend of {kernel} takes {_short(dtype)} on {device}")


def missing(need: str) -> str:
    """Why `need` cannot be used on this machine; empty when it can."""
    if need == "compiler":
        return works()
    if not _installed(need):
        return f"the package {need} is not installed"
    if need == "triton" and not (torch.cuda.is_available() or interpreting()):
        return "no GPU"
    return ""


def interpreting() -> bool:
    """Whether Triton kernels run under the interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of decays, sums and states: float32 unless the input is wider or complex."""
    wide = (torch.float64, torch.complex64, torch.complex128)
    return dtype if dtype in wide else torch.float32


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast inside: kernels decide their own precision."""
    device = "cpu" if x.device.type == "meta" else x.device.type
    return torch.autocast(device, enabled=False)


def _slow(backend: Backend) -> bool:
    """Whether it would run under the interpreter: there to be checked, and nobody's default."""
    return "triton" in backend.needs and interpreting()


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
