"""What all figures share: panels below each other, colours, axes, and text that is only text."""

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from plotly.graph_objects import Figure, Scatter
from plotly.subplots import make_subplots

# Told apart on white and on near-black, and by most people who see few colours.
COLOURS = (
    "#3b82d6",
    "#e0742b",
    "#2a9d6f",
    "#c9559a",
    "#a98b1f",
    "#7a6fe0",
    "#d6504f",
    "#2b9fb0",
    "#8a6a4f",
    "#6f9a2e",
)
GREY = "#8a8a8a"  # of baselines and floors
ROOM, NARROW = 32, 18  # letters of a name in a legend and beside an axis, on a phone
PANEL, HEAD = 300, 46  # pixels of a panel and of what stands above it
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def text(words: object) -> str:
    """As plotly shows it unchanged, whatever it holds: names in a table are not ours."""
    return html.escape(str(words), quote=False).replace("\n", " ")  # it knows no &quot;


def short(words: str, room: int = ROOM) -> str:
    """As much of a name as there is room for; the hover has all of it."""
    return words if len(words) <= room else f"{words[: room - 1]}\u2026"


def si(value: float, unit: str = "") -> str:
    """1234567 as 1.2M; exact up to 999."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}{unit}"
    return f"{value:.3g}{unit}"


def colours(names: Iterable[str], grey: Iterable[str] = ()) -> dict[str, str]:
    """A colour for each name, the same whatever is drawn; round again after ten."""
    left = set(grey)
    others = sorted(set(names) - left)
    made = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    return made | dict.fromkeys(left, GREY)


def canvas(titles: Sequence[str], x: str, y: str, panel: int = PANEL) -> Figure:
    """Panels below each other, which is what fits a phone."""
    n = len(titles)
    height = n * (panel + HEAD) + 50
    figure = make_subplots(
        rows=n,
        cols=1,
        subplot_titles=[text(title) for title in titles],
        vertical_spacing=min(0.9 / n, (HEAD + 46) / height),
    )
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 8, "t": 30, "b": 8},
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1 + 34 / height,
            "yanchor": "bottom",
            "groupclick": "togglegroup",
        },
        hovermode="closest",
    )
    figure.update_annotations(font={"size": 13}, x=0, xanchor="left")
    figure.update_xaxes(
        title={"text": x, "standoff": 6}, automargin=True, zeroline=False, tickangle=0
    )
    figure.update_yaxes(title={"text": y, "standoff": 6}, automargin=True, zeroline=False)
    return figure


def log_axis(
    values: Iterable[float], show: Callable[[float], str], base: int = 10
) -> dict[str, Any]:
    """A logarithmic axis around some values, with three to five round numbers on it.

    Args:
        values: all above 0.
        show: how a number is written.
        base: 10 for 1, 2, 5, 10; 2 for powers of 2.
    """
    found = [*values]
    low, high = math.log10(min(found)), math.log10(max(found))
    pad = max(0.08 * (high - low), 0.06)
    low, high = low - pad, high + pad
    ticks: list[float] = []
    for steps in _steps(base):
        ticks = [tick for tick in steps if low <= math.log10(tick) <= high]
        if len(ticks) >= 3:
            break
    while len(ticks) > 5:
        ticks = ticks[::2]
    if len(ticks) < 3:  # within less than an octave no round numbers are left
        ticks = [10 ** (low + (high - low) * share) for share in (0.15, 0.5, 0.85)]
    shown = [show(tick) for tick in ticks]
    return {"type": "log", "range": [low, high], "tickvals": ticks, "ticktext": shown}


def at_marks(
    axis: dict[str, Any], marks: Sequence[float], show: Callable[[float], str]
) -> dict[str, Any]:
    """The axis with its numbers where the points are, when those are few."""
    if len(marks) > 6:
        return axis
    return axis | {"tickvals": [*marks], "ticktext": [show(mark) for mark in marks]}


def _steps(base: int) -> list[list[float]]:
    if base == 2:
        return [[2.0**k for k in range(-20, 60)]]
    tens = range(-12, 19)
    return [
        [10.0**k for k in tens],
        [m * 10.0**k for k in tens for m in (1, 2, 5)],
        [m * 10.0**k for k in tens for m in (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)],
    ]


def line(
    name: str, colour: str, points: Sequence[tuple[float, float]], hover: Sequence[str], dash: str
) -> Scatter:
    """A line with a mark at each point; `add` gives it its place in the legend."""
    return Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        name=text(short(name)),
        legendgroup=text(name),
        mode="lines+markers",
        line={"color": colour, "dash": dash, "width": 2},
        marker={"size": 7},
        hoverinfo="text",
        hovertext=[text(words).replace(" | ", "<br>") for words in hover],
    )


def add_bars(trace: Scatter, low: Sequence[float | None], high: Sequence[float | None]) -> None:
    """Give each point its interval; None has none."""
    ys = trace.y
    up = [0 if h is None else h - y for y, h in zip(ys, high, strict=True)]
    down = [0 if b is None else y - b for y, b in zip(ys, low, strict=True)]
    trace.error_y = {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "thickness": 1.2,
        "width": 3,
    }


def add(figure: Figure, trace: Scatter, row: int, seen: set[str]) -> None:
    """To a panel; a name stands in the legend once."""
    trace.showlegend = trace.legendgroup not in seen
    seen.add(trace.legendgroup)
    figure.add_trace(trace, row=row, col=1)


def name_axis(names: Sequence[str]) -> dict[str, Any]:
    """An axis with a name at 0, 1, ...; names that look alike when shortened stay apart."""
    shown = [
        "<br>".join(text(short(part, NARROW)) for part in name.replace(" (", "\n(").split("\n"))
        for name in names
    ]
    return {
        "tickvals": [*range(len(names))],
        "ticktext": shown,
        "range": [-0.5, len(names) - 0.5],
        "ticks": "",
    }


def dashes(labels: Sequence[str], colour: Mapping[str, str]) -> dict[str, str]:
    """A line style for each, so that those of one colour can be told apart."""
    used: dict[str, int] = {}
    made = {}
    for label in labels:
        shade = colour[label]
        made[label] = DASHES[used.get(shade, 0) % len(DASHES)]
        used[shade] = used.get(shade, 0) + 1
    return made
