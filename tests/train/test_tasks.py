"""Synthetic tasks: plain programs solve them, and their distributions are the papers'."""

import json
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from seqzoo.train.lra.listops import evaluate
from seqzoo.train.tasks import SYNTHETIC, create_task
from seqzoo.train.tasks.draws import Draws
from seqzoo.train.tasks.state_tracking import table_of
from tests.train.lra.tracing import Tracer

ROOT = Path(__file__).parents[2]
IGNORED = -100
ROW = "row"  # where the answer of a whole row belongs


# Solvers: each reads a row of ids, and says what it would answer at every position it cares about.


def solve_mqar(task, ids):
    context = 2 * task.pairs * task.passes
    value = dict(zip(ids[0:context:2], ids[1:context:2], strict=True))
    return {t: value[ids[t]] for t in range(context, len(ids), 2) if ids[t] in value}


def solve_induction(task, ids):
    return {len(ids) - 1: ids[ids.index(ids[-1]) + 1]}


def solve_passkey(task, ids):
    begin, ask = ids.index(10) + 1, ids.index(11)
    return {ask + i: ids[begin + i] for i in range(task.digits)}


def solve_selective_copying(task, ids):
    mark = task.vocab_size - 1
    data = [x for x in ids if 0 < x < mark]
    return {ids.index(mark) + i: x for i, x in enumerate(data)}


def solve_mad_selective_copying(task, ids):
    blank, mark = task.vocab_size - 2, task.vocab_size - 1
    data = [x for x in ids if x < blank]
    return {ids.index(mark) + 1 + i: x for i, x in enumerate(data)}


def solve_recall(task, ids):
    value, said = {}, {}
    for t in range(0, len(ids), 2):
        if ids[t] in value:
            said[t] = value[ids[t]]
        value[ids[t]] = ids[t + 1]
    return said


def solve_fuzzy_recall(task, ids):
    keys, pad = (task.vocab_size - 1) // 2, task.vocab_size - 1
    value, said, key, motif = {}, {}, (), ()
    for t, x in enumerate(ids):
        if x == pad:
            continue
        if x < keys:
            if motif:
                value.setdefault(key, motif)
                key, motif = (), ()
            key = (*key, x)
        else:
            motif = (*motif, x)
        known = value.get(key, ())
        if len(known) > len(motif):
            said[t] = known[len(motif)]
    return said


def solve_compression(task, ids):
    return dict(enumerate(ids[:-1]))


@cache
def learned(task):
    """What training on other rows shows."""
    shown = task.sample(5, "train", range(200))
    keys, values = shown["input_ids"][:, ::2], shown["labels"][:, 1::2]
    return dict(zip(keys.flatten().tolist(), values.flatten().tolist(), strict=True))


def solve_memorization(task, ids):
    return {t + 1: learned(task)[ids[t]] for t in range(0, len(ids), 2)}


def solve_parity(task, ids):
    return {t: sum(ids[: t + 1]) % 2 for t in range(len(ids))}


def solve_modular_arithmetic(task, ids):
    words = [str(x) if x < task.modulus else "+-*"[x - task.modulus] for x in ids]
    return {t: eval("".join(words[: t + 1])) % task.modulus for t in range(0, len(ids), 2)}


def solve_group_words(task, ids):
    if task.group == "z60":
        return {t: sum(ids[: t + 1]) % 60 for t in range(len(ids))}
    every = [p for p in permutations(range(5)) if task.group == "s5" or sign(p) == 1]
    said, p = {}, tuple(range(5))
    for t, x in enumerate(ids):
        p = tuple(p[i] for i in every[x])
        said[t] = every.index(p)
    return said


def solve_listops(task, ids):
    return {ROW: evaluate(x for x in ids if x)}


@cache
def tracer(task):
    return Tracer(task.source, margin=1)  # the only one up to 64 pixels


def solve_pathfinder(task, ids):
    side = task.source.resolution
    return {ROW: int(tracer(task).connected(np.array(ids).reshape(side, side)))}


def sign(p):
    return round(np.linalg.det(np.eye(5)[list(p)]))


