"""HGRN against the recurrence of flash-linear-attention and against the complex one in reals."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, logsigmoid

from seqzoo.layers.hgrn import HGRN
from tests.tolerances import relative_error


def naive() -> Callable[..., tuple[Tensor, Tensor]]:
    """Their loop over time, from its own file: the package around it wants a GPU."""
    package = importlib.util.find_spec("fla")
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = [p for place in places if (p := Path(place) / "ops/hgrn/naive.py").is_file()]
    if not files:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive_hgrn", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.naive_recurrent_hgrn


def build(**options: object) -> HGRN:
    mixer = HGRN(6, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return mixer


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def published(mixer: HGRN, x: Tensor, recurrence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The layer around a recurrence h = f h + (1 - f) i, which gets i and f."""

    def project(layer: torch.nn.Linear, x: Tensor = x) -> Tensor:
        y = x @ layer.weight.T
        return y if layer.bias is None else y + layer.bias

    bound = mixer.lower_bound
    forget = bound + (1 - bound) * torch.sigmoid(project(mixer.forget_proj))
    h = recurrence(swish(project(mixer.in_proj)), forget)
    h = layer_norm(h, h.shape[-1:], mixer.norm.weight, mixer.norm.bias)
    return project(mixer.out_proj, h * swish(project(mixer.gate_proj)))


@pytest.mark.parametrize("options", [{}, {"lower_bound": 0.7, "expand": 2, "bias": False}], ids=str)
@torch.no_grad()
def test_the_real_layer_equals_fla(options):
    mixer, x = build(**options), torch.randn(2, 40, 6, dtype=torch.float64)
    loop = naive()
    wanted = published(mixer, x, lambda i, f: loop((1 - f) * i, f.log())[0])  # theirs is float32
    assert relative_error(mixer(x)[0], wanted) < 1e-5


@torch.no_grad()
def test_a_carried_state_equals_fla():
    mixer, x = build(), torch.randn(2, 12, 6, dtype=torch.float64)
    i, f = swish(mixer.in_proj(x)), mixer.forget_proj(x)
    state, start = mixer(x[:, :5], mixer.init_state(2))[1], None
    for piece in (slice(0, 5), slice(5, 12)):
        write = torch.sigmoid(-f[:, piece]) * i[:, piece]
        _, start = naive()(write, logsigmoid(f[:, piece]), start, output_final_state=True)
    assert relative_error(mixer(x[:, 5:], state)[1].h, start) < 1e-5


@pytest.mark.parametrize("options", [{}, {"lower_bound": 0.7, "expand": 2, "bias": False}], ids=str)
@torch.no_grad()
def test_the_complex_layer_equals_the_papers_loop_in_reals(options):
    mixer = build(complex_state=True, **options)
    x = torch.randn(2, 40, 6, dtype=torch.float64)

    def turning(i: Tensor, forget: Tensor) -> Tensor:
        cos, sin = mixer.theta.cos(), mixer.theta.sin()
        real = imag = torch.zeros_like(forget[:, 0])
        outputs = []
        for t in range(forget.shape[1]):
            f, write = forget[:, t], (1 - forget[:, t])
            real, imag = (
                f * (cos * real - sin * imag) + write * i[:, t, 0::2],
                f * (cos * imag + sin * real) + write * i[:, t, 1::2],
            )
            outputs.append(torch.cat([real, imag], dim=-1))
        return torch.stack(outputs, dim=1)

    wanted = published(mixer, x, turning)
    torch.testing.assert_close(mixer(x)[0], wanted)
    state, steps = mixer.init_state(2), []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted)


def test_angles_start_like_rotary_frequencies():
    theta = HGRN(4, expand=2, complex_state=True).theta
    torch.testing.assert_close(theta, torch.tensor([10000 ** (-2 * k / 8) for k in range(8)]))


def test_wrong_options_are_refused_by_name():
    for options, message in (
        ({"lower_bound": 1.0}, r"lower_bound=1.0 is not allowed; it must be in \[0, 1\)"),
        ({"expand": 0}, r"expand=0 is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            HGRN(4, **options)
