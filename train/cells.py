"""A cell: one small model trained on one synthetic task. Plain data in, plain data out.

What comes out depends on nothing but what goes in: not on the process, its threads, its random
state or what ran before, to the last bit on one machine (all but the seconds).
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from seqzoo.kernels.errors import check_positive, unknown
from seqzoo.train.optim import build_optimizer, build_schedule
from seqzoo.train.tasks import Task, create_task
from seqzoo.train.tasks.answers import READOUTS, answers
from seqzoo.zoo.base import ZooPreTrainedModel
from seqzoo.zoo.config import ZooConfig
from seqzoo.zoo.losses import with_auxiliary
from seqzoo.zoo.seeds import derive, seeded
from seqzoo.zoo.spec import DecoderSpec

BATCH = 128  # rows measured at once,
TOKENS = 1 << 17  # and tokens at most: rows of Path-X have 16,384


@dataclass(frozen=True)
class Cell:
    """What is trained, on what, and how; every field is plain data that JSON gives back unchanged.

    Attributes:
        decoder: fields of `DecoderSpec`.
        task: `name` and options of a synthetic task.
        seed: of weights and dropout.
        data_seed: of the samples; `seed` when None. Cells that share it read the same batches.
        steps: of the optimiser; also the length of the schedule.
        batch_size: rows of a batch, all of them new.
        lr: learning rate after the warm-up.
        weight_decay: of matrices.
        betas: of AdamW.
        ssm_lr: learning rate of state-space parameters; see `seqzoo.train.optim`.
        warmup_steps: of the schedule.
        min_lr_ratio: where the cosine ends.
        clip: largest norm of the gradient.
        lengths: other lengths to measure at, besides the task's own.
        eval_every: steps between two looks at the validation rows.
        eval_rows: validation rows of each look, at each length.
        test_rows: rows of the final measurement.
        stop: accuracies by length; training ends at the first look that finds all of them reached.
    """

    decoder: dict[str, Any]
    task: dict[str, Any]
    seed: int = 0
    data_seed: int | None = None
    steps: int = 1000
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    ssm_lr: float | None = None
    warmup_steps: int = 100
    min_lr_ratio: float = 0.0
    clip: float = 1.0
    lengths: tuple[int, ...] = ()
    eval_every: int = 100
    eval_rows: int = 256
    test_rows: int = 1024
    stop: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "clip", "eval_every", "eval_rows", "test_rows"):
            check_positive(**{name: getattr(self, name)})
        object.__setattr__(self, "betas", tuple(self.betas))
        task, spec = self.build_task(), DecoderSpec.from_dict(self.decoder)
        object.__setattr__(self, "task", task.to_dict())
        object.__setattr__(self, "decoder", spec.to_dict())
        own = task.length
        object.__setattr__(self, "lengths", tuple(sorted({own, *self.lengths})))
        stop = {int(length): share for length, share in self.stop.items()}  # JSON's keys
        object.__setattr__(self, "stop", stop)
        for length in self.lengths:
            task.at(length)
        for length in stop:
            if length not in self.lengths:
                raise ValueError(f"stop at length {length} is not measured; lengths={self.lengths}")

    def build_task(self) -> Task:
        """The task."""
        return create_task(**self.task)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, complete."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> "Cell":
        """The inverse of `to_dict`; what is missing takes its default.

        Raises:
            ValueError: an unknown name, or a value that the cell, its task or its decoder refuses.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in description:
            if name not in fields:
                raise unknown("option of a cell named", name, fields)
        for name in ("decoder", "task"):
            if name not in description:
                raise ValueError(f"a cell needs a {name}")
        if "name" not in description["task"]:
            raise ValueError("a cell's task needs a name")
        return cls(**description)

    def key(self) -> str:
        """A name for the cell that no other cell has: a hash of the complete description."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def train_cell(description: Mapping[str, Any]) -> dict[str, Any]:
    """Train and measure.

    Args:
        description: the fields of `Cell`.

    Returns:
        cell: the complete description, and `key`, its hash.
        parameters: trainable scalars.
        state_bytes, flops: of one row by length, all mixers together; see `Mixer.cost`.
        steps: taken; fewer than asked for when `stop` was reached.
        stopped: whether it was.
        curve: of each look, `step`, the mean training `loss` since the one before, and `accuracy`
            on validation rows by length.
        accuracy: on test rows, by length (a string, as JSON has it).
        floor: by length, `accuracy` and `how` it is had without doing the task.
        seconds: of wall-clock time; `cpu_seconds`, which neighbours on the machine hardly change.

    Raises:
        ValueError: a description that is refused, or a loss that is not finite.
    """
    begun, begun_cpu = time.perf_counter(), time.process_time()
    cell = Cell.from_dict(description)
    task = cell.build_task()
    tasks = {length: task.at(length) for length in cell.lengths}
    with one_thread(), seeded(derive(cell.seed, 0)):
        network = build_network(DecoderSpec.from_dict(cell.decoder), task)
        curve, stopped = _train(cell, task, tasks, network)
        accuracy = measure(network, tasks, cell, "test")
    costs = {n: [entry.mixer.cost(n) for entry in network.model.entries] for n in cell.lengths}
    return {
        "key": cell.key(),
        "cell": cell.to_dict(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "state_bytes": {str(n): sum(c.state_bytes for c in each) for n, each in costs.items()},
        "flops": {str(n): sum(c.flops for c in each) for n, each in costs.items()},
        "steps": curve[-1]["step"],
        "stopped": stopped,
        "curve": curve,
        "accuracy": accuracy,
        "floor": {str(length): t.floor._asdict() for length, t in tasks.items()},
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - begun_cpu,
    }


def build_network(spec: DecoderSpec, task: Task) -> ZooPreTrainedModel:
    """A model that answers a task: logits (B, T, V) at every position, or (B, classes) of a row."""
    classes: dict[str, Any] = {"num_labels": task.n_classes} if task.n_classes else {}
    config = ZooConfig(
        decoder=spec.to_dict(), vocab_size=task.vocab_size, use_cache=False, **classes
    )
    return READOUTS[task.readout](config)


@torch.no_grad()
def measure(
    network: nn.Module, tasks: Mapping[int, Task], cell: Cell, split: str
) -> dict[str, float]:
    """Share of right answers by length, on the first rows of a split."""
    seed = _data_seed(cell)
    rows = cell.test_rows if split == "test" else cell.eval_rows
    network.eval()
    shares = {}
    for length, task in tasks.items():
        right = count = 0
        size = max(1, min(BATCH, TOKENS // length))
        for start in range(0, rows, size):
            batch = task.sample(seed, split, range(start, min(start + size, rows)))
            _, _, hits, asked = answers(network, batch)
            right, count = right + int(hits), count + int(asked)
        shares[str(length)] = right / max(count, 1)
    network.train()
    return shares


def _train(
    cell: Cell, task: Task, tasks: Mapping[int, Task], network: ZooPreTrainedModel
) -> tuple[list[dict[str, Any]], bool]:
    """The curve, and whether `stop` was reached."""
    optimizer = build_optimizer(
        network,
        lr=cell.lr,
        weight_decay=cell.weight_decay,
        betas=cell.betas,
        ssm_lr=cell.ssm_lr,
    )
    schedule = build_schedule(
        optimizer, warmup=cell.warmup_steps, total=cell.steps, floor=cell.min_lr_ratio
    )
    network.train()
    curve: list[dict[str, Any]] = []
    losses: list[float] = []
    for step in range(cell.steps):
        rows = range(step * cell.batch_size, (step + 1) * cell.batch_size)
        out, total, _, asked = answers(network, task.sample(_data_seed(cell), "train", rows))
        loss = with_auxiliary(total / asked.clamp(min=1), out.aux_loss, True)
        if not torch.isfinite(loss):
            raise ValueError(f"step {step}: the loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), cell.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % cell.eval_every and step + 1 < cell.steps:
            continue
        accuracy = measure(network, tasks, cell, "val")
        mean = sum(losses) / len(losses)
        curve.append({"step": step + 1, "loss": mean, "accuracy": accuracy})
        losses = []
        if cell.stop and all(accuracy[str(n)] >= share for n, share in cell.stop.items()):
            return curve, True
    return curve, False


def _data_seed(cell: Cell) -> int:
    return cell.seed if cell.data_seed is None else cell.data_seed


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread within the block: sums are then made in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
