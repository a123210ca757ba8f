"""HGRN2 against flash-linear-attention's recurrence with tied gates, and a float64 closed form."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from seqzoo.layers import create_mixer
from tests.tolerances import relative_error

D, B, T = 32, 2, 70
OPTIONS = [{}, {"d_state": 8, "lower_bound": 0.4, "bias": True}, {"d_state": 16}]


def naive() -> ModuleType:
    """Their definitions, from their own file: the package around them wants a GPU."""
    package = importlib.util.find_spec("fla")
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = [p for place in places if (p := Path(place) / "ops/gla/naive.py").is_file()]
    if not files:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive_gla", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parallel(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The recurrence unrolled: every key times the product of all later forget gates."""
    G = g.cumsum(1)
    left = (G[:, :, None] - G[:, None]).masked_fill(
        ~torch.ones(T, T, dtype=torch.bool).tril()[..., None, None], -torch.inf
    )
    P = torch.einsum("bihk,bjhk,bijhk->bhij", q, k, left.exp())
    return torch.einsum("bhij,bjhv->bihv", P, v) * q.shape[-1] ** -0.5


def build(options: dict[str, object], dtype: torch.dtype = torch.float32) -> nn.Module:
    mixer = create_mixer("hgrn2", D, **options).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return mixer


def published(mixer: nn.Module, x: Tensor, recurrence: Callable[..., Tensor]) -> Tensor:
    """The layer as its authors wrote it, around some recurrence, with the weights of `mixer`."""

    def heads(y: Tensor) -> Tensor:
        return y.view(B, T, D // mixer.d_state, mixer.d_state)

    f = mixer.lower_bound + (1 - mixer.lower_bound) * torch.sigmoid(mixer.forget_proj(x))
    q = mixer.q_proj(x)
    q, v = heads(q * torch.sigmoid(q)), heads(mixer.in_proj(x))
    o = recurrence(q, heads(1 - f), v, heads(f.log())).flatten(-2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return mixer.o_proj(mixer.norm.weight * o)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_recurrence_of_flash_linear_attention(options):
    theirs = naive().naive_recurrent_gla
    mixer, x = build(options), torch.randn(B, T, D)
    last = []

    def recurrence(*given: Tensor) -> Tensor:
        o, state = theirs(*given, output_final_state=True)
        last.append(state)
        return o

    wanted = published(mixer, x, recurrence)
    y, state = mixer(x, mixer.init_state(B))
    assert relative_error(y, wanted) <= 1e-5
    assert relative_error(state.S, last[0]) <= 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_unrolled_recurrence_in_output_and_gradients(options):
    mixer = build(options, torch.float64)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    found, wanted = mixer(x)[0], published(mixer, x, parallel)
    assert relative_error(found, wanted) <= 1e-9
    weight = torch.randn_like(found)
    got, true = (torch.autograd.grad(y, [x, *mixer.parameters()], weight) for y in (found, wanted))
    assert all(relative_error(a, b) <= 1e-9 for a, b in zip(got, true, strict=True))


@pytest.mark.parametrize("lower_bound", [0.0, 1e-12, 0.3])
@pytest.mark.parametrize("logit", [10.0, -30.0])
def test_gates_near_one_and_zero_keep_their_digits(lower_bound, logit):
    # log(lower_bound + (1 - lower_bound) sigmoid(10)) in float32 is off by a thousandth
    mixer = build({"d_state": 8, "lower_bound": lower_bound, "bias": True})
    with torch.no_grad():
        mixer.forget_proj.weight.zero_()
        mixer.forget_proj.bias.fill_(logit)
    x = torch.randn(1, 1000, D)
    state = mixer(x, mixer.init_state(1))[1]
    exact = mixer.double()
    wanted = exact(x.double(), exact.init_state(1))[1]
    keep = (1 - lower_bound) * torch.tensor(-logit, dtype=torch.float64).sigmoid()
    v = exact.in_proj(x.double()).view(1, 1000, -1, 8)
    left = (torch.log1p(-keep) * torch.arange(999, -1, -1)).exp()
    sums = keep * torch.einsum("t,bthv->bhv", left, v)
    assert relative_error(wanted.S, sums[:, :, None].expand_as(wanted.S)) <= 1e-9
    assert relative_error(state.S, wanted.S) <= 1e-5


def test_a_bad_bound_or_state_is_refused():
    with pytest.raises(ValueError, match=r"lower_bound=1.0 is not allowed; it must be in \[0, 1\)"):
        create_mixer("hgrn2", D, lower_bound=1.0)
    with pytest.raises(ValueError, match="d_model=32 is not divisible by d_state=24; nearest: 24"):
        create_mixer("hgrn2", D, d_state=24)


@pytest.mark.parametrize(("d_model", "d_state"), [(256, 128), (192, 96), (100, 100), (131, 1)])
def test_default_state_fits_every_width(d_model, d_state):
    assert create_mixer("hgrn2", d_model).d_state == d_state
