"""Mamba-2 against transformers' torch path with the same weights, and its initial values."""

import importlib
import math
import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from seqzoo.layers import create_mixer
from tests.tolerances import relative_error

D = 32
SIZES = [
    {"head_dim": 16, "d_state": 8},
    {"head_dim": 8, "d_state": 12, "n_groups": 2, "bias": True, "d_conv": 3},
    {"head_dim": 8, "d_state": 5, "n_groups": 4, "conv_bias": False, "dt_limit": (0.1, 0.6)},
    {"head_dim": 64, "d_state": 16, "d_conv": 2},
    {"head_dim": 16, "d_state": 16, "d_conv": 2},
]


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Their module as if no CUDA package were there: those die on a CPU."""
    for package in ("mamba_ssm", "causal_conv1d", "fla", "kernels"):
        monkeypatch.setitem(sys.modules, package, None)
    path = "transformers.models.mamba2.modeling_mamba2"
    importlib.import_module(path)  # so that there is one to put back
    monkeypatch.delitem(sys.modules, path)
    return importlib.import_module(path)


def pair(module: ModuleType, options: dict[str, object]) -> tuple[nn.Module, nn.Module]:
    """The two mixers with the same stirred weights."""
    ours = create_mixer("mamba2", D, **options)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        ours.dt_bias += 3  # steps long enough for the decay to matter
    config = module.Mamba2Config(
        hidden_size=D,
        num_heads=ours.heads,
        head_dim=options["head_dim"],
        state_size=options["d_state"],
        conv_kernel=options.get("d_conv", 4),
        n_groups=options.get("n_groups", 1),
        use_bias=options.get("bias", False),
        use_conv_bias=options.get("conv_bias", True),
        time_step_limit=options.get("dt_limit", (0.0, math.inf)),
        num_hidden_layers=1,
        chunk_size=16,
    )
    weights = ours.state_dict()
    weights["conv1d.weight"] = weights.pop("conv_weight")[:, None]
    if "conv_bias" in weights:
        weights["conv1d.bias"] = weights.pop("conv_bias")
    weights["norm.weight"] = weights.pop("norm_weight")
    other = module.Mamba2Mixer(config, layer_idx=0)
    other.load_state_dict(weights)
    return ours, other.eval()


@pytest.mark.parametrize("options", SIZES, ids=str)
def test_equals_transformers_with_its_weights_in_output_and_gradients(theirs, options):
    ours, other = pair(theirs, options)
    x = torch.randn(2, 75, D, requires_grad=True)
    found, wanted = ours(x)[0], other(x)
    assert relative_error(found, wanted) <= 1e-5
    names = ["in_proj.weight", "out_proj.weight"]
    # With one head the gradient of D is one number, a sum of 9,600 terms that nearly cancel: theirs
    # is 3e-5 off the one in float64, ours 5e-5, so the two say nothing of each other there.
    names += ["A_log", "D", "dt_bias"] if ours.heads > 1 else []
    weight = torch.randn_like(found)
    got, true = (
        torch.autograd.grad(y, [x, *(m.get_parameter(n) for n in names)], weight)
        for y, m in ((found, ours), (wanted, other))
    )
    for name, a, b in zip(["x", *names], got, true, strict=True):
        assert relative_error(a, b) <= 1e-5, f"gradient of {name}"


def test_token_by_token_equals_transformers_in_one_pass(theirs):
    ours, other = pair(theirs, SIZES[1])
    x = torch.randn(2, 20, D)
    state, steps = ours.init_state(2), []
    for token in x.split(1, dim=1):
        y, state = ours(token, state)
        steps.append(y)
    assert relative_error(torch.cat(steps, dim=1), other(x)) <= 1e-5


def test_initial_values_are_the_published_ranges():
    mixer = create_mixer("mamba2", 4096, head_dim=4, d_state=1)
    A, dt = mixer.A_log.exp(), softplus(mixer.dt_bias)
    assert 1 <= A.min() < 1.2 < 8.3 < A.mean() < 8.7 < 15.8 < A.max() <= 16.001
    assert 0.00099 <= dt.min() < 0.0011 < 0.09 < dt.max() <= 0.1001
    assert abs(dt.log().mean() - math.log(0.01)) < 0.1  # log-uniform: the geometric mean
    assert (mixer.D == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_step_sizes_decays_and_state_in_float32(dtype):
    # what the projections round is out of our hands; a rounded A_log would be off by 12 % here
    mixer = create_mixer("mamba2", D, head_dim=16, d_state=4)
    with torch.no_grad():
        mixer.in_proj.weight.zero_()  # nothing to round: dt is its bias alone
        mixer.conv_bias.fill_(0.5)
        mixer.dt_bias.copy_(torch.tensor([-6.9, -6.1, -5.3, -4.7]))
        mixer.A_log.copy_(torch.tensor([0.013, 0.17, 0.31, 0.47]))
    state = mixer.init_state(1)
    x = torch.zeros(1, 1000, D)
    wanted = mixer(x, state)[1].S
    with torch.autocast("cpu", dtype):
        found = mixer(x, state)[1].S
    assert found.dtype == torch.float32
    # C, B and x are equal everywhere, so the state is a number times what the convolution rounded
    ratio = found / wanted
    assert relative_error(ratio / ratio[:, :1, :1, :1], torch.ones_like(ratio)) <= 1e-5


def test_heads_that_do_not_fit_are_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"model=64 is not divisible by head_dim=24; nearest: 48, 72"
    ):
        create_mixer("mamba2", D, head_dim=24)
    with pytest.raises(ValueError, match=r"=4 is not divisible by n_groups=3; nearest: 3, 6"):
        create_mixer("mamba2", D, head_dim=16, n_groups=3)
    with pytest.raises(ValueError, match=r"dt_limit=\(0.5, 0.1\) is not allowed"):
        create_mixer("mamba2", D, dt_limit=(0.5, 0.1))


@pytest.mark.parametrize(("d_model", "head_dim"), [(24, 16), (32, 64), (96, 64), (256, 64)])
def test_default_heads_fit_every_width(d_model, head_dim):
    mixer = create_mixer("mamba2", d_model)
    assert 2 * d_model == mixer.heads * head_dim