SOLVERS = {
    "mqar": solve_mqar,
    "induction": solve_induction,
    "passkey": solve_passkey,
    "selective_copying": solve_selective_copying,
    "mad_selective_copying": solve_mad_selective_copying,
    "in_context_recall": solve_recall,
    "noisy_recall": solve_recall,
    "fuzzy_recall": solve_fuzzy_recall,
    "compression": solve_compression,
    "memorization": solve_memorization,
    "parity": solve_parity,
    "modular_arithmetic": solve_modular_arithmetic,
    "group_words": solve_group_words,
    "listops_gen": solve_listops,
    "pathfinder_gen": solve_pathfinder,
}
CASES = [
    *((name, {}) for name in SOLVERS),
    ("mqar", {"length": 32, "pairs": 4, "vocab_size": 64, "random_filler": False}),
    ("mqar", {"length": 64, "pairs": 8, "passes": 3, "vocab_size": 66, "power": 1.0}),
    ("passkey", {"length": 11 + 5, "fillers": 1, "depth": 1.0}),
    ("passkey", {"depth": 0.0, "digits": 3}),
    ("selective_copying", {"length": 8, "tokens": 4}),
    ("mad_selective_copying", {"length": 20, "tokens": 9}),
    ("noisy_recall", {"noise": 0.8, "length": 64}),
    ("fuzzy_recall", {"motif": 1, "length": 16}),
    ("fuzzy_recall", {"motif": 2, "vocab_size": 32}),
    ("memorization", {"map_seed": 3, "vocab_size": 20}),
    ("modular_arithmetic", {"length": 21, "modulus": 3}),
    ("group_words", {"group": "a5"}),
    ("group_words", {"group": "z60", "every": False}),
    ("parity", {"min_length": 3, "every": False}),
    ("listops_gen", {"length": 128, "min_length": 30, "max_depth": 5}),
    ("pathfinder_gen", {"difficulty": "easy"}),
]
IDS = [f"{name}-{','.join(map(str, options))}" for name, options in CASES]


def rows_of(task, split="val", count=200, seed=0):
    batch = task.sample(seed, split, range(count))
    return batch["input_ids"], batch["labels"]


def asked_of(task, wanted):
    """Answers by position; where a row has one answer, that one."""
    if task.readout == "pooled":
        return {ROW: wanted}
    return {t: x for t, x in enumerate(wanted) if x != IGNORED}


def test_every_task_of_the_table_has_a_solver():
    assert set(SOLVERS) == set(SYNTHETIC)
    assert all(cls.name == name for name, cls in SYNTHETIC.items())


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_plain_program_answers_everything(name, options):
    task = create_task(name, **options)
    ids, labels = rows_of(task, count=100)
    assert ids.shape == (100, task.length)
    assert labels.shape == ((100,) if task.readout == "pooled" else ids.shape)
    assert ids.dtype == labels.dtype == torch.int64
    assert 0 <= ids.min() <= ids.max() < task.vocab_size
    assert labels.max() < task.vocab_size
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        said = SOLVERS[name](task, row)
        asked = asked_of(task, wanted)
        assert asked
        assert {t: said[t] for t in asked} == asked


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_the_floor_is_above_chance_and_far_from_a_solution(name, options):
    floor = create_task(name, **options).floor
    task = create_task(name, **options)
    labels = rows_of(task)[1]
    answers = len(labels[labels != IGNORED].unique())
    assert 0.9 / answers <= floor.accuracy <= 0.6
    assert floor.how


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_sample_is_a_function_of_seed_split_and_index(name, options):
    task = create_task(name, **options)
    whole, labels = rows_of(task, "train", count=12)
    picked = task.sample(0, "train", [7, 3, 11])
    assert torch.equal(picked["input_ids"], whole[[7, 3, 11]])
    assert torch.equal(picked["labels"], labels[[7, 3, 11]])
    assert not torch.equal(rows_of(task, "train", 12, seed=1)[0], whole)
    assert not torch.equal(rows_of(task, "val", 12)[0], whole)
    assert not torch.equal(rows_of(task, "test", 12)[0], rows_of(task, "val", 12)[0])
    assert task.sample(0, "train", [])["input_ids"].shape == (0, task.length)
    assert create_task(**task.to_dict()) == task
    assert create_task(**json.loads(json.dumps(task.to_dict()))) == task


DIGESTS = """
import hashlib
from seqzoo.train.tasks import SYNTHETIC, create_task

made = {}
for name in SYNTHETIC:
    batch = create_task(name).sample(3, "train", range(1000, 1005))
    both = batch["input_ids"].numpy().tobytes() + batch["labels"].numpy().tobytes()
    made[name] = hashlib.sha256(both).hexdigest()
"""


