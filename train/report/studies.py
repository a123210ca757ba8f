"""Rows put together again: each stack on each task, its best rate, and the seeds that count."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

from seqzoo.train.ablation.grid import FACTORS
from seqzoo.train.report.load import Row
from seqzoo.train.report.statistics import Interval, Paired, holm, paired, t_interval, wilson

SIGNIFICANT = 0.05
Place = tuple["Panel", str, str, int | None, tuple[str, ...]]


class Panel(NamedTuple):
    """What is comparable: one task, trained at one length."""

    task: str
    length: int

    def __str__(self) -> str:
        return f"{self.task}, trained at {self.length}"


@dataclass(eq=False)
class Measured:
    """One cell: its shared columns and what was measured, by metric, length and step."""

    about: Row
    values: dict[tuple[str, int, int | None], float] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether it came to nothing."""
        return bool(self.about["status"] != "done")

    def curve(self, metric: str, length: int) -> list[tuple[int, float]]:
        """(step, value), by step."""
        found = [(s, v) for (m, n, s), v in self.values.items() if (m, n) == (metric, length) and s]
        return sorted(found)

    def last(self, metric: str, length: int) -> float:
        """The curve's end; 0 for a cell that failed, as where the rate was chosen."""
        found = self.curve(metric, length)
        return found[-1][1] if found and not self.failed else 0.0


@dataclass(eq=False)
class Study:
    """One stack on one task: all its cells."""

    panel: Panel
    mixer: str
    where: str
    layer: int | None
    factors: tuple[str, ...]
    cells: list[Measured]

    @property
    def baseline(self) -> bool:
        """Whether nothing is swapped."""
        return bool(self.cells[0].about["baseline"] == "true")

    @cached_property
    def sweep(self) -> dict[float, float]:
        """Validation accuracy at the end, by rate: the mean of the sweep's seeds, failed ones 0."""
        scores = defaultdict(list)
        for cell in self.cells:
            if cell.about["stage"] == "sweep":
                scores[cell.about["lr"]].append(cell.last("val_accuracy", self.panel.length))
        return {lr: fmean(scores[lr]) for lr in sorted(scores)}

    @cached_property
    def lr(self) -> float:
        """The rate that was best on validation rows; of equals the smallest."""
        if not self.sweep:
            return float(self.cells[0].about["lr"])
        return max(self.sweep, key=lambda lr: (self.sweep[lr], -lr))

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or largest tried: a better one may lie beyond."""
        return len(self.sweep) > 1 and self.lr in (min(self.sweep), max(self.sweep))

    @cached_property
    def stage(self) -> str:
        """`final`, or `sweep` where no fresh seeds are there and the sweep's stand in."""
        final = [c for c in self.cells if c.about["stage"] == "final" and c.about["lr"] == self.lr]
        return "final" if final else "sweep"

    @cached_property
    def counted(self) -> list[Measured]:
        """The cells that count: those of the stage, at the best rate."""
        found = (c for c in self.cells if c.about["stage"] == self.stage)
        return [c for c in found if c.about["lr"] == self.lr]

    @property
    def failures(self) -> int:
        """Of the cells that count."""
        return sum(cell.failed for cell in self.counted)

    def by_seed(self, metric: str, length: int) -> dict[int, float]:
        """Value by seed, of the cells that did not fail."""
        found = ((c.about["seed"], c.values.get((metric, length, None))) for c in self.counted)
        return {seed: value for seed, value in found if value is not None}

    def accuracy(self, length: int | None = None) -> Interval | None:
        """On test rows, at the training length where none is given; None when all failed."""
        values = self.by_seed("accuracy", length or self.panel.length)
        return t_interval([*values.values()]) if values else None

    def lengths(self) -> list[int]:
        """Lengths that were tested."""
        return sorted({n for c in self.counted for m, n, _ in c.values if m == "accuracy"})

    def floor(self, length: int | None = None) -> float | None:
        """The mean of what no model is needed for."""
        values = self.by_seed("floor", length or self.panel.length)
        return fmean(values.values()) if values else None

    @property
    def solved(self) -> Interval:
        """Share of seeds that solved it; one that failed did not."""
        hits = sum(self.by_seed("solved", self.panel.length).values())
        return wilson(round(hits), len(self.counted))

    def cost(self, column: str) -> int:
        """A column that all cells share."""
        return int(self.counted[0].about[column])


