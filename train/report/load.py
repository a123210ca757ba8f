"""The CSV files of a results folder, checked: what is wrong with them is one line."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqzoo.train.ablation.tables import COLUMNS

Row = dict[str, Any]
INTEGERS = (
    "depth",
    "train_length",
    "seed",
    "d_model",
    "parameters",
    "mixer_parameters",
    "state_bytes",
    "flops_per_token",
    "train_flops",
    "steps",
    "length",
)
TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(INTEGERS, int),
    **dict.fromkeys(("lr",), float),
}
OPTIONAL: dict[str, Callable[[str], Any]] = {"layer": int, "step": int, "value": float}
CLOCKS: dict[str, Callable[[str], Any]] = dict.fromkeys(
    ("seconds", "cpu_seconds", "tokens_per_second", "peak_memory_bytes", "energy_wh"), float
)
SPEED = (
    "mixer",
    "where",
    "layer",
    "short_conv",
    "position",
    "channel_mixer",
    "norm",
    "task",
    "phase",
    "length",
    "batch",
    "d_model",
    "ms",
    "runs",
    "tokens_per_second",
    "peak_memory_bytes",
    "threads",
    "processors",
    "load",
    "status",
    "reason",
)
SPEED_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("length", "batch", "d_model", "threads", "processors"), int),
}
SPEED_OPTIONAL: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("layer", "runs"), int),
    **dict.fromkeys(("ms", "tokens_per_second", "peak_memory_bytes", "load"), float),
}


class Results(NamedTuple):
    """What a page is drawn from.

    Attributes:
        name: of the folder.
        rows: of results.csv.
        timings: of timings.csv, by key of the cell; empty when there is no such file.
        speed: of speed.csv; empty when there is no such file.
    """

    name: str
    rows: list[Row]
    timings: dict[str, Row]
    speed: list[Row]


def load(folder: Path) -> Results:
    """Read a results folder.

    Raises:
        ValueError: there is no results.csv, it is empty, or a column or a number is missing.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise ValueError(f"{folder} has no results.csv; `seqzoo ablate` writes one")
    rows = read(path, COLUMNS, TYPES, OPTIONAL)
    if not rows:
        raise ValueError(f"{path} has no rows: no cell of the grid is done yet")
    timings, speed = folder / "timings.csv", folder / "speed.csv"
    clocks = read(timings, ("key",), {}, CLOCKS) if timings.is_file() else []
    fast = read(speed, SPEED, SPEED_TYPES, SPEED_OPTIONAL) if speed.is_file() else []
    return Results(folder.resolve().name, rows, {row["key"]: row for row in clocks}, fast)


def read(
    path: Path,
    columns: Sequence[str],
    needed: Mapping[str, Callable[[str], Any]],
    optional: Mapping[str, Callable[[str], Any]],
) -> list[Row]:
    """Rows of a CSV file with numbers as numbers, an empty optional one as None.

    Raises:
        ValueError: naming the file, the line and the column.
    """
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        head = table.fieldnames or []
        if not head:
            raise ValueError(f"{path} is empty")
        for column in columns:
            if column not in head:
                raise ValueError(f"{path} has no column {column}; it has {', '.join(head)}")
        return [_typed(row, f"{path}, line {table.line_num}", needed, optional) for row in table]


def _typed(
    row: Mapping[Any, Any],
    place: str,
    needed: Mapping[str, Callable[[str], Any]],
    optional: Mapping[str, Callable[[str], Any]],
) -> Row:
    if None in row or None in row.values():
        raise ValueError(f"{place}: another number of cells than the head has")
    made: Row = dict(row)
    for column, text in row.items():
        kind = needed.get(column) or optional.get(column)
        if kind is None:
            continue
        if text == "" and column in optional:
            made[column] = None
            continue
        try:
            made[column] = kind(text)
            if not math.isfinite(made[column]):
                raise ValueError
        except ValueError:
            raise ValueError(f"{place}: {column}={text!r} is not a finite number") from None
    return made
