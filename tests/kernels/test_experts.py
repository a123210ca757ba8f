"""The mixture of experts against a loop over tokens."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from torch.utils.flop_counter import FlopCounterMode

from seqzoo.kernels.experts import experts, grouped_matmul
from tests.tolerances import assert_close_to_reference

E, I, H, O = 5, 6, 9, 7


def parameters(
    S: int, K: int, gated: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    shapes = {"x": (S, I), "weight": (S, K), "w_in": (E, I, H), "w_out": (E, H, O)}
    if gated:
        shapes["w_up"] = (E, I, H)
    return {name: torch.randn(s).to(dtype).requires_grad_() for name, s in shapes.items()}


def some_nobody(S: int, K: int) -> Tensor:
    """Experts of each token; expert 2 gets none, and some places go to nobody."""
    index = torch.randint(-1, E, (S, K))
    return torch.where(index == 2, 3, index)


def differentiated(given: dict[str, Tensor], index: Tensor, backend: str) -> dict[str, Tensor]:
    y = experts(index=index, activation=silu, backend=backend, **given)
    torch.manual_seed(5)  # and rounded to what every dtype can hold
    grads = torch.autograd.grad(
        y, list(given.values()), torch.randn(y.shape).bfloat16().half().to(y.dtype)
    )
    return {"output": y} | dict(zip(given, grads, strict=True))


def check(out: dict[str, Tensor], ref: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in ref.items():
        assert_close_to_reference(out[name], value, dtype, gradient=name != "output", name=name)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("S", "K"), [(1, 1), (3, 2), (64, 1), (100, 3)])
def test_groups_equal_the_loop_with_every_gradient(S, K, dtype, gated, poisoned_empty):
    given, index = parameters(S, K, gated, dtype), some_nobody(S, K)
    wide = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    truth = differentiated(wide, index, "reference")
    check(differentiated(given, index, "chunked"), truth, dtype)


def test_reference_is_the_sum_over_a_tokens_experts():
    given = {k: v.detach() for k, v in parameters(4, 2, True, torch.float64).items()}
    index = torch.tensor([[0, 3], [-1, 1], [4, 4], [-1, -1]])
    y = experts(index=index, activation=gelu, backend="reference", **given)
    for t in range(4):
        wanted = torch.zeros(O, dtype=torch.float64)
        for k in range(2):
            e = int(index[t, k])
            if e >= 0:
                x = given["x"][t]
                h = gelu(x @ given["w_in"][e]) * (x @ given["w_up"][e])
                wanted += given["weight"][t, k] * (h @ given["w_out"][e])
        torch.testing.assert_close(y[t], wanted)


def test_an_expert_without_tokens_gets_a_zero_gradient_not_none_or_garbage(poisoned_empty):
    given = parameters(8, 1, True)
    index = torch.full((8, 1), 4)
    for name, grad in differentiated(given, index, "chunked").items():
        if name.startswith("w_"):
            assert torch.equal(grad[:4], torch.zeros_like(grad[:4])), name
            assert grad[4].abs().max() > 0, name


def test_tokens_of_nobody_give_zero_and_no_gradient(poisoned_empty):
    given = parameters(6, 1, False)
    index = torch.tensor([[-1], [0], [-1], [1], [1], [-1]])
    found = differentiated(given, index, "chunked")
    nobody = (index < 0).flatten()
    assert torch.equal(found["output"][nobody], torch.zeros(3, O))
    assert torch.equal(found["x"][nobody], torch.zeros(3, I))
    assert found["output"][~nobody].abs().min() > 0
    nothing = experts(index=torch.full((6, 1), -1), activation=silu, **given)
    assert torch.equal(nothing, torch.zeros(6, O))


def test_renumbering_experts_changes_nothing():
    given, index = parameters(30, 2, True), some_nobody(30, 2)
    y = experts(index=index, activation=silu, **given)
    order = torch.randperm(E)
    renumbered = {k: v[order] if k.startswith("w_") else v for k, v in given.items()}
    again = experts(
        index=torch.where(index < 0, -1, order.argsort()[index]), activation=silu, **renumbered
    )
    torch.testing.assert_close(again, y)


def test_gradcheck():
    given, index = parameters(5, 2, True, torch.float64), some_nobody(5, 2)
    names = list(given)
    assert torch.autograd.gradcheck(
        lambda *values: experts(
            index=index, activation=silu, **dict(zip(names, values, strict=True))
        ),
        list(given.values()),
    )


def test_grouped_matmul_leaves_no_garbage_behind_the_last_group(poisoned_empty):
    x, weight = torch.randn(7, 3, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    sizes = torch.tensor([2, 0, 3, 0])
    y = grouped_matmul(x, weight, sizes)
    wanted = torch.cat([x[:2] @ weight[0], x[2:5] @ weight[2], torch.zeros(2, 5)])
    torch.testing.assert_close(y, wanted)
    for found, ref in zip(
        torch.autograd.grad(y.sum(), (x, weight)),
        torch.autograd.grad(wanted.sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(found, ref)


def test_custom_op_is_registered_rightly():
    x, weight = torch.randn(7, 3, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    torch.library.opcheck(
        torch.ops.seqzoo.grouped_matmul.default, (x, weight, torch.tensor([2, 0, 3, 1]))
    )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_without_tokens_the_answer_is_empty_and_gradients_are_zero(backend, poisoned_empty):
    given, index = parameters(0, 1, True), torch.zeros(0, 1, dtype=torch.long)
    y = experts(index=index, activation=silu, backend=backend, **given)
    assert y.shape == (0, O)
    (grad,) = torch.autograd.grad(y.sum(), given["w_in"])
    assert torch.equal(grad, torch.zeros_like(grad))


def test_meta_tensors_have_the_right_shape():
    given = {k: v.detach().to("meta") for k, v in parameters(6, 2, True).items()}
    index = torch.zeros(6, 2, dtype=torch.long, device="meta")
    for backend in ("chunked", "reference"):
        assert experts(index=index, activation=silu, backend=backend, **given).shape == (6, O)


def test_compiled_without_graph_breaks_equals_eager():
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for S in (8, 9):
        given, index = parameters(S, 2, True), some_nobody(S, 2)
        wanted = experts(index=index, activation=silu, **given)
        found = compiled(index=index, activation=silu, **given)
        torch.testing.assert_close(found, wanted)
        (a,) = torch.autograd.grad(found.square().sum(), given["w_in"])
        (b,) = torch.autograd.grad(wanted.square().sum(), given["w_in"])
        torch.testing.assert_close(a, b)


def test_autocast_does_not_reach_the_products():
    given, index = parameters(20, 2, False), some_nobody(20, 2)
    wanted = experts(index=index, activation=silu, **given)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(experts(index=index, activation=silu, **given), wanted)


def test_work_does_not_grow_with_the_number_of_experts():
    given, index = parameters(10, 2, False), torch.randint(0, E, (10, 2))
    with FlopCounterMode(display=False) as counter:
        experts(index=index, activation=silu, backend="reference", **given)
    assert counter.get_total_flops() == 10 * 2 * 2 * (I * H + H * O)


def test_wrong_shapes_are_named():
    given, index = parameters(4, 2, True), some_nobody(4, 2)
    for name, wrong, message in (
        ("x", torch.randn(2, 4, I), r"x is \(2, 4, 6\); experts takes \(S, I\)"),
        ("weight", torch.randn(4, 1), r"weight is \(4, 1\); \(S, K\) here is \(4, 2\)"),
        ("w_in", torch.randn(E, H, I), r"w_in is \(5, 9, 6\)"),
        ("w_out", torch.randn(E, I, O), r"w_out is \(5, 6, 7\)"),
        ("w_up", torch.randn(E, I, I), r"w_up is \(5, 6, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            experts(index=index, activation=silu, **(given | {name: wrong}))
