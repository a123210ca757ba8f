"""A mixer of the user's own, in a module that only these tests can import, and small models."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from seqzoo.zoo.config import ZooConfig
from seqzoo.zoo.model import ZooForCausalLM

logging.disable_progress_bar()

# Its parameter is filled by copying, which transformers does not guard, and its decay is a buffer
# that no checkpoint holds.
AVERAGE = '''
"""A running mean."""

from typing import NamedTuple

import torch
from torch import nn

from seqzoo.kernels.scan import scan
from seqzoo.layers.base import Caps, Context, Cost, Mixer


class AverageState(NamedTuple):
    h: torch.Tensor


class Average(Mixer):
    """h_t = decay h_{t-1} + scale x_t."""

    caps = Caps(state="constant")

    def __init__(self, d_model, *, decay=0.9, loss=0.0):
        super().__init__()
        self.d_model, self.rate, self.weight_of_loss = d_model, decay, loss
        self.scale = nn.Parameter(torch.empty(d_model))
        self.register_buffer("decay", torch.empty(d_model), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            self.scale.copy_(torch.rand(self.d_model, device=self.scale.device))
            self.decay.copy_(torch.linspace(0.1, self.rate, self.d_model))

    def forward(self, x, state=None, ctx=None):
        ctx = ctx or Context()
        start = None if state is None else state[0]
        a = self.decay.expand_as(x)
        h, last = scan(a, self.scale * x, initial_state=start, reset=ctx.reset, mask=ctx.mask)
        # Later entries see how many came before: a second run of this code would see one more.
        passed = ctx.shared.get("passed", 0) + 1
        ctx.shared["passed"] = passed
        if self.weight_of_loss:
            ctx.losses["size"] = self.weight_of_loss * (h * passed).square().mean()
        return h / passed, None if state is None else AverageState(last)

    def init_state(self, batch_size, *, device=None, dtype=None):
        return AverageState(self.zeros(batch_size, self.d_model, device=device, dtype=dtype))

    def cost(self, length):
        return Cost(self.d_model, 0, 4 * self.d_model)


class Backward(Average):
    caps = Caps(causality="none", prefix=False, state="none", bidirectional=True)
'''


@pytest.fixture(scope="session", autouse=True)
def user_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`zoo_test_user.mixers`, as a user's package on the path."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "zoo_test_user").mkdir()
    (folder / "zoo_test_user/__init__.py").write_text("")
    (folder / "zoo_test_user/mixers.py").write_text(AVERAGE)
    (folder / "zoo_test_user/tangled.py").write_text(
        "import zoo_test_user.mixers\n" + AVERAGE.partition('"""A running mean."""')[2]
    )
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def average() -> str:
    return "zoo_test_user.mixers:Average"


@pytest.fixture
def language_model() -> Callable[..., ZooForCausalLM]:
    """Builds a small model whose weights are large enough for faults to show."""

    def build(*, vocab_size: int = 41, seed: int = 0, **decoder: Any) -> ZooForCausalLM:
        torch.manual_seed(seed)
        config = ZooConfig(
            decoder={"d_model": 16, **decoder}, vocab_size=vocab_size, initializer_range=0.5
        )
        return ZooForCausalLM(config).eval()

    return build
