"""ops.gram_accumulate_: gram += sum of x^T x over the tokens that count."""

from __future__ import annotations

import numpy
import pytest
import torch
from helpers import (
    DTYPES,
    MATRIX_LAYOUTS,
    GuardedAllocations,
    assert_accurate,
    assert_same_bits,
    at_offset,
    integers,
    is_native,
    lay_out,
    normal,
    outside,
    refuses,
)

from hpa_ext.ops import gram_accumulate_

SHAPES = [(1, 1), (1, 257), (257, 1), (7, 17), (17, 65), (65, 130), (130, 7), (257, 257), (1030, 96)]


def gram_of(x, token_mask=None):
    return gram_accumulate_(torch.zeros(x.shape[-1], x.shape[-1], device=x.device), x, token_mask)


def exact_gram(x, token_mask=None):
    tokens = x.detach().double().reshape(-1, x.shape[-1])
    if token_mask is not None:
        tokens = tokens[token_mask.reshape(-1)]
    return tokens.mT @ tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(device, dtype, shape):
    x = normal(*shape, dtype=dtype, device=device)
    exact = exact_gram(x)
    of_torch = x.float().mT @ x.float()
    scale = exact.diagonal()[:, None].sqrt() * exact.diagonal().sqrt()
    assert_accurate(gram_of(x), exact, of_torch, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_summed_exactly(device, dtype, shape):
    x = integers(*shape, dtype=dtype, device=device)
    start = integers(shape[1], shape[1], device=device)
    start = start + start.mT
    gram = start.clone()
    assert gram_accumulate_(gram, x) is gram
    assert torch.equal(gram.double(), start.double() + exact_gram(x))


def test_float64_activations(device):
    x = normal(50, 17, dtype=torch.float64, device=device)
    gram = gram_of(x)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram, exact_gram(x).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (0, 1), (2, 0, 5), (0, 3, 5), (0, 0), (5, 0)])
def test_no_tokens_or_no_features_change_nothing(device, shape):
    gram = integers(shape[-1], shape[-1], device=device)
    before = gram.clone()
    assert gram_accumulate_(gram, torch.zeros(shape, device=device)) is gram
    gram_accumulate_(gram, torch.zeros(shape, device=device), torch.ones(shape[:-1], dtype=torch.bool, device=device))
    assert torch.equal(gram, before)


@pytest.mark.parametrize("shape", [(17,), (3, 17), (2, 3, 17), (2, 3, 4, 17)])
def test_leading_dimensions(device, shape):
    x = integers(*shape, device=device)
    mask = (torch.rand(shape[:-1]) < 0.5).to(device)
    assert torch.equal(gram_of(x).double(), exact_gram(x))
    assert torch.equal(gram_of(x, mask).double(), exact_gram(x, mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 17), (17, 1), (65, 130)])
def test_layout_of_the_activations(device, dtype, masked, layout, shape):
    values = integers(*shape, dtype=dtype, device=device)
    mask = (torch.rand(shape[0]) < 0.6).to(device) if masked else None
    assert torch.equal(gram_of(lay_out(values, layout), mask).double(), exact_gram(values, mask))


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_layout_of_activations_with_leading_dimensions(device, layout):
    values = integers(3, 17, 33, device=device)
    assert torch.equal(gram_of(lay_out(values, layout)).double(), exact_gram(values))
    permuted = lay_out(values, layout).permute(1, 0, 2)
    assert torch.equal(gram_of(permuted).double(), exact_gram(values))


def test_expanded_activations(device):
    row = integers(1, 33, device=device)
    assert torch.equal(gram_of(row.expand(20, 33)).double(), 20 * exact_gram(row))
    column = integers(20, 1, device=device)
    assert torch.equal(gram_of(column.expand(20, 33)).double(), exact_gram(column).expand(33, 33))


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("size", [1, 17, 65])
def test_gram_may_be_a_view(device, layout, size):
    x, start = integers(30, size, device=device), integers(size, size, device=device)
    start = start + start.mT
    gram = lay_out(start, layout)
    before = outside(gram)
    gram_accumulate_(gram, x)
    assert torch.equal(gram.double(), start.double() + exact_gram(x))
    assert_same_bits(outside(gram), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 49, 65])
