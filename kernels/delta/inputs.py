"""What the two delta rules ask of their inputs before they compute anything, and what comes out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqzoo.kernels.decay.chunked import chunk_count
from seqzoo.kernels.dispatch import accumulator
from seqzoo.kernels.errors import check_shape


def check_heads(
    kernel: str, v: Tensor, k: Tensor, log_decay: Tensor | None, **keys: Tensor
) -> None:
    """Values (B, T, H, V); what looks like keys (B, T, H, K); decays of either kind."""
    if v.ndim != 4 or k.ndim != 4:
        shapes = f"k is {tuple(k.shape)}, v is {tuple(v.shape)}"
        raise ValueError(f"{shapes}; {kernel} takes (B, T, H, K)")
    B, T, H, _ = v.shape
    wanted = (B, T, H, k.shape[-1])
    for name, x in {"k": k, **keys}.items():
        check_shape(name, x.shape, wanted, "(B, T, H, K)")
    if log_decay is not None and log_decay.ndim == 3:
        check_shape("log_decay", log_decay.shape, (B, T, H), "(B, T, H)")
    elif log_decay is not None:
        check_shape("log_decay", log_decay.shape, wanted, "(B, T, H, K)")


def begin(
    v: Tensor,
    K: int,
    others: Sequence[Tensor | None],
    initial_state: Tensor | None,
    reset: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """The state before the first token, (B, H, K, V), in the dtype of all sums."""
    B, T, H, V = v.shape
    for name, flags in (("reset", reset), ("mask", mask)):
        if flags is not None:
            check_shape(name, flags.shape, (B, T), "(B, T)")
    shape, wide = (B, H, K, V), v.dtype
    for x in (*others, initial_state):
        wide = wide if x is None else torch.promote_types(wide, x.dtype)
    wide = accumulator(wide)
    if initial_state is None:
        return torch.zeros(shape, device=v.device, dtype=wide)
    check_shape("initial_state", initial_state.shape, shape, "(B, H, K, V)")
    return initial_state.to(wide)


def columns(log_decay: Tensor | None, like: Tensor) -> Tensor:
    """Log decays (B, T, H, 1 or K); zeros, in the dtype of `like`, where there are none."""
    if log_decay is None:
        return like.new_zeros((*like.shape[:3], 1))
    return log_decay[..., None] if log_decay.ndim == 3 else log_decay


def where_real(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Zero at masked tokens; keys too: their junk must not meet others in a triangular inverse."""
    if mask is None:
        return tensors
    return tuple(torch.where(mask[..., None, None], x, 0) for x in tensors)


def empty_outputs(v: Tensor, initial_state: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of o, the last state, and the states before, between and after chunks."""
    states = initial_state.new_empty(1 + chunk_count(v.shape[1]), *initial_state.shape)
    o = v.new_empty(v.shape, dtype=v.dtype if backend == "fused" else states.dtype)
    return o, states.new_empty(states.shape[1:]), states
