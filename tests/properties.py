"""The properties of every mixer: tests/test_contract.py runs them, tests/mutations breaks them.

A check takes a `Case` and raises AssertionError when the mixer breaks its promise. Mixers are built
with all parameters stirred, so that a bias that starts at zero cannot hide a fault.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from seqzoo.kernels.dispatch import BACKENDS
from seqzoo.layers import CATALOGUE, create_mixer, mixer_class
from seqzoo.layers.base import Context, Mixer
from tests.tolerances import budget, relative_error

D = 32


@dataclass(frozen=True)
class Case:
    """One mixer with one set of options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        given = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.name}[{given}]" if given else self.name

    def build(self, d_model: int = D, dtype: torch.dtype = torch.float32) -> Mixer:
        torch.manual_seed(0)
        mixer = create_mixer(self.name, d_model, **self.options)
        with torch.no_grad():
            for p in mixer.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
        return mixer.to(dtype).eval()

    @property
    def loose(self) -> bool:
        """Whether it convolves by FFT, which rounds the future into the past."""
        return mixer_class(self.name).kernel == "long_conv"

    @property
    def law(self) -> float:
        return 1e-4 if self.loose else 1e-5


def catalogue() -> list[Case]:
    """Every mixer with its defaults and with each of its declared variants."""
    return [
        Case(name, options)
        for name in sorted(CATALOGUE)
        for options in ({}, *mixer_class(name).variants)
    ]


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaves(state: Any) -> list[Tensor]:
    return [x for x in state or () if isinstance(x, Tensor)]


def floats(state: Any) -> list[Tensor]:
    return [x for x in leaves(state) if x.is_floating_point() or x.is_complex()]


def state_bytes(state: Any) -> int:
    return sum(x.numel() * x.element_size() for x in leaves(state))


def assert_close(out: Tensor, ref: Tensor, bound: float, what: str) -> None:
    assert out.shape == ref.shape, f"{what}: {tuple(out.shape)} is not {tuple(ref.shape)}"
    if ref.numel() == 0:
        return
    if not (ref.is_floating_point() or ref.is_complex()):
        assert torch.equal(out, ref), f"{what} differs"
        return
    error = relative_error(out, ref)
    assert error <= bound, f"{what}: relative error {error:.2e} is above {bound:.0e}"


def assert_same_state(out: Any, ref: Any, bound: float, what: str) -> None:
    assert len(leaves(out)) == len(leaves(ref)), f"{what}: other tensors"
    for i, (a, b) in enumerate(zip(leaves(out), leaves(ref), strict=True)):
        assert_close(a, b, bound, f"{what}, state {i}")


# 1 --------------------------------------------------------------------------------------------


def shapes(case: Case) -> None:
    mixer = case.build()
    for B, T in [(2, t) for t in (0, 1, 63, 64, 65, 100)] + [(0, 5), (0, 0)]:
        x = tokens(B, T, D)
        y, none = mixer(x)
        assert y.shape == x.shape, f"(B, T) = {(B, T)}: {tuple(y.shape)}"
        assert y.dtype == x.dtype
        assert none is None, "no state in, no state out"
        assert y.isfinite().all(), f"(B, T) = {(B, T)} is not finite"
        if mixer.caps.causality != "none":
            state = mixer.init_state(B)
            y, after = mixer(x, state)
            assert y.shape == x.shape
            assert type(after) is type(state), "the state changes its type"
            if T == 0:
                assert_same_state(after, state, 0, "no tokens, but the state changed")
    x = tokens(2, 9, D)
    strided = tokens(9, 2, 2 * D)[:, :, ::2].transpose(0, 1)
    assert_close(mixer(strided)[0], mixer(strided.contiguous())[0], 1e-6, "non-contiguous input")
    with torch.device("meta"):
        shadow = create_mixer(case.name, D, **case.options)
    assert shadow(x.to("meta"))[0].shape == x.shape


# 2 --------------------------------------------------------------------------------------------


