"""Several delta-rule steps a token: flash-linear-attention's loop, rotations, masks, gradients."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from seqzoo.kernels.delta import delta
from seqzoo.kernels.delta.product import delta_product
from tests.fla_naive import fla_naive
from tests.tolerances import EXACT, law_budget, relative_error


def inputs(B: int, T: int, n: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    """Float64; keys of norm 1, betas in (0, 2)."""
    made = {
        "q": torch.randn(B, T, H, K),
        "k": normalize(torch.randn(B, T, n, H, K), dim=-1),
        "v": torch.randn(B, T, n, H, V),
        "beta": 2 * torch.rand(B, T, n, H),
        "log_decay": -torch.rand(B, T, H),
        "initial_state": torch.randn(B, H, K, V),
    }
    return {name: x.double() for name, x in made.items()}


@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_equals_the_loop_of_flash_linear_attention(n, decays):
    given = inputs(2, 70, n, 2, 6, 5)
    if not decays:
        del given["log_decay"]
    k, v, beta = (given[name].flatten(1, 2) for name in ("k", "v", "beta"))
    wanted, last = fla_naive("gated_delta_product").naive_recurrent_gated_delta_product(
        given["q"],
        k,
        v,
        given.get("log_decay"),
        beta,
        scale=0.7,
        initial_state=given["initial_state"].float(),
        output_final_state=True,
        num_householder=n,
    )
    o, state = delta_product(**given, scale=0.7)
    assert relative_error(o, wanted) <= 1e-5  # theirs is float32
    assert relative_error(state, last) <= 1e-5


def test_one_step_is_the_delta_rule_also_with_a_decay_per_channel():
    given = inputs(2, 40, 1, 2, 4, 3) | {"log_decay": -torch.rand(2, 40, 2, 4).double()}
    alone = {n: x[:, :, 0] if n in ("k", "v", "beta") else x for n, x in given.items()}
    for found, wanted in zip(delta_product(**given), delta(**alone), strict=True):
        assert torch.equal(found, wanted)


def test_two_reflections_are_a_rotation_by_twice_the_angle_between_their_keys():
    angle, T = 0.3, 21
    keys = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]]).double()
    k = keys.view(1, 1, 2, 1, 2).expand(1, T, 2, 1, 2)
    zeros = torch.zeros(1, T, 2, 1, 2).double()
    start = torch.eye(2).double().view(1, 1, 2, 2)
    q = torch.zeros(1, T, 1, 2).double()
    beta = torch.full((1, T, 2, 1), 2.0).double()
    _, state = delta_product(q, k, zeros, beta, initial_state=start)
    turn = torch.tensor(2 * angle * T)
    wanted = torch.tensor([[turn.cos(), -turn.sin()], [turn.sin(), turn.cos()]])
    torch.testing.assert_close(state[0, 0].float(), wanted)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_masked_tokens_are_not_there_and_resets_separate_documents(backend):
    given = inputs(1, 60, 2, 2, 4, 3)
    mask = torch.rand(1, 60) < 0.6
    reset = torch.zeros(1, 60, dtype=torch.bool)
    cut = int(mask[0].nonzero()[17])
    reset[0, cut] = True
    o, state = delta_product(**given, mask=mask, reset=reset, backend=backend)
    start = given["initial_state"]
    for tokens in (slice(0, cut), slice(cut, 60)):
        real = mask[0, tokens]
        alone = {n: x if n == "initial_state" else x[:, tokens][:, real] for n, x in given.items()}
        wanted, last = delta_product(**alone | {"initial_state": start}, backend="reference")
        assert relative_error(o[:, tokens][:, real], wanted) <= EXACT
        start = None
    assert relative_error(state, last) <= EXACT


@pytest.mark.parametrize("sizes", [(1,) * 20, (1, 2, 0, 14, 3)], ids=str)
def test_any_split_is_one_pass(sizes):
    given = inputs(2, 20, 3, 1, 4, 3)
    whole, last = delta_product(**given)
    state, outputs = given.pop("initial_state"), []
    parts = zip(*(x.split(sizes, dim=1) for x in given.values()), strict=True)
    for part in parts:
        o, state = delta_product(**dict(zip(given, part, strict=True)), initial_state=state)
        outputs.append(o)
    assert relative_error(torch.cat(outputs, dim=1), whole) <= law_budget(torch.float64)
    assert relative_error(state, last) <= law_budget(torch.float64)


def test_gradcheck():
    given = {n: x.requires_grad_() for n, x in inputs(1, 3, 2, 1, 2, 2).items()}

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return delta_product(**dict(zip(given, values, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(given.values()))


@pytest.mark.parametrize(("B", "T"), [(0, 4), (2, 0), (2, 1)])
def test_no_rows_no_tokens_and_one(B, T):
    given = inputs(B, T, 2, 2, 4, 3)
    o, state = delta_product(**given)
    assert o.shape == (B, T, 2, 3)
    assert state.shape == (B, 2, 4, 3)
    if T == 0:
        assert torch.equal(state, given["initial_state"])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"k": (2, 9, 2, 4)}, r"k is \(2, 9, 2, 4\); delta_product takes \(B, T, n, H, K\)"),
        ({"k": (2, 9, 0, 2, 4)}, "n >= 1"),
        ({"q": (2, 9, 2, 5)}, "q is"),
        ({"v": (2, 9, 3, 2, 3)}, "v is"),
        ({"beta": (2, 9, 2)}, "beta is"),
        ({"log_decay": (2, 18, 2)}, "log_decay is"),
        ({"mask": (2, 18)}, "mask is"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(changed, words):
    shapes = {
        "q": (2, 9, 2, 4),
        "k": (2, 9, 2, 2, 4),
        "v": (2, 9, 2, 2, 3),
        "beta": (2, 9, 2, 2),
        **changed,
    }
    with pytest.raises(ValueError, match=words):
        delta_product(**{n: torch.zeros(shape) for n, shape in shapes.items()})
