"""Mamba against transformers' torch path, Falcon-Mamba's, and mambapy, with the same weights."""

import importlib
import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from seqzoo.layers import create_mixer
from tests.tolerances import relative_error

SIZES = {"d_state": 8, "expand": 2, "dt_rank": 3}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch):
    """Import a transformers module as if no CUDA package were there: those die on a CPU."""

    def load(name: str) -> ModuleType:
        for package in ("mamba_ssm", "causal_conv1d", "fla", "kernels"):
            monkeypatch.setitem(sys.modules, package, None)
        path = f"transformers.models.{name}.modeling_{name}"
        importlib.import_module(path)  # so that there is one to put back
        monkeypatch.delitem(sys.modules, path)
        return importlib.import_module(path)

    return load


def stirred(d_model: int, **options: object) -> nn.Module:
    mixer = create_mixer("mamba", d_model, **options)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        mixer.dt_bias += 3  # steps long enough for the decay to matter
    return mixer


def give(theirs: nn.Module, mixer: nn.Module) -> nn.Module:
    ours = mixer.state_dict()
    ours["dt_proj.bias"] = ours.pop("dt_bias")
    ours["conv1d.weight"] = ours.pop("conv_weight")[:, None]
    if "conv_bias" in ours:
        ours["conv1d.bias"] = ours.pop("conv_bias")
    theirs.load_state_dict(ours)
    return theirs.eval()


def assert_same(ours: nn.Module, theirs: nn.Module, run, x: Tensor) -> None:
    """Outputs, and gradients of the input and of what shapes the recurrence, to 1e-5."""
    wanted, found = run(x), ours(x)[0]
    assert relative_error(found, wanted) <= 1e-5
    names = ["A_log", "D", "x_proj.weight", "dt_proj.weight", "in_proj.weight", "out_proj.weight"]
    sources = [[x, *(m.get_parameter(n) for n in names)] for m in (ours, theirs)]
    weight = torch.randn(found.shape)
    for name, a, b in zip(
        ["x", *names],
        torch.autograd.grad((found * weight).sum(), sources[0]),
        torch.autograd.grad((wanted * weight).sum(), sources[1]),
        strict=True,
    ):
        assert relative_error(a, b) <= 1e-5, f"gradient of {name}"


@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "d_conv": 3}, {"conv_bias": False, "d_conv": 2}], ids=str
)
def test_transformers_mixer_gives_the_same_numbers(options, plain):
    from transformers import MambaConfig

    ours = stirred(32, **SIZES, **options)
    config = MambaConfig(
        hidden_size=32,
        state_size=8,
        expand=2,
        time_step_rank=3,
        conv_kernel=options.get("d_conv", 4),
        use_bias=options.get("bias", False),
        use_conv_bias=options.get("conv_bias", True),
        num_hidden_layers=1,
    )
    theirs = give(plain("mamba").MambaMixer(config, layer_idx=0), ours)
    assert_same(ours, theirs, theirs, torch.randn(2, 37, 32, requires_grad=True))


def test_transformers_cache_holds_the_same_state(plain):
    from transformers import DynamicCache, MambaConfig

    ours = stirred(32, **SIZES)
    config = MambaConfig(
        hidden_size=32, state_size=8, expand=2, time_step_rank=3, num_hidden_layers=1
    )
    theirs = give(plain("mamba").MambaMixer(config, layer_idx=0), ours)
    cache, state, x = DynamicCache(config=config), ours.init_state(2), torch.randn(2, 20, 32)
    with torch.no_grad():
        for piece in x.split((17, 1, 1, 1), dim=1):
            wanted = theirs(piece, cache_params=cache)
            found, state = ours(piece, state)
            assert relative_error(found, wanted) <= 1e-5
    h, tail = cache.get_recurrent_state(0), cache.get_conv_state(0)
    assert relative_error(state.h, h) <= 1e-5
    assert relative_error(state.tail, tail.mT[:, -3:]) <= 1e-5


def test_norms_are_falcon_mambas(plain):
    from transformers import FalconMambaConfig

    ours = stirred(32, **SIZES, norms=True)
    config = FalconMambaConfig(
        hidden_size=32, state_size=8, expand=2, time_step_rank=3, num_hidden_layers=1
    )
    module = plain("falcon_mamba")
    theirs = module.FalconMambaMixer(config, layer_idx=0, initialize_mixer_weights=False)
    theirs = give(theirs, ours)
    assert_same(ours, theirs, theirs, torch.randn(2, 37, 32, requires_grad=True))


@pytest.mark.parametrize("pscan", [True, False], ids=["parallel", "sequential"])
def test_mambapy_gives_the_same_numbers(pscan):
    mambapy = pytest.importorskip("mambapy.mamba")
    ours = stirred(32, **SIZES, bias=True)
    config = mambapy.MambaConfig(
        d_model=32, n_layers=1, dt_rank=3, d_state=8, bias=True, pscan=pscan
    )
    theirs = give(mambapy.MambaBlock(config), ours)
    assert_same(ours, theirs, theirs, torch.randn(2, 37, 32, requires_grad=True))


def test_parameters_start_as_published(plain):
    """A_log, D and the ranges of the step sizes as transformers draws them."""
    from transformers import MambaConfig

    ours = create_mixer("mamba", 256)
    theirs = plain("mamba").MambaMixer(MambaConfig(hidden_size=256, num_hidden_layers=1), 0)
    assert ours.rank == theirs.time_step_rank == 16
    assert torch.equal(ours.A_log, theirs.A_log)
    assert torch.equal(ours.D, theirs.D)
    log_dt = [softplus(b).log().double() for b in (ours.dt_bias, theirs.dt_proj.bias)]
    for dt in log_dt:
        assert math.log(1e-3) - 1e-3 <= dt.min() < math.log(1.1e-3)
        assert math.log(0.09) < dt.max() <= math.log(0.1) + 1e-3
        assert abs(dt.mean() - math.log(1e-2)) < 0.2
    for a, b in ((ours.dt_proj, theirs.dt_proj), (ours.in_proj, theirs.in_proj)):
        assert abs(a.weight.std() / b.weight.std() - 1) < 0.05
        assert abs(a.weight.abs().max() / b.weight.abs().max() - 1) < 0.05
