"""RWKV-7's time mix against the authors' package, and token by token in float64."""

import importlib.util
import math
import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from seqzoo.kernels.delta_lowrank import delta_lowrank
from seqzoo.layers import rwkv7
from seqzoo.layers.base import Bidirectional, Context
from seqzoo.layers.rwkv7 import RWKV7
from tests.fla_naive import fla_naive
from tests.tolerances import LAW_EXACT, relative_error

D = 16
SIZES = [{"head_dim": 8}, {"head_dim": 4, "decay_rank": 3, "gate_rank": 5, "depth": 0.0}]


def build(dtype: torch.dtype = torch.float64, **options: object) -> RWKV7:
    mixer = RWKV7(D, **options).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return mixer


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with their layers, without kernels for GPUs.

    From its own file: which layers the package defines, it decides once, when it is imported.
    """
    package = importlib.util.find_spec("rwkv")
    if package is None:
        pytest.skip("the package rwkv is not installed")
    for name, value in (("CUDA", "0"), ("V7", "1")):
        monkeypatch.setenv(f"RWKV_{name}_ON", value)
    place = f"{next(iter(package.submodule_search_locations))}/model.py"
    spec = importlib.util.spec_from_file_location("rwkv_model_v7", place)
    module = importlib.util.module_from_spec(spec)
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    allowed, benchmark = [s.allow_tf32 for s in switches], torch.backends.cudnn.benchmark
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # they compile with TorchScript
        spec.loader.exec_module(module)  # switches those on
    for switch, value in zip(switches, allowed, strict=True):
        switch.allow_tf32 = value
    torch.backends.cudnn.benchmark = benchmark
    return module


def weights(mixer: RWKV7) -> list[Tensor]:
    """In the order of their function's arguments."""
    m = mixer
    return [
        *m.mix,
        *(m.time_decay, m.decay_down, m.decay_up),
        *(m.rate_bias, m.rate_down, m.rate_up),
        *(m.value_bias, m.value_down, m.value_up),
        *(m.gate_down, m.gate_up),
        *(m.removal, m.replacement, m.bonus),
        *(p.weight.T for p in (m.r_proj, m.k_proj, m.v_proj, m.o_proj)),
        *(m.norm_weight, m.norm_bias),
    ]


@torch.no_grad()
@pytest.mark.parametrize("options", SIZES, ids=str)
def test_two_layers_equal_those_of_the_authors_package(theirs, options):
    ctx, x, v_first = Context(), torch.randn(2, 40, D), torch.zeros(2, 40, D)
    for layer in (0, 1):
        mixer = build(torch.float32, **options)
        H, K = D // mixer.head_dim, mixer.head_dim
        y, state = mixer(x, mixer.init_state(2), ctx)
        for row in range(2):
            empty = torch.zeros(D), v_first[row], torch.zeros(H, K, K)
            wanted, last, S, v_first[row] = theirs.RWKV_x070_TMix_seq(
                layer, H, K, x[row], *empty, *weights(mixer)
            )
            assert relative_error(y[row], wanted) <= 1e-5  # their e^(-1/2) has six digits
            assert relative_error(state.S[row].mT, S) <= 1e-5
            assert torch.equal(state.previous[row, 0], last)
        x = x + y


