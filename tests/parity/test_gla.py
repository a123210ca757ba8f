"""GLA against flash-linear-attention's recurrence, and against the parallel form of the paper."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from seqzoo.layers import create_mixer
from tests.tolerances import relative_error

D, B, T = 32, 2, 70
OPTIONS = [
    {},
    {"n_heads": 2, "expand_k": 1.0, "expand_v": 0.5, "gate_rank": 3, "bias": True},
    {"gate_divisor": 1.0},
]


def naive() -> Callable[..., tuple[Tensor, Tensor]]:
    """Their loop over time, from its own file: the package around it wants a GPU."""
    package = importlib.util.find_spec("fla")
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = [p for place in places if (p := Path(place) / "ops/gla/naive.py").is_file()]
    if not files:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive_gla", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.naive_recurrent_gla


def parallel(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Equation (4) of the paper in float64: (Q * B)(K / B)^T, causal; for mild gates only."""
    G = g.cumsum(1)
    P = torch.einsum("bihk,bjhk->bhij", q * G.exp(), k * (-G).exp()).tril() * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhv->bihv", P, v)


def build(options: dict[str, object], dtype: torch.dtype = torch.float32) -> nn.Module:
    mixer = create_mixer("gla", D, **options).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return mixer


def published(mixer: nn.Module, x: Tensor, recurrence: Callable[..., Tensor]) -> Tensor:
    """The layer as its authors wrote it, around some recurrence, with the weights of `mixer`."""
    H, divisor = mixer.n_heads, mixer.gate_divisor

    def project(layer: nn.Linear, x: Tensor = x) -> Tensor:
        y = x @ layer.weight.T
        return y if layer.bias is None else y + layer.bias

    def heads(y: Tensor) -> Tensor:
        return y.view(B, x.shape[1], H, -1)

    low = project(mixer.decay_up_proj, project(mixer.decay_down_proj))
    g = heads(torch.log(torch.sigmoid(low) ** (1 / divisor)))
    q, k, v = (heads(project(p)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    o = recurrence(q, k, v, g)
    o = mixer.norm.weight * o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    r = heads(project(mixer.gate_proj))
    return project(mixer.o_proj, (o * r * torch.sigmoid(r)).flatten(-2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_recurrence_of_flash_linear_attention(options):
    theirs = naive()
    mixer = build(options)
    x = torch.randn(B, T, D)
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
def test_equals_the_parallel_form_of_the_paper_in_output_and_gradients(options):
    mixer = build(options, torch.float64)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    found, wanted = mixer(x)[0], published(mixer, x, parallel)
    assert relative_error(found, wanted) <= 1e-9
    weight = torch.randn_like(found)
    got, true = (torch.autograd.grad(y, [x, *mixer.parameters()], weight) for y in (found, wanted))
    assert all(relative_error(a, b) <= 1e-9 for a, b in zip(got, true, strict=True))


def test_widths_that_do_not_fit_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"expand_k=0.3 times d_model=32 is 9.6.*nearest: 0.3125"):
        create_mixer("gla", D, expand_k=0.3)
    with pytest.raises(ValueError, match=r"expand_v \* d_model=32 is not divisible by n_heads=5"):
        create_mixer("gla", D, n_heads=5, expand_k=0.625)
