"""Pathfinder: what an image must be for its label to be right."""

import numpy as np
import pytest

from seqzoo.train.lra import pathfinder
from seqzoo.train.lra.pathfinder import LENGTHS, LOOKS, Pathfinder
from seqzoo.train.lra.snakes import CROWDED, Random, Snakes
from tests.train.lra.tracing import Tracer

COUNT = 1000


@pytest.fixture(scope="module")
def hard():
    source = Pathfinder(images=COUNT)
    return source, source.block(np.random.default_rng(11))


def targets(dashes):
    return [dashes[dashes[:, 0] == snake] for snake in (1, 2)]


def test_label_says_whether_both_markers_are_on_one_snake(hard):
    source, block = hard
    for dashes, markers, label in zip(
        block["dashes"], block["markers"], block["labels"], strict=True
    ):
        (first, *start), (last, *end) = markers.tolist()
        assert label == (first == last)
        snakes = targets(dashes)
        assert [len(s) for s in snakes] == [source.length] * 2
        assert snakes[first - 1][0, 1:3].tolist() == start
        assert snakes[last - 1][-1, 1:3].tolist() == end


def test_half_of_the_labels_are_one_and_either_target_is_marked(hard):
    _, block = hard
    four_deviations = 4 * 0.5 / COUNT**0.5
    assert abs(block["labels"].mean() - 0.5) < four_deviations
    assert abs((block["markers"][:, 0, 0] == 1).mean() - 0.5) < four_deviations


def test_no_two_dashes_overlap_but_neighbours_of_one_snake(hard):
    source, block = hard
    snakes = Snakes(source.rules(1))
    for dashes in block["dashes"]:
        taken = np.zeros((snakes.side, snakes.side), np.int16)  # by the snakes before
        order = dashes[dashes[:, 0] > 0]
        for snake in np.unique(order[:, 0]):
            own = np.zeros_like(taken)  # of this snake, without its newest dash
            before = None
            for _, y, x, which in order[order[:, 0] == snake].tolist():
                mask = snakes.dash(which).mask
                at = (y + snakes.pad, x + snakes.pad)
                for board in (taken, own):
                    assert (mask.over(board, *at) + mask.pixels).max() < CROWDED
                if before is not None:
                    part = before[0].over(own, *before[1])
                    np.maximum(part, before[0].pixels, out=part)
                before = (mask, at)
            part = before[0].over(own, *before[1])
            np.maximum(part, before[0].pixels, out=part)
            np.maximum(taken, own, out=taken)


def test_first_tips_are_as_far_apart_as_asked_and_keep_to_the_middle(hard):
    source, block = hard
    for dashes in block["dashes"]:
        one, two = (snake[0, 1:3].astype(int) for snake in targets(dashes))
        assert np.abs(np.hypot(*(one - two)) - source.look.seed_distance) < 0.75
        band = 2 * source.look.seed_distance
        assert (band <= one).all()
        assert (one < 32 - band).all()


def test_dashes_follow_one_another_at_the_right_distance(hard):
    source, block = hard
    look = source.look
    pitch = look.length + 2 * look.margins[0]
    for dashes in block["dashes"][:200]:
        for snake in targets(dashes):
            steps = np.diff(snake[1:, 1:3].astype(float), axis=0)
            # From end to end: a pitch when straight, less by the turn, and a pixel of rounding.
            assert (np.hypot(*steps.T) < pitch + 2).all()


def peaks(source, block):
    """Of every dash that no marker hides: is it a target's, its brightest pixel, its full ink."""
    snakes, rows = Snakes(source.rules(1)), []
    for image, dashes in zip(block["images"], block["dashes"], strict=True):
        frame = np.pad(image, snakes.pad)
        for snake, y, x, which in dashes[dashes[:, 0] > 0].tolist():
            ink = snakes.dash(which).ink
            seen = ink.over(frame, y + snakes.pad, x + snakes.pad)
            if seen.max() < 255:
                best = np.unravel_index(ink.pixels.argmax(), ink.pixels.shape)
                rows.append((snake <= 2, int(seen[best]), int(ink.pixels.max())))
    return np.array(rows)


def test_all_dashes_are_equally_bright_by_default(hard):
    source, block = hard
    rows = peaks(source, {name: values[:200] for name, values in block.items()})
    assert 0 < rows[:, 0].mean() < 1
    same = rows[:, 1] == np.round(rows[:, 2] * source.look.ink)
    for kind in (0, 1):  # the edge of a marker brightens a few
        assert same[rows[:, 0] == kind].mean() > 0.98
    assert (block["images"].max((1, 2)) == 255).all()  # the markers


