"""mLSTM against transformers' xLSTM with the same weights, and the paper's unstabilised equations.

Theirs takes whole chunks in training and any length in inference, where it has no gradients.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, layer_norm, logsigmoid, silu

from seqzoo.layers import create_mixer
from seqzoo.layers.base import Context, Mixer
from seqzoo.layers.mlstm import matrix_memory
from tests.tolerances import relative_error

D, H = 128, 4  # theirs rounds the width of its keys up to 64


def config(mode: str, bias: bool = False) -> object:
    from transformers import xLSTMConfig

    return xLSTMConfig(
        vocab_size=8,
        hidden_size=D,
        num_hidden_layers=1,
        num_heads=H,
        use_bias=bias,
        mode=mode,
        chunk_size=16,
        autocast_kernel_dtype="float32",
    )


def pair(mode: str, bias: bool = False) -> tuple[Mixer, nn.Module]:
    """Their layer, stirred so that every gate reads its input, and ours with its weights."""
    from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

    theirs, mixer = xLSTMLayer(config(mode, bias)), create_mixer("mlstm_large", D, bias=bias)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        for ours, other in shared(mixer, theirs):
            ours.copy_(other)
    return mixer, theirs


def shared(mixer: Mixer, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    layers = [
        (mixer.q_proj, theirs.q),
        (mixer.k_proj, theirs.k),
        (mixer.v_proj, theirs.v),
        (mixer.out_gate_proj, theirs.ogate_preact),
        (mixer.o_proj, theirs.out_proj),
    ]
    pairs = [(ours.weight, other.weight) for ours, other in layers]
    pairs += [(ours.bias, other.bias) for ours, other in layers if ours.bias is not None]
    pairs += [(mixer.norm_weight, theirs.multihead_norm.weight)]
    if mixer.norm_bias is not None:
        pairs += [(mixer.norm_bias, theirs.multihead_norm.bias)]
    for gate, other in enumerate((theirs.igate_preact, theirs.fgate_preact)):
        pairs += [(mixer.gate_weight[gate], other.weight), (mixer.gate_bias[gate], other.bias)]
    return pairs


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_large_layer_goes_on_from_transformers_states(bias):
    mixer, theirs = pair("inference", bias)
    state, given = mixer.init_state(2), None
    for piece in torch.randn(2, 40, D).split((21, 1, 18), dim=1):
        wanted, given = theirs(piece, given)
        found, state = mixer(piece, state)
        assert relative_error(found, wanted) <= 1e-5
        # Multiples of the exponentials of two maxima, of which ours is not below zero.
        scale = (given[2].squeeze(-1) - state.m).exp()[..., None]
        assert relative_error(state.C[..., :-1], given[0] * scale[..., None]) <= 1e-5
        assert relative_error(state.C[..., -1], given[1] * scale) <= 1e-5


def test_every_gradient_of_the_large_layer_equals_transformers():
    """In float64: the gradient of an input bias cancels, as it scales C and n alike."""
    mixer, theirs = (layer.double() for layer in pair("train", bias=True))
    theirs.multihead_norm.force_float32_reductions = False
    x = torch.randn(2, 48, D, dtype=torch.float64, requires_grad=True)
    found, wanted = mixer(x)[0], theirs(x)[0]
    assert relative_error(found, wanted) <= 1e-7
    weight = torch.randn_like(found)
    given = dict(mixer.named_parameters())
    found = torch.autograd.grad(found, [x, *given.values()], weight)
    others = dict(theirs.named_parameters())
    wanted = torch.autograd.grad(wanted, [x, *others.values()], weight)
    assert relative_error(found[0], wanted[0]) <= 1e-7
    with torch.no_grad():  # the gradients in place of the parameters pair off as those do
        for p, g in zip(
            (*given.values(), *others.values()), (*found[1:], *wanted[1:]), strict=True
        ):
            p.copy_(g)
    for ours, other in shared(mixer, theirs):
        assert relative_error(ours, other) <= 1e-7


def unstabilised(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """Equations 19 to 27 of the paper, one token at a time."""
    B, T, heads, K = q.shape
    C, n, outputs = q.new_zeros(B, heads, K, v.shape[-1]), q.new_zeros(B, heads, K), []
    for t in range(T):
        keep, write = torch.sigmoid(f[:, t, :, None]), i[:, t, :, None].exp()
        key = k[:, t] / K**0.5
        C = keep[..., None] * C + write[..., None] * key[..., None] * v[:, t, :, None]
        n = keep * n + write * key
        normaliser = (n * q[:, t]).sum(-1, keepdim=True).abs().clamp(min=1)
        outputs.append((C * q[:, t, ..., None]).sum(-2) / normaliser)
    return torch.stack(outputs, dim=1)


def block(mixer: Mixer, x: Tensor) -> Tensor:
    """The block of the paper's figure 11, around its equations."""
    inner, z = mixer.in_proj(x).chunk(2, dim=-1)
    u, heads = inner, mixer.n_heads
    if mixer.d_conv:
        padded = nn.functional.pad(inner.mT, (mixer.d_conv - 1, 0))
        taps = mixer.conv_weight[:, None]
        u = silu(conv1d(padded, taps, mixer.conv_bias, groups=mixer.inner).mT)
    Wq, Wk, Wv = (torch.block_diag(*w) for w in mixer.qkv_weight)
    q, k, v = u @ Wq.T, u @ Wk.T, inner @ Wv.T
    joined = torch.cat([q, k, v], dim=-1)
    i, f = (joined @ W.T + b for W, b in zip(mixer.gate_weight, mixer.gate_bias, strict=True))
    q, k, v = (a.unflatten(-1, (heads, -1)) for a in (q, k, v))
    h = unstabilised(q, k, v, i, f)
    normed = layer_norm(h, h.shape[-1:]).flatten(-2) * mixer.norm_weight
    return mixer.out_proj((normed + mixer.skip * u) * silu(z))


