"""Memory and energy of a piece of work."""

import sys
from pathlib import Path

import pytest
import torch

from seqzoo.train import meters
from seqzoo.train.ablation import work
from seqzoo.train.meters import metered

MIB = 1 << 20


def counter(folder: Path, zone: str, name: str, stand: int) -> Path:
    """A counter as the kernel shows it, that turns over after 1,000,000 microjoules."""
    place = folder / zone
    place.mkdir(parents=True)
    (place / "name").write_text(f"{name}\n")
    (place / "max_energy_range_uj").write_text("999999\n")
    (place / "energy_uj").write_text(f"{stand}\n")
    return place / "energy_uj"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts the count anew")
def test_the_peak_is_of_the_block_and_not_of_what_ran_before():
    with metered(alone=False) as large:
        torch.ones(200 * MIB // 4)
    with metered(alone=False) as small:
        torch.ones(10 * MIB // 4)
    assert 150 * MIB < large["peak_memory_bytes"] - small["peak_memory_bytes"] < 250 * MIB


def test_energy_is_that_of_packages_and_memory_also_when_a_counter_turns_over(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(meters, "POWERCAP", tmp_path)
    package = counter(tmp_path, "intel-rapl:0", "package-0", 100)
    memory = counter(tmp_path, "intel-rapl:0:1", "dram", 999_990)
    cores = counter(tmp_path, "intel-rapl:0:0", "core", 0)  # within the package
    with metered(alone=True) as used:
        package.write_text("460\n")
        memory.write_text("10\n")
        cores.write_text("300\n")
    assert used["energy_wh"] == pytest.approx((360 + 20) / 3.6e9)


@pytest.mark.parametrize("alone", [True, False])
def test_no_counter_or_neighbours_is_none_and_not_zero(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(meters, "POWERCAP", tmp_path)
    if not alone:
        counter(tmp_path, "intel-rapl:0", "package-0", 100)
    with metered(alone=alone) as used:
        pass
    assert used["energy_wh"] is None


def test_a_system_that_counts_nothing_is_said_by_none(tmp_path, monkeypatch):
    monkeypatch.setattr(meters, "PROCESS", tmp_path / "nothing")
    with metered(alone=False) as used:
        pass
    assert used == {"peak_memory_bytes": None, "energy_wh": None}


def test_the_record_of_a_cell_has_both(monkeypatch):
    monkeypatch.setattr(work, "train_cell", lambda description: {"of": description})
    record = work.attempt({"lr": 1})
    assert record["result"] == {"of": {"lr": 1}}
    assert {"peak_memory_bytes", "energy_wh"} <= record.keys()
