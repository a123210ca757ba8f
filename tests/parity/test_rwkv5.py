"""RWKV-5 and RWKV-6 against the authors' package with the same weights, and fla's recurrence.

The package runs one row without gradients; gradients are those of the equations written plainly.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import group_norm, layer_norm, silu

from seqzoo.kernels.decay import decay
from seqzoo.layers import create_mixer
from seqzoo.layers.base import Context, Mixer
from tests.parity.rwkv_package import rwkv_model, unquantised
from tests.tolerances import relative_error

D, K = 24, 8
NAMES = ("rwkv5", "rwkv6")
OPTIONS = {"rwkv5": {"head_dim": K}, "rwkv6": {"head_dim": K, "mix_rank": 3, "decay_rank": 5}}


def build(name: str, dtype: torch.dtype = torch.float32) -> Mixer:
    mixer = create_mixer(name, D, **OPTIONS[name]).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return mixer


def theirs(mixer: Mixer, name: str, x: Tensor, previous: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    """Their layer of (T, D) with a norm before it and a residual, both without effect here."""
    H, model, extra = D // K, rwkv_model(), []
    decay_, bonus = (p.view(H, K, 1) for p in (mixer.time_decay, mixer.time_first))
    mixes = list(mixer.mix)
    if name == "rwkv5":
        decay_, layer = torch.exp(-torch.exp(decay_)), model.att_seq_v5_2
    else:
        mixes, layer = [mixer.mix_x, *mixes], model.att_seq_v6_0
        extra = [mixer.mix_down, mixer.mix_up, mixer.decay_down, mixer.decay_up]
    projections = (mixer.k_proj, mixer.v_proj, mixer.r_proj, mixer.gate_proj, mixer.o_proj)
    weights = [p.weight.T for p in projections]
    norms = torch.ones(D), torch.zeros(D), mixer.norm_weight, mixer.norm_bias
    return layer(
        None, x, previous, S, *norms, *mixes, *extra, decay_, bonus, *weights, *unquantised(5)
    )


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_equals_the_authors_package_and_goes_on_from_its_state(name):
    mixer = build(name)
    state, previous, S = mixer.init_state(1), torch.zeros(D), torch.zeros(D // K, K, K)
    for T in (37, 1, 9):
        x = torch.randn(T, D)
        wanted, previous, S = theirs(mixer, name, x, previous, S)
        y, state = mixer(layer_norm(x, (D,))[None], state)
        assert relative_error(y[0], wanted - x) <= 1e-5
        assert relative_error(state.S[0], S) <= 5e-6
        assert relative_error(state.previous[0, 0], previous) <= 1e-6


def published(mixer: Mixer, name: str, x: Tensor) -> Tensor:
    """The equations, token by token."""
    B, H = x.shape[0], D // K
    S, before, outputs = x.new_zeros(B, H, K, K), x.new_zeros(B, D), []
    u = mixer.time_first.view(H, K)
    for x_t in x.unbind(1):
        delta, log_rate = before - x_t, mixer.time_decay
        if name == "rwkv5":
            k, v, r, g = (x_t + delta * (1 - mu) for mu in mixer.mix)
        else:
            z = torch.tanh((x_t + delta * mixer.mix_x) @ mixer.mix_down).chunk(5, dim=-1)
            moved = [mu + a @ up for mu, a, up in zip(mixer.mix, z, mixer.mix_up, strict=True)]
            w, k, v, r, g = (x_t + delta * share for share in moved)
            log_rate = log_rate + torch.tanh(w @ mixer.decay_down) @ mixer.decay_up
        decayed = torch.exp(-torch.exp(log_rate)).expand(B, D).view(B, H, K, 1)
        projections = (mixer.k_proj, mixer.v_proj, mixer.r_proj)
        k, v, r = (p(c).view(B, H, K) for p, c in zip(projections, (k, v, r), strict=True))
        write = k[..., None] * v[..., None, :]
        o = (r[..., None] * (S + u[..., None] * write)).sum(-2).flatten(1)
        S, before = decayed * S + write, x_t
        normed = group_norm(o, H, mixer.norm_weight, mixer.norm_bias, eps=1e-5 * 8**2)
        outputs.append(mixer.o_proj(normed * silu(mixer.gate_proj(g))))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_every_gradient_are_those_of_the_equations(name):
    mixer = build(name, torch.float64)
    x = torch.randn(2, 40, D, dtype=torch.float64, requires_grad=True)
    found, wanted = mixer(x)[0], published(mixer, name, x)
    assert relative_error(found, wanted) <= 1e-10
    weight = torch.randn_like(found)
    got, true = (torch.autograd.grad(y, [x, *mixer.parameters()], weight) for y in (found, wanted))
    assert all(relative_error(a, b) <= 1e-9 for a, b in zip(got, true, strict=True))


def naive() -> ModuleType:
    """Their recurrence, from its own file: the package around it wants a GPU."""
    package = importlib.util.find_spec("fla")
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = [p for place in places if (p := Path(place) / "ops/rwkv6/recurrent_naive.py").is_file()]
    if not files:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive_rwkv6", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_kernel_reads_before_it_writes_as_flash_linear_attention_does():
    q, k, v, g = (torch.randn(2, 40, 3, 8) for _ in range(4))
    g, bonus, start = -g.exp(), torch.randn(3, 8), torch.randn(2, 3, 8, 8)
    found, S = decay(q, k, v, g, bonus=bonus, read="before", initial_state=start)
    given = [x.transpose(1, 2) for x in (q, k, v, g)]
    wanted, last = naive().naive_recurrent_rwkv6(
        *given, bonus, scale=1.0, initial_state=start, output_final_state=True
    )
    assert relative_error(found, wanted.transpose(1, 2)) <= 4e-6
    assert relative_error(S, last) <= 4e-6


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_token_after_a_border_reads_neither_token_nor_state_from_before_it(name):
    mixer, x = build(name), torch.randn(1, 30, D)
    ids = torch.repeat_interleave(torch.tensor([4, 1, 4]), torch.tensor([9, 1, 20]))[None]
    wanted = torch.cat([published(mixer, name, piece) for piece in x.split((9, 1, 20), dim=1)], 1)
    assert relative_error(mixer(x, None, Context(document=ids))[0], wanted) <= 1e-5


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_parameters_start_as_published(depth):
    v5, v6 = (create_mixer(name, D, depth=depth, **OPTIONS[name]) for name in NAMES)
    decays = torch.tensor([-6 + 5 * (n / (D - 1)) ** (0.7 + 1.3 * depth) for n in range(D)])
    bonus = [depth * (1 - n / (D - 1)) + 0.1 * ((n + 1) % 3 - 1) for n in range(D)]
    for mixer in (v5, v6):
        torch.testing.assert_close(mixer.time_decay, decays)
        torch.testing.assert_close(mixer.time_first, torch.tensor(bonus))
    share = torch.arange(D) / D
    k, r = share ** (1 - depth), share ** (0.5 * (1 - depth))
    torch.testing.assert_close(v5.mix, torch.stack([k, k + 0.3 * depth, r, r]))
    torch.testing.assert_close(v6.mix, 1 - torch.stack([k, k, k + 0.3 * depth, r, r]))
    torch.testing.assert_close(v6.mix_x, 1 - k)
    assert not v6.mix_down.any()
    assert not v6.decay_down.any()
    assert 0 < v6.decay_up.abs().max() <= 0.01


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 1.5}, "depth=1.5 is not allowed; it must be from 0 to 1"),
        ({"width": 0}, "width=0 is not allowed"),
        ({"head_dim": 7}, "width=24 is not divisible by head_dim=7; nearest: 21, 28"),
        ({"mix_rank": 0}, "mix_rank=0 is not allowed"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_at_construction(wrong, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("rwkv6", D, **wrong)
