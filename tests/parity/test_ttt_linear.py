"""TTT-linear against training by autograd in float64, and around flash-linear-attention's form.

The authors' code is in no package; it has the learning rates that are tested first.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from seqzoo.layers.base import Context
from seqzoo.layers.ttt_linear import TTTLinear
from tests.fla_naive import fla_naive
from tests.tolerances import LAW_EXACT, relative_error

D = 16
SIZES = [{"n_heads": 2}, {"n_heads": 4, "mini_batch": 5, "base_lr": 0.5}]


def build(dtype: torch.dtype = torch.float64, **options: object) -> TTTLinear:
    mixer = TTTLinear(D, **options).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return mixer


def rotated(x: Tensor, place: int) -> Tensor:
    """Neighbours of (K,) as complex numbers, times e^(i place theta)."""
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    powers = [10000 ** (-2 * i / len(x)) for i in range(len(z))]
    theta = torch.tensor(powers, dtype=torch.float64)
    return torch.view_as_real(z * torch.polar(torch.ones_like(theta), place * theta)).flatten()


def trained(mixer: TTTLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One row and one head after the other, (T, D), W and b of the last whole mini-batch."""
    m, K, C = mixer, mixer.head_dim, mixer.mini_batch
    outputs, models = torch.empty_like(x), []
    for head in range(m.n_heads):
        c = slice(head * K, head * K + K)
        q, k, v = (x @ p.weight[c].T for p in (m.q_proj, m.k_proj, m.v_proj))
        W, b = m.W[head].detach(), m.b[head].detach()

        def f(z: Tensor, head: int = head) -> Tensor:
            normed = (z - z.mean()) / (z.var(correction=0) + 1e-6).sqrt()
            return m.norm_weight[head] * normed + m.norm_bias[head]

        for start in range(0, len(x), C):
            W_now, b_now = (p.clone().requires_grad_() for p in (W, b))
            sum_W, sum_b = torch.zeros_like(W), torch.zeros_like(b)
            for i, t in enumerate(range(start, min(start + C, len(x)))):
                query, key = rotated(q[t], i), rotated(k[t], i)
                loss = (f(key @ W_now + b_now) - (v[t] - key)).square().sum() / 2
                grads = torch.autograd.grad(loss, (W_now, b_now))
                eta = m.base_lr * torch.sigmoid(m.lr_weight[head] @ x[t] + m.lr_bias[head]) / K
                sum_W, sum_b = (s + eta * g for s, g in zip((sum_W, sum_b), grads, strict=True))
                share = max(1 / (i + 1) + m.share_bias[i].item(), 0.0)
                W_i, b_i = W - share * sum_W, b - share * sum_b
                outputs[t, c] = query + f(query @ W_i + b_i)
                if i == C - 1:
                    W, b = W_i.detach(), b_i.detach()
        models.append((W, b))
    W, b = (torch.stack(parts).detach() for parts in zip(*models, strict=True))
    return m.o_proj(m.norm(outputs)).detach(), W, b


@pytest.mark.parametrize("options", SIZES, ids=str)
def test_equals_training_by_autograd_in_outputs_and_in_what_was_learned(options):
    mixer, x = build(**options), torch.randn(2, 40, D).double()
    y, state = mixer(x, mixer.init_state(2))
    for row in range(2):
        wanted, W, b = trained(mixer, x[row])
        assert relative_error(y[row], wanted) <= LAW_EXACT
        learned = state.S[row, 0].detach()
        assert relative_error(mixer.W + learned[:, :-1], W) <= LAW_EXACT
        assert relative_error(mixer.b + learned[:, -1], b) <= LAW_EXACT
    assert (state.next == 40 % mixer.mini_batch).all()


def test_documents_and_masked_tokens_are_training_on_what_is_there():
    mixer, x = build(**SIZES[1]), torch.randn(1, 40, D).double()
    mask = torch.rand(1, 40) < 0.6
    document = (torch.arange(40) >= 13).long()[None]
    y = mixer(x, None, Context(mask=mask, document=document))[0]
    for part in (slice(0, 13), slice(13, 40)):
        real = mask[0, part]
        assert relative_error(y[0, part][real], trained(mixer, x[0, part][real])[0]) <= LAW_EXACT


