"""Train the gate table: tiny models that must solve a synthetic task, and others that must not.

Prints accuracy on fresh test rows against its threshold, beside the floor that needs no model at
all, and writes a JSON line a model. Ends with exit code 1 when a threshold does not hold.
Models that must solve stop as soon as they do; the others use up their budget.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.train.commands.list import table

if TYPE_CHECKING:
    from seqzoo.train.gates import Outcome

HEAD = ("task", "model", "length", "accuracy", "needed", "floor", "steps", "seconds", "cpu", "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which, and how."""
    parser.add_argument("--only", default="", help="tasks, comma-separated (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each (2)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (0)")
    parser.add_argument("--steps", type=int, help="of every model, instead of its own budget")
    parser.add_argument("--rows", type=int, default=1024, help="test rows at each length (1024)")
    parser.add_argument("--out", type=Path, default=Path("runs/gates.jsonl"), help="file to write")


def run(arguments: argparse.Namespace) -> None:
    """Train, print, write.

    Raises:
        SystemExit: with code 1, when a threshold does not hold.
    """
    from seqzoo.train.gates import GATES, SUITES, run_gates

    check_positive(jobs=arguments.jobs, rows=arguments.rows)
    if arguments.steps is not None:
        check_positive(steps=arguments.steps)
    names = [name for name in arguments.only.split(",") if name] or list(SUITES)
    for name in names:
        if name not in SUITES:
            raise unknown("gate for a task named", name, SUITES)
    gates = [gate for gate in GATES if gate.suite in names]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    begun, outcomes = time.perf_counter(), []
    with arguments.out.open("w") as file:
        for outcome in run_gates(
            gates,
            jobs=arguments.jobs,
            seed=arguments.seed,
            steps=arguments.steps,
            rows=arguments.rows,
        ):
            outcomes.append(outcome)
            file.write(json.dumps(outcome.record()) + "\n")
            file.flush()
            sys.stderr.write(f"{len(outcomes)} of {len(gates)} done\n")
    outcomes.sort(key=lambda outcome: gates.index(outcome.gate))
    sys.stdout.write(report(outcomes))
    good = sum(outcome.passed for outcome in outcomes)
    sys.stdout.write(
        f"\n{good} of {len(gates)} as they should be, in {time.perf_counter() - begun:.0f} s with "
        f"{arguments.jobs} process(es); {arguments.out}\n"
    )
    if good < len(gates):
        raise SystemExit(1)


def report(outcomes: "Sequence[Outcome]") -> str:
    """A row for each threshold."""
    rows: list[tuple[str, ...]] = [HEAD]
    for gate, result, _ in outcomes:
        for i, threshold in enumerate(gate.thresholds):
            accuracy = result["accuracy"][str(threshold.length)]
            own = (str(result["steps"]), f"{result['seconds']:.0f}", f"{result['cpu_seconds']:.0f}")
            rows.append(
                (
                    gate.suite,
                    gate.model,
                    str(threshold.length),
                    f"{accuracy:.3f}",
                    str(threshold),
                    f"{result['floor'][str(threshold.length)]['accuracy']:.3f}",
                    *(own if i == 0 else ("", "", "")),
                    "yes" if threshold.holds(accuracy) else "NO",
                )
            )
    return table(rows)
