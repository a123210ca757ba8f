"""How the page looks, and the little script that draws its figures in the reader's colours."""

STYLE = """
:root { --ink: #1c1e21; --soft: #5a6068; --paper: #fff; --line: #d9dce0; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #a2a9b1; --paper: #15171a; --line: #383d43; --warn: #e0b050; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 16px; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: .4em 0; }
h2 { font-size: 1.2rem; margin: 2.2em 0 .4em; padding-top: .6em;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2em 0 .3em; }
ul { padding-left: 1.2em; margin: .3em 0; }
.caption, .missing { color: var(--soft); font-size: .92rem; max-width: 44rem; }
.warning { color: var(--warn); }
.plot { width: 100%; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: left; white-space: nowrap; overflow-wrap: normal; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); }
tbody tr + tr td { border-top: 1px solid var(--line); }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--paper);
  min-width: 7.5rem; max-width: 42vw; white-space: normal;
  overflow-wrap: anywhere; }
"""

SCRIPT = """
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themed = (layout) => {
    const of = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const ink = of("--ink"), line = of("--line"), paper = of("--paper");
    const made = structuredClone(layout);
    made.paper_bgcolor = made.plot_bgcolor = "rgba(0,0,0,0)";
    made.font = { ...made.font, color: ink, family: "system-ui, sans-serif", size: 12 };
    made.hoverlabel = { bgcolor: paper, bordercolor: line, font: { color: ink } };
    made.dragmode = matchMedia("(pointer: fine)").matches ? "zoom" : false;
    for (const key of Object.keys(made)) {
      if (/^[xy]axis/.test(key)) {
        Object.assign(made[key], { gridcolor: line, linecolor: line, showline: true });
      }
    }
    return made;
  };
  const draw = () => {
    for (const source of document.querySelectorAll("script[data-for]")) {
      const figure = JSON.parse(source.textContent);
      Plotly.react(document.getElementById(source.dataset.for), figure.data, themed(figure.layout),
        { responsive: true, displaylogo: false, displayModeBar: false });
    }
  };
  draw();
  dark.addEventListener("change", draw);
})();
"""