@pytest.mark.parametrize("offset", range(9))
def test_nothing_outside_the_gram_is_written(device, dtype, size, offset):
    x = at_offset(integers(19, size, dtype=dtype, device=device), offset)
    gram = at_offset(torch.zeros(size, size, device=device), offset, fill=-0.0)
    before = outside(gram)
    gram_accumulate_(gram, x)
    assert torch.equal(gram.double(), exact_gram(x))
    assert_same_bits(outside(gram), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_an_allocation_is_written(device, dtype, monkeypatch):
    if not (is_native("gram", device) and device.type == "cuda"):
        pytest.skip("only the CUDA kernel takes a workspace")
    x = integers(300, 130, dtype=dtype, device=device)
    gram = torch.zeros(130, 130, device=device)
    guarded = GuardedAllocations(monkeypatch)
    gram_accumulate_(gram, x)
    assert torch.equal(gram.double(), exact_gram(x))
    guarded.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(1, 7), (17, 65), (257, 130)])
def test_masked_tokens_are_never_used(device, dtype, garbage, shape):
    x = integers(*shape, dtype=dtype, device=device)
    mask = (torch.rand(shape[0]) < 0.5).to(device)
    exact = exact_gram(x, mask)
    x[~mask] = garbage
    assert torch.equal(gram_of(x, mask).double(), exact)


@pytest.mark.parametrize("marked", [[], [0], [16], [3, 4], list(range(17))])
def test_masks_of_few_and_of_all_tokens(device, marked):
    x = integers(17, 33, dtype=torch.bfloat16, device=device)
    mask = torch.zeros(17, dtype=torch.bool, device=device)
    mask[marked] = True
    assert torch.equal(gram_of(x, mask).double(), exact_gram(x, mask))


