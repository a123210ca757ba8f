"""The stack as an autoencoder: every token of a row is decoded from the vector at its last one.

    z = x_T,  logits_t = W MLP(z + p_t)

with p_t the sines and cosines of position t, and MLP twice (norm, linear, GELU), as in MAD's
compression task: Poli et al., 2024, arXiv:2403.17844 (athms/mad-lab, auto_encoder.py).
"""

from typing import Any

import torch
from torch import Tensor, nn

from seqzoo.zoo.base import ZooOutput, ZooPreTrainedModel
from seqzoo.zoo.config import ZooConfig
from seqzoo.zoo.model import ZooModel

SLOWEST = 10_000.0  # turns a radian in this many positions


class AutoEncoder(ZooPreTrainedModel):  # type: ignore[no-untyped-call]
    """The stack, and a decoder that sees only the last position.

    Raises:
        ValueError: a width that is odd, or a description that `DecoderSpec` refuses.
    """

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.model = ZooModel(config)
        D = self.model.spec.d_model
        if D % 2:
            raise ValueError(f"d_model={D} is odd; sines and cosines come in pairs")
        self.decoder = nn.Sequential(
            nn.RMSNorm(D), nn.Linear(D, D), nn.GELU(), nn.RMSNorm(D), nn.Linear(D, D), nn.GELU()
        )
        self.head = nn.Sequential(nn.RMSNorm(D), nn.Linear(D, config.vocab_size))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, **options: Any) -> ZooOutput:  # noqa: ANN401
        """Decode each row.

        Args:
            input_ids: (B, T), T >= 1.
            options: those of `ZooModel.forward`.

        Returns:
            `logits` (B, T, V).
        """
        out: ZooOutput = self.model(input_ids, **options)
        assert out.last_hidden_state is not None
        z = out.last_hidden_state[:, -1:]
        x = z + _sines(input_ids.shape[1], z)
        out.logits = self.head(self.decoder(x))
        return out


def _sines(length: int, like: Tensor) -> Tensor:
    """(T, D): sines in the first half, cosines in the second."""
    half = like.shape[-1] // 2
    slots = torch.arange(length, device=like.device, dtype=torch.float32)
    rates = SLOWEST ** -(torch.arange(half, device=like.device) / max(half - 1, 1))
    angles = slots[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)
