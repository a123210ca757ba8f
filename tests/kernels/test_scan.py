"""The diagonal recurrence against its definition in float64, backend by backend."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from seqzoo.kernels.scan import scan
from tests.tolerances import assert_close_to_reference, law_budget, relative_error

BACKENDS = ("reference", "chunked", "native")
LENGTHS = (0, 1, 2, 63, 64, 65, 100)


def inputs(
    B: int, T: int, D: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Decays in (0, 1), or on and inside the unit circle; inputs; an initial state."""
    wide = dtype if dtype.is_complex or dtype == torch.float64 else torch.float32
    b, start = torch.randn(B, T, D).to(dtype), torch.randn(B, D, dtype=wide)
    a = torch.rand(B, T, D)
    if dtype.is_complex:
        a = torch.polar(a.sqrt(), 6 * torch.rand(B, T, D))
        b, start = torch.randn(B, T, D, dtype=dtype), torch.randn(B, D, dtype=wide)
    return a.to(dtype), b, start


def widened(x: Tensor) -> Tensor:
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64).requires_grad_()


def results(tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> list[Tensor]:
    """h, state and the gradients of a, b and the initial state under a fixed random loss."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    h, state = scan(leaves[0], leaves[1], initial_state=leaves[2], **options)
    torch.manual_seed(1)
    weight = torch.randn(h.shape), torch.randn(state.shape)
    loss = sum((x * w.to(x.real.dtype)).real.sum() for x, w in zip((h, state), weight, strict=True))
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [h.detach(), state.detach(), *grads]


def assert_right(tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> None:
    """Every result of a backend within the budget of the reference on the same numbers."""
    made = results(tensors, **options)
    wide = tuple(widened(x) for x in tensors)
    true = results(wide, **(options | {"backend": "reference"}))
    names = ("h", "state", "da", "db", "dstate")
    dtype = tensors[1].dtype
    for i, name in enumerate(names):
        assert_close_to_reference(made[i], true[i], dtype, gradient=i > 1, name=name)
    assert made[0].dtype == dtype
    assert made[1].dtype == tensors[2].dtype


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_length_breaks_values_states_or_gradients(
    backend: str, T: int, reverse: bool, poisoned_empty: None
) -> None:
    assert_right(inputs(3, T, 7), backend=backend, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_summed_in_float32_and_float64_in_float64(
    backend: str, dtype: torch.dtype
) -> None:
    assert_right(inputs(2, 65, 33, dtype), backend=backend)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_complex_gradient_is_conjugated(
    backend: str, dtype: torch.dtype, reverse: bool, poisoned_empty: None
) -> None:
    assert_right(inputs(2, 65, 261, dtype), backend=backend, reverse=reverse)
    lazy = (x.conj() for x in inputs(2, 9, 5, dtype))  # whose memory holds the conjugates
    assert_right((next(lazy), next(lazy), next(lazy)), backend=backend, reverse=reverse)


@pytest.mark.parametrize("B", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_and_many_channels_pass(backend: str, B: int) -> None:
    assert_right(inputs(B, 3, 515), backend=backend)
    assert_right(inputs(B, 3, 0), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_read_and_not_assumed(backend: str) -> None:
    a, b, start = inputs(7, 9, 2)
    a, b, start = a.transpose(0, 2), b.transpose(0, 2), start.t()
    assert not any(x.is_contiguous() for x in (a, b, start))
    assert_right((a, b, start), backend=backend)


@pytest.mark.parametrize("shape", [(5,), (9, 1), (3, 1, 5), (1, 9, 5), ()], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broadcast_decay_gets_the_gradient_of_all_its_copies(
    backend: str, shape: tuple[int, ...]
) -> None:
    _, b, start = inputs(3, 9, 5)
    assert_right((torch.rand(shape), b, start), backend=backend)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reset_is_a_fresh_start_and_stops_the_gradient(backend: str, reverse: bool) -> None:
    a, b, start = (x.requires_grad_() for x in inputs(2, 9, 5))
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 4] = reset[1, 0] = True
    h, state = scan(a, b, initial_state=start, reset=reset, reverse=reverse, backend=backend)
    late, early = (slice(None, 5), slice(5, None)) if reverse else (slice(4, None), slice(None, 4))
    alone, last = scan(a[:1, late], b[:1, late], reverse=reverse, backend=backend)
    assert torch.equal(h[:1, late], alone)
    assert torch.equal(state[:1], last)
    da, db, dstart = torch.autograd.grad(state[0].sum(), (a, b, start))
    assert not torch.cat([da[0, early], db[0, early], dstart[:1]]).any()
    assert_right((a, b, start), reset=reset, reverse=reverse, backend=backend)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_token_is_not_there(backend: str, reverse: bool) -> None:
    a, b, start = inputs(1, 9, 5)
    mask = torch.tensor([[False, True, True, False, False, True, True, True, False]])
    junk = torch.where(mask[..., None], b, 1e30), torch.where(mask[..., None], a, 1e30)
    options: dict[str, Any] = {"initial_state": start, "reverse": reverse, "backend": backend}
    h, state = scan(junk[1], junk[0], mask=mask, **options)
    packed, last = scan(a[mask][None], b[mask][None], **options)
    assert torch.equal(h[mask][None], packed)
    assert torch.equal(state, last)
    assert h.isfinite().all()
    assert_right((a, b, start), mask=mask, reverse=reverse, backend=backend)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e3, 1e-30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_gates_stay_finite_and_right(backend: str, value: float) -> None:
    a, b, start = inputs(2, 12, 5)
    a[:, ::2] = value
    assert_right((a, b, start), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_everywhere_gives_zero(backend: str) -> None:
    zero = torch.zeros(1, 4, 3)
    assert not any(x.any() for x in results((zero, zero, zero[:, 0]), backend=backend)[:2])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gradcheck(dtype: torch.dtype, backend: str, reverse: bool) -> None:
    reset = torch.tensor([[False, False, True, False]])
    mask = torch.tensor([[True, False, True, True]])
    leaves = [x.requires_grad_() for x in inputs(1, 4, 2, dtype)]

    def run(a: Tensor, b: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        return scan(
            a, b, initial_state=start, reset=reset, mask=mask, reverse=reverse, backend=backend
        )

    assert gradcheck(run, leaves)


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_both_ops_keep_their_promises_to_torch(backend: str) -> None:
    a, b, start = (x.requires_grad_() for x in inputs(2, 5, 3))
    torch.library.opcheck(torch.ops.seqzoo.scan.default, (a, b, start, False, backend))
    given = [x.detach() for x in (a, b, start, b, start)]
    torch.library.opcheck(torch.ops.seqzoo.scan_backward.default, (*given, True, backend))


@pytest.mark.parametrize("backend", [None, "chunked"])
def test_compiled_without_a_break_it_computes_the_same(backend: str | None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    for T in (64, 65):
        a, b, start = (x.requires_grad_() for x in inputs(2, T, 5))
        reset = torch.rand(2, T) < 0.1
        both = []
        for run in (scan, compiled):
            h, state = run(a, b, initial_state=start, reset=reset, backend=backend)
            both.append([h, state, *torch.autograd.grad(h.sum() + state.sum(), (a, b, start))])
        assert all(torch.equal(x, y) for x, y in zip(*both, strict=True))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_meta_tensors_get_shapes_and_dtypes(backend: str | None) -> None:
    b = torch.empty(2, 5, 3, device="meta", dtype=torch.bfloat16)
    h, state = scan(b, b, backend=backend)
    assert (h.device.type, h.shape, h.dtype) == ("meta", b.shape, b.dtype)
    assert (state.shape, state.dtype) == ((2, 3), torch.float32)


@pytest.mark.parametrize(
    ("backend", "decay"), [("native", 0.1), ("native", 0.99), ("native", 0.999), ("chunked", 0.999)]
)
def test_errors_do_not_grow_over_65536_tokens(backend: str, decay: float) -> None:
    b = torch.randn(1, 65_536, 16)
    a = torch.full_like(b, decay)
    made = scan(a, b, backend=backend)
    true = scan(a.double(), b.double(), backend=backend)
    for x, y in zip(made, true, strict=True):
        assert_close_to_reference(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_split_equals_one_pass_with_gradients(backend: str) -> None:
    tensors = inputs(2, 100, 5)
    true = results(tensors, backend=backend)
    a, b, start = (x.requires_grad_() for x in tensors)
    parts, state, at = [], start, 0
    for length in (1, 0, 63, 1, 35):
        cut = slice(at, at + length)
        h, state = scan(a[:, cut], b[:, cut], initial_state=state, backend=backend)
        parts.append(h)
        at += length
    h = torch.cat(parts, dim=1)
    torch.manual_seed(1)
    loss = (h * torch.randn(h.shape)).sum() + (state * torch.randn(state.shape)).sum()
    split = [h, state, *torch.autograd.grad(loss, (a, b, start))]
    for x, y in zip(split, true, strict=True):
        assert relative_error(x, y) <= law_budget(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_stays_in_its_row(backend: str) -> None:
    a, b, start = inputs(3, 9, 5)
    want = scan(a, b, initial_state=start, backend=backend)
    b[1] = float("nan")
    made = scan(a, b, initial_state=start, backend=backend)
    assert all(torch.equal(x[::2], y[::2]) for x, y in zip(made, want, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b": torch.zeros(2, 4)}, r"b is \(2, 4\); scan takes \(B, T, D\)"),
        ({"a": torch.zeros(2, 5, 3)}, r"a is \(2, 5, 3\) and does not broadcast to b \(2, 4, 3\)"),
        ({"a": torch.zeros(2, 4, 3, dtype=torch.complex64)}, "both must be real, or both complex"),
        (
            {"initial_state": torch.zeros(2, 4)},
            r"initial_state is \(2, 4\); \(B, D\) here is \(2, 3\)",
        ),
        ({"reset": torch.zeros(2, 3) > 0}, r"reset is \(2, 3\); \(B, T\) here is \(2, 4\)"),
        ({"mask": torch.zeros(4, 2) > 0}, r"mask is \(4, 2\); \(B, T\) here is \(2, 4\)"),
        ({"backend": "chunk"}, "no backend of scan named 'chunk'; nearest: chunked"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_refused_by_name_and_shape(change: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {"a": torch.ones(2, 4, 3), "b": torch.ones(2, 4, 3)}
    with pytest.raises(ValueError, match=words):
        scan(**(good | change))


@settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(0, 40)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.complex64]),
    backend=st.sampled_from(["chunked", "native"]),
    reverse=st.booleans(),
)
def test_no_forgotten_shape(
    shape: tuple[int, int, int], dtype: torch.dtype, backend: str, reverse: bool
) -> None:
    assert_right(inputs(*shape, dtype), backend=backend, reverse=reverse)
