"""RetNet against flash-linear-attention's retention, and against the parallel form of the paper."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from seqzoo.layers import create_mixer
from seqzoo.layers.base import Context
from tests.tolerances import relative_error

D, B, T = 32, 2, 70
OPTIONS = [
    {},
    {"n_heads": 2, "expand_v": 1, "bias": True},
    {"n_heads": 16, "expand_v": 3},  # one pair of channels a head
]


def naive() -> ModuleType:
    """Their definitions, from their own file: the package around them wants a GPU."""
    package = importlib.util.find_spec("fla")
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = [p for place in places if (p := Path(place) / "ops/retention/naive.py").is_file()]
    if not files:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive_retention", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Equation (5) of the paper, (Q K^T * D) V, head by head; (B, H, T, K)."""
    outputs = []
    for h in range(q.shape[1]):
        t = torch.arange(q.shape[2], dtype=q.dtype)
        D_h = ((1 - 2.0 ** (-5 - h)) ** (t[:, None] - t)).tril()
        outputs.append((q[:, h] @ k[:, h].mT * D_h) @ v[:, h] / q.shape[-1] ** 0.5)
    return torch.stack(outputs, dim=1)


def build(options: dict[str, object], dtype: torch.dtype = torch.float32) -> nn.Module:
    mixer = create_mixer("retnet", D, **options).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return mixer


def published(mixer: nn.Module, x: Tensor, retention: Callable[..., Tensor]) -> Tensor:
    """The layer as its authors wrote it, around some retention, with the weights of `mixer`."""

    def project(layer: nn.Linear) -> Tensor:
        y = x @ layer.weight.T
        y = y if layer.bias is None else y + layer.bias
        return y.view(B, x.shape[1], mixer.n_heads, -1).transpose(1, 2)

    def turned(y: Tensor) -> Tensor:
        pairs = y.shape[-1] // 2
        angle = 10000 ** -torch.linspace(0, 1, pairs, dtype=torch.float64)
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * angle
        z = torch.complex(*y.double().split(pairs, dim=-1)) * torch.exp(1j * angle)
        return torch.cat([z.real, z.imag], dim=-1).to(y.dtype)

    q, k, v = (project(p) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    o = retention(turned(q), turned(k), v)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    gate = project(mixer.gate_proj)
    y = (o * gate * torch.sigmoid(gate)).transpose(1, 2).flatten(-2) @ mixer.o_proj.weight.T
    return y if mixer.o_proj.bias is None else y + mixer.o_proj.bias


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_retention_of_flash_linear_attention(options):
    theirs = naive().naive_retention
    mixer, x = build(options), torch.randn(B, T, D)
    assert relative_error(mixer(x)[0], published(mixer, x, theirs)) <= 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_parallel_form_of_the_paper_in_output_and_gradients(options):
    mixer = build(options, torch.float64)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    found, wanted = mixer(x)[0], published(mixer, x, parallel)
    assert relative_error(found, wanted) <= 1e-9
    weight = torch.randn_like(found)
    got, true = (torch.autograd.grad(y, [x, *mixer.parameters()], weight) for y in (found, wanted))
    assert all(relative_error(a, b) <= 1e-9 for a, b in zip(got, true, strict=True))


def test_positions_a_million_tokens_out_lose_no_digits():
    mixer, x = build({}), torch.randn(B, T, D)
    near = torch.arange(T).expand(B, T)
    shifted = mixer(x, None, Context(positions=near + 1_000_000))[0]
    assert relative_error(shifted, mixer(x, None, Context(positions=near))[0]) <= 1e-5


def test_given_positions_turn_keys_and_go_on_in_the_state():
    mixer, x = build({}, torch.float64), torch.randn(B, T, D, dtype=torch.float64)
    every_third = 3 * torch.arange(T).expand(B, T)
    y, state = mixer(x, mixer.init_state(B), Context(positions=every_third))
    assert relative_error(y, mixer(x)[0]) > 0.1
    assert state.next.tolist() == [3 * (T - 1) + 1] * B


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="d_model=32 is not divisible by n_heads=5; nearest: 30"):
        create_mixer("retnet", D, n_heads=5)
    with pytest.raises(ValueError, match="rotation needs an even number"):
        create_mixer("retnet", D, n_heads=32)
