"""`seqzoo bench`: what is compared is the same sum, and what is printed was measured."""

import json

import pytest
import torch

from seqzoo.train.bench import compare as comparing
from seqzoo.train.bench import startup
from seqzoo.train.bench.cases import CASES, Case
from seqzoo.train.bench.compare import WARM, compare
from seqzoo.train.bench.measure import Timing, interleaved, training_step
from seqzoo.train.bench.operations import OPERATIONS, SIZES, Sizes
from seqzoo.train.cli import main
from tests.tolerances import relative_error

PEERS = {case.load.__name__: case for case in CASES if case.load is not None}
SAME = sorted(set(PEERS) - {"add", "causal_sdpa"})  # a floor and a yardstick: other sums


def words(capsys, *command: str) -> list[str]:
    capsys.readouterr()
    assert main(command) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, *command: str) -> str:
    capsys.readouterr()
    assert main(command) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", SAME)
def test_a_peer_that_computes_something_else_is_no_peer(name):
    case = PEERS[name]
    make, run = case.operation
    inputs = make(320, SIZES["cpu"])  # more than one chunk of anybody's
    assert relative_error(case.load()(inputs), run(inputs)) <= 2e-5


def test_a_step_takes_the_gradient_of_every_source():
    x, y = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    dx, dy = training_step(lambda: x * y, [x, y])()
    assert torch.equal(dx, y)
    assert torch.equal(dy, x)


def test_steps_run_in_turn_and_one_out_of_time_sits_out():
    seen = []
    steps = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    assert [t.runs for t in interleaved(steps, 3).values()] == [3, 3]
    assert seen == ["a", "b"] * 3
    assert [t.runs for t in interleaved(steps, 3, seconds=1e-12).values()] == [1, 1]


def case(**options: object) -> Case:
    loads = {"load": lambda: OPERATIONS["scan"].run, "tokens": 2 * WARM}
    return Case("scan", "itself", **(loads | options))


def measured(made: Case, full: bool = False) -> comparing.Row:
    return compare(made, repeats=2, device="cpu", full=full)


def test_a_goal_is_judged_at_its_own_length_only():
    easy, hard = case(faster=1e-9), case(faster=1e9)
    assert [measured(c).met for c in (easy, hard)] == [True, False]
    assert [measured(case(slower=x)).met for x in (1e9, 1e-9)] == [True, False]
    row = measured(case(faster=1e-9, short=WARM))
    assert (row.tokens, row.met) == (WARM, None)
    assert f"{2 * WARM} tokens" in row.note
    assert measured(case(faster=1e-9, short=WARM), full=True).met


def test_ratios_are_the_right_way_up(monkeypatch):
    timed = {"ours": Timing(2.0, 1), "other": Timing(8.0, 1)}
    monkeypatch.setattr(comparing, "interleaved", lambda *_: timed)
    assert measured(case(faster=3)).words == "4.0 x as fast"
    assert measured(case(slower=3)).words == "0.25 x the time"


def test_a_peer_that_is_not_installed_is_said_in_its_row(monkeypatch):
    def load():
        raise ModuleNotFoundError("No module named 'elsewhere'")

    row = measured(case(load=load, faster=2))
    assert row.note == "cannot be had here: No module named 'elsewhere'"
    assert (row.met, row.ratio, row.other_ms) == (None, None, None)
    assert row.ours_ms > 0


def test_growth_compares_with_a_quarter_of_the_length(monkeypatch):
    lengths, scan = [], OPERATIONS["scan"]

    def make(tokens: int, sizes: Sizes):
        lengths.append(tokens)
        return scan.make(tokens, sizes)

    monkeypatch.setitem(OPERATIONS, "scan", scan._replace(make=make))
    measured(case(load=None, slower=8, tokens=400))
    assert set(lengths) == {WARM, 400, 100}


def test_every_kernel_of_the_table_has_its_growth_measured():
    assert {c.kernel for c in CASES if c.load is None} == set(OPERATIONS)
    assert all((c.faster > 0) != (c.slower > 0) for c in CASES)


def test_the_first_call_is_that_of_a_process_whose_cache_is_empty(tmp_path, monkeypatch):
    cached = tmp_path / "seqzoo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = startup.starts(["scan", "attention"], repeats=1)
    assert [row.kernel for row in rows] == ["seqzoo", "scan"]  # attention has no C code
    assert rows[1].ours_ms > 0
    assert not cached.exists()


def test_kernels_prints_every_row_and_writes_it_with_its_conditions(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("seqzoo.train.commands.bench.CASES", (case(faster=1e-9),))
    monkeypatch.setattr("seqzoo.train.commands.bench.starts", lambda names: [])
    file = tmp_path / "bench.json"
    lines = words(capsys, "bench", "kernels", "--only", "scan", "--json", str(file))
    assert lines[-1] == "1 of 1 goals met"
    (row,) = (line for line in lines if line.startswith("scan"))
    written = json.loads(file.read_text())
    (recorded,) = written["rows"]
    assert f"{recorded['ours_ms']:.3g} ms" in row
    assert (recorded["tokens"], recorded["met"]) == (2 * WARM, True)
    assert written["threads"] == 1
    assert written["versions"]["torch"] == torch.__version__


def test_length_prints_a_row_for_each(capsys):
    command = "bench length --mixer rg_lru --d_model 16 --lengths 8,32,16 --repeats 1"
    lines = words(capsys, *command.split())
    assert [line.split()[0] for line in lines[3:]] == ["8", "16", "32"]
    assert lines[3].endswith(" 1.0x")


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("bench", "required: what"),
        ("bench kernels --only scam", "no kernel to measure named 'scam'; nearest: scan"),
        ("bench kernels --device tpu", "--device tpu is not here"),
        ("bench kernels --repeats 0", "repeats=0 is not allowed"),
        ("bench length --lengths 8,x", "is not a list of whole numbers"),
        ("bench length --lengths 0,8", "lengths=0 is not allowed"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(command, line, capsys):
    error = refused(capsys, *command.split())
    assert line in error
    assert error.count("\n") == 1
