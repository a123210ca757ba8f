"""Sparse feed-forward networks: every token goes through the few experts that a router chose.

    y_t = sum_k weight_{t,k} f_{index_{t,k}}(x_t),  f_e(x) = act(x W_in[e]) [* x W_up[e]] W_out[e]

Carries Switch, GShard, GLaM, Expert Choice, StableMoE and DeepSeekMoE. Tokens are sorted by expert,
each expert multiplies its own, ragged group (Gale et al., "MegaBlocks", arXiv:2211.15841), and the
results are added where the tokens stood.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import Backend, accumulator, choose, declare, full_precision
from seqzoo.kernels.errors import check_shape
from seqzoo.kernels.experts.chunked import backward, forward
from seqzoo.kernels.experts.reference import experts as reference_experts
from seqzoo.kernels.operator import operator

declare("experts", Backend("chunked"), Backend("reference"))


def experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    w_up: Tensor | None = None,
    activation: Callable[[Tensor], Tensor],
    backend: str | None = None,
) -> Tensor:
    """Mix each token's K experts. No capacity: who drops tokens gives them index -1.

    O(S K I H) time, whatever E is. E is the number of experts, I the width of a token, H that of an
    expert's hidden layer.

    Args:
        x: (S, I) tokens of any rows, any real floating dtype; half precision is computed in
            float32.
        index: (S, K) int64 experts of each token; -1 is nobody, whose part is 0.
        weight: (S, K) factor of each part.
        w_in: (E, I, H).
        w_out: (E, H, O).
        w_up: (E, I, H); for gated experts, multiplies what is activated.
        activation: elementwise.
        backend: `chunked` or `reference`; `chunked` when None.

    Returns:
        y: (S, O) in the dtype of `x`, differentiable in all but `index`.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot serve the call.
    """
    for name, given_shape, letters in (
        ("x", x.shape, "(S, I)"),
        ("index", index.shape, "(S, K)"),
        ("w_in", w_in.shape, "(E, I, H)"),
        ("w_out", w_out.shape, "(E, H, O)"),
    ):
        if len(given_shape) != letters.count(",") + 1:
            raise ValueError(f"{name} is {tuple(given_shape)}; experts takes {letters}")
    (S, I), (E, _, H) = x.shape, w_in.shape
    check_shape("index", index.shape, (S, index.shape[1]), "(S, K)")
    check_shape("weight", weight.shape, tuple(index.shape), "(S, K)")
    check_shape("w_in", w_in.shape, (E, I, H), "(E, I, H)")
    check_shape("w_out", w_out.shape, (E, H, w_out.shape[2]), "(E, H, O)")
    given, wide = x.dtype, accumulator(torch.promote_types(x.dtype, w_in.dtype))
    x, weight, w_in, w_out = (t.to(wide) for t in (x, weight, w_in, w_out))
    if w_up is not None:
        check_shape("w_up", w_up.shape, (E, I, H), "(E, I, H)")
        w_up = w_up.to(wide)
    run = reference_experts if choose("experts", x, backend) == "reference" else _grouped
    with full_precision(x):
        y: Tensor = run(x, index, weight, w_in, w_out, w_up, activation)
    return y.to(given)


def _grouped(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_up: Tensor | None,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Permute, multiply, combine."""
    E, K = w_in.shape[0], index.shape[1]
    chosen = index.flatten()
    order = torch.where(chosen < 0, E, chosen).argsort(stable=True)  # nobody's come last
    source = order // max(K, 1)
    sizes = (chosen[:, None] == torch.arange(E, device=x.device)).sum(0)
    tokens = x[source]
    h = activation(grouped_matmul(tokens, w_in, sizes))
    if w_up is not None:
        h = h * grouped_matmul(tokens, w_up, sizes)
    parts = grouped_matmul(h, w_out, sizes) * weight.flatten()[order, None]
    return x.new_zeros(x.shape[0], w_out.shape[2]).index_add(0, source, parts)


def grouped_matmul(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """Multiply consecutive groups of rows each by its own matrix.

    Args:
        x: (R, I): `sizes[0]` rows for the first matrix, then `sizes[1]` for the second, and so on.
        weight: (E, I, O), in the dtype of `x`.
        sizes: (E,) int64, whose sum is at most R; it is read on the host.

    Returns:
        y: (R, O); rows beyond the last group are 0. Differentiable in `x` and `weight`.
    """
    y: Tensor = _grouped_matmul(x, weight, sizes)
    return y


@operator("seqzoo::grouped_matmul")
def _grouped_matmul(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    return forward(x, weight, sizes)


@_grouped_matmul.register_fake
def _(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@operator("seqzoo::grouped_matmul_backward", like=("x", "weight"))
def _grouped_matmul_backward(
    x: Tensor, weight: Tensor, sizes: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    return backward(x, weight, sizes, dy)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, weight, sizes = ctx.saved_tensors
    return *_grouped_matmul_backward(x, weight, sizes, dy), None


_grouped_matmul.register_autograd(_differentiate, setup_context=_save)
