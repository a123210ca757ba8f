"""Resume bit for bit: the random state goes into the checkpoint and comes back in time.

It is restored when the first batch starts: whatever Lightning and the loaders draw before that is
undone. The loaders of `seqzoo.train.data` and the files of `seqzoo.train.checkpoint` do the rest.
"""

import platform
import random
import warnings
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer


class ExactResume(Callback):
    """Saves and restores the state of python's, numpy's and torch's random numbers, rank by rank.

    The same bits also need the same number of threads, versions and kind of device: what differs
    is said in one warning.
    """

    def __init__(self) -> None:
        self._device = "cpu"
        self._stored: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the device, whose name is stored."""
        device = trainer.strategy.root_device
        cuda = device.type == "cuda"
        self._device = torch.cuda.get_device_name(device) if cuda else device.type

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and tensors; all ranks must ask together."""
        ranks: list[Any] = [random_state()]
        if dist.is_available() and dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, random_state())
        return {"ranks": ranks, "environment": self._environment()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep until the first batch."""
        self._stored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what differs from where the checkpoint was made."""
        if self._stored is None or not trainer.is_global_zero:
            return
        was, now = self._stored["environment"], self._environment()
        ranks = {"ranks": (len(self._stored["ranks"]), trainer.world_size)}
        pairs = {name: (was.get(name), value) for name, value in now.items()} | ranks
        changed = [f"{name} {a}, now {b}" for name, (a, b) in pairs.items() if a != b]
        if changed:
            warnings.warn(
                f"resumed, but not to the last bit: the checkpoint had {'; '.join(changed)}",
                stacklevel=2,
            )

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401  # Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Restore, once."""
        if self._stored is not None and trainer.global_rank < len(self._stored["ranks"]):
            restore_random_state(self._stored["ranks"][trainer.global_rank])
        self._stored = None

    def _environment(self) -> dict[str, str | int]:
        return {
            "threads": torch.get_num_threads(),
            "device": self._device,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "lightning": str(lightning.__version__),
            "numpy": str(np.__version__),
        }


def random_state() -> dict[str, Any]:
    """The state of every global generator, in types that load with `weights_only=True`."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo every draw since `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
