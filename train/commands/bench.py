"""Measure speed: our kernels against other people's code, and a mixer against its shorter runs.

`seqzoo bench kernels` times each kernel and what it is compared with in turn, in one process, and
prints medians, ratios and whether the project's goals are met on this machine. Believe the ratios,
not the milliseconds. A ratio "x as fast" should be high; "x the time" should be low. The floor is
what a copy takes of the bytes that must be read and written, at the speed measured at the start.

`seqzoo bench length` takes one training step (forward and backward) of a mixer at growing lengths:
linear cost shows as time(4T) / time(T) near 4. Where transformers has the same layer, its plain
PyTorch path runs beside ours at the shortest length.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.train.bench.cases import CASES, GPU_CASES
from seqzoo.train.bench.compare import SECONDS, Row, compare, copy_speed
from seqzoo.train.bench.length import by_length
from seqzoo.train.bench.operations import OPERATIONS, SIZES, WINDOW
from seqzoo.train.bench.startup import starts
from seqzoo.train.commands.doctor import version_of
from seqzoo.train.commands.list import table

HEAD = (
    *("kernel", "what", "tokens", "ours", "floor", "other", "compared with"),
    *("ratio", "goal", "met", ""),
)
PACKAGES = ("seqzoo", "torch", "triton", "transformers", "mambapy", "fla-core")
GPU_PACKAGES = ("mamba-ssm", "causal-conv1d", "flash-linear-attention")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two things to measure, each with its options."""
    what = parser.add_subparsers(dest="what", required=True)
    kernels = what.add_parser("kernels", help="every kernel against other code and its goals")
    kernels.add_argument("--only", default="", help="kernels, comma-separated (default: all)")
    kernels.add_argument(
        "--full", action="store_true", help="at full length even where others take minutes"
    )
    kernels.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    length = what.add_parser("length", help="a mixer's time per step against length")
    length.add_argument("--mixer", default="mamba", help="name in `seqzoo list` (default: mamba)")
    length.add_argument("--lengths", default="512,1024,2048,4096", help="tokens, comma-separated")
    length.add_argument("--d_model", type=int, default=128, help="width (default: 128)")
    length.add_argument("--batch_size", type=int, default=2, help="rows (default: 2)")
    for each in (kernels, length):
        each.add_argument("--repeats", type=int, default=7, help="runs per median (default: 7)")
        each.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
        each.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    check_positive(threads=args.threads, repeats=args.repeats)
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"--device {args.device} is not here; cpu is, or cuda where there is one")
    torch.set_num_threads(args.threads)
    if args.what == "kernels":
        _kernels(args)
    else:
        _length(args)


def _kernels(args: argparse.Namespace) -> None:
    names = [name for name in args.only.split(",") if name] or list(OPERATIONS)
    for name in names:
        if name not in OPERATIONS:
            raise unknown("kernel to measure named", name, OPERATIONS)
    rows, speed = [], copy_speed(args.device)
    sys.stdout.write(f"{_conditions(args)}\na copy moves {speed / 1e9:.1f} GB/s\n\n")
    for row in _rows(names, args, speed):
        rows.append(row)
        sys.stderr.write(f"\r{len(rows)} measured")
    sys.stderr.write("\n")
    sys.stdout.write(table([HEAD, *map(_cells, rows)]))
    met = [row.met for row in rows if row.met is not None]
    sys.stdout.write(f"\n{sum(met)} of {len(met)} goals met\n")
    if args.json:
        args.json.write_text(json.dumps(_record(args, rows, speed), indent=1) + "\n")


def _rows(names: list[str], args: argparse.Namespace, speed: float) -> Iterator[Row]:
    kind = _kind(args.device)
    for case in CASES if kind == "cpu" else GPU_CASES:
        if case.kernel in names:
            yield compare(
                case, repeats=args.repeats, device=args.device, full=args.full, speed=speed
            )
    if kind == "cpu":
        yield from starts(names)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.kernel,
        row.what,
        str(row.tokens or ""),
        _ms(row.ours_ms),
        _ms(row.floor_ms),
        _ms(row.other_ms),
        row.other,
        row.words,
        row.goal,
        {True: "yes", False: "NO", None: "-"}[row.met],
        row.note,
    )


def _ms(ms: float | None) -> str:
    if ms is None:
        return ""
    return f"{ms:.1f} ms" if ms >= 10 else f"{ms:.3g} ms"


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _sizes(device: str) -> dict[str, int]:
    return SIZES[_kind(device)]._asdict() | {"window": WINDOW}


def _packages(device: str) -> tuple[str, ...]:
    return PACKAGES if _kind(device) == "cpu" else (*PACKAGES, *GPU_PACKAGES)


def _dtype(device: str) -> str:
    return "float32" if _kind(device) == "cpu" else "bfloat16"


def _conditions(args: argparse.Namespace) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in _sizes(args.device).items())
    versions = ", ".join(f"{name} {version_of(name)}" for name in _packages(args.device))
    return (
        f"{_device(args.device)}, {args.threads} thread(s), {_dtype(args.device)}, {sizes}\n"
        f"{versions}\nmedians of {args.repeats} runs, fewer where those take over {SECONDS:g} s"
    )


def _record(args: argparse.Namespace, rows: list[Row], speed: float) -> dict[str, object]:
    versions = {p: version_of(p) for p in _packages(args.device)}
    return {
        "device": _device(args.device),
        "copy_bytes_per_second": speed,
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": args.threads,
        "repeats": args.repeats,
        "dtype": _dtype(args.device),
        "sizes": _sizes(args.device),
        "versions": {"python": platform.python_version()} | versions,
        "rows": [asdict(row) for row in rows],
    }


def _device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _length(args: argparse.Namespace) -> None:
    try:
        lengths = sorted({int(word) for word in args.lengths.split(",")})
    except ValueError:
        raise ValueError(
            f"--lengths {args.lengths!r} is not a list of whole numbers like 512,1024"
        ) from None
    check_positive(lengths=lengths[0], batch_size=args.batch_size)
    sys.stdout.write(
        f"{args.mixer}, forward and backward, batch {args.batch_size}, width {args.d_model}, "
        f"float32, {_device(args.device)}, median of {args.repeats}, {args.threads} thread(s), "
        f"torch {torch.__version__}\n\n"
    )
    sizes = {"d_model": args.d_model, "batch_size": args.batch_size}
    sys.stdout.write(
        by_length(args.mixer, lengths, repeats=args.repeats, device=args.device, **sizes)
    )
