"""wkv against a float64 loop over time, and against its sums written out."""

import pytest
import torch
from torch import Tensor

from seqzoo.kernels.dispatch import BACKENDS, accumulator
from seqzoo.kernels.wkv import no_tokens, wkv
from seqzoo.kernels.wkv.chunked import BLOCK
from tests.tolerances import assert_close_to_reference, relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# (B, T, D): less than a block, exactly one, several; channels that fill no vector, some, and more
# than native.c gives to one thread
SHAPES = [(2, 3, 5), (3, BLOCK, 1), (1, 2 * BLOCK + 5, 33), (2, 97, 270)]
USED = [(), ("reset",), ("mask",), ("mask", "reset")]
FAST = [b.name for b in BACKENDS["wkv"] if b.name in ("native", "chunked")]
ALL = [*FAST, "reference"]


def serves(backend: str, dtype: torch.dtype) -> bool:
    chosen = next(b for b in BACKENDS["wkv"] if b.name == backend)
    return not chosen.refusal("cpu", accumulator(dtype), ())


def inputs(B: int, T: int, D: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = {
        "k": torch.randn(B, T, D) * 2,
        "v": torch.randn(B, T, D),
        "w": torch.linspace(-4, 2, D).exp(),
        "u": torch.randn(D),
        "initial_state": torch.stack(
            [torch.randn(B, D), torch.rand(B, D) + 0.5, torch.randn(B, D)], dim=1
        ),
    }
    return {k: v.to(dtype).requires_grad_() for k, v in made.items()}


def flags(B: int, T: int) -> dict[str, Tensor]:
    mask = torch.rand(B, T) < 0.6
    return {"mask": mask, "reset": (torch.rand(B, T) < 0.2) & mask}


def weights(x: Tensor) -> Tensor:
    """Numbers that every dtype holds exactly."""
    return ((torch.arange(x.numel()) * 7 % 13 - 4) / 8).view_as(x).to(x.dtype)


def meaning(state: Tensor) -> Tensor:
    """What a state says whatever its scale: the average, and the logarithm of the weights' sum."""
    a, b, p = state.unbind(1)
    return torch.stack([a / b, p + b.log()], dim=1)


def differentiated(given: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Every number; outputs at masked tokens, which mean nothing, are left out."""
    y, state = wkv(**given, **options)
    if "mask" in options:
        y = torch.where(options["mask"][..., None], y, 0)
    loss = sum((r * weights(r)).sum().double() for r in (y, state))
    grads = torch.autograd.grad(loss, given.values(), materialize_grads=True)
    results = {"y": y, "state": state}
    return results | {f"gradient of {k}": g for k, g in zip(given, grads, strict=True)}


def widened(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().double().requires_grad_() for k, v in given.items()}


def assert_all_close(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype):
    for name, value in found.items():
        gradient = name.startswith("gradient")
        allowed = torch.float32 if name == "state" and dtype != torch.float64 else dtype
        assert_close_to_reference(value, wanted[name], allowed, gradient=gradient, name=name)


@pytest.mark.parametrize("used", USED, ids="+".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"), [(b, d) for b in FAST for d in DTYPES if serves(b, d)], ids=str
)
def test_every_number_is_within_budget_of_the_float64_loop(
    backend, dtype, shape, used, poisoned_empty
):
    given = inputs(*shape, dtype)
    options = {k: v for k, v in flags(*shape[:2]).items() if k in used}
    found = differentiated(given, **options, backend=backend)
    wanted = differentiated(widened(given), **options, backend="reference")
    assert_all_close(found, wanted, dtype)


@pytest.mark.parametrize("backend", ALL)
def test_the_loop_itself_agrees_with_the_sums_written_out(backend):
    """The exponent of a past token is t - 1 - i, and u belongs to the current one, in float64."""
    given = {k: v.detach() for k, v in inputs(2, 21, 5).items()}
    k, v, w, u, start = given.values()
    ages = (torch.arange(21)[:, None] - 1 - torch.arange(21)).double()  # t - 1 - i
    e = torch.exp(k[:, None] - ages[..., None] * w) * (ages >= 0)[..., None]  # (B, t, i, D)
    first = torch.exp(start[:, None, 2] - torch.arange(21.0).double()[:, None] * w)
    own = torch.exp(u + k)
    numerator = (e * v[:, None]).sum(2) + first * start[:, None, 0] + own * v
    denominator = e.sum(2) + first * start[:, None, 1] + own
    y, state = wkv(**given, backend=backend)
    torch.testing.assert_close(y, numerator / denominator, rtol=1e-12, atol=1e-12)
    top = torch.cat([start[:, 2:] - 21 * w, k - (20 - torch.arange(21.0).double())[:, None] * w], 1)
    torch.testing.assert_close(state[:, 2], top.amax(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 1e-8, 0.02, 0.5, 1e4])
@pytest.mark.parametrize("hostile", [12.0, 90.0, 1e4, -1e4])
@pytest.mark.parametrize("backend", FAST)
def test_large_keys_and_any_decay_stay_finite_and_right(backend, hostile, decay):
    given = inputs(2, 40, 6, torch.float32)
    with torch.no_grad():
        given["k"][:, 5:8, ::2] = hostile
        given["k"][:, 30, :3] = hostile
        given["w"].fill_(decay)
    wide = widened(given)
    y, state = wkv(**given, backend=backend)
    wanted, its_state = wkv(**wide, backend="reference")
    assert_close_to_reference(y, wanted)
    assert_close_to_reference(meaning(state), meaning(its_state), torch.float32, name="state")
    found = torch.autograd.grad((y * weights(y)).sum(), given.values())
    wanted = torch.autograd.grad((wanted * weights(wanted)).sum(), wide.values())
    for name, a, b in zip(given, found, wanted, strict=True):
        assert_close_to_reference(a, b, gradient=True, name=name)


@pytest.mark.parametrize("pieces", [1, 40])
@pytest.mark.parametrize("backend", FAST)
def test_slow_decays_do_not_drown_in_the_rounding_of_the_maximum(backend, pieces):
    """A maximum rounded to float32 at every token puts y off by one part in 10^5 here."""
    given = {k: v.detach() for k, v in inputs(1, 2000, 8, torch.float32).items()}
    given["k"][:, 3], given["w"] = 9.0, torch.logspace(-4, -2, 8)
    wanted = wkv(**widened(given), backend="reference")[0]
    state, outputs = given["initial_state"], []
    for k, v in zip(given["k"].chunk(pieces, 1), given["v"].chunk(pieces, 1), strict=True):
        y, state = wkv(k, v, given["w"], given["u"], initial_state=state, backend=backend)
        outputs.append(y)
    assert_close_to_reference(torch.cat(outputs, dim=1), wanted)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("where", ["left", "inside", "right"])
def test_a_masked_token_leaves_the_state_untouched(where, backend):
    given, slots = inputs(4, 40, 5, torch.float32), torch.arange(40)
    lengths = torch.tensor([40, 17, 1, 0])[:, None]
    inside = torch.rand(4, 40) < 0.5
    mask = {"left": slots >= 40 - lengths, "right": slots < lengths, "inside": inside}[where]
    junk = {k: torch.where(mask[..., None], given[k], 1e3) for k in ("k", "v")}
    empty = no_tokens(4, 5, None, torch.float32)
    for start in (given["initial_state"], empty):
        options = given | junk | {"initial_state": start}
        y, state = wkv(**options, mask=mask, backend=backend)
        assert not y[~mask].any()
        for row in range(4):
            k, v = (given[n][row : row + 1, mask[row]] for n in ("k", "v"))
            wanted, its_state = wkv(
                k,
                v,
                given["w"],
                given["u"],
                initial_state=start[row : row + 1],
                backend="reference",
            )
            assert_close_to_reference(y[row : row + 1, mask[row]], wanted)
            assert_close_to_reference(state[row : row + 1], its_state)


@pytest.mark.parametrize("backend", ALL)
def test_no_state_crosses_into_the_next_document(backend):
    given, lengths = inputs(2, 44, 5, torch.float32), (BLOCK, 1, 7, 4)
    with torch.no_grad():
        given["k"][:, 0] = 80  # would outweigh everything later
    reset = torch.zeros(2, 44, dtype=torch.bool)
    reset[:, [0, BLOCK, BLOCK + 1, BLOCK + 8]] = True
    y, state = wkv(**given, reset=reset, backend=backend)
    pieces = zip(*(given[k].split(lengths, dim=1) for k in ("k", "v")), strict=True)
    alone = [wkv(k, v, given["w"], given["u"], backend="reference") for k, v in pieces]
    assert_close_to_reference(y, torch.cat([y for y, _ in alone], dim=1))
    assert_close_to_reference(state, alone[-1][1])
    start, k = torch.autograd.grad(state.sum(), [given["initial_state"], given["k"]])
    assert not start.any()
    assert not k[:, : BLOCK + 8].any()


@pytest.mark.parametrize("used", USED, ids="+".join)
@pytest.mark.parametrize("split", [(1,) * 40, (0, 3, BLOCK, 5), (39, 1)], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_the_state_between_chunks_is_all_that_later_tokens_need(backend, split, used):
    given = inputs(2, 40, 5, torch.float32)
    options = {k: v for k, v in flags(2, 40).items() if k in used}
    whole = differentiated(given, **options, backend=backend)
    state, pieces, start = given["initial_state"], [], 0
    for n in split:
        part = {k: v[:, start : start + n] for k, v in options.items()}
        piece = given | {k: given[k][:, start : start + n] for k in ("k", "v")}
        y, state = wkv(**(piece | {"initial_state": state}), **part, backend=backend)
        pieces.append(y)
        start += n
    y = torch.cat(pieces, dim=1)
    if "mask" in used:
        y = torch.where(options["mask"][..., None], y, 0)
    loss = sum((r * weights(r)).sum().double() for r in (y, state))
    grads = torch.autograd.grad(loss, given.values())
    found = {f"gradient of {name}": g for name, g in zip(given, grads, strict=True)}
    assert_all_close({"y": y, "state": state} | found, whole, torch.float32)


@pytest.mark.parametrize("backend", ALL)
def test_a_state_means_the_same_at_another_scale(backend):
    given, c = inputs(2, 40, 5), torch.randn(2, 1, 5, dtype=torch.float64)
    start = given["initial_state"]
    moved = torch.cat([start[:, :2] * c.exp(), start[:, 2:] - c], dim=1)
    (y, state), (other, later) = (
        wkv(**(given | {"initial_state": s}), backend=backend) for s in (start, moved)
    )
    torch.testing.assert_close(y, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(meaning(state), meaning(later), rtol=1e-12, atol=1e-12)
    da, db, dp = torch.autograd.grad((y * weights(y)).sum(), start)[0].unbind(1)
    torch.testing.assert_close(start[:, 0] * da + start[:, 1] * db, dp, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ALL)
def test_gradients_through_a_carried_state_are_exact_where_two_tokens_share_the_maximum(backend):
    given = inputs(2, 30, 5)
    with torch.no_grad():
        given["k"].copy_(given["k"].round())
        given["w"].zero_()
    whole = wkv(**given, backend=backend)[0]
    pieces, state = [], given["initial_state"]
    for k, v in zip(given["k"].split(7, 1), given["v"].split(7, 1), strict=True):
        y, state = wkv(k, v, given["w"], given["u"], initial_state=state, backend=backend)
        pieces.append(y)
    found = torch.autograd.grad((torch.cat(pieces, 1) * weights(whole)).sum(), given.values())
    wanted = torch.autograd.grad((whole * weights(whole)).sum(), given.values())
    for name, a, b in zip(given, found, wanted, strict=True):
        assert_close_to_reference(a, b, gradient=True, name=name)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3), (0, 0, 3)], ids=str)
def test_nothing_in_gives_nothing_out_and_the_state_back(shape, backend):
    given = inputs(*shape, torch.float32)
    for options in ({}, flags(*shape[:2])):
        found = differentiated(given, **options, backend=backend)
        assert found["y"].shape == given["v"].shape
        assert torch.equal(found["state"], given["initial_state"])


@pytest.mark.parametrize("backend", FAST)
def test_gradients_are_derivatives(backend):
    given, options = inputs(2, BLOCK + 3, 2), flags(2, BLOCK + 3)

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return wkv(**dict(zip(given, values, strict=True)), **options, backend=backend)

    assert torch.autograd.gradcheck(run, tuple(given.values()), fast_mode=True)

    def twice(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        _, state = wkv(k[:, :3], v[:, :3], w, u, backend=backend)
        return wkv(k[:, 3:], v[:, 3:], w, u, initial_state=state, backend=backend)

    values = [given["k"][:, :6], given["v"][:, :6], given["w"], given["u"]]
    assert torch.autograd.gradcheck(twice, [x.detach().requires_grad_() for x in values])


@pytest.mark.parametrize("backend", ALL)
def test_the_state_is_float32_when_the_inputs_are_not(backend):
    y, state = wkv(**inputs(1, 3, 4, torch.bfloat16), backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_strides_change_nothing(backend):
    given = inputs(2, 40, 8, torch.float32)
    strided = {
        k: v.detach().mT.contiguous().mT.requires_grad_() if v.ndim > 1 else v
        for k, v in given.items()
    }
    assert not strided["k"].is_contiguous()
    found = differentiated(strided, backend=backend)
    for name, wanted in differentiated(given, backend=backend).items():
        assert relative_error(found[name], wanted) <= 1e-6, name


@pytest.mark.parametrize("backend", FAST)
def test_the_graph_and_what_it_keeps_do_not_grow_with_each_token(backend):
    """One node whatever T, and of the states only those at block borders."""
    nodes, kept = set(), []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    for T in (2 * BLOCK, 8 * BLOCK):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y, _ = wkv(**inputs(1, T, 4, torch.float32), backend=backend)
        nodes.add(type(y.grad_fn).__name__)
    assert len(nodes) == 1
    assert max(kept) == 8 * BLOCK * 4


@pytest.mark.parametrize("used", [(), ("mask", "reset")], ids="+".join)
@pytest.mark.parametrize("backend", FAST)
def test_compiles_without_a_graph_break(backend, used):
    options = {k: v for k, v in flags(2, 40).items() if k in used}
    torch.compiler.reset()
    compiled = torch.compile(wkv, fullgraph=True, backend="aot_eager")
    for T in (40, 30):
        given = inputs(2, T, 8, torch.float32)
        cut = {k: v[:, :T] for k, v in options.items()}
        found = compiled(**given, **cut, backend=backend)
        wanted = wkv(**given, **cut, backend=backend)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
        a, b = (torch.autograd.grad(y.square().sum(), given["w"])[0] for y, _ in (found, wanted))
        assert torch.equal(a, b)


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_the_operator_declares_what_it_does(backend, flagged):
    used = flags(2, BLOCK + 4) if flagged else {"reset": None, "mask": None}
    given = inputs(2, BLOCK + 4, 3, torch.float32)
    operands = (*given.values(), used["reset"], used["mask"], backend)
    torch.library.opcheck(torch.ops.seqzoo.wkv.default, operands)


@pytest.mark.parametrize("name", ["k", "v", "w", "u", "initial_state"])
@pytest.mark.parametrize("backend", ALL)
def test_what_is_not_a_number_does_not_vanish(backend, name):
    given = {k: v.detach() for k, v in inputs(1, 20, 3, torch.float32).items()}
    given[name].view(-1)[0] = torch.nan
    assert wkv(**given, backend=backend)[0].isnan().any()


def test_threads_change_no_bit():
    given = inputs(3, 70, 600, torch.float32)
    alone = differentiated(given)
    torch.set_num_threads(3)
    together = differentiated(given)
    for name, value in alone.items():
        assert torch.equal(together[name], value), name


def test_meta_tensors_give_shapes():
    given = {k: v.to("meta") for k, v in inputs(2, 50, 8, torch.float32).items()}
    for options in ({}, {k: v.to("meta") for k, v in flags(2, 50).items()}):
        y, state = wkv(**given, **options)
        assert (y.shape, state.shape) == (given["v"].shape, given["initial_state"].shape)


def test_what_does_not_fit_is_refused_by_name():
    given, options = inputs(2, 5, 3), flags(2, 5)
    for wrong, words in [
        ({"k": torch.zeros(5, 3)}, "wkv takes"),
        ({"v": torch.zeros(2, 5, 1)}, "v is"),
        ({"w": torch.zeros(4)}, "w is"),
        ({"u": torch.zeros(1, 3)}, "u is"),
        ({"initial_state": torch.zeros(2, 3)}, "initial_state is"),
        ({"mask": options["mask"][:, :4]}, "mask is"),
        ({"reset": options["reset"][:1]}, "reset is"),
        ({"backend": "nonesuch"}, "backend of wkv"),
    ]:
        with pytest.raises(ValueError, match=words):
            wkv(**(given | wrong))
