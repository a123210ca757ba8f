"""Stacks of a grid against the clock and in memory, at growing lengths: speed.csv.

Times are medians in one process, every stack's in turn. Memory is that of a fresh process for each
point; a point whose process dies is not clocked, and its row says how it died.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from seqzoo.kernels.errors import unknown
from seqzoo.train.ablation.grid import Grid, Study
from seqzoo.train.ablation.work import reason_of
from seqzoo.train.bench.measure import Timing, interleaved
from seqzoo.train.cells import one_thread
from seqzoo.train.files import write_whole
from seqzoo.train.report.load import SPEED, Row
from seqzoo.train.report.memory import memory_of
from seqzoo.train.report.passes import Stack, build, step_of, tokens

SECONDS = 10.0  # a point that has taken longer in all is repeated no more


class Point(NamedTuple):
    """One row of the table, before it is measured."""

    study: Study
    stack: Stack
    phase: str
    length: int


def clock(
    folder: Path,
    *,
    lengths: Sequence[int],
    batch_size: int = 1,
    repeats: int = 7,
    where: Sequence[str] = (),
) -> Path:
    """Measure every distinct stack of the folder's grid and write speed.csv.

    Args:
        folder: of the results; its grid.json says what is measured.
        lengths: tokens of a pass, or already seen when the next one is decoded.
        batch_size: rows.
        repeats: runs of a median.
        where: measure only these kinds of swap, besides the baseline; all when empty.

    Returns:
        The path of speed.csv.

    Raises:
        ValueError: there is no grid.json, it is damaged, or the grid has no such `where`.
    """
    studies = _distinct(_grid(folder), where)
    rows: list[Row] = []
    stacks = [_stack(study) for study in studies]
    phases = stacks[0].phases  # one grid, one way of reading
    total = len(studies) * len(phases) * len(lengths)
    for length in lengths:
        for phase in phases:
            points = [
                Point(study, stack, phase, length)
                for study, stack in zip(studies, stacks, strict=True)
            ]
            rows += _measured(points, batch_size, repeats)
            _say(f"{len(rows)} of {total} points measured")
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    text = io.StringIO()
    table = csv.DictWriter(text, SPEED, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(folder / "speed.csv", text.getvalue().encode())
    return folder / "speed.csv"


def _grid(folder: Path) -> Grid:
    path = folder / "grid.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no grid.json, which says what to measure")
    try:
        return Grid.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _distinct(grid: Grid, where: Sequence[str]) -> list[Study]:
    """One study for each stack: tasks that share it are measured once, with the first's tokens."""
    for kind in where:
        if kind not in grid.where:
            raise unknown("where of the grid", kind, grid.where)
    found: dict[str, Study] = {}
    for study in grid.studies():
        own = study.variant.where
        if not where or own in (*where, "baseline"):
            found.setdefault(json.dumps(study.variant.decoder, sort_keys=True), study)
    return [*found.values()]


def _stack(study: Study) -> Stack:
    task = study.cell(1e-3, 0).build_task()
    return Stack(study.variant.decoder, task.vocab_size)


def _measured(points: Sequence[Point], batch_size: int, repeats: int) -> Iterator[Row]:
    """Memory first, one process a point, then the clock for those that lived."""
    memory = [memory_of(p.stack, p.phase, p.length, batch_size) for p in points]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with one_thread():
        steps: dict[int, Callable[[], object]] = {}
        reasons = dict(enumerate(m.reason for m in memory))
        for i, point in enumerate(points):
            if not reasons[i]:
                try:
                    steps[i] = _warm(point, batch_size)
                except Exception as error:
                    reasons[i] = reason_of(error)
        times = interleaved(steps, repeats, seconds=SECONDS)
        threads = torch.get_num_threads()
    for i, point in enumerate(points):
        yield {
            **_about(point),
            "batch": batch_size,
            "threads": threads,
            "processors": os.cpu_count() or 1,
            "load": "" if load is None else f"{load:.1f}",
            "status": "failed" if reasons[i] else "done",
            "reason": reasons[i],
            **(_clocked(times[i], point, batch_size) if i in times else {}),
            "peak_memory_bytes": "" if memory[i].bytes is None else memory[i].bytes,
        }


def _warm(point: Point, batch_size: int) -> Callable[[], object]:
    model = build(point.stack)
    ids = tokens(point.stack, batch_size, point.length)
    step = step_of(model, point.phase, ids)
    step()
    return step


def _about(point: Point) -> Row:
    variant = point.study.variant
    return {
        "mixer": variant.mixer,
        "where": variant.where,
        "layer": "" if variant.layer is None else variant.layer,
        **variant.factors,
        "task": point.study.task["name"],
        "phase": point.phase,
        "length": point.length,
        "d_model": variant.decoder["d_model"],
    }


def _clocked(timing: Timing, point: Point, batch_size: int) -> Mapping[str, Any]:
    count = batch_size * (1 if point.phase == "decode" else point.length)
    return {
        "ms": f"{timing.ms:.4f}",
        "runs": timing.runs,
        "tokens_per_second": f"{count / timing.ms * 1000:.1f}",
    }


def _say(words: str) -> None:
    sys.stderr.write(words + ("\x1b[K\r" if sys.stderr.isatty() else "\n"))
    sys.stderr.flush()
