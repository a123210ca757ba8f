"""What is special to the low-rank delta rule; what both must do is in `test_delta.py`."""

import pytest
import torch

from seqzoo.kernels.delta import delta
from seqzoo.kernels.delta_lowrank import delta_lowrank
from tests.kernels.delta_rules import compare, cut, everything, flags, inputs, leaves, naive, truth
from tests.tolerances import EXACT, relative_error

KINDS = ("lowrank", "lowrank scalar")


def test_equals_the_recurrence_and_the_chunks_of_flash_linear_attention():
    given = {n: x.float() for n, x in inputs(2, 96, 2, 8, 4, kind="lowrank").items()}
    theirs, start = naive("generalized_delta_rule/dplr"), given["initial_state"]
    turned = [given[n].transpose(1, 2) for n in ("q", "k", "v", "a", "b", "log_decay")]
    for run in (theirs.dplr_recurrence, theirs.dplr_chunkwise):
        wanted, last = run(*turned, initial_state=start)
        o, state = delta_lowrank(**given, scale=8**-0.5)
        assert relative_error(o, wanted.transpose(1, 2)) <= 1e-5
        assert relative_error(state, last) <= 1e-5


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_the_delta_rule_is_the_case_that_reads_and_writes_its_own_key(kind, backend):
    given = inputs(2, 70, 2, 5, 3, kind=kind)
    options = flags(2, 70) | {"backend": backend}
    wanted, last = delta(**given, **options)
    beta, w = given.pop("beta")[..., None], given["log_decay"].exp()
    k, w = given["k"], w if kind == "vector" else w[..., None]
    given |= {"v": beta * given["v"], "a": -w * k, "b": beta * k}
    o, state = delta_lowrank(**given, **options)
    real = options["mask"]
    assert relative_error(o[real], wanted[real]) <= EXACT
    assert relative_error(state, last) <= EXACT


def test_a_token_reads_before_its_own_decay():
    # a state of one number: s = w s + b a s + k v
    one = {n: torch.full((1, 1, 1, 1), x) for n, x in {"q": 1.0, "k": 0.0, "v": 0.0}.items()}
    one |= {"a": torch.full((1, 1, 1, 1), -1.0), "b": torch.full((1, 1, 1, 1), 0.25)}
    decay = torch.full((1, 1, 1), 0.5).log()
    o, _ = delta_lowrank(**one, log_decay=decay, initial_state=torch.ones(1, 1, 1, 1))
    assert o.item() == 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_transitions_that_grow_are_computed_as_exactly(kind):
    # nothing bounds a and b: over 40 tokens the state gains several powers of ten
    given = {name: x.float() for name, x in inputs(2, 40, 2, 6, 3, kind=kind).items()}
    given["a"] = -1.5 * given["a"]
    found = everything(leaves(given, torch.float32))
    compare(found, truth(given), torch.float32)


@pytest.mark.parametrize("T", [2, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, T):
    given = leaves(inputs(2, T, 2, 4, 3, kind=kind), torch.float64)
    g = given["log_decay"].detach().view(2, T, 2, -1).requires_grad_()
    tensors = [given[n] for n in ("q", "k", "v", "a", "b")]
    arguments = (*tensors, g, given["initial_state"], "chunked")
    torch.library.opcheck(torch.ops.seqzoo.delta_lowrank.default, arguments)


def test_a_first_token_that_resets_reads_nothing_of_the_state():
    given = inputs(1, 40, 2, 3, 4, kind="lowrank")
    given["initial_state"] = torch.full_like(given["initial_state"], 1e30)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[:, 0] = True
    o, _ = delta_lowrank(**given, reset=reset)
    alone = cut(given, slice(None)) | {"initial_state": None}
    assert relative_error(o, delta_lowrank(**alone, backend="reference")[0]) <= EXACT


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"q": (2, 9, 2, 3)}, "q is"),
        ({"k": (2, 9, 10)}, "delta_lowrank takes"),
        ({"a": (2, 9, 2)}, "a is"),
        ({"b": (2, 9, 2, 3)}, "b is"),
        ({"log_decay": (2, 9, 2, 1)}, "log_decay is"),
        ({"initial_state": (2, 2, 4, 3)}, "initial_state is"),
        ({"reset": (2, 8)}, "reset is"),
        ({"backend": "other"}, "no backend of delta_lowrank"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(changed, words):
    keys = dict.fromkeys(("q", "k", "a", "b", "log_decay"), (2, 9, 2, 5))
    shapes = keys | {"v": (2, 9, 2, 3)} | changed
    given = {n: torch.zeros(x) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=words):
        delta_lowrank(**given)
