"""Forward and backward of the recurrent kernels cost what the papers say: four times T, four times.

The disease this looks for: a loop that indexes `x[:, t]` under autograd makes each step's backward
write a tensor of the whole sequence, so that training is quadratic while inference is not. Three
symptoms: an autograd graph that grows with T, bytes that grow with T squared, and time.
"""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from seqzoo.kernels.decay import decay
from seqzoo.kernels.delta import delta
from seqzoo.kernels.delta_lowrank import delta_lowrank
from seqzoo.kernels.dispatch import BACKENDS
from seqzoo.kernels.long_conv import long_conv
from seqzoo.kernels.maxplus import maxplus
from seqzoo.kernels.scan import scan
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.short_conv import short_conv
from seqzoo.kernels.slstm import slstm
from seqzoo.kernels.ttt import ttt
from seqzoo.kernels.wkv import wkv

FEW, SHORT, LONG = 64, 256, 1024
Run = Callable[[str, int], tuple[Tensor, list[Tensor]]]  # (backend, T) -> output, what it came from


def leaf(*shape: int) -> Tensor:
    return torch.rand(shape).requires_grad_()


def run_scan(backend: str, T: int) -> tuple[Tensor, list[Tensor]]:
    a, b, start = leaf(2, T, 32), leaf(2, T, 32), leaf(2, 32)
    return scan(a, b, initial_state=start, backend=backend)[0], [a, b, start]


def run_selective_scan(backend: str, T: int) -> tuple[Tensor, list[Tensor]]:
    u, dt, B, C = leaf(2, T, 32), leaf(2, T, 32), leaf(2, T, 8), leaf(2, T, 8)
    A, start = leaf(32, 8), leaf(2, 32, 8)
    y, _ = selective_scan(u, dt, -A, B, C, initial_state=start, backend=backend)
    return y, [u, dt, A, B, C, start]


def run_short_conv(backend: str, T: int) -> tuple[Tensor, list[Tensor]]:
    x, weight, bias, start = leaf(2, T, 32), leaf(32, 4), leaf(32), leaf(2, 3, 32)
    mask = torch.ones(2, T, dtype=torch.bool)
    y, _ = short_conv(x, weight, bias, initial_state=start, mask=mask, backend=backend)
    return y, [x, weight, bias, start]


def run_wkv(backend: str, T: int) -> tuple[Tensor, list[Tensor]]:
    k, v, w, u = leaf(2, T, 32), leaf(2, T, 32), leaf(32), leaf(32)
    return wkv(k, v, w, u, backend=backend)[0], [k, v, w, u]


def run_decay(backend: str, T: int) -> tuple[Tensor, list[Tensor]]:
    q, k, v, g = leaf(2, T, 2, 8), leaf(2, T, 2, 8), leaf(2, T, 2, 8), leaf(2, T, 2, 8)
    start = leaf(2, 2, 8, 8)
    return decay(q, k, v, -g, initial_state=start, backend=backend)[0], [q, k, v, g, start]


def run_maxplus(backend: str, T: int) -> tuple[Tensor, list[Tensor]]:
    a, b, start = leaf(2, T, 32), leaf(2, T, 32), leaf(2, 32)
    return maxplus(-a, b, initial_state=start, backend=backend)[0], [a, b, start]


def run_delta(backend: str, T: int) -> tuple[Tensor, list[Tensor]]:
    (q, k, v, g), beta = (leaf(2, T, 2, 8) for _ in range(4)), leaf(2, T, 2)
    start = leaf(2, 2, 8, 8)
    o, _ = delta(q, k / 8, v, beta, -g, initial_state=start, backend=backend)
    return o, [q, k, v, beta, g, start]


def run_delta_lowrank(backend: str, T: int) -> tuple[Tensor, list[Tensor]]:
    (q, k, v, a, b, g), start = (leaf(2, T, 2, 8) for _ in range(6)), leaf(2, 2, 8, 8)
    o, _ = delta_lowrank(q, k, v, -a, b / 8, -g, initial_state=start, backend=backend)
    return o, [q, k, v, a, b, g, start]


