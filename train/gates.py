"""The gate table: which mixers must solve which synthetic tasks, and which must not, in a budget.

All are tiny (width 64, one or two mixers) and trained alike: AdamW (0.9, 0.98), weight decay 0.1 on
matrices, 100 steps of warm-up and a cosine to zero, gradients clipped at 1, 32 fresh rows a step.
That a model does not solve a task here is a statement about this budget, not a theorem.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from seqzoo.train.cells import train_cell

ROWS = 1024  # to test on, at each length
WIDTH = 64


class Threshold(NamedTuple):
    """What the accuracy at a length must be: at least, or at most, this share."""

    length: int
    share: float
    at_least: bool

    def holds(self, accuracy: float) -> bool:
        """Whether a measured share is on the right side."""
        return accuracy >= self.share if self.at_least else accuracy <= self.share

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.share:g}"


@dataclass(frozen=True)
class Gate:
    """One cell and what it must come to.

    Attributes:
        suite: the task's name.
        model: what is trained, in words.
        decoder: fields of `DecoderSpec`, besides the width.
        thresholds: all must hold on test rows.
    """

    suite: str
    model: str
    decoder: dict[str, Any]
    thresholds: tuple[Threshold, ...]

    @property
    def solves(self) -> bool:
        """Whether it must reach its thresholds; it then stops as soon as it has."""
        return all(t.at_least for t in self.thresholds)

    def cell(self, *, seed: int = 0, steps: int | None = None, rows: int = ROWS) -> dict[str, Any]:
        """The description for `train_cell`; `steps` instead of the gate's own budget."""
        stop = {t.length: t.share + (1 - t.share) / 4 for t in self.thresholds}
        settings = SUITES[self.suite]
        return {
            **settings,
            "decoder": {"d_model": WIDTH, **self.decoder},
            "seed": seed,
            "steps": settings["steps"] if steps is None else steps,
            "stop": stop if self.solves else {},
            "eval_rows": min(rows, 256),
            "test_rows": rows,
        }


SUITES: dict[str, dict[str, Any]] = {
    "mqar": {
        "task": {
            "name": "mqar",
            "length": 32,
            "pairs": 4,
            "vocab_size": 128,
            "random_filler": False,
        },
        "steps": 600,
        "lr": 4e-3,
    },
    "parity": {
        "task": {"name": "parity", "length": 40, "min_length": 3},
        "lengths": [256],
        "steps": 600,
        "lr": 3e-3,
    },
    "induction": {
        "task": {"name": "induction", "length": 48, "vocab_size": 16},
        "lengths": [192],
        "steps": 600,
        "lr": 4e-3,
    },
    "selective_copying": {
        "task": {"name": "selective_copying", "length": 32, "tokens": 4, "vocab_size": 16},
        "lengths": [64],
        "steps": 1500,
        "lr": 2e-3,  # at 4e-3 one seed in three stays on a plateau
    },
}
SMALL_MAMBA = {
    "pattern": ["mamba"],
    "repeats": 2,
    "options": {"mamba": {"d_state": 8, "expand": 1}},
}
S4D = {"pattern": ["s4d"], "repeats": 2, "options": {"s4d": {"d_state": 16}}}
HYENA = {"pattern": ["hyena"], "repeats": 2, "options": {"hyena": {"max_length": 64}}}
ATTENTION = {"pattern": ["short_conv", "attention"], "repeats": 2, "position": "rope"}


def _deltanet(negative: bool) -> dict[str, Any]:
    options = {"deltanet": {"negative_eigenvalues": negative}, "mlp": {"expand": 2}}
    return {"pattern": ["deltanet", "mlp"], "options": options}


def _at_least(**by_length: float) -> tuple[Threshold, ...]:
    return tuple(Threshold(int(k[1:]), share, True) for k, share in by_length.items())


def _at_most(**by_length: float) -> tuple[Threshold, ...]:
    return tuple(Threshold(int(k[1:]), share, False) for k, share in by_length.items())


GATES = (
    Gate("mqar", "attention + conv 4", ATTENTION, _at_least(L32=0.97)),
    Gate("mqar", "DeltaNet", {"pattern": ["deltanet"], "repeats": 2}, _at_least(L32=0.97)),
    Gate("mqar", "S4D", S4D, _at_most(L32=0.35)),
    Gate("mqar", "Hyena", HYENA, _at_most(L32=0.35)),
    Gate("mqar", "small Mamba", SMALL_MAMBA, _at_most(L32=0.35)),
    Gate("parity", "DeltaNet, beta in (0, 2)", _deltanet(True), _at_least(L40=0.98, L256=0.75)),
    Gate("parity", "DeltaNet, beta in (0, 1)", _deltanet(False), _at_most(L256=0.70)),
    Gate("induction", "small Mamba", SMALL_MAMBA, _at_least(L48=0.97, L192=0.95)),
    Gate("induction", "S4D", S4D, _at_most(L48=0.25)),
    Gate("selective_copying", "small Mamba", SMALL_MAMBA, _at_least(L32=0.95, L64=0.90)),
    Gate("selective_copying", "S4D", S4D, _at_most(L64=0.40)),
)


class Outcome(NamedTuple):
    """A gate, what `train_cell` returned for it, and whether every threshold holds."""

    gate: Gate
    result: dict[str, Any]
    passed: bool

    def record(self) -> dict[str, Any]:
        """As plain data: a line of the results file."""
        thresholds = [t._asdict() for t in self.gate.thresholds]
        about = {**asdict(self.gate), "thresholds": thresholds}
        return {**about, "passed": self.passed, **self.result}


def judge(gate: Gate, result: Mapping[str, Any]) -> Outcome:
    """Compare what was measured on test rows with what is asked for."""
    accuracy = result["accuracy"]
    passed = all(t.holds(accuracy[str(t.length)]) for t in gate.thresholds)
    return Outcome(gate, dict(result), passed)


def run_gates(
    gates: Sequence[Gate],
    *,
    jobs: int = 2,
    seed: int = 0,
    steps: int | None = None,
    rows: int = ROWS,
) -> Iterator[Outcome]:
    """Train and judge; outcomes come as they are finished.

    Args:
        gates: which.
        jobs: processes, each with one torch thread; 1 trains in this process, to the same bits.
        seed: of weights and data.
        steps: instead of each gate's own budget.
        rows: test rows at each length.
    """
    cells = [gate.cell(seed=seed, steps=steps, rows=rows) for gate in gates]
    if jobs == 1:
        yield from (judge(g, train_cell(cell)) for g, cell in zip(gates, cells, strict=True))
        return
    # Spawned, not forked: a fork of a process that has run torch's threads can hang.
    context = get_context("spawn")
    with ProcessPoolExecutor(
        jobs, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        waiting = {pool.submit(train_cell, c): g for g, c in zip(gates, cells, strict=True)}
        try:
            for done in as_completed(waiting):
                yield judge(waiting[done], done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
