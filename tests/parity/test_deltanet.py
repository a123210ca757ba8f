"""DeltaNet around flash-linear-attention's loop; Gated DeltaNet and KDA against transformers."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, silu, softplus

from seqzoo.layers import create_mixer
from tests.tolerances import relative_error

D, B, T = 32, 2, 90
NAMES = ("deltanet", "gated_deltanet", "kda")
SIZES = [{"n_heads": 4, "head_dim": 8, "d_conv": 4}, {"n_heads": 2, "head_dim": 6, "d_conv": 2}]


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Their module as if no CUDA package were there: those die on a CPU."""
    for package in ("causal_conv1d", "fla", "kernels"):
        monkeypatch.setitem(sys.modules, package, None)

    def load(name: str) -> ModuleType:
        path = f"transformers.models.{name}.modeling_{name}"
        pytest.importorskip(f"transformers.models.{name}", reason="an older transformers")
        importlib.import_module(path)  # so that there is one to put back
        monkeypatch.delitem(sys.modules, path)
        return importlib.import_module(path)

    return load


def recurrence() -> Callable[..., tuple[Tensor, Tensor]]:
    """Their loop over time, from its own file: the package around it wants a GPU."""
    package = importlib.util.find_spec("fla")
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = [p for place in places if (p := Path(place) / "ops/delta_rule/naive.py").is_file()]
    if not files:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive_delta_rule", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.delta_rule_recurrence


def build(name: str, **options: object) -> nn.Module:
    mixer = create_mixer(name, D, **options)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        if name != "deltanet":
            mixer.dt_bias += 2  # steps long enough for the decay to matter
    return mixer


