"""`seqzoo report`: statistics against closed forms, figures from the CSV alone, a page."""

import csv
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from seqzoo.train.ablation.grid import Grid
from seqzoo.train.ablation.tables import COLUMNS
from seqzoo.train.cli import main
from seqzoo.train.report import clock as clocking
from seqzoo.train.report import figures
from seqzoo.train.report.load import SPEED, load
from seqzoo.train.report.memory import Memory, memory_of
from seqzoo.train.report.page import page
from seqzoo.train.report.passes import PHASES, Stack
from seqzoo.train.report.speed import speed
from seqzoo.train.report.statistics import holm, paired, pareto, t_interval, wilson
from seqzoo.train.report.studies import labels, studies_of
from seqzoo.train.report.swaps import heat_map

HOSTILE = '</script><img src=x onerror="console.error(1)">&amp;%{y}'
TASKS = {"mqar": (16, (16,), 0.25), "parity": (32, (32, 64), 0.5)}
LRS, SWEPT, FRESH, STEPS, BATCH = (0.001, 0.003, 0.01), (0,), (1, 2, 3), 20, 8
# Accuracy of a stack, by mixer and where; seeds shift it a little, lengths and rates lower it.
LEVELS = {
    ("attention", "baseline", None): 0.7,
    ("deltanet", "all", None): 0.995,
    ("deltanet", "one", 0): 0.8,
    ("deltanet", "one", 2): 0.72,
    (HOSTILE, "all", None): 0.4,
    (HOSTILE, "one", 0): 0.5,
    (HOSTILE, "one", 2): 0.701,
}
JITTER = {0: 0.0, 1: 0.001, 2: -0.002, 3: 0.004}


def cell_rows(task: str, stack: tuple[str, str, int | None], lr: float, seed: int) -> Any:
    (mixer, where, layer), (own, lengths, floor) = stack, TASKS[task]
    failed = mixer == HOSTILE and where == "all" and seed == 3
    about = {
        "key": f"{task}-{list(LEVELS).index(stack)}-{lr:g}-{seed}",
        "stage": "final" if seed in FRESH else "sweep",
        "baseline": str(where == "baseline").lower(),
        "mixer": mixer,
        "where": where,
        "layer": "" if layer is None else layer,
        "depth": 4,
        "task": task,
        "train_length": own,
        "lr": f"{lr:g}",
        "seed": seed,
        "short_conv": "no",
        "position": "rope",
        "channel_mixer": "mlp",
        "norm": "rmsnorm",
        "match": "parameters",
        "d_model": 32,
        "parameters": 27000 + 10 * list(LEVELS).index(stack),
        "mixer_parameters": 24000,
        "state_bytes": {"attention": 16000, "deltanet": 8000}.get(mixer, 9000),
        "flops_per_token": 61440,
        "train_flops": 3 * 61440 * own * BATCH * STEPS,
        "steps": STEPS,
        "status": "failed" if failed else "done",
        "reason": "out of memory" if failed else "",
    }
    if failed:
        return [{**about, "metric": "accuracy", "length": own}]
    # The noise of a seed is the baseline's and half of a swap's: paired differences vary a little.
    noise = JITTER[seed] * (1 if where == "baseline" else 0.5)
    best = LEVELS[stack] + noise
    made: list[dict[str, Any]] = []
    for n in lengths:
        made.append({"metric": "accuracy", "length": n, "value": best * math.sqrt(own / n)})
        made.append({"metric": "floor", "length": n, "value": floor, "note": "a <guess>"})
    made.append({"metric": "solved", "length": own, "value": float(best >= 0.99)})
    if best >= 0.99:
        made.append({"metric": "steps_to_solve", "length": own, "value": 10 + seed})
    for step in (10, 20):
        loss = {"metric": "train_loss", "length": own, "step": step, "value": 3 / step}
        shown = best - abs(math.log10(lr / 0.003)) / 5
        made += [loss, {"metric": "val_accuracy", "length": own, "step": step, "value": shown}]
    return [{**about, **row} for row in made]


def write(path: Path, columns: Any, rows: Any) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(rows)


def make(folder: Path, fresh: bool = True) -> Path:
    rows = []
    for task in TASKS:
        for stack in LEVELS:
            rows += [r for lr in LRS for s in SWEPT for r in cell_rows(task, stack, lr, s)]
            rows += [r for s in FRESH if fresh for r in cell_rows(task, stack, 0.003, s)]
    folder.mkdir()
    (folder / "cells").mkdir()
    write(folder / "results.csv", COLUMNS, rows)
    keys = dict.fromkeys(row["key"] for row in rows if row["status"] == "done")
    clocks = [{"key": k, "seconds": 2.0, "tokens_per_second": 500, "worker": 1} for k in keys]
    write(folder / "timings.csv", ("key", "worker", "seconds", "tokens_per_second"), clocks)
    write(folder / "speed.csv", SPEED, speed_rows())
    return folder


