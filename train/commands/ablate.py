"""Train a grid of small models that differ in their mixers, and write one table.

`seqzoo ablate GRID.yaml` sweeps the learning rate of every stack on every task, then trains fresh
seeds at the best one. Every cell of the grid is a file in results/NAME/cells; the same command run
again after a kill, a crash or a power cut goes on from there, and trains nothing twice. `--backend
ray` takes the cells to Ray, on this machine or on the cluster that RAY_ADDRESS names. The numbers
and results.csv are the same wherever the cells ran; what clocks say is in timings.csv.
"""

import argparse
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, where and by whom."""
    parser.add_argument("grid", type=Path, help="a YAML file; see configs/ablation/")
    parser.add_argument("--out", type=Path, help="folder (default: results/NAME of the grid)")
    parser.add_argument("--backend", default="local", help="local or ray (default: local)")
    parser.add_argument("--workers", type=int, help="processes (default: one a processor)")
    parser.add_argument("--retry_failed", action="store_true", help="run failed cells again")
    parser.add_argument("--dry_run", action="store_true", help="count the cells and stop")
    parser.add_argument("--no_progress", action="store_true", help="no line of progress")


def run(arguments: argparse.Namespace) -> None:
    """Run, and say where the table is."""
    from seqzoo.kernels.errors import check_positive, unknown
    from seqzoo.train.ablation.grid import Grid
    from seqzoo.train.ablation.run import BACKENDS, run_grid

    workers = (os.cpu_count() or 1) if arguments.workers is None else arguments.workers
    check_positive(workers=workers)
    if arguments.backend not in BACKENDS:
        raise unknown("backend of ablate", arguments.backend, BACKENDS)
    grid = Grid.read(arguments.grid)
    if arguments.dry_run:
        studies = grid.studies()
        sweep = len(studies) * len(grid.lrs) * len(grid.sweep_seeds)
        fresh = len(studies) * len(grid.final_seeds)
        sys.stdout.write(f"{len(studies)} studies: {sweep} cells of the sweep, {fresh} fresh\n")
        return
    table = run_grid(
        grid,
        arguments.out or Path("results") / grid.name,
        backend=arguments.backend,
        workers=workers,
        retry_failed=arguments.retry_failed,
        progress=not arguments.no_progress,
    )
    sys.stdout.write(f"{table}\nsee it: seqzoo report {table.parent}\n")
