"""The Triton kernels against the definition in float64: on a GPU, or under the interpreter."""

from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from seqzoo.kernels.dispatch import choose, interpreting
from seqzoo.kernels.fused import GAIN, LEAST, PROGRAMS, stretch
from seqzoo.kernels.scan import scan
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.short_conv import short_conv
from seqzoo.kernels.wkv import no_tokens, wkv
from tests.tolerances import assert_close_to_reference

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.float16]  # the interpreter computes nonsense in bfloat16


def assert_right(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, reverse: bool
) -> None:
    B, _, D = shape
    a, b = torch.rand(shape).to(dtype), torch.randn(shape).to(dtype)
    start, dh, dstate = torch.randn(B, D), torch.randn(shape).to(dtype), torch.randn(B, D)
    made = []
    for wide in (False, True):
        where = {"device": "cpu", "dtype": torch.float64} if wide else {"device": device}
        leaves = [x.to(**where).requires_grad_() for x in (a, b, start)]
        backend = "reference" if wide else "fused"
        out = scan(*leaves[:2], initial_state=leaves[2], reverse=reverse, backend=backend)
        wanted = (dh.to(**where), dstate.to(**where))
        grads = torch.autograd.grad(out, leaves, wanted, materialize_grads=True)
        made.append([x.cpu() for x in (*out, *grads)])
    for i, name in enumerate(("h", "state", "da", "db", "dstart")):
        assert_close_to_reference(made[0][i], made[1][i], dtype, gradient=i > 1, name=name)
    assert [x.dtype for x in made[0]] == [dtype, torch.float32, dtype, dtype, torch.float32]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 5), (1, 16, 3), (1, 65, 3), (1, 17, 33)], ids=str)
def test_scan(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    reverse: bool,
    fused_device: str,
    poisoned_empty: None,
) -> None:
    assert_right(shape, dtype, fused_device, reverse)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_scan_cut_along_time_carries_states_and_gradients_from_stretch_to_stretch(
    reverse: bool, fused_device: str, poisoned_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = cut_every(16, "scan", monkeypatch)
    monkeypatch.setitem(fused.LONG, "BLOCK_T", 8)
    assert_right((2, 43, 3), torch.float32, fused_device, reverse)


def cut_every(steps: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    fused = import_module(f"seqzoo.kernels.{kernel}.fused")
    monkeypatch.setattr(fused, "stretch", lambda length, programs, multiple: steps)
    return fused


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3)], ids=str)
def test_scan_of_nothing(shape: tuple[int, int, int], fused_device: str) -> None:
    assert_right(shape, torch.float32, fused_device, False)


def test_scan_of_a_wide_decay_and_narrow_inputs_keeps_each_gradient_in_its_dtype(
    fused_device: str,
) -> None:
    a = torch.rand(1, 4, 3, device=fused_device, requires_grad=True)
    b = torch.randn(1, 4, 3, device=fused_device).half().requires_grad_()
    h, _ = scan(a, b, backend="fused")
    h.float().sum().backward()
    true = [x.detach().double().requires_grad_() for x in (a, b)]
    scan(*true, backend="reference")[0].sum().backward()
    for made, want in zip((a, b), true, strict=True):
        assert made.grad.dtype == made.dtype
        assert_close_to_reference(made.grad, want.grad, torch.float16, gradient=True)


def test_scan_of_a_float64_decay_is_refused_and_not_narrowed(fused_device: str) -> None:
    a = torch.rand(1, 4, 3, device=fused_device, dtype=torch.float64)
    with pytest.raises(ValueError, match="not float64; use"):
        scan(a, a.float(), backend="fused")


@pytest.mark.skipif(not interpreting(), reason="a GPU computes in bfloat16, the interpreter cannot")
def test_the_interpreter_serves_only_by_name_and_never_bfloat16() -> None:
    b = torch.zeros(1, 2, 3)
    assert choose("scan", b) == "native"
    with pytest.raises(ValueError, match="bfloat16; use native or chunked"):
        scan(b.bfloat16(), b.bfloat16(), backend="fused")


def test_scan_keeps_its_promises_to_torch(fused_device: str) -> None:
    a = torch.rand(1, 2, 3, device=fused_device)
    given = (a, a.clone(), a[:, 0].clone(), False, "fused")
    torch.library.opcheck(torch.ops.seqzoo.scan.default, given)


