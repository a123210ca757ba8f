"""Run a grid: sweep the learning rates, choose one for each stack and task, then fresh seeds."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from seqzoo.train.ablation.cluster import run_ray
from seqzoo.train.ablation.grid import Grid, Study
from seqzoo.train.ablation.local import run_local
from seqzoo.train.ablation.store import Store
from seqzoo.train.ablation.tables import final_accuracy, write_tables
from seqzoo.train.cells import Cell
from seqzoo.train.files import write_whole

Backend = Callable[[Mapping[str, dict[str, Any]], int], Iterator[tuple[str, dict[str, Any]]]]
BACKENDS: dict[str, Backend] = {"local": run_local, "ray": run_ray}
TABLES_EVERY = 30.0  # seconds


def run_grid(
    grid: Grid,
    folder: Path,
    *,
    backend: str = "local",
    workers: int = 2,
    retry_failed: bool = False,
    progress: bool = True,
) -> Path:
    """Train what is not trained yet and write the tables; the path of results.csv.

    A cell that is on disk is not trained again, whoever trained it: the same command goes on where
    a killed one was.
    """
    studies = grid.studies()
    store = Store(folder)
    if retry_failed:
        store.forget_failures()
    write_whole(folder / "grid.json", (json.dumps(grid.to_dict(), indent=1) + "\n").encode())
    sweep = [s.cell(lr, seed) for s in studies for lr in grid.lrs for seed in grid.sweep_seeds]
    finals = len(studies) * len(grid.final_seeds)
    bar = Progress(len({c.key() for c in sweep}) + finals, workers, progress)
    tables = partial(write_tables, grid, studies, store)
    try:
        _train(sweep, store, backend, workers, bar, tables)
        best = best_rates(grid, studies, store.done)
        fresh = [
            s.cell(lr, seed)
            for s, lr in zip(studies, best, strict=True)
            if lr is not None
            for seed in grid.final_seeds
        ]
        _train(fresh, store, backend, workers, bar, tables)
    finally:
        tables()
        bar.close()
    return folder / "results.csv"


def best_rates(
    grid: Grid, studies: Sequence[Study], done: Mapping[str, dict[str, Any]]
) -> list[float | None]:
    """For each study the rate whose seeds were best on validation rows; None when all failed.

    A failed seed counts as 0; of equals the smaller rate.
    """
    best: list[float | None] = []
    for study in studies:
        scores: dict[float, float] = {}
        for lr in sorted(grid.lrs):
            cells = [study.cell(lr, seed) for seed in grid.sweep_seeds]
            records = [done.get(cell.key()) for cell in cells]
            if all(r is None or r["status"] == "failed" for r in records):
                continue
            found = [final_accuracy(r, c) for r, c in zip(records, cells, strict=True)]
            scores[lr] = sum(found) / len(found)
        best.append(max(scores, key=lambda lr: scores[lr]) if scores else None)
    return best


def _train(
    cells: Iterable[Cell],
    store: Store,
    backend: str,
    workers: int,
    bar: "Progress",
    tables: Callable[[], None],
) -> None:
    wanted = {cell.key(): cell.to_dict() for cell in cells}
    missing = {key: cell for key, cell in wanted.items() if key not in store.done}
    bar.found(len(wanted) - len(missing))
    written = time.monotonic()
    if not missing:
        return
    for key, record in BACKENDS[backend](missing, workers):
        store.add(key, record)
        bar.add(record)
        if time.monotonic() - written > TABLES_EVERY:
            tables()
            written = time.monotonic()


class Progress:
    """A line on standard error that says how far it is, and when it will be done."""

    def __init__(self, total: int, workers: int, shown: bool) -> None:
        self.total, self.workers, self.shown = total, workers, shown
        self.there = self.trained = self.failures = 0
        self.begun = time.monotonic()

    def found(self, count: int) -> None:
        """Cells that were on disk."""
        self.there += count
        self._show()

    def add(self, record: Mapping[str, Any]) -> None:
        """A cell that came back."""
        self.trained += 1
        self.failures += record["status"] == "failed"
        self._show()

    def close(self) -> None:
        """End the line."""
        if self.shown and sys.stderr.isatty():
            sys.stderr.write("\n")

    def _show(self) -> None:
        if not self.shown:
            return
        done = self.there + self.trained
        words = f"{done} of {self.total} cells"
        if self.there:
            words += f", {self.there} of them were there"
        if self.failures:
            words += f", {self.failures} failed"
        if self.trained and done < self.total:
            left = (time.monotonic() - self.begun) / self.trained * (self.total - done)
            words += f", about {_duration(left)} left"
        end = "\x1b[K\r" if sys.stderr.isatty() else "\n"
        sys.stderr.write(words + end)
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
