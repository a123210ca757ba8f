"""The definition of the sLSTM cell: a loop over time."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def slstm(
    gates: Tensor,
    recurrent: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.slstm.slstm`; all tensors share one dtype."""
    outputs, state = [], initial_state
    for t in range(gates.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], 0, state)
        h, c, n, m = state.unbind(1)
        i, f, z, o = (gates[:, t] + torch.einsum("bhk,ghkj->bghj", h, recurrent)).unbind(1)
        kept = torch.where(n == 0, -torch.inf, logsigmoid(f) + m)
        top = torch.maximum(kept, i)
        forget, write = torch.exp(kept - top), torch.exp(i - top)
        c, n = forget * c + write * torch.tanh(z), forget * n + write
        after = torch.stack([torch.sigmoid(o) * c / n, c, n, top], dim=1)
        state = after if mask is None else torch.where(mask[:, t, None, None, None], after, state)
        outputs.append(state[:, 0])
    B, T, _, H, K = gates.shape
    return torch.stack(outputs, dim=1) if T else gates.new_empty(B, 0, H, K), state
