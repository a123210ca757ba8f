"""Decayed linear attention in Triton against the definition in float64, on GPU or interpreted."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import choose, interpreting
from tests.kernels.static_gate import KERNELS, lint
from tests.kernels.test_decay import compare, everything, flags, inputs, leaves, truth

pytest.importorskip("triton")
tl = import_module("triton.language")


def assert_right(
    given: dict[str, Tensor], dtype: torch.dtype, device: str, **options: object
) -> None:
    given = leaves(given, dtype)
    there = {n: x.detach().to(device).requires_grad_() for n, x in given.items()}
    asked = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}
    found = everything(there, **asked, backend="fused")
    compare({n: x.cpu() for n, x in found.items()}, truth(given, **options), dtype)
    for name, x in there.items():
        assert found[f"gradient of {name}"].dtype == x.dtype


# kind, dtype, B, T, Hk, value heads of each, K, V, read, bonus, masks and resets
CASES = {
    "less than half a chunk": ("none", torch.float32, 2, 15, 1, 1, 5, 3, "after", False, False),
    "exactly one chunk": ("vector", torch.float16, 1, 64, 1, 1, 3, 20, "after", False, True),
    "one token more": ("scalar", torch.float16, 1, 65, 1, 2, 20, 5, "after", False, True),
    "two tokens": ("vector", torch.float32, 2, 2, 1, 2, 4, 3, "before", False, False),
    "shared by heads": ("vector", torch.float32, 1, 66, 1, 2, 6, 7, "before", True, True),
    "blocks of keys": ("scalar", torch.float32, 1, 17, 2, 1, 70, 3, "before", True, True),
    "blocks of channels": ("vector", torch.float32, 1, 16, 1, 1, 70, 3, "after", False, False),
    "blocks of values": ("scalar", torch.float32, 1, 100, 1, 1, 3, 70, "after", False, True),
    "a bonus in float16": ("vector", torch.float16, 1, 17, 1, 2, 12, 8, "before", True, True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_number_is_the_loop(
    case: tuple[object, ...], fused_device: str, poisoned_empty: None
) -> None:
    kind, dtype, *shape, read, bonus, marked = case
    options = flags(*shape[:2]) if marked else {}
    given = inputs(*shape, kind=kind, bonus=bonus)
    assert_right(given, dtype, fused_device, read=read, scale=0.7, **options)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
@pytest.mark.parametrize("strength", [0.0, 20.0, 88.0, torch.inf, "mixed"])
def test_no_decay_is_too_strong(
    strength: float | str, kind: str, fused_device: str, poisoned_empty: None
) -> None:
    given = inputs(1, 19, 1, 1, 3, 4, kind=kind)
    g = given["log_decay"]
    if strength == "mixed":  # what strong ones leave of mild ones, and at every border of halves
        strong = torch.tensor([20.0, 88.0, 1e4, torch.inf])[torch.randint(4, g.shape)].double()
        given["log_decay"] = torch.where(torch.rand_like(g) < 0.2, -strong, g)
    else:
        given["log_decay"] = torch.full_like(g, -strength)
    assert_right(given, torch.float32, fused_device)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_a_walk_cut_in_stretches_carries_states_and_gradients_over(
    kind: str, fused_device: str, poisoned_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = import_module("seqzoo.kernels.decay.fused")
    monkeypatch.setattr(fused, "stretch", lambda length, programs, multiple: multiple)
    assert_right(inputs(1, 150, 1, 1, 3, 4, kind=kind), torch.float32, fused_device)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_longer_chunks_as_bfloat16_has_them(
    kind: str, fused_device: str, poisoned_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = import_module("seqzoo.kernels.decay.fused")
    monkeypatch.setitem(fused.CHUNKS, torch.float32, fused.CHUNKS[torch.bfloat16])
    assert_right(inputs(1, 67, 1, 1, 3, 4, kind=kind), torch.float32, fused_device)


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
def test_a_single_token(kind: str, read: str, fused_device: str, poisoned_empty: None) -> None:
    given = inputs(2, 1, 2, 2, 20, 40, kind=kind, bonus=read == "before")
    assert_right(given, torch.float16, fused_device, read=read)
    narrow = leaves(given, torch.float16)
    with torch.no_grad():  # the kernel of a decoding step
        there = {n: x.to(fused_device) for n, x in narrow.items()}
        o, state = decay(**there, read=read, backend="fused")
        wide = decay(**{n: x.double() for n, x in narrow.items()}, read=read, backend="reference")
    compare(
        {"output": o.cpu(), "state": state.cpu()},
        dict(zip(("output", "state"), wide, strict=True)),
        o.dtype,
    )


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_the_future_is_never_read(kind: str, fused_device: str) -> None:
    given = {n: x.float().to(fused_device) for n, x in inputs(1, 70, 1, 1, 4, 3, kind=kind).items()}
    o = decay(**given, backend="fused")[0]
    for t in (1, 31, 32, 50, 69):
        other = dict(given)
        for name in ("q", "k", "v", "log_decay"):
            other[name] = torch.cat([given[name][:, :t], 1e4 * given[name][:, t:]], dim=1)
        assert torch.equal(decay(**other, backend="fused")[0][:, :t], o[:, :t])


@pytest.mark.parametrize(
    "shape",
    [(0, 4, 1, 1, 3, 2), (2, 0, 1, 1, 3, 2), (2, 4, 1, 1, 3, 0), (2, 4, 1, 1, 0, 3)],
    ids=str,
)
def test_nothing(shape: tuple[int, ...], fused_device: str, poisoned_empty: None) -> None:
    assert_right(inputs(*shape, kind="vector"), torch.float32, fused_device)


def test_layout_in_memory_changes_nothing(fused_device: str) -> None:
    given = {
        n: x.float().to(fused_device) for n, x in inputs(1, 6, 2, 1, 4, 3, kind="vector").items()
    }
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in given.items()}
    found, other = (
        everything({n: x.requires_grad_() for n, x in made.items()}, backend="fused")
        for made in (given, strided)
    )
    assert all(torch.equal(other[name], x) for name, x in found.items())


def test_the_operators_keep_their_promises_to_torch(fused_device: str) -> None:
    given = leaves(inputs(1, 2, 1, 1, 4, 3, kind="vector"), torch.float16)
    order = ("q", "k", "v", "log_decay", "initial_state")
    tensors = [given[n].detach().to(fused_device).requires_grad_() for n in order]
    torch.library.opcheck(torch.ops.seqzoo.decay.default, (*tensors, "fused"))
    token = [x[:, :1].detach() for x in tensors[:4]]
    step = torch.ops.seqzoo.decay_step.default
    torch.library.opcheck(step, (*token, tensors[4].detach(), True))


@pytest.mark.parametrize("name", ["programs.py", "tiles.py"])
def test_what_the_kernels_are_made_of_is_held_to_the_rules_of_fused_py(name: str) -> None:
    assert lint((KERNELS / "decay" / name).read_text()) == []


@pytest.mark.slow
@pytest.mark.skipif(not interpreting(), reason="a GPU rounds by itself")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_factors_in_bfloat16_parts_hold_the_budget(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter cannot round to bfloat16: here the parts are float32 numbers with 16 bits.
    fused = import_module("seqzoo.kernels.decay.fused")
    programs = import_module("seqzoo.kernels.decay.programs")
    half = dtype == torch.bfloat16
    count = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}[dtype]
    monkeypatch.setitem(fused.CHUNKS, torch.float32, fused.CHUNKS[dtype])

    def product(x: tl.tensor, y: tl.tensor, _: str, EXACT: bool = False) -> tl.tensor:
        left = parts(x, 2 if half and not EXACT else count)
        pairs = [(i, j) for i in range(len(left)) for j in range(count) if half or i + j < count]
        right = parts(y, count)
        return sum(tl.dot(left[i], right[j], input_precision="ieee") for i, j in pairs)

    def sums(counted: tl.tensor, x: tl.tensor, _: str) -> tl.tensor:
        ones = tl.where(counted, 1.0, 0.0)
        return sum(tl.dot(ones, y, input_precision="ieee") for y in parts(x, max(count, 2)))

    monkeypatch.setattr(programs, "product", product)
    monkeypatch.setattr(programs, "sums", sums)
    given = leaves(inputs(1, 150, 2, 2, 24, 20, kind=kind), dtype)
    if half:  # the same numbers
        given = {n: x.detach().float().requires_grad_() for n, x in given.items()}
    compare(everything(given, backend="fused"), truth(given), dtype)


def parts(x: tl.tensor, count: int) -> list[tl.tensor]:
    """Bfloat16 numbers, as float32, that add up to nearly x."""
    made, x = [], x.to(tl.float32)
    for _ in range(count):
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        made.append(bits.to(tl.float32, bitcast=True))
        x = x - made[-1]
    return made


def test_a_float64_decay_is_refused_and_not_narrowed(fused_device: str) -> None:
    given = {n: x.to(fused_device) for n, x in inputs(1, 4, 1, 1, 3, 2, kind="scalar").items()}
    narrow = {n: x.float() for n, x in given.items()} | {"log_decay": given["log_decay"]}
    with pytest.raises(ValueError, match="not float64; use"):
        decay(**narrow, backend="fused")


@pytest.mark.skipif(not interpreting(), reason="a GPU computes in bfloat16, the interpreter cannot")
def test_the_interpreter_serves_only_by_name_and_never_bfloat16() -> None:
    assert choose("decay", torch.zeros(1, 2, 3)) != "fused"
    given = leaves(inputs(1, 4, 1, 1, 3, 2, kind="scalar"), torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16; use .*chunked"):
        decay(**given, backend="fused")
