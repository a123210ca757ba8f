"""`seqzoo ablate`: what a grid means, cells that survive anything, one table whoever ran them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from seqzoo.train.ablation import run as running
from seqzoo.train.ablation.grid import BASELINE, Grid
from seqzoo.train.ablation.local import run_local
from seqzoo.train.ablation.match import figures
from seqzoo.train.ablation.run import best_rates, run_grid
from seqzoo.train.ablation.store import Store
from seqzoo.train.ablation.work import attempt
from seqzoo.train.cli import main

ROOT = Path(__file__).parents[2]
MQAR = {"name": "mqar", "length": 16, "pairs": 2, "vocab_size": 32}
BASE = {
    "name": "tiny",
    "decoder": {
        "d_model": 16,
        "pattern": ["attention", "mlp"],
        "repeats": 2,
        "position": "rope",
        "options": {"attention": {"n_heads": 2}, "deltanet": {"n_heads": 2}},
    },
    "target": "attention",
    "mixers": ["deltanet"],
    "tasks": [MQAR],
    "lrs": [1e-3, 1e-2],
    "sweep_seeds": [0],
    "final_seeds": [1],
    "match": "none",
    "train": {"steps": 2, "batch_size": 4, "eval_every": 1, "eval_rows": 8, "test_rows": 8},
}


def grid(**changes: Any) -> Grid:
    return Grid.from_dict({**BASE, **changes})


def inline(cells: Mapping[str, Any], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ((key, attempt(cell)) for key, cell in cells.items())


@pytest.fixture
def in_process(monkeypatch):
    """Cells run here: a test of what surrounds them needs no processes."""
    monkeypatch.setitem(running.BACKENDS, "local", inline)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_where_says_which_entries_are_swapped():
    studies = grid(where=["all", "one", "every-2"]).studies()
    swaps = [(s.variant.where, s.variant.layer, s.variant.decoder["swap"]) for s in studies]
    assert swaps == [
        (BASELINE, None, {}),
        ("all", None, {"0": "deltanet", "2": "deltanet"}),
        ("one", 0, {"0": "deltanet"}),
        ("one", 2, {"2": "deltanet"}),
        ("every-2", None, {"2": "deltanet"}),
    ]


def test_factors_change_the_baseline_as_well_and_stand_in_every_row():
    factors = {"short_conv": [True], "channel_mixer": ["none"], "position": ["none", "alibi"]}
    studies = grid(factors=factors).studies()
    assert [s.variant.where for s in studies] == [BASELINE, "all"] * 2
    for study in studies:
        assert study.variant.decoder["pattern"] == ["short_conv", "attention"] * 2
        assert study.variant.factors["short_conv"] == "yes"
        assert study.variant.factors["channel_mixer"] == "none"
    assert [s.variant.factors["position"] for s in studies] == ["none"] * 2 + ["alibi"] * 2
    assert studies[1].variant.decoder["swap"] == {"1": "deltanet", "3": "deltanet"}


def test_a_mixer_can_appear_with_options_under_a_name_of_its_own():
    mixers = [{"name": "mamba-4", "is": "mamba", "d_state": 4}]
    study = grid(mixers=mixers).studies()[1]
    assert study.variant.mixer == "mamba-4"
    assert study.variant.decoder["options"]["mamba-4"] == {"is": "mamba", "d_state": 4}


@pytest.mark.parametrize("mode", ["parameters", "flops", "state"])
@pytest.mark.parametrize("mixer", ["mamba", "gla"])
def test_a_matched_stack_costs_what_the_baseline_does(mode: str, mixer: str):
    decoder = {**BASE["decoder"], "d_model": 64}
    options = {"name": "m", "is": mixer}
    tolerance = 0.02 if mode != "state" else 0.12  # a state comes in steps
    base, swapped = grid(
        decoder=decoder, mixers=[options], match=mode, tolerance=tolerance
    ).studies()
    field = {"parameters": "parameters", "flops": "flops", "state": "state_bytes"}[mode]
    cost = [getattr(figures(s.variant.decoder, s.task), field) for s in (base, swapped)]
    assert cost[1] == pytest.approx(cost[0], rel=tolerance)
    assert base.variant.decoder["d_model"] == 64


def test_counts_are_those_of_the_model_that_is_trained():
    study = grid().studies()[1]
    counted = figures(study.variant.decoder, study.task)
    record = attempt(study.cell(1e-3, 0).to_dict())
    assert record["result"]["parameters"] == counted.parameters


def test_a_stack_that_cannot_be_matched_is_refused_with_the_nearest():
    decoder = {**BASE["decoder"], "pattern": ["attention"]}
    with pytest.raises(ValueError, match=r"deltanet \(all\) on mqar: no width matches .* d_model="):
        grid(decoder=decoder, match="parameters", tolerance=0.0001).studies()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mixers": ["mamba9"]}, "no mixer 'mamba9'; nearest: mamba"),
        ({"mixers": []}, "mixers of the grid is empty"),
        ({"target": "mamba"}, r"entry to swap \(target\) 'mamba'"),
        ({"where": ["some"]}, "where 'some' is not allowed"),
        ({"where": ["every-9"]}, "leaves no entry to swap"),
        ({"match": "width"}, "way to match 'width'"),
        ({"factors": {"colour": ["red"]}}, "no factor 'colour'"),
        ({"tasks": [{"name": "mqarr"}]}, "'mqarr'"),
        ({"tasks": [{"length": 3}]}, "has no name"),
        ({"train": {"stepz": 3}}, "option of train 'stepz'; nearest: steps"),
        ({"train": {"steps": 0}}, "steps=0 is not allowed"),
        ({"final_seeds": [0]}, "are not fresh"),
        ({"name": "../up"}, "not allowed; letters"),
        ({"colour": 1}, "option of a grid 'colour'"),
    ],
)
def test_a_grid_that_means_nothing_is_refused_before_anything_runs(change: Any, words: str):
    with pytest.raises(ValueError, match=words):
        grid(**change).studies()


def test_the_rate_is_chosen_on_validation_rows_and_a_failed_seed_counts_as_zero():
    made = grid(sweep_seeds=[0, 1], final_seeds=[2])
    study = made.studies()[0]

    def record(accuracy: float | None) -> dict[str, Any]:
        if accuracy is None:
            return {"status": "failed", "result": None}
        return {"status": "done", "result": {"curve": [{"accuracy": {"16": accuracy}}]}}

    def best(*values: float | None) -> float | None:
        cells = [study.cell(lr, seed) for lr in made.lrs for seed in made.sweep_seeds]
        done = {c.key(): record(v) for c, v in zip(cells, values, strict=True)}
        return best_rates(made, [study], done)[0]

    assert best(0.5, 0.5, 0.6, 0.6) == 1e-2
    assert best(0.5, 0.5, 0.9, None) == 1e-3
    assert best(0.5, 0.5, 0.5, 0.5) == 1e-3
    assert best(None, None, 0.1, None) == 1e-2
    assert best(None, None, None, None) is None


def test_the_table_has_every_cell_once_and_fresh_seeds_at_one_rate_only(tmp_path, in_process):
    run_grid(grid(), tmp_path, progress=False)
    found = rows(tmp_path)
    accuracy = [r for r in found if r["metric"] == "accuracy"]
    assert [r["stage"] for r in accuracy].count("sweep") == 2 * 2
    assert [r["stage"] for r in accuracy].count("final") == 2
    assert {r["baseline"] for r in accuracy if r["mixer"] == "attention"} == {"true"}
    curve = [r for r in found if r["metric"] == "val_accuracy" and r["key"] == found[0]["key"]]
    assert [r["step"] for r in curve] == ["1", "2"]
    stored = sorted(p.stem for p in (tmp_path / "cells").glob("*.json"))
    assert stored == sorted({r["key"] for r in found})
    clocks = (tmp_path / "timings.csv").read_text()
    assert all(key in clocks for key in stored)


def test_what_is_done_is_not_trained_again(tmp_path, in_process, monkeypatch):
    run_grid(grid(), tmp_path, progress=False)
    before = (tmp_path / "results.csv").read_bytes()
    asked: list[str] = []

    def watched(cells: Mapping[str, Any], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
        asked.extend(cells)
        return inline(cells, workers)

    monkeypatch.setitem(running.BACKENDS, "local", watched)
    run_grid(grid(), tmp_path, progress=False)
    assert asked == []
    assert (tmp_path / "results.csv").read_bytes() == before
    next((tmp_path / "cells").glob("*.json")).unlink()
    run_grid(grid(), tmp_path, progress=False)
    assert len(asked) == 1
    assert (tmp_path / "results.csv").read_bytes() == before


def test_a_loss_that_is_not_finite_is_a_row_with_its_reason(tmp_path, in_process):
    run_grid(grid(lrs=[1e30], mixers=["deltanet"]), tmp_path, progress=False)
    failed = [r for r in rows(tmp_path) if r["status"] == "failed"]
    assert failed
    assert all("the loss is" in r["reason"] and r["value"] == "" for r in failed)
    assert not [r for r in rows(tmp_path) if r["stage"] == "final"]
    assert Store(tmp_path).forget_failures() == len({r["key"] for r in failed})


def test_memory_that_runs_out_is_said_in_words(monkeypatch):
    def train(description: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr("seqzoo.train.ablation.work.train_cell", train)
    assert attempt({})["reason"] == "out of memory"


def test_a_damaged_cell_is_named(tmp_path):
    store = Store(tmp_path)
    (store.cells / "a.json").write_text('{"status"')
    with pytest.raises(ValueError, match=r"a\.json is damaged"):
        Store(tmp_path)


def test_a_worker_that_is_killed_costs_its_cell_and_nothing_else():
    study = grid().studies()[0]
    long = study.cell(1e-3, 0).to_dict() | {"steps": 100_000, "eval_every": 100_000}
    cells = {"long": long, "short": study.cell(1e-3, 1).to_dict()}
    records = {}
    for key, record in run_local(cells, 2):
        records[key] = record
        if key == "short":
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
            for child in map(int, children.split()):
                if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(child, signal.SIGKILL)
    assert records["short"]["status"] == "done"
    assert records["long"]["status"] == "failed"
    assert records["long"]["reason"] == "process died (signal 9)"


def test_killed_half_way_and_run_again_it_ends_as_if_nothing_had_been(tmp_path, in_process):
    made = grid(sweep_seeds=[0, 2, 3], train={**BASE["train"], "steps": 40, "eval_every": 40})
    run_grid(made, tmp_path / "whole", progress=False)
    file, folder = tmp_path / "grid.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(made.to_dict()))
    code = "from seqzoo.train.cli import main; main()"
    command = [sys.executable, "-c", code, "ablate", str(file), "--out", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list(folder.glob("cells/*.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(3)  # workers notice within a second
    kept = {p.name: p.stat().st_mtime_ns for p in folder.glob("cells/*.json")}
    assert len(kept) < len(list((tmp_path / "whole" / "cells").glob("*.json")))
    assert main(["ablate", str(file), "--out", str(folder), "--no_progress"]) == 0
    assert (folder / "results.csv").read_bytes() == (tmp_path / "whole/results.csv").read_bytes()
    after = {p.name: p.stat().st_mtime_ns for p in folder.glob("cells/*.json")}
    assert kept.items() <= after.items()


@pytest.mark.slow
def test_ray_gives_the_same_table(tmp_path, in_process, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run_grid(grid(), tmp_path / "here", progress=False)
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(grid().to_dict()))
    code = "from seqzoo.train.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "ablate", str(file), "--backend", "ray"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([*command, "--out", str(tmp_path / "ray")], env=environment, check=True)
    assert (tmp_path / "ray/results.csv").read_bytes() == (
        tmp_path / "here/results.csv"
    ).read_bytes()


def test_without_ray_the_backend_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'seqzoo\[ray\]'"):
        run_grid(grid(), tmp_path, backend="ray", progress=False)


def test_progress_says_how_far_it_is(capsys):
    bar = running.Progress(4, 2, True)
    bar.found(1)
    bar.add({"status": "failed"})
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "1 of 4 cells, 1 of them were there"
    assert said[1].startswith("2 of 4 cells, 1 of them were there, 1 failed, about ")


def test_the_grids_that_come_with_it_are_sound():
    for path in sorted((ROOT / "configs/ablation").glob("*.yaml")):
        with torch.device("meta"):
            assert Grid.read(path).studies(), path


def test_the_command_counts_before_it_runs(tmp_path, capsys):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(BASE))
    assert main(["ablate", str(file), "--dry_run"]) == 0
    assert capsys.readouterr().out == "2 studies: 4 cells of the sweep, 2 fresh\n"
    file.write_text("name: [")
    assert main(["ablate", str(file)]) == 2
    assert "is not YAML" in capsys.readouterr().err
    assert main(["ablate", str(tmp_path / "none.yaml")]) == 2
    assert json.dumps(BASE)
