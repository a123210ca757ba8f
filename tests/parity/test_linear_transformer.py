"""Linear Transformer against flash-linear-attention's loop, and the quadratic form of the paper."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import elu

from seqzoo.layers import create_mixer
from tests.tolerances import relative_error

D, B, T = 32, 2, 70
OPTIONS = [{}, {"n_heads": 2, "bias": True}]


def naive() -> ModuleType:
    """Their definitions, from their own file: the package around them wants a GPU."""
    package = importlib.util.find_spec("fla")
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = [p for place in places if (p := Path(place) / "ops/linear_attn/naive.py").is_file()]
    if not files:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive_linear_attn", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(options: dict[str, object], dtype: torch.dtype = torch.float32) -> nn.Module:
    mixer = create_mixer("linear_transformer", D, **options).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return mixer


def features(mixer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        p(x).view(B, x.shape[1], mixer.n_heads, -1)
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    return elu(q) + 1, elu(k) + 1, v


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_recurrence_of_flash_linear_attention(options):
    theirs = naive().naive_recurrent_linear_attn
    mixer, x = build(options), torch.randn(B, T, D)
    q, k, v = features(mixer, x)
    o, (S, z) = theirs(q, k, v, scale=1.0, normalize=True, output_final_state=True)
    y, state = mixer(x, mixer.init_state(B))
    assert relative_error(y, mixer.o_proj(o.flatten(-2))) <= 1e-5
    assert relative_error(state.S[..., :-1], S) <= 1e-5
    assert relative_error(state.S[..., -1], z[:, 0]) <= 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_quadratic_form_of_the_paper_in_output_and_gradients(options):
    mixer = build(options, torch.float64)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    q, k, v = features(mixer, x)
    scores = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    scores = scores / (scores.sum(-1, keepdim=True) + 1e-6)
    wanted = mixer.o_proj(torch.einsum("bhij,bjhv->bihv", scores, v).flatten(-2))
    found = mixer(x)[0]
    assert relative_error(found, wanted) <= 1e-10
    weight = torch.randn_like(found)
    got, true = (torch.autograd.grad(y, [x, *mixer.parameters()], weight) for y in (found, wanted))
    assert all(relative_error(a, b) <= 1e-9 for a, b in zip(got, true, strict=True))


def test_small_features_keep_their_digits():
    # elu(x) + 1 in float32 is 0 at x = -20, and has one digit at -14
    mixer = build({})
    with torch.no_grad():
        mixer.q_proj.weight.zero_()
        mixer.k_proj.weight.copy_(-13 * torch.eye(D))
    x = 1 + torch.rand(B, T, D)
    assert relative_error(mixer(x, mixer.init_state(B))[1].S, exact_sums(mixer, x)) <= 1e-5


def exact_sums(mixer: nn.Module, x: Tensor) -> Tensor:
    k = (-13 * x.double()).exp().view(B, T, mixer.n_heads, -1)
    v = mixer.v_proj(x).double().view(B, T, mixer.n_heads, -1)
    return torch.einsum("bthk,bthv->bhkv", k, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1))


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="d_model=32 is not divisible by n_heads=5; nearest: 30"):
        create_mixer("linear_transformer", D, n_heads=5)
