"""What ends a run early and well: numbers that are not finite, and SIGTERM."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer

from seqzoo.kernels.errors import check_positive, unknown

EXIT_CODE = 128 + signal.SIGTERM


class NotFiniteError(ValueError):
    """A loss, gradient or parameter became NaN or infinite; one line."""


class StopOnNaN(Callback):
    """Looks at the loss and the gradients before every optimizer step.

    The step is not taken: parameters stay finite, and no checkpoint with other ones is written.
    Under float16 with a gradient scaler, only the loss is looked at: there infinite gradients are
    the scaler's own signal.

    Args:
        on_nan: `stop` ends the run with an error that names the step and the layer; `skip` drops
            the batches of this step and goes on.
        patience: how many steps in a row may be skipped.
    """

    def __init__(self, on_nan: Literal["stop", "skip"] = "stop", patience: int = 10) -> None:
        if on_nan not in (allowed := ("stop", "skip")):
            raise unknown("on_nan", on_nan, allowed)
        check_positive(patience=patience)
        self.on_nan, self.patience = on_nan, patience
        self.skipped = 0  # steps in all
        self._in_a_row = 0
        self._batch: tuple[Any, int] = (None, 0)
        self._random: list[Tensor] = []  # of the CPU, and of the device if it has one
        self._where = ""

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401  # Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Keep what is needed to repeat the forward pass."""
        self._batch, self._random = (batch, batch_idx), [torch.get_rng_state()]
        if pl_module.device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(pl_module.device))

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Find the layer while the parameters are those that gave this loss."""
        if not self._where and not torch.isfinite(loss).all():
            layer = self._replay(pl_module)
            source = f"the output of {layer}" if layer else "the loss, while every layer was finite"
            self._where = f"loss {loss.item():g}; first not finite: {source}"

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Stop or skip.

        Raises:
            NotFiniteError: with the step and the layer.
        """
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        where = self._where or ("" if scaled else bad_gradient(pl_module))
        self._where = ""
        if not trainer.strategy.reduce_boolean_decision(bool(where), all=False):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        fault = f"step {trainer.global_step}: {where or 'not finite on another rank'}"
        if self.on_nan == "stop":
            raise NotFiniteError(
                f"{fault}; no step was taken (on_nan: skip would drop it and go on)"
            )
        if self._in_a_row > self.patience:
            raise NotFiniteError(f"{fault}; {self.patience} steps before it were skipped already")
        self.skipped += 1
        # An optimizer leaves alone what has no gradient: no decay, no momentum.
        for parameter in pl_module.parameters():
            parameter.grad = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to write parameters that are not finite over ones that are.

        Raises:
            NotFiniteError: with the step and the parameter.
        """
        for name, parameter in pl_module.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NotFiniteError(
                    f"step {trainer.global_step}: parameter {name} is not finite; "
                    "this checkpoint was not written"
                )

    def _replay(self, module: LightningModule) -> str:
        """Name of the first layer with an output that is not finite, from the same random state."""
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self._random[0])
            for device in devices:
                torch.cuda.set_rng_state(self._random[1], device)
            with torch.no_grad(), _no_log(module), _watch(module) as found:
                module.training_step(*self._batch)
        return found[0] if found else ""


def bad_gradient(module: nn.Module) -> str:
    """Where backward first met a number that is not finite, in words; empty when nowhere.

    Backward runs from the last layer to the first, so that is the last parameter concerned.
    """
    gradients = [(n, p.grad) for n, p in module.named_parameters() if p.grad is not None]
    if not gradients:
        return ""
    sums = torch.stack([g.detach().float().abs().amax() for _, g in gradients if g.numel()])
    if torch.isfinite(sums).all():
        return ""
    names = [name for name, g in gradients if g.numel()]
    bad = [name for name, s in zip(names, sums.tolist(), strict=True) if not abs(s) < float("inf")]
    return f"gradient not finite, first in {bad[-1].rpartition('.')[0] or bad[-1]} ({bad[-1]})"


class SaveOnSigterm(Callback):
    """At SIGTERM: finish the optimizer step, save `last.ckpt`, exit with code 143.

    During validation it waits for its end. A second SIGTERM ends the process at once.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal over from Lightning, which would end without a save, with code 0."""
        self._asked = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's own signature
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Save and leave, unless gradients are still being accumulated: no file keeps those."""
        if not trainer.fit_loop._should_accumulate():
            self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and leave."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._leave(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signal back."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signal back."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self._asked = True

    def _leave(self, trainer: Trainer) -> None:
        if not trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            return
        folder = next(
            (c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)),
            None,
        )
        path = Path(folder or trainer.default_root_dir) / "last.ckpt"
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.last_model_path = str(path)  # else a resumed run starts last-v1.ckpt
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            sys.stderr.write(f"seqzoo: SIGTERM; saved {path} at step {trainer.global_step}\n")
        raise SystemExit(EXIT_CODE)


@contextmanager
def _watch(module: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose output is not finite, in the order in which they return."""
    found: list[str] = []

    def hook(name: str) -> Any:  # noqa: ANN401
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            if any(not torch.isfinite(t).all() for t in _tensors(output)):
                found.append(f"{name} ({type(_module).__name__})")

        return look

    handles = [m.register_forward_hook(hook(name)) for name, m in module.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _no_log(module: LightningModule) -> Iterator[None]:
    """A repeated step must not count twice in the logs."""
    for name in ("log", "log_dict"):
        object.__setattr__(module, name, lambda *args, **options: None)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            object.__delattr__(module, name)


def _tensors(value: object) -> Iterator[Tensor]:
    """Floating-point tensors in a nest of containers."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
