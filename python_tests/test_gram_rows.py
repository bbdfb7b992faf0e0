"""A Gram of few tokens keeps their rows: the diagonal from them, and that all else is as if it had not."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same_bits

from hpa_ext import Gram, GramDiagonal, NumericalError, ops, reference
from hpa_ext.gram_rows import KeptRows

FEATURES = 640
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tokens(count, dtype=torch.bfloat16, features=FEATURES):
    """Features of different scales with a common mean, two of them massive and one dead."""
    x = (torch.randn(count, features) + 0.5) * torch.exp(0.5 * torch.randn(features))
    x[:, 7] *= 200
    x[:, 100] *= 50
    x[:, 33] = 0
    return x.to(dtype)


def exact_diagonal(x, damping=0.01):
    """Of the sum's inverse, in float64."""
    s = x.double().mT @ x.double()
    identity = torch.eye(len(s), dtype=torch.float64)
    return torch.linalg.inv(s + damping * s.diagonal().mean() * identity).diagonal()


def error(result, exact):
    return float(((result.double() - exact) / exact).abs().max())


def gram_of(*chunks, features=FEATURES):
    gram = Gram(features)
    for x in chunks:
        gram.update(x)
    return gram


def gram_never_keeping(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(KeptRows, "serve", lambda *_: False)
        return Gram(FEATURES)


def is_kept(gram):
    return gram._rows is not None


# ---------------------------------------------------------------------------------------------------- the operation


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("count", [1, 17, 128, 380])
@pytest.mark.parametrize("implementation", ["ops", "reference"])
def test_diagonal_from_rows(dtype, count, implementation):
    x = tokens(count, dtype)
    exact = exact_diagonal(x, 0.02)
    if implementation == "ops":
        found = ops.inverse_diagonal_of_rows(x, 0.02)
        assert found.is_accurate and found.failed_minor == 0
        product = found.smallest_pivot * found.smallest_remainder
        diagonal, squares = found.diagonal, found.squares
    else:
        diagonal, squares, minor, pivot, remainder = reference.inverse_diagonal_of_rows(x, 0.02)
        assert int(minor) == 0
        product = float(pivot * remainder)
    assert error(diagonal, exact) <= min(8 * torch.finfo(torch.float32).eps / product, 1e-4)
    torch.testing.assert_close(squares.double(), x.double().square().sum(0), rtol=1e-5, atol=0)


def test_any_strides():
    x = tokens(50, torch.float32)
    wide = torch.randn(50, FEATURES + 9)
    wide[:, 3:-6] = x
    expected = ops.inverse_diagonal_of_rows(x).diagonal
    for view in (wide[:, 3:-6], x.mT.contiguous().mT):
        assert_same_bits(ops.inverse_diagonal_of_rows(view).diagonal, expected)


def test_the_result_does_not_depend_on_the_number_of_threads():
    x, before, found = tokens(300), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.inverse_diagonal_of_rows(x).diagonal)
    finally:
        torch.set_num_threads(before)
    for result in found[1:]:
        assert_same_bits(result, found[0])


def test_equal_massive_features_are_not_accurate():
    """Alone they are; together they leave little of a pivot in the small factorisation."""
    x = torch.randn(50, FEATURES)
    x[:, 5] *= 1e4
    assert ops.inverse_diagonal_of_rows(x).is_accurate
    x[:, 6] = x[:, 5]
    found = ops.inverse_diagonal_of_rows(x)
    assert found.failed_minor == 0 and 0 < found.smallest_pivot < 1e-3 < found.smallest_remainder
    assert not found.is_accurate


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_rows_that_are_not_finite_are_not_accurate(value):
    x = tokens(20, torch.float32)
    x[3, 5] = value
    found = ops.inverse_diagonal_of_rows(x)
    assert found.failed_minor == -1 and not found.is_accurate


def test_bad_arguments():
    with pytest.raises(ValueError, match="x: expected at least one token"):
        ops.inverse_diagonal_of_rows(torch.empty(0, 5))
    with pytest.raises(ValueError, match="x: expected"):
        ops.inverse_diagonal_of_rows(torch.ones(5))
    with pytest.raises(TypeError, match="x: expected"):
        ops.inverse_diagonal_of_rows(torch.ones(2, 5, dtype=torch.int64))
    for damping in (0.0, -1.0, float("nan"), float("inf"), "0.01", None, True):
        with pytest.raises(ValueError, match="damping: expected"):
            ops.inverse_diagonal_of_rows(torch.ones(2, 5), damping)


