"""Position schemes against foreign code, against closed forms, and as modules."""

import math

import pytest
import torch
from torch import nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from seqzoo.kernels.attention import attention
from seqzoo.layers.position import CATALOGUE, Position, create_position, position_class

B, T, H, K, D = 2, 23, 4, 16, 12
SHAPE = {"n_heads": H, "head_dim": K, "d_model": D}


def build(spec, **changes):
    return create_position(spec, **{**SHAPE, "max_length": 32, **changes})


def heads(T=T, H=H, K=K, dtype=torch.float64):
    return torch.randn(B, T, H, K, dtype=dtype)


def places(T=T, start=0):
    return start + torch.arange(T)[None]


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_rope_turns_as_llama_does(base):
    q, k = heads(dtype=torch.float32), heads(H=2, dtype=torch.float32)
    config = LlamaConfig(
        hidden_size=H * K,
        num_attention_heads=H,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    cos, sin = LlamaRotaryEmbedding(config)(q, places(start=3))
    wanted = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    got = build({"name": "rope", "base": base}).rotate(q, k, places(start=3))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rope_of_a_fraction_leaves_the_other_channels_alone():
    q, k = heads(), heads()
    turned = build({"name": "rope", "fraction": 0.5}).rotate(q, k, places())[0]
    alone = build("rope", head_dim=K // 2).rotate(q[..., : K // 2], k[..., : K // 2], places())[0]
    assert torch.equal(turned[..., K // 2 :], q[..., K // 2 :])
    torch.testing.assert_close(turned[..., : K // 2], alone)


@pytest.mark.parametrize("name", ["rope", "xpos"])
def test_a_score_depends_on_the_distance_only(name):
    scheme = build(name)
    q, k = heads(1).expand(-1, T, -1, -1), heads(1).expand(-1, T, -1, -1)
    before = None
    for start in (0, 1000, 40_000):
        turned = scheme.rotate(q, k, places(start=start))
        scores = torch.einsum("bthk,bshk->bhts", *turned)
        for d in range(T):
            along = scores.diagonal(-d, 2, 3)
            torch.testing.assert_close(along, along[..., :1].expand_as(along), atol=1e-9, rtol=1e-9)
        if before is not None:
            torch.testing.assert_close(scores.tril(), before.tril(), atol=1e-9, rtol=1e-9)
        before = scores


@pytest.mark.parametrize("scale_base", [512.0, 16.0])
def test_xpos_scores_are_the_rotated_pairs_times_their_decay(scale_base):
    q, k = heads(), heads()
    turned = build({"name": "xpos", "scale_base": scale_base}).rotate(q, k, places(start=7))
    scores = torch.einsum("bthk,bshk->bhts", *turned)
    pairs = [torch.complex(x[..., : K // 2], x[..., K // 2 :]) for x in (q, k)]
    wanted = torch.zeros_like(scores)
    for i in range(K // 2):
        theta, zeta = 10000 ** (-2 * i / K), (2 * i / K + 0.4) / 1.4
        for n in range(T):
            for m in range(n + 1):
                turn = complex(math.cos((n - m) * theta), math.sin((n - m) * theta))
                pair = pairs[0][:, n, :, i] * pairs[1][:, m, :, i].conj() * turn
                wanted[:, :, n, m] += pair.real * zeta ** ((n - m) / scale_base)
    torch.testing.assert_close(scores.tril(), wanted, atol=1e-11, rtol=1e-11)


def test_xpos_of_a_prefix_is_the_prefix_of_xpos():
    scheme = build("xpos")
    q, k, v = heads(700), heads(700), heads(700)
    whole = attention(*scheme.rotate(q, k, places(700)), v)
    for t in (1, 33, 500):
        part = attention(*scheme.rotate(q[:, :t], k[:, :t], places(t)), v[:, :t])
        torch.testing.assert_close(part, whole[:, :t], atol=1e-9, rtol=1e-9)
    late = attention(*scheme.rotate(q[:, 600:], k, places(700)), v)
    torch.testing.assert_close(late, whole[:, 600:], atol=1e-9, rtol=1e-9)


def test_xpos_holds_65_536_tokens_in_float32():
    long = 65_536
    scheme = build("xpos", n_heads=1)
    q, k, v = (torch.randn(1, long, 1, K, requires_grad=True) for _ in range(3))
    turned = scheme.rotate(q, k, places(long))
    assert all(x.isfinite().all() for x in turned)
    assert all(
        x.isfinite().all() for x in torch.autograd.grad(sum(x.sum() for x in turned), (q, k))
    )
    o = attention(*turned, v, window=64)
    exact = [x.detach().double()[:, -640:] for x in (q, k, v)]
    wanted = attention(*scheme.rotate(*exact[:2], places(640)), exact[2], window=64)
    torch.testing.assert_close(o[:, -500:].double(), wanted[:, -500:], atol=1e-5, rtol=1e-5)
    step = scheme.rotate(q[:, -1:], k, places(long, start=10**7))
    assert all(x.isfinite().all() for x in step)


def test_xpos_in_float16_leaves_its_range_for_float32():
    q = heads(3000, dtype=torch.float16)
    turned = build({"name": "xpos", "scale_base": 50.0}).rotate(q, q, places(3000))
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in turned)


@pytest.mark.parametrize("n_heads", [1, 2, 4, 6, 8, 12])
def test_alibi_slopes_are_those_of_bloom(n_heads):
    theirs = build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(build("alibi", n_heads=n_heads).slopes(), theirs)


def test_alibi_falls_with_distance_and_equals_bloom_after_the_softmax():
    q, k, v = (heads(dtype=torch.float32) for _ in range(3))
    theirs = build_alibi_tensor(torch.ones(B, T), H, torch.float32).view(B, H, 1, T)
    scheme = build("alibi")
    o = attention(q, k, v, bias=scheme.bias)
    torch.testing.assert_close(o, attention(q, k, v, bias=theirs), atol=1e-5, rtol=1e-5)
    bias = scheme.bias(places()[0, :, None] - places()[0])
    assert bias.shape == (H, T, T)
    assert (bias.tril(-1) <= 0).all()
    assert not bias.diagonal(0, 1, 2).any()
    assert torch.equal(bias, bias.mT), "both directions count alike"


def test_sinusoidal_is_the_formula():
    e = build("sinusoidal").embed(places(5, start=1000))
    for n in range(5):
        for i in range(D // 2):
            angle = (1000 + n) / 10000 ** (2 * i / D)
            assert float(e[0, n, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(e[0, n, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)
    assert build("sinusoidal", d_model=7).embed(places()).shape == (1, T, 7)


def test_learned_reads_its_table_and_refuses_what_it_has_no_row_for():
    scheme = build("learned", max_length=9)
    assert torch.equal(scheme.embed(places(9))[0], scheme.weight)
    with pytest.raises(ValueError, match="10 tokens is longer than max_length=9"):
        scheme.embed(places(10))
    mask = places(12) < 9
    assert torch.equal(scheme.embed(places(12), mask)[0, :9], scheme.weight)
    with pytest.raises(ValueError, match="needs max_length"):
        build("learned", max_length=None)
    assert len(build({"name": "learned", "max_length": 5}).weight) == 5


@pytest.mark.parametrize("name", ["rope", "xpos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_stay_exact_in_half_precision_and_under_autocast(name, dtype):
    scheme = build(name).to(dtype)
    q = heads(dtype=dtype)
    far = places(start=65_500)
    exact = build(name).rotate(q.double(), q.double(), far)
    plain = scheme.rotate(q, q, far)
    with torch.autocast("cpu", torch.bfloat16):
        cast = scheme.rotate(q, q, far)
    for a, b, c in zip(plain, cast, exact, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)
        bound = 4e-3 if dtype == torch.bfloat16 else 2e-7
        assert (a.double() - c).norm() <= bound * c.norm()


@pytest.mark.parametrize("name", ["rope", "xpos"])
def test_queries_are_turned_as_the_last_of_the_keys(name):
    scheme = build(name)
    q, k = heads(), heads(H=2)
    whole = torch.einsum("bthk,bshk->bhts", *(scheme.rotate(q[:, :, :2], k, places())))
    for t in (0, 1, 5):
        rows = scheme.rotate(q[:, T - t :, :2], k, places())
        scores = torch.einsum("bthk,bshk->bhts", *rows)
        torch.testing.assert_close(scores, whole[:, :, T - t :])
    assert all(len(x) == 0 for x in scheme.rotate(q[:0], k[:0], places()[:0]))


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_no_scheme_has_a_tensor_that_saving_or_the_meta_device_would_lose(name):
    scheme = build(name)
    assert isinstance(scheme, Position)
    assert not [n for n, x in vars(scheme).items() if isinstance(x, torch.Tensor)]
    assert not list(scheme.buffers())
    with torch.device("meta"):
        empty = build(name)
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for p in empty.parameters():
            p.fill_(float("nan"))
    empty.reset_parameters()
    assert all(p.isfinite().all() for p in empty.parameters())
    filled = {h for h in ("rotate", "bias", "bias_from", "embed") if overridden(scheme, h)}
    assert filled == set(scheme.hooks)


def overridden(scheme, hook):
    return getattr(type(scheme), hook) is not getattr(Position, hook)


def test_no_position_changes_nothing():
    scheme = build("none")
    q, k = heads(), heads()
    assert scheme.rotate(q, k, places()) == (q, k)
    assert not scheme.bias(places()[..., None] - places()[:, None]).any()
    assert scheme.bias_from(q, k, places()) is None
    assert scheme.embed(places()) is None


@pytest.mark.parametrize("name", ["rope", "xpos", "alibi", "sinusoidal"])
def test_compiles_whole(name):
    scheme = build(name)
    q, k = heads(), heads()

    def use(q, k, positions):
        q, k = scheme.rotate(q, k, positions)
        distance = positions[:, :, None] - positions[:, None]
        return q, k, scheme.bias(distance), scheme.embed(positions)

    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, places()), use(q, k, places()), strict=True):
        if b is not None:
            torch.testing.assert_close(a, b)


class Custom(Position):
    def __init__(self, n_heads, *, slope=1.0):
        super().__init__()
        self.slope = slope
        self.gain = nn.Parameter(torch.ones(n_heads))


def test_anybodys_scheme_works_by_path_and_gets_what_it_names():
    scheme = build({"name": f"{__name__}:Custom", "slope": 2.0})
    assert scheme.slope == 2.0
    assert scheme.gain.shape == (H,)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ropee", "no position 'ropee'; nearest: rope"),
        ({"name": "rope", "bass": 3.0}, "option of position 'rope' named 'bass'; nearest: base"),
        ({"name": "rope", "head_dim": 4}, "option of position 'rope' named 'head_dim'"),
        ({"name": "none", "base": 4}, "option of position 'none' named 'base'"),
        ({"base": 4.0}, "has no name"),
        ({"name": "rope", "base": 0.0}, "base=0.0 is not allowed"),
        ({"name": "rope", "fraction": 0.3}, "rotation needs an even number"),
        ("torch.nn:Linear", "is not a Position class"),
        ("torch.nn:Nothing", "cannot be imported"),
    ],
)
def test_wrong_names_and_options_are_refused_with_the_nearest(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec)


def test_the_catalogue_resolves_without_importing_upwards():
    for name in CATALOGUE:
        assert issubclass(position_class(name), Position)
