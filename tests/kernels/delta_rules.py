"""Inputs for both delta rules, their numbers in all, and other people's code for the same."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from seqzoo.kernels.delta import delta
from seqzoo.kernels.delta_lowrank import delta_lowrank
from seqzoo.kernels.dispatch import BACKENDS
from tests.tolerances import assert_close_to_reference

LOWRANK = ("lowrank", "lowrank scalar")
KINDS = ("none", "scalar", "vector", *LOWRANK)  # decays of the delta rule; of the low-rank one


def backends(kind: str) -> list[str]:
    """Those that compute something here; Triton's have tests of their own."""
    found = BACKENDS["delta_lowrank" if kind in LOWRANK else "delta"]
    here = [b for b in found if "triton" not in b.needs]
    return [b.name for b in here if not b.refusal("cpu", torch.float32, ())]


ALL = [(kind, backend) for kind in KINDS for backend in backends(kind)]
FAST = [(kind, backend) for kind, backend in ALL if backend != "reference"]
GATED = [(kind, backend) for kind, backend in FAST if kind != "none"]


def over(rules: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """Run a test with each kind and backend."""
    return pytest.mark.parametrize(
        ("kind", "backend"), rules, ids=["-".join(pair) for pair in rules]
    )


def inputs(B: int, T: int, H: int, K: int, V: int, *, kind: str) -> dict[str, Tensor]:
    """Float64; keys of norm 1, betas in (0, 2), decays from mild to strong."""
    k = normalize(torch.randn(B, T, H, K), dim=-1)
    made = {"q": torch.randn(B, T, H, K), "k": k, "v": torch.randn(B, T, H, V)}
    if kind in LOWRANK:  # as RWKV-7 has them; the two are alike, not the same
        made |= {"a": -k, "b": k * torch.rand(B, T, H, K), "k": torch.randn(B, T, H, K) / K**0.5}
    else:
        made["beta"] = 2 * torch.rand(B, T, H)
    made["initial_state"] = torch.randn(B, H, K, V)
    if kind != "none":
        shape = (B, T, H, K) if kind in ("vector", "lowrank") else (B, T, H)
        made["log_decay"] = -torch.rand(shape) * 2.0 ** torch.randint(-6, 3, shape)
    return {name: x.double() for name, x in made.items()}


def rule(**given: object) -> tuple[Tensor, Tensor]:
    """The kernel that takes such inputs."""
    return (delta_lowrank if "a" in given else delta)(**given)


def flags(B: int, T: int) -> dict[str, Tensor]:
    """Junk in the middle, at the left and at the right; documents of every length, 1 included."""
    mask = torch.rand(B, T) < 0.7
    mask[0, : T // 5] = False
    mask[-1, T - T // 6 :] = False
    return {"mask": mask, "reset": (torch.rand(B, T) < 0.1) & mask}


def leaves(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """As somebody would call it: with half-precision q, k and v, the others are float32."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: x.detach().to(dtype if name in ("q", "k", "v") else wide).requires_grad_()
        for name, x in given.items()
    }


def everything(given: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Output, last state and all gradients of one fixed function of both."""
    o, state = rule(**given, **options)
    if (mask := options.get("mask")) is not None:
        o = torch.where(mask[..., None, None], o, 0)
    loss = sum((x * exact(x)).sum().double() for x in (o, state))
    grads = torch.autograd.grad(loss, list(given.values()), materialize_grads=True)
    named = {f"gradient of {name}": g for name, g in zip(given, grads, strict=True)}
    return {"output": o.detach(), "state": state.detach(), **named}


def exact(x: Tensor) -> Tensor:
    """Numbers that every dtype holds exactly."""
    return ((torch.arange(x.numel()) * 7 % 13 - 4) / 8).view(x.shape).to(x.dtype)


def truth(given: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    return everything(leaves(given, torch.float64), **options, backend="reference")


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, out in found.items():
        gradient = name.startswith("gradient")
        assert_close_to_reference(
            out, wanted[name], dtype, family="delta", gradient=gradient, name=name
        )


def cut(given: dict[str, Tensor], tokens: slice | Tensor) -> dict[str, Tensor]:
    return {name: x if name == "initial_state" else x[:, tokens] for name, x in given.items()}


def naive(rule: str) -> ModuleType:
    """Their loops and chunks, from their own file: the package around it wants a GPU."""
    package = importlib.util.find_spec("fla")
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = [p for place in places if (p := Path(place) / f"ops/{rule}/naive.py").is_file()]
    if not files:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{rule}", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