def test_another_process_makes_the_same_bytes():
    done = subprocess.run(
        [sys.executable, "-c", f"{DIGESTS}\nimport json; print(json.dumps(made))"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "7"},
    )
    here = {}
    exec(DIGESTS, here)
    assert json.loads(done.stdout) == here["made"]


def test_sampling_leaves_the_global_random_states_alone():
    before = torch.get_rng_state(), np.random.get_state(legacy=True)[1].tolist()
    for name in SYNTHETIC:
        create_task(name).sample(0, "train", range(3))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state(legacy=True)[1].tolist()


@pytest.mark.parametrize("name", SYNTHETIC)
def test_splits_share_no_row(name):
    task = create_task(name)
    train, val, test = ({tuple(r) for r in rows_of(task, s)[0].tolist()} for s in SPLITS)
    assert len(train) == len(val) == len(test) == 200
    assert not train & val
    assert not train & test
    assert not val & test


SPLITS = ("train", "val", "test")


# Draws


def test_draws_are_even_uncorrelated_and_never_repeat_a_stream():
    draws = Draws(("x", 0), range(2000))
    u = draws.uniform(50)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / u.size) ** 0.5
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    assert ((counts - u.size / 100) ** 2 / (u.size / 100)).sum() < 150  # chi square, 99 degrees
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u, draws.uniform(50))):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / a.size**0.5
    assert len(np.unique(u)) == u.size
    other = Draws(("x", 1), range(2000)).uniform(50)
    assert not np.isin(other, u).any()


def test_choices_are_different_ones_in_every_order_alike():
    chosen = Draws(("c",), range(24_000)).choose(4, 3)
    counts = Counter(map(tuple, chosen.tolist()))
    assert set(counts) == set(permutations(range(4), 3))
    assert all(abs(n - 1000) < 5 * 1000**0.5 for n in counts.values())


def test_weighted_choices_have_the_odds_of_drawing_one_after_the_other():
    weights = np.array([4.0, 2.0, 1.0])
    chosen = Draws(("w",), range(50_000)).choose_weighted(weights, 2)
    counts = Counter(map(tuple, chosen.tolist()))
    for a, b in permutations(range(3), 2):
        odds = weights[a] / 7 * weights[b] / (7 - weights[a])
        assert abs(counts[a, b] / 50_000 - odds) < 5 * (odds / 50_000) ** 0.5


# Distributions


def test_mqar_has_keys_and_values_once_each_and_from_their_halves():
    task = create_task("mqar", length=64, pairs=8, vocab_size=100)
    ids, labels = (x.numpy() for x in rows_of(task, count=2000))
    keys, values = ids[:, 0:16:2], ids[:, 1:16:2]
    assert (keys.min(), keys.max()) == (1, 49)
    assert (values.min(), values.max()) == (50, 99)
    assert all(len(set(row)) == 8 for row in [*keys.tolist(), *values.tolist()])
    for row, answers in zip(ids, labels, strict=True):
        places = np.nonzero(answers != IGNORED)[0]
        assert len(places) == 8
        assert (places >= 16).all()
        assert (places % 2 == 0).all()
        assert sorted(row[places]) == sorted(row[0:16:2])
    evenly = np.bincount(keys.ravel(), minlength=50)[1:]
    assert abs(evenly - evenly.mean()).max() < 5 * evenly.mean() ** 0.5
    filler = ids[:, 17::2]
    assert set(np.unique(filler)) == set(range(100))


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_mqar_asks_at_places_of_the_power_law(power):
    task = create_task("mqar", length=24, pairs=1, vocab_size=64, power=power)
    labels = rows_of(task, count=20_000)[1].numpy()
    places = (labels.argmax(axis=1) - 2) // 2
    odds = np.arange(1, 12) ** (power - 1.0)
    odds /= odds.sum()
    shares = np.bincount(places, minlength=11) / 20_000
    assert (abs(shares - odds) < 5 * (odds / 20_000) ** 0.5).all()


