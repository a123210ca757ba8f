"""Show versions, what is installed, and which backend each kernel uses here and why not another.

Backends are tried from left to right; the environment variable SEQZOO_BACKEND prefers one.
"""

import argparse
import os
import pkgutil
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

import seqzoo.kernels
from seqzoo.kernels.dispatch import BACKENDS, choose
from seqzoo.kernels.native import works
from seqzoo.train.commands.list import table

NEEDED = ("torch", "transformers", "lightning", "jsonargparse", "safetensors", "tokenizers")
OPTIONAL = {
    "triton": "fused GPU kernels",
    "datasets": "--data Hub",
    "causal-conv1d": "a faster short convolution on CUDA",
    "mamba-ssm": "another selective scan on CUDA",
    "plotly": "seqzoo report",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None beyond --help."""


def run(arguments: argparse.Namespace) -> None:
    """Print the report."""
    sys.stdout.write("\n".join([_versions(), _machine(), *_kernels()]))


def _versions() -> str:
    rows: list[tuple[str, ...]] = [("package", "version", "used for")]
    rows += [(name, version_of(name), "needed") for name in ("seqzoo", *NEEDED)]
    rows += [(name, version_of(name), use) for name, use in OPTIONAL.items()]
    return f"python {platform.python_version()} on {platform.platform()}\n\n{table(rows)}"


def _machine() -> str:
    trial = works()
    native = f"cannot be used: {trial}" if trial else "a trial compiled, loaded and ran"
    lines = [
        f"threads: {torch.get_num_threads()} of {os.cpu_count()} processors",
        f"GPU: {_gpus() or 'none that torch can use'}",
        f"native kernels: {native}",
        f"SEQZOO_BACKEND: {os.environ.get('SEQZOO_BACKEND') or 'not set'}",
    ]
    return "\n".join([*lines, ""])


def _gpus() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ", ".join(torch.cuda.get_device_name(i) for i in range(count))


def _kernels() -> list[str]:
    for module in pkgutil.iter_modules(seqzoo.kernels.__path__):
        if module.ispkg:
            import_module(f"seqzoo.kernels.{module.name}")
    return [_report(device) for device in ("cpu", *(["cuda"] if _gpus() else []))]


def _report(device: str) -> str:
    x = torch.empty(0, device=device)
    rows: list[tuple[str, ...]] = [(f"kernel on {device}, float32", "uses", "cannot use")]
    for kernel, backends in sorted(BACKENDS.items()):
        reasons = {b.name: b.refusal(device, x.dtype, ()) for b in backends}
        cannot = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        rows.append((kernel, choose(kernel, x), cannot or "-"))
    return table(rows)


def version_of(name: str) -> str:
    """Version of an installed distribution, in words where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
