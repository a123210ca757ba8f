"""Channel mixers against transformers' modules with the same weights, and hand-worked cases."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, LlamaConfig, RwkvConfig, SwitchTransformersConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
)

from seqzoo.layers import create_mixer
from seqzoo.layers.base import Context, Mixer
from seqzoo.layers.mlp import MLP, SwiGLU
from seqzoo.layers.rwkv_channel import RWKVChannel
from seqzoo.layers.switch import Switch
from tests.parity.rwkv_package import rwkv_model, unquantised
from tests.tolerances import relative_error

D = 8


def copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Stir the first of each pair and give its values to the second."""
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(0.5 * torch.randn_like(theirs))
            ours.copy_(theirs.view_as(ours))


def same_gradients(ours: Mixer, theirs: nn.Module, x: Tensor) -> None:
    x = x.requires_grad_()
    found = ours(x)[0]
    wanted = theirs(x)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    (a,) = torch.autograd.grad((found * weight).sum(), x)
    (b,) = torch.autograd.grad((wanted * weight).sum(), x)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["gelu", "relu", "relu2", "silu"])
def test_mlp_equals_gpt_neox(activation):
    config = GPTNeoXConfig(
        hidden_size=D, intermediate_size=4 * D, hidden_act=activation, num_attention_heads=2
    )
    other, mixer = GPTNeoXMLP(config), MLP(D, activation=activation)
    up, down = other.dense_h_to_4h, other.dense_4h_to_h
    copy([(up.weight, mixer.up_proj.weight), (up.bias, mixer.up_proj.bias)])
    copy([(down.weight, mixer.down_proj.weight), (down.bias, mixer.down_proj.bias)])
    same_gradients(mixer, other, torch.randn(2, 5, D))


def test_swiglu_equals_llama():
    config = LlamaConfig(hidden_size=D, intermediate_size=24, num_attention_heads=2)
    other, mixer = LlamaMLP(config), SwiGLU(D)
    names = ("gate_proj", "up_proj", "down_proj")
    copy([(getattr(other, n).weight, getattr(mixer, n).weight) for n in names])
    same_gradients(mixer, other, torch.randn(2, 5, D))


@pytest.mark.parametrize(("width", "hidden"), [(96, 256), (100, 272), (3, 8), (1, 8), (48, 128)])
def test_swiglu_hidden_width_is_eight_thirds_rounded_up_to_eights(width, hidden):
    assert SwiGLU(width).hidden == hidden


def test_dropout_acts_in_training_alone():
    for mixer in (MLP(D, dropout=0.5), SwiGLU(D, dropout=0.5)):
        x = torch.randn(1, 4, D)
        assert not torch.equal(mixer(x)[0], mixer(x)[0])
        mixer.eval()
        assert torch.equal(mixer(x)[0], mixer(x)[0])


def rwkv_pair() -> tuple[RWKVChannel, RwkvFeedForward]:
    config = RwkvConfig(hidden_size=D, intermediate_size=20, num_hidden_layers=1)
    other, mixer = RwkvFeedForward(config), RWKVChannel(D, hidden=20)
    copy(
        [
            (other.key.weight, mixer.up_proj.weight),
            (other.value.weight, mixer.down_proj.weight),
            (other.receptance.weight, mixer.gate_proj.weight),
            (other.time_mix_key, mixer.mix_k),
            (other.time_mix_receptance, mixer.mix_r),
        ]
    )
    return mixer, other


def test_rwkv_channel_equals_transformers():
    mixer, other = rwkv_pair()
    same_gradients(mixer, other, torch.randn(2, 7, D))


@torch.no_grad()
def test_rwkv_channel_goes_on_from_a_state_like_transformers():
    mixer, other = rwkv_pair()
    # One row: at T = 1 transformers mixes every row with the state of every other.
    state, theirs = mixer.init_state(1), [torch.zeros(1, D, 1)]
    for T in (3, 1, 4):
        x = torch.randn(1, T, D)
        y, state = mixer(x, state)
        wanted, theirs = other(x, theirs)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(state.previous[:, 0], theirs[0][:, :, 0])


