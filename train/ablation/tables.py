"""results.csv, which holds no clock and is the same for every run, and timings.csv, which does."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from seqzoo.train.ablation.grid import BASELINE, FACTORS, Grid, Study
from seqzoo.train.ablation.match import Figures, figures
from seqzoo.train.ablation.store import Store
from seqzoo.train.cells import Cell
from seqzoo.train.files import write_whole

SOLVED = 0.99  # accuracy at the training length
COLUMNS = (
    "key",
    "stage",
    "baseline",
    "mixer",
    "where",
    "layer",
    "depth",
    "task",
    "train_length",
    "lr",
    "seed",
    *FACTORS,
    "match",
    "d_model",
    "parameters",
    "mixer_parameters",
    "state_bytes",
    "flops_per_token",
    "train_flops",
    "steps",
    "status",
    "reason",
    "metric",
    "length",
    "step",
    "value",
    "note",
)
METERS = ("peak_memory_bytes", "energy_wh")
TIMINGS = ("key", "worker", "seconds", "cpu_seconds", "tokens_per_second", *METERS)
Row = dict[str, Any]


def write_tables(grid: Grid, studies: Sequence[Study], store: Store) -> None:
    """Both tables, from the grid and the cells that are done."""
    counted: dict[str, Figures] = {}
    rows: list[Row] = []
    clocks: dict[str, Row] = {}
    for study in studies:
        name = str((study.variant.decoder, study.task))
        for stage, cell in _cells(grid, study):
            record = store.done.get(cell.key())
            if record is None:
                continue
            if name not in counted:
                counted[name] = figures(study.variant.decoder, study.task)
            about = _about(grid, study, stage, cell, record, counted[name])
            rows += [{**about, **measured} for measured in _measured(record, cell)]
            if record["status"] == "done":
                clocks[cell.key()] = _clock(cell, record)
    write_whole(store.folder / "results.csv", _text(COLUMNS, rows))
    write_whole(store.folder / "timings.csv", _text(TIMINGS, [clocks[k] for k in sorted(clocks)]))


def final_accuracy(record: Mapping[str, Any] | None, cell: Cell) -> float:
    """On validation rows at the training length, after the last step; 0 when it failed."""
    if record is None or record["status"] == "failed":
        return 0.0
    own = str(cell.build_task().length)
    return float(record["result"]["curve"][-1]["accuracy"][own])


def _cells(grid: Grid, study: Study) -> Iterator[tuple[str, Cell]]:
    """The sweep's, then fresh seeds at every rate: only those of the best are on disk."""
    for stage, seeds in (("sweep", grid.sweep_seeds), ("final", grid.final_seeds)):
        for lr in grid.lrs:
            for seed in seeds:
                yield stage, study.cell(lr, seed)


def _about(
    grid: Grid, study: Study, stage: str, cell: Cell, record: Mapping[str, Any], cost: Figures
) -> Row:
    """The columns that all rows of a cell share."""
    variant, length = study.variant, cell.build_task().length
    steps = record["result"]["steps"] if record["status"] == "done" else cell.steps
    return {
        "key": cell.key(),
        "stage": stage,
        "baseline": str(variant.where == BASELINE).lower(),
        "mixer": variant.mixer,
        "where": variant.where,
        "layer": "" if variant.layer is None else variant.layer,
        "depth": len(variant.decoder["pattern"]),
        "task": study.task["name"],
        "train_length": length,
        "lr": f"{cell.lr:g}",
        "seed": cell.seed,
        **variant.factors,
        "match": grid.match,
        "d_model": variant.decoder["d_model"],
        "parameters": cost.parameters,
        "mixer_parameters": cost.mixer_parameters,
        "state_bytes": cost.state_bytes,
        "flops_per_token": cost.flops // length,
        "train_flops": 3 * cost.flops * cell.batch_size * steps,
        "steps": steps,
        "status": record["status"],
        "reason": record["reason"],
    }


def _measured(record: Mapping[str, Any], cell: Cell) -> Iterator[Row]:
    """The rows of a cell: one each for a metric, at a length, after a step."""
    if record["status"] == "failed":
        yield {"metric": "accuracy", "length": cell.build_task().length}
        return
    result, own = record["result"], str(cell.build_task().length)
    for length, value in sorted(result["accuracy"].items(), key=lambda item: int(item[0])):
        floor = result["floor"][length]
        yield {"metric": "accuracy", "length": length, "value": value}
        yield {
            "metric": "floor",
            "length": length,
            "value": floor["accuracy"],
            "note": floor["how"],
        }
    solved = [look["step"] for look in result["curve"] if look["accuracy"][own] >= SOLVED]
    yield {"metric": "solved", "length": own, "value": float(result["accuracy"][own] >= SOLVED)}
    if solved:
        yield {"metric": "steps_to_solve", "length": own, "value": solved[0]}
    for look in result["curve"]:
        yield {"metric": "train_loss", "length": own, "step": look["step"], "value": look["loss"]}
        for length, value in sorted(look["accuracy"].items(), key=lambda item: int(item[0])):
            yield {
                "metric": "val_accuracy",
                "length": length,
                "step": look["step"],
                "value": value,
            }


def _clock(cell: Cell, record: Mapping[str, Any]) -> Row:
    result = record["result"]
    tokens = result["steps"] * cell.batch_size * cell.build_task().length
    return {
        "key": cell.key(),
        "worker": record["worker"],
        "seconds": f"{result['seconds']:.3f}",
        "cpu_seconds": f"{result['cpu_seconds']:.3f}",
        "tokens_per_second": f"{tokens / result['seconds']:.1f}",
        **{name: record.get(name) for name in METERS},
    }


def _text(columns: Sequence[str], rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()