# ---------------------------------------------------------------------------------------------------- the Gram


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_take_the_rows_and_are_more_accurate(dtype):
    chunks = tokens(200, dtype).split([80, 1, 0, 119])
    gram = gram_of(*chunks)
    exact = exact_diagonal(torch.cat(chunks)) * 200 / 2
    report = gram.inverse_diagonal_report()
    assert is_kept(gram) and report.from_rows
    assert (float(report.damping_used), int(report.precision_bits), int(report.failed_minor)) == (0.01, 32, 0)
    assert error(report.diagonal, exact) < 1e-5
    summed = gram_of(*chunks)
    summed.matrix()
    other = summed.inverse_diagonal_report()
    assert not is_kept(summed) and not other.from_rows
    assert error(report.diagonal, other.diagonal.double()) < 1e-3
    assert error(report.diagonal, exact) < error(other.diagonal, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_has_the_bits_of_never_having_kept_rows(dtype, monkeypatch):
    chunks = tokens(300, dtype).split([80, 1, 119, 100])
    gram, expected = gram_of(*chunks), gram_never_keeping(monkeypatch)
    for x in chunks:
        expected.update(x)
    gram.inverse_diagonal()
    assert is_kept(gram) and not is_kept(expected)
    assert_same_bits(gram.state_dict()["sum"], expected.state_dict()["sum"])
    assert not is_kept(gram)
    gram.update(chunks[0])
    assert_same_bits(gram.state_dict()["sum"], expected.update(chunks[0]).state_dict()["sum"])


def test_masked_tokens_are_not_kept():
    x, mask = tokens(500).view(5, 100, FEATURES), torch.rand(5, 100) < 0.5
    x[~mask] = torch.nan
    gram = Gram(FEATURES).update(x, mask)
    assert is_kept(gram) and gram.token_count == int(mask.sum())
    exact = exact_diagonal(x[mask]) * gram.token_count / 2
    assert error(gram.inverse_diagonal(), exact) < 1e-5
    expected = ops.gram_accumulate_(torch.zeros(FEATURES, FEATURES), x, mask)
    assert_same_bits(gram.matrix("sum"), 2 * expected)


def test_later_changes_of_the_activations_do_no_harm():
    x = tokens(50, torch.float32)
    gram, expected = Gram(FEATURES).update(x), gram_of(x.clone()).matrix()
    x.fill_(3)
    assert_same_bits(gram.matrix(), expected)


def test_many_tokens_are_summed():
    limit = int(0.6 * FEATURES)
    gram = gram_of(tokens(limit))
    assert is_kept(gram)
    gram.update(tokens(1))
    assert not is_kept(gram) and gram.token_count == limit + 1
    assert not is_kept(gram_of(tokens(limit + 1)))


def test_other_dtypes_and_sizes_are_summed():
    assert not is_kept(gram_of(tokens(20, torch.float64)))
    assert not is_kept(gram_of(tokens(20, torch.bfloat16), tokens(20, torch.float32)))
    assert not is_kept(gram_of(torch.randn(20, 511), features=511))
    assert is_kept(gram_of(torch.randn(20, 512), features=512))


def test_rows_that_do_not_suffice_are_summed():
    """Features of many scales leave little of 1 in the remainder: the error bound then forbids the rows."""
    x = torch.randn(360, FEATURES) * torch.exp(1.5 * torch.randn(FEATURES))
    assert not ops.inverse_diagonal_of_rows(x).is_accurate
    gram = gram_of(x)
    report = gram.inverse_diagonal_report()
    assert not report.from_rows and not is_kept(gram)
    assert error(report.diagonal, exact_diagonal(x) * 360 / 2) < 1e-4


def test_without_damping_the_sum_is_factored():
    gram = gram_of(tokens(100, torch.float32))
    report = gram.inverse_diagonal_report(0.0)
    assert not report.from_rows and float(report.damping_used) > 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_activations_that_are_not_finite_are_refused_as_ever(value):
    gram, x = gram_of(tokens(20, torch.float32)), tokens(20, torch.float32)
    x[3, 5] = value
    with pytest.raises(NumericalError, match="1 of 640 features \\(5\\)"):
        gram.update(x)
    assert not bool(gram.is_finite())


def test_a_refused_update_changes_nothing():
    gram = gram_of(tokens(20))
    expected = copy.deepcopy(gram).matrix()
    for bad, kind in ((torch.ones(3, 5), ValueError), (torch.ones(3, FEATURES, dtype=torch.int32), TypeError)):
        with pytest.raises(kind):
            gram.update(bad)
    with pytest.raises(ValueError, match="token_mask"):
        gram.update(tokens(3), torch.ones(4, dtype=torch.bool))
    assert is_kept(gram) and gram.token_count == 20
    assert_same_bits(gram.matrix(), expected)


def test_merge():
    first, second = tokens(150), tokens(100)
    gram = gram_of(first).merge_(gram_of(second))
    assert is_kept(gram) and gram.token_count == 250
    exact = exact_diagonal(torch.cat([first, second])) * 250 / 2
    assert error(gram.inverse_diagonal(), exact) < 1e-5
    many = gram_of(first).merge_(gram_of(tokens(300)))
    assert not is_kept(many) and many.token_count == 450
    mixed = gram_of(first).merge_(gram_of(second.float()))
    torch.testing.assert_close(mixed.matrix(), gram.matrix(), rtol=1e-5, atol=1e-3)
    other = gram_of(second)
    gram_of(first).merge_(other).update(first)
    assert is_kept(other) and other.token_count == 100


def test_dead_columns_state_and_reduction():
    gram = gram_of(tokens(60))
    assert gram.dead_columns().nonzero().flatten().tolist() == [33] and is_kept(gram)
    reduced = GramDiagonal.of(gram)
    assert is_kept(gram)
    assert_same_bits(reduced.inverse_diagonal(), gram.inverse_diagonal())
    restored = Gram.from_state_dict(gram.state_dict())
    assert_same_bits(restored.matrix(), gram.matrix())
    assert restored.token_count == 60
    assert error(restored.inverse_diagonal(), reduced.inverse_diagonal().double()) < 1e-3
    assert bool(Gram(FEATURES).dead_columns().all())


def test_an_empty_gram_says_so():
    with pytest.raises(ValueError, match="no tokens"):
        Gram(FEATURES).update(tokens(0)).inverse_diagonal()


def test_all_zero_tokens_are_said_to_be_zero():
    with pytest.raises(NumericalError, match="zero"):
        gram_of(torch.zeros(9, FEATURES)).inverse_diagonal()


@pytest.mark.parametrize("bad", [{"damping": -1.0}, {"damping": float("inf")}, {"rescue": "hope"}])
def test_bad_arguments_of_the_report(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        gram_of(tokens(20)).inverse_diagonal_report(**bad)