@torch.no_grad()
def test_rwkv_channel_reads_the_previous_real_token_of_its_document():
    mixer, _ = rwkv_pair()
    x = torch.randn(1, 6, D)
    mask = torch.tensor([[True, False, True, True, False, True]])
    ids = torch.tensor([[1, 0, 1, 2, 0, 2]])
    y = mixer(x, None, Context(mask=mask, document=ids))[0]
    first, second = mixer(x[:, [0, 2]])[0], mixer(x[:, [3, 5]])[0]
    torch.testing.assert_close(y[:, [0, 2, 3, 5]], torch.cat([first, second], dim=1))


@pytest.mark.parametrize(
    ("name", "theirs"), [("rwkv_channel", "ffn_seq"), ("rwkv6_channel", "ffn_seq_v6")]
)
@torch.no_grad()
def test_rwkv_channels_equal_the_authors_package(name, theirs):
    """Of versions 4 and 5, one method there, and of version 6, in one pass and going on."""
    layer, mixer = getattr(rwkv_model(), theirs), create_mixer(name, D, hidden=20)
    for p in mixer.parameters():
        p.copy_(torch.randn_like(p))
    weights = [p.weight.T for p in (mixer.up_proj, mixer.down_proj, mixer.gate_proj)]
    scale, shift = torch.rand(D), torch.randn(D)
    previous, state = torch.randn(D), mixer.init_state(1)
    state = state._replace(previous=previous.view(1, 1, D))
    for T in (5, 1, 9):
        x = torch.randn(T, D)
        wanted, previous = layer(
            None, x, previous, scale, shift, mixer.mix_k, mixer.mix_r, *weights, *unquantised(3)
        )
        y, state = mixer(torch.nn.functional.layer_norm(x, (D,), scale, shift)[None], state)
        assert relative_error(x + y[0], wanted) <= 2e-6
        assert relative_error(state.previous[0, 0], previous) <= 1e-6


def test_rwkv7_channel_is_the_papers_equation():
    """Which the authors' package has behind a switch of the whole process."""
    mixer = create_mixer("rwkv7_channel", D, hidden=20, depth=0.25).double()
    x = torch.randn(2, 9, D, dtype=torch.float64)
    for t in range(9):
        before = x[:, t - 1] if t else torch.zeros(2, D, dtype=torch.float64)
        read = x[:, t] + (before - x[:, t]) * mixer.mix_k
        k = (read @ mixer.up_proj.weight.T).clamp(min=0) ** 2
        torch.testing.assert_close(mixer(x)[0][:, t], k @ mixer.down_proj.weight.T)


def test_rwkv_channels_start_as_published():
    for depth in (0.0, 0.5, 1.0):
        for name, wanted in (
            ("rwkv_channel", [(i / D) ** (1 - depth) for i in range(D)]),
            ("rwkv6_channel", [1 - (i / D) ** (1 - depth) for i in range(D)]),
            ("rwkv7_channel", [1 - (i / D) ** (1 - depth) ** 4 for i in range(D)]),
        ):
            mixer = create_mixer(name, D, depth=depth)
            torch.testing.assert_close(mixer.mix_k, torch.tensor(wanted))
            if mixer.mix_r is not None:
                assert torch.equal(mixer.mix_r, mixer.mix_k)
    widths = [create_mixer(f"rwkv{v}_channel", 64).hidden for v in ("", 6, 7)]
    assert widths == [256, 224, 256]


def switch_pair(capacity: int) -> tuple[Switch, SwitchTransformersSparseMLP]:
    config = SwitchTransformersConfig(
        d_model=D, d_ff=12, num_experts=4, expert_capacity=capacity, dropout_rate=0.0
    )
    other = SwitchTransformersSparseMLP(config).eval()
    length = 4 * capacity
    mixer = Switch(D, n_experts=4, hidden=12, max_length=length, capacity_factor=1.0).eval()
    copy([(other.router.classifier.weight, mixer.router_weight)])
    for e in range(4):
        expert = other.experts[f"expert_{e}"]
        copy([(expert.wi.weight, mixer.w_in[e].T), (expert.wo.weight, mixer.w_out[e].T)])
    return mixer, other


