"""RWKV-4 against transformers, with the same weights: the time mix, and a whole model.

Theirs computes in float32 whatever the parameters are. With a cache, its single step mixes every
row with the state of every other: states are compared in one row.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from seqzoo.layers import create_mixer
from seqzoo.layers.base import Context, Mixer
from tests.tolerances import relative_error

D, R, V = 16, 24, 29


def config(width: int = R, layers: int = 2) -> object:
    from transformers import RwkvConfig

    return RwkvConfig(
        vocab_size=V,
        hidden_size=D,
        attention_hidden_size=width,
        intermediate_size=40,
        num_hidden_layers=layers,
    )


def stirred(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return module.eval()


def pairs(mixer: Mixer, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return [
        (mixer.k_proj.weight, theirs.key.weight),
        (mixer.v_proj.weight, theirs.value.weight),
        (mixer.gate_proj.weight, theirs.receptance.weight),
        (mixer.o_proj.weight, theirs.output.weight),
        (mixer.time_decay, theirs.time_decay),
        (mixer.time_first, theirs.time_first),
        (mixer.mix_k, theirs.time_mix_key),
        (mixer.mix_v, theirs.time_mix_value),
        (mixer.mix_r, theirs.time_mix_receptance),
    ]


def time_mix(theirs: nn.Module) -> Mixer:
    mixer = create_mixer("rwkv4", D, width=theirs.attention_hidden_size)
    with torch.no_grad():
        for ours, other in pairs(mixer, theirs):
            ours.copy_(other.view_as(ours))
    return mixer


def channel_mix(theirs: nn.Module) -> Mixer:
    mixer = create_mixer("rwkv_channel", D, hidden=40)
    with torch.no_grad():
        mixer.up_proj.weight.copy_(theirs.key.weight)
        mixer.down_proj.weight.copy_(theirs.value.weight)
        mixer.gate_proj.weight.copy_(theirs.receptance.weight)
        mixer.mix_k.copy_(theirs.time_mix_key.view(-1))
        mixer.mix_r.copy_(theirs.time_mix_receptance.view(-1))
    return mixer


def pair() -> tuple[Mixer, nn.Module]:
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    theirs = RwkvSelfAttention(config())
    with torch.no_grad():
        for p in theirs.parameters():  # they leave some as they find the memory
            p.copy_(0.4 * torch.randn_like(p))
    return time_mix(theirs), theirs


def test_the_time_mix_and_every_gradient_equal_transformers():
    mixer, theirs = pair()
    x = torch.randn(2, 45, D, requires_grad=True)
    found, wanted = mixer(x)[0], theirs(x)[0]
    assert relative_error(found, wanted) <= 1e-5
    weight, (ours, others) = torch.randn_like(found), zip(*pairs(mixer, theirs), strict=True)
    a = torch.autograd.grad((found * weight).sum(), [x, *ours])
    b = torch.autograd.grad((wanted * weight).sum(), [x, *others])
    for mine, other in zip(a, b, strict=True):
        assert relative_error(mine, other.view_as(mine)) <= 1e-5


@torch.no_grad()
def test_the_state_is_transformers_cache_after_any_split():
    mixer, theirs = pair()
    cache = [torch.zeros(1, n, 1) for n in (D, D, R, R, R)]
    cache[4] -= 1e38
    state = mixer.init_state(1)
    for piece in torch.randn(1, 20, D).split((6, 1, 1, 12), dim=1):
        wanted, cache = theirs(piece, cache, use_cache=True)
        found, state = mixer(piece, state)
        assert relative_error(found, wanted) <= 1e-5
    assert relative_error(state.previous[:, 0], cache[1][..., 0]) <= 1e-6
    for found, wanted in zip(state.sums.unbind(1), cache[2:], strict=True):
        assert relative_error(found, wanted[..., 0]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 37])
def test_blocks_put_together_by_hand_give_the_logits_of_a_whole_model(length):
    from transformers import RwkvForCausalLM

    theirs = stirred(RwkvForCausalLM(config(width=D)))
    ids = torch.randint(V, (3, length))
    base = theirs.rwkv
    h = base.blocks[0].pre_ln(base.embeddings(ids))
    for block in base.blocks:
        h = h + time_mix(block.attention)(block.ln1(h))[0]
        h = h + channel_mix(block.feed_forward)(block.ln2(h))[0]
    found = theirs.head(base.ln_out(h))
    assert relative_error(found, theirs(ids, use_cache=False).logits) <= 1e-4


@torch.no_grad()
def test_a_token_after_a_border_reads_no_token_and_no_average_from_before_it():
    mixer, theirs = pair()
    ids = torch.repeat_interleave(torch.tensor([4, 1, 4]), torch.tensor([9, 1, 20])).expand(2, -1)
    x = torch.randn(2, 30, D)
    found = mixer(x, None, Context(document=ids))[0]
    wanted = torch.cat([theirs(piece)[0] for piece in x.split((9, 1, 20), dim=1)], dim=1)
    assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_decays_and_mixes_start_as_transformers_does(layer):
    """At L = 3 layers, but for 1 - depth, which they make 1 - l / L; u is the paper's, not theirs.

    Theirs starts u at 1 everywhere: it takes `ones_like` of what it meant to add.
    """
    from transformers import RwkvModel

    theirs = RwkvModel(config(layers=3)).blocks[layer].attention
    mixer = create_mixer("rwkv4", D, width=R, depth=layer / 2)
    torch.testing.assert_close(mixer.time_decay, theirs.time_decay)
    if layer == 0:
        for ours, other in pairs(mixer, theirs)[6:]:
            torch.testing.assert_close(ours, other.view(-1))
    wanted = [math.log(0.3) + shift for shift in (0.0, 0.5, -0.5)]
    torch.testing.assert_close(mixer.time_first[:3], Tensor(wanted))


@pytest.mark.parametrize("wrong", [{"depth": 1.5}, {"depth": -0.1}, {"width": 0}, {"width": -3}])
def test_an_option_out_of_range_is_refused_at_construction(wrong):
    with pytest.raises(ValueError, match="is not allowed"):
        create_mixer("rwkv4", D, **wrong)