def loop(mixer: RWKV7, x: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One row, one token and one head after the other: (T, D), values and state (H, K, V)."""
    m, K = mixer, mixer.head_dim
    S = torch.zeros(D // K, K, K).double()
    previous, outputs, values = torch.zeros(D).double(), [], []
    for t, token in enumerate(x):
        r, w, k, v, a, g = (token + mu * (previous - token) for mu in m.mix)
        previous = token
        w = torch.exp(
            -math.exp(-0.5)
            * torch.sigmoid(m.time_decay + torch.tanh(w @ m.decay_down) @ m.decay_up)
        )
        a = torch.sigmoid(m.rate_bias + a @ m.rate_down @ m.rate_up)
        g = torch.sigmoid(g @ m.gate_down) @ m.gate_up
        r, k, own = m.r_proj.weight @ r, m.k_proj.weight @ k, m.v_proj.weight @ v
        values.append(own)
        if v_first is not None:
            share = torch.sigmoid(m.value_bias + v @ m.value_down @ m.value_up)
            own = own + (v_first[t] - own) * share
        y = torch.empty(D).double()
        for head in range(D // K):
            c = slice(head * K, head * K + K)
            n = normalize((k * m.removal)[c], dim=0)
            key = k[c] * (1 + (a[c] - 1) * m.replacement[c])
            removed = torch.outer(a[c] * n, S[head].T @ n)
            S[head] = w[c, None] * S[head] - removed + torch.outer(key, own[c])
            o = S[head].T @ r[c]
            o = (o - o.mean()) / (o.var(correction=0) + 64e-5).sqrt()
            y[c] = m.norm_weight[c] * o + m.norm_bias[c] + (r[c] * m.bonus[c] * key).sum() * own[c]
        outputs.append(m.o_proj.weight @ (y * g))
    return torch.stack(outputs), torch.stack(values), S


@torch.no_grad()
@pytest.mark.parametrize("options", SIZES, ids=str)
def test_two_layers_equal_the_papers_equations(options):
    first, second, x = build(**options), build(**options), torch.randn(1, 30, D).double()
    wanted, values, S = loop(first, x[0], None)
    ctx = Context()
    y, state = first(x, first.init_state(1), ctx)
    assert relative_error(y[0], wanted) <= LAW_EXACT
    assert relative_error(state.S[0], S) <= LAW_EXACT
    wanted, _, S = loop(second, y[0], values)
    z, state = second(y, second.init_state(1), ctx)
    assert relative_error(z[0], wanted) <= LAW_EXACT
    assert relative_error(state.S[0], S) <= LAW_EXACT


@torch.no_grad()
def test_two_layers_in_pieces_with_documents_and_masks_are_two_layers_in_one_pass():
    layers, x = [build(**SIZES[0]), build(**SIZES[0])], torch.randn(2, 30, D).double()
    mask = torch.rand(2, 30) < 0.7
    document = (torch.arange(30) // 7).expand(2, 30)
    whole, ctx = x, Context(mask=mask, document=document)
    for layer in layers:
        whole = layer(whole, None, ctx)[0]
    states, pieces, last = [layer.init_state(2) for layer in layers], [], None
    for start, stop in ((0, 4), (4, 5), (5, 21), (21, 30)):
        span = slice(start, stop)
        ctx = Context(mask=mask[:, span], document=document[:, span], last_document=last)
        y = x[:, span]
        for i, layer in enumerate(layers):
            y, states[i] = layer(y, states[i], ctx)
        pieces.append(y)
        seen = torch.where(mask[:, span], document[:, span], -1).amax(1)
        last = seen if last is None else torch.maximum(last, seen)
    real = mask[..., None]
    assert relative_error(torch.cat(pieces, dim=1) * real, whole * real) <= LAW_EXACT


@torch.no_grad()
def test_read_both_ways_each_direction_has_its_own_first_values():
    layers = [Bidirectional(lambda: build(**SIZES[0])) for _ in range(2)]
    x, shared = torch.randn(1, 20, D).double(), Context()
    y = layers[0](x, None, shared)[0]
    found = layers[1](y, None, shared)[0]
    forth, back = Context(), Context()
    layers[0].forth(x, None, forth)
    layers[0].back(x.flip(1), None, back)
    wanted = layers[1].forth(y, None, forth)[0]
    wanted = wanted + layers[1].back(y.flip(1), None, back)[0].flip(1)
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_the_state_is_that_of_flash_linear_attention(monkeypatch):
    mixer, x, taken = build(torch.float32, **SIZES[0]), torch.randn(2, 40, D), []

    def recorded(*given: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        taken.extend(given)
        return delta_lowrank(*given, **options)

    monkeypatch.setattr(rwkv7, "delta_lowrank", recorded)
    state = mixer(x, mixer.init_state(2))[1]
    turned = (y.transpose(1, 2) for y in taken)
    _, last = fla_naive("generalized_delta_rule/dplr").dplr_recurrence(*turned)
    assert relative_error(state.S, last) <= 1e-5


def test_initial_values_are_the_published_ones():
    first, last = RWKV7(128, depth=0), RWKV7(128, depth=1)
    assert first.time_decay.min().item() == pytest.approx(-8.0)  # w_0 from -5.5 - 2.5 up
    assert first.time_decay.max().item() == pytest.approx(3.0)
    assert (last.mix == 0).all()  # the last layer starts with the token alone
    channel = torch.arange(128) / 128
    torch.testing.assert_close(first.mix[1], 1 - channel**0.9)
    for name, p in first.named_parameters():
        if name.endswith("_down"):
            assert (p == 0).all()
    up = first.gate_up
    torch.testing.assert_close(up @ up.T, 0.01 * torch.eye(len(up)))


def test_it_can_be_built_in_half_precision():
    torch.manual_seed(1)
    wanted = RWKV7(D).gate_up
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = RWKV7(D).gate_up
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.float().norm(), wanted.norm(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("d_model", "ranks"), [(768, (64, 64, 32, 128)), (2048, (96, 96, 64, 256)), (32, (32,) * 4)]
)
def test_ranks_are_those_of_the_published_models(d_model, ranks):
    with torch.device("meta"):
        m = RWKV7(d_model)
    found = (m.decay_down, m.rate_down, m.value_down, m.gate_down)
    assert tuple(p.shape[1] for p in found) == ranks


def test_wrong_options_are_refused_by_name():
    for options, words in (
        ({"head_dim": 5}, "d_model=16 is not divisible by head_dim=5; nearest: 15, 20"),
        ({"depth": 1.5}, "depth=1.5 is not allowed"),
        ({"gate_rank": 0}, "gate_rank=0 is not allowed"),
    ):
        with pytest.raises(ValueError, match=words):
            RWKV7(D, **options)


def test_values_of_another_length_are_refused():
    ctx = Context()
    build(**SIZES[0])(torch.randn(1, 8, D).double(), None, ctx)
    with pytest.raises(ValueError, match=r"values of the first rwkv7 is \(1, 8, 16\)"):
        build(**SIZES[0])(torch.randn(1, 4, D).double(), None, ctx)
