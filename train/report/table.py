"""The table: a row a stack and task, as plain values for summary.csv and as text for the page."""

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from seqzoo.train.ablation.grid import FACTORS
from seqzoo.train.report.canvas import si
from seqzoo.train.report.load import Row
from seqzoo.train.report.studies import Comparison, Study, compare

COLUMNS = (
    "task",
    "train_length",
    "mixer",
    "where",
    "layer",
    *FACTORS,
    "match",
    "d_model",
    "parameters",
    "mixer_parameters",
    "state_bytes",
    "flops_per_token",
    "train_flops",
    "steps",
    "tokens",
    "seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "energy_wh",
    "stage",
    "lr",
    "lr_at_edge",
    "seeds",
    "failed",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "floor",
    "floor_how",
    "solve_rate",
    "solve_low",
    "solve_high",
    "median_steps_to_solve",
    "difference",
    "difference_low",
    "difference_high",
    "pairs",
    "p_holm",
    "against_floor",
    "against_baseline",
)
HEADS = {
    "mixer": "mixer",
    "accuracy": "accuracy",
    "floor": "floor",
    "against_floor": "against the floor",
    "difference": "less the baseline",
    "against_baseline": "against the baseline",
    "solve_rate": "solved",
    "seeds": "seeds",
    "lr": "best lr",
    "d_model": "width",
    "parameters": "parameters",
    "mixer_parameters": "of mixers",
    "state_bytes": "state",
    "flops_per_token": "FLOPs / token",
    "train_flops": "training FLOPs",
    "steps": "steps",
    "tokens": "tokens",
    "seconds": "seconds",
    "tokens_per_second": "tokens / s",
    "peak_memory_bytes": "peak memory",
    "energy_wh": "Wh",
}


def summary(studies: Sequence[Study], timings: Mapping[str, Row]) -> list[Row]:
    """One row a study; None where a value is not to be had, never 0."""
    compared = compare(studies)
    return [_row(study, compared.get(i), timings) for i, study in enumerate(studies)]


def as_csv(rows: Sequence[Row]) -> bytes:
    """summary.csv."""
    out = io.StringIO()
    table = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows({k: _plain(v) for k, v in row.items()} for row in rows)
    return out.getvalue().encode()


def shown(row: Row, name: str) -> dict[str, str]:
    """The cells of the page's table, as text."""
    total, failed = row["seeds"], row["failed"]
    seeds = f"{total}" + (f" ({failed} failed)" if failed else "")
    made = {
        "mixer": name,
        "accuracy": _interval(row, "accuracy"),
        "floor": _number(row["floor"], "{:.3f}"),
        "against_floor": row["against_floor"],
        "difference": _interval(row, "difference", "{:+.3f}"),
        "against_baseline": row["against_baseline"],
        "solve_rate": _interval(row, "solve_rate", "{:.2f}", "solve"),
        "seeds": seeds + (", of the sweep" if row["stage"] == "sweep" else ""),
        "lr": f"{row['lr']:g}" + (" (edge)" if row["lr_at_edge"] else ""),
        "d_model": f"{row['d_model']}",
        "steps": f"{row['steps']:,}",
        "seconds": _number(row["seconds"], "{:.1f}"),
        "energy_wh": _number(row["energy_wh"], "{:.3g}"),
        "state_bytes": si(row["state_bytes"], "B"),
        "peak_memory_bytes": _bytes(row["peak_memory_bytes"]),
    }
    for column in HEADS:
        if column not in made:
            made[column] = "" if row[column] is None else si(row[column])
    return made


def _row(study: Study, compared: Comparison | None, timings: Mapping[str, Row]) -> Row:
    about, panel = study.counted[0].about, study.panel
    mean, floor, solved = study.accuracy(), study.floor(), study.solved
    steps = study.by_seed("steps_to_solve", panel.length).values()
    notes = [c.notes[panel.length] for c in study.counted if panel.length in c.notes]
    pair = None if compared is None else compared.paired
    clocks = [timings[c.about["key"]] for c in study.counted if c.about["key"] in timings]
    return {
        "task": panel.task,
        "train_length": panel.length,
        "mixer": study.mixer,
        "where": study.where,
        "layer": study.layer,
        **dict(zip(FACTORS, study.factors, strict=True)),
        **{c: about[c] for c in ("match", "d_model", "parameters", "mixer_parameters")},
        **{c: about[c] for c in ("state_bytes", "flops_per_token", "train_flops", "steps")},
        "tokens": tokens(about),
        "seconds": _of(clocks, "seconds", fmean),
        "tokens_per_second": _of(clocks, "tokens_per_second", median),
        "peak_memory_bytes": _of(clocks, "peak_memory_bytes", max),
        "energy_wh": _of(clocks, "energy_wh", fmean),
        "stage": study.stage,
        "lr": study.lr,
        "lr_at_edge": study.at_edge,
        "seeds": len(study.counted),
        "failed": study.failures,
        "accuracy": None if mean is None else mean.mean,
        "accuracy_low": None if mean is None else mean.low,
        "accuracy_high": None if mean is None else mean.high,
        "floor": floor,
        "floor_how": notes[0] if notes else None,
        "solve_rate": solved.mean,
        "solve_low": solved.low,
        "solve_high": solved.high,
        "median_steps_to_solve": median(steps) if steps else None,
        "difference": None if pair is None else pair.difference.mean,
        "difference_low": None if pair is None else pair.difference.low,
        "difference_high": None if pair is None else pair.difference.high,
        "pairs": None if pair is None else pair.pairs,
        "p_holm": None if compared is None else compared.p,
        "against_floor": against_floor(study),
        "against_baseline": "baseline" if study.baseline else against_baseline(compared),
    }


def tokens(about: Row) -> int | None:
    """Of the whole training: from its FLOPs, which are 3 x forward x batch x steps."""
    whole = about["train_length"] * about["steps"]
    if not about["flops_per_token"] or not whole:
        return None
    batch = round(about["train_flops"] / (3 * about["flops_per_token"] * whole))
    return int(batch * whole)


def against_floor(study: Study) -> str:
    """Whether the interval of the mean lies above what needs no model."""
    mean, floor = study.accuracy(), study.floor()
    if mean is None or floor is None:
        return "failed"
    if mean.low is None or mean.high is None:
        return "one seed: no verdict"
    if mean.low > floor:
        return "above"
    return "below" if mean.high < floor else "not told apart"


def against_baseline(compared: Comparison | None) -> str:
    """Whether the paired difference is one, after Holm's correction."""
    if compared is None:
        return "nothing to pair with"
    if compared.p is None:
        return "one seed: no verdict"
    p = "p < 0.001" if compared.p < 0.001 else f"p {compared.p:.3f}"
    if not compared.significant:
        return f"not told apart ({p})"
    return f"{'better' if compared.paired.difference.mean > 0 else 'worse'} ({p})"


def _of(clocks: Sequence[Row], column: str, how: Any) -> float | None:  # noqa: ANN401
    values = [row[column] for row in clocks if row.get(column) is not None]
    return float(how(values)) if values else None


def _interval(row: Row, column: str, form: str = "{:.3f}", bounds: str = "") -> str:
    value, low, high = (row[c] for c in (column, *_bounds(bounds or column)))
    if value is None:
        return ""
    if low is None:
        return form.format(value)
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]"


def _bounds(name: str) -> tuple[str, str]:
    return f"{name}_low", f"{name}_high"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _bytes(value: float | None) -> str:
    return "" if value is None else si(value, "B")


def _plain(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else value
