"""A million tokens, streamed: the bytes carried stay the same and the numbers stay finite."""

import pytest
import torch

from tests.properties import Case, state_bytes

MILLION = 1_000_000
PIECE = 50_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "s4d", "rwkv4"])
def test_a_million_tokens_stream_with_constant_memory(name: str):
    mixer = Case(name).build()
    state = mixer.init_state(1)
    before = state_bytes(state)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(MILLION // PIECE):
            y, state = mixer(torch.randn(1, PIECE, 32, generator=generator), state)
            assert y.isfinite().all()
            assert state_bytes(state) == before
