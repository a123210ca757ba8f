"""AdamW with three parameter groups, and a linear warm-up followed by a cosine or a line.

- `decay`: matrices. Weight decay.
- `plain`: norms, biases, embeddings, anything one-dimensional. No weight decay.
- `state`: what a mixer names in `ssm_parameters` (decay rates, step sizes). No weight decay and a
  learning rate of its own: a recurrence that shifts its time scales fast unlearns what its
  neighbours were built on. S4's recipes use min(lr, 0.001) (state-spaces/s4, configs/optimizer).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

STATE_LR = 1e-3


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, ssm_lr: float | None = None
) -> list[dict[str, Any]]:
    """Every trainable parameter once, in the groups above; a group without members is left out.

    Args:
        model: anything with mixers inside.
        lr: learning rate of `decay` and `plain`.
        weight_decay: of `decay`.
        ssm_lr: learning rate of `state`; None is the smaller of `lr` and 0.001.
    """
    members: dict[str, list[nn.Parameter]] = {"decay": [], "plain": [], "state": []}
    seen: set[int] = set()  # tied weights appear under two modules
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                members[_group(module, name, parameter)].append(parameter)
    slow = min(lr, STATE_LR) if ssm_lr is None else ssm_lr
    settings = {
        "decay": {"lr": lr, "weight_decay": weight_decay},
        "plain": {"lr": lr, "weight_decay": 0.0},
        "state": {"lr": slow, "weight_decay": 0.0},
    }
    return [
        {"name": name, "params": parameters, **settings[name]}
        for name, parameters in members.items()
        if parameters
    ]


def _group(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if name in getattr(module, "ssm_parameters", ()):
        return "state"
    small = parameter.ndim < 2 or "bias" in name or isinstance(module, nn.Embedding)
    return "plain" if small else "decay"


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    ssm_lr: float | None = None,
) -> AdamW:
    """AdamW over `parameter_groups`."""
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay, ssm_lr=ssm_lr)
    return AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay)


def warmup_cosine(step: int, *, warmup: int, total: int, floor: float) -> float:
    """Factor on the learning rate at `step`: (step + 1) / warmup, then a cosine from 1 to `floor`.

    From `total` on it stays at `floor`.
    """
    if step < warmup:
        return (step + 1) / warmup
    if step >= total:
        return floor
    done = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def warmup_linear(step: int, *, warmup: int, total: int, floor: float) -> float:
    """As `warmup_cosine`, with a straight line from 1 to `floor`."""
    if step < warmup or step >= total:
        return warmup_cosine(step, warmup=warmup, total=total, floor=floor)
    return floor + (1 - floor) * (total - step) / max(1, total - warmup)


def two_phases(
    step: int, *, shape: Callable[..., float], first: int, warmup: int, total: int, floor: float
) -> float:
    """A schedule over the `first` steps, and the same again over the others."""
    if step < first:
        return shape(step, warmup=warmup, total=first, floor=floor)
    return shape(step - first, warmup=warmup, total=total - first, floor=floor)


def build_schedule(
    optimizer: Optimizer,
    *,
    warmup: int,
    total: int,
    floor: float,
    shape: Callable[..., float] = warmup_cosine,
    first: int = 0,
) -> LambdaLR:
    """`two_phases` of `shape` as a scheduler to be advanced once an optimiser step."""
    # functools.partial, not a lambda: its state is nothing, so checkpoints carry only numbers.
    factor = partial(two_phases, shape=shape, first=first, warmup=warmup, total=total, floor=floor)
    return LambdaLR(optimizer, factor)


def override(optimizer: Optimizer, schedule: LambdaLR, groups: list[dict[str, Any]]) -> None:
    """Make a restored optimiser and schedule use the settings of `groups`, by group name.

    A checkpoint brings its learning rates back with the moments; without this, a rate typed with
    `--ckpt_path` would be parsed, shown and then ignored.
    """
    wanted = {group["name"]: group for group in groups}
    for i, group in enumerate(optimizer.param_groups):
        new = wanted[group["name"]]
        group["weight_decay"], group["initial_lr"] = new["weight_decay"], new["lr"]
        schedule.base_lrs[i] = new["lr"]
        group["lr"] = new["lr"] * schedule.lr_lambdas[i](schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
