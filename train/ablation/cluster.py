"""Cells on Ray: on this machine, or on the cluster that RAY_ADDRESS names."""

import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from seqzoo.train.ablation.work import attempt, failed

STORE = 80 << 20  # bytes that Ray may keep of objects: descriptions and results are small


def run_ray(
    cells: Mapping[str, dict[str, Any]], workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `run_local`; `workers` counts where Ray is started here, a cluster has its own.

    Raises:
        ValueError: Ray is not installed.
    """
    try:
        ray = import_module("ray")
    except ImportError:
        raise ValueError("--backend ray needs the package: pip install 'seqzoo[ray]'") from None
    address = os.environ.get("RAY_ADDRESS")
    here = {} if address else {"num_cpus": workers, "object_store_memory": STORE}
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    ray.init(
        address=address,
        include_dashboard=None if address else False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env=environment,
        **here,
    )
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(attempt)
        running = {remote.remote(cell): key for key, cell in cells.items()}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            key = running.pop(done)
            try:
                record = ray.get(done)
            except ray.exceptions.RayError as error:  # the worker died
                record = failed(f"process died ({type(error).__name__})")
            yield key, record
    finally:
        ray.shutdown()
