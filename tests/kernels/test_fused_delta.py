"""The delta rule's Triton kernels against the definition in float64: on a GPU, or interpreted."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from seqzoo.kernels.delta import delta
from seqzoo.kernels.dispatch import choose, interpreting
from tests.kernels.delta_rules import (
    assert_float64_refused,
    assert_fused,
    assert_future_unread,
    assert_layout_changes_nothing,
    assert_pieces_are_one_pass,
    flags,
    rounded,
)
from tests.kernels.static_gate import KERNELS, lint

pytest.importorskip("triton")
fused = import_module("seqzoo.kernels.delta.fused")
KINDS = ("none", "scalar", "vector")
DTYPES = (torch.float32, torch.float16)  # the interpreter computes nonsense in bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [(1, 37, 2, 5, 3), (1, 65, 1, 20, 19)],
    ids=["two chunks", "three chunks, blocks of channels"],
)
def test_delta(shape, kind, dtype, fused_device, poisoned_empty):
    options = flags(*shape[:2]) | {"scale": 0.7}
    assert_fused(rounded(shape, kind, dtype), fused_device, **options)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_half_precision_products(kind, fused_device, poisoned_empty, monkeypatch):
    # as bfloat16 has them, in a dtype that the interpreter can compute in
    monkeypatch.setattr(fused, "NARROW", (torch.float16,))
    given = rounded((1, 34, 1, 66, 35), kind, torch.float16)
    assert_fused(given, fused_device)


def test_a_gradient_beyond_the_range_of_float16_passes(fused_device):
    given = rounded((1, 33, 1, 16, 16), "none", torch.float16)
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
    assert_fused(rounded((2, T, 1, 5, 3), kind, torch.float32), fused_device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_tokens(dtype, kind, fused_device, poisoned_empty):
    given = rounded((2, 1, 1, 20, 35), kind, dtype)
    assert_fused(given, fused_device, scale=0.5, reset=torch.tensor([[True], [False]]))


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_identical_keys_do_not_blow_up_the_triangular_inverse(beta, fused_device):
    given = rounded((1, 70, 1, 16, 8), "scalar", torch.float32)
    given["k"] = torch.full_like(given["k"], 0.25)  # of norm 1, exactly
    given["beta"] = torch.full_like(given["beta"], beta)
    given["log_decay"] = torch.zeros_like(given["log_decay"])
    assert_fused(given, fused_device)


@pytest.mark.parametrize("value", [0.0, -20.0, -88.0, -torch.inf])
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_hostile_decays_everywhere(kind, value, fused_device, poisoned_empty):
    given = rounded((1, 34, 1, 4, 3), kind, torch.float32)
    given["log_decay"] = torch.full_like(given["log_decay"], value)
    assert_fused(given, fused_device)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_one_strong_decay_does_not_spoil_mild_ones_beside_it(kind, fused_device):
    given = rounded((1, 66, 1, 4, 4), kind, torch.float32)
    given["log_decay"] = -0.05 * torch.rand_like(given["log_decay"])
    for t, value in ((0, -1e4), (15, -20.0), (31, -88.0), (32, -torch.inf), (40, -1e4)):
        given["log_decay"][:, t] = value
    assert_fused(given, fused_device)


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_never_read(kind, fused_device):
    assert_future_unread(rounded((1, 40, 1, 4, 3), kind, torch.float32), fused_device, "k", "beta")


def test_a_pass_in_pieces_is_one_pass(fused_device):
    assert_pieces_are_one_pass(rounded((1, 40, 1, 5, 3), "vector", torch.float32), fused_device)


@pytest.mark.parametrize("shape", [(0, 4, 1, 3, 2), (2, 0, 1, 3, 2), (0, 1, 1, 3, 2)], ids=str)
def test_nothing(shape, fused_device):
    given = {n: x.to(fused_device) for n, x in rounded(shape, "vector", torch.float32).items()}
    o, state = delta(**given, backend="fused")
    assert o.shape == given["v"].shape
    assert torch.equal(state, given["initial_state"])


def test_layout_in_memory_changes_nothing(fused_device):
    assert_layout_changes_nothing(rounded((1, 5, 2, 4, 6), "vector", torch.float32), fused_device)


def test_half_values_with_float32_keys_keep_each_gradient_in_its_dtype(fused_device):
    given = rounded((1, 33, 1, 4, 3), "scalar", torch.float32)
    given["v"] = given["v"].half()
    assert_fused(given, fused_device)


@pytest.mark.parametrize("name", ["log_decay", "initial_state"])
def test_float64_is_refused_and_not_narrowed(name, fused_device):
    given = rounded((1, 2, 1, 3, 2), "scalar", torch.float32)
    assert_float64_refused(given, name, fused_device)


@pytest.mark.skipif(not interpreting(), reason="a GPU computes in bfloat16, the interpreter cannot")
def test_the_interpreter_serves_only_by_name_and_never_bfloat16():
    assert choose("delta", torch.zeros(1)) != "fused"
    with pytest.raises(ValueError, match="bfloat16; use"):
        delta(**rounded((1, 2, 1, 3, 2), "scalar", torch.bfloat16), backend="fused")


@pytest.mark.parametrize(("kind", "T"), [("vector", 1), ("scalar", 33)])
def test_it_keeps_its_promises_to_torch(kind, T, fused_device):
    given = {
        n: x.to(fused_device) for n, x in rounded((1, T, 1, 3, 2), kind, torch.float16).items()
    }
    beta, g = (given[n].view(1, T, 1, -1) for n in ("beta", "log_decay"))
    given = [given["q"], given["k"], given["v"], beta, g, given["initial_state"]]
    given = [x.requires_grad_() for x in given]
    name = "delta_step" if T == 1 else "delta"
    torch.library.opcheck(getattr(torch.ops.seqzoo, name).default, (*given, "fused"))


@pytest.mark.parametrize("path", sorted(KERNELS.glob("delta/fused_*.py")), ids=lambda p: p.stem)
def test_no_part_has_a_32_bit_address_or_a_dot_of_unnamed_precision(path: Path):
    assert lint(path.read_text()) == []
