"""Run one comparison and say what came of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from seqzoo.train.bench.cases import Case
from seqzoo.train.bench.measure import interleaved, training_step
from seqzoo.train.bench.operations import Run

SECONDS = 5.0  # that either side may take, in all, before it sits out the other rounds
WARM = 64  # tokens of the run that is not measured


@dataclass
class Row:
    """A measurement; `ratio` and `met` are None where there is none."""

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


def compare(case: Case, *, repeats: int, device: str, full: bool) -> Row:
    """Ours and the other in turn, at the same inputs."""
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
    torch.manual_seed(0)
    with torch.device(device):
        inputs = case.operation.make(tokens)
    if not case.backward:
        return lambda: run(inputs)
    for x in inputs.values():
        x.requires_grad_()
    return training_step(lambda: run(inputs), list(inputs.values()))