def test_position_ids_do_not_move_the_mini_batches():
    mixer, x = build(**SIZES[0]), torch.randn(1, 20, D).double()
    y = mixer(x, None, Context(positions=torch.arange(3, 23)[None]))[0]
    assert torch.equal(y, mixer(x)[0])


@torch.no_grad()
def test_with_one_rate_for_all_keys_it_learns_what_flash_linear_attention_learns():
    mixer, x = build(torch.float32, n_heads=2), torch.randn(2, 48, D)
    mixer.lr_weight.zero_()
    state = mixer(x, mixer.init_state(2))[1]
    H, K = 2, mixer.head_dim

    def heads(p: torch.nn.Linear) -> Tensor:
        return (x @ p.weight.T).unflatten(-1, (H, K))

    def turned(y: Tensor) -> Tensor:
        rows = [
            torch.stack([rotated(h, t % 16) for h in y[b, t]]) for b in (0, 1) for t in range(48)
        ]
        return torch.stack(rows).view_as(y).float()

    rate = torch.sigmoid(mixer.lr_bias) / K
    share = (1 / torch.arange(1, 17) + mixer.share_bias).clamp(min=0).repeat(3)
    _, W, b = fla_naive("ttt").chunk_ttt_linear_ref(
        turned(heads(mixer.q_proj)),
        turned(heads(mixer.k_proj)),
        heads(mixer.v_proj),
        mixer.norm_weight,
        mixer.norm_bias,
        (share[:, None] * rate).expand(2, 48, H)[..., None].clone(),
        initial_state=mixer.W.expand(2, -1, -1, -1),
        initial_state_bias=mixer.b[None, :, None].expand(2, -1, -1, -1),
        output_final_state=True,
    )
    assert relative_error(mixer.W + state.S[:, 0, :, :-1], W) <= 1e-5
    assert relative_error((mixer.b + state.S[:, 0, :, -1])[:, :, None], b) <= 1e-5


def test_it_learns_a_linear_map_while_reading():
    """Without any training of its parameters: the reconstruction error falls along the sequence."""
    torch.manual_seed(0)
    mixer = TTTLinear(32, n_heads=1, base_lr=4.0)
    key, last = torch.randn(1, 16, 32), {}
    x = key.repeat(1, 30, 1)  # the same mini-batch over and over
    for tokens in (16, 480):
        S = mixer(x[:, :tokens], mixer.init_state(1))[1].S.detach()
        W, b = mixer.W + S[:, 0, :, :-1], mixer.b + S[:, 0, :, -1]
        k, v = (
            torch.stack([rotated(y, i).float() if turn else y for i, y in enumerate(p(key[0]))])
            for p, turn in ((mixer.k_proj, True), (mixer.v_proj, False))
        )
        error = layer_norm(k @ W[0, 0] + b[0], (32,), eps=1e-6) - (v - k)
        last[tokens] = error.detach().square().mean()
    assert last[480] < 0.8 * last[16]


def test_initial_values_are_the_published_ones():
    mixer = TTTLinear(256, n_heads=1)
    assert math.isclose(mixer.W.std().item(), 0.02, rel_tol=0.05)
    assert math.isclose(mixer.lr_weight.std().item(), 0.02, rel_tol=0.2)
    for name in ("b", "lr_bias", "share_bias", "norm_bias"):
        assert (mixer.get_parameter(name) == 0).all()
    assert (mixer.norm_weight == 1).all()


def test_wrong_options_are_refused_by_name():
    for options, words in (
        ({"n_heads": 3}, "d_model=16 is not divisible by 2 . n_heads=6; nearest: 12, 18"),
        ({"mini_batch": 0}, "mini_batch=0 is not allowed"),
        ({"base_lr": 0}, "base_lr=0 is not allowed"),
    ):
        with pytest.raises(ValueError, match=words):
            TTTLinear(D, **options)
