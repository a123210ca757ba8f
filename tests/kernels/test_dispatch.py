"""The right backend is chosen, and a wrong wish is answered with what would work."""

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.kernels.dispatch import BACKENDS, Backend, accumulator, choose, declare, full_precision

X = torch.zeros(1)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", dict(BACKENDS))
    monkeypatch.setattr(dispatch, "_installed", lambda package: package == "triton")
    declare(
        "toy",
        Backend("native", ("cpu",), (torch.float32,), lacks=frozenset({"window"})),
        Backend("fused", ("cuda",), (torch.float32, torch.bfloat16), needs=("triton",)),
        Backend("chunked"),
        Backend("reference", needs=("a_package_nobody_has",)),
    )


def test_the_first_backend_that_can_serve_is_the_default() -> None:
    assert choose("toy", X) == "native"
    assert choose("toy", X.double()) == "chunked"
    assert choose("toy", X, features=("window",)) == "chunked"


def test_the_interpreter_is_never_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    declare("toy", Backend("fused", ("cuda",), needs=("triton",)), Backend("chunked"))
    assert choose("toy", X) == "chunked"
    assert choose("toy", X, "fused") == "fused"
    monkeypatch.setenv("SEQZOO_BACKEND", "fused")
    assert choose("toy", X) == "fused"


def test_the_interpreter_is_refused_bfloat16_by_name_and_by_preference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="wrong numbers in bfloat16; use chunked"):
        choose("toy", X.bfloat16(), "fused")
    monkeypatch.setenv("SEQZOO_BACKEND", "fused")
    assert choose("toy", X.bfloat16()) == "chunked"


def test_the_environment_prefers_and_does_not_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQZOO_BACKEND", "native")
    assert choose("toy", X) == "native"
    assert choose("toy", X.double()) == "chunked"
    assert choose("toy", X, "chunked") == "chunked"


def test_a_misspelt_preference_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEQZOO_BACKEND", "chunk")
    with pytest.raises(ValueError, match="no backend in SEQZOO_BACKEND 'chunk'; nearest: chunked"):
        choose("toy", X)


@pytest.mark.parametrize(
    ("wish", "x", "features", "words"),
    [
        ("nativ", X, (), "no backend of toy named 'nativ'; nearest: native"),
        ("native", X.half(), (), "it takes float32, not float16; use chunked"),
        ("native", X, ("window", "sinks"), "it cannot do window; use chunked"),
        ("reference", X, (), "a_package_nobody_has is not installed; use native or chunked"),
    ],
)
def test_a_backend_that_cannot_serve_is_refused_with_one_that_can(
    wish: str, x: torch.Tensor, features: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        choose("toy", x, wish, features)


def test_a_gpu_backend_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="it runs on cuda, not on cpu; use native or chunked"):
        choose("toy", X, "fused")


def test_a_meta_tensor_is_served_like_one_on_the_cpu() -> None:
    assert choose("toy", X.to("meta")) == "native"


def test_no_backend_at_all_is_an_error_with_dtype_and_device() -> None:
    declare("toy", Backend("native", ("cpu",), (torch.float32,)))
    with pytest.raises(ValueError, match="no backend of toy takes float64 on cpu"):
        choose("toy", X.double())


@pytest.mark.parametrize(
    ("given", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
    ],
)
def test_sums_are_never_narrower_than_float32(given: torch.dtype, wide: torch.dtype) -> None:
    assert accumulator(given) == wide


def test_autocast_cannot_reach_into_full_precision() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(x):
            assert (x @ x).dtype == torch.float32
