"""Time of one training step of a mixer at growing lengths."""

from functools import partial

import torch
from torch import Tensor, nn

from seqzoo.layers import create_mixer
from seqzoo.train.bench.measure import interleaved, training_step
from seqzoo.train.commands.list import table


def by_length(
    mixer: str,
    lengths: list[int],
    *,
    d_model: int,
    batch_size: int,
    repeats: int,
    device: str,
) -> str:
    """The table, and below it somebody else's module of the same sizes where there is one."""
    with torch.device(device):
        torch.manual_seed(0)
        module = create_mixer(mixer, d_model).to(device)
        inputs = {T: torch.randn(batch_size, T, d_model).requires_grad_() for T in lengths}
    parameters = [p for p in module.parameters() if p.requires_grad]
    steps = {
        T: training_step(partial(_output, module, x), [x, *parameters]) for T, x in inputs.items()
    }
    for step in steps.values():
        step()
    times = interleaved(steps, repeats, device)
    first = lengths[0]
    rows: list[tuple[str, ...]] = [("tokens", "ms a step", "us a token", "times the first")]
    for T, (ms, _) in times.items():
        each = 1000 * ms / (T * batch_size)
        rows.append((str(T), f"{ms:.1f}", f"{each:.2f}", f"{ms / times[first].ms:.1f}x"))
    return table(rows) + _beside(mixer, d_model, inputs[first], times[first].ms, device)


def _output(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)[0]
    return y


def _beside(mixer: str, d_model: int, x: Tensor, ours: float, device: str) -> str:
    peer = _peer(mixer, d_model)
    if peer is None:
        return ""
    name, module = peer
    module = module.to(device)
    step = training_step(lambda: module(x), [x, *module.parameters()])
    theirs = interleaved({name: step}, 1, device)[name].ms
    return f"\n{name} at {x.shape[1]} tokens: {theirs:.0f} ms, {theirs / ours:.0f} times ours\n"


def _peer(mixer: str, d_model: int) -> tuple[str, nn.Module] | None:
    """Somebody else's module of the same sizes, on its path without compiled kernels."""
    if mixer != "mamba":
        return None
    from transformers import MambaConfig
    from transformers import __version__ as version
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=d_model, state_size=16, num_hidden_layers=1)
    return f"transformers {version} MambaMixer, slow path", MambaMixer(config, layer_idx=0)
