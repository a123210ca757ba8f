"""The heat-map of single swaps: which entry was replaced, and by what."""

from collections.abc import Sequence

from plotly.graph_objects import Figure, Heatmap

from seqzoo.train.report.canvas import canvas, name_axis, text
from seqzoo.train.report.studies import Comparison, Study, compare


def heat_map(studies: Sequence[Study]) -> Figure | str:
    """Which entry is swapped, by which mixer: the difference to the baseline, paired by seed."""
    compared = compare(studies)
    found = {i: studies[i] for i in compared if studies[i].where == "one"}
    if not found:
        return "the grid swaps no single entries (`where: [one]`), or their baseline is missing"
    places = sorted({(s.panel, s.factors) for s in found.values()})
    many = len({s.factors for s in found.values()}) > 1
    titles = [f"{panel}" + (f" ({', '.join(f)})" if many else "") for panel, f in places]
    mixers = sorted({s.mixer for s in found.values()}, reverse=True)
    figure = canvas(titles, "entry that is swapped", "", 80 + 44 * len(mixers))
    largest = max(abs(compared[i].paired.difference.mean) for i in found) or 0.01
    layers = sorted({s.layer for s in found.values() if s.layer is not None})
    for row, place in enumerate(places, 1):
        cells = {
            (s.mixer, s.layer): compared[i]
            for i, s in found.items()
            if (s.panel, s.factors) == place
        }
        z, shown, hover = [], [], []
        for mixer in mixers:
            each = [(layer, cells.get((mixer, layer))) for layer in layers]
            z.append([None if c is None else c.paired.difference.mean for _, c in each])
            shown.append([_difference(c) for _, c in each])
            hover.append([_told(mixer, layer, c) for layer, c in each])
        figure.add_trace(
            Heatmap(
                x=[str(layer) for layer in layers],
                y=[*range(len(mixers))],
                z=z,
                text=shown,
                texttemplate="%{text}",
                hoverinfo="text",
                hovertext=hover,
                coloraxis="coloraxis",
                xgap=2,
                ygap=2,
            ),
            row=row,
            col=1,
        )
    scale = [[0, "#d6504f"], [0.5, "#f4f4f4"], [1, "#3b82d6"]]
    bar = {"thickness": 10}
    figure.update_layout(
        coloraxis={"colorscale": scale, "cmin": -largest, "cmax": largest, "colorbar": bar}
    )
    figure.update_xaxes(type="category", showgrid=False)
    return figure.update_yaxes(name_axis(mixers), showgrid=False)


def _difference(compared: Comparison | None) -> str:
    if compared is None:
        return ""
    return f"{compared.paired.difference.mean:+.3f}{'*' if compared.significant else ''}"


def _told(mixer: str, layer: int, compared: Comparison | None) -> str:
    if compared is None:
        return f"{text(mixer)} at entry {layer}<br>not measured"
    pair, p = compared.paired, compared.p
    words = f"{text(mixer)} at entry {layer}<br>{pair.difference}<br>{pair.pairs} seed(s)"
    return words + ("" if p is None else f"<br>p {p:.3g} after Holm")
