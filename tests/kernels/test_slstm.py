"""The sLSTM cell against its definition in float64, and both against what the paper promises."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from seqzoo.kernels.slstm import slstm
from tests.kernels.test_linear_cost import allocated, nodes
from tests.tolerances import assert_close_to_reference, law_budget, relative_error

BACKENDS = ("reference", "chunked")
NAMES = ("h", "state", "dgates", "drecurrent", "dstate")


def inputs(
    B: int, T: int, H: int, K: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, recurrent weights, and the state after a few other tokens."""
    gates, recurrent = torch.randn(B, T, 4, H, K), 0.5 * torch.randn(4, H, K, K)
    start = slstm(torch.randn(B, 3, 4, H, K), recurrent, backend="reference")[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return gates.to(dtype), recurrent.to(dtype), start.to(wide)


def flags(B: int, T: int) -> dict[str, Tensor]:
    mask = torch.rand(B, T) < 0.6
    return {"mask": mask, "reset": (torch.rand(B, T) < 0.3) & mask}


def results(tensors: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    h, state = slstm(leaves[0], leaves[1], initial_state=leaves[2], **options)
    torch.manual_seed(1)
    loss = sum((x * torch.randn(x.shape).to(x.dtype)).sum().double() for x in (h, state))
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [h.detach(), state.detach(), *grads]


def assert_right(tensors: tuple[Tensor, ...], **options: Any) -> None:
    made = results(tensors, **options)
    true = results(tuple(x.double() for x in tensors), **(options | {"backend": "reference"}))
    for i, name in enumerate(NAMES):
        dtype = tensors[0].dtype
        assert_close_to_reference(made[i], true[i], dtype, gradient=i > 1, name=name)


@pytest.mark.parametrize("used", [(), ("reset",), ("mask",), ("mask", "reset")], ids="+".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_is_within_budget_of_the_float64_loop(backend, used, poisoned_empty):
    options = {k: v for k, v in flags(3, 33).items() if k in used}
    assert_right(inputs(3, 33, 2, 5), backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 3, 2, 4), (2, 0, 2, 4), (1, 1, 1, 1), (2, 40, 3, 4)], ids=str
)
def test_no_shape_or_dtype_is_forgotten(shape, dtype, poisoned_empty):
    assert_right(inputs(*shape, dtype), backend="chunked")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_where_the_state_is_empty_reset_masked_or_carried(backend):
    gates, recurrent, start = inputs(2, 5, 2, 2, torch.float64)
    mask, reset = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = False
    reset[0, 2] = True

    def carried(gates: Tensor, recurrent: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        return slstm(gates, recurrent, initial_state=start, reset=reset, mask=mask, backend=backend)

    def empty(gates: Tensor, recurrent: Tensor) -> tuple[Tensor, Tensor]:
        return slstm(gates, recurrent, mask=mask, backend=backend)

    leaves = [x.requires_grad_() for x in (gates, recurrent, start)]
    assert gradcheck(carried, leaves, fast_mode=True)
    assert gradcheck(empty, leaves[:2], fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_split_equals_one_pass_with_gradients(backend):
    tensors = inputs(2, 50, 2, 4)
    true = results(tensors, backend=backend)
    gates, recurrent, start = (x.requires_grad_() for x in tensors)
    parts, state = [], start
    for piece in gates.split((1, 0, 30, 1, 18), dim=1):
        h, state = slstm(piece, recurrent, initial_state=state, backend=backend)
        parts.append(h)
    h = torch.cat(parts, dim=1)
    torch.manual_seed(1)
    loss = (h * torch.randn(h.shape)).sum() + (state * torch.randn(state.shape)).sum()
    split = [h, state, *torch.autograd.grad(loss, (gates, recurrent, start))]
    for x, y in zip(split, true, strict=True):
        assert relative_error(x, y) <= law_budget(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_stabiliser_changes_no_output(backend):
    gates, recurrent, start = inputs(2, 9, 2, 4, torch.float64)
    shift = torch.randn(2, 2, 4, dtype=torch.float64)
    h, c, n, m = start.unbind(1)
    same = torch.stack([h, c * torch.exp(-shift), n * torch.exp(-shift), m + shift], dim=1)
    made = (slstm(gates, recurrent, initial_state=s, backend=backend)[0] for s in (start, same))
    torch.testing.assert_close(*made, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_gates_neither_overflow_nor_divide_by_zero(backend):
    for scale in (1e4, -1e4):
        gates, recurrent, start = inputs(2, 12, 2, 4)
        gates[:, :, :2] = scale * torch.rand(2, 12, 2, 2, 4)
        for x in results((gates, recurrent, torch.zeros_like(start)), backend=backend):
            assert x.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_junk_in_a_masked_token_reaches_nothing(backend):
    gates, recurrent, start = inputs(2, 9, 2, 4)
    mask = torch.tensor([True, False, False, True, True, False, True, True, False]).expand(2, -1)
    junk = torch.where(mask[..., None, None, None], gates, 1e30)
    h, state = slstm(junk, recurrent, initial_state=start, mask=mask, backend=backend)
    alone = slstm(gates[:, mask[0]], recurrent, initial_state=start, backend=backend)
    assert h.isfinite().all()
    torch.testing.assert_close(h[:, mask[0]], alone[0])
    torch.testing.assert_close(state, alone[1])


def run(backend: str, T: int) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.requires_grad_() for x in inputs(2, T, 2, 8)]
    return slstm(*leaves[:2], initial_state=leaves[2], backend=backend)[0], leaves


def test_training_costs_grow_with_the_sequence_and_not_with_its_square():
    assert nodes(run("chunked", 64)[0]) == nodes(run("chunked", 16)[0])
    assert allocated(run, "chunked", 128) <= 4.5 * allocated(run, "chunked", 32)


def test_both_ops_keep_their_promises_to_torch():
    gates, recurrent, start = (x.requires_grad_() for x in inputs(1, 3, 2, 4))
    given = flags(1, 3)
    options = (given["reset"], given["mask"], "chunked")
    torch.library.opcheck(torch.ops.seqzoo.slstm.default, (gates, recurrent, start, *options))
    plain = [x.detach() for x in (gates, recurrent, start)]
    h, state, states = torch.ops.seqzoo.slstm.default(*plain, *options)
    torch.library.opcheck(
        torch.ops.seqzoo.slstm_backward.default,
        (*plain, *options[:2], states, h, state, "chunked"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_tensors_get_shapes_and_dtypes(backend):
    gates = torch.empty(2, 5, 4, 3, 8, device="meta", dtype=torch.bfloat16)
    h, state = slstm(gates, torch.empty(4, 3, 8, 8, device="meta"), backend=backend)
    assert (h.device.type, h.shape, h.dtype) == ("meta", (2, 5, 3, 8), torch.bfloat16)
    assert (state.shape, state.dtype) == ((2, 4, 3, 8), torch.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gates": torch.zeros(2, 5, 12)}, r"gates is \(2, 5, 12\); slstm takes \(B, T, 4, H, K\)"),
        ({"recurrent": torch.zeros(3, 2, 4, 4)}, r"recurrent is \(3, 2, 4, 4\)"),
        ({"initial_state": torch.zeros(2, 2, 4)}, r"initial_state is \(2, 2, 4\)"),
        ({"reset": torch.zeros(2, 4) > 0}, r"reset is \(2, 4\); \(B, T\) here is \(2, 5\)"),
        ({"mask": torch.zeros(5, 2) > 0}, r"mask is \(5, 2\); \(B, T\) here is \(2, 5\)"),
        ({"backend": "native"}, "no backend of slstm named 'native'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_refused_by_name_and_shape(change, words):
    good = {"gates": torch.zeros(2, 5, 4, 2, 4), "recurrent": torch.zeros(4, 2, 4, 4)}
    with pytest.raises(ValueError, match=words):
        slstm(**(good | change))