def speed_rows() -> Any:
    for mixer, where in (("attention", "baseline"), (HOSTILE, "all")):
        for phase in PHASES:
            for length in (128, 512):
                fixed = dict.fromkeys(("short_conv", "position", "channel_mixer", "norm"), "x")
                row = {"mixer": mixer, "where": where, **fixed, "task": "mqar", "phase": phase}
                row |= {"length": length, "batch": 1, "d_model": 32, "threads": 1}
                row |= {"processors": 2, "load": 9.5, "status": "done", "runs": 7}
                if (mixer, length) == (HOSTILE, 512):
                    yield {**row, "status": "failed", "reason": "process died (signal 9)"}
                else:
                    yield {**row, "ms": 2, "tokens_per_second": 64000, "peak_memory_bytes": 1e6}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("report") / "small & <b>bold")
    assert main(["report", str(folder)]) == 0
    return folder


def summary(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_t_interval_is_scipys_and_one_value_has_none():
    values = [0.2, 0.5, 0.9, 0.4]
    mean, low, high = t_interval(values)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((0.5, theirs.low, theirs.high), rel=1e-12)
    # Two values a and b: t of one degree of freedom is tan(0.475 pi), s / sqrt(2) is |a - b| / 2.
    assert t_interval([0.0, 1.0]).high == pytest.approx(0.5 + math.tan(0.475 * math.pi) / 2)
    assert t_interval([0.7]) == (0.7, None, None)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_wilsons_interval_is_scipys(n):
    for hits in range(n + 1):
        theirs = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
        ours = wilson(hits, n)
        assert ours == pytest.approx((hits / n, theirs.low, theirs.high), abs=1e-12)


def test_differences_are_paired_by_the_seeds_that_both_have():
    ours, theirs = {1: 0.9, 2: 0.8, 3: 0.95, 4: 0.1}, {1: 0.85, 2: 0.7, 3: 0.8, 5: 1.0}
    found = paired(ours, theirs)
    expected = stats.ttest_rel([0.9, 0.8, 0.95], [0.85, 0.7, 0.8])
    bounds = expected.confidence_interval(0.95)
    assert found is not None
    assert found.pairs == 3
    assert found.p == pytest.approx(expected.pvalue)
    assert found.difference == pytest.approx((0.1, bounds.low, bounds.high))
    assert paired({1: 0.5}, {2: 0.5}) is None
    same = [paired({1: a, 2: a}, {1: 0.5, 2: 0.5}) for a in (0.5, 0.75)]
    assert [s and s.p for s in same] == [1, 0]


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 pulled up to the one before it
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]


def test_the_pareto_front_is_what_nothing_beats():
    points = [(1, 0.2), (2, 0.5), (2, 0.4), (3, 0.5), (4, 0.9), (1, 0.2), (0.5, 0.1)]
    assert pareto(points) == [6, 0, 5, 1, 4]


def test_the_table_says_what_the_rows_say(drawn):
    rows = {(r["task"], r["mixer"], r["where"], r["layer"]): r for r in summary(drawn)}
    assert len(rows) == len(TASKS) * len(LEVELS)
    good, base = rows["mqar", "deltanet", "all", ""], rows["mqar", "attention", "baseline", ""]
    accuracy = [0.995 + JITTER[seed] / 2 for seed in FRESH]
    mean, low, high = t_interval(accuracy)
    shown = [float(good[c]) for c in ("accuracy", "accuracy_low", "accuracy_high")]
    assert shown == pytest.approx([mean, low, high])
    assert float(good["difference"]) == pytest.approx(0.295 - (0.001 - 0.002 + 0.004) / 3 / 2)
    assert good["against_baseline"].startswith("better")
    assert (good["against_floor"], base["against_baseline"]) == ("above", "baseline")
    assert (good["lr"], good["lr_at_edge"], good["stage"]) == ("0.003", "false", "final")
    assert float(good["tokens"]) == BATCH * STEPS * 16
    assert (good["solve_rate"], good["median_steps_to_solve"]) == ("1", "12")
    assert (good["seconds"], good["energy_wh"], good["peak_memory_bytes"]) == ("2", "", "")
    failed = rows["mqar", HOSTILE, "all", ""]
    assert (failed["seeds"], failed["failed"], failed["pairs"]) == ("3", "1", "2")
    assert rows["mqar", "deltanet", "one", "2"]["against_baseline"].startswith("better")
    assert rows["mqar", HOSTILE, "one", "2"]["against_baseline"].startswith("not told apart")


