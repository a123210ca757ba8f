"""Figures of what was learned; each function returns a figure, or in words why there is none."""

from collections.abc import Sequence
from statistics import fmean, median

from plotly.graph_objects import Figure, Scatter

from seqzoo.train.report.canvas import (
    GREY,
    add,
    add_bars,
    at_marks,
    canvas,
    colours,
    dashes,
    line,
    log_axis,
    name_axis,
    si,
    text,
)
from seqzoo.train.report.statistics import pareto, t_interval
from seqzoo.train.report.studies import Study, labels, panels_of

ACCURACY = {"range": [-0.04, 1.06], "tickvals": [0, 0.25, 0.5, 0.75, 1]}
COSTS = {
    "state_bytes": ("bytes of state after a row, float32", "B"),
    "parameters": ("parameters", ""),
}
SYMBOLS = {"baseline": "star", "all": "circle", "one": "diamond-open"}


def accuracy_against(studies: Sequence[Study], cost: str) -> Figure | str:
    """Accuracy against a cost, the Pareto front drawn, what it beats faded."""
    drawn = [s for s in studies if s.accuracy()]
    if not drawn:
        return "no cell has an accuracy"
    if not any(s.cost(cost) for s in drawn):
        return "no stack carries a state: they read both ways (`causal: false`)"
    words, unit = COSTS[cost]
    panels, names, shade = panels_of(drawn), dict(_named(studies)), _shades(studies)
    figure, seen = canvas([str(p) for p in panels], words, "accuracy"), set[str]()
    for row, (_, found) in enumerate(panels.items(), 1):
        points = [(float(max(s.cost(cost), 1)), _mean(s)) for s in found]
        front = pareto(points)
        stairs = [points[i] for i in front]
        figure.add_trace(
            Scatter(
                x=[x for x, _ in stairs],
                y=[y for _, y in stairs],
                name="Pareto front",
                legendgroup="front",
                showlegend=row == 1,
                mode="lines",
                line={"color": GREY, "shape": "hv", "width": 1.5},
                hoverinfo="skip",
            ),
            row=row,
            col=1,
        )
        for i, (study, point) in enumerate(zip(found, points, strict=True)):
            interval = study.accuracy()
            assert interval is not None
            hover = f"{names[id(study)]} | {interval} | {si(study.cost(cost), unit)}"
            hover += " | on the front" if i in front else ""
            trace = line(study.mixer, shade[study.mixer], [point], [hover], "solid")
            trace.mode, trace.opacity = "markers", 1 if i in front else 0.55
            symbol = SYMBOLS.get(study.where, "square")
            trace.marker = {"size": 11, "symbol": symbol, "color": shade[study.mixer]}
            add_bars(trace, [interval.low], [interval.high])
            add(figure, trace, row, seen)
        _draw_floor(figure, found, row)
        figure.update_xaxes(log_axis([x for x, _ in points], lambda v: si(v, unit)), row=row, col=1)
    return figure.update_yaxes(ACCURACY)


def by_length(studies: Sequence[Study]) -> Figure | str:
    """Accuracy at lengths other than the training length."""
    drawn = [s for s in _whole(studies) if len(s.lengths()) > 1 and s.accuracy()]
    if not drawn:
        return "every task was tested at its training length alone (`lengths` of a task adds more)"
    panels, names, shade = panels_of(drawn), dict(_named(studies)), _shades(studies)
    style = _styles(studies)
    figure = canvas([str(p) for p in panels], "length of the test rows", "accuracy")
    seen = set[str]()
    for row, (panel, found) in enumerate(panels.items(), 1):
        for study in found:
            intervals = [(n, study.accuracy(n)) for n in study.lengths()]
            kept = [(n, i) for n, i in intervals if i is not None]
            name = names[id(study)]
            trace = line(
                name,
                shade[study.mixer],
                [(n, i.mean) for n, i in kept],
                [f"{name} | length {n} | {i}" for n, i in kept],
                style[name],
            )
            add_bars(trace, [i.low for _, i in kept], [i.high for _, i in kept])
            add(figure, trace, row, seen)
        lengths = sorted({n for s in found for n in s.lengths()})
        floors = {n: [f for s in found if (f := s.floor(n)) is not None] for n in lengths}
        level = [(float(n), fmean(f)) for n, f in floors.items() if f]
        hover = [f"floor {value:.3f} | length {n:g}" for n, value in level]
        trace = line("floor", GREY, level, hover, "dot")
        trace.mode = "lines"
        add(figure, trace, row, seen)
        figure.add_vline(
            x=panel.length, line={"color": GREY, "dash": "dash", "width": 1}, row=row, col=1
        )
        figure.update_xaxes(
            at_marks(log_axis(lengths, "{:,.0f}".format, 2), lengths, "{:,.0f}".format),
            row=row,
            col=1,
        )
    return figure.update_yaxes(ACCURACY)


def loss_by_flops(studies: Sequence[Study]) -> Figure | str:
    """The training curve against what it cost, the mean of the seeds."""
    drawn = [(s, points) for s in _whole(studies) if (points := _losses(s))]
    if not drawn:
        return "no cell has a training curve"
    panels, names, shade = panels_of([s for s, _ in drawn]), dict(_named(studies)), _shades(studies)
    style, curves = _styles(studies), {id(s): points for s, points in drawn}
    figure, seen = canvas([str(p) for p in panels], "training FLOPs", "training loss"), set[str]()
    for row, (_, found) in enumerate(panels.items(), 1):
        for study in found:
            name, points = names[id(study)], curves[id(study)]
            hover = [f"{name} | step {s} | loss {y:.4f} | {si(x)} FLOPs" for s, x, y in points]
            xy = [(x, y) for _, x, y in points]
            add(figure, line(name, shade[study.mixer], xy, hover, style[name]), row, seen)
        xs = [x for s in found for _, x, _ in curves[id(s)]]
        figure.update_xaxes(log_axis(xs, si), row=row, col=1)
    return figure