OPTIONS = [{}, {"n_heads": 2, "expand": 1, "d_conv": 0, "block_size": 8, "bias": True}]


def stirred(options: dict[str, object]) -> Mixer:
    mixer = create_mixer("mlstm", 16, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        mixer.gate_bias[0].sub_(1)  # so that the normaliser is 1 about as often as not
    return mixer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_block_and_every_gradient_are_the_papers(options):
    """To about 1e-6: what the authors add to the normaliser, which the paper does not."""
    mixer = stirred(options)
    x = torch.randn(2, 40, 16, dtype=torch.float64, requires_grad=True)
    found, wanted = mixer(x)[0], block(mixer, x)
    assert relative_error(found, wanted) <= 1e-5
    weight = torch.randn_like(found)
    got, true = (torch.autograd.grad(y, [x, *mixer.parameters()], weight) for y in (found, wanted))
    assert all(relative_error(a, b) <= 1e-4 for a, b in zip(got, true, strict=True))


@torch.no_grad()
def test_documents_do_not_meet():
    mixer, x = stirred({}), torch.randn(1, 30, 16, dtype=torch.float64)
    ids = torch.repeat_interleave(torch.tensor([4, 1, 4]), torch.tensor([9, 1, 20]))[None]
    wanted = torch.cat([block(mixer, piece) for piece in x.split((9, 1, 20), dim=1)], dim=1)
    assert relative_error(mixer(x, None, Context(document=ids))[0], wanted) <= 1e-5


@pytest.mark.parametrize("size", [90.0, 1e3])
def test_gates_far_beyond_the_exponential_of_a_float_are_right(size):
    """Against the attention that the recurrence is, its weights in logarithms and float64."""
    q, k, v = (torch.randn(2, 60, 3, 8) for _ in range(3))
    gates = torch.stack([size * torch.randn(2, 60, 3).sign(), 3 * torch.randn(2, 60, 3)], dim=2)
    leaves = [x.requires_grad_() for x in (q, k, v, gates)]
    h, cell = matrix_memory(*leaves, None, Context())
    exact, _ = matrix_memory(*(x.double() for x in leaves), None, Context())
    grads = torch.autograd.grad(h.square().sum() + cell.C.sum(), leaves)
    assert all(x.isfinite().all() for x in (h, *cell, *grads))
    i, F = gates[:, :, 0].double(), logsigmoid(gates[:, :, 1].double()).cumsum(1)
    log_weights = (F[:, :, None] - F[:, None] + i[:, None]).movedim(-1, 1)  # (B, H, T, S)
    seen = torch.ones(60, 60, dtype=torch.bool).tril()
    log_weights = log_weights.masked_fill(~seen, -torch.inf)
    level = log_weights.amax(-1, keepdim=True).clamp(min=0)
    scores = torch.einsum("bthk,bshk->bhts", q.double(), k.double()) / 8**0.5
    scores = scores * (log_weights - level).exp()
    normaliser = torch.maximum(scores.sum(-1, keepdim=True).abs(), (-level).exp()) + 1e-6
    wanted = torch.einsum("bhts,bshv->bthv", scores / normaliser, v.double())
    assert relative_error(exact, wanted) <= 1e-8
    # The normaliser is nearly zero now and then; the norm that follows takes its scale away.
    assert relative_error(*(layer_norm(a.double(), (8,)) for a in (h, wanted))) <= 1e-4


@torch.no_grad()
def test_any_split_equals_one_pass_whatever_the_gates():
    q, k, v = (torch.randn(2, 60, 3, 8, dtype=torch.float64) for _ in range(3))
    gates = torch.randn(2, 60, 2, 3, dtype=torch.float64)
    gates[:, :, 0] = 90 * gates[:, :, 0].sign()
    wanted, last = matrix_memory(q, k, v, gates, None, Context())
    cell, pieces = None, []
    for part in (slice(0, 7), slice(7, 8), slice(8, 41), slice(41, 60)):
        h, cell = matrix_memory(*(x[:, part] for x in (q, k, v, gates)), cell, Context())
        pieces.append(h)
    assert relative_error(torch.cat(pieces, dim=1), wanted) <= 1e-9
    assert all(relative_error(a, b) <= 1e-9 for a, b in zip(cell, last, strict=True))


def test_parameters_start_as_the_authors_do():
    mixer, large = create_mixer("mlstm", 64), create_mixer("mlstm_large", 64)
    biases = torch.tensor([3.0, 4.0, 5.0, 6.0])
    for layer in (mixer, large):
        assert not layer.gate_weight.any()
        torch.testing.assert_close(layer.gate_bias[1], biases)
    assert (large.gate_bias[0] == -10).all()
    assert abs(mixer.qkv_weight.std() * (5 * 64 / 2) ** 0.5 - 1) < 0.05
    assert mixer.skip.eq(1).all()


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("mlstm", {"n_heads": 5}, r"expand \* d_model=32 is not divisible by n_heads=5"),
        ("mlstm", {"block_size": 3}, r"expand \* d_model=32 is not divisible by block_size=3"),
        ("mlstm", {"d_conv": -1}, r"d_conv=-1 is not allowed"),
        ("mlstm_large", {"n_heads": 3}, r"d_model=16 is not divisible by n_heads=3"),
        ("mlstm_large", {"softcap": 0}, r"softcap=0 is not allowed"),
        ("mlstm_large", {"qk_factor": 0.1}, r"qk_factor \* d_model=1 is not divisible by"),
    ],
)
def test_wrong_options_are_refused_by_name(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 16, **wrong)
