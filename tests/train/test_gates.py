"""The gate table: its verdicts, its command, and (slow) that it holds."""

import json

import pytest

from seqzoo.train.cells import Cell, train_cell
from seqzoo.train.cli import main
from seqzoo.train.gates import GATES, SUITES, judge, run_gates


def outcome_of(gate, shares):
    lengths = [t.length for t in gate.thresholds]
    return judge(gate, {"accuracy": dict(zip(map(str, lengths), shares, strict=True))})


def test_every_suite_has_a_model_on_each_side_and_every_cell_is_sound():
    for suite in SUITES:
        assert {g.solves for g in GATES if g.suite == suite} == {True, False}
    for gate in GATES:
        cell = Cell.from_dict(gate.cell(seed=3))
        assert cell.seed == 3
        assert all(t.length in cell.lengths for t in gate.thresholds)
        assert bool(cell.stop) == gate.solves
        for threshold in gate.thresholds:
            floor = cell.build_task().at(threshold.length).floor.accuracy
            assert threshold.share > floor, "at the floor nothing is told"
            if gate.solves:
                assert threshold.share < cell.stop[threshold.length] < 1


def test_all_thresholds_must_hold():
    parity = next(g for g in GATES if g.suite == "parity" and g.solves)
    assert outcome_of(parity, (0.98, 0.75)).passed
    assert not outcome_of(parity, (0.979, 0.75)).passed
    assert not outcome_of(parity, (0.98, 0.749)).passed
    other = next(g for g in GATES if g.suite == "parity" and not g.solves)
    assert outcome_of(other, (0.70,)).passed
    assert not outcome_of(other, (0.701,)).passed


def test_twenty_steps_fail_where_they_must_and_the_table_says_so(capsys, tmp_path):
    out = tmp_path / "gates.jsonl"
    words = ["gates", "--steps=20", "--jobs=1", "--rows=32", f"--out={out}"]
    assert main(words) == 1
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(GATES) == 11
    assert [line["passed"] for line in lines] == [not gate.solves for gate in GATES]
    assert said.count(" NO\n") == sum(len(g.thresholds) for g in GATES if g.solves)
    assert "6 of 11 as they should be" in said
    for line in lines:
        assert line["steps"] == 20
        assert line["curve"][-1]["loss"] > 0
    first = Cell.from_dict(lines[0]["cell"])
    assert bits(train_cell(first.to_dict())) == bits(lines[0])


def bits(result):
    return {name: result[name] for name in ("key", "curve", "accuracy", "parameters")}


def test_processes_give_the_bits_of_one():
    gates = [gate for gate in GATES if gate.suite == "induction"]
    results = [
        {o.gate.model: bits(o.result) for o in run_gates(gates, jobs=jobs, steps=3, rows=32)}
        for jobs in (1, 2)
    ]
    assert len(results[0]) == 2
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--only=mqr"], "no gate for a task named 'mqr'; nearest: mqar"),
        (["--jobs=0"], "jobs=0 is not allowed"),
        (["--steps=0"], "steps=0 is not allowed"),
    ],
)
def test_wrong_words_are_refused(capsys, words, line):
    assert main(["gates", *words]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.slow
def test_every_gate_holds(tmp_path):
    assert main(["gates", f"--out={tmp_path / 'gates.jsonl'}"]) == 0
