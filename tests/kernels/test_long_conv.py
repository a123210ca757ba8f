"""The long convolution against its definition, in every dtype, shape and mode it promises."""

import pytest
import torch
from torch import Tensor

from seqzoo.kernels.long_conv import chunked, long_conv
from tests.tolerances import assert_close_to_reference

LENGTHS = [(1, 1), (2, 5), (63, 63), (64, 64), (65, 7), (100, 130)]
KINDS = [("native", False), ("chunked", False), ("chunked", True)]  # backend, documents


def inputs(B: int, T: int, D: int, L: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((B, T, D), (D, L), (D,))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def packed(B: int, T: int) -> Tensor:
    """Documents of one to many tokens whose ids come back."""
    return (torch.rand(B, T) < 0.15).cumsum(1) % 2


def differentiated(given: list[Tensor], document: Tensor | None, backend: str) -> list[Tensor]:
    u, kernel, skip = given
    y = long_conv(u, kernel, skip=skip, document=document, backend=backend)
    torch.manual_seed(5)  # and rounded to what every dtype can hold
    return [y, *torch.autograd.grad(y, given, torch.randn(y.shape).bfloat16().half().to(y.dtype))]


def check(out: list[Tensor], ref: list[Tensor], dtype: torch.dtype) -> None:
    names = ("output", "gradient of u", "gradient of kernel", "gradient of skip")
    for name, a, b in zip(names, out, ref, strict=True):
        assert_close_to_reference(a, b, dtype, gradient=name != "output", name=name)


@pytest.mark.parametrize(("backend", "documents"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "L"), LENGTHS)
def test_fft_equals_explicit_sum_with_every_gradient(
    T, L, dtype, backend, documents, poisoned_empty
):
    given = inputs(3, T, 5, L, dtype)
    document = packed(3, T) if documents else None
    wide = [x.detach().double().requires_grad_() for x in given]
    truth = differentiated(wide, document, "reference")
    check(differentiated(given, document, backend), truth, dtype)
    if dtype == torch.float32 and backend == "chunked":
        check(differentiated(given, document, "reference"), truth, dtype)


def test_reference_is_the_sum_over_lags():
    u, kernel, skip = (x.detach() for x in inputs(2, 6, 3, 4, torch.float64))
    y = long_conv(u, kernel, skip=skip, backend="reference")
    for t in range(6):
        wanted = skip * u[:, t]
        for s in range(max(0, t - 3), t + 1):
            wanted = wanted + kernel[:, t - s] * u[:, s]
        torch.testing.assert_close(y[:, t], wanted)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_packed_documents_equal_separate_rows(backend):
    u, kernel, skip = inputs(2, 90, 3, 90, torch.float64)
    lengths = (1, 2, 40, 33, 14)
    ids = torch.repeat_interleave(torch.tensor([4, 9, 4, 9, 4]), torch.tensor(lengths))
    y = long_conv(u, kernel, skip=skip, document=ids.expand(2, -1), backend=backend)
    pieces = [long_conv(d, kernel, skip=skip, backend=backend) for d in u.split(lengths, dim=1)]
    torch.testing.assert_close(y, torch.cat(pieces, dim=1))


def test_channel_blocks_that_do_not_divide_the_width_lose_no_channel(monkeypatch):
    given = inputs(2, 50, 7, 50, torch.float64)
    wanted = differentiated(given, None, "chunked")
    monkeypatch.setattr(chunked, "CACHE", 3 * 2 * 100)  # blocks of 3, 3 and 1
    check(differentiated(given, None, "chunked"), wanted, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("T", "D"), [(300, 37), (700, 16), (1500, 3)])
def test_transforms_beyond_the_cache_and_vectors_half_full_agree_with_other_code(
    T, D, dtype, poisoned_empty
):
    given = inputs(2, T, D, T, dtype)
    wide = [x.detach().double().requires_grad_() for x in given]
    check(differentiated(given, None, "native"), differentiated(wide, None, "chunked"), dtype)


def test_threads_do_not_share_their_room():
    given, before = inputs(2, 600, 40, 600), torch.get_num_threads()
    torch.set_num_threads(1)
    wanted = differentiated(given, None, "native")
    torch.set_num_threads(2)
    found = differentiated(given, None, "native")
    torch.set_num_threads(before)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_a_loud_row_or_channel_changes_no_bit_of_another(backend):
    u, kernel, _ = (x.detach() for x in inputs(3, 100, 20, 100))
    loud = u.clone()
    loud[1] *= 1e6
    loud[:, :, 7] = float("nan")
    found, wanted = (long_conv(x, kernel, backend=backend) for x in (loud, u))
    quiet = [i for i in range(20) if i != 7]
    assert torch.equal(found[::2, :, quiet], wanted[::2, :, quiet])


@pytest.mark.parametrize("T", [4, 9, 60, 135, 1000, 4097])
def test_transform_sizes_are_even_smooth_and_no_smaller_than_asked(T):
    n = chunked._size(T)
    rest = n
    for p in (2, 3, 5):
        while rest % p == 0:
            rest //= p
    assert rest == 1
    assert n % 2 == 0
    assert T <= n <= 1.2 * T + 2


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_scaling_the_future_moves_the_past_by_rounding_alone(backend):
    u, kernel, _ = (x.detach() for x in inputs(1, 300, 4, 300))
    kernel /= kernel.norm(dim=1, keepdim=True)
    louder = torch.cat([u[:, :150], 1e4 * u[:, 150:]], dim=1)
    after, before = (long_conv(x, kernel, backend=backend) for x in (louder, u))
    moved = (after - before)[:, :150].abs().max()
    assert moved <= 1e-5 * louder.abs().max()


def test_with_documents_no_future_token_and_no_other_document_reaches_a_token_at_all():
    u, kernel, _ = (x.detach() for x in inputs(1, 100, 4, 100))
    document = (torch.arange(100) >= 70).long()[None]
    y = long_conv(u, kernel, document=document)
    spoilt = u.clone()
    spoilt[:, 40:70] = float("nan")
    after = long_conv(spoilt, kernel, document=document)
    assert torch.equal(after[:, :40], y[:, :40])
    assert torch.equal(after[:, 70:], y[:, 70:])
    assert after[:, 40:70].isnan().all()


@pytest.mark.parametrize(("backend", "documents"), KINDS)
def test_gradcheck(backend, documents):
    given = inputs(2, 7, 2, 5, torch.float64)
    document = packed(2, 7) if documents else None
    assert torch.autograd.gradcheck(
        lambda u, k, s: long_conv(u, k, skip=s, document=document, backend=backend), given
    )


@pytest.mark.parametrize(("backend", "documents"), KINDS)
def test_custom_op_is_registered_rightly(backend, documents):
    u, kernel, _ = inputs(2, 9, 3, 9)
    runs = packed(2, 9).cumsum(1) if documents else None
    torch.library.opcheck(torch.ops.seqzoo.long_conv.default, (u, kernel, runs, backend))


@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("backend", [None, "chunked", "reference"])
def test_without_tokens_gradients_are_zero_not_garbage(B, T, backend, poisoned_empty):
    u, kernel, skip = inputs(B, T, 3, 4)
    document = torch.zeros(B, T, dtype=torch.long)
    for ids in (None, document):
        y = long_conv(u, kernel, skip=skip, document=ids, backend=backend)
        assert y.shape == (B, T, 3)
        for grad in torch.autograd.grad(y.sum(), (kernel, skip)):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_strided_and_expanded_inputs_equal_contiguous_ones():
    u = torch.randn(12, 3, 8)[:, :, ::2].transpose(0, 1)
    kernel = torch.randn(12, 4).t()
    document = packed(1, 12).expand(3, 12)
    for ids in (None, document):
        wanted = long_conv(u.contiguous(), kernel.contiguous(), document=ids)
        torch.testing.assert_close(long_conv(u, kernel, document=ids), wanted)
    same = torch.randn(1, 12, 4).expand(3, 12, 4)
    torch.testing.assert_close(long_conv(same, kernel), long_conv(same.clone(), kernel))


def test_meta_tensors_have_the_right_shape():
    u, kernel, skip = (x.detach().to("meta") for x in inputs(2, 9, 3, 9))
    ids = torch.zeros(2, 9, dtype=torch.long, device="meta")
    for backend in ("chunked", "reference"):
        assert long_conv(u, kernel, skip=skip, document=ids, backend=backend).shape == (2, 9, 3)


@pytest.mark.parametrize("documents", [False, True])
def test_compiled_without_graph_breaks_equals_eager(documents):
    torch.compiler.reset()
    compiled = torch.compile(long_conv, fullgraph=True, backend="aot_eager")
    for T in (20, 21):
        u, kernel, skip = inputs(2, T, 3, 30)
        ids = packed(2, T) if documents else None
        wanted = long_conv(u, kernel, skip=skip, document=ids)
        found = compiled(u, kernel, skip=skip, document=ids)
        torch.testing.assert_close(found, wanted)
        (a,) = torch.autograd.grad(found.square().sum(), kernel)
        (b,) = torch.autograd.grad(wanted.square().sum(), kernel)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("documents", [False, True])
def test_error_does_not_grow_over_65536_tokens(documents):
    u, kernel, _ = (x.detach() for x in inputs(1, 65_536, 2, 65_536))
    document = (torch.arange(65_536) // 20_011)[None] if documents else None
    out = long_conv(u, kernel, document=document)
    wanted = long_conv(u.double(), kernel.double(), document=document, backend="chunked")
    assert_close_to_reference(out, wanted)


def test_wrong_shapes_are_named():
    u, kernel = torch.randn(2, 5, 3), torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"u is \(5, 3\); long_conv takes \(B, T, D\)"):
        long_conv(u[0], kernel)
    with pytest.raises(ValueError, match=r"kernel is \(3, 0\); long_conv takes \(D, L\)"):
        long_conv(u, kernel[:, :0])
    with pytest.raises(ValueError, match=r"kernel is \(2, 5\); \(D, L\) here is \(3, 5\)"):
        long_conv(u, kernel[:2])
    with pytest.raises(ValueError, match=r"skip is \(2,\)"):
        long_conv(u, kernel, skip=torch.randn(2))
    with pytest.raises(ValueError, match=r"document is \(2, 4\)"):
        long_conv(u, kernel, document=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"no backend of long_conv named 'nonesuch'"):
        long_conv(u, kernel, backend="nonesuch")
    with pytest.raises(ValueError, match=r"cannot do documents; use chunked"):
        long_conv(u, kernel, document=torch.zeros(2, 5, dtype=torch.long), backend="native")