def test_every_figure_is_drawn_and_says_why_when_it_is_not(drawn):
    results = load(drawn)
    studies = studies_of(results.rows)
    alone = [s for s in studies if s.baseline and len(s.lengths()) == 1]
    for figure in (
        heat_map,
        figures.by_length,
        figures.rates,
        figures.solve_rates,
        figures.loss_by_flops,
    ):
        assert not isinstance(figure(studies), str), figure
    for figure in (heat_map, figures.by_length):
        assert isinstance(figure(alone), str)
    for column in ("tokens_per_second", "peak_memory_bytes"):
        assert not isinstance(speed(results.speed, column), str)
        assert "--measure" in str(speed([], column))
    heat = json.loads(heat_map(studies).to_json())["data"][0]  # type: ignore[union-attr]
    expected, at = 0.1 - (0.001 - 0.002 + 0.004) / 3 / 2, 0  # deltanet is the lowest
    assert heat["z"][at][0] == pytest.approx(expected)
    assert f"{expected:.3f} [0." in heat["hovertext"][at][0]
    missing = page(results._replace(speed=[], timings={}))[0]
    assert missing.count("not drawn: there is no speed.csv") == 2
    whole = (drawn / "report.html").read_text()
    assert "not drawn:" not in whole
    assert "The load average was up to 9.5 on 2 processors" in whole


def test_the_front_of_the_page_is_the_front_of_the_points(drawn):
    figure = figures.accuracy_against(studies_of(load(drawn).rows), "state_bytes")
    front = json.loads(figure.to_json())["data"][0]  # type: ignore[union-attr]
    assert front["name"] == "Pareto front"
    assert front["x"] == [8000]
    assert front["y"] == pytest.approx([0.9955])