@pytest.mark.parametrize("capacity", [1, 3, 30])
def test_switch_equals_transformers_whether_capacity_binds_or_not(capacity):
    mixer, other = switch_pair(capacity)
    assert mixer.capacity == capacity
    x = torch.randn(3, 30, D)
    ctx = Context()
    mixer(x, None, ctx)
    assert (ctx.stats["switch_0_dropped"] > 0) == (capacity < 30)
    same_gradients(mixer, other, x)


def sorting_switch(**options) -> Switch:
    """A switch of two experts: x[0] > 0 goes to expert 0; expert e returns p (e + 1) x[0]^2."""
    mixer = Switch(2, n_experts=2, hidden=2, activation="relu2", **options)
    with torch.no_grad():
        mixer.router_weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        mixer.w_in.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]).expand(2, 2, 2))
        ones = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        mixer.w_out.copy_(torch.stack([ones, 2 * ones]))
    return mixer


def line(*values: float) -> Tensor:
    return torch.tensor([[[v, 0.0] for v in values]])


def gate(v: float) -> float:
    return 1 / (1 + math.exp(-2 * abs(v)))


@torch.no_grad()
def test_switch_drops_the_last_to_come():
    mixer = sorting_switch(max_length=4, capacity_factor=1.0)  # two tokens an expert
    ctx = Context()
    y = mixer(line(1, 2, -1, 3, -2, 4, -3), None, ctx)[0][0, :, 0]
    wanted = [gate(1), 4 * gate(2), 2 * gate(1), 0, 8 * gate(2), 0, 0]
    torch.testing.assert_close(y, torch.tensor(wanted))
    torch.testing.assert_close(ctx.stats["switch_0_dropped"], torch.tensor(3 / 7))
    torch.testing.assert_close(ctx.stats["switch_0_load"], torch.tensor([8 / 7, 6 / 7]))


@torch.no_grad()
def test_switch_counts_each_document_and_no_masked_token():
    mixer = sorting_switch(max_length=2, capacity_factor=1.0)  # one token an expert
    x = line(1, 2, 3, -1, 5, 6)
    mask = torch.tensor([[False, True, True, True, True, True]])
    ids = torch.tensor([[9, 1, 1, 1, 2, 2]])
    y = mixer(x, None, Context(mask=mask, document=ids))[0][0, :, 0]
    wanted = [4 * gate(2), 0, 2 * gate(1), 25 * gate(5), 0]
    torch.testing.assert_close(y[1:], torch.tensor(wanted))


