"""Figures of what was clocked, from speed.csv."""

from collections.abc import Sequence

from plotly.graph_objects import Figure, Scatter

from seqzoo.train.ablation.grid import BASELINE, FACTORS
from seqzoo.train.report.canvas import (
    add,
    at_marks,
    canvas,
    colours,
    dashes,
    line,
    log_axis,
    si,
    text,
)
from seqzoo.train.report.load import Row

PHASES = {
    "forward": "forward pass",
    "train": "training step (forward and backward)",
    "decode": "decoding, one token after that many",
}
KINDS = {
    "tokens_per_second": ("tokens a second", ""),
    "peak_memory_bytes": ("peak memory", "B"),
}


def speed(rows: Sequence[Row], column: str) -> Figure | str:
    """One panel a phase, on logarithmic axes; what failed is a cross at the bottom."""
    if not rows:
        return "there is no speed.csv; `seqzoo report --measure` writes it"
    words, unit = KINDS[column]
    phases = [p for p in PHASES if any(row["phase"] == p and row[column] for row in rows)]
    if not phases:
        return f"speed.csv has no {words}"
    names = labels(rows)
    mixer = {name: row["mixer"] for name, row in zip(names, rows, strict=True)}
    grey = {row["mixer"] for row in rows if row["where"] == BASELINE}
    shade = colours(mixer.values(), grey)
    style = dashes([*mixer], {name: shade[m] for name, m in mixer.items()})
    figure, seen = canvas([PHASES[p] for p in phases], "tokens", words), set[str]()
    for at, phase in enumerate(phases, 1):
        own = [(n, r) for n, r in zip(names, rows, strict=True) if r["phase"] == phase]
        values = [row[column] for _, row in own if row[column]]
        bottom = min(values) / 1.3
        for name in dict.fromkeys(n for n, _ in own):
            mine = sorted((r for n, r in own if n == name), key=lambda r: r["length"])
            good = [r for r in mine if r[column]]
            points = [(r["length"], r[column]) for r in good]
            hover = [f"{name} | {r['length']} tokens | {si(r[column], unit)}{_ms(r)}" for r in good]
            if points:
                trace = line(name, shade[mixer[name]], points, hover, style[name])
                add(figure, trace, at, seen)
            bad = [r for r in mine if r["status"] != "done"]
            if bad:
                figure.add_trace(_crosses(name, shade[mixer[name]], bad, bottom), row=at, col=1)
        lengths = sorted({row["length"] for _, row in own})
        axis = at_marks(log_axis(lengths, "{:,.0f}".format, 2), lengths, "{:,.0f}".format)
        figure.update_xaxes(axis, row=at, col=1)
        axis = log_axis([*values, bottom], lambda v: si(v, unit))
        figure.update_yaxes(axis, row=at, col=1)
    return figure


def conditions(rows: Sequence[Row]) -> str:
    """Under what it was clocked, with a warning where the machine had other work."""
    if not rows:
        return ""
    threads = sorted({row["threads"] for row in rows})
    batches = sorted({row["batch"] for row in rows})
    busiest = max((row["load"] for row in rows if row["load"] is not None), default=None)
    cores = rows[0]["processors"]
    words = f"{_list(threads)} torch thread(s), batch {_list(batches)}, medians."
    if busiest is not None and busiest > cores:
        words += (
            f" The load average was up to {busiest:.1f} on {cores} processors: other work ran "
            "beside it, so trust ratios and slopes, not the figures."
        )
    return words


def labels(rows: Sequence[Row]) -> list[str]:
    """A short name for each row's stack; factors, width and task only where they tell two apart."""
    varied = [f for f in FACTORS if len({row[f] for row in rows}) > 1]
    made = []
    for row in rows:
        where = row["where"] if row["layer"] is None else f"at entry {row['layer']}"
        name = f"{row['mixer']} ({where})"
        made.append(", ".join([name, *(f"{factor} {row[factor]}" for factor in varied)]))
    tasks: dict[str, set[str]] = {}
    for name, row in zip(made, rows, strict=True):
        tasks.setdefault(name, set()).add(row["task"])
    return [
        f"{name}, matched on {row['task']}" if len(tasks[name]) > 1 else name
        for name, row in zip(made, rows, strict=True)
    ]


def _crosses(name: str, colour: str, bad: Sequence[Row], bottom: float) -> Scatter:
    return Scatter(
        x=[row["length"] for row in bad],
        y=[bottom] * len(bad),
        name=text(name),
        legendgroup=text(name),
        showlegend=False,
        mode="markers",
        marker={"symbol": "x", "size": 11, "color": colour},
        hoverinfo="text",
        hovertext=[f"{text(name)}<br>{r['length']} tokens<br>{text(r['reason'])}" for r in bad],
    )


def _ms(row: Row) -> str:
    return "" if row["ms"] is None else f" | {row['ms']:.3g} ms"


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
