"""ReBased against flash-linear-attention's quadratic form, in numbers and in gradients."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from seqzoo.layers import create_mixer
from tests.tolerances import relative_error

D, B, T = 32, 2, 70
OPTIONS = [{}, {"n_heads": 2, "feature_dim": 5, "bias": True}]


def naive() -> Callable[..., Tensor]:
    """Their definition, from its own file: the package around it wants a GPU."""
    package = importlib.util.find_spec("fla")
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = [p for place in places if (p := Path(place) / "ops/rebased/naive.py").is_file()]
    if not files:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive_rebased", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.naive_parallel_rebased


def build(options: dict[str, object], dtype: torch.dtype = torch.float32) -> nn.Module:
    mixer = create_mixer("rebased", D, **options).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return mixer


def published(mixer: nn.Module, x: Tensor) -> Tensor:
    """Normalised queries and keys with gamma and beta, then their kernel, a plain square."""

    def heads(project: nn.Linear) -> Tensor:
        return project(x).unflatten(-1, (mixer.n_heads, -1)).transpose(1, 2)

    size = (mixer.feature_dim,)
    q, k = (
        layer_norm(heads(p), size, mixer.gamma, mixer.beta) for p in (mixer.q_proj, mixer.k_proj)
    )
    o = naive()(q, k, heads(mixer.v_proj))
    return mixer.o_proj(o.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_flash_linear_attention_with_every_gradient(options):
    mixer = build(options, torch.float64)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    found, wanted = mixer(x)[0], published(mixer, x)
    assert relative_error(found, wanted) <= 1e-9
    weight = torch.randn_like(found)
    got, true = (torch.autograd.grad(y, [x, *mixer.parameters()], weight) for y in (found, wanted))
    assert all(relative_error(a, b) <= 1e-7 for a, b in zip(got, true, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_the_first_tokens_are_right_in_float32_in_one_pass_and_in_steps(options):
    """Where sums in float32 are off by 3e-3: a query that is nearly orthogonal to the keys."""
    mixer, x = build(options), torch.randn(64, 4, D)
    exact = build(options).double()
    exact.load_state_dict({name: p.double() for name, p in mixer.state_dict().items()})
    wanted = exact(x.double())[0]
    assert relative_error(mixer(x)[0], wanted) <= 5e-6
    state, steps = mixer.init_state(64), []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        steps.append(y)
    assert relative_error(torch.cat(steps, dim=1), wanted) <= 5e-6


def test_starts_as_a_plain_normalised_square():
    mixer = create_mixer("rebased", D)
    assert mixer.gamma.eq(1).all()
    assert not mixer.beta.any()


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="d_model=32 is not divisible by n_heads=5; nearest: 30"):
        create_mixer("rebased", D, n_heads=5)
    with pytest.raises(ValueError, match="feature_dim=0 is not allowed"):
        create_mixer("rebased", D, feature_dim=0)
