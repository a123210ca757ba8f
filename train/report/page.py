"""The page: one HTML file that needs no network, drawn from the CSV files alone."""

import html
from collections.abc import Callable, Sequence
from functools import partial
from string import Template
from typing import NamedTuple

from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from seqzoo.train.report.figures import (
    accuracy_against,
    by_length,
    loss_by_flops,
    rates,
    solve_rates,
)
from seqzoo.train.report.load import Results, Row
from seqzoo.train.report.speed import conditions, speed
from seqzoo.train.report.studies import Study, labels, panels_of, studies_of
from seqzoo.train.report.style import SCRIPT, STYLE
from seqzoo.train.report.swaps import heat_map
from seqzoo.train.report.table import HEADS, shown, summary

PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
<script>$plotly</script>
</head>
<body>
<main>
$body
</main>
<script>$script</script>
</body>
</html>
"""
)


class Drawing(NamedTuple):
    """A figure's place on the page, what to read from it, and how it is drawn."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure | str]


def page(results: Results) -> tuple[str, list[Row]]:
    """The page, and the rows of its table."""
    studies = studies_of(results.rows)
    table = summary(studies, results.timings)
    body = [
        f"<h1>{_text(results.name)}</h1>",
        _facts(studies),
        _verdicts(studies, table),
        *(_section(drawing) for drawing in _drawings(studies, results.speed)),
        _tables(studies, table),
        _failures(studies),
    ]
    whole = PAGE.substitute(
        title=f"{_text(results.name)}: seqzoo report",
        style=STYLE,
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        script=SCRIPT,
        body="\n".join(part for part in body if part),
    )
    return whole, table


def _drawings(studies: Sequence[Study], clocked: Sequence[Row]) -> list[Drawing]:
    against = partial(accuracy_against, studies)
    under = conditions(clocked)
    return [
        Drawing(
            "state",
            "Accuracy against state",
            "Up and to the left is better: the line joins what no other stack beats in both, the "
            "faded ones are beaten. Bars are 95 % t-intervals over seeds. A star is the baseline, "
            "a circle swaps all entries, a square every K-th, an open diamond one. State is "
            "counted at the training length: where it grows with length, "
            "so does its lead or its lag.",
            partial(against, "state_bytes"),
        ),
        Drawing(
            "parameters",
            "Accuracy against parameters",
            "The same against trainable scalars, embedding and head included. Where the grid "
            "matched parameters, the points stand in one column, and width is what gave way.",
            partial(against, "parameters"),
        ),
        Drawing(
            "swaps",
            "One entry swapped at a time",
            "Accuracy of the stack with one entry replaced, less the baseline's with the same seed "
            "(same weights elsewhere, same data). Blue gains, red loses; a star is below p 0.05 "
            "after Holm's correction over all swaps of the task. The interval is in the hover. "
            "With few seeds only large differences can earn a star; none proves nothing.",
            partial(heat_map, studies),
        ),
        Drawing(
            "length",
            "Accuracy beyond the training length",
            "A line that stays level carries what was learned to longer rows; the dashed line is "
            "the training length, the dotted one the floor, which can move with length. Nothing "
            "right of the dashed line was seen in training.",
            partial(by_length, studies),
        ),
        Drawing(
            "solved",
            "How often the task is solved",
            "The share of seeds at 0.99 or more, with Wilson's 95 % interval; a failed seed has "
            "not solved it. Tasks that are found out all at once are told by this, not by a mean. "
            "Not solved means: not within these steps.",
            partial(solve_rates, studies),
        ),
        Drawing(
            "loss",
            "Training loss against FLOPs",
            "Lower at the same FLOPs is the better use of arithmetic; mean over seeds of the loss "
            "since the look before. FLOPs are counted, three forward passes a step, matrix "
            "products alone: they say nothing of seconds.",
            partial(loss_by_flops, studies),
        ),
        Drawing(
            "rates",
            "Sensitivity to the learning rate",
            "The sweep itself: mean over its seeds at the end of training, failed cells as 0. The "
            "large mark is the rate that was chosen, on validation rows. A peak at the edge "
            "of the sweep may lie beyond it.",
            partial(rates, studies),
        ),
        Drawing(
            "throughput",
            "Throughput against length",
            f"Level lines are cost linear in length, falling ones more. {under} Training is "
            "forward and backward, without the optimiser. Crosses at the bottom failed; the hover "
            "says how.",
            partial(speed, clocked, "tokens_per_second"),
        ),
        Drawing(
            "memory",
            "Peak memory against length",
            "The peak resident set (ru_maxrss) of a fresh process for each point, less that of a "
            "process that built the same model and did everything but this pass. For decoding the "
            "cache is filled in pieces of 64 tokens, and counts. What takes less than a few "
            "hundred kB is lost in what the allocator already holds, and is not drawn.",
            partial(speed, clocked, "peak_memory_bytes"),
        ),
    ]


