"""Based against flash-linear-attention's two definitions, in numbers and in gradients."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from seqzoo.layers import create_mixer
from tests.tolerances import relative_error

D, B, T = 32, 2, 70
OPTIONS = [{}, {"n_heads": 2, "feature_dim": 5, "bias": True}, {"feature_dim": 1}]


def naive() -> ModuleType:
    """Their definitions, from their own file: the package around them wants a GPU."""
    package = importlib.util.find_spec("fla")
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = [p for place in places if (p := Path(place) / "ops/based/naive.py").is_file()]
    if not files:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive_based", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(options: dict[str, object], dtype: torch.dtype = torch.float32) -> nn.Module:
    mixer = create_mixer("based", D, **options).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return mixer


def heads(mixer: nn.Module, x: Tensor) -> list[Tensor]:
    """Queries, keys and values, (B, H, T, K)."""
    projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    return [p(x).view(B, x.shape[1], mixer.n_heads, -1).transpose(1, 2) for p in projections]


def merged(mixer: nn.Module, o: Tensor) -> Tensor:
    return mixer.o_proj(o.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_quadratic_form_of_flash_linear_attention(options):
    theirs = naive().naive_parallel_based
    mixer = build(options, torch.float64)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    found, wanted = mixer(x)[0], merged(mixer, theirs(*heads(mixer, x)))
    assert relative_error(found, wanted) <= 2e-6  # of which their eps of 1e-6 is most
    weight = torch.randn_like(found)
    got, true = (torch.autograd.grad(y, [x, *mixer.parameters()], weight) for y in (found, wanted))
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(got, true, strict=True))


def test_equals_the_chunks_of_flash_linear_attention():
    theirs = naive().naive_chunk_based
    mixer, x = build({}), torch.randn(B, 64, D)
    wanted = merged(mixer, theirs(*heads(mixer, x), chunk_size=16))
    assert relative_error(mixer(x)[0], wanted) <= 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_taylor_series_to_the_last_digit(options):
    mixer = build(options, torch.float64)
    x = 3 * torch.randn(B, T, D, dtype=torch.float64)
    q, k, v = heads(mixer, x)
    s = q @ k.mT / q.shape[-1] ** 0.5
    scores = (1 + s + s**2 / 2).tril()
    wanted = merged(mixer, scores @ v / scores.sum(-1, keepdim=True))
    assert relative_error(mixer(x)[0], wanted) <= 1e-10


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="d_model=32 is not divisible by n_heads=5; nearest: 30"):
        create_mixer("based", D, n_heads=5)
    with pytest.raises(ValueError, match="feature_dim=0 is not allowed"):
        create_mixer("based", D, feature_dim=0)
