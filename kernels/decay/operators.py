"""Gradients of operators that walk over chunks and keep the states between them."""

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.operator import Operator

Gradients = tuple[Tensor | None, ...]


def differentiate(chunks: Operator, backward: Operator, step: Operator | None = None) -> None:
    """Give `chunks`, and `step` for one token, the gradients that `backward` computes.

    Args:
        chunks: (q, k, v, ..., initial state, backend) -> o, last state, all states, of which the
            last is for the backward pass only.
        backward: (q, k, v, ..., all states, do, dstate, backend) -> gradients of all tensors.
        step: as `chunks`, without the third output.
    """

    def ask(
        tensors: list[Tensor],
        states: Tensor,
        do: Tensor | None,
        dstate: Tensor | None,
        backend: str,
    ) -> Gradients:
        do = states.new_zeros(tensors[2].shape) if do is None else do
        dstate = states.new_zeros(states.shape[1:]) if dstate is None else dstate
        return *backward(*tensors, states, do, dstate, backend), None

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
        *tensors, start, ctx.backend = inputs
        ctx.save_for_backward(*tensors, output[2] if len(output) == 3 else start)
        ctx.set_materialize_grads(False)

    def of_chunks(
        ctx: Any,  # noqa: ANN401  # torch's own type
        do: Tensor | None,
        dstate: Tensor | None,
        _: None,
    ) -> Gradients:
        *tensors, states = ctx.saved_tensors
        return ask(tensors, states, do, dstate, ctx.backend)

    def of_step(ctx: Any, do: Tensor | None, dstate: Tensor | None) -> Gradients:  # noqa: ANN401
        *tensors, start = ctx.saved_tensors  # a chunk of one token, after which no state is read
        return ask(tensors, torch.stack((start, start)), do, dstate, ctx.backend)

    chunks.register_autograd(of_chunks, setup_context=save)
    if step is not None:
        step.register_autograd(of_step, setup_context=save)