def assert_same(mixer: nn.Module, module: nn.Module) -> None:
    """Outputs; gradients of the input and of the decay, where theirs is float32 and cancels."""
    x = torch.randn(B, T, D, requires_grad=True)
    found, wanted = mixer(x)[0], module(x)
    assert relative_error(found, wanted) <= 1e-5
    weight = torch.randn_like(found)
    got, true = (
        torch.autograd.grad(y, [x, m.A_log, m.dt_bias], weight)
        for y, m in ((found, mixer), (wanted, module))
    )
    for a, b in zip(got, true, strict=True):
        assert relative_error(a, b.reshape(a.shape)) <= 1e-4


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_deltanet_is_its_paper_around_the_loop_of_flash_linear_attention(sizes, negative):
    loop = recurrence()
    mixer = build("deltanet", **sizes, expand_v=1.5, negative_eigenvalues=negative)
    x = torch.randn(B, T, D)
    H, K, W = sizes["n_heads"], sizes["head_dim"], sizes["d_conv"]
    widths = [H * K, H * K, H * K * 3 // 2]

    def feature(projection: nn.Linear, weight: Tensor) -> Tensor:
        u = (x @ projection.weight.T).transpose(1, 2)
        u = conv1d(u, weight[:, None], padding=W - 1, groups=len(weight))[..., :T]
        return silu(u).view(B, H, -1, T).transpose(2, 3)

    projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    q, k, v = (
        feature(p, w) for p, w in zip(projections, mixer.conv_weight.split(widths), strict=True)
    )
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = (1 + negative) * torch.sigmoid(x @ mixer.beta_proj.weight.T).transpose(1, 2)
    o, last = loop(q, k, v, beta)
    o = mixer.norm_weight * o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    wanted = o.transpose(1, 2).flatten(-2) @ mixer.o_proj.weight.T
    y, state = mixer(x, mixer.init_state(B))
    assert relative_error(y, wanted) <= 1e-5
    assert relative_error(state.S, last) <= 1e-5


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gated_deltanet_is_the_layer_of_qwen3_next(sizes, theirs):
    module = theirs("qwen3_next")
    mixer = build("gated_deltanet", **sizes)
    H, K = sizes["n_heads"], sizes["head_dim"]
    config = module.Qwen3NextConfig(
        hidden_size=D,
        linear_num_value_heads=H,
        linear_num_key_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=2 * K,
        linear_conv_kernel_dim=sizes["d_conv"],
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    other = module.Qwen3NextGatedDeltaNet(config, 0)
    weights = mixer.state_dict()

    def interleaved(*names: str) -> Tensor:
        """Head after head, all projections of each."""
        parts = [weights.pop(f"{name}.weight").view(H, -1, D) for name in names]
        return torch.cat(parts, dim=1).flatten(0, 1)

    other.load_state_dict(
        {
            "in_proj_qkvz.weight": interleaved("q_proj", "k_proj", "v_proj", "gate_proj"),
            "in_proj_ba.weight": interleaved("beta_proj", "decay_proj"),
            "conv1d.weight": weights.pop("conv_weight")[:, None],
            "norm.weight": weights.pop("norm_weight"),
            "out_proj.weight": weights.pop("o_proj.weight"),
            **weights,
        }
    )
    assert_same(mixer, other)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kda_is_the_layer_of_kimi_linear(sizes, theirs):
    module = theirs("kimi_linear")
    mixer = build("kda", **sizes)
    config = module.KimiLinearConfig(
        hidden_size=D,
        linear_num_heads=sizes["n_heads"],
        linear_head_dim=sizes["head_dim"],
        linear_conv_kernel_dim=sizes["d_conv"],
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    other = module.KimiLinearDeltaAttention(config, 0)
    weights = mixer.state_dict()
    other.load_state_dict(
        {
            "conv1d.weight": weights.pop("conv_weight")[:, None],
            "forget_gate.A_log": weights.pop("A_log").view(1, 1, -1, 1),
            "forget_gate.dt_bias": weights.pop("dt_bias"),
            "forget_gate.f_a_proj.weight": weights.pop("decay_down_proj.weight"),
            "forget_gate.f_b_proj.weight": weights.pop("decay_up_proj.weight"),
            "b_proj.weight": weights.pop("beta_proj.weight"),
            "g_a_proj.weight": weights.pop("gate_down_proj.weight"),
            "g_b_proj.weight": weights.pop("gate_up_proj.weight"),
            "o_norm.weight": weights.pop("norm_weight"),
            **weights,
        }
    )
    other.A_log, other.dt_bias = other.forget_gate.A_log, other.forget_gate.dt_bias
    assert_same(mixer, other)


@pytest.mark.parametrize(("name", "lowest"), [("gated_deltanet", 0.01), ("kda", 1.0)])
def test_rates_and_step_sizes_start_in_the_authors_ranges(name, lowest):
    mixer = create_mixer(name, 256, n_heads=64)
    rates, steps = mixer.A_log.detach().exp(), softplus(mixer.dt_bias.detach())
    assert lowest * (1 - 1e-5) <= rates.min() < 4
    assert 13 < rates.max() <= 16 * (1 + 1e-5)
    assert math.isclose(steps.log().mean(), math.log(1e-2), abs_tol=0.6)
    assert steps.min() >= 1e-3 * (1 - 1e-3)
    assert steps.max() <= 0.1 * (1 + 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_widths_that_do_not_fit_are_refused_with_the_nearest(name):
    with pytest.raises(ValueError, match=r"expand_v=0.3 times head_dim=6 is 1.7.*nearest: 0.3333"):
        create_mixer(name, D, head_dim=6, expand_v=0.3)
    with pytest.raises(ValueError, match="head_dim=0 is not allowed"):
        create_mixer(name, D, head_dim=0)
    if name != "gated_deltanet":
        with pytest.raises(ValueError, match="d_model=32 is not divisible by n_heads=5"):
            create_mixer(name, D, n_heads=5)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_layer_in_bfloat16_runs_with_a_float32_state(name):
    mixer = build(name).bfloat16()
    y, state = mixer(torch.randn(B, T, D).bfloat16(), mixer.init_state(B))
    assert y.dtype == torch.bfloat16
    assert state.S.dtype == torch.float32
    assert y.isfinite().all()
