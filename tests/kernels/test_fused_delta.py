"""The delta rule's Triton kernels against the definition in float64: on a GPU, or interpreted."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from seqzoo.kernels.delta import delta
from seqzoo.kernels.dispatch import choose, interpreting
from tests.kernels.static_gate import KERNELS, lint
from tests.tolerances import assert_close_to_reference, relative_error

pytest.importorskip("triton")
fused = import_module("seqzoo.kernels.delta.fused")
KINDS = ("none", "scalar", "vector")
DTYPES = (torch.float32, torch.float16)  # the interpreter computes nonsense in bfloat16


def inputs(shape: tuple[int, int, int, int, int], kind: str, dtype: torch.dtype) -> dict:
    """Keys of norm 1, betas in (0, 2), decays from mild to strong; all but q, k, v in float32."""
    B, T, H, K, V = shape
    made = {
        "q": torch.randn(B, T, H, K).to(dtype),
        "k": normalize(torch.randn(B, T, H, K), dim=-1).to(dtype),
        "v": torch.randn(B, T, H, V).to(dtype),
        "beta": 2 * torch.rand(B, T, H),
        "initial_state": torch.randn(B, H, K, V),
    }
    if kind != "none":
        size = (B, T, H, K)[: 3 + (kind == "vector")]
        made["log_decay"] = -torch.rand(size) * 2.0 ** torch.randint(-6, 3, size)
    return made


def flags(B: int, T: int) -> dict[str, Tensor]:
    mask = torch.rand(B, T) < 0.7
    return {"mask": mask, "reset": (torch.rand(B, T) < 0.1) & mask}


def everything(given: dict, device: str, backend: str, options: dict) -> dict[str, Tensor]:
    """Output, state and the gradients of a fixed function of both."""
    leaves = {n: x.to(device).requires_grad_() for n, x in given.items()}
    at = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}
    o, state = delta(**leaves, **at, backend=backend)
    if "mask" in at:
        o = torch.where(at["mask"][..., None, None], o, 0)
    ends = [
        ((torch.arange(x.numel(), device=device) * 7 % 13 - 4) / 8).view_as(x) for x in (o, state)
    ]
    grads = torch.autograd.grad(
        (o, state),
        list(leaves.values()),
        [e.to(x.dtype) for e, x in zip(ends, (o, state), strict=True)],
    )
    named = {f"gradient of {n}": x for n, x in zip(leaves, grads, strict=True)}
    return {n: x.detach().cpu() for n, x in ({"output": o, "state": state} | named).items()}


def assert_right(given: dict, dtype: torch.dtype, device: str, **options: object) -> None:
    found = everything(given, device, "fused", options)
    true = everything({n: x.double() for n, x in given.items()}, "cpu", "reference", options)
    for name, out in found.items():
        gradient = name.startswith("gradient")
        assert_close_to_reference(
            out, true[name], dtype, family="delta", gradient=gradient, name=name
        )
    kept = [dtype, torch.float32, *(x.dtype for x in given.values())]
    assert [x.dtype for x in found.values()] == kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [(1, 37, 2, 5, 3), (1, 65, 1, 20, 19)],
    ids=["two chunks", "three chunks, blocks of channels"],
)
def test_delta(shape, kind, dtype, fused_device, poisoned_empty):
    options = flags(*shape[:2]) | {"scale": 0.7}
    assert_right(inputs(shape, kind, dtype), dtype, fused_device, **options)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_half_precision_products(kind, fused_device, poisoned_empty, monkeypatch):
    # as bfloat16 has them, in a dtype that the interpreter can compute in
    monkeypatch.setattr(fused, "NARROW", (torch.float16,))
    given = inputs((1, 34, 1, 66, 35), kind, torch.float16)
    assert_right(given, torch.float16, fused_device)


def test_a_gradient_beyond_the_range_of_float16_passes(fused_device):
    given = inputs((1, 33, 1, 16, 16), "none", torch.float16)
    given["beta"] = torch.zeros_like(given["beta"])  # so that the gradients of q, k, v stay small
    given = {n: x.to(fused_device).requires_grad_() for n, x in given.items()}
    _, state = delta(**given, backend="fused")
    grads = torch.autograd.grad(
        state, list(given.values()), state * 0 + 1e5, materialize_grads=True
    )
    assert all(x.isfinite().all() for x in grads)
    assert torch.equal(grads[-1], torch.full_like(state, 1e5))


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33])
def test_every_length_around_borders(T, fused_device, poisoned_empty):
    kind = KINDS[T % 3]
    assert_right(inputs((2, T, 1, 5, 3), kind, torch.float32), torch.float32, fused_device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_tokens(dtype, kind, fused_device, poisoned_empty):
    given = inputs((2, 1, 1, 20, 35), kind, dtype)
    assert_right(given, dtype, fused_device, scale=0.5, reset=torch.tensor([[True], [False]]))


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_identical_keys_do_not_blow_up_the_triangular_inverse(beta, fused_device):
    given = inputs((1, 70, 1, 16, 8), "scalar", torch.float32)
    given["k"] = torch.full_like(given["k"], 0.25)  # of norm 1, exactly
    given["beta"] = torch.full_like(given["beta"], beta)
    given["log_decay"] = torch.zeros_like(given["log_decay"])
    assert_right(given, torch.float32, fused_device)


@pytest.mark.parametrize("value", [0.0, -20.0, -88.0, -torch.inf])
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_hostile_decays_everywhere(kind, value, fused_device, poisoned_empty):
    given = inputs((1, 34, 1, 4, 3), kind, torch.float32)
    given["log_decay"] = torch.full_like(given["log_decay"], value)
    assert_right(given, torch.float32, fused_device)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_one_strong_decay_does_not_spoil_mild_ones_beside_it(kind, fused_device):
    given = inputs((1, 66, 1, 4, 4), kind, torch.float32)
    given["log_decay"] = -0.05 * torch.rand_like(given["log_decay"])
    for t, value in ((0, -1e4), (15, -20.0), (31, -88.0), (32, -torch.inf), (40, -1e4)):
        given["log_decay"][:, t] = value
    assert_right(given, torch.float32, fused_device)


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_never_read(kind, fused_device):
    given = inputs((1, 40, 1, 4, 3), kind, torch.float32)
    del given["initial_state"]
    given = {n: x.to(fused_device) for n, x in given.items()}
    o = delta(**given, backend="fused")[0]
    for t in (1, 17, 39):
        other = {
            n: torch.cat([x[:, :t], x[:, t:].flip(1) * (1 if n in ("k", "beta") else 1e4)], dim=1)
            for n, x in given.items()
        }
        assert torch.equal(delta(**other, backend="fused")[0][:, :t], o[:, :t])


def test_a_pass_in_pieces_is_one_pass(fused_device):
    given = {
        n: x.to(fused_device) for n, x in inputs((1, 40, 1, 5, 3), "vector", torch.float32).items()
    }
    whole, last = delta(**given, backend="fused")
    state, outputs = given.pop("initial_state"), []
    for start, stop in ((0, 1), (1, 34), (34, 36), (36, 37), (37, 40)):
        now = {n: x[:, start:stop] for n, x in given.items()}
        o, state = delta(**now, initial_state=state, backend="fused")
        outputs.append(o)
    assert relative_error(torch.cat(outputs, dim=1), whole) <= 1e-5
    assert relative_error(state, last) <= 1e-5


@pytest.mark.parametrize("shape", [(0, 4, 1, 3, 2), (2, 0, 1, 3, 2), (0, 1, 1, 3, 2)], ids=str)
def test_nothing(shape, fused_device):
    given = {n: x.to(fused_device) for n, x in inputs(shape, "vector", torch.float32).items()}
    o, state = delta(**given, backend="fused")
    assert o.shape == given["v"].shape
    assert torch.equal(state, given["initial_state"])


def test_layout_in_memory_changes_nothing(fused_device):
    given = inputs((1, 5, 2, 4, 6), "vector", torch.float32)
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in given.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    found, other = (everything(x, fused_device, "fused", {}) for x in (given, strided))
    assert all(torch.equal(found[n], other[n]) for n in found)


def test_half_values_with_float32_keys_keep_each_gradient_in_its_dtype(fused_device):
    given = inputs((1, 33, 1, 4, 3), "scalar", torch.float32)
    given["v"] = given["v"].half()
    assert_right(given, torch.float16, fused_device)


@pytest.mark.parametrize("name", ["log_decay", "initial_state"])
def test_float64_is_refused_and_not_narrowed(name, fused_device):
    given = {
        n: x.to(fused_device) for n, x in inputs((1, 2, 1, 3, 2), "scalar", torch.float32).items()
    }
    given[name] = given[name].double()
    with pytest.raises(ValueError, match="not float64; use"):
        delta(**given, backend="fused")


@pytest.mark.skipif(not interpreting(), reason="a GPU computes in bfloat16, the interpreter cannot")
def test_the_interpreter_serves_only_by_name_and_never_bfloat16():
    assert choose("delta", torch.zeros(1)) != "fused"
    with pytest.raises(ValueError, match="bfloat16; use"):
        delta(**inputs((1, 2, 1, 3, 2), "scalar", torch.bfloat16), backend="fused")


@pytest.mark.parametrize(("kind", "T"), [("vector", 1), ("scalar", 33)])
def test_it_keeps_its_promises_to_torch(kind, T, fused_device):
    given = {n: x.to(fused_device) for n, x in inputs((1, T, 1, 3, 2), kind, torch.float16).items()}
    beta, g = (given[n].view(1, T, 1, -1) for n in ("beta", "log_decay"))
    given = [given["q"], given["k"], given["v"], beta, g, given["initial_state"]]
    given = [x.requires_grad_() for x in given]
    name = "delta_step" if T == 1 else "delta"
    torch.library.opcheck(getattr(torch.ops.seqzoo, name).default, (*given, "fused"))


@pytest.mark.parametrize("path", sorted(KERNELS.glob("delta/fused_*.py")), ids=lambda p: p.stem)
def test_no_part_has_a_32_bit_address_or_a_dot_of_unnamed_precision(path: Path):
    assert lint(path.read_text()) == []
