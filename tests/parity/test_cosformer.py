"""cosFormer against the quadratic form of its paper, in float64; no package has it."""

import math

import pytest
import torch
from torch import Tensor, nn

from seqzoo.layers import create_mixer
from seqzoo.layers.base import Context
from tests.tolerances import relative_error

D, B, T = 32, 2, 70
OPTIONS = [
    {"max_length": T},
    {"n_heads": 2, "max_length": 200, "bias": False},
    {"n_heads": 1},
]


def build(options: dict[str, object]) -> nn.Module:
    mixer = create_mixer("cosformer", D, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return mixer


def published(mixer: nn.Module, x: Tensor) -> Tensor:
    """Equations (9) and (10), over all pairs, with the distance itself."""
    q, k, v = (
        p(x).view(B, x.shape[1], mixer.n_heads, -1).transpose(1, 2)
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    t = torch.arange(x.shape[1], dtype=torch.float64)
    weights = torch.cos(math.pi / 2 * (t[:, None] - t) / mixer.max_length)
    weights = (q.relu() @ k.relu().mT * weights).tril()
    o = weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    return mixer.o_proj(o.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_quadratic_form_of_the_paper_in_output_and_gradients(options):
    mixer = build(options)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    found, wanted = mixer(x)[0], published(mixer, x)
    assert relative_error(found, wanted) <= 1e-9
    weight = torch.randn_like(found)
    got, true = (torch.autograd.grad(y, [x, *mixer.parameters()], weight) for y in (found, wanted))
    assert all(relative_error(a, b) <= 1e-8 for a, b in zip(got, true, strict=True))


def test_token_by_token_equals_the_quadratic_form():
    mixer, x = build(OPTIONS[0]), torch.randn(B, T, D, dtype=torch.float64)
    state, steps = mixer.init_state(B), []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        steps.append(y)
    assert relative_error(torch.cat(steps, dim=1), published(mixer, x)) <= 1e-9
    assert state.next.tolist() == [T] * B


def test_only_distances_matter_and_positions_far_out_lose_no_digits():
    mixer, x = build(OPTIONS[0]).float(), torch.randn(B, T, D)
    far = 10_000_001 + torch.arange(T).expand(B, T)
    assert relative_error(mixer(x, None, Context(positions=far))[0], mixer(x)[0]) <= 1e-5


def test_a_head_without_positive_channels_gives_zero_and_no_nan():
    mixer = build({"max_length": T})
    with torch.no_grad():
        mixer.q_proj.bias.fill_(-1000)
    x = torch.randn(B, T, D, dtype=torch.float64)
    assert torch.equal(mixer(x)[0], mixer.o_proj.bias.expand(B, T, D))


def test_heads_or_a_length_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="d_model=32 is not divisible by n_heads=5; nearest: 30"):
        create_mixer("cosformer", D, n_heads=5)
    with pytest.raises(ValueError, match="max_length=0 is not allowed"):
        create_mixer("cosformer", D, max_length=0)
