"""Checkpoints are whole or refused."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from seqzoo.train import checkpoint
from seqzoo.train.checkpoint import CheckpointError, SafeCheckpointIO, damage, find_last, sweep


@pytest.fixture
def io():
    return SafeCheckpointIO()


def content(step):
    return {
        "global_step": step,
        "state_dict": {"w": torch.full((5000,), float(step))},
        "loops": {"n": [1, 2], "name": "x"},
    }


def save(io, path, step):
    io.save_checkpoint(content(step), path)
    os.utime(path, ns=(step * 10**9, step * 10**9))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_what_is_saved_comes_back_and_sha256sum_agrees(io, tmp_path):
    path = tmp_path / "new" / "a.ckpt"
    io.save_checkpoint(content(3), path)
    loaded = io.load_checkpoint(path)
    assert torch.equal(loaded["state_dict"].pop("w"), torch.full((5000,), 3.0))
    assert loaded == {"global_step": 3, "state_dict": {}, "loops": {"n": [1, 2], "name": "x"}}
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.ckpt", "a.ckpt.sha256"]
    if shutil.which("sha256sum"):
        command = ["sha256sum", "-c", "--strict", "a.ckpt.sha256"]
        subprocess.run(command, cwd=path.parent, check=True, capture_output=True)


def test_flipped_bit_anywhere_is_refused_and_the_newest_good_file_named(io, tmp_path):
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    save(io, tmp_path / "older.ckpt", 1)
    save(io, old, 2)
    save(io, new, 3)
    whole = new.read_bytes()
    for at in torch.randint(len(whole), (100,)).tolist():
        flip(new, at)
        with pytest.raises(CheckpointError, match=r"new\.ckpt.*SHA-256.*good one is .*old\.ckpt"):
            io.load_checkpoint(new)
        new.write_bytes(whole)
    io.load_checkpoint(new)


def test_truncated_file_is_refused_with_both_sizes(io, tmp_path):
    path = tmp_path / "a.ckpt"
    io.save_checkpoint(content(1), path)
    whole = path.read_bytes()
    for share in (0, 0.001, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        sizes = f"expected {len(whole)} bytes, found {int(share * len(whole))}; there is no good"
        with pytest.raises(CheckpointError, match=sizes):
            io.load_checkpoint(path)


def test_truncated_file_without_a_hash_gives_one_line_too(io, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(content(1), path)
    assert io.load_checkpoint(path)["global_step"] == 1
    whole = path.read_bytes()
    for share in (0, 0.001, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(
            CheckpointError, match=r"a\.ckpt: it (is empty|cannot be read)"
        ) as error:
            io.load_checkpoint(path)
        assert "\n" not in str(error.value)


# Without this, torch's warning would refuse in our place.
@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
def test_pickled_code_does_not_run_even_when_the_environment_allows_it(io, tmp_path, monkeypatch):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": Code()}, path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match="cannot be read: Weights only load failed"):
        io.load_checkpoint(path)
    with pytest.raises(CheckpointError, match="weights_only=False"):
        io.load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_contents_that_could_not_be_loaded_again_are_refused_before_they_replace_a_good_file(
    io, tmp_path
):
    path = tmp_path / "a.ckpt"
    io.save_checkpoint(content(1), path)
    with pytest.raises(CheckpointError, match="plain types"):
        io.save_checkpoint({**content(2), "folder": tmp_path}, path)
    assert io.load_checkpoint(path)["global_step"] == 1
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_save_cut_between_its_renames_leaves_a_valid_pair(io, tmp_path, monkeypatch, renames):
    """Three renames: the hash file that names both, the file, the hash file that names one."""
    path = tmp_path / "a.ckpt"
    io.save_checkpoint(content(1), path)
    done = 0
    rename = Path.replace

    def cut(self, target):
        nonlocal done
        if done == renames:
            raise KeyboardInterrupt
        done += 1
        return rename(self, target)

    for _ in range(2):  # cut twice in a row
        done = 0
        monkeypatch.setattr(Path, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            io.save_checkpoint(content(2), path)
        monkeypatch.setattr(Path, "replace", rename)
        assert io.load_checkpoint(path)["global_step"] == (2 if renames == 2 else 1)
    io.save_checkpoint(content(3), path)
    assert len(checkpoint.seals(path)) == 1


def test_cut_save_over_a_file_without_hash_leaves_that_file_valid(io, tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    torch.save(content(1), path)
    rename = Path.replace

    def only_hash(self, target):
        if not str(target).endswith(".sha256"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", only_hash)
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint(content(2), path)
    assert io.load_checkpoint(path)["global_step"] == 1


def test_full_disk_is_refused_before_writing_and_keeps_the_old_file(io, tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    io.save_checkpoint(content(1), path)
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CheckpointError, match=r"no space for .*a\.ckpt: it needs about 16 MiB"):
        io.save_checkpoint(content(2), path)
    monkeypatch.undo()
    assert io.load_checkpoint(path)["global_step"] == 1


def test_disk_that_fills_while_writing_keeps_the_old_file_and_no_rest(io, tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    io.save_checkpoint(content(1), path)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint._Hashing, "write", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*a\.ckpt: .*No space left"):
        io.save_checkpoint(content(2), path)
    assert io.load_checkpoint(path)["global_step"] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_orphans_are_swept_but_not_files_that_are_being_written(io, tmp_path):
    orphan = tmp_path / ".a.ckpt.1.partial"
    orphan.write_bytes(b"half")
    with checkpoint._beside(tmp_path / "b.ckpt") as (mine, _):
        sweep(tmp_path)
        assert mine.exists()
        assert not orphan.exists()
    orphan.write_bytes(b"half")
    io.save_checkpoint(content(1), tmp_path / "a.ckpt")
    assert not orphan.exists()


def test_find_last_takes_the_newest_whole_file(io, tmp_path):
    assert find_last(tmp_path / "nowhere") is None
    assert find_last(tmp_path) is None
    for step in (1, 2, 3):
        save(io, tmp_path / f"step{step}.ckpt", step)
    assert find_last(tmp_path) == tmp_path / "step3.ckpt"
    flip(tmp_path / "step3.ckpt", 4000)
    os.utime(tmp_path / "step3.ckpt", ns=(3 * 10**9, 3 * 10**9))
    with pytest.warns(UserWarning, match=r"step3\.ckpt: it is damaged.*going on with step2\.ckpt"):
        assert find_last(tmp_path) == tmp_path / "step2.ckpt"
    (tmp_path / "step2.ckpt.sha256").write_text("nonsense")
    flip(tmp_path / "step1.ckpt", 4000)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        find_last(tmp_path)


def test_link_to_a_checkpoint_is_checked_against_its_target(io, tmp_path):
    save(io, tmp_path / "a.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to("a.ckpt")
    assert io.load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1
    flip(tmp_path / "a.ckpt", 4000)
    assert "damaged" in damage(tmp_path / "last.ckpt")


def test_removing_takes_the_hash_along(io, tmp_path):
    io.save_checkpoint(content(1), tmp_path / "a.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_verification_can_be_turned_off(io, tmp_path):
    path = tmp_path / "a.ckpt"
    io.save_checkpoint(content(1), path)
    data = path.read_bytes()
    at = data.index(torch.full((4,), 1.0).numpy().tobytes())
    flip(path, at)
    with pytest.raises(CheckpointError):
        io.load_checkpoint(path)
    SafeCheckpointIO(verify=False).load_checkpoint(path)


def test_other_than_local_paths_are_refused(io):
    with pytest.raises(CheckpointError, match="local disk"):
        io.save_checkpoint(content(1), "s3://bucket/a.ckpt")
