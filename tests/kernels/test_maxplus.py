"""The running maximum against its definition in float64, and the gates made of it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from seqzoo.kernels.maxplus import maxplus, stabilised
from tests.tolerances import assert_close_to_reference

BACKENDS = ("reference", "chunked")
LENGTHS = (0, 1, 2, 31, 32, 33, 65, 1100)


def inputs(
    B: int, T: int, D: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Decays, inputs of which about half win, and an initial state."""
    wide = dtype if dtype == torch.float64 else torch.float32
    a, b = -torch.rand(B, T, D), 3 * torch.randn(B, T, D)
    return a.to(dtype), b.to(dtype), torch.randn(B, D, dtype=wide)


def results(tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> list[Tensor]:
    """m, state and the gradients of a, b and the initial state under a fixed random loss."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    m, state = maxplus(leaves[0], leaves[1], initial_state=leaves[2], **options)
    torch.manual_seed(1)
    weight = torch.randn(m.shape), torch.randn(state.shape)
    loss = sum((x * w.to(x.dtype)).sum() for x, w in zip((m, state), weight, strict=True))
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [m.detach(), state.detach(), *grads]


def assert_right(tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> None:
    made = results(tensors, **options)
    true = results(tuple(x.double() for x in tensors), **(options | {"backend": "reference"}))
    for i, name in enumerate(("m", "state", "da", "db", "dstate")):
        assert_close_to_reference(made[i], true[i], tensors[1].dtype, gradient=i > 1, name=name)
    assert made[0].dtype == made[1].dtype == tensors[2].dtype


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_length_breaks_values_states_or_gradients(
    backend: str, T: int, poisoned_empty: None
) -> None:
    assert_right(inputs(3, T, 7), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_summed_in_float32_and_float64_in_float64(
    backend: str, dtype: torch.dtype
) -> None:
    assert_right(inputs(2, 65, 5, dtype), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_and_strides_pass(backend: str) -> None:
    assert_right(inputs(0, 3, 5), backend=backend)
    a, b, start = inputs(7, 9, 2)
    assert_right((a.transpose(0, 2), b.transpose(0, 2), start.t()), backend=backend)


def test_without_decay_it_is_the_cumulative_maximum() -> None:
    b = torch.randn(2, 100, 3)
    m, state = maxplus(torch.zeros_like(b), b)
    assert torch.equal(m, b.cummax(1).values)
    assert torch.equal(state, b.amax(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_closed_form(backend: str) -> None:
    a, b, start = inputs(2, 50, 3, torch.float64)
    G = a.cumsum(1)
    wanted = G + torch.maximum((b - G).cummax(1).values, start[:, None])
    torch.testing.assert_close(maxplus(a, b, initial_state=start, backend=backend)[0], wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reset_is_a_fresh_start_and_stops_the_gradient(backend: str) -> None:
    a, b, start = (x.requires_grad_() for x in inputs(1, 40, 5))
    reset = torch.arange(40)[None] == 4
    m, state = maxplus(a, b, initial_state=start, reset=reset, backend=backend)
    alone, last = maxplus(a[:, 4:], b[:, 4:], backend=backend)
    torch.testing.assert_close(m[:, 4:], alone)
    torch.testing.assert_close(state, last)
    da, db, dstart = torch.autograd.grad(state.sum(), (a, b, start))
    assert not torch.cat([da[0, :4], db[0, :4], dstart]).any()
    assert_right((a, b, start), reset=reset, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_token_is_not_there(backend: str) -> None:
    a, b, start = inputs(1, 9, 5)
    mask = torch.tensor([[False, True, True, False, False, True, True, True, False]])
    junk = (torch.where(mask[..., None], x, 1e30) for x in (a, b))
    m, state = maxplus(*junk, initial_state=start, mask=mask, backend=backend)
    packed, last = maxplus(a[mask][None], b[mask][None], initial_state=start, backend=backend)
    torch.testing.assert_close(m[mask][None], packed)
    torch.testing.assert_close(state, last)
    assert torch.equal(m[0, 3], m[0, 2])
    assert_right((a, b, start), mask=mask, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    reset = torch.tensor([[False, False, True, False]])
    mask = torch.tensor([[True, False, True, True]])
    leaves = [x.requires_grad_() for x in inputs(1, 4, 2, torch.float64)]

    def run(a: Tensor, b: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        return maxplus(a, b, initial_state=start, reset=reset, mask=mask, backend=backend)

    assert gradcheck(run, leaves)


def test_both_ops_keep_their_promises_to_torch() -> None:
    a, b, start = (x.requires_grad_() for x in inputs(2, 5, 3))
    torch.library.opcheck(torch.ops.seqzoo.maxplus.default, (a, b, start))
    given = [x.detach() for x in (a, b, b, start, b)]
    torch.library.opcheck(torch.ops.seqzoo.maxplus_backward.default, tuple(given))


def test_compiled_without_a_break_it_computes_the_same() -> None:
    torch.compiler.reset()
    compiled = torch.compile(maxplus, fullgraph=True, backend="aot_eager")
    for T in (64, 65):
        a, b, start = (x.requires_grad_() for x in inputs(2, T, 5))
        reset, both = torch.rand(2, T) < 0.1, []
        for run in (maxplus, compiled):
            m, state = run(a, b, initial_state=start, reset=reset)
            both.append([m, state, *torch.autograd.grad(m.sum() + state.sum(), (a, b, start))])
        assert all(torch.equal(x, y) for x, y in zip(*both, strict=True))


def test_meta_tensors_get_shapes_and_dtypes() -> None:
    b = torch.empty(2, 5, 3, device="meta", dtype=torch.bfloat16)
    m, state = maxplus(b, b)
    assert (m.device.type, m.shape, m.dtype) == ("meta", b.shape, torch.float32)
    assert (state.shape, state.dtype) == ((2, 3), torch.float32)


def test_errors_do_not_grow_over_65536_tokens() -> None:
    a, b, start = inputs(1, 65_536, 4)
    b = torch.where(torch.rand_like(b) < 1e-3, 90, -90)  # long decays from high peaks
    made = maxplus(a / 64, b, initial_state=start)
    true = maxplus((a / 64).double(), b.double(), initial_state=start.double())
    for x, y in zip(made, true, strict=True):
        assert_close_to_reference(x, y)


@pytest.mark.parametrize("size", [1.0, 90.0, 1e4])
def test_gates_sum_what_the_unstabilised_ones_would(size: float) -> None:
    """Sums of exp(log i) with decays, in float64 logarithms, against multiples in float32."""
    log_f = torch.nn.functional.logsigmoid(4 + torch.randn(2, 200, 3))
    log_i = size * torch.randn(2, 200, 3)
    gates = stabilised(log_f, log_i)
    assert gates.log_decay.max() <= 0
    assert gates.log_write.max() <= 0
    assert ((gates.log_decay == 0) | (gates.log_write == 0)).all()
    s, log_s = torch.zeros(2, 3), torch.full((2, 3), -torch.inf, dtype=torch.float64)
    for t in range(200):
        s = gates.log_decay[:, t].exp() * s + gates.log_write[:, t].exp()
        log_s = torch.logaddexp(log_s + log_f[:, t], log_i[:, t].double())
    assert s.min() >= 1 - 1e-6
    torch.testing.assert_close(s.log().double() + gates.state, log_s, rtol=2e-6, atol=1e-5)


def test_gates_of_the_first_token_write_all_and_keep_nothing() -> None:
    gates = stabilised(torch.full((1, 3, 2), -0.5), torch.zeros(1, 3, 2))
    assert gates.log_decay[0, 0].exp().tolist() == [0, 0]
    assert not gates.log_write.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b": torch.zeros(2, 4)}, r"b is \(2, 4\); maxplus takes \(B, T, D\)"),
        ({"a": torch.zeros(2, 5, 3)}, r"a is \(2, 5, 3\); \(B, T, D\) here is \(2, 4, 3\)"),
        ({"initial_state": torch.zeros(2, 4)}, r"initial_state is \(2, 4\); \(B, D\) here is"),
        ({"reset": torch.zeros(2, 3) > 0}, r"reset is \(2, 3\); \(B, T\) here is \(2, 4\)"),
        ({"mask": torch.zeros(4, 2) > 0}, r"mask is \(4, 2\); \(B, T\) here is \(2, 4\)"),
        ({"backend": "chunk"}, "no backend of maxplus named 'chunk'; nearest: chunked"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_refused_by_name_and_shape(change: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {"a": torch.ones(2, 4, 3), "b": torch.ones(2, 4, 3)}
    with pytest.raises(ValueError, match=words):
        maxplus(**(good | change))
