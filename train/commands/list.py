"""Show every mixer of the zoo with what it declares, each declaration held by the test suite.

causality   strict: nothing reaches the past. value: no future value does, but a hard selection
            looks ahead. none: bidirectional only, no decoder can use it.
prefix      whether the output for a prefix is the same however long the sequence goes on.
state       what is carried from token to token: constant, window, growing or none.
both ways   whether the mixer itself can also read in both directions.
"""

import argparse
import sys
from collections.abc import Sequence

from seqzoo.layers import MixerInfo, list_mixers, mixer_info

HEAD = ("name", "kind", "causality", "prefix", "state", "both ways", "kernel", "paper", "summary")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Filters and format."""
    parser.add_argument("--causal", action="store_true", help="only those a decoder can use")
    parser.add_argument("--kind", help="only this kind: sequence or channel")
    parser.add_argument("--state", help="only this state: constant, window, growing or none")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")


def run(arguments: argparse.Namespace) -> None:
    """Print the table."""
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