class Comparison(NamedTuple):
    """A study against its baseline: the difference by seed, and p with Holm's correction."""

    paired: Paired
    p: float | None

    @property
    def significant(self) -> bool:
        """Whether it holds after Holm's correction."""
        return self.p is not None and self.p < SIGNIFICANT


def studies_of(rows: Iterable[Row]) -> list[Study]:
    """Group rows; the baseline first, then by name.

    Raises:
        ValueError: two cells that the columns cannot tell apart.
    """
    cells: dict[tuple[Any, ...], Measured] = {}
    for row in rows:
        place = (_study(row), row["stage"], row["lr"], row["seed"])
        cell = cells.setdefault(place, Measured(row))
        if cell.about["key"] != row["key"]:
            raise ValueError(
                f"results.csv has two cells of {row['mixer']} ({row['where']}) on {row['task']} at "
                f"lr {row['lr']:g}, seed {row['seed']}: give what differs a name of its own"
            )
        if row["value"] is not None:
            cell.values[row["metric"], row["length"], row["step"]] = row["value"]
        if row["note"]:
            cell.notes[row["length"]] = row["note"]
    groups: dict[Place, list[Measured]] = defaultdict(list)
    for (study, *_), cell in cells.items():
        groups[study].append(cell)
    made = [Study(*place, cells=found) for place, found in groups.items()]
    return sorted(made, key=_order)


def panels_of(studies: Sequence[Study]) -> dict[Panel, list[Study]]:
    """Studies by panel."""
    groups = defaultdict(list)
    for study in studies:
        groups[study.panel].append(study)
    return dict(groups)


def baseline_of(study: Study, studies: Sequence[Study]) -> Study | None:
    """The unswapped stack with the same factors on the same task."""
    place = (study.panel, study.factors)
    found = (s for s in studies if s.baseline and (s.panel, s.factors) == place)
    return next(found, None)


def compare(studies: Sequence[Study]) -> dict[int, Comparison]:
    """Every swap against its baseline, by index; p is Holm's over all swaps of a panel."""
    made: dict[int, Comparison] = {}
    for panel in panels_of(studies):
        found: dict[int, Paired] = {}
        for i, study in enumerate(studies):
            base = baseline_of(study, studies)
            if study.panel != panel or study.baseline or base is None:
                continue
            ours, theirs = (s.by_seed("accuracy", panel.length) for s in (study, base))
            pair = paired(ours, theirs) if base.stage == study.stage else None
            if pair is not None:
                found[i] = pair
        corrected = holm([pair.p for pair in found.values()])
        made |= {i: Comparison(found[i], p) for i, p in zip(found, corrected, strict=True)}
    return made


def labels(studies: Sequence[Study]) -> list[str]:
    """A short name for each; factors only where they vary."""
    varied = [k for k in range(len(FACTORS)) if len({s.factors[k] for s in studies}) > 1]
    made = []
    for study in studies:
        where = f"at entry {study.layer}" if study.layer is not None else study.where
        name = f"{study.mixer} ({where})"
        made.append(", ".join([name, *(f"{FACTORS[k]} {study.factors[k]}" for k in varied)]))
    return made


def _study(row: Row) -> Place:
    factors = tuple(row[factor] for factor in FACTORS)
    panel = Panel(row["task"], row["train_length"])
    return panel, row["mixer"], row["where"], row["layer"], factors


def _order(study: Study) -> tuple[Any, ...]:
    layer = -1 if study.layer is None else study.layer
    place = (study.panel, study.factors)
    return (*place, not study.baseline, study.mixer, study.where, layer)
