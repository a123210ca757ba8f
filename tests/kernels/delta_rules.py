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
from tests.tolerances import assert_close_to_reference, law_budget, relative_error

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
    return ((torch.arange(x.numel()) * 7 % 13 - 4) / 8).view(x.shape).to(x)


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


def rounded(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """`inputs` in the dtypes of `leaves`."""
    return {n: x.detach() for n, x in leaves(inputs(*shape, kind=kind), dtype).items()}


def fused(given: dict[str, Tensor], device: str, **options: object) -> dict[str, Tensor]:
    """`everything` by the Triton kernels, where they run."""
    there = {n: x.detach().to(device).requires_grad_() for n, x in given.items()}
    asked = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}
    return {n: x.cpu() for n, x in everything(there, **asked, backend="fused").items()}


def assert_fused(given: dict[str, Tensor], device: str, **options: object) -> None:
    """Every number is the loop's in float64; o has the dtype of v, a gradient that of its input."""
    found = fused(given, device, **options)
    compare(found, truth(given, **options), given["v"].dtype)
    kept = [given["v"].dtype, torch.float32, *(x.dtype for x in given.values())]
    assert [x.dtype for x in found.values()] == kept


def assert_future_unread(given: dict[str, Tensor], device: str, *bounded: str) -> None:
    """Later tokens turned around, and much larger in what need not be bounded: bit by bit alike."""
    given = {n: x.to(device) for n, x in given.items() if n != "initial_state"}
    o = rule(**given, backend="fused")[0]
    for t in (1, 17, 39):
        later = {n: x[:, t:].flip(1) * (1 if n in bounded else 1e4) for n, x in given.items()}
        other = {n: torch.cat([x[:, :t], later[n]], dim=1) for n, x in given.items()}
        assert torch.equal(rule(**other, backend="fused")[0][:, :t], o[:, :t])


def assert_pieces_are_one_pass(given: dict[str, Tensor], device: str) -> None:
    """Single tokens among them."""
    given = {n: x.to(device) for n, x in given.items()}
    whole, last = rule(**given, backend="fused")
    state, outputs = given["initial_state"], []
    for start, stop in ((0, 1), (1, 34), (34, 36), (36, 37), (37, 40)):
        now = cut(given, slice(start, stop)) | {"initial_state": state}
        o, state = rule(**now, backend="fused")
        outputs.append(o)
    assert relative_error(torch.cat(outputs, dim=1), whole) <= law_budget(whole.dtype)
    assert relative_error(state, last) <= law_budget(last.dtype)


def assert_layout_changes_nothing(given: dict[str, Tensor], device: str) -> None:
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in given.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    found, other = (fused(x, device) for x in (given, strided))
    assert all(torch.equal(found[n], other[n]) for n in found)


def assert_float64_refused(given: dict[str, Tensor], name: str, device: str) -> None:
    given = {n: x.to(device) for n, x in given.items()}
    given[name] = given[name].double()
    with pytest.raises(ValueError, match="not float64; use"):
        rule(**given, backend="fused")


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