def selective_inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    B, T, D, N = shape
    made = {"u": torch.randn(B, T, D).to(dtype), "dt": torch.rand(B, T, D).to(dtype)}
    made |= {"A": -4 * torch.rand(D, N), "B": torch.randn(B, T, N).to(dtype)}
    made |= {"C": torch.randn(B, T, N).to(dtype), "D": torch.randn(D)}
    return made | {"initial_state": torch.randn(B, D, N)}


def assert_selective_right(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, resets: bool
) -> None:
    given = selective_inputs(shape, dtype)
    dy, dstate = torch.randn(shape[:3]).to(dtype), torch.randn_like(given["initial_state"])
    reset = (torch.arange(shape[1]) % 7 == 4).expand(shape[:2]) if resets else None
    made = []
    for wide in (False, True):
        where = {"device": "cpu", "dtype": torch.float64} if wide else {"device": device}
        leaves = {k: v.to(**where).requires_grad_() for k, v in given.items()}
        at = None if reset is None else reset.to(where["device"])
        out = selective_scan(**leaves, reset=at, backend="reference" if wide else "fused")
        wanted = (dy.to(**where), dstate.to(**where))
        grads = torch.autograd.grad(out, list(leaves.values()), wanted, materialize_grads=True)
        made.append([x.cpu() for x in (*out, *grads)])
    for i, name in enumerate(("y", "state", *given)):
        assert_close_to_reference(made[0][i], made[1][i], dtype, gradient=i > 1, name=name)
    kept = [dtype, torch.float32, *(x.dtype for x in given.values())]
    assert [x.dtype for x in made[0]] == kept


@pytest.mark.parametrize(
    ("shape", "dtype", "resets"),
    [
        ((2, 5, 3, 4), torch.float16, False),
        ((1, 6, 33, 16), torch.float16, True),
        ((1, 69, 2, 20), torch.float32, True),
        ((1, 3, 2, 50), torch.float32, False),
    ],
    ids=["filled up", "two groups of channels", "two blocks of time", "most states"],
)
def test_selective_scan(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    resets: bool,
    fused_device: str,
    poisoned_empty: None,
) -> None:
    assert_selective_right(shape, dtype, fused_device, resets)


@pytest.mark.parametrize("resets", [False, True], ids=["one document", "several"])
def test_selective_scan_cut_along_time_carries_states_and_gradients_from_stretch_to_stretch(
    resets: bool, fused_device: str, poisoned_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = cut_every(4, "selective_scan", monkeypatch)
    monkeypatch.setattr(fused, "BLOCK", 4)
    assert_selective_right((1, 11, 2, 3), torch.float32, fused_device, resets)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 4, 0, 2), (2, 0, 3, 2)], ids=str)
def test_selective_scan_of_nothing(shape: tuple[int, int, int, int], fused_device: str) -> None:
    assert_selective_right(shape, torch.float32, fused_device, False)


def test_selective_scan_of_wide_steps_and_narrow_inputs_keeps_each_gradient_in_its_dtype(
    fused_device: str,
) -> None:
    given = selective_inputs((1, 3, 2, 2), torch.float16)
    given["dt"] = torch.rand(1, 3, 2)
    leaves = {k: v.to(fused_device).requires_grad_() for k, v in given.items()}
    true = {k: v.detach().double().requires_grad_() for k, v in given.items()}
    selective_scan(**leaves, backend="fused")[0].float().sum().backward()
    selective_scan(**true, backend="reference")[0].sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype
        gradient = leaf.grad.cpu()
        assert_close_to_reference(gradient, true[name].grad, torch.float16, gradient=True)


@pytest.mark.skipif(not interpreting(), reason="a GPU computes in bfloat16, the interpreter cannot")
def test_the_interpreter_serves_selective_scan_only_by_name_and_never_bfloat16() -> None:
    assert choose("selective_scan", torch.zeros(1, 2, 3)) == "native"
    with pytest.raises(ValueError, match="bfloat16; use native or chunked"):
        selective_scan(**selective_inputs((1, 2, 3, 2), torch.bfloat16), backend="fused")


def test_selective_scan_keeps_its_promises_to_torch(fused_device: str) -> None:
    given = selective_inputs((1, 2, 3, 2), torch.float16)
    del given["D"]
    tensors = [x.to(fused_device) for x in given.values()]
    reset = torch.tensor([[False, True]], device=fused_device)
    operator = torch.ops.seqzoo.selective_scan.default
    torch.library.opcheck(operator, (*tensors, reset, "fused"))


def marked(B: int, T: int, used: tuple[str, ...]) -> dict[str, Tensor]:
    mask = torch.rand(B, T) < 0.7
    flags = {"mask": mask, "reset": torch.rand(B, T) < 0.1}
    if "mask" in used:
        flags["reset"] &= mask
    return {name: flags[name] for name in used}


