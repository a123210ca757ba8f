"""What work takes besides time, where the machine counts it: memory and energy."""

import ctypes
import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PROCESS = Path("/proc/self")
POWERCAP = Path("/sys/class/powercap")  # RAPL, of Intel's and AMD's processors
JOULES = 3600.0  # in a watt-hour


@contextmanager
def metered(*, alone: bool) -> Iterator[dict[str, float | None]]:
    """Count what the block takes, into the dict that it is given; None where nothing counts.

    peak_memory_bytes: the most memory that the whole process held, its libraries included (Linux).
    energy_wh: of the processors and their memory, neighbours included; only where the work is
        `alone`, for the counter knows no processes. Root alone may read it on most machines. It
        turns over (at 100 watts after some forty minutes), and twice goes unnoticed.
    """
    used: dict[str, float | None] = {}
    counting, before = _restart_peak(), _microjoules() if alone else {}
    try:
        yield used
    finally:
        used["peak_memory_bytes"] = _peak() if counting else None
        used["energy_wh"] = _spent(before, _microjoules()) if before else None


def _restart_peak() -> bool:
    """From now on; what an earlier piece of work has freed goes back to the system first."""
    gc.collect()
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
    except (OSError, AttributeError):  # another system, another C library
        return False
    return True


def _peak() -> int | None:
    lines = (PROCESS / "status").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return found[0] if found else None


def _microjoules() -> dict[Path, tuple[int, int]]:
    """Of each counter of a package or its memory: where it stands, and where it turns over."""
    found = {}
    try:
        for zone in POWERCAP.glob("intel-rapl:*"):
            name = (zone / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                stand, top = (zone / n for n in ("energy_uj", "max_energy_range_uj"))
                found[zone] = int(stand.read_text()), int(top.read_text())
    except (OSError, ValueError):
        return {}
    return found


def _spent(
    before: Mapping[Path, tuple[int, int]], after: Mapping[Path, tuple[int, int]]
) -> float | None:
    if before.keys() != after.keys():
        return None
    used = sum((after[zone][0] - stand) % (top + 1) for zone, (stand, top) in before.items())
    return used / 1e6 / JOULES
