"""Run one comparison and say what came of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from seqzoo.train.bench.cases import Case
from seqzoo.train.bench.measure import interleaved, training_step
from seqzoo.train.bench.operations import SIZES, Inputs, Run

SECONDS = 5.0  # that either side may take, in all, before it sits out the other rounds
WARM = 64  # tokens of the run that is not measured
COPIED = 1 << 28  # bytes


@dataclass
class Row:
    """A measurement; `ratio` and `met` are None where there is none.

    `floor_ms` is what a copy takes of as many bytes as the computation must read and write.
    """

    kernel: str
    what: str
    tokens: int | None
    ours_ms: float
    other: str
    other_ms: float | None = None
    runs: tuple[int, ...] = ()
    ratio: float | None = None
    words: str = ""
    goal: str = ""
    met: bool | None = None
    note: str = ""
    floor_ms: float | None = None


def copy_speed(device: str) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    x = torch.ones(COPIED // 4, device=device)
    to = torch.empty_like(x)
    ms = interleaved({"copy": lambda: to.copy_(x)}, 9, device)["copy"].ms
    return 2 * COPIED / (ms / 1000)


def compare(
    case: Case, *, repeats: int, device: str, full: bool, speed: float | None = None
) -> Row:
    """Ours and the other in turn, at the same inputs; the floor at so many bytes a second."""
    run = case.operation.run
    tokens = case.tokens if full or not case.short else case.short
    sides = {"ours": _step(case, run, tokens, device)}
    absent = ""
    try:
        other = run if case.load is None else case.load()
    except (ImportError, OSError, AttributeError, KeyError) as error:  # absent, or another version
        absent = f"cannot be had here: {error}"
    else:
        sides["other"] = _step(case, other, tokens if case.load else tokens // 4, device)
    times = interleaved(sides, repeats, device, SECONDS)
    what = "forward, backward" if case.backward else "forward"
    row = Row(case.name, what, tokens, times["ours"].ms, case.other, note=absent)
    row.runs = tuple(t.runs for t in times.values())
    if speed is not None:
        row.floor_ms = 1000 * _moved(case, run, _inputs(case, tokens, device)) / speed
    row.goal = f">= {case.faster:,g} x" if case.faster else f"<= {case.slower:g} x"
    if not absent:
        row.other_ms = times["other"].ms
        _judge(row, case)
    return row


def _judge(row: Row, case: Case) -> None:
    assert row.other_ms is not None
    if case.faster:
        row.ratio = row.other_ms / row.ours_ms
        digits = 0 if row.ratio >= 10 else 1
        row.words, met = f"{row.ratio:,.{digits}f} x as fast", row.ratio >= case.faster
    else:
        row.ratio = row.ours_ms / row.other_ms
        row.words, met = f"{row.ratio:.2f} x the time", row.ratio <= case.slower
    if row.tokens == case.tokens:
        row.met = met
    else:
        row.note = f"the goal is for {case.tokens} tokens: --full"


def _step(case: Case, run: Run, tokens: int, device: str) -> Callable[[], object]:
    """Whatever is set up once is set up by a short run; then the step to measure."""
    _make(case, run, WARM, device)()
    return _make(case, run, tokens, device)


def _make(case: Case, run: Run, tokens: int, device: str) -> Callable[[], object]:
    inputs = _inputs(case, tokens, device)
    if not case.backward:
        return lambda: run(inputs)
    for x in inputs.values():
        x.requires_grad_()
    return training_step(lambda: run(inputs), list(inputs.values()))


def _inputs(case: Case, tokens: int, device: str) -> Inputs:
    """On a GPU what grows with the tokens is bfloat16; parameters stay float32."""
    torch.manual_seed(0)
    kind = device.partition(":")[0]
    with torch.device(device):
        made = case.operation.make(tokens, SIZES[kind])
    if kind == "cpu":
        return made
    return {k: x.bfloat16() if x.ndim > 2 else x for k, x in made.items()}


def _moved(case: Case, run: Run, inputs: Inputs) -> int:
    """Bytes that must be read and written: inputs and output, and in training their gradients.

    The backward pass reads the inputs a second time.
    """
    with torch.no_grad():
        out = run(inputs)
    read = sum(x.numel() * x.element_size() for x in inputs.values())
    written = out.numel() * out.element_size()
    return 3 * read + 2 * written if case.backward else read + written
