"""Measure a language model beyond the length it was trained on.

All lengths predict the same held-out targets. `all` is the mean over them; `final` is the mean over
those at the end of the longest windows, which every length sees with a context of almost its own
length: it tells whether a longer context helps or harms. The second table has the bits by place in
the window. Writes extrapolation.json and extrapolation.png.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqzoo.long_context.extrapolation import Row, extrapolation, usable_length
from seqzoo.train.commands.list import table

WINDOW = 32  # of the data module, whose windows are joined again; it leaves out less than one

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seqzoo.train.data import Tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, lengths, data."""
    parser.add_argument("model", help="checkpoint (.ckpt) or exported folder")
    parser.add_argument(
        "--lengths",
        type=_lengths,
        default=[512, 1024, 2048, 4096],
        help="divisors of the longest, by commas (512,1024,2048,4096)",
    )
    parser.add_argument("--text", help="file or folder to measure on; Python's sources by default")
    parser.add_argument("--split", default="test", help="val or test part of the data (test)")
    parser.add_argument("--max_tokens", type=int, default=65536, help="how many targets (65536)")
    parser.add_argument(
        "--chunk", type=int, help="read windows in pieces of this many tokens: constant memory"
    )
    parser.add_argument("--out", default="runs/extrapolation", help="folder to write to")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (cpu)")


def run(arguments: argparse.Namespace) -> None:
    """Print the tables and write the files."""
    from seqzoo.train.commands.loading import load_model

    model, tokenizer = load_model(arguments.model)
    data, unit = _data(arguments, tokenizer)
    data.setup()
    if arguments.split not in data.rows:
        raise ValueError(f"no split {arguments.split!r}; all: {', '.join(data.rows)}")
    tokens = data.rows[arguments.split].columns["input_ids"].flatten()
    model = model.to(arguments.device)
    rows = extrapolation(
        partial(model, use_cache=False) if arguments.chunk is None else model,
        tokens[: arguments.max_tokens + 1],
        arguments.lengths,
        chunk=arguments.chunk,
        device=arguments.device,
    )
    usable = usable_length(rows, base=rows[0].length)
    sys.stdout.write(f"{_tables(rows, unit)}\nusable up to {usable} (final perplexity +5 %)\n")
    report = {
        "model": str(arguments.model),
        "unit": unit,
        "usable_length": usable,
        "data": data.describe(),
        "rows": [asdict(row) for row in rows],
    }
    sys.stdout.write(f"{write(Path(arguments.out), report, rows, unit)}\n")


def write(folder: Path, report: dict[str, Any], rows: Sequence[Row], unit: str) -> Path:
    """Write report and picture; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "extrapolation.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(rows, unit, folder / "extrapolation.png")
    return folder


def draw(rows: Sequence[Row], unit: str, target: Path) -> None:
    """Bits by length on the left, by place in the window on the right."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lengths = [row.length for row in rows]
    left.plot(lengths, [row.bits for row in rows], "o-", label="all targets")
    left.plot(lengths, [row.final for row in rows], "s-", label="the same final targets")
    left.set(xlabel="window, tokens", ylabel=f"bits a {unit}")
    left.set_xscale("log", base=2)
    for row in rows:
        places = [high for _, high, _ in row.positions]
        right.plot(places, [bits for *_, bits in row.positions], label=f"window {row.length}")
    right.set(xlabel="place in the window, up to")
    right.set_xscale("log", base=2)
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=150)


def _data(
    arguments: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase"
) -> tuple["Tokens", str]:
    """The held-out data, and what a token is."""
    from seqzoo.train.data import Stdlib, Text
    from seqzoo.train.tokenizer import encode_bytes

    sample = "Zoë\n"
    ids = tokenizer(sample, add_special_tokens=False).input_ids
    is_bytes = ids == encode_bytes(sample.encode()).tolist()
    if arguments.text is None:
        if not is_bytes:
            raise ValueError("this model does not read bytes: say with --text what it should read")
        return Stdlib(length=WINDOW), "byte"
    if is_bytes:
        return Text(arguments.text, length=WINDOW), "byte"
    return Text(arguments.text, length=WINDOW, tokenizer=tokenizer.name_or_path), "token"


def _tables(rows: Sequence[Row], unit: str) -> str:
    head = ("length", f"bits a {unit}: all", "final")
    first = [head, *((str(r.length), f"{r.bits:.3f}", f"{r.final:.3f}") for r in rows)]
    bits = [{high: value for _, high, value in row.positions} for row in rows]
    places = [(f"{low}-{high - 1}", high) for low, high, _ in rows[-1].positions]
    second = [("place in the window", *(str(row.length) for row in rows))]
    second += [
        (name, *(f"{known[high]:.3f}" if high in known else "" for known in bits))
        for name, high in places
    ]
    return f"{table(first)}\n{table(second)}"


def _lengths(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers such as 512,1024"
        ) from None