def run_long_conv(backend: str, T: int) -> tuple[Tensor, list[Tensor]]:
    u, kernel = leaf(2, T, 32), leaf(32, T)
    return long_conv(u, kernel, backend=backend), [u, kernel]


def run_slstm(backend: str, T: int) -> tuple[Tensor, list[Tensor]]:
    gates, recurrent = leaf(2, T, 4, 2, 8), leaf(4, 2, 8, 8)
    return slstm(gates, recurrent, backend=backend)[0], [gates, recurrent]


def run_ttt(backend: str, T: int) -> tuple[Tensor, list[Tensor]]:
    tokens = [leaf(2, T, 2, 8), leaf(2, T, 2, 8), leaf(2, T, 2, 8), leaf(2, T, 2), leaf(2, T, 2)]
    model, start = [leaf(2, 8, 8), leaf(2, 8), leaf(2, 8), leaf(2, 8)], leaf(2, 2, 2, 9, 8)
    slot = (torch.arange(T) % 16).expand(2, T)
    o, _ = ttt(*tokens, slot, *model, initial_state=start, backend=backend)
    return o, [*tokens, *model, start]


def run_diseased(_: str, T: int) -> tuple[Tensor, list[Tensor]]:
    a, b = leaf(2, T, 32), leaf(2, T, 32)
    h, state = [], torch.zeros(2, 32)
    for t in range(T):
        state = a[:, t] * state + b[:, t]
        h.append(state)
    return torch.stack(h, dim=1), [a, b]


KERNELS = {
    "decay": run_decay,
    "long_conv": run_long_conv,
    "maxplus": run_maxplus,
    "delta": run_delta,
    "delta_lowrank": run_delta_lowrank,
    "scan": run_scan,
    "selective_scan": run_selective_scan,
    "short_conv": run_short_conv,
    "slstm": run_slstm,
    "ttt": run_ttt,
    "wkv": run_wkv,
}
CASES = [
    pytest.param(run, backend.name, id=f"{name}-{backend.name}")
    for name, run in KERNELS.items()
    for backend in BACKENDS[name]
    if backend.name in ("native", "chunked") and not backend.refusal("cpu", torch.float32, ())
]


def nodes(y: Tensor) -> int:
    """Size of the autograd graph behind `y`."""
    seen, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [after for after, _ in node.next_functions]
    return len(seen)


def both_ways(run: Run, backend: str, T: int) -> None:
    y, sources = run(backend, T)
    torch.autograd.grad(y.sum(), sources)


def allocated(run: Run, backend: str, T: int) -> int:
    """Bytes that the operators of a forward and a backward pass ask for."""
    both_ways(run, backend, T)  # whatever is set up once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        both_ways(run, backend, T)
    return sum(max(event.self_cpu_memory_usage, 0) for event in watched.events())


def seconds(run: Run, backend: str, T: int) -> float:
    taken = []
    for _ in range(5):
        start = time.process_time()
        both_ways(run, backend, T)
        taken.append(time.process_time() - start)
    return min(taken)


@pytest.mark.parametrize(("run", "backend"), CASES)
def test_the_autograd_graph_does_not_grow_with_the_sequence(run, backend):
    assert nodes(run(backend, LONG)[0]) == nodes(run(backend, SHORT)[0])


@pytest.mark.parametrize(("run", "backend"), CASES)
def test_four_times_the_sequence_takes_four_times_the_bytes(run, backend):
    assert allocated(run, backend, SHORT) <= 4.5 * allocated(run, backend, FEW)


@pytest.mark.parametrize(("run", "backend"), CASES)
def test_four_times_the_sequence_takes_less_than_eight_times_as_long(run, backend):
    both_ways(run, backend, SHORT)
    ratios = []
    for _ in range(3):  # a busy machine may spoil one measurement, not three
        ratios.append(seconds(run, backend, LONG) / seconds(run, backend, SHORT))
        if ratios[-1] <= 8:
            return
    pytest.fail(f"time(4T) / time(T) = {min(ratios):.1f}")


def test_the_disease_shows_in_graph_and_bytes():
    assert nodes(run_diseased("", SHORT)[0]) > 3 * nodes(run_diseased("", FEW)[0])
    assert allocated(run_diseased, "", SHORT) > 9 * allocated(run_diseased, "", FEW)
