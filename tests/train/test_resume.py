"""Kill, run again: the losses are those of a run that nobody killed, to the last bit."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from seqzoo.train.resume import ExactResume, random_state, restore_random_state

ROOT = Path(__file__).parents[2]
RUNS = Path(__file__).with_name("resume_runs.py")
SAMPLES = 100


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


PARTS = ("whole", "killed", "resumed")


def run_all(tmp_path, cases):
    """For each case the log of the unbroken run, of the killed one, and of the one after it."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i:07d}\n" for i in range(round(SAMPLES / 0.9))))
    specs = []
    for name, case in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        cut = {k: v for k, v in case.items() if k not in ("shared", "status")}
        for part, where, more in zip(PARTS, ("a", "b", "b"), ({}, cut, {}), strict=True):
            files = {"text": str(text), "folder": str(folder / where)}
            files["log"] = str(folder / f"{part}.log")
            specs.append({**files, "save_every": 7, **case.get("shared", {}), **more})
    statuses, said = run_specs(tmp_path, specs)
    wanted = [[0, case.get("status", -signal.SIGKILL), 0] for case in cases.values()]
    assert statuses == [status for three in wanted for status in three], said
    return {name: [lines(tmp_path / name / f"{part}.log") for part in PARTS] for name in cases}


def run_specs(tmp_path, specs):
    """Exit status of each run, and what they wrote to stderr."""
    (tmp_path / "specs.json").write_text(json.dumps(specs))
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(RUNS), str(tmp_path / "specs.json")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def check(logs):
    whole, killed, resumed = logs
    assert killed == whole[: len(killed)]
    first = resumed[0][0]
    assert 0 < first <= len(killed), "it did not go on from a checkpoint"
    assert resumed == whole[first:]
    # The batches that count: those before the checkpoint and those after the resume.
    epochs = {}
    for _, epoch, _, seen in killed[:first] + resumed:
        epochs.setdefault(epoch, Counter()).update(seen)
    full = epochs[0]
    assert len(full) == sum(full.values()) >= SAMPLES - 1
    for epoch in list(epochs)[:-1]:
        assert epochs[epoch] == full


def test_killed_run_goes_on_bit_for_bit_mid_epoch_and_after_a_kill_inside_a_save(tmp_path):
    logs = run_all(
        tmp_path,
        {
            "mid_epoch": {"kill_at": 32},
            # Every save writes two files; this is the first of the second save.
            "in_save": {"kill_in_save": ["file", 3]},
        },
    )
    for case in logs.values():
        check(case)
    assert logs["in_save"][2][0][0] == 7
    assert not list(tmp_path.rglob("*.partial")), "the orphan of the killed save was left behind"
    first = logs["mid_epoch"][2][0][0]
    assert first == 28
    assert first % 13, "the checkpoint was not in the middle of an epoch"


@pytest.mark.slow
def test_killed_run_goes_on_bit_for_bit_wherever_it_was_killed(tmp_path):
    epoch = -(-SAMPLES // 8)
    renames = {f"rename_{n}": {"kill_in_save": ["rename", n]} for n in range(13, 20)}
    shared = {"save_every": epoch}
    logs = run_all(
        tmp_path,
        {
            **renames,
            "epoch_end": {"kill_at": epoch + 1, "shared": shared},
            "accumulate": {"kill_at": 17, "shared": {"accumulate": 2, "max_steps": 25}},
            "workers": {"kill_at": 32, "shared": {"workers": 2}},
            "workers_epoch_end": {"kill_at": epoch + 1, "shared": {**shared, "workers": 2}},
            "sigterm": {"kill_at": 24, "signal": signal.SIGTERM, "status": 143},
        },
    )
    for case in logs.values():
        check(case)
    # Three renames a file; the 13th names both contents, the 14th puts the new file in place.
    firsts = [logs[name][2][0][0] for name in renames]
    assert firsts == [14] + [21] * 6
    assert logs["epoch_end"][2][0][0] == epoch
    assert logs["sigterm"][2][0][0] == 24, "SIGTERM did not save the step it finished"


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit_each_with_its_own_random_state(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i:07d}\n" for i in range(round(SAMPLES / 0.9))))
    shared = {"text": str(text), "save_every": 4, "ranks": 2}
    specs = [
        {**shared, "folder": str(tmp_path / where), "log": str(tmp_path / part), "max_steps": steps}
        for part, where, steps in (("whole", "a", 16), ("cut", "b", 11), ("resumed", "b", 16))
    ]
    # Then one rank goes on with what two had left in the middle of an epoch.
    specs.append({**specs[2], "folder": specs[1]["folder"], "ranks": 1, "max_steps": 20})
    statuses, said = run_specs(tmp_path, specs)
    assert statuses == [0, 0, 0, 2], said
    assert "ValueError: cannot resume in the middle of epoch" in said
    assert "ranks was 2 and is 1" in said
    for rank in ("0", "1"):
        whole, resumed = lines(tmp_path / f"whole.{rank}"), lines(tmp_path / f"resumed.{rank}")
        assert resumed == whole[8:]
    assert lines(tmp_path / "whole.0") != lines(tmp_path / "whole.1")


def test_random_state_is_plain_and_comes_back_whole(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.standard_normal(), torch.rand(3).tolist()

    np.random.standard_normal()  # leaves a cached second draw behind
    torch.save(random_state(), tmp_path / "state")
    first = draw()
    draw()
    restore_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == first


def test_other_thread_count_is_said(tmp_path):
    class OneRank:
        is_global_zero, world_size, global_rank = True, 1, 0

    callback = ExactResume()
    state = callback.state_dict()
    callback.load_state_dict(state)
    callback.on_train_start(OneRank(), None)  # nothing differs: no warning
    state["environment"]["threads"] = 64
    callback.load_state_dict(state)
    with pytest.warns(UserWarning, match="threads 64, now 1$"):
        callback.on_train_start(OneRank(), None)
    assert callback._stored is not None, "the warning must not cost the state"
    torch.rand(1)
    before = torch.get_rng_state()
    callback.on_train_batch_start(OneRank(), None, None, 0)
    assert not torch.equal(before, torch.get_rng_state())
    callback.on_train_batch_start(OneRank(), None, None, 1)  # once only
    assert torch.equal(state["ranks"][0]["torch"], torch.get_rng_state())