@torch.no_grad()
def test_switch_streams_drop_what_one_pass_drops():
    mixer = Switch(D, n_experts=4, max_length=12, capacity_factor=1.0)
    x, ids = torch.randn(3, 40, D), (torch.arange(40) // 15).expand(3, -1)
    whole, last = mixer(x, mixer.init_state(3), Context(document=ids))
    state, pieces = mixer.init_state(3), []
    for part in (slice(0, 7), slice(7, 8), slice(8, 31), slice(31, 40)):
        before = ids[:, part.start - 1] if part.start else None
        ctx = Context(document=ids[:, part], last_document=before)
        y, state = mixer(x[:, part], state, ctx)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert torch.equal(state.counts, last.counts)
    assert last.counts.sum(1).tolist() == [10, 10, 10]
    assert (whole == 0).all(-1).any()


@torch.no_grad()
def test_switch_ties_go_to_the_lowest_expert():
    mixer = Switch(D, n_experts=8)
    mixer.router_weight.zero_()
    ctx = Context()
    mixer(torch.randn(2, 6, D), None, ctx)
    assert ctx.stats["switch_0_load"].tolist() == [8.0, *[0.0] * 7]


def test_switch_losses_are_those_of_the_papers_over_real_tokens():
    mixer = Switch(D, n_experts=4, balance_loss=0.5, z_loss=0.25)
    x = torch.randn(2, 9, D, requires_grad=True)
    mask = torch.rand(2, 9) < 0.6
    ctx = Context(mask=mask)
    mixer(x, None, ctx)
    logits = x[mask] @ mixer.router_weight.T
    p = logits.softmax(-1)
    f = torch.stack([(p.argmax(-1) == e).float().mean() for e in range(4)])
    balance = 0.5 * 4 * (f * p.mean(0)).sum()
    z = 0.25 * logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(ctx.losses["switch_0_balance"], balance)
    torch.testing.assert_close(ctx.losses["switch_0_z"], z)
    wanted = torch.autograd.grad(balance + z, mixer.router_weight, retain_graph=True)
    found = torch.autograd.grad(sum(ctx.losses.values()), mixer.router_weight)
    torch.testing.assert_close(found, wanted)


def test_switch_without_real_tokens_loses_nothing():
    mixer, x = Switch(D), torch.full((2, 3, D), 1e30)
    for given, mask in ((x, torch.zeros(2, 3, dtype=torch.bool)), (x[:, :0], None)):
        ctx = Context(mask=mask)
        mixer(given, None, ctx)
        for value in (*ctx.losses.values(), *ctx.stats.values()):
            assert torch.equal(value, torch.zeros_like(value))


def test_losses_of_two_layers_do_not_overwrite_each_other():
    ctx, x = Context(), torch.randn(1, 4, D)
    for mixer in (Switch(D), Switch(D)):
        mixer(x, None, ctx)
    assert sorted(ctx.losses) == [f"switch_{i}_{what}" for i in (0, 1) for what in ("balance", "z")]


def test_switch_capacity_decides_its_state():
    assert create_mixer("switch", D).caps.state == "none"
    assert create_mixer("switch", D).init_state(2) == ()
    limited = create_mixer("switch", D, max_length=100, n_experts=8)
    assert limited.caps.state == "constant"
    assert limited.capacity == 16  # ceil(1.25 * 100 / 8)


def test_switch_router_is_float32_under_autocast():
    mixer = Switch(D, n_experts=64).eval()
    x = torch.randn(1, 500, D)
    wanted, found = Context(), Context()
    mixer(x, None, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        mixer(x, None, found)
    assert torch.equal(found.stats["switch_0_load"], wanted.stats["switch_0_load"])


def test_jitter_acts_in_training_alone():
    mixer, x = Switch(D, jitter=0.5), torch.randn(1, 50, D)
    assert not torch.equal(mixer(x)[0], mixer(x)[0])
    mixer.eval()
    assert torch.equal(mixer(x)[0], mixer(x)[0])


def test_wrong_options_are_refused_by_name():
    for name, options, message in (
        ("mlp", {"activation": "glue"}, r"no activation of mlp named 'glue'; nearest: gelu"),
        ("mlp", {"dropout": 1.0}, r"dropout=1.0 is not allowed"),
        ("swiglu", {"hidden": 0}, r"hidden=0 is not allowed"),
        ("rwkv_channel", {"expand": -1.0}, r"expand=-1.0 is not allowed"),
        ("rwkv6_channel", {"hidden": 0}, r"hidden=0 is not allowed"),
        ("rwkv7_channel", {"depth": 2.0}, r"depth=2.0 is not allowed; it must be from 0 to 1"),
        ("switch", {"n_experts": 0}, r"n_experts=0 is not allowed"),
        ("switch", {"jitter": 1.0}, r"jitter=1.0 is not allowed"),
        ("switch", {"max_length": 0}, r"max_length=0 is not allowed"),
        ("switch", {"activation": "tanh"}, r"no activation of switch named 'tanh'"),
    ):
        with pytest.raises(ValueError, match=message):
            create_mixer(name, D, **options)