def conv_inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    B, T, D, W = shape
    made = {"x": torch.randn(B, T, D).to(dtype), "weight": torch.randn(D, W)}
    return made | {"bias": torch.randn(D), "initial_state": torch.randn(B, W - 1, D)}


def assert_conv_right(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    used: tuple[str, ...] = (),
    activation: str | None = "silu",
) -> None:
    given, flags = conv_inputs(shape, dtype), marked(*shape[:2], used)
    dy, dtail = torch.randn(shape[:3]).to(dtype), torch.randn_like(given["initial_state"])
    if "mask" in flags:
        given["x"] = torch.where(flags["mask"][..., None], given["x"], torch.nan)
    made = []
    for wide in (False, True):
        where = {"device": "cpu", "dtype": torch.float64} if wide else {"device": device}
        leaves = {k: v.to(**where).requires_grad_() for k, v in given.items()}
        at = {k: v.to(where["device"]) for k, v in flags.items()}
        backend = "reference" if wide else "fused"
        out = short_conv(**leaves, **at, activation=activation, backend=backend)
        wanted = (dy.to(**where), dtail.to(**where))
        grads = torch.autograd.grad(out, list(leaves.values()), wanted, materialize_grads=True)
        made.append([x.cpu() for x in (*out, *grads)])
    for i, name in enumerate(("y", "tail", *given)):
        assert_close_to_reference(made[0][i], made[1][i], dtype, gradient=i > 1, name=name)
    kept = [dtype, torch.float32, *(x.dtype for x in given.values())]
    assert [x.dtype for x in made[0]] == kept


@pytest.mark.parametrize("used", [(), ("reset",), ("mask",), ("mask", "reset")], ids="+".join)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 2, 5, 4), torch.float16),
        ((1, 63, 3, 4), torch.float32),
        ((1, 5, 130, 1), torch.float16),
    ],
    ids=["shorter than the window", "two stretches", "two blocks of channels"],
)
def test_short_conv(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    used: tuple[str, ...],
    fused_device: str,
    poisoned_empty: None,
) -> None:
    assert_conv_right(shape, dtype, fused_device, used)


def test_short_conv_without_activation_hands_on_what_comes(
    fused_device: str, poisoned_empty: None
) -> None:
    assert_conv_right((2, 9, 3, 3), torch.float32, fused_device, activation=None)


@pytest.mark.parametrize("used", [(), ("mask", "reset")], ids="+".join)
@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 4, 0, 2), (2, 0, 3, 4)], ids=str)
def test_short_conv_of_nothing(
    shape: tuple[int, int, int, int], used: tuple[str, ...], fused_device: str
) -> None:
    assert_conv_right(shape, torch.float32, fused_device, used)


