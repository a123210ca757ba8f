"""Cells: plain data in, plain data out, the same bits in any process."""

import json

import pytest
import torch

from seqzoo.train.cells import Cell, train_cell

MEMORY = {
    "decoder": {"d_model": 32, "pattern": ["short_conv", "mlp"]},
    "task": {"name": "memorization", "length": 8, "vocab_size": 65},
    "steps": 100,
    "lr": 0.005,
    "warmup_steps": 5,
    "eval_every": 5,
    "eval_rows": 64,
    "test_rows": 200,
}
SHORT = {
    **MEMORY,
    "decoder": {"d_model": 8, "pattern": ["attention", "mlp"], "dropout": 0.1},
    "lengths": [16],
    "steps": 5,
    "eval_every": 2,
}


def bits(result):
    return {name: value for name, value in result.items() if "seconds" not in name}


def test_a_cell_learns_and_is_measured_on_rows_it_never_trained_on():
    result = train_cell(MEMORY)
    assert result["curve"][0]["accuracy"]["8"] < 0.9
    assert result["accuracy"] == {"8": 1.0}
    assert result["curve"][-1]["loss"] < 0.1 < result["curve"][0]["loss"]
    assert (result["steps"], result["stopped"]) == (100, False)
    assert result["floor"]["8"]["accuracy"] == 1 / 32
    assert json.loads(json.dumps(result)) == result


def test_it_stops_at_the_first_look_that_finds_all_shares_reached():
    result = train_cell({**MEMORY, "stop": {8: 0.9}})
    shares = [look["accuracy"]["8"] for look in result["curve"]]
    assert result["stopped"]
    assert shares[-1] >= 0.9
    assert all(share < 0.9 for share in shares[:-1])
    assert result["steps"] == 5 * len(shares) < 100


def test_the_same_bits_come_from_any_state_of_the_process():  # from others too: see test_gates
    here = train_cell(SHORT)
    torch.manual_seed(99)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    again = train_cell(SHORT)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == 2
    assert bits(here) == bits(again) == bits(train_cell(here["cell"]))
    assert [look["step"] for look in here["curve"]] == [2, 4, 5]


def test_seeds_of_weights_and_data_are_apart():
    first = train_cell(SHORT)
    assert bits(train_cell({**SHORT, "data_seed": 0}))["curve"] == first["curve"]
    for change in ({"seed": 1}, {"data_seed": 1}, {"seed": 1, "data_seed": 0}):
        other = train_cell({**SHORT, **change})
        assert other["curve"] != first["curve"]
        assert other["key"] != first["key"]


def test_an_autoencoder_answers_from_the_last_vector_alone():
    cell = {
        "decoder": {"d_model": 32, "pattern": ["attention", "mlp"], "position": "rope"},
        "task": {"name": "compression", "length": 4, "vocab_size": 5},
        "steps": 300,
        "lr": 0.005,
        "test_rows": 256,
    }
    result = train_cell(cell)
    assert result["accuracy"]["4"] > 0.95
    memoryless = train_cell({**cell, "decoder": {"d_model": 32, "pattern": ["mlp"]}, "steps": 100})
    assert memoryless["accuracy"]["4"] < 0.5  # the last token is always the mark


def test_auxiliary_losses_are_trained_on():
    decoder = {"d_model": 8, "pattern": ["switch"], "options": {"switch": {"n_experts": 2}}}
    result = train_cell({**SHORT, "decoder": decoder})
    without = {"switch": {"n_experts": 2, "balance_loss": 0.0, "z_loss": 0.0}}
    other = train_cell({**SHORT, "decoder": {**decoder, "options": without}})
    assert result["curve"] != other["curve"]


def test_a_description_is_completed_and_hashed_the_same_however_it_was_written():
    cell = Cell.from_dict(SHORT)
    complete = cell.to_dict()
    assert Cell.from_dict(complete) == cell
    assert Cell.from_dict(json.loads(json.dumps(complete))).key() == cell.key()
    assert complete["lengths"] == [8, 16]
    assert complete["task"]["map_seed"] == 12345
    assert complete["decoder"]["norm"] == "rmsnorm"
    assert Cell.from_dict({**SHORT, "lengths": [16, 8]}).key() == cell.key()
    assert Cell.from_dict({**SHORT, "lr": 0.021}).key() != cell.key()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stepps": 3}, "no option of a cell named 'stepps'; nearest: steps"),
        ({"steps": 0}, "steps=0 is not allowed"),
        ({"task": {"name": "memorisation"}}, "no synthetic task 'memorisation'; nearest: memori"),
        ({"task": {"length": 8}}, "a cell's task needs a name"),
        ({"decoder": {"pattern": ["mambo"]}}, "no mixer 'mambo'; nearest: mamba"),
        ({"lengths": [15]}, "length=15 is odd"),
        ({"stop": {32: 0.5}}, r"stop at length 32 is not measured; lengths=\(8, 16\)"),
        ({"decoder": {"causal": False}}, "needs `causal: true`"),
    ],
)
def test_wrong_cells_are_refused_in_one_line(change, said):
    with pytest.raises(ValueError, match=said) as error:
        train_cell({**SHORT, **change})
    assert "\n" not in str(error.value)


def test_a_loss_that_is_not_finite_ends_the_cell_and_names_the_step():
    with pytest.raises(ValueError, match=r"step \d+: the loss is (nan|inf)"):
        train_cell({**SHORT, "lr": 1e30, "steps": 40, "clip": 1e30, "warmup_steps": 0})
