"""Two small hybrids that differ in one layer: train, compare, draw, export, load elsewhere.

    4 x mixer + SwiGLU, d_model 128: mamba2, X, mamba2, attention; X is attention or mamba2

Bytes of Python's standard library, no download. Same seed, same batches; every entry but X starts
from the same weights.
"""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger

from seqzoo.long_context.extrapolation import Row, extrapolation
from seqzoo.train.commands.list import table as aligned
from seqzoo.train.data import Stdlib
from seqzoo.train.guards import StopOnNaN
from seqzoo.train.module import LanguageModelling
from seqzoo.zoo.config import DecoderSpec
from seqzoo.zoo.export import export

SWAPPED = 2  # the entry in which the two differ
CHOICES = ("attention", "mamba2")
SHORT, LONG = 1024, 65536  # tokens at which the states are weighed

# Run in a process of its own: what is exported must not need what exported it.
ELSEWHERE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "seqzoo":
            raise ImportError("seqzoo is not to be had here")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
torch.manual_seed(0)
ids = tokenizer(prompt, return_tensors="pt").input_ids
out = model.generate(
    ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=True, temperature=0.7,
    top_k=40, pad_token_id=tokenizer.pad_token_id,
)
assert not any(name.partition(".")[0] == "seqzoo" for name in sys.modules)
print(tokenizer.decode(out[0], skip_special_tokens=True))
"""


@dataclass(frozen=True)
class Result:
    """What was measured of one model.

    Attributes:
        swapped: the mixer of the entry in question.
        parameters: trainable scalars.
        validation_bits: a byte, on held-out files.
        tokens_per_second: of training.
        state_bytes_short: what a row carries after 1,024 tokens, in float32.
        state_bytes_long: after 65,536 tokens.
        lengths: bits a byte by window, on the same final targets; see `extrapolation.Row`.
    """

    swapped: str
    parameters: int
    validation_bits: float
    tokens_per_second: float
    state_bytes_short: int
    state_bytes_long: int
    lengths: dict[int, float]


def demo(
    out: Path,
    *,
    steps: int = 300,
    d_model: int = 128,
    length: int = 256,
    batch_size: int = 16,
    max_bytes: int = 4_000_000,
    seed: int = 0,
    progress: bool = True,
) -> list[Result]:
    """Run it all; everything lands in `out`.

    Args:
        out: folder for results.json, results.csv, comparison.png and model/.
        steps: of each of the two trainings.
        d_model: width.
        length: tokens of a training window; measured up to 8 times as long.
        batch_size: windows of a batch.
        max_bytes: of the corpus, held-out files included.
        seed: of weights and order.
        progress: show a bar.
    """
    out.mkdir(parents=True, exist_ok=True)
    data = Stdlib(max_bytes=max_bytes, length=length, batch_size=batch_size, seed=seed)
    facts = data.describe()
    sys.stdout.write(
        f"data: {facts['bytes']:,} bytes of the standard library of Python {facts['python']}, "
        f"digest {facts['digest'][:16]}\n"
    )
    trained = [
        train(name, data, out, steps=steps, d_model=d_model, seed=seed, progress=progress)
        for name in CHOICES
    ]
    results = [result for _, result in trained]
    sys.stdout.write("\n" + table(results, length) + "\n")
    write(out, results, {"steps": steps, "d_model": d_model, "seed": seed, "data": facts})
    draw(out, results, length)
    best = min(range(len(results)), key=lambda i: results[i].validation_bits)
    folder = out / "model"
    told = {
        "trained on": f"standard library of Python {facts['python']}, {facts['digest'][:16]}",
        "steps": steps,
        "validation, bits a byte": f"{results[best].validation_bits:.3f}",
    }
    network = trained[best][0].network
    export(network, folder, tokenizer=data.tokenizer, facts=told, overwrite=True)
    sys.stdout.write(
        f"{out}/comparison.png, results.json and results.csv written; the better one is in "
        f"{folder}.\nLoaded by plain transformers, where seqzoo cannot be imported, it writes:\n\n"
    )
    sys.stdout.write(generate_elsewhere(folder, "def read(") + "\n")
    return results


def spec(swapped: str, d_model: int) -> DecoderSpec:
    """The stack with `swapped` in the entry in question."""
    pattern = ["mamba2", "swiglu", "attention", "swiglu", "mamba2", "swiglu", "attention", "swiglu"]
    options = {"attention": {"n_heads": 4}, "mamba2": {"d_state": 32, "head_dim": 32}}
    base = DecoderSpec(d_model=d_model, pattern=pattern, options=options, position="rope")
    return base.swapped({SWAPPED: swapped})


def train(
    swapped: str, data: Stdlib, out: Path, *, steps: int, d_model: int, seed: int, progress: bool
) -> tuple[LanguageModelling, Result]:
    """Train one of the two and measure it."""
    sys.stdout.write(f"\nentry {SWAPPED} is {swapped}: {steps} steps\n")
    seed_everything(seed, verbose=False)
    module = LanguageModelling(
        spec(swapped, d_model), vocab_size=data.vocab_size, lr=3e-3, warmup_steps=steps // 10 + 1
    )
    timer = Timer()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        log_every_n_steps=max(1, min(10, steps // 4)),
        callbacks=[timer, StopOnNaN()],
        logger=CSVLogger(out, name=swapped, version=""),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    trainer.fit(module, datamodule=data)
    seconds = timer.time_elapsed("train")
    judge = Trainer(accelerator="cpu", logger=False, enable_progress_bar=progress)
    (validated,) = judge.validate(module, datamodule=data, verbose=False)
    rows = measure(module, data)
    return module, Result(
        swapped=swapped,
        parameters=sum(p.numel() for p in module.parameters()),
        validation_bits=validated["val/bits_per_byte"],
        tokens_per_second=steps * data.tokens_per_batch / seconds,
        state_bytes_short=state_bytes(module, SHORT),
        state_bytes_long=state_bytes(module, LONG),
        lengths={row.length: row.final for row in rows},
    )


def measure(module: LanguageModelling, data: Stdlib) -> list[Row]:
    """Bits at 1, 2, 4 and 8 times the training length, on held-out files."""
    lengths = [data.length * times for times in (1, 2, 4, 8)]
    tokens = data.rows["test"].columns["input_ids"].flatten()
    model = partial(module.train(False).network, use_cache=False)
    return extrapolation(model, tokens[: 16 * lengths[-1] + 1], lengths)


def state_bytes(module: LanguageModelling, tokens: int) -> int:
    """Bytes that one row carries from token to token, by the mixers' formulas."""
    return sum(entry.mixer.cost(tokens).state_bytes for entry in module.network.model.entries)


