"""The low-rank rule's Triton kernels against the loop in float64: on a GPU, or interpreted."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from seqzoo.kernels.delta_lowrank import delta_lowrank
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
fused = import_module("seqzoo.kernels.delta_lowrank.fused")
KINDS = ("lowrank", "lowrank scalar")
DTYPES = (torch.float32, torch.float16)  # the interpreter computes nonsense in bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [(1, 37, 2, 5, 3), (1, 65, 1, 20, 19)],
    ids=["two chunks", "three chunks, blocks of channels"],
)
def test_every_number_is_the_loop(shape, kind, dtype, fused_device, poisoned_empty):
    assert_fused(rounded(shape, kind, dtype), fused_device, **flags(*shape[:2]), scale=0.7)


def test_half_precision_products(fused_device, poisoned_empty, monkeypatch):
    # as bfloat16 has them, in a dtype that the interpreter can compute in
    monkeypatch.setattr(fused, "NARROW", (torch.float16,))
    given = rounded((1, 34, 1, 66, 35), "lowrank", torch.float16)
    given |= {n: given[n].half() for n in ("a", "b")}
    assert_fused(given, fused_device)


def test_what_is_read_in_float32_is_not_rounded_to_the_dtype_of_the_values(
    fused_device, monkeypatch
):
    monkeypatch.setattr(fused, "NARROW", (torch.float16,))
    given = rounded((1, 33, 1, 16, 3), "lowrank", torch.float16)
    given = {n: x.to(fused_device) for n, x in given.items()}
    exact = {n: x.double() for n, x in given.items()}
    state = delta_lowrank(**given, backend="fused")[1]
    wanted = delta_lowrank(**exact, backend="reference")[1]
    assert (state - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_gradient_beyond_the_range_of_float16_passes(fused_device):
    given = rounded((1, 33, 1, 16, 16), "lowrank", torch.float16)
    for name in ("k", "v", "a", "b", "log_decay"):  # so that their own gradients stay small
        given[name] = torch.zeros_like(given[name])
    given = {n: x.to(fused_device).requires_grad_() for n, x in given.items()}
    _, state = delta_lowrank(**given, backend="fused")
    grads = torch.autograd.grad(state, list(given.values()), state * 0 + 1e5)
    assert all(x.isfinite().all() for x in grads)
    assert torch.equal(grads[list(given).index("initial_state")], torch.full_like(state, 1e5))


@pytest.mark.parametrize("T", [2, 15, 16, 17, 32, 33])
def test_every_length_around_borders(T, fused_device, poisoned_empty):
    assert_fused(rounded((2, T, 1, 5, 3), KINDS[T % 2], torch.float32), fused_device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_tokens(dtype, kind, fused_device, poisoned_empty):
    given = rounded((2, 1, 1, 20, 35), kind, dtype)
    assert_fused(given, fused_device, scale=0.5, reset=torch.tensor([[True], [False]]))


def test_a_token_reads_before_its_own_decay(fused_device):
    # a state of one number: s = w s + b a s; the second token's decay is not in what it reads
    one = {n: torch.ones(1, 2, 1, 1) for n in "qkvab"} | {"k": torch.zeros(1, 2, 1, 1)}
    one |= {"a": -one["a"], "b": one["b"] / 4, "log_decay": torch.full((1, 2, 1), 0.5).log()}
    one |= {"initial_state": torch.ones(1, 1, 1, 1)}
    o, _ = delta_lowrank(**{n: x.to(fused_device) for n, x in one.items()}, backend="fused")
    assert o.flatten().tolist() == [0.25, 0.0625]


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_identical_keys_do_not_blow_up_the_triangular_inverse(strength, fused_device):
    # at 2 each write turns the sign of what the key holds: nothing ever decays
    given = rounded((1, 70, 1, 16, 8), "lowrank scalar", torch.float32)
    key = torch.full_like(given["k"], 0.25)  # of norm 1, exactly
    given |= {"k": key, "a": -key, "b": strength * key}
    given["log_decay"] = torch.zeros_like(given["log_decay"])
    assert_fused(given, fused_device)


def test_transitions_that_grow_are_computed_as_exactly(fused_device):
    # nothing bounds a and b: over 40 tokens the state gains several powers of ten
    given = rounded((1, 40, 1, 6, 3), "lowrank", torch.float32)
    given["a"] = -1.5 * given["a"]
    assert_fused(given, fused_device)


@pytest.mark.parametrize("value", [0.0, -20.0, -88.0, -1e4, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_decays_everywhere(kind, value, fused_device, poisoned_empty):
    given = rounded((1, 34, 1, 4, 3), kind, torch.float32)
    given["log_decay"] = torch.full_like(given["log_decay"], value)
    assert_fused(given, fused_device)


@pytest.mark.parametrize("kind", KINDS)
def test_one_strong_decay_does_not_spoil_mild_ones_beside_it(kind, fused_device):
    given = rounded((1, 66, 1, 4, 4), kind, torch.float32)
    given["log_decay"] = -0.05 * torch.rand_like(given["log_decay"])
    for t, value in ((0, -1e4), (15, -20.0), (31, -88.0), (32, -torch.inf), (40, -1e4)):
        given["log_decay"][:, t] = value
    assert_fused(given, fused_device)


def test_channels_that_are_forgotten_do_not_touch_those_beside_them(fused_device):
    given = rounded((1, 40, 1, 6, 3), "lowrank", torch.float32)
    given["log_decay"] = -0.05 * torch.rand_like(given["log_decay"])
    given["log_decay"][:, 5::7, :, 2] = -torch.inf
    given["log_decay"][:, 3::9, :, 4] = -1e4
    assert_fused(given, fused_device)


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_never_read(kind, fused_device):
    given = rounded((1, 40, 1, 4, 3), kind, torch.float32)
    assert_future_unread(given, fused_device, "k", "a", "b")


def test_a_first_token_that_resets_reads_nothing_of_the_state(fused_device):
    given = rounded((1, 34, 1, 3, 4), "lowrank", torch.float32)
    given = {n: x.to(fused_device) for n, x in given.items()}
    reset = torch.zeros(1, 34, dtype=torch.bool, device=fused_device)
    reset[:, 0] = True
    alone = delta_lowrank(**given | {"initial_state": None}, backend="fused")
    given["initial_state"] = torch.full_like(given["initial_state"], 1e30)
    found = delta_lowrank(**given, reset=reset, backend="fused")
    assert all(torch.equal(x, y) for x, y in zip(found, alone, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_in_pieces_is_one_pass(kind, fused_device):
    assert_pieces_are_one_pass(rounded((1, 40, 1, 5, 3), kind, torch.float32), fused_device)


@pytest.mark.parametrize("shape", [(0, 4, 1, 3, 2), (2, 0, 1, 3, 2), (0, 1, 1, 3, 2)], ids=str)
def test_nothing(shape, fused_device):
    given = {n: x.to(fused_device) for n, x in rounded(shape, "lowrank", torch.float32).items()}
    o, state = delta_lowrank(**given, backend="fused")
    assert o.shape == given["v"].shape
    assert torch.equal(state, given["initial_state"])


def test_layout_in_memory_changes_nothing(fused_device):
    assert_layout_changes_nothing(rounded((1, 5, 2, 4, 6), "lowrank", torch.float32), fused_device)


def test_half_values_with_float32_keys_keep_each_gradient_in_its_dtype(fused_device):
    given = rounded((1, 33, 1, 4, 3), "lowrank scalar", torch.float32)
    given["v"] = given["v"].half()
    assert_fused(given, fused_device)


@pytest.mark.parametrize("name", ["log_decay", "a", "initial_state"])
def test_float64_is_refused_and_not_narrowed(name, fused_device):
    given = rounded((1, 2, 1, 3, 2), "lowrank", torch.float32)
    assert_float64_refused(given, name, fused_device)


@pytest.mark.skipif(not interpreting(), reason="a GPU computes in bfloat16, the interpreter cannot")
def test_the_interpreter_serves_only_by_name_and_never_bfloat16():
    assert choose("delta_lowrank", torch.zeros(1)) != "fused"
    with pytest.raises(ValueError, match="bfloat16; use"):
        delta_lowrank(**rounded((1, 2, 1, 3, 2), "lowrank", torch.bfloat16), backend="fused")


@pytest.mark.parametrize("T", [1, 33])
def test_it_keeps_its_promises_to_torch(T, fused_device):
    given = rounded((1, T, 1, 3, 2), "lowrank", torch.float16)
    order = ("q", "k", "v", "a", "b", "log_decay", "initial_state")
    tensors = [given[n].to(fused_device).requires_grad_() for n in order]
    name = "delta_lowrank_step" if T == 1 else "delta_lowrank"
    torch.library.opcheck(getattr(torch.ops.seqzoo, name).default, (*tensors, "fused"))


@pytest.mark.parametrize(
    "path", sorted(KERNELS.glob("delta_lowrank/fused_*.py")), ids=lambda p: p.stem
)
def test_no_part_has_a_32_bit_address_or_a_dot_of_unnamed_precision(path: Path):
    assert lint(path.read_text()) == []