def test_short_conv_of_strided_tensors_reads_each_number_where_it_lies(fused_device: str) -> None:
    given = {k: v.to(fused_device) for k, v in conv_inputs((2, 7, 5, 4), torch.float32).items()}
    strided = {k: v.mT.contiguous().mT if v.ndim > 1 else v for k, v in given.items()}
    made = []
    for leaves in (given, strided):
        leaves = {k: v.requires_grad_() for k, v in leaves.items()}
        y, tail = short_conv(**leaves, backend="fused")
        loss = sum(x.mT.contiguous().square().sum() for x in (y, tail))
        made.append([y, tail, *torch.autograd.grad(loss, list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_short_conv_with_float64_weights_is_refused_and_not_narrowed(fused_device: str) -> None:
    given = {k: v.to(fused_device) for k, v in conv_inputs((1, 4, 3, 2), torch.float32).items()}
    with pytest.raises(ValueError, match="not float64; use"):
        short_conv(given["x"], given["weight"].double(), backend="fused")


@pytest.mark.parametrize("used", [(), ("mask", "reset")], ids="+".join)
def test_short_conv_keeps_its_promises_to_torch(used: tuple[str, ...], fused_device: str) -> None:
    given = [x.to(fused_device) for x in conv_inputs((2, 3, 5, 3), torch.float16).values()]
    flags = marked(2, 3, used)
    asked = [flags[k].to(fused_device) if k in flags else None for k in ("reset", "mask")]
    operator = torch.ops.seqzoo.short_conv.default
    torch.library.opcheck(operator, (*given, *asked, True, "fused"))
    gradients = [torch.randn_like(given[0]), torch.randn_like(given[3])]
    operator = torch.ops.seqzoo.short_conv_backward.default
    torch.library.opcheck(operator, (*given, *asked, *gradients, True, "fused"))


@pytest.mark.skipif(not interpreting(), reason="a GPU computes in bfloat16, the interpreter cannot")
def test_the_interpreter_serves_short_conv_only_by_name_and_never_bfloat16() -> None:
    assert choose("short_conv", torch.zeros(1, 2, 3), None, ("reset", "mask")) == "native"
    with pytest.raises(ValueError, match="bfloat16; use native or chunked"):
        short_conv(**conv_inputs((1, 2, 3, 2), torch.bfloat16), backend="fused")


def wkv_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    B, _, D = shape
    state = [torch.randn(B, D), torch.rand(B, D) + 0.5, torch.randn(B, D)]
    return {
        "k": (2 * torch.randn(shape)).to(dtype),
        "v": torch.randn(shape).to(dtype),
        "w": torch.linspace(-4, 2, D).exp(),
        "u": torch.randn(D),
        "initial_state": torch.stack(state, dim=1),
    }


def assert_wkv_right(
    given: dict[str, Tensor], dtype: torch.dtype, device: str, used: tuple[str, ...] = ()
) -> None:
    flags = marked(*given["k"].shape[:2], used)
    dy, dstate = torch.randn_like(given["v"]), torch.randn_like(given["initial_state"])
    made = []
    for wide in (False, True):
        where = {"device": "cpu", "dtype": torch.float64} if wide else {"device": device}
        leaves = {k: v.to(**where).requires_grad_() for k, v in given.items()}
        at = {k: v.to(where["device"]) for k, v in flags.items()}
        out = wkv(**leaves, **at, backend="reference" if wide else "fused")
        wanted = (dy.to(**where), dstate.to(**where))
        grads = torch.autograd.grad(out, list(leaves.values()), wanted, materialize_grads=True)
        made.append([x.cpu() for x in (*out, *grads)])
    for i, name in enumerate(("y", "state", *given)):
        assert_close_to_reference(made[0][i], made[1][i], dtype, gradient=i > 1, name=name)
    kept = [dtype, torch.float32, *(x.dtype for x in given.values())]
    assert [x.dtype for x in made[0]] == kept


@pytest.mark.parametrize("used", [(), ("reset",), ("mask",), ("mask", "reset")], ids="+".join)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 5), torch.float16),
        ((1, 6, 33), torch.float32),
        ((2, 21, 3), torch.float32),
    ],
    ids=["less than a block", "two blocks of channels", "several blocks of time"],
)
def test_wkv(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    used: tuple[str, ...],
    fused_device: str,
    poisoned_empty: None,
) -> None:
    assert_wkv_right(wkv_inputs(shape, dtype), dtype, fused_device, used)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3)], ids=str)
def test_wkv_of_nothing(shape: tuple[int, int, int], fused_device: str) -> None:
    assert_wkv_right(wkv_inputs(shape, torch.float32), torch.float32, fused_device)


def test_wkv_rounding_its_maximum_at_every_step_would_lose_the_decay(fused_device: str) -> None:
    given = wkv_inputs((1, 150, 2), torch.float32)
    given["w"] = torch.tensor([1e-3, 7.7e-3])
    given["k"][:, 0] = 9.0  # and no token wins again
    given["initial_state"] = no_tokens(1, 2, None, torch.float32)
    y, state = wkv(**{k: v.to(fused_device) for k, v in given.items()}, backend="fused")
    true = wkv(**{k: v.double() for k, v in given.items()}, backend="reference")
    assert_close_to_reference(y.cpu(), true[0])
    assert_close_to_reference(state.cpu(), true[1])


def test_wkv_keeps_its_promises_to_torch(fused_device: str) -> None:
    given = [x.to(fused_device) for x in wkv_inputs((2, 3, 4), torch.float32).values()]
    flags = [x.to(fused_device) for x in marked(2, 3, ("reset", "mask")).values()]
    torch.library.opcheck(torch.ops.seqzoo.wkv.default, (*given, *flags, "fused"))


@pytest.mark.parametrize("length", [1024, 1025, 4096, 100_003])
def test_stretches_fill_a_gpu_and_no_more(length: int) -> None:
    steps = stretch(length, 8, 64)
    assert steps % 64 == 0
    assert GAIN <= -(-length // steps) <= PROGRAMS // 8
    assert stretch(length, PROGRAMS, 64) == length
    assert stretch(LEAST * GAIN - 1, 1, 64) == LEAST * GAIN - 1
    assert stretch(0, 0, 64) == 0