def test_a_picture_of_the_dashes_is_the_image(hard):
    source, block = hard
    for i in range(50):
        again = source.paint(block["dashes"][i], block["markers"][i], int(block["margins"][i]))
        assert np.array_equal(again, block["images"][i])


def judge(source, count, seed):
    """(connected by the image alone, label) of images."""
    block = source.__class__(**{**source.facts(), "images": count}).block(
        np.random.default_rng(seed)
    )
    tracers = {m: Tracer(source, m) for m in source.look.margins}
    found = [
        tracers[int(m)].connected(image)
        for image, m in zip(block["images"], block["margins"], strict=True)
    ]
    assert None not in found
    return np.array(found), block["labels"].astype(bool)


# A hard image where a dash of the other target looks like the next one can be read both ways:
# about one in two hundred. Nothing is ever cut that the label calls whole.
@pytest.mark.parametrize(
    ("difficulty", "count", "both_ways"),
    [
        ("easy", 60, 0),
        ("hard", 60, 1),
        pytest.param("easy", COUNT, 0.002, marks=pytest.mark.slow),
        pytest.param("intermediate", COUNT, 0.006, marks=pytest.mark.slow),
        pytest.param("hard", COUNT, 0.01, marks=pytest.mark.slow),
    ],
)
def test_connectivity_seen_in_the_image_alone_agrees_with_the_label(difficulty, count, both_ways):
    found, labels = judge(Pathfinder(difficulty=difficulty), count, 3)
    assert found[labels].all()
    wrong = (found & ~labels).sum()
    assert wrong <= (both_ways if both_ways >= 1 or not both_ways else both_ways * count)


@pytest.mark.slow
def test_connectivity_of_path_x_is_seen_too():
    found, labels = judge(Pathfinder(128), 100, 0)
    assert (found == labels).mean() >= 0.99


def test_as_published_targets_are_darker_than_distractors_at_32_pixels():
    source = Pathfinder(faithful=True, images=60)
    block = source.block(np.random.default_rng(0))
    rows = peaks(source, block).astype(float)
    target = rows[:, 0] == 1
    ratio = rows[:, 1] / rows[:, 2]
    assert np.median(ratio[target]) == pytest.approx(0.75, abs=0.01)
    assert np.median(ratio[~target]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize(("side", "images"), [(32, 6), (128, 2)])
def test_c_and_python_grow_the_same_snakes(monkeypatch, side, images, faithful):
    source = Pathfinder(side, "easy", faithful, images=images)
    fast = source.block(np.random.default_rng(5))
    pathfinder.snakes_of.cache_clear()
    monkeypatch.setattr(pathfinder, "NativeSnakes", Snakes)
    slow = source.block(np.random.default_rng(5))
    pathfinder.snakes_of.cache_clear()
    for name, values in fast.items():
        assert np.array_equal(values, slow[name]), name


def test_random_numbers_are_those_of_splitmix64():
    # First outputs for state 1234567, from the authors' generator (Rosetta Code's test vector).
    random = Random(1234567)
    highest = 1 << 32
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [random.below(highest - 1) for _ in range(3)] == [
        ((w >> 32) * (highest - 1)) >> 32 for w in words
    ]


@pytest.mark.parametrize("side", [64, 128, pytest.param(256, marks=pytest.mark.slow)])
def test_every_resolution_is_drawn_with_its_own_settings(side):
    source = Pathfinder(side, "easy", images=4)
    block = source.block(np.random.default_rng(0))
    assert block["images"].shape == (4, side, side)
    assert set(block["margins"].tolist()) <= set(LOOKS[side].margins)
    assert [len(s) for s in targets(block["dashes"][0])] == [LENGTHS["easy"]] * 2
    padding = LOOKS[side].padding - 1
    marked = block["images"] == 255
    assert not block["images"][:, :padding][~marked[:, :padding]].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resolution": 48}, "resolution=48 is not allowed; it must be one of 32, 64, 128, 256"),
        ({"difficulty": "harder"}, "no difficulty 'harder'; nearest: hard"),
        ({"images": 0}, "images=0 is not allowed"),
    ],
)
def test_impossible_parameters_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Pathfinder(**options)
