"""AFT against its equation with every pair of tokens written out, and AFT-simple against wkv's kin.

No package with a trustworthy AFT is among the tests' dependencies. transformers' RWKV loop without
decay and bonus is AFT-simple.
"""

import pytest
import torch
from torch import Tensor, nn

from seqzoo.layers import create_mixer
from seqzoo.layers.aft import BLOCK
from seqzoo.layers.base import Context, Mixer
from tests.tolerances import assert_close_to_reference, relative_error

D = 12
LENGTHS = (1, BLOCK, 2 * BLOCK + 9)


def build(name: str, **options: object) -> Mixer:
    mixer = create_mixer(name, D, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return mixer


def written_out(mixer: Mixer, x: Tensor, w: Tensor) -> Tensor:
    """sigmoid(q_t) sum_s softmax_s(k_s + w_ts) v_s over s <= t, channel by channel."""
    T = x.shape[1]
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = (mixer.k_proj(x)[:, None] + w[..., None]).masked_fill(later[..., None], -torch.inf)
    average = (scores.softmax(dim=2) * mixer.v_proj(x)[:, None]).sum(2)
    return mixer.o_proj(torch.sigmoid(mixer.q_proj(x)) * average)


def bias(mixer: Mixer, T: int, window: int | None = None) -> Tensor:
    w = mixer.query_position[:T] @ mixer.key_position[:T].mT
    slots = torch.arange(T)
    near = slots[:, None] - slots < (window or T)
    return torch.where(near, w, 0)


def assert_same(mixer: nn.Module, x: Tensor, found: Tensor, wanted: Tensor) -> None:
    assert_close_to_reference(found, wanted)
    weight, sources = torch.randn_like(found), [x, *mixer.parameters()]
    a = torch.autograd.grad((found * weight).sum(), sources)
    b = torch.autograd.grad((wanted * weight).sum(), sources)
    for mine, other in zip(a, b, strict=True):
        assert relative_error(mine, other) <= 1e-11


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("options", [{}, {"width": 20, "bias": False}], ids=str)
def test_aft_simple_and_its_gradients_are_the_equation_without_bias(options, T):
    mixer, x = build("aft_simple", **options), torch.randn(2, T, D).double().requires_grad_()
    wanted = written_out(mixer, x, torch.zeros(T, T, dtype=torch.float64))
    assert_same(mixer, x, mixer(x)[0], wanted)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 7, BLOCK + 3])
def test_aft_full_and_local_and_their_gradients_are_the_equation(window, T):
    mixer = build("aft_full", max_length=80, rank=5, window=window)
    x = torch.randn(2, T, D).double().requires_grad_()
    assert_same(mixer, x, mixer(x)[0], written_out(mixer, x, bias(mixer, T, window)))


@torch.no_grad()
def test_positions_and_visibility_start_anew_with_each_document_even_under_an_old_id():
    mixer, lengths = build("aft_full", max_length=60, rank=5), (3, 40, 1, 16)
    x = torch.randn(2, 60, D).double()
    x[:, 0] *= 1e4  # keys that would outweigh everything later
    ids = torch.repeat_interleave(torch.tensor([4, 1, 4, 1]), torch.tensor(lengths)).expand(2, -1)
    found = mixer(x, None, Context(document=ids))[0]
    alone = [written_out(mixer, d, bias(mixer, d.shape[1])) for d in x.split(lengths, dim=1)]
    assert_close_to_reference(found, torch.cat(alone, dim=1))


@torch.no_grad()
@pytest.mark.parametrize("hostile", [90.0, 1e4])
def test_a_key_that_outweighs_all_others_hides_no_earlier_output(hostile):
    """Scaling by the largest key of the whole sequence would leave 0 / 0 before it."""
    mixer = build("aft_full", max_length=80, rank=5)
    x = torch.randn(1, 80, D).double()
    for at in (5, BLOCK - 1, BLOCK, 70):
        x[:, at] *= hostile
    found = mixer.float()(x.float())[0]
    wanted = written_out(mixer.double(), x.float().double(), bias(mixer, 80))
    assert found.isfinite().all()
    assert relative_error(found, wanted) <= 1e-5


@torch.no_grad()
def test_aft_simple_is_transformers_rwkv_loop_without_decay_and_bonus():
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    mixer, x = build("aft_simple").float(), torch.randn(2, 40, D)
    k, v, none = mixer.k_proj(x), mixer.v_proj(x), torch.full((D,), -torch.inf)
    theirs, state = rwkv_linear_attention_cpu(none, torch.zeros(D), k, v, return_state=True)
    found, after = mixer(x, mixer.init_state(2))
    assert relative_error(found, mixer.o_proj(torch.sigmoid(mixer.q_proj(x)) * theirs)) <= 1e-5
    for ours, other in zip(after.sums.unbind(1), state, strict=True):
        assert relative_error(ours, other) <= 1e-5


def test_a_sequence_beyond_max_length_is_refused_whole_or_streamed():
    mixer = create_mixer("aft_full", D, max_length=10)
    with pytest.raises(ValueError, match="11 tokens have no bias beyond max_length=10"):
        mixer(torch.randn(1, 11, D))
    _, state = mixer(torch.randn(1, 10, D), mixer.init_state(1))
    with pytest.raises(ValueError, match="max_length=10"):
        mixer(torch.randn(1, 1, D), state)


@pytest.mark.parametrize("wrong", ["max_length", "rank", "window", "width"])
def test_an_option_out_of_range_is_refused_at_construction(wrong):
    with pytest.raises(ValueError, match=f"{wrong}=0 is not allowed"):
        create_mixer("aft_full", D, **{wrong: 0})
