"""Performer against performer-pytorch's features and exact sums of them, and against softmax.

Its own causal attention is no oracle: it takes the largest exponent of all keys, later ones too,
and adds 1e-4 to every feature. With eps=0 its features are the paper's, up to a factor.
"""

import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from seqzoo.layers import create_mixer
from seqzoo.layers.base import Context, Mixer
from tests.tolerances import relative_error

D, B, T = 32, 2, 70
OPTIONS = [{}, {"n_heads": 2, "n_features": 21, "bias": True}]


def softmax_kernel() -> Callable[..., Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports are old
        package = pytest.importorskip(
            "performer_pytorch.performer_pytorch", reason="performer-pytorch is not installed"
        )
    return package.softmax_kernel


def build(options: dict[str, object], dtype: torch.dtype = torch.float32) -> Mixer:
    mixer = create_mixer("performer", D, **options).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return mixer


def heads(mixer: Mixer, x: Tensor) -> list[Tensor]:
    """Queries, keys and values, (B, H, T, K)."""
    projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    return [p(x).unflatten(-1, (mixer.n_heads, -1)).transpose(1, 2) for p in projections]


def averaged(mixer: Mixer, scores: Tensor, v: Tensor) -> Tensor:
    """The values by their scores (B, H, T, T), over what a token sees."""
    scores = scores.tril() if mixer.causal else scores
    o = scores @ v / scores.sum(-1, keepdim=True)
    return mixer.o_proj(o.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_exact_sums_of_performer_pytorchs_features(options, causal):
    features = softmax_kernel()
    mixer = build(options | {"causal": causal}, torch.float64)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    q, k, v = heads(mixer, x)
    q = features(q, projection_matrix=mixer.projection, is_query=True, eps=0)
    k = features(k, projection_matrix=mixer.projection, is_query=False, eps=0)
    found, wanted = mixer(x)[0], averaged(mixer, q @ k.mT, v)
    assert relative_error(found, wanted) <= 1e-10
    weight = torch.randn_like(found)
    got, true = (torch.autograd.grad(y, [x, *mixer.parameters()], weight) for y in (found, wanted))
    assert all(relative_error(a, b) <= 1e-9 for a, b in zip(got, true, strict=True))


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_the_error_against_softmax_falls_as_the_features_grow(causal):
    x, errors = 0.5 * torch.randn(B, T, D, dtype=torch.float64), []
    for n_features in (16, 128, 1024, 8192):
        torch.manual_seed(0)  # the same projections
        mixer = build({"n_features": n_features, "causal": causal}, torch.float64)
        q, k, v = heads(mixer, x)
        exact = averaged(mixer, (q @ k.mT / q.shape[-1] ** 0.5).exp(), v)
        errors.append(float((mixer(x)[0] - exact).norm() / exact.norm()))
    assert all(later < 0.6 * sooner for sooner, later in pairwise(errors))
    assert errors[-1] < 0.04


@torch.no_grad()
def test_one_large_key_does_not_undo_what_came_before_it():
    """Far above the exponents of the others: a global maximum would leave nothing of them."""
    mixer = build({}, torch.float32)
    x = torch.randn(B, T, D)
    x[:, T // 2] *= 300
    exact = build({}, torch.float64)
    exact.load_state_dict(mixer.state_dict())
    assert relative_error(mixer(x)[0], exact(x.double())[0]) <= 1e-4
    assert torch.equal(mixer(x)[0][:, : T // 2], mixer(x[:, : T // 2])[0])


@torch.no_grad()
def test_both_ways_padding_and_other_documents_are_not_seen():
    mixer, x = build({"causal": False}), torch.randn(1, 12, D)
    mask = torch.tensor([[True] * 3 + [False] + [True] * 5 + [False] * 3])
    ids = torch.tensor([[1] * 5 + [2] * 7])
    y = mixer(torch.where(mask[..., None], x, 1e3), None, Context(mask=mask, document=ids))[0]
    first, second = [0, 1, 2, 4], [5, 6, 7, 8]
    wanted = torch.cat([mixer(x[:, first])[0], mixer(x[:, second])[0]], dim=1)
    assert relative_error(y[:, first + second], wanted) <= 2e-6


def test_rows_are_orthogonal_and_of_gaussian_norm():
    W = create_mixer("performer", 64, n_heads=4, n_features=16 * 400).projection.double()
    blocks = W.unflatten(0, (-1, 16))
    norms = blocks.norm(dim=-1)
    cosines = blocks @ blocks.mT / norms[..., None] / norms[:, None]
    assert (cosines - torch.eye(16)).abs().max() <= 1e-5
    assert abs(norms.square().mean() / 16 - 1) < 0.02  # chi squared of 16 degrees
    assert abs(norms.square().std() / 32**0.5 - 1) < 0.05
    assert W.mean(0).abs().max() < 0.06
    assert (W.T @ W / len(W) - torch.eye(16)).abs().max() < 0.06


def test_features_are_redrawn_from_the_seed_alone():
    first, other = (create_mixer("performer", D, seed=s) for s in (3, 4))
    torch.manual_seed(99)
    again = create_mixer("performer", D, seed=3)
    assert torch.equal(first.projection, again.projection)
    assert not torch.equal(first.projection, other.projection)
    seen = [first.projection]
    for _ in range(3):
        first.redraw()
        again.redraw()
        assert torch.equal(first.projection, again.projection)
        assert not any(torch.equal(first.projection, W) for W in seen)
        seen.append(first.projection)
    first.reset_parameters()
    assert torch.equal(first.projection, seen[0])


def test_training_redraws_on_time_and_goes_on_from_what_was_saved():
    x = torch.randn(1, 3, D)
    mixer = create_mixer("performer", D, redraw_every=3)
    drawn = []
    for _ in range(8):
        mixer(x)
        drawn.append(int(mixer.draws))
    assert drawn == [0, 0, 0, 1, 1, 1, 2, 2]
    mixer.eval()
    for _ in range(5):
        mixer(x)
    resumed = create_mixer("performer", D, redraw_every=3, seed=0)
    resumed.load_state_dict(mixer.state_dict())
    assert torch.equal(resumed(x)[0], mixer.train()(x)[0])
    for _ in range(4):
        assert torch.equal(resumed(x)[0], mixer(x)[0])
    assert torch.equal(resumed.projection, mixer.projection)
    assert int(resumed.draws) == int(mixer.draws) == 4


def test_a_redraw_between_forward_and_backward_leaves_the_gradient_alone():
    mixer, x = create_mixer("performer", D), torch.randn(1, 5, D, requires_grad=True)
    (wanted,) = torch.autograd.grad(mixer(x)[0].sum(), x)
    y = mixer(x)[0].sum()
    mixer.redraw()
    assert torch.equal(torch.autograd.grad(y, x)[0], wanted)


def test_default_features_are_d_log_d_of_a_head():
    assert create_mixer("performer", 256, n_heads=4).n_features == 266
    assert create_mixer("performer", 4, n_heads=4).n_features == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_heads": 5}, "d_model=32 is not divisible by n_heads=5; nearest: 30"),
        ({"n_features": 0}, "n_features=0 is not allowed"),
        ({"redraw_every": -1}, "redraw_every=-1 is not allowed; it must be at least 0"),
        ({"seed": -1}, "seed=-1 is not allowed"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("performer", D, **wrong)


def test_a_bidirectional_pass_takes_no_state():
    mixer, states = create_mixer("performer", D, causal=False), create_mixer("performer", D)
    with pytest.raises(ValueError, match="causal=False has no state to go on from"):
        mixer(torch.randn(2, 3, D), states.init_state(2))