def test_the_page_comes_from_the_csv_alone_and_is_the_same_every_time(drawn, tmp_path):
    copy = shutil.copytree(drawn, tmp_path / drawn.name)
    shutil.rmtree(copy / "cells")
    assert main(["report", str(copy), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == (drawn / "report.html").read_bytes()
    assert (tmp_path / "summary.csv").read_bytes() == (drawn / "summary.csv").read_bytes()


def test_the_page_opens_only_where_there_is_a_screen(drawn, monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert main(["report", str(drawn), "--open"]) == 0
    assert shown == []
    monkeypatch.setenv("DISPLAY", ":0")
    assert main(["report", str(drawn), "--open"]) == 0
    assert shown == [(drawn / "report.html").resolve().as_uri()]


def test_names_are_text_and_nothing_is_fetched(drawn):
    whole = (drawn / "report.html").read_text()
    ours = whole.replace(whole[whole.index("<script>") : whole.index("</head>")], "")
    assert "<img" not in ours
    assert "<b>bold" not in ours
    assert "&lt;img src=x" in ours
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", ours)


def test_without_fresh_seeds_the_sweep_stands_in_and_the_page_says_so(tmp_path):
    folder = make(tmp_path / "sweep", fresh=False)
    whole, table = page(load(folder))
    assert "There are no fresh seeds" in whole
    assert {row["stage"] for row in table} == {"sweep"}
    assert {row["against_baseline"] for row in table} == {"baseline", "one seed: no verdict"}


def test_the_edge_of_the_sweep_is_flagged(tmp_path):
    rows = [r for lr in LRS[1:] for r in cell_rows("mqar", next(iter(LEVELS)), lr, 0)]
    path = tmp_path / "results.csv"
    write(path, COLUMNS, rows)
    (study,) = studies_of(load(tmp_path).rows)
    assert (study.lr, study.at_edge) == (0.003, True)
    assert labels([study]) == ["attention (baseline)"]


def test_where_all_failed_the_page_gives_the_reasons(tmp_path):
    rows = [cell_rows("mqar", stack, 0.003, seed)[0] for stack in LEVELS for seed in (0, 1)]
    told = {"status": "failed", "reason": "loss <is> nan", "value": ""}
    write(tmp_path / "results.csv", COLUMNS, [row | told for row in rows])
    whole, table = page(load(tmp_path))
    assert {row["against_floor"] for row in table} == {"failed"}
    assert whole.count("loss &lt;is&gt; nan") == 2 * len(LEVELS)
    assert "not drawn: no cell has an accuracy" in whole


def test_two_cells_that_cannot_be_told_apart_are_refused(tmp_path):
    rows = cell_rows("mqar", next(iter(LEVELS)), 0.003, 1)
    write(tmp_path / "results.csv", COLUMNS, rows + [{**row, "key": "other"} for row in rows])
    with pytest.raises(ValueError, match="two cells of attention"):
        studies_of(load(tmp_path).rows)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no results.csv"),
        ("", "is empty"),
        (",".join(COLUMNS), "no rows"),
        (",".join(c for c in COLUMNS if c != "state_bytes"), "no column state_bytes"),
        (
            ",".join(COLUMNS) + "\n" + ",".join("x" * len(COLUMNS)),
            "line 2: layer='x' is not a finite number",
        ),
        (",".join(COLUMNS) + "\nx", "another number of cells"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys, text, words):
    if text is not None:
        (tmp_path / "results.csv").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


GRID = {
    "name": "tiny",
    "decoder": {
        "d_model": 16,
        "pattern": ["attention", "mlp"],
        "position": "rope",
        "options": {"attention": {"n_heads": 2}, "deltanet": {"n_heads": 2}},
    },
    "target": "attention",
    "mixers": ["deltanet"],
    "tasks": [
        {"name": "mqar", "length": 16, "pairs": 2, "vocab_size": 32},
        {"name": "parity", "length": 16},
    ],
    "match": "none",
}


def test_measuring_clocks_each_stack_once_and_failures_are_rows(tmp_path, monkeypatch):
    (tmp_path / "grid.json").write_text(json.dumps(Grid.from_dict(GRID).to_dict()))

    def memory(stack: Stack, phase: str, length: int, batch_size: int) -> Memory:
        dead = phase == "train" and length == 16
        return Memory(None, "process died (signal 9)") if dead else Memory(4096, "")

    monkeypatch.setattr(clocking, "memory_of", memory)
    path = clocking.clock(tmp_path, lengths=[8, 16], repeats=1)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(PHASES) * 2
    for row in rows:
        if (row["phase"], row["length"]) == ("train", "16"):
            assert (row["status"], row["ms"]) == ("failed", "")
            assert row["reason"] == "process died (signal 9)"
        else:
            tokens = 1 if row["phase"] == "decode" else int(row["length"])
            assert row["status"] == "done"
            rate = 1000 * tokens / float(row["ms"])
            assert float(row["tokens_per_second"]) == pytest.approx(rate, rel=1e-2)
    make(tmp_path / "drawn")
    shutil.copy(path, tmp_path / "drawn")
    assert not isinstance(speed(load(tmp_path / "drawn").speed, "tokens_per_second"), str)


def test_memory_is_that_of_the_pass_and_not_of_the_process_before_it():
    stack = Stack(Grid.from_dict(GRID).studies()[0].variant.decoder, 32)
    big = bytearray(256 << 20)  # what this process held must not count
    big[:: 1 << 12] = bytes(len(big) >> 12)
    found = memory_of(stack, "train", 4096, 1)
    assert not found.reason
    assert found.bytes is not None
    # The logits and their gradient alone are 2 x 4096 x 32 floats.
    assert 2 * 4096 * 32 * 4 <= found.bytes < 128 << 20


PROBE = """<script>
addEventListener("load", () => setTimeout(() => parent.postMessage(JSON.stringify({
  inner: innerWidth, scroll: document.documentElement.scrollWidth,
  plots: document.querySelectorAll(".plot").length,
  drawn: [...document.querySelectorAll(".plot")].filter((p) => p.querySelector("svg.main-svg")
    && p.getBoundingClientRect().width <= innerWidth).length,
  images: document.images.length}), "*"), 1500));</script>"""
OUTER = """<body style="margin:0"><iframe src="page.html" style="border:0;width:390px;height:844px">
</iframe><pre id="found"></pre><script>
addEventListener("message", (m) => { document.getElementById("found").textContent = m.data; });
</script></body>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium to look at the page with")
def test_a_browser_draws_it_on_a_phone_without_errors_or_sideways_scrolling(drawn, tmp_path):
    whole = (drawn / "report.html").read_text()
    (tmp_path / "page.html").write_text(whole.replace("</body>", PROBE + "</body>"))
    (tmp_path / "outer.html").write_text(OUTER)  # headless windows are never as narrow as a phone
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--v=0",
            "--virtual-time-budget=8000",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            f"file://{tmp_path / 'outer.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found is not None
    seen = json.loads(found[1])
    assert seen == {"inner": 390, "scroll": 390, "plots": 9, "drawn": 9, "images": 0}
