"""Time mixers against their own shorter runs and against other people's modules, side by side.

`seqzoo bench length` takes one training step (forward and backward) of a mixer at growing lengths:
linear cost shows as time(4T) / time(T) near 4. Where transformers has the same layer, its plain
PyTorch path runs beside ours at the shortest length, in the same process. Medians; one thread by
default; believe the ratios, not the milliseconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from seqzoo.layers import create_mixer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("what", choices=["length"], help="length: time per step against length")
    parser.add_argument("--mixer", default="mamba", help="name in `seqzoo list` (default: mamba)")
    parser.add_argument("--lengths", default="512,1024,2048,4096", help="tokens, comma-separated")
    parser.add_argument("--d_model", type=int, default=128, help="width (default: 128)")
    parser.add_argument("--batch_size", type=int, default=2, help="rows (default: 2)")
    parser.add_argument("--repeats", type=int, default=7, help="runs per median (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        lengths = sorted(int(word) for word in args.lengths.split(","))
    except ValueError:
        raise ValueError(
            f"--lengths {args.lengths!r} is not a list of whole numbers like 512,1024"
        ) from None
    mixer = create_mixer(args.mixer, args.d_model)
    inputs = {T: torch.randn(args.batch_size, T, args.d_model) for T in lengths}
    # Interleaved, so that what else the machine does falls on all lengths alike.
    times = interleaved(
        {T: step(lambda x: mixer(x)[0], mixer, x) for T, x in inputs.items()}, args.repeats
    )
    threads = torch.get_num_threads()
    print(
        f"{args.mixer}, forward and backward, batch {args.batch_size}, width {args.d_model}, "
        f"float32, median of {args.repeats}, {threads} thread(s), torch {torch.__version__}\n"
    )
    first = lengths[0]
    print(f"{'tokens':>8} {'ms a step':>10} {'us a token':>11} {'times the first':>16}")
    for T in lengths:
        us = 1000 * times[T] / (T * args.batch_size)
        print(f"{T:>8} {times[T]:>10.1f} {us:>11.2f} {times[T] / times[first]:>15.1f}x")
    peer = _peer(args.mixer, args.d_model)
    if peer is not None:
        name, module = peer
        theirs = interleaved({first: step(module, module, inputs[first])}, 1, warm=False)[first]
        print(
            f"\n{name} at {first} tokens: {theirs:.0f} ms, {theirs / times[first]:.0f} times ours"
        )


def step(forward: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Callable[[], None]:
    """One training step: forward and the gradients of every parameter and of the input."""
    x = x.requires_grad_()
    sources = [x, *(p for p in module.parameters() if p.requires_grad)]

    def take() -> None:
        torch.autograd.grad(forward(x).sum(), sources, allow_unused=True)

    return take


def interleaved(
    steps: dict[int, Callable[[], None]], repeats: int, warm: bool = True
) -> dict[int, float]:
    """Median milliseconds of each step, all taken in turn `repeats` times."""
    if warm:
        for take in steps.values():
            take()
    taken: dict[int, list[float]] = {key: [] for key in steps}
    for _ in range(repeats):
        for key, take in steps.items():
            start = time.perf_counter()
            take()
            taken[key].append(1000 * (time.perf_counter() - start))
    return {key: statistics.median(values) for key, values in taken.items()}


def _peer(mixer: str, d_model: int) -> tuple[str, nn.Module] | None:
    """Somebody else's module of the same sizes, on its path without compiled kernels."""
    if mixer != "mamba":
        return None
    from transformers import MambaConfig
    from transformers import __version__ as version
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=d_model, state_size=16, num_hidden_layers=1)
    return f"transformers {version} MambaMixer, slow path", MambaMixer(config, layer_idx=0)