def _section(drawing: Drawing) -> str:
    drawn = drawing.draw()
    if isinstance(drawn, str):
        inner = f'<p class="missing">not drawn: {_text(drawn)}</p>'
    else:
        data = str(drawn.to_json()).replace("<", "\\u003c").replace(">", "\\u003e")
        inner = (
            f'<div class="plot" id="{drawing.name}" style="height:{drawn.layout.height}px"></div>\n'
            f'<script type="application/json" data-for="{drawing.name}">{data}</script>\n'
            f'<p class="caption">{_text(drawing.caption)}</p>'
        )
    return f"<section>\n<h2>{_text(drawing.title)}</h2>\n{inner}\n</section>"


def _facts(studies: Sequence[Study]) -> str:
    cells = {c.about["key"]: c for s in studies for c in s.cells}
    failed = sum(cell.failed for cell in cells.values())
    stages = {study.stage for study in studies}
    match = ", ".join(sorted({c.about["match"] for c in cells.values()}))
    words = (
        f"{len(panels_of(studies))} task(s), {len(labels(studies))} studies, {len(cells)} cells, "
        f"{failed} of them failed. Stacks are matched to the baseline by: {match}."
    )
    parts = [f'<p class="lead">{_text(words)}</p>']
    if "sweep" in stages:
        some = "Some studies have" if "final" in stages else "There are"
        parts.append(
            f'<p class="warning">{some} no fresh seeds: the sweep\'s own seeds at the best rate '
            "stand in. The rate was chosen on those same seeds, so their accuracy leans upwards."
            "</p>"
        )
    return "\n".join(parts)


def _verdicts(studies: Sequence[Study], table: Sequence[Row]) -> str:
    """For each task, in words, what the table says of whole swaps."""
    names, parts = labels(studies), []
    for panel, found in panels_of(studies).items():
        said = [
            f"<li><b>{_text(names[i])}</b> {_text(_sentence(table[i]))}</li>"
            for i, study in enumerate(studies)
            if study in found and study.where != "one"
        ]
        parts.append(f"<h3>{_text(panel)}</h3>\n<ul>{''.join(said)}</ul>")
    return f"<section>\n<h2>In short</h2>\n{''.join(parts)}\n</section>"


def _sentence(row: Row) -> str:
    cells = shown(row, "")
    if row["accuracy"] is None:
        return "failed with every seed"
    words = f"{cells['accuracy']}; {_than(row['against_floor'])} the floor, {cells['floor']}"
    if row["against_baseline"] == "baseline":
        return words
    verdict, _, p = row["against_baseline"].partition(" (")
    return f"{words}; {_than(verdict)} the baseline" + (f" ({p}" if p else "")


def _than(verdict: str) -> str:
    """A verdict of the table, to go before what it is about."""
    ways = {"not told apart": " from", "better": " than", "worse": " than"}
    return verdict + ways.get(verdict, "" if verdict in ("above", "below") else " against")


def _tables(studies: Sequence[Study], table: Sequence[Row]) -> str:
    names, parts = labels(studies), []
    head = "".join(f"<th>{_text(words)}</th>" for words in HEADS.values())
    for panel, found in panels_of(studies).items():
        body = []
        for i, study in enumerate(studies):
            if study in found:
                cells = shown(table[i], names[i])
                body.append("".join(f"<td>{_text(cells[c])}</td>" for c in HEADS))
        rows = "".join(f"<tr>{cells}</tr>\n" for cells in body)
        notes = dict.fromkeys(
            row["floor_how"] for row, s in zip(table, studies, strict=True) if s in found
        )
        how = "; ".join(note for note in notes if note)
        parts.append(
            f'<h3>{_text(panel)}</h3>\n<div class="wide" tabindex="0"><table>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody>\n</table></div>\n"
            + (f'<p class="caption">The floor: {_text(how)}.</p>' if how else "")
        )
    caption = (
        "Means over seeds with 95 % t-intervals, shares with Wilson's; failed seeds are left out "
        "of means and count as not solved. Differences are paired by seed; p is Holm's over all "
        "swaps of the task. (edge): the best rate is the smallest or largest tried. State is after "
        "one row, float32. Seconds and tokens a second are of whole cells, measuring included, "
        "with as many neighbours as the machine had. Peak memory is the whole process's, its "
        "libraries included. Wh is counted where one cell runs at a time, and empty where no "
        "counter was read."
    )
    whole = "\n".join(parts)
    return (
        f'<section>\n<h2>Table</h2>\n{whole}\n<p class="caption">{_text(caption)}</p>\n</section>'
    )


def _failures(studies: Sequence[Study]) -> str:
    names, found = labels(studies), []
    for name, study in zip(names, studies, strict=True):
        for cell in study.cells:
            if cell.failed:
                about = cell.about
                words = f"{study.panel}: {name}, lr {about['lr']:g}, seed {about['seed']}"
                found.append(f"<li>{_text(words)}: {_text(about['reason'])}</li>")
    if not found:
        return ""
    return f"<section>\n<h2>Failed cells</h2>\n<ul>{''.join(found)}</ul>\n</section>"


def _text(words: object) -> str:
    return html.escape(str(words))
