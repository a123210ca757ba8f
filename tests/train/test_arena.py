"""ListOps and Pathfinder made as they are read: pure rows, padding, cells, grids both ways."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from seqzoo.train.ablation import run as running
from seqzoo.train.ablation.grid import BASELINE, Grid
from seqzoo.train.ablation.match import figures
from seqzoo.train.ablation.run import run_grid
from seqzoo.train.ablation.work import attempt
from seqzoo.train.cells import build_network, train_cell
from seqzoo.train.lra.listops import ListOps
from seqzoo.train.report.load import load
from seqzoo.train.report.page import page
from seqzoo.train.report.passes import PHASES, Stack, build, step_of, tokens
from seqzoo.train.tasks import arena, create_task
from seqzoo.zoo.spec import DecoderSpec

SMALL = {"name": "listops_gen", "length": 64, "min_length": 10, "max_depth": 4}
IMAGES = {"name": "pathfinder_gen", "difficulty": "easy"}
BOTH = pytest.mark.parametrize("options", [SMALL, IMAGES], ids=["listops", "pathfinder"])
DECODER = {
    "d_model": 16,
    "pattern": ["attention", "mlp"],
    "position": "rope",
    "causal": False,
    "options": {
        "attention": {"n_heads": 2},
        "deltanet": {"n_heads": 2},
        "mamba": {"d_state": 4, "expand": 1},
        "s4d": {"d_state": 4},
    },
}
QUICK = {"steps": 2, "batch_size": 4, "eval_every": 1, "eval_rows": 8, "test_rows": 8}
GRID = {
    "name": "both-ways",
    "decoder": DECODER,
    "target": "attention",
    "mixers": ["deltanet", "mamba", "s4d"],
    "tasks": [SMALL],
    "lrs": [0.003],
    "sweep_seeds": [0, 1],
    "final_seeds": [],
    "train": QUICK,
}


# Rows


def test_rows_are_the_same_one_by_one_and_in_any_order_across_blocks():
    task = create_task(**SMALL)
    edge = arena.BLOCK
    numbers = [edge + 1, 3, edge - 1, 0, 2 * edge, edge]
    batch = task.sample(7, "train", numbers)
    for i, number in enumerate(numbers):
        arena._block.cache_clear()  # nothing may hang on what was made before
        row = task.sample(7, "train", [number])
        assert {name: value[0].tolist() for name, value in row.items()} == {
            name: value[i].tolist() for name, value in batch.items()
        }
    assert len({tuple(row) for row in batch["input_ids"].tolist()}) == len(numbers)


def test_expressions_keep_to_the_window_and_padding_is_masked():
    task = create_task(**SMALL)
    batch = task.sample(0, "val", range(2 * arena.BLOCK))
    lengths = batch["attention_mask"].sum(1)
    assert 10 < lengths.min() < 14
    assert 60 < lengths.max() < 64
    place = torch.arange(64)
    assert torch.equal(batch["attention_mask"], (place < lengths[:, None]).long())
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 0)


@pytest.mark.parametrize(
    "window",
    [{}, {"max_depth": 5, "max_length": 128, "min_length": 30}, {"max_args": 4, "min_length": 100}],
)
def test_the_share_that_is_kept_is_the_one_that_is_seen(window: Any):
    source = ListOps(**window, roots=8192)
    kept = sum(len(source.block(np.random.default_rng(i))["labels"]) for i in range(2))
    begun = 2 * source.roots
    spread = (source.share * (1 - source.share) / begun) ** 0.5
    assert abs(kept / begun - source.share) < 4 * spread


def test_at_another_length_expressions_and_images_are_larger():
    longer = create_task(**SMALL).at(128)
    assert (longer.length, longer.min_length) == (128, 20)
    lengths = longer.sample(0, "test", range(200))["attention_mask"].sum(1)
    assert 20 < lengths.min() < 30
    assert 64 < lengths.max() < 128
    with pytest.raises(ValueError, match="length=1024 is not allowed with min_length=160"):
        create_task(**SMALL).at(1024)
    larger = create_task(**IMAGES).at(4096)
    assert larger.source.resolution == 64
    assert larger.sample(0, "test", range(2))["input_ids"].shape == (2, 4096)
    with pytest.raises(ValueError, match="length=2048 is not allowed"):
        create_task(**IMAGES).at(2048)


def test_published_looks_and_difficulties_are_other_images():
    made = {
        (difficulty, faithful): create_task(
            "pathfinder_gen", difficulty=difficulty, faithful=faithful
        ).sample(0, "val", range(20))["input_ids"]
        for difficulty in ("easy", "hard")
        for faithful in (False, True)
    }
    ink = {key: float((ids > 0).sum()) for key, ids in made.items()}
    assert ink["hard", False] > 1.2 * ink["easy", False]
    # As published distractors have all the ink that a dash can have, and by default three quarters.
    mean = {key: float(ids[ids > 0].double().mean()) for key, ids in made.items()}
    assert mean["easy", True] > 1.1 * mean["easy", False]
    assert all(int(ids.max()) == 255 for ids in made.values())


def test_the_floor_reads_one_operator_and_says_what_reading_nothing_gives():
    floor = create_task("listops_gen").floor
    assert floor.accuracy == pytest.approx(0.365, abs=0.03)
    share = float(floor.how.rpartition(" ")[2])
    assert share == pytest.approx(0.174, abs=0.02)
    assert "first operator" in floor.how
    assert create_task("pathfinder_gen").floor == (0.5, "a coin")


# Models


@pytest.mark.parametrize("pattern", ["attention", "mamba", "s4d", "deltanet", "short_conv"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_never_changes_an_answer(pattern: str, causal: bool):
    task = create_task(**SMALL)
    spec = DecoderSpec.from_dict({**DECODER, "pattern": [pattern, "mlp"], "causal": causal})
    torch.manual_seed(0)
    network = build_network(spec, task).eval()
    batch = task.sample(0, "val", range(6))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        whole = network(ids, attention_mask=mask).logits
        assert whole.shape == (6, 10)
        other = torch.where(mask == 0, 5, ids)
        assert torch.equal(network(other, attention_mask=mask).logits, whole)
        assert not torch.allclose(network(ids).logits, whole, atol=1e-4)  # it would be read
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = network(ids[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(alone, whole[row], rtol=1e-4, atol=1e-4)


@BOTH
def test_a_cell_has_the_same_bits_twice(options: Any):
    cell = {"decoder": {**DECODER, "dropout": 0.1}, "task": options, **QUICK}
    results = [train_cell(cell) for _ in range(2)]
    first, second = ({k: v for k, v in r.items() if "seconds" not in k} for r in results)
    assert first == second
    assert json.loads(json.dumps(first)) == first
    assert first["curve"][0]["loss"] > 0.5
    assert set(first["floor"]) == {str(create_task(**options).length)}


def test_a_cell_learns_more_than_the_commonest_answer():
    settings = {"steps": 120, "warmup_steps": 10, "lr": 0.01, "eval_every": 120, "eval_rows": 8}
    result = train_cell({"decoder": DECODER, "task": SMALL, **settings, "test_rows": 512})
    common = float(result["floor"]["64"]["how"].rpartition(" ")[2])
    assert result["accuracy"]["64"] > common + 0.06


# Grids


def test_a_stack_that_reads_both_ways_is_swapped_and_counted():
    studies = Grid.from_dict({**GRID, "tasks": [SMALL, IMAGES], "match": "none"}).studies()
    swapped = ["attention", "deltanet", "mamba", "s4d"]
    assert [s.variant.mixer for s in studies] == swapped * 2
    assert [s.variant.where for s in studies] == [BASELINE, "all", "all", "all"] * 2
    one = DecoderSpec.from_dict({**DECODER, "causal": True, "swap": {0: "mamba"}})
    forth = build_network(one, create_task(**SMALL)).model.entries[0].mixer.cost(64)
    for study in (studies[2], studies[6]):
        found = figures(study.variant.decoder, study.task)
        assert found.state_bytes == 0
        mlp = found.mixer_parameters - 2 * forth.parameters
        assert mlp == figures(DECODER, SMALL).mixer_parameters - 4 * 16 * 16
    # The head: one row of classes. Everything else is the mixers'.
    network = build_network(DecoderSpec.from_dict(DECODER), create_task(**SMALL))
    mixers = sum(entry.mixer.cost(64).flops for entry in network.model.entries)
    assert figures(DECODER, SMALL).flops == mixers + 2 * 16 * 10
    assert figures(DECODER, SMALL).parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("match", "mixer"), [("parameters", "mamba"), ("flops", "deltanet")])
def test_a_matched_stack_costs_what_the_baseline_does(match: str, mixer: str):
    both = Grid.from_dict({**GRID, "match": match, "mixers": [mixer]}).studies()
    wanted, found = (getattr(figures(s.variant.decoder, s.task), match) for s in both)
    assert found == pytest.approx(wanted, rel=0.02)


def test_states_cannot_be_matched_where_there_are_none():
    with pytest.raises(ValueError, match="match=state is not allowed with `causal: false`"):
        Grid.from_dict({**GRID, "match": "state"})


def test_a_grid_both_ways_is_run_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(
        running.BACKENDS, "local", lambda cells, _: ((k, attempt(c)) for k, c in cells.items())
    )
    given = {**GRID, "mixers": ["deltanet", "s4d"], "match": "none"}
    run_grid(Grid.from_dict(given), tmp_path, progress=False)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} == {"done"}
    assert {(row["task"], row["state_bytes"]) for row in rows} == {("listops_gen", "0")}
    notes = {row["note"] for row in rows if row["metric"] == "floor"}
    assert len(notes) == 1
    assert "first operator" in notes.pop()
    whole, table = page(load(tmp_path))
    assert len(table) == 3
    assert "listops_gen, trained at 64" in whole
    assert "not drawn: no stack carries a state" in whole


def test_a_stack_that_reads_both_ways_has_no_decoding_to_clock():
    stack = Stack(DECODER, 16)
    assert stack.phases == ("forward", "train")
    assert Stack({**DECODER, "causal": True}, 16).phases == PHASES
    model = build(stack)
    for phase in stack.phases:
        step_of(model, phase, tokens(stack, 2, 8))()


def test_the_grid_that_comes_with_it_reads_both_ways():
    path = Path(__file__).parents[2] / "configs/ablation/arena.yaml"
    given = yaml.safe_load(path.read_text())
    assert given["decoder"]["causal"] is False
    off = [line.partition("# - ")[2] for line in path.read_text().splitlines() if "# - {" in line]
    assert [task["name"] for task in given["tasks"]] == ["listops_gen"]
    more = [yaml.safe_load(line) for line in off]  # what is switched off is sound as well
    assert [task["name"] for task in more] == ["pathfinder_gen"]
    assert len(Grid.from_dict({**given, "tasks": more, "match": "none"}).studies()) == 4
