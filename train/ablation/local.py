"""Cells on this machine: processes that each train one cell after the other, on one thread.

A worker that dies (killed for its memory, say) costs its own cell and nothing else: a pool of
`concurrent.futures` would give up every cell that waits. Workers die with the process that started
them, also when that one is killed.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from seqzoo.train.ablation.work import attempt, failed

WATCH = 1.0  # seconds between two looks at the parent


class Worker:
    """A process and the pipe to it."""

    def __init__(self, alone: bool) -> None:
        # Spawned, not forked: a fork of a process that has run torch's threads can hang.
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process: BaseProcess = context.Process(target=serve, args=(other, alone), daemon=True)
        self.process.start()
        other.close()
        self.key = ""  # of the cell it trains

    def death(self) -> str:
        """How it died, in words."""
        self.process.join()
        code = self.process.exitcode or 0
        return f"process died (signal {-code})" if code < 0 else f"process died (exit {code})"


def serve(pipe: "Connection[Any, Any]", alone: bool) -> None:
    """A worker's life."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            description = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(description, alone))


def run_local(
    cells: Mapping[str, dict[str, Any]], workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train cells.

    Args:
        cells: descriptions by key.
        workers: processes.

    Yields:
        Keys and records, as they are finished.
    """
    waiting = list(cells)[::-1]
    count = min(workers, len(cells))
    crew = [Worker(count == 1) for _ in range(count)]
    try:
        for worker in crew:
            _hand(worker, waiting, cells)
        while busy := [w for w in crew if w.key]:
            ready = set(wait([w.pipe for w in busy]))
            for i, worker in enumerate(crew):
                if worker.key and worker.pipe in ready:
                    key = worker.key
                    try:
                        record = worker.pipe.recv()
                    except (EOFError, ConnectionResetError):
                        record = failed(worker.death())
                        worker = crew[i] = Worker(count == 1) if waiting else worker
                    _hand(worker, waiting, cells)
                    yield key, record
    finally:
        for worker in crew:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


def _hand(worker: Worker, waiting: list[str], cells: Mapping[str, dict[str, Any]]) -> None:
    worker.key = waiting.pop() if waiting else ""
    if worker.key:
        worker.pipe.send(cells[worker.key])


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)