def test_mqar_equals_the_authors_distribution_of_several_queries():
    """Their way, numpy's choice without replacement, row by row."""
    pairs, space, power = 3, 6, 0.01
    task = create_task("mqar", length=18, pairs=pairs, vocab_size=64, power=power)
    ids, labels = (x.numpy() for x in rows_of(task, count=6000))
    ours = Counter()
    for row, answers in zip(ids, labels, strict=True):
        place = {int(row[t]): (t - 6) // 2 for t in np.nonzero(answers != IGNORED)[0]}
        ours[tuple(place[int(k)] for k in row[0:6:2])] += 1
    rng, theirs = np.random.RandomState(0), Counter()
    odds = np.arange(1, space + 1) ** (power - 1.0)
    for _ in range(6000):
        theirs[tuple(rng.choice(space, size=pairs, replace=False, p=odds / odds.sum()))] += 1
    assert len(set(ours) | set(theirs)) == 120
    for places in product(range(space), repeat=pairs):
        a, b = ours[places], theirs[places]
        assert abs(a - b) < 5 * (a + b + 1) ** 0.5


def test_mqar_at_another_length_keeps_the_share_of_pairs():
    task = create_task("mqar", length=32, pairs=4, vocab_size=256)
    assert task.at(64).pairs == 8
    assert task.at(64).floor.accuracy == 1 / 8
    with pytest.raises(ValueError, match="vocab_size=256 is not allowed; it must exceed 256"):
        task.at(256)


def test_recall_asks_in_training_for_every_next_token_and_else_for_what_was_seen():
    task = create_task("noisy_recall", noise=0.4)
    ids, labels = rows_of(task, "train")
    assert torch.equal(labels[:, :-1], ids[:, 1:])
    answers = create_task("noisy_recall", noise=0.4, next_token=False).sample(
        0, "train", range(200)
    )
    assert torch.equal(answers["input_ids"], ids)
    asked = answers["labels"] != IGNORED
    assert torch.equal(answers["labels"][asked], labels[asked])
    ids, labels = (x.numpy() for x in rows_of(task, count=2000))
    pairs = ids.reshape(2000, 64, 2)
    noise = (pairs >= 16).all(axis=2)
    assert ((pairs >= 16).any(axis=2) == noise).all()
    assert abs(noise[:, :-1].mean() - 0.4 * 62 / 63) < 0.01
    assert not noise[:, -1].any()
    assert (labels[:, -2] == ids[:, -1]).all()
    for row, said in zip(pairs.tolist(), labels[:, ::2].tolist(), strict=True):
        seen = set()
        for (key, _), answer in zip(row, said, strict=True):
            assert (answer != IGNORED) == (key in seen)
            seen |= {key} if key < 16 else set()


def test_fuzzy_recall_measures_with_keys_of_full_size_and_trains_with_all():
    task = create_task("fuzzy_recall")
    sizes = {split: Counter() for split in ("train", "val")}
    for split, found in sizes.items():
        for row in rows_of(task, split)[0].tolist():
            kept = [x for x in row if x != 15]
            runs = "".join("k" if x < 7 else "v" for x in kept)[:-3]
            found.update(len(run) for run in runs.split("v") if run)
            assert row[: len(row) - len(kept)] == [15] * (len(row) - len(kept))
    assert set(sizes["val"]) <= {3, 1, 2}
    assert sizes["val"][3] > 20 * (sizes["val"][1] + sizes["val"][2])  # one cut at an end
    assert set(sizes["train"]) == {1, 2, 3}


def test_selective_copying_scatters_evenly():
    task = create_task("selective_copying", length=24, tokens=4)
    ids, _ = rows_of(task, count=5000)
    assert (ids[:, -4:] == 15).all()
    data = (ids > 0) & (ids < 15)
    assert (data.sum(1) == 4).all()
    share = data[:, :20].float().mean(0)
    assert (share - 0.2).abs().max() < 5 * (0.2 / 5000) ** 0.5


def test_mad_selective_copying_puts_blanks_before_tokens_chosen_evenly():
    task = create_task("mad_selective_copying", length=34, tokens=4)
    ids, _ = rows_of(task, count=3000)
    gaps = torch.zeros(4)
    for row in ids[:, :29].tolist():
        places = [t for t, x in enumerate(row) if x != 14]
        assert places[-1] == 28
        gaps += torch.tensor([b - a - 1 for a, b in zip([-1, *places], places, strict=False)])
    assert (gaps / 3000 - 25 / 4).abs().max() < 0.2


def test_passkey_stands_at_the_depth_asked_for():
    for depth, place in ((0.0, 0), (0.5, 26), (1.0, 52)):
        ids, _ = rows_of(create_task("passkey", length=64, depth=depth))
        assert (ids[:, place] == 10).all()
    places = (rows_of(create_task("passkey", length=64), count=4000)[0] == 10).nonzero()[:, 1]
    assert set(places.tolist()) == set(range(53))


def test_rows_of_state_tracking_end_early_in_training_only():
    task = create_task("parity", min_length=3)
    ids, labels = rows_of(task, "train", 4000)
    lengths = (ids != 2).sum(1)
    assert torch.equal(labels != IGNORED, ids != 2)
    counts = torch.bincount(lengths, minlength=41)[3:]
    assert (counts - 4000 / 38).abs().max() < 5 * (4000 / 38) ** 0.5
    assert int(counts.sum()) == 4000
    assert (rows_of(task)[0] < 2).all()
    assert task.vocab_size == task.at(256).vocab_size == 3


@pytest.mark.parametrize(("group", "order"), [("z60", 60), ("a5", 60), ("s5", 120)])
def test_groups_are_groups(group, order):
    table = table_of(group)
    assert table.shape == (order, order)
    assert all(len(set(line)) == order for line in [*table, *table.T])
    p, q, r = np.random.RandomState(0).randint(order, size=(3, 500))
    assert (table[table[p, q], r] == table[p, table[q, r]]).all()
    assert (table[0] == np.arange(order)).all()
    assert (table == table.T).all() == (group == "z60")


def test_where_answers_are_read():
    others = {"compression": "last", "listops_gen": "pooled", "pathfinder_gen": "pooled"}
    assert {n: c.readout for n, c in SYNTHETIC.items() if c.readout != "token"} == others
    assert {n: c.n_classes for n, c in SYNTHETIC.items() if c.n_classes} == {
        "listops_gen": 10,
        "pathfinder_gen": 2,
    }


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mqr", {}, "no synthetic task 'mqr'; nearest: mqar"),
        ("mqar", {"pair": 3}, "no option of task 'mqar' named 'pair'; nearest: pairs"),
        ("mqar", {"pairs": "3"}, "pairs='3' is not allowed; it must be a number"),
        ("mqar", {"length": 33}, "length=33 is odd; nearest: 32, 34"),
        ("mqar", {"pairs": 17}, "length=64 is not allowed: pairs=17, shown 1 times.* take 68"),
        ("mqar", {"vocab_size": 64}, "vocab_size=64 is not allowed; it must exceed 64"),
        ("mqar", {"power": 0}, "power=0 is not allowed"),
        ("parity", {"length": 0}, "length=0 is not allowed"),
        ("parity", {"min_length": 50}, "min_length=50 is not allowed; it must be from 1 to"),
        ("group_words", {"group": "s4"}, "no group 's4'; .*all: a5, s5, z60"),
        ("passkey", {"length": 11}, "length=11 is not allowed; digits=5 take 12 tokens"),
        ("passkey", {"depth": 1.5}, "depth=1.5 is not allowed"),
        ("selective_copying", {"tokens": 200}, "length=256 is not allowed: tokens=200"),
        ("mad_selective_copying", {"tokens": 128}, "it must be at least 258"),
        ("in_context_recall", {"noise": 0.2}, "noise_ids=0 is not allowed with noise=0.2"),
        ("fuzzy_recall", {"motif": 8}, "vocab_size=16 is not allowed with motif=8"),
        ("modular_arithmetic", {"modulus": 1}, "modulus=1 is not allowed"),
        ("compression", {"vocab_size": 1}, "vocab_size=1 is not allowed"),
        ("listops_gen", {"length": 501}, "length=501 is not allowed; .* must be at least 502"),
        ("listops_gen", {"max_depth": 3}, "fewer than one expression in 1000 has a length between"),
        ("listops_gen", {"max_args": 1}, "max_args=1 is not allowed"),
        ("listops_gen", {"min_length": 0}, "min_length=0 is not allowed"),
        ("pathfinder_gen", {"length": 2000}, "length=2000 is not .* 1024, 4096, 16384, 65536"),
        ("pathfinder_gen", {"difficulty": "harder"}, "no difficulty 'harder'; nearest: hard"),
    ],
)
def test_wrong_options_are_refused_in_one_line(name, options, said):
    with pytest.raises(ValueError, match=said) as error:
        create_task(name, **options)
    assert "\n" not in str(error.value)


def test_unknown_splits_are_refused():
    with pytest.raises(ValueError, match="no split 'valid'; nearest: val"):
        create_task("parity").sample(0, "valid", range(3))