def test_layout_of_the_mask(device):
    x = integers(12, 5, 9, device=device)
    values = (torch.rand(12, 5) < 0.5).to(device)
    for layout in MATRIX_LAYOUTS:
        assert torch.equal(gram_of(x, lay_out(values, layout)).double(), exact_gram(x, values))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_show_on_the_diagonal(device, value):
    x = normal(20, 65, device=device)
    x[7, 11] = value
    gram = gram_of(x)
    assert not bool(torch.isfinite(gram[11, 11]))
    rest = [i for i in range(65) if i != 11]
    assert bool(torch.isfinite(gram[rest][:, rest]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_and_positive_semidefinite(device, dtype):
    gram = gram_of(normal(40, 130, dtype=dtype, device=device))
    if is_native("gram", device):
        assert_same_bits(gram, gram.mT.contiguous())
    eigenvalues = torch.linalg.eigvalsh(gram.double())
    assert float((gram - gram.mT).abs().max()) <= 1e-6 * float(gram.abs().max())
    assert float(eigenvalues.min()) >= -1e-5 * float(eigenvalues.max())
    assert int((eigenvalues > 1e-4 * eigenvalues.max()).sum()) == 40  # the rank is the number of tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_additive_over_chunks_and_independent_of_token_order(device, dtype):
    x = normal(257, 65, dtype=dtype, device=device)
    whole, exact = gram_of(x), exact_gram(x)
    chunks = torch.zeros_like(whole)
    for chunk in x.split([1, 100, 0, 56, 100]):
        gram_accumulate_(chunks, chunk)
    shuffled = gram_of(x[torch.randperm(257)])
    scale = exact.diagonal()[:, None].sqrt() * exact.diagonal().sqrt()
    assert_accurate(chunks, exact, whole, scale=scale, roundings=8)
    assert_accurate(shuffled, exact, whole, scale=scale, roundings=8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 2.0])
@pytest.mark.parametrize("chunk", [100_000, 8192, 700, 64, 8])
def test_accuracy_of_many_tokens_in_any_chunks(dtype, mean, chunk):
    x = (torch.randn(100_000, 130) + mean).to(dtype)
    gram = torch.zeros(130, 130)
    for tokens in x.split(chunk):
        gram_accumulate_(gram, tokens)
    exact = exact_gram(x)
    assert float((gram - exact).norm() / exact.norm()) < 2e-6


def test_half_precision_sums_beyond_its_range(device):
    x = torch.full((300, 5), 200.0, dtype=torch.float16, device=device)
    assert torch.equal(gram_of(x), torch.full((5, 5), 300 * 200.0**2, device=device))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_not_differentiable(device, dtype):
    x = normal(9, 5, dtype=dtype, device=device).requires_grad_()
    gram = gram_of(x)
    assert not gram.requires_grad
    assert gram.grad_fn is None


def test_activations_and_mask_are_not_changed(device):
    x, mask = normal(33, 17, device=device), (torch.rand(33) < 0.5).to(device)
    x_before, mask_before = x.clone(), mask.clone()
    gram_of(x, mask)
    assert_same_bits(x, x_before)
    assert_same_bits(mask, mask_before)


MASK = torch.ones(3, dtype=torch.bool)
BAD = {
    "gram is a list": ({"gram": [[0.0] * 5] * 5}, TypeError, "gram"),
    "gram is None": ({"gram": None}, TypeError, "gram"),
    "gram is an array": ({"gram": numpy.zeros((5, 5), dtype="float32")}, TypeError, "gram"),
    "gram is float64": ({"gram": torch.zeros(5, 5, dtype=torch.float64)}, TypeError, "gram"),
    "gram is bfloat16": ({"gram": torch.zeros(5, 5, dtype=torch.bfloat16)}, TypeError, "gram"),
    "gram is a vector": ({"gram": torch.zeros(5)}, ValueError, "gram"),
    "gram is a batch": ({"gram": torch.zeros(1, 5, 5)}, ValueError, "gram"),
    "gram is not square": ({"gram": torch.zeros(5, 4)}, ValueError, "gram"),
    "gram is too large": ({"gram": torch.zeros(6, 6)}, ValueError, "gram"),
    "gram is sparse": ({"gram": torch.zeros(5, 5).to_sparse()}, TypeError, "gram"),
    "gram is elsewhere": ({"gram": torch.zeros(5, 5, device="meta")}, ValueError, "x"),
    "x is a list": ({"x": [[1.0] * 5]}, TypeError, "x"),
    "x is None": ({"x": None}, TypeError, "x"),
    "x is an array": ({"x": numpy.ones((3, 5), dtype="float32")}, TypeError, "x"),
    "x is of integers": ({"x": torch.ones(3, 5, dtype=torch.int64)}, TypeError, "x"),
    "x is complex": ({"x": torch.ones(3, 5, dtype=torch.complex64)}, TypeError, "x"),
    "x is a scalar": ({"x": torch.ones(())}, ValueError, "x"),
    "x is too narrow": ({"x": torch.ones(3, 4)}, ValueError, "gram"),
    "x is sparse": ({"x": torch.ones(3, 5).to_sparse()}, TypeError, "x"),
    "x is elsewhere": ({"x": torch.ones(3, 5, device="meta")}, ValueError, "x"),
    "mask is a list": ({"token_mask": [True] * 3}, TypeError, "token_mask"),
    "mask is an array": ({"token_mask": numpy.ones(3, dtype=bool)}, TypeError, "token_mask"),
    "mask is of integers": ({"token_mask": MASK.long()}, TypeError, "token_mask"),
    "mask is of floats": ({"token_mask": MASK.float()}, TypeError, "token_mask"),
    "mask is uint8": ({"token_mask": MASK.byte()}, TypeError, "token_mask"),
    "mask is too long": ({"token_mask": torch.ones(4, dtype=torch.bool)}, ValueError, "token_mask"),
    "mask is a matrix": ({"token_mask": MASK[:, None]}, ValueError, "token_mask"),
    "mask is a scalar": ({"token_mask": MASK[0]}, ValueError, "token_mask"),
    "mask is sparse": ({"token_mask": MASK.to_sparse()}, TypeError, "token_mask"),
    "mask is elsewhere": ({"token_mask": MASK.to("meta")}, ValueError, "token_mask"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    changed, exception, name = BAD[bad]
    gram = torch.full((5, 5), 7.0)
    arguments = {"gram": gram, "x": torch.ones(3, 5), "token_mask": MASK, **changed}
    with refuses(exception, name):
        gram_accumulate_(**arguments)
    assert torch.equal(gram, torch.full((5, 5), 7.0))


def test_the_message_says_what_came():
    message = r"gram: expected shape \[4, 4\] .*got a float32 tensor of shape \[5, 5\] on cpu"
    with pytest.raises(ValueError, match=message):
        gram_accumulate_(torch.zeros(5, 5), torch.ones(3, 4))