def causality(case: Case) -> None:
    mixer = case.build()
    if mixer.caps.causality == "none":
        return
    T = 50
    for t in (1, T // 2, T - 2):
        x = tokens(2, T, D).requires_grad_()
        y = mixer(x)[0]
        (grad,) = torch.autograd.grad(y[:, :t].square().sum(), x)
        leak, largest = grad[:, t:].abs().max(), grad.abs().max()
        bound = 1e-5 * largest if case.loose else 0
        assert leak <= bound, f"the gradient of y[:{t}] reaches later tokens: {leak:.1e}"
    if mixer.caps.causality == "value":
        return
    for t in (1, T // 2, T - 2):
        x = tokens(2, T, D)
        other = torch.cat([x[:, :t], 10 * tokens(2, T - t, D, seed=2)], dim=1)
        change = (mixer(x)[0][:, :t] - mixer(other)[0][:, :t]).abs().max()
        bound = 1e-5 * other.abs().max() if case.loose else 0
        assert change <= bound, f"changing x[{t}:] changes y[:{t}] by {change:.1e}"


def prefix(case: Case) -> None:
    mixer = case.build()
    if not mixer.caps.prefix:
        return
    x = tokens(2, 100, D)
    y = mixer(x)[0]
    for t in (1, 37, 64, 99):
        assert_close(mixer(x[:, :t])[0], y[:, :t], case.law, f"prefix of {t}")


# 3 --------------------------------------------------------------------------------------------

SPLITS = ((100,), (1,) * 12, (1, 2, 3, 58, 1, 35), (64, 36), (0, 7, 0, 93))


def law(case: Case) -> None:
    for dtype, bound in ((torch.float32, case.law), (torch.float64, 1e-10)):
        mixer = case.build(dtype=dtype)
        if mixer.caps.causality != "strict":
            return
        for split in SPLITS:
            x = tokens(2, sum(split), D, dtype=dtype)
            whole = mixer(x)[0]
            y, state = mixer(x, mixer.init_state(2))
            assert_close(y, whole, bound, "one pass with a state")
            pieces, carried = stream(mixer, x, split)
            assert_close(pieces, whole, bound, f"outputs over {split}")
            assert_same_state(carried, state, bound, f"over {split}")


def stream(mixer: Mixer, x: Tensor, split: tuple[int, ...]) -> tuple[Tensor, Any]:
    state, pieces = mixer.init_state(x.shape[0]), []
    for piece in x.split(split, dim=1):
        y, state = mixer(piece, state)
        pieces.append(y)
    return torch.cat(pieces, dim=1), state


# 4 --------------------------------------------------------------------------------------------


def masks() -> dict[str, Tensor]:
    slots = torch.arange(23)
    lengths = torch.tensor([23, 14, 1, 0])[:, None]
    inside = torch.rand(4, 23, generator=torch.Generator().manual_seed(3)) < 0.6
    inside[0, 0], inside[1, 22], inside[2, 11] = False, False, True
    return {"right": slots < lengths, "left": slots >= 23 - lengths, "inside": inside}


def padding(case: Case) -> None:
    mixer = case.build()
    x, more = tokens(4, 23, D), tokens(4, 5, D, seed=2)
    streams = mixer.caps.causality != "none"
    for where, mask in masks().items():
        junk = torch.where(mask[..., None], x, 30 * tokens(4, 23, D, seed=4))
        for content in (x, junk):
            ctx = Context(mask=mask)
            y = mixer(content, None, ctx)[0]
            state = mixer.init_state(4) if streams else None
            again, state = mixer(content, state, Context(mask=mask))
            later = mixer(more, state)[0] if streams else more
            assert y.isfinite().all(), f"{where}: padded outputs are not finite"
            for row in range(4):
                real = mask[row]
                alone, its = mixer(x[row : row + 1, real], mixer.init_state(1) if streams else None)
                for out in (y, again):
                    assert_close(out[row : row + 1, real], alone, case.law, f"{where}, row {row}")
                if streams:
                    then = mixer(more[row : row + 1], its)[0]
                    assert_close(later[row : row + 1], then, case.law, f"after {where}, row {row}")
        if mixer.caps.state == "constant" and streams:
            _, kept = mixer(more, state, Context(mask=torch.zeros(4, 5, dtype=torch.bool)))
            assert_same_state(kept, state, 1e-6, f"{where}: masked tokens change the state")


def packing(case: Case) -> None:
    mixer = case.build()
    lengths = (1, 7, 15, 2)  # the last is shorter than any convolution
    ids = torch.repeat_interleave(torch.tensor([5, 2, 9, 2]), torch.tensor(lengths)).expand(2, -1)
    x = tokens(2, 25, D).requires_grad_()
    weight = tokens(2, 25, D, seed=5)
    separate = torch.cat([mixer(d)[0] for d in x.split(lengths, dim=1)], dim=1)
    (wanted,) = torch.autograd.grad((separate * weight).sum(), x)
    packed = mixer(x, None, Context(document=ids))[0]
    (found,) = torch.autograd.grad((packed * weight).sum(), x)
    assert_close(packed, separate, case.law, "packed documents")
    assert_close(found, wanted, 10 * case.law, "gradient through packed documents")
    if mixer.caps.causality == "none":
        return
    more = tokens(2, 4, D, seed=6)
    last = mixer(x[:, -2:], mixer.init_state(2))[1]
    for cut in (0, 4, 8, 9, 23, 24):
        state = mixer.init_state(2)
        first, state = mixer(x[:, :cut], state, Context(document=ids[:, :cut]))
        before = ids[:, cut - 1] if cut else None
        ctx = Context(document=ids[:, cut:], last_document=before)
        second, state = mixer(x[:, cut:], state, ctx)
        assert_close(torch.cat([first, second], 1), separate, case.law, f"packed, cut at {cut}")
        then, wanted_then = mixer(more, state)[0], mixer(more, last)[0]
        assert_close(then, wanted_then, case.law, f"after packed documents, cut at {cut}")
    # Padding between and inside documents, whose ids are junk there.
    mask = torch.rand(2, 25, generator=torch.Generator().manual_seed(7)) < 0.7
    junk_ids = torch.where(mask, ids, 77)
    y = mixer(x, None, Context(mask=mask, document=junk_ids))[0]
    for row in range(2):
        start = 0
        for length in lengths:
            real = mask[row, start : start + length]
            alone = mixer(x[row : row + 1, start : start + length][:, real])[0]
            out = y[row : row + 1, start : start + length][:, real]
            assert_close(out, alone, case.law, f"padded document at {start}, row {row}")
            start += length


# 5 --------------------------------------------------------------------------------------------


@contextmanager
def preferring(backend: str) -> Iterator[None]:
    before = os.environ.get("SEQZOO_BACKEND")
    os.environ["SEQZOO_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ.pop("SEQZOO_BACKEND")
        if before is not None:
            os.environ["SEQZOO_BACKEND"] = before


def backends(case: Case) -> None:
    """Each backend in float32 against the definition in float64.

    The projections and norms of a mixer round too, and a norm over a head that is nearly zero
    magnifies that, so what the plain loop loses in float32 is granted twice on top of the budget
    (kernels alone are held to the bare budget in tests/kernels). The loop itself must obey the law.
    """
    mixer = case.build()
    kernel = mixer.kernel
    mixer(tokens(1, 2, D))  # imports the kernel, which declares its backends
    family = "delta" if kernel.startswith("delta") else "default"
    with preferring("reference"):
        exact = differentiated(copy.deepcopy(mixer).double())
        plain = {k: relative_error(v, exact[k]) for k, v in differentiated(mixer).items()}
    for what, error in plain.items():
        assert error <= case.law, f"the plain loop loses {error:.1e} of {what}"
    for backend in BACKENDS.get(kernel, ()):
        if backend.refusal("cpu", torch.float32, ()) or backend.name == "fused":
            continue
        with preferring(backend.name):
            found = differentiated(mixer)
        for what, ref in exact.items():
            bound = budget(torch.float32, family, gradient=what.startswith("gradient"))
            assert_close(found[what], ref, bound + 2 * plain[what], f"{backend.name}: {what}")


def differentiated(mixer: Mixer) -> dict[str, Tensor]:
    """Outputs, states and every gradient of a pass of 70 tokens that goes on from 5 others."""
    dtype = next(mixer.parameters()).dtype
    x = tokens(2, 70, D).to(dtype).requires_grad_()
    streams = mixer.caps.causality != "none"
    state = mixer(tokens(2, 5, D, seed=8).to(dtype), mixer.init_state(2))[1] if streams else None
    if state:
        state = type(state)(
            *(
                s.detach().requires_grad_() if s.is_floating_point() or s.is_complex() else s
                for s in state
            )
        )
    y, after = mixer(x, state)
    results = {"output": y}
    results |= {f"state {i}": s for i, s in enumerate(floats(after))}
    loss = sum(
        ((r if r.is_floating_point() else torch.view_as_real(r)) * weight_like(r)).sum()
        for r in results.values()
    )
    sources = {"x": x} | dict(mixer.named_parameters())
    sources |= {f"initial state {i}": s for i, s in enumerate(floats(state))}
    grads = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    for name, source, grad in zip(sources, sources.values(), grads, strict=True):
        results[f"gradient of {name}"] = torch.zeros_like(source) if grad is None else grad
    return {k: v.detach() for k, v in results.items()}


def weight_like(x: Tensor) -> Tensor:
    shape = x.shape if x.is_floating_point() else (*x.shape, 2)
    return tokens(*shape, seed=9).to(x.real.dtype)


# 6 --------------------------------------------------------------------------------------------


def gradients(case: Case) -> None:
    mixer = case.build(d_model=16, dtype=torch.float64)
    names = [name for name, _ in mixer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in mixer.parameters()]
    streams = mixer.caps.causality != "none"
    state = None
    if streams:
        state = mixer(tokens(2, 3, 16, dtype=torch.float64), mixer.init_state(2))[1]
    given = [s.detach().requires_grad_() for s in floats(state)]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, rest[: len(names)], strict=True))
        carried = iter(rest[len(names) :])
        start = None
        if streams:
            start = state and type(state)(
                *(next(carried) if s.is_floating_point() or s.is_complex() else s for s in state)
            )
        y, after = functional_call(mixer, parameters, (x, start))
        return (y, *(f for f in floats(after) if f.requires_grad))

    x = tokens(2, 5, 16, dtype=torch.float64, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(
        run, (x, *values, *given), fast_mode=True, atol=1e-8, nondet_tol=0.0
    )


def truncation(case: Case) -> None:
    """Backpropagation through carried states, nothing cut, is backpropagation through one pass."""
    mixer = case.build(dtype=torch.float64)
    if mixer.caps.causality != "strict":
        return
    x = tokens(2, 40, D, dtype=torch.float64).requires_grad_()
    weight = tokens(2, 40, D, seed=3).double()
    (wanted,) = torch.autograd.grad((mixer(x)[0] * weight).sum(), x)
    (found,) = torch.autograd.grad((stream(mixer, x, (3, 17, 1, 19))[0] * weight).sum(), x)
    assert_close(found, wanted, 1e-10, "gradient through a split")


# 7 --------------------------------------------------------------------------------------------


def compiles(case: Case, backend: str = "aot_eager") -> None:
    mixer = case.build()
    torch.compiler.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    mask = masks()["inside"]
    for T in (23,) if case.options else (23, 24):  # the second traces again, with T unknown
        x = tokens(4, T, D).requires_grad_()
        found, wanted = compiled(x)[0], mixer(x)[0]
        assert_close(found, wanted, 1e-5, f"compiled, T = {T}")
        weight = tokens(4, T, D, seed=3)
        (a,) = torch.autograd.grad((found * weight).sum(), x)
        (b,) = torch.autograd.grad((wanted * weight).sum(), x)
        assert_close(a, b, 1e-5, f"compiled gradient, T = {T}")
    if mixer.caps.causality != "none":
        x, state = tokens(4, 23, D), mixer.init_state(4)
        found, after = compiled(x, state, Context(mask=mask))
        wanted, reference = mixer(x, state, Context(mask=mask))
        real = mask[..., None]
        assert_close(found * real, wanted * real, 1e-5, "compiled with a state and a mask")
        assert_same_state(after, reference, 1e-5, "compiled with a state and a mask")


def exports(case: Case) -> None:
    mixer, x = case.build(), tokens(2, 20, D)
    program = torch.export.export(mixer, (x,))
    assert_close(program.module()(x)[0], mixer(x)[0], 1e-5, "exported program")


# 8 --------------------------------------------------------------------------------------------

# Autocast rounds the input, the weights and the output of each projection, and a mixer multiplies
# what four or five of them give: six times the budget of a kernel, which rounds once. Of the whole
# tensor: a norm over a head that is nearly zero makes single rows worse in any implementation.
AUTOCAST = {torch.bfloat16: 6 * 4e-3, torch.float16: 6 * 5e-4}


def half_precision(case: Case) -> None:
    mixer, x = case.build(), tokens(2, 100, D)
    wanted = copy.deepcopy(mixer).double()(x.double())[0]
    for dtype, bound in AUTOCAST.items():
        with torch.autocast("cpu", dtype):
            found = mixer(x)[0]
        assert found.isfinite().all()
        error = float(((found - wanted).norm() / wanted.norm()).detach())
        assert error <= bound, f"autocast to {dtype}: {error:.1e} is above {bound:.0e}"
        half = case.build(dtype=dtype)  # all parameters cast, as `model.to(dtype)` does
        y, state = half(x.to(dtype), half.init_state(2) if half.caps.causality != "none" else None)
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert all(s.isfinite().all() for s in floats(state))


def long(case: Case, length: int = 65_536) -> None:
    mixer, x = case.build(), tokens(1, length, D)
    with torch.no_grad():
        y = mixer(x)[0]
    assert y.isfinite().all(), f"not finite at {length} tokens"


def extremes(case: Case) -> None:
    """Inputs that drive gates to 0, to 1 and far beyond; one token over and over."""
    mixer = case.build()
    base = tokens(2, 70, D)
    for what, x in {
        "zero": torch.zeros(2, 70, D),
        "huge": 1e4 * base,
        "tiny": 1e-30 * base,
        "constant": base[:, :1].expand(2, 70, D).contiguous(),
    }.items():
        x = x.requires_grad_()
        y = mixer(x)[0]
        grads = torch.autograd.grad(y.mean(), [x, *mixer.parameters()], allow_unused=True)
        assert y.isfinite().all(), f"{what} input: output is not finite"
        for grad in grads:
            assert grad is None or grad.isfinite().all(), f"{what} input: gradient is not finite"


# 9 --------------------------------------------------------------------------------------------


def rows(case: Case) -> None:
    mixer, x = case.build(), tokens(4, 30, D)
    y = mixer(x)[0]
    order = torch.tensor([2, 0, 3, 1])
    assert_close(mixer(x[order])[0], y[order], 1e-6, "rows in another order")
    assert_close(mixer(x[1:2])[0], y[1:2], 1e-6, "one row alone")
    spoilt = x.clone()
    spoilt[3] = float("nan")
    assert_close(mixer(spoilt)[0][:3], y[:3], 1e-6, "rows beside one that is not a number")
    if mixer.caps.causality != "none":
        state = mixer(x, mixer.init_state(4))[1]
        chosen = type(state)(*(s.index_select(0, order) for s in state)) if state else state
        more = tokens(4, 3, D, seed=2)
        wanted = mixer(more, state)[0][order]
        assert_close(mixer(more[order], chosen)[0], wanted, 1e-6, "states in another order")


def determinism(case: Case) -> None:
    first, second = case.build(), case.build()
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), "the same seed gave other parameters"
    x = tokens(2, 70, D)
    assert torch.equal(first(x)[0], second(x)[0]), "the same seed gave other bits"


# 10 -------------------------------------------------------------------------------------------


def initialises(case: Case) -> None:
    """`reset_parameters` owns every parameter and buffer: what meta devices leave is garbage."""
    made = create_mixer(case.name, D, **case.options)
    with torch.device("meta"):
        shadow = create_mixer(case.name, D, **case.options)
    shadow = shadow.to_empty(device="cpu")
    with torch.no_grad():
        for x in (*shadow.parameters(), *shadow.buffers()):
            x.fill_(float("nan") if x.is_floating_point() else 77)
    for module in shadow.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, p in shadow.named_parameters():
        assert p.isfinite().all(), f"reset_parameters leaves {name} as it was"
    for (name, a), b in zip(shadow.named_buffers(), made.buffers(), strict=True):
        assert torch.equal(a, b), f"reset_parameters leaves buffer {name} as it was"
    tensors = [name for name, v in vars(made).items() if isinstance(v, Tensor)]
    assert not tensors, f"plain tensor attributes {tensors} stay on the meta device"


# 11 -------------------------------------------------------------------------------------------


def costs(case: Case) -> None:
    mixer = case.build()
    parameters = sum(p.numel() for p in mixer.parameters())
    assert mixer.cost(64).parameters == parameters
    with preferring("reference"), FlopCounterMode(display=False) as counter:
        mixer(tokens(1, 64, D))
    assert mixer.cost(64).flops == counter.get_total_flops()
    if mixer.caps.causality == "none":
        return
    for length in (10, 50):
        state = mixer(tokens(1, length, D), mixer.init_state(1))[1]
        assert mixer.cost(length).state_bytes == state_bytes(state), f"state after {length}"


def constancy(case: Case) -> None:
    mixer = case.build()
    if mixer.caps.state not in ("constant", "window"):
        assert mixer.caps.state == "growing" or mixer.init_state(1) == ()
        return
    sizes = set()
    state = mixer.init_state(1)
    for start, end in pairwise((0, 10, 11, 1000, 10_000)):
        with torch.no_grad():
            state = mixer(tokens(1, end - start, D), state)[1]
        sizes.add(state_bytes(state))
    assert len(sizes) == 1, f"declared {mixer.caps.state}, but it held {sorted(sizes)} bytes"


CHECKS = (
    shapes,
    causality,
    prefix,
    law,
    padding,
    packing,
    gradients,
    truncation,
    compiles,
    exports,
    half_precision,
    extremes,
    rows,
    determinism,
    initialises,
    costs,
    constancy,
)
