"""Small calls are added together: the error does not grow with their number, and nobody notices otherwise."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_same_bits, integers

from hpa_ext import Gram, NumericalError, ops
from hpa_ext.gram_rows import KeptRows

FEATURES = 40
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def exact_sum(x):
    return x.double().mT @ x.double()


def error(gram, exact):
    return float((gram.state_dict()["sum"].double() - exact).norm() / exact.norm())


def of_calls(x, tokens):
    gram = Gram(x.shape[-1])
    for chunk in x.split(tokens):
        gram.update(chunk)
    return gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_error_does_not_grow_with_the_number_of_calls(dtype, tokens):
    """Added one by one, these tokens cost 5e-6 and more."""
    x = (torch.randn(20_000, FEATURES) + 0.5).to(dtype)
    assert error(of_calls(x, tokens), exact_sum(x)) < 6e-7


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [64, 300])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 1000])
def test_a_hundred_thousand_tokens_in_any_chunks(dtype, features, tokens):
    x = (torch.randn(100_000, features) + 0.5).to(dtype)
    assert error(of_calls(x, tokens), exact_sum(x)) < 2e-6


def test_calls_of_several_dtypes_and_masks_wait_together():
    x = torch.randn(90, FEATURES).bfloat16()
    mask = torch.rand(90) < 0.5
    gram, exact = Gram(FEATURES), exact_sum(x[mask])
    for index, (row, counts) in enumerate(zip(x.float().split(1), mask.split(1), strict=True)):
        row = row.to(DTYPES[index % 3]) if counts else torch.full_like(row, torch.nan)
        gram.update(row[None], counts[None])
    assert gram.token_count == int(mask.sum())
    assert error(gram, exact) < 1e-6


@pytest.mark.parametrize("read", ["matrix", "state_dict", "inverse_diagonal", "dead_columns", "is_finite", "nothing"])
def test_reading_in_between_changes_no_value(read):
    x, gram = integers(50, FEATURES), Gram(FEATURES)
    for row in x.split(1):
        gram.update(row)
        getattr(gram, read, lambda: None)()
    assert torch.equal(gram.matrix("sum").double(), 2 * exact_sum(x))


def test_what_waits_is_copied_and_merged():
    x = integers(9, FEATURES)
    gram, copies = of_calls(x.clone(), 1), []
    buffer = io.BytesIO()
    torch.save(gram, buffer)
    buffer.seek(0)
    copies += [copy.deepcopy(gram), pickle.loads(pickle.dumps(gram)), torch.load(buffer, weights_only=False)]
    for other in copies:
        other.update(x[:1])
        assert torch.equal(other.matrix("sum").double(), 2 * exact_sum(torch.cat([x, x[:1]])))
    assert torch.equal(gram.merge_(of_calls(x, 2)).merge_(gram).matrix("sum").double(), 8 * exact_sum(x))
    assert gram.token_count == 4 * 9


def test_later_changes_of_the_activations_do_no_harm():
    x = integers(3, FEATURES)
    gram, expected = Gram(FEATURES).update(x), exact_sum(x)
    x.fill_(3)
    assert torch.equal(gram.matrix("sum").double(), 2 * expected)


def test_little_waits():
    gram = Gram(FEATURES)
    for _ in range(1000):
        gram.update(torch.randn(3, FEATURES))
        assert sum(len(rows) for rows in gram._total._waiting) < 64


def test_few_tokens_made_in_inference_mode():
    x, gram = integers(9, FEATURES), Gram(FEATURES)
    with torch.inference_mode():
        gram.update(x.clone())
    gram.update(x)
    assert torch.equal(copy.deepcopy(gram).matrix("sum").double(), 4 * exact_sum(x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_a_token_that_is_not_finite_is_refused_by_its_own_call(value):
    gram, x = Gram(FEATURES).update(torch.ones(3, FEATURES)), torch.ones(1, FEATURES)
    x[0, 5] = value
    for tokens in (x, torch.ones(1, FEATURES)):
        with pytest.raises(NumericalError, match="1 of 40 features \\(5\\)"):
            gram.update(tokens)


def test_a_sum_that_overflows_by_tokens_that_wait_says_so():
    x = torch.zeros(1, FEATURES)
    x[0, 3] = 1.5e18  # 151 of its squares fit
    gram = of_calls(x.expand(160, -1), 1)
    with pytest.raises(NumericalError, match="1 of 40 features \\(3\\)"):
        gram.matrix()
    assert not bool(gram.is_finite())


@pytest.mark.parametrize(("features", "tokens"), [(FEATURES, 3), (600, 3), (600, 70)])
def test_memory_that_runs_out_loses_no_token(features, tokens, monkeypatch):
    x = integers(3 * tokens, features)
    gram = of_calls(x, tokens)
    added = []

    def first_fails(*arguments):
        added.append(arguments)
        if len(added) == 1:
            raise MemoryError
        return original(*arguments)

    original = ops.gram_accumulate_
    monkeypatch.setattr(ops, "gram_accumulate_", first_fails)
    with pytest.raises(MemoryError):
        gram.matrix()
    assert torch.equal(gram.matrix("sum").double(), 2 * exact_sum(x))


def test_merging_rows_into_a_sum_leaves_the_other_its_rows():
    few, many = integers(20, 600), integers(400, 600)
    other = Gram(600).update(few)
    gram = Gram(600).update(many).merge_(other)
    assert other._rows is not None and gram._rows is None
    assert torch.equal(gram.matrix("sum").double(), 2 * exact_sum(torch.cat([few, many])))
    assert gram.token_count == 420


def test_rows_become_the_sum_with_the_bits_of_single_calls(monkeypatch):
    x = torch.randn(100, 520)
    kept = of_calls(x, 3)
    monkeypatch.setattr(KeptRows, "serve", lambda *_: False)
    assert kept._rows is not None
    assert_same_bits(kept.matrix(), of_calls(x, 3).matrix())


def test_a_wrong_damping_is_refused_whatever_was_computed_before():
    gram = Gram(FEATURES).update(torch.randn(50, FEATURES))
    gram.inverse_diagonal(1.0)
    for damping in ("1.0", True, None):
        with pytest.raises(ValueError, match="damping: expected a finite number"):
            gram.inverse_diagonal(damping)
