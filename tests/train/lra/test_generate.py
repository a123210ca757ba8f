"""Generated folders: the same bytes always, whole or not there."""

import json
import os
import signal

import numpy as np
import pytest

from seqzoo.train.lra.generate import generate, is_whole, load, read_manifest
from seqzoo.train.lra.listops import ListOps
from seqzoo.train.lra.pathfinder import Pathfinder

SIZES = {"train": 90, "val": 10, "test": 20}


class Numbers:
    """Blocks of seven samples, some of which come again and again."""

    name = "numbers-gen"

    def __init__(self, high=1 << 30, die_at=None, error=None):
        self.high, self.die_at, self.error, self.made = high, die_at, error, 0

    def facts(self):
        return {"high": self.high}

    def block(self, rng):
        if self.made == self.die_at:
            if self.error:
                raise self.error
            os.kill(os.getpid(), signal.SIGKILL)
        self.made += 1
        images = rng.integers(0, self.high, (7, 2)).astype(np.uint32)
        return {"images": images, "labels": (images[:, 0] % 2).astype(np.uint8)}


def contents(folder):
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != ".lock")
    return {path.name: path.read_bytes() for path in files}


def make(source, cache, **options):
    return generate(source, SIZES, cache=cache, **{"processes": 1, "progress": False, **options})


def test_a_folder_has_the_samples_asked_for_and_says_what_they_are(tmp_path):
    folder = make(Numbers(), tmp_path)
    for split, count in SIZES.items():
        arrays = load(folder, split)
        assert arrays["images"].shape == (count, 2)
        assert np.array_equal(arrays["labels"], arrays["images"][:, 0] % 2)
    manifest = read_manifest(folder)
    assert manifest["name"] == "numbers-gen"
    assert manifest["parameters"] == {"high": 1 << 30}
    assert (manifest["seed"], manifest["sizes"]) == (0, SIZES)
    assert set(manifest["files"]) == set(contents(folder)) - {"manifest.json"}
    assert not (folder / "blocks").exists()


@pytest.mark.parametrize(
    "source",
    [ListOps(30, 128, 5, roots=1000), Pathfinder(difficulty="easy", images=30)],
    ids=["listops", "pathfinder"],
)
def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, source):
    first, second = (make(source, tmp_path / name) for name in "ab")
    assert contents(first) == contents(second)
    other = make(source, tmp_path / "c", seed=1)
    assert other.name != first.name
    assert contents(other)["test-labels.npy"] != contents(first)["test-labels.npy"]


def test_two_processes_make_what_one_makes(tmp_path):
    source = ListOps(30, 128, 5, roots=500)
    one, two = (make(source, tmp_path / str(n), processes=n) for n in (1, 2))
    assert contents(one) == contents(two)


def test_a_finished_folder_is_not_made_again(tmp_path):
    first = make(Numbers(), tmp_path)
    again = Numbers()
    assert make(again, tmp_path) == first
    assert again.made == 0


def test_a_killed_generation_goes_on_and_ends_in_the_same_bytes(tmp_path):
    whole = make(Numbers(), tmp_path / "whole")
    child = os.fork()
    if not child:
        make(Numbers(die_at=6), tmp_path / "cut")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (cut,) = (tmp_path / "cut").iterdir()
    assert not is_whole(cut)
    assert len(list((cut / "blocks").glob("*.npz"))) == 6
    again = Numbers()
    assert make(again, tmp_path / "cut") == cut
    assert contents(cut) == contents(whole)
    assert again.made == 12  # of 3 + 2 + 13 blocks


def test_a_damaged_block_is_made_again(tmp_path):
    whole = make(Numbers(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(Numbers(die_at=6, error=KeyboardInterrupt), tmp_path / "cut")
    (cut,) = (tmp_path / "cut").iterdir()
    blocks = sorted((cut / "blocks").glob("*.npz"))
    data = bytearray(blocks[0].read_bytes())
    data[len(data) // 2] ^= 1
    blocks[0].write_bytes(data)
    assert contents(make(Numbers(), tmp_path / "cut")) == contents(whole)


def test_a_flipped_bit_is_noticed(tmp_path):
    folder = make(Numbers(), tmp_path)
    path = folder / "val-images.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    load(folder, "test")
    with pytest.raises(ValueError, match=r"val-images\.npy is damaged; remove the folder"):
        load(folder, "val")
    with pytest.raises(ValueError, match="has no other samples"):
        load(folder, "other")


def test_no_sample_comes_twice_in_any_split(tmp_path):
    folder = make(Numbers(high=12), tmp_path)  # 144 different ones for 120
    rows = [tuple(r) for split in SIZES for r in load(folder, split)["images"].tolist()]
    assert len(set(rows)) == len(rows) == 120


def test_what_is_tested_on_does_not_depend_on_how_much_is_trained_on(tmp_path):
    folders = [
        generate(Numbers(), {**SIZES, "train": n}, cache=tmp_path, processes=1, progress=False)
        for n in (5, 50)
    ]
    tests = [load(folder, "test")["images"] for folder in folders]
    assert np.array_equal(*tests)


def test_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="samples for train=0 is not allowed"):
        generate(Numbers(), {"train": 0}, cache=tmp_path)


def test_the_manifest_is_plain_json_with_digests(tmp_path):
    manifest = json.loads((make(Numbers(), tmp_path) / "manifest.json").read_text())
    assert all(len(digest) == 64 for digest in manifest["files"].values())
