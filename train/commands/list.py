"""Show every mixer of the zoo with what it declares, each declaration held by the test suite.

causality   strict: nothing reaches the past. value: no future value does, but a hard selection
            looks ahead. none: bidirectional only, no decoder can use it.
prefix      whether the output for a prefix is the same however long the sequence goes on.
state       what is carried from token to token: constant, window, growing or none.
both ways   whether the mixer itself can also read in both directions.

`--tasks` shows the tasks of grids and cells instead. What ends in `_gen` is Long-Range Arena's task
on data of our own making: no figure on it stands beside a published one.
"""

import argparse
import inspect
import sys
from collections.abc import Sequence

from seqzoo.layers import MixerInfo, list_mixers, mixer_info

ANSWERS = {"token": "at tokens", "last": "from the last token", "pooled": "one a row"}
TASK_HEAD = ("name", "length", "answers", "paper", "summary")
HEAD = ("name", "kind", "causality", "prefix", "state", "both ways", "kernel", "paper", "summary")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Filters and format."""
    parser.add_argument("--causal", action="store_true", help="only those a decoder can use")
    parser.add_argument("--kind", help="only this kind: sequence or channel")
    parser.add_argument("--state", help="only this state: constant, window, growing or none")
    parser.add_argument("--tasks", action="store_true", help="tasks instead of mixers")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")


def run(arguments: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ValueError: a filter that has no such kind or state, or one of mixers for tasks.
    """
    if arguments.tasks:
        if arguments.causal or arguments.kind or arguments.state:
            raise ValueError("--tasks shows every task; --causal, --kind and --state sort mixers")
        sys.stdout.write(table(_tasks(), markdown=arguments.markdown))
        return
    names = list_mixers(arguments.causal or None, arguments.state, arguments.kind)
    rows = [HEAD, *(_row(mixer_info(name)) for name in names)]
    sys.stdout.write(table(rows, markdown=arguments.markdown))


def table(rows: Sequence[tuple[str, ...]], *, markdown: bool = False) -> str:
    """Rows of cells, the first being the head, as aligned text or as Markdown."""
    if markdown:
        head, *body = ("| " + " | ".join(row) + " |" for row in rows)
        return "\n".join([head, "|" + "---|" * len(rows[0]), *body, ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join([*lines, ""])


def _tasks() -> list[tuple[str, ...]]:
    from seqzoo.train.tasks import SYNTHETIC

    rows: list[tuple[str, ...]] = [TASK_HEAD]
    for name, task in SYNTHETIC.items():
        summary = (inspect.getdoc(task) or "").partition("\n")[0]
        rows.append((name, str(task.length), ANSWERS[task.readout], task.paper, summary))
    return rows


def _row(info: MixerInfo) -> tuple[str, ...]:
    caps = info.caps
    return (
        info.name,
        info.kind,
        caps.causality,
        _yes(caps.prefix),
        caps.state,
        _yes(caps.bidirectional),
        info.kernel or "-",
        info.paper or "-",
        info.summary,
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
