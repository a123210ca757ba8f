"""Every test starts alike: one thread, fixed seeds, a clean environment."""

import os
import random
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

# Before anything imports Triton: without a GPU its kernels run under the interpreter. No default
# ever chooses them there; tests ask for backend="fused" on the device `fused_device`.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seeds and threads in every test, and no backend preferred from outside."""
    monkeypatch.delenv("SEQZOO_BACKEND", raising=False)
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # what older libraries read
    torch.manual_seed(0)


@pytest.fixture
def fused_device() -> str:
    """Where Triton kernels run here: a GPU, or the CPU under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that seqzoo asks for without filling it arrives full of NaN."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poison(getattr(owner, name)))


def _poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **options: object) -> Tensor:
        made = make(*args, **options)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("seqzoo") and (made.is_floating_point() or made.is_complex()):
            with torch.no_grad():
                made.fill_(float("nan"))
        return made

    return poisoned
