"""The short convolution as a mixer, against torch's own Conv1d with the same weights."""

import pytest
import torch
from torch import nn

from seqzoo.layers import create_mixer


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_equals_torchs_depthwise_convolution(taps, bias, activation):
    other = nn.Conv1d(6, 6, taps, groups=6, padding=taps - 1, bias=bias).double()
    mixer = create_mixer("short_conv", 6, d_conv=taps, bias=bias, activation=activation).double()
    with torch.no_grad():
        mixer.conv_weight.copy_(other.weight[:, 0])
        if bias:
            mixer.conv_bias.copy_(other.bias)
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    wanted = other(x.mT)[..., :20].mT
    wanted = nn.functional.silu(wanted) if activation else wanted
    torch.testing.assert_close(mixer(x)[0], wanted)


def test_wrong_options_are_refused_by_name():
    with pytest.raises(ValueError, match="d_conv=0 is not allowed"):
        create_mixer("short_conv", 6, d_conv=0)
    with pytest.raises(ValueError, match=r"no activation of short_conv named 'relu'.*all: silu"):
        create_mixer("short_conv", 6, activation="relu")
