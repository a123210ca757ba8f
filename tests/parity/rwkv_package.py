"""The authors' inference package `rwkv`, its layers called without a checkpoint."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor


def rwkv_model() -> Any:
    """The class whose methods are the layers; unscripted, without their kernels for GPUs."""
    os.environ["RWKV_JIT_ON"] = os.environ["RWKV_CUDA_ON"] = "0"
    return pytest.importorskip("rwkv.model", reason="the package rwkv is not installed").RWKV


def unquantised(n: int) -> list[Tensor]:
    """Places for scales of int8 weights, which float weights never read: four to a weight."""
    return [torch.empty(0)] * (4 * n)