def rates(studies: Sequence[Study]) -> Figure | str:
    """What the sweep found at each learning rate."""
    drawn = [s for s in _whole(studies) if len(s.sweep) > 1]
    if not drawn:
        return "the sweep has one learning rate"
    panels, names, shade = panels_of(drawn), dict(_named(studies)), _shades(studies)
    style = _styles(studies)
    figure = canvas([str(p) for p in panels], "learning rate", "validation accuracy")
    seen = set[str]()
    for row, (_, found) in enumerate(panels.items(), 1):
        for study in found:
            name, points = names[id(study)], [*study.sweep.items()]
            best = [f" | chosen{_edge(study)}" if lr == study.lr else "" for lr, _ in points]
            hover = [
                f"{name} | lr {lr:g} | {v:.3f}{b}" for (lr, v), b in zip(points, best, strict=True)
            ]
            trace = line(name, shade[study.mixer], points, hover, style[name])
            trace.marker = {"size": [13 if b else 6 for b in best]}
            add(figure, trace, row, seen)
        _draw_floor(figure, found, row)
        tried = sorted({lr for s in found for lr in s.sweep})
        axis = at_marks(log_axis(tried, "{:g}".format), tried, "{:g}".format)
        figure.update_xaxes(axis, row=row, col=1)
    return figure.update_yaxes(ACCURACY)


def solve_rates(studies: Sequence[Study]) -> Figure | str:
    """Share of seeds that solved the task, with Wilson's interval."""
    drawn = [s for s in _whole(studies) if s.counted]
    if not drawn:
        return "no stack was trained as a whole"
    panels, names, shade = panels_of(drawn), dict(_named(studies)), _shades(studies)
    most = max(map(len, panels.values()))
    titles = [str(p) for p in panels]
    figure = canvas(titles, "share of seeds that solved it", "", 60 + 44 * most)
    for row, (panel, found) in enumerate(panels.items(), 1):
        for at, study in enumerate(found[::-1]):
            share, n = study.solved, len(study.counted)
            steps = study.by_seed("steps_to_solve", panel.length).values()
            words = f"{names[id(study)]} | {share.mean:.2f} of {n} seeds"
            words += f" | Wilson [{share.low:.2f}, {share.high:.2f}]"
            words += f" | median step {median(steps):g}" if steps else ""
            trace = line(study.mixer, shade[study.mixer], [], [], "solid")
            trace.x, trace.y = [share.mean], [at]
            trace.hovertext = [text(words).replace(" | ", "<br>")]
            trace.mode, trace.marker, trace.showlegend = "markers", {"size": 10}, False
            trace.marker.color = shade[study.mixer]
            trace.error_x = {
                "type": "data",
                "symmetric": False,
                "array": [(share.high or 0) - share.mean],
                "arrayminus": [share.mean - (share.low or 0)],
                "thickness": 1.5,
            }
            figure.add_trace(trace, row=row, col=1)
        shown = [names[id(study)] for study in found[::-1]]
        figure.update_yaxes(name_axis(shown), row=row, col=1)
    figure.update_xaxes(range=[-0.03, 1.03], tickvals=[0, 0.5, 1], ticktext=["0", "1/2", "1"])
    return figure


def _whole(studies: Sequence[Study]) -> list[Study]:
    """All but single swaps, which have the heat-map; those too where there is nothing else."""
    kept = [s for s in studies if s.where != "one"]
    return kept if any(not s.baseline for s in kept) else [*studies]


def _named(studies: Sequence[Study]) -> list[tuple[int, str]]:
    return [(id(s), name) for s, name in zip(studies, labels(studies), strict=True)]


def _shades(studies: Sequence[Study]) -> dict[str, str]:
    return colours((s.mixer for s in studies), (s.mixer for s in studies if s.baseline))


def _styles(studies: Sequence[Study]) -> dict[str, str]:
    shade, names = _shades(studies), labels(_whole(studies))
    by_name = {name: shade[s.mixer] for name, s in zip(names, _whole(studies), strict=True)}
    return dashes([*by_name], by_name)


def _mean(study: Study) -> float:
    interval = study.accuracy()
    assert interval is not None
    return interval.mean


def _losses(study: Study) -> list[tuple[int, float, float]]:
    """(step, FLOPs, loss) at the steps that all seeds have."""
    done = [c for c in study.counted if not c.failed]
    curves = [dict(c.curve("train_loss", study.panel.length)) for c in done]
    if not curves:
        return []
    shared = sorted(set(curves[0]).intersection(*curves[1:]))
    about = done[0].about
    each = about["train_flops"] / about["steps"]
    return [(step, step * each, t_interval([c[step] for c in curves]).mean) for step in shared]


def _draw_floor(figure: Figure, found: Sequence[Study], row: int) -> None:
    floors = [floor for study in found if (floor := study.floor()) is not None]
    if floors:
        style = {"color": GREY, "dash": "dot", "width": 1.5}
        words = {"text": "floor", "font": {"size": 11, "color": GREY}, "xanchor": "right"}
        figure.add_hline(y=fmean(floors), line=style, annotation=words, row=row, col=1)


def _edge(study: Study) -> str:
    return ", at the edge of the sweep" if study.at_edge else ""
