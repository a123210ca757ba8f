"""The short convolution against a float64 loop over time and against torch's own convolution."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

from seqzoo.kernels.dispatch import BACKENDS
from seqzoo.kernels.short_conv import short_conv
from tests.tolerances import assert_close_to_reference, budget, relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# (B, T, D, W): shorter than the window, W = 1, a width that fills no vector, one large enough for
# the library convolution, one of several blocks of channels and of several sums of weights
SHAPES = [(3, 2, 5, 4), (2, 9, 4, 1), (2, 33, 7, 2), (2, 100, 96, 4), (1, 150, 301, 3)]
BACKENDS_HERE = ["native", "chunked", "reference"]


def inputs(B: int, T: int, D: int, W: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = {
        "x": torch.randn(B, T, D),
        "weight": torch.randn(D, W),
        "bias": torch.randn(D),
        "initial_state": torch.randn(B, W - 1, D),
    }
    return {k: v.to(dtype).requires_grad_() for k, v in made.items()}


def flags(B: int, T: int) -> dict[str, Tensor]:
    mask = torch.rand(B, T) < 0.6
    return {"mask": mask, "reset": (torch.rand(B, T) < 0.3) & mask}


def weights(x: Tensor) -> Tensor:
    """Numbers that every dtype holds exactly."""
    return ((torch.arange(x.numel()) * 7 % 13 - 4) / 8).view_as(x).to(x.dtype)


def differentiated(given: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    y, tail = short_conv(**given, **options)
    loss = sum((r * weights(r)).sum().double() for r in (y, tail))
    grads = torch.autograd.grad(loss, given.values(), materialize_grads=True)
    return {"y": y, "tail": tail} | {
        f"gradient of {k}": g for k, g in zip(given, grads, strict=True)
    }


def widened(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().double().requires_grad_() for k, v in given.items()}


@pytest.mark.parametrize("used", [(), ("reset",), ("mask",), ("mask", "reset")], ids="+".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_every_number_is_within_budget_of_the_float64_loop(
    backend, dtype, shape, used, poisoned_empty
):
    given = inputs(*shape, dtype)
    options = {k: v for k, v in flags(*shape[:2]).items() if k in used}
    found = differentiated(given, **options, activation="silu", backend=backend)
    wanted = differentiated(widened(given), **options, activation="silu", backend="reference")
    for name, value in found.items():
        gradient = name.startswith("gradient")
        assert_close_to_reference(value, wanted[name], dtype, gradient=gradient, name=name)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_taps_in_the_wrong_order_would_differ_from_torch_conv1d(backend):
    given = inputs(2, 20, 6, 4)
    y, _ = short_conv(**given, backend=backend)
    x = torch.cat([given["initial_state"], given["x"]], dim=1).mT
    wanted = conv1d(x, given["weight"][:, None], given["bias"], groups=6).mT
    assert_close_to_reference(y, wanted)
    no_bias = short_conv(given["x"], given["weight"], activation="silu", backend=backend)[0]
    padded = conv1d(given["x"].mT, given["weight"][:, None], padding=3, groups=6)[..., :20].mT
    assert_close_to_reference(no_bias, silu(padded))


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("where", ["left", "inside", "right"])
def test_a_masked_token_takes_a_slot_of_no_window(where, backend):
    given, slots = inputs(4, 12, 5, 4), torch.arange(12)
    lengths = torch.tensor([12, 5, 2, 0])[:, None]
    inside = torch.rand(4, 12) < 0.5
    mask = {"left": slots >= 12 - lengths, "right": slots < lengths, "inside": inside}[where]
    y, tail = short_conv(**given, mask=mask, backend=backend)
    for row in range(4):
        alone = given | {k: given[k][row : row + 1] for k in ("x", "initial_state")}
        alone["x"] = alone["x"][:, mask[row]]
        wanted, its_tail = short_conv(**alone, backend=backend)
        assert_close_to_reference(y[row : row + 1, mask[row]], wanted)
        assert_close_to_reference(tail[row : row + 1], its_tail)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_what_masked_tokens_contain_reaches_nobody_not_even_as_nan(backend):
    given, mask = inputs(2, 10, 3, 4), flags(2, 10)["mask"]
    wanted = differentiated(given, mask=mask, backend=backend)
    spoilt = torch.where(mask[..., None], given["x"], torch.nan).detach().requires_grad_()
    found = differentiated(given | {"x": spoilt}, mask=mask, backend=backend)
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_no_window_reaches_into_the_document_before(backend):
    given, lengths = inputs(2, 14, 5, 4), (1, 6, 2, 5)
    starts = torch.tensor([0, 1, 7, 9])
    reset = torch.zeros(2, 14, dtype=torch.bool)
    reset[:, starts] = True
    y, tail = short_conv(**given, reset=reset, backend=backend)
    alone = [
        short_conv(x, given["weight"], given["bias"], backend=backend)
        for x in given["x"].split(lengths, dim=1)
    ]
    assert_close_to_reference(y, torch.cat([y for y, _ in alone], dim=1))
    assert_close_to_reference(tail, alone[-1][1])
    _, short = short_conv(given["x"][:, :8], given["weight"], reset=reset[:, :8], backend=backend)
    assert not short[:, :2].any(), "the tail reaches before the document's first token"


@pytest.mark.parametrize("used", [(), ("reset",), ("mask",), ("mask", "reset")], ids="+".join)
@pytest.mark.parametrize("split", [(1,) * 12, (2, 1, 3, 6), (0, 1, 0, 11), (12, 0)], ids=str)
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_a_chunk_shorter_than_the_window_keeps_the_tail_before_it(backend, split, used):
    given = inputs(2, 12, 5, 5)
    options = {k: v for k, v in flags(2, 12).items() if k in used}
    whole, last = short_conv(**given, **options, backend=backend)
    tail, pieces, start = given["initial_state"], [], 0
    for n in split:
        part = {k: v[:, start : start + n] for k, v in options.items()}
        piece = given | {"x": given["x"][:, start : start + n], "initial_state": tail}
        y, tail = short_conv(**piece, **part, backend=backend)
        pieces.append(y)
        start += n
    assert_close_to_reference(torch.cat(pieces, dim=1), whole)
    assert_close_to_reference(tail, last)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (0, 5, 3, 4), (0, 0, 3, 1)], ids=str)
def test_nothing_in_gives_nothing_out_and_the_state_back(shape, backend):
    given = inputs(*shape)
    for options in ({}, flags(*shape[:2])):
        y, tail = short_conv(**given, **options, backend=backend)
        assert y.shape == given["x"].shape
        assert torch.equal(tail, given["initial_state"])


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_gradients_are_derivatives(backend, activation):
    given, options = inputs(2, 5, 3, 4), flags(2, 5)

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(given, values, strict=True))
        return short_conv(**named, **options, activation=activation, backend=backend)

    assert torch.autograd.gradcheck(run, tuple(given.values()))


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_autocast_reaches_neither_the_sums_nor_a_backward_pass_under_it(backend):
    given = inputs(2, 100, 96, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = differentiated(given, backend=backend)
    wanted = differentiated(widened(given), backend="reference")
    for name, value in found.items():
        gradient = name.startswith("gradient")
        assert_close_to_reference(value, wanted[name], gradient=gradient, name=name)


def test_the_tail_keeps_the_width_of_the_state_that_came_in():
    given = inputs(1, 3, 4, 4, torch.float32)
    given["x"] = given["x"].bfloat16()
    y, tail = short_conv(**given)
    assert (y.dtype, tail.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_strides_change_nothing(backend):
    given = inputs(2, 100, 96, 4, torch.float32)
    strided = {k: v.mT.contiguous().mT if v.ndim > 1 else v for k, v in given.items()}
    assert not strided["x"].is_contiguous()
    for a, b in zip(
        *(differentiated(x, backend=backend).values() for x in (strided, given)), strict=True
    ):
        assert relative_error(a, b) <= budget(torch.float32, gradient=True)


@pytest.mark.parametrize("used", [(), ("mask", "reset")], ids="+".join)
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_compiles_without_a_graph_break(backend, used):
    given = inputs(2, 100, 96, 4, torch.float32)
    options = {k: v for k, v in flags(2, 100).items() if k in used}
    torch.compiler.reset()
    run = partial(short_conv, backend=backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for T in (100, 90, 1):
        cut = {k: v[:, :T] for k, v in options.items()}
        part = given | {"x": given["x"][:, :T].detach().requires_grad_()}
        found, wanted = compiled(**part, **cut), run(**part, **cut)
        assert relative_error(found[0], wanted[0]) <= budget(torch.float32)
        assert torch.equal(found[1], wanted[1])
        a, b = (torch.autograd.grad(y.square().sum(), part["x"])[0] for y, _ in (found, wanted))
        assert relative_error(a, b) <= budget(torch.float32, gradient=True)


def test_meta_tensors_give_shapes():
    given = {k: v.to("meta") for k, v in inputs(2, 50, 400, 4, torch.float32).items()}
    y, tail = short_conv(**given, **{k: v.to("meta") for k, v in flags(2, 50).items()})
    assert (y.shape, tail.shape) == (given["x"].shape, given["initial_state"].shape)


def test_what_does_not_fit_is_refused_by_name():
    given, options = inputs(2, 5, 3, 4), flags(2, 5)
    for wrong, words in [
        ({"x": torch.zeros(5, 3)}, "short_conv takes"),
        ({"weight": torch.zeros(3)}, "weight is"),
        ({"weight": torch.zeros(4, 4)}, "weight is"),
        ({"bias": torch.zeros(4)}, "bias is"),
        ({"initial_state": torch.zeros(2, 4, 3)}, "initial_state is"),
        ({"mask": options["mask"][:, :4]}, "mask is"),
        ({"reset": options["reset"][:1]}, "reset is"),
        ({"activation": "gelu"}, "silu"),
        ({"backend": "nonesuch"}, "backend of short_conv"),
    ]:
        with pytest.raises(ValueError, match=words):
            short_conv(**(given | wrong))


def test_weight_gradients_do_not_lose_digits_as_the_sequence_grows():
    given = inputs(1, 65536, 16, 4, torch.float32)
    given = {k: v.detach().requires_grad_() for k, v in given.items()}
    found = differentiated(given, activation="silu", backend="native")
    wanted = differentiated(widened(given), activation="silu", backend="chunked")
    for name in ("gradient of weight", "gradient of bias"):
        assert_close_to_reference(found[name], wanted[name], gradient=True, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_silu_far_from_zero_stays_finite_and_right(dtype):
    x = torch.tensor([0, 1e-30, 1, 15, 40, 87, 89, 200, 700, 1e4, 1e30], dtype=dtype)
    x = torch.cat([-x, x])[None, None].requires_grad_()
    y, _ = short_conv(x, torch.ones(22, 1, dtype=dtype), activation="silu", backend="native")
    wide = x.detach().double().requires_grad_()
    wanted = silu(wide)
    torch.testing.assert_close(y.double(), wanted, rtol=budget(dtype), atol=1e-14)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (dwide,) = torch.autograd.grad(wanted.sum(), wide)
    torch.testing.assert_close(dx.double(), dwide, rtol=budget(dtype), atol=1e-14)


def test_nan_and_infinity_in_a_token_are_seen_in_its_output():
    x = torch.ones(1, 6, 20)
    x[0, 2, 3], x[0, 2, 4] = torch.nan, torch.inf
    y, _ = short_conv(x, torch.ones(20, 2), activation="silu", backend="native")
    assert y[0, 2:4, 3].isnan().all()
    assert y[0, 2:4, 4].isinf().all()
    assert int(y.isfinite().logical_not().sum()) == 4


def test_threads_do_not_change_a_bit():
    given, options = inputs(3, 300, 301, 4, torch.float32), flags(3, 300)
    one = differentiated(given, **options, activation="silu", backend="native")
    torch.set_num_threads(2)
    two = differentiated(given, **options, activation="silu", backend="native")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("used", [(), ("mask", "reset")], ids="+".join)
def test_the_operators_are_what_they_say_to_torch(used):
    given, options = inputs(2, 9, 5, 3), flags(2, 9)
    flagged = [options[name] if name in used else None for name in ("reset", "mask")]
    arguments = (*given.values(), *flagged, True)
    torch.library.opcheck(torch.ops.seqzoo.short_conv.default, arguments)
    gradients = (torch.randn(2, 9, 5).double(), torch.randn(2, 2, 5).double())
    values = [v.detach() for v in given.values()]
    backward = torch.ops.seqzoo.short_conv_backward.default
    torch.library.opcheck(backward, (*values, *flagged, *gradients, True))


def test_a_call_does_not_import_the_whole_compiler_of_torch():
    code = (
        "import sys, torch; from seqzoo.kernels.short_conv import short_conv; "
        "x = torch.ones(1, 5, 3, requires_grad=True); "
        "short_conv(x, torch.ones(3, 2), backend='native')[0].sum().backward(); "
        "print('torch._dynamo' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_more_taps_than_the_native_code_takes_are_served_by_another():
    given = inputs(2, 40, 5, 17, torch.float32)
    y, _ = short_conv(**given)
    assert_close_to_reference(y, short_conv(**widened(given), backend="reference")[0], y.dtype)
    with pytest.raises(ValueError, match="more than 16 taps; use chunked"):
        short_conv(**given, backend="native")


@pytest.fixture
def packaged(monkeypatch):
    """The package causal-conv1d as its README has it, in torch, and a device that it may serve."""

    def causal_conv1d_fn(
        x, weight, bias, initial_states=None, return_final_states=False, activation=None
    ):
        assert x.stride(1) == 1, "channels last"
        assert initial_states.stride(1) == 1
        row = torch.cat([initial_states, x], dim=2)
        y = conv1d(row, weight[:, None], bias, groups=len(weight))
        last = row[..., x.shape[2] :]
        return (silu(y) if activation == "silu" else y), last

    module = ModuleType("causal_conv1d")
    module.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    served, *others = BACKENDS["short_conv"]
    here = dataclasses.replace(served, devices=("cpu",), needs=())
    monkeypatch.setitem(BACKENDS, "short_conv", (here, *others))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_package_is_given_what_it_expects(activation, packaged):
    given = inputs(2, 9, 4, 3, torch.float32)
    options = {"activation": activation}
    found = differentiated(given, backend="causal_conv1d", **options)
    for name, ref in differentiated(given, backend="reference", **options).items():
        assert relative_error(found[name], ref) <= 1e-6, name


@pytest.mark.parametrize(
    ("W", "extra", "why"),
    [(5, {}, "so many taps"), (4, {"reset": True}, "reset"), (4, {"mask": True}, "mask")],
)
def test_the_package_is_not_asked_for_what_it_lacks(W, extra, why, packaged):
    given = inputs(2, 9, 4, W, torch.float32)
    extra = {name: flags(2, 9)[name] for name in extra}
    short_conv(**given, **extra)  # another backend serves it
    with pytest.raises(ValueError, match=f"cannot do {why}; use native"):
        short_conv(**given, **extra, backend="causal_conv1d")
