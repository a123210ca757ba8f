"""Train two small hybrids that differ in one layer, compare them, and export the better one.

About five minutes on two processors. Prints one table, draws it, and ends with text written by the
exported folder in a process that cannot import seqzoo.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to and how much."""
    parser.add_argument("--out", default="runs/demo", help="folder to write to (runs/demo)")
    parser.add_argument("--steps", type=int, default=300, help="of each training (300)")
    parser.add_argument("--d_model", type=int, default=128, help="width (128)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window (256)")
    parser.add_argument("--batch_size", type=int, default=16, help="windows of a batch (16)")
    parser.add_argument("--max_bytes", type=int, default=4_000_000, help="of the corpus (4000000)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (0)")
    parser.add_argument("--no_progress", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> None:
    """See `seqzoo.train.demo`."""
    from seqzoo.kernels.errors import check_positive
    from seqzoo.train.commands.trainer import quiet
    from seqzoo.train.demo import demo

    check_positive(steps=arguments.steps)
    with quiet():
        demo(
            Path(arguments.out),
            steps=arguments.steps,
            d_model=arguments.d_model,
            length=arguments.length,
            batch_size=arguments.batch_size,
            max_bytes=arguments.max_bytes,
            seed=arguments.seed,
            progress=not arguments.no_progress,
        )