def generate_elsewhere(folder: Path, prompt: str) -> str:
    """Text by the exported folder, in a process that cannot import seqzoo.

    Raises:
        RuntimeError: the folder does not load there; with what the process said last.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", ELSEWHERE, str(folder.resolve()), prompt]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    if done.returncode:
        raise RuntimeError(f"the exported folder does not load: {done.stderr.strip()[-400:]}")
    return done.stdout


def table(results: Sequence[Result], length: int) -> str:
    """Both models side by side."""
    rows: list[tuple[str, ...]] = [(f"entry {SWAPPED} is", *(r.swapped for r in results))]

    def add(name: str, values: Sequence[str]) -> None:
        rows.append((name, *values))

    add("validation, bits a byte", [f"{r.validation_bits:.3f}" for r in results])
    for window in results[0].lengths:
        name = f"bits a byte at {window // length}x the training length"
        add(name, [f"{r.lengths[window]:.3f}" for r in results])
    add("tokens a second, training", [f"{r.tokens_per_second:,.0f}" for r in results])
    add("parameters", [f"{r.parameters:,}" for r in results])
    add(f"state bytes after {SHORT:,} tokens", [f"{r.state_bytes_short:,}" for r in results])
    add(f"state bytes after {LONG:,} tokens", [f"{r.state_bytes_long:,}" for r in results])
    return aligned(rows)


def write(out: Path, results: Sequence[Result], settings: dict[str, Any]) -> None:
    """results.json with the settings, results.csv with a row a model."""
    plain = [asdict(result) for result in results]
    (out / "results.json").write_text(json.dumps({**settings, "models": plain}, indent=2) + "\n")
    flat = [
        {k: v for k, v in row.items() if k != "lengths"}
        | {f"bits_at_{window}": bits for window, bits in row["lengths"].items()}
        for row in plain
    ]
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, flat[0])
        writer.writeheader()
        writer.writerows(flat)


def draw(out: Path, results: Sequence[Result], length: int) -> None:
    """Training curves, bits beyond the training length, and what is carried."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    curves, beyond, carried = figure.subplots(1, 3)
    for result in results:
        curves.plot(*_curve(out / result.swapped / "metrics.csv"), label=result.swapped)
        beyond.plot([n / length for n in result.lengths], [*result.lengths.values()], "o-")
    mib = [result.state_bytes_long / 2**20 for result in results]
    carried.bar([result.swapped for result in results], mib, color=["C0", "C1"])
    curves.set(xlabel="step", ylabel="training loss, bits a byte")
    curves.legend(title=f"entry {SWAPPED} is", frameon=False)
    beyond.set(xlabel="window / training length", ylabel="bits a byte, same targets")
    beyond.set_xscale("log", base=2)
    beyond.xaxis.set_major_formatter("{x:.0f}x")
    carried.set(ylabel=f"state after {LONG:,} tokens, MiB")
    for axes in (curves, beyond, carried):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "comparison.png", dpi=150)


def _curve(metrics: Path) -> tuple[list[int], list[float]]:
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    nats = [float(row["train/loss"]) for row in rows]
    return [int(row["step"]) for row in rows], [loss / math.log(2) for loss in nats]
