"""Peak memory of a pass: a fresh process runs it, another does everything but the pass."""

import resource
import sys
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any, NamedTuple

import torch

from seqzoo.train.ablation.work import reason_of
from seqzoo.train.report.passes import Stack, build, run_once, tokens

WARM = 8  # tokens of the pass that both processes run: libraries load and threads start in it
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss


class Memory(NamedTuple):
    """Bytes of the pass, or why there are none; 0 is told as None: the allocator had room left."""

    bytes: int | None
    reason: str


def memory_of(stack: Stack, phase: str, length: int, batch_size: int) -> Memory:
    """Peak resident set with the pass, less without it."""
    without = _peak(stack, phase, None, batch_size)
    if isinstance(without, str):
        return Memory(None, without)
    whole = _peak(stack, phase, length, batch_size)
    if isinstance(whole, str):
        return Memory(None, whole)
    return Memory(whole - without if whole > without else None, "")


def serve(
    pipe: "Connection[Any, Any]", stack: Stack, phase: str, length: int | None, batch_size: int
) -> None:
    """A process's life: one pass, and how large it grew."""
    torch.set_num_threads(1)
    try:
        model = build(stack)
        run_once(model, phase, tokens(stack, batch_size, WARM))
        model.zero_grad()
        if length is not None:
            run_once(model, phase, tokens(stack, batch_size, length))
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT)
    except Exception as error:
        pipe.send(reason_of(error))


def _peak(stack: Stack, phase: str, length: int | None, batch_size: int) -> int | str:
    ours, theirs = _context().Pipe()
    process = _context().Process(target=serve, args=(theirs, stack, phase, length, batch_size))
    process.start()
    theirs.close()
    try:
        found: int | str = ours.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        return f"process died (signal {-code})" if code < 0 else f"process died (exit {code})"
    finally:
        ours.close()
    process.join()
    return found


@cache
def _context() -> ForkServerContext:
    """Processes forked from one that has imported the heavy packages and computed nothing.

    A process that is executed anew would inherit this one's peak: Linux keeps ru_maxrss through
    exec. The server's own is small, and a fork starts from it.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.modeling_utils"])
    return context
