"""Draw a results folder: one HTML page that needs no network, and its table as summary.csv.

Everything is drawn from results.csv, timings.csv and speed.csv, without the cells: the same files
give the same page, byte for byte. `--measure` first clocks every stack of the grid at growing
lengths, forward, training and decoding, and writes speed.csv; leave the machine alone meanwhile.
"""

import argparse
import os
import sys
import webbrowser
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is drawn, where to, and what is clocked before."""
    parser.add_argument("results", type=Path, help="a folder that `seqzoo ablate` wrote")
    parser.add_argument("--out", type=Path, help="file (default: report.html in the folder)")
    parser.add_argument("--open", action="store_true", help="show it, where there is a screen")
    parser.add_argument("--measure", action="store_true", help="clock first; writes speed.csv")
    parser.add_argument("--lengths", default="128,512,2048", help="to clock at (128,512,2048)")
    parser.add_argument("--batch_size", type=int, default=1, help="rows when clocking (1)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of a median (7)")
    parser.add_argument(
        "--where", default="", help="clock only these: all,one,every-2 (default: all)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Clock, draw, and say where it is.

    Raises:
        ImportError: plotly or scipy is not installed.
        ValueError: a folder, a file or a value that is refused.
    """
    from seqzoo.train.files import write_whole
    from seqzoo.train.report.load import load

    folder: Path = arguments.results
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the one that `seqzoo ablate` wrote")
    try:
        from seqzoo.train.report.page import page
        from seqzoo.train.report.table import as_csv
    except ModuleNotFoundError as error:
        if error.name not in ("plotly", "scipy"):
            raise
        raise ImportError(
            f"{error.name} is not installed; the report needs it: pip install 'seqzoo[report]'"
        ) from error
    load(folder)  # what cannot be drawn is told before anything is clocked
    if arguments.measure:
        _measure(arguments)
    results = load(folder)
    whole, table = page(results)
    out = arguments.out or folder / "report.html"
    write_whole(out, whole.encode())
    write_whole(out.parent / "summary.csv", as_csv(table))
    sys.stdout.write(f"{out}\n{out.parent / 'summary.csv'}: {len(table)} rows\n")
    if arguments.open and _has_screen():
        webbrowser.open(out.resolve().as_uri())


def _has_screen() -> bool:
    """Whether a browser could show a window; elsewhere one might take over the terminal."""
    windows = sys.platform in ("win32", "darwin")
    return windows or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _measure(arguments: argparse.Namespace) -> None:
    from seqzoo.kernels.errors import check_positive
    from seqzoo.train.report.clock import clock

    try:
        lengths = sorted({int(word) for word in arguments.lengths.split(",")})
    except ValueError:
        raise ValueError(
            f"--lengths {arguments.lengths!r} is not a list of whole numbers like 128,512"
        ) from None
    check_positive(lengths=lengths[0], batch_size=arguments.batch_size, repeats=arguments.repeats)
    clock(
        arguments.results,
        lengths=lengths,
        batch_size=arguments.batch_size,
        repeats=arguments.repeats,
        where=[word for word in arguments.where.split(",") if word],
    )
