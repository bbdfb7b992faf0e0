"""gram by the wgmma kernel (compute capability 9.0): every CUDA case of test_gram.py, lists, and what it leaves."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_same_bits, integers, is_native, normal, refuses
from test_gram import (  # noqa: F401  collected here once more, now by wgmma
    exact_gram,
    gram_of,
    test_accuracy,
    test_activations_and_mask_are_not_changed,
    test_additive_over_chunks_and_independent_of_token_order,
    test_expanded_activations,
    test_gram_may_be_a_view,
    test_half_precision_sums_beyond_its_range,
    test_integers_are_summed_exactly,
    test_layout_of_the_activations,
    test_layout_of_the_mask,
    test_leading_dimensions,
    test_masked_tokens_are_never_used,
    test_masks_of_few_and_of_all_tokens,
    test_no_tokens_or_no_features_change_nothing,
    test_nothing_outside_an_allocation_is_written,
    test_nothing_outside_the_gram_is_written,
    test_symmetric_and_positive_semidefinite,
)

from hpa_ext import ops
from hpa_ext.ops import _backend

pytestmark = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def by_wgmma(device):
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("wgmma needs a device of compute capability 9.0")
    with ops.cuda_gram_kernel("wgmma"):
        yield


def list_gram(xs, masks=None):
    gram = torch.zeros(xs[0].shape[-1], xs[0].shape[-1], device=xs[0].device)
    return ops.gram_accumulate_list_(gram, xs, masks)


def served_by(x):
    """What the native module would take for x, where wgmma is asked for."""
    from hpa_ext.ops import gram_list

    sample = (x.data_ptr(), _backend.DTYPE_TAGS[x.dtype], *x.shape, _backend.row_stride(x), 0)
    number = gram_list._C.cuda.gram_kernel_of([sample], _backend.GRAM_KERNELS["wgmma"])
    return next(name for name, each in _backend.GRAM_KERNELS.items() if each == number)


def test_which_kernel_serves(device):
    for dtype in HALVES:
        x = integers(70, 136, dtype=dtype, device=device)
        assert served_by(x) == "wgmma"
        assert served_by(x[::2, :131]) == "wgmma"
        assert served_by(x[:, 1:]) == "mma_sync"
        assert served_by(integers(70, 131, dtype=dtype, device=device)) == "mma_sync"
    # The parts of float32 lie in the workspace, as they should, whatever x does.
    assert served_by(integers(70, 131, device=device)[:, 1:]) == "wgmma"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (64, 64), (63, 128), (65, 136), (200, 264), (1100, 24), (130, 392)])
@pytest.mark.parametrize("masked", [False, True])
def test_tails_of_tokens_and_columns(device, dtype, shape, masked):
    x = integers(*shape, dtype=dtype, device=device)
    mask = (torch.rand(shape[0]) < 0.7).to(device) if masked else None
    exact = exact_gram(x, mask)
    if masked:
        x[~mask] = torch.nan
    assert served_by(x) == "wgmma"
    gram = gram_of(x, mask)
    assert torch.equal(gram.double(), exact)
    assert_same_bits(gram, gram.mT.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_mma_sync(device, dtype, masked):
    x = normal(300, 264, dtype=dtype, device=device)
    mask = (torch.rand(300) < 0.7).to(device) if masked else None
    ours, exact = gram_of(x, mask), exact_gram(x, mask)
    with ops.cuda_gram_kernel("mma_sync"):
        other = gram_of(x, mask)
    scale = exact.diagonal()[:, None].sqrt() * exact.diagonal().sqrt()
    assert float(((ours - exact) / scale).abs().max()) < 2e-6
    assert float(((ours - other) / scale).abs().max()) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_lists(device, dtype, masked):
    xs = [integers(n, 136, dtype=dtype, device=device) for n in (70, 1, 0, 64, 200)]
    xs.append(integers(2, 33, 136, dtype=dtype, device=device))
    masks = [(torch.rand(x.shape[:-1]) < 0.6).to(device) if masked and i % 2 == 0 else None for i, x in enumerate(xs)]
    exact = sum(exact_gram(x, mask) for x, mask in zip(xs, masks, strict=True))
    for x, mask in zip(xs, masks, strict=True):
        if mask is not None:
            x[~mask] = torch.nan
    assert torch.equal(list_gram(xs, masks).double(), exact)
    if not masked:
        assert torch.equal(list_gram(xs).double(), exact)


def test_lists_longer_than_one_launch(device):
    xs = [integers(5 + i, 40, dtype=torch.bfloat16, device=device) for i in range(50)]
    assert torch.equal(list_gram(xs).double(), sum(map(exact_gram, xs)))


def test_lists_of_mixed_dtypes_and_layouts(device):
    xs = [integers(9, 40, dtype=dtype, device=device) for dtype in DTYPES]
    xs.append(integers(9, 41, dtype=torch.bfloat16, device=device)[:, 1:])
    assert torch.equal(list_gram(xs).double(), sum(map(exact_gram, xs)))
    assert torch.equal(list_gram(xs[2:]).double(), sum(map(exact_gram, xs[2:])))


def test_bad_lists(device):
    gram = torch.zeros(8, 8, device=device)
    xs = [torch.ones(3, 8, dtype=torch.bfloat16, device=device) for _ in range(2)]
    with refuses(ValueError, "token_masks"):
        ops.gram_accumulate_list_(gram, xs, [None])
    with refuses(ValueError, "gram"):
        ops.gram_accumulate_list_(gram, [xs[0], xs[1][:, :7]])
    with refuses(TypeError, "x"):
        ops.gram_accumulate_list_(gram, [xs[0], None])
    assert not bool(gram.any())


@pytest.mark.parametrize("shape", [(1, 131), (300, 67), (1500, 24)])
def test_float32_keeps_its_digits(device, shape):
    """Two bfloat16 parts instead of three, or a product forgotten, would cost 1e-6 of each element and more."""
    x = normal(*shape, device=device)
    gram, exact = gram_of(x), exact_gram(x)
    error = float((gram.double() - exact).norm() / exact.norm())
    assert error < (2e-7 if shape[0] == 1 else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_bits_every_time(device, dtype, masked):
    if device.type != "cuda":
        pytest.skip("the emulator's own tests run several orders of threads")
    x = normal(3000, 1160, dtype=dtype, device=device)
    mask = (torch.rand(3000) < 0.8).to(device) if masked else None
    first = gram_of(x, mask)
    for _ in range(100):
        assert_same_bits(gram_of(x, mask), first)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [8192, 20_000])
def test_sums_leave_the_registers_in_time(device, dtype, tokens):
    """Tensor cores truncate: without a flush every 8192 tokens the diagonal would fall short by 3e-5 and more."""
    if device.type != "cuda":
        pytest.skip("too large for the emulator, whose tests flush after fewer tokens")
    x = normal(tokens, 2048, dtype=dtype, device=device)
    exact = exact_gram(x)
    error = (gram_of(x).double() - exact).diagonal() / exact.diagonal()
    assert float(error.abs().max()) < 2e-5


@pytest.mark.parametrize("tokens", [8192, 20_000])
def test_sums_of_float32_leave_the_registers_in_time(device, tokens):
    if device.type != "cuda":
        pytest.skip("too large for the emulator, whose tests flush after fewer tokens")
    x = normal(tokens, 2048, device=device)
    gram, exact = gram_of(x), exact_gram(x)
    assert float((gram.double() - exact).norm() / exact.norm()) < 2e-6


def test_on_two_streams_and_in_a_graph(device):
    if device.type != "cuda":
        pytest.skip("the emulator has no streams")
    x = integers(2000, 520, dtype=torch.bfloat16, device=device)
    expected = exact_gram(x).float()
    grams = [torch.zeros(520, 520, device=device) for _ in range(3)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream, gram in zip(streams, grams, strict=False):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ops.gram_accumulate_(gram, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gram_accumulate_(grams[2], x)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(grams[0], expected)
    assert torch.equal(grams[1], expected)
    assert torch.equal(grams[2], 2 * expected)


def test_the_choice_is_checked_and_restored(device):
    assert is_native("gram", device)
    before = _backend.gram_kernel()
    with ops.cuda_gram_kernel("mma_sync"):
        assert _backend.gram_kernel() == 0
    assert _backend.gram_kernel() == before == 1
    with refuses(ValueError, "name"), ops.cuda_gram_kernel("cutlass"):
        pass
