"""ops.cholesky: a factor that is kept, against float64, native and torch alike."""

from __future__ import annotations

import pytest
import torch

from hpa_ext import _C
from hpa_ext.ops.cholesky import cholesky, reference_cholesky

IMPLEMENTATIONS = [cholesky, reference_cholesky]


def matrix(size, seed=0, dtype=torch.float32):
    """Positive definite, features of unlike size; and a damped diagonal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size + 5, size, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2, size)
    s = (x.mT @ x / size).to(dtype)
    return s, s.diagonal().double() * 1.05


def exact(s, diagonal, rows):
    full = s.double().tril(-1)
    return torch.linalg.solve(full + full.mT + torch.diag(diagonal), rows.double().mT).mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 47, 48, 49, 200])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_times_the_inverse(implementation, size, dtype):
    s, diagonal = matrix(size, dtype=dtype)
    rows = torch.randn(7, size, dtype=dtype)
    found = implementation(s.clone(), diagonal)
    assert (found.failed_minor, found.size, found.dtype) == (0, size, dtype) and 0 < found.smallest_pivot <= 1
    assert found.backend == ("native" if implementation is cholesky and dtype == torch.float32 else "torch")
    result = found.solve_rows(rows)
    expected = exact(s, diagonal, rows)
    limit = 1e-9 if dtype == torch.float64 else 2e-5 / found.smallest_pivot
    assert result.dtype == dtype and (result - expected).norm() <= limit * expected.norm()
    assert torch.equal(found.solve_rows(rows), result), "the factor is kept"
    wide = torch.zeros(7, size + 3, dtype=dtype)
    wide[:, :size] = rows
    torch.testing.assert_close(found.solve_rows(wide[:, :size]), result, rtol=1e-6, atol=0)
    assert found.solve_rows(rows[:0]).shape == (0, size)


def test_native_and_torch_agree_on_pivots():
    s, diagonal = matrix(150)
    ours, theirs = cholesky(s, diagonal), reference_cholesky(s.clone(), diagonal)
    assert ours.smallest_pivot == pytest.approx(theirs.smallest_pivot, rel=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_lower_triangle_counts(implementation):
    s, diagonal = matrix(60)
    lower = s.tril(-1) + torch.diag(torch.full((60,), -7.0))
    rows = torch.randn(3, 60)
    expected = implementation(s.clone(), diagonal).solve_rows(rows)
    assert torch.equal(implementation(lower, diagonal).solve_rows(rows), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_failures_are_in_the_result(implementation):
    s, diagonal = matrix(65)

    def minor(i, j, value):
        changed, own = s.clone(), diagonal.clone()
        if i == j:
            own[i] = value
        else:
            changed[i, j] = value
        return implementation(changed, own).failed_minor

    assert minor(60, 7, torch.nan) == minor(60, 7, torch.inf) == -1
    assert minor(33, 33, torch.nan) == minor(33, 33, torch.inf) == -1
    assert minor(49, 49, -1.0) == 50 and minor(12, 12, 0.0) == 13
    failed = implementation(torch.zeros(3, 3), torch.zeros(3, dtype=torch.float64))
    assert failed.failed_minor == 1
    with pytest.raises(ValueError, match="not factored: leading minor 1"):
        failed.solve_rows(torch.zeros(1, 3))
    assert implementation(torch.zeros(0, 0), torch.zeros(0, dtype=torch.float64)).failed_minor == 0


def test_the_thread_count_changes_no_bit():
    s, diagonal = matrix(300)
    rows, threads = torch.randn(20, 300), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(cholesky(s, diagonal).solve_rows(rows))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_factor_takes_half_a_square():
    assert 4096**2 / 2 < _C.cpu.cholesky_factor_size(4096) < 1.05 * 4096**2 / 2


def test_wrong_arguments():
    s, diagonal = matrix(6)
    for arguments, error, message in (
        ((s[:, :4], diagonal), ValueError, r"s: expected shape \[4, 4\] a square"),
        ((s.half(), diagonal), TypeError, "s: expected .* of dtype float32, float64"),
        ((s, diagonal[:3]), ValueError, r"diagonal: expected shape \[6\] for s"),
        ((s, diagonal.float()), TypeError, "diagonal: expected .* of dtype float64"),
        ((s[0], diagonal), ValueError, "s: expected shape"),
    ):
        with pytest.raises(error, match=message):
            cholesky(*arguments)
    found = cholesky(s, diagonal)
    with pytest.raises(ValueError, match=r"rows: expected shape \[2, 6\] for this factor"):
        found.solve_rows(torch.zeros(2, 5))
    with pytest.raises(TypeError, match="rows: expected a tensor"):
        found.solve_rows([1.0] * 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu(dtype):
    s, diagonal = (tensor.cuda() for tensor in matrix(200, dtype=dtype))
    rows = torch.randn(7, 200, dtype=dtype, device="cuda")
    found = cholesky(s.clone(), diagonal)
    expected = exact(s, diagonal, rows)
    assert found.backend == "torch" and found.failed_minor == 0
    assert (found.solve_rows(rows) - expected).norm() <= 2e-5 / found.smallest_pivot * expected.norm()
