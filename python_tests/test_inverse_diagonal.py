"""ops.inverse_diagonal: diag((H + damping mean(diag H) I)^-1), and what is done when the factorisation fails."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from helpers import (
    MATRIX_LAYOUTS,
    GuardedAllocations,
    assert_accurate,
    assert_same_bits,
    integers,
    is_native,
    lay_out,
    refuses,
)

from hpa_ext import NumericalError
from hpa_ext.ops import InverseDiagonal, inverse_diagonal

SIZES = [1, 2, 7, 17, 47, 48, 49, 65, 96, 97, 130, 257]


def gram(size, tokens, *batch, device="cpu", spread=1.0):
    """H of normal activations whose features differ in scale by a factor of up to e^spread either way."""
    x = torch.randn(*batch, tokens, size, dtype=torch.float64) * torch.exp(spread * torch.randn(size).clamp(-1, 1))
    h = (2 / tokens) * (x.mT @ x)
    return ((h + h.mT) / 2).float().to(device)


def damped(h, damping):
    h = h.double()
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
    return h + damping * mean[..., None, None] * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)


def exact_diagonal(h, damping):
    return torch.linalg.inv(damped(h, damping)).diagonal(dim1=-2, dim2=-1)


def diagonal_of_torch(h, damping):
    """What a float32 Cholesky inverse in torch gets, at its worst over some orders of the columns."""
    exact, worst, worst_error = exact_diagonal(h, damping), None, -1.0
    for _ in range(4):
        order = torch.randperm(h.shape[-1], device=h.device)
        factor = torch.linalg.cholesky(damped(h, damping).float()[order][:, order])
        result = torch.empty_like(exact)
        result[order] = torch.cholesky_inverse(factor).diagonal().double()
        error = float(((result - exact) / exact).abs().max())
        if error > worst_error:
            worst, worst_error = result, error
    return worst


def fibonacci(n, device="cpu"):
    """[[F(n), F(n+1)], [F(n+1), F(n+2)]] for odd n, exact in float32, and the diagonal of its inverse.

    The determinant is 1 (Cassini), so the condition number is the square of the trace.
    """
    numbers = [0.0, 1.0]
    while len(numbers) < n + 3:
        numbers.append(numbers[-1] + numbers[-2])
    first, second, third = numbers[n : n + 3]
    h = torch.tensor([[first, second], [second, third]], device=device)
    return h, torch.tensor([third, first], device=device)


def indefinite(size, smallest, device="cpu"):
    """A symmetric matrix of unit mean diagonal whose smallest eigenvalue is about `smallest`, the others positive."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    values = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    values[0] = smallest
    h = (basis * values) @ basis.mT
    return ((h + h.mT) / 2 / h.diagonal().mean()).float().to(device)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", ["few", "many"])
def test_accuracy(device, size, tokens):
    h = gram(size, 8 if tokens == "few" else 4 * size, device=device)
    exact = exact_diagonal(h, 0.01)
    assert_accurate(inverse_diagonal(h, 0.01), exact, diagonal_of_torch(h, 0.01), scale=exact, roundings=8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("damping", [0.0, 0.01, 3.0])
def test_diagonal_matrix(device, size, damping):
    values = torch.exp(torch.randn(size, dtype=torch.float64)).float().to(device)
    result = inverse_diagonal(torch.diag(values), damping)
    expected = 1 / (values.double() + damping * values.double().mean())
    torch.testing.assert_close(result.double(), expected, rtol=5e-7, atol=0)


def test_damping_is_relative_to_the_mean_of_the_diagonal():
    result = inverse_diagonal(torch.diag(torch.tensor([1.0, 2.0, 6.0])), 0.5)  # mean 3, so 1.5 is added
    torch.testing.assert_close(result, 1 / torch.tensor([2.5, 3.5, 7.5]))


def test_default_is_the_damping_of_hpa():
    h = gram(17, 8)
    assert_same_bits(torch.ops.hpa_ext.inverse_diagonal(h)[0], inverse_diagonal(h, 0.01))


def test_true_diagonal_and_not_the_conditional_variance():
    h = gram(65, 200)
    conditional = torch.linalg.cholesky(torch.linalg.inv(damped(h, 0.01)), upper=True).diagonal().square()
    result = inverse_diagonal(h, 0.01).double()
    assert float(((conditional - result) / result).abs().max()) > 0.1


@pytest.mark.parametrize("dead", [[0], [64], [3, 4, 5], list(range(1, 65))])
def test_dead_columns(device, dead):
    h = gram(65, 100, device=device)
    h[dead, :] = 0
    h[:, dead] = 0
    result = inverse_diagonal(h, 0.01)
    torch.testing.assert_close(result.double(), exact_diagonal(h, 0.01), rtol=2e-5, atol=0)
    expected = torch.full((len(dead),), 1 / (0.01 * float(h.diagonal().mean())), device=device)
    torch.testing.assert_close(result[dead], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("exponent", [-80, -40, -3, 5, 40, 80])
def test_scales_inversely_with_h(device, exponent):
    h, scale = gram(65, 40, device=device), 2.0**exponent
    # Odd powers round the square roots differently, and the condition number magnifies that.
    rtol = 1e-6 if exponent % 2 == 0 else 5e-5
    torch.testing.assert_close(inverse_diagonal(h * scale, 0.01) * scale, inverse_diagonal(h, 0.01), rtol=rtol, atol=0)


def test_equivariant_to_the_order_of_the_columns(device):
    h = gram(97, 60, device=device)
    order = torch.randperm(97)
    permuted = inverse_diagonal(h[order][:, order], 0.01)
    torch.testing.assert_close(permuted, inverse_diagonal(h, 0.01)[order], rtol=2e-5, atol=0)


def test_scaling_the_columns_costs_no_accuracy(device):
    """Columns whose scales lie 1e12 apart, which a factorisation without scaling to unit diagonal cannot take."""
    h = gram(65, 300, device=device, spread=0.0)
    factors = torch.logspace(-6, 6, 65, dtype=torch.float64, device=device)
    scaled = (h.double() * factors[:, None] * factors).float()
    torch.testing.assert_close(
        inverse_diagonal(scaled, 0.0).double(), exact_diagonal(h, 0.0) / factors.square(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3)])
@pytest.mark.parametrize("size", [1, 17, 65])
def test_batches_are_independent_matrices(device, batch, size):
    h = gram(size, 8, *batch, device=device)
    report = inverse_diagonal(h, 0.01, return_report=True)
    assert report.diagonal.shape == (*batch, size)
    assert report.damping_used.shape == report.precision_bits.shape == report.failed_minor.shape == batch
    for matrix, diagonal in zip(h.reshape(-1, size, size), report.diagonal.reshape(-1, size), strict=True):
        torch.testing.assert_close(diagonal, inverse_diagonal(matrix, 0.01), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5, 5), (3, 0, 0), (2, 0, 4, 4)])
def test_empty(device, shape):
    report = inverse_diagonal(torch.zeros(shape, device=device), 0.01, return_report=True)
    assert report.diagonal.shape == shape[:-1]
    assert bool((report.failed_minor == 0).all())


@pytest.mark.parametrize("layout", [*MATRIX_LAYOUTS, "batch_last"])
def test_layout(device, layout):
    h = gram(49, 30, 3, device=device)
    view = h.permute(1, 2, 0).contiguous().permute(2, 0, 1) if layout == "batch_last" else lay_out(h, layout)
    torch.testing.assert_close(inverse_diagonal(view, 0.01), inverse_diagonal(h, 0.01), rtol=1e-5, atol=0)


def test_expanded_batch(device):
    h = gram(17, 30, device=device)
    result = inverse_diagonal(h.expand(4, 17, 17), 0.01)
    torch.testing.assert_close(result, inverse_diagonal(h, 0.01).expand(4, 17), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 7, 47, 48, 49, 130])
def test_nothing_outside_an_allocation_is_written(device, size, monkeypatch):
    h = gram(size, 200, 3, device=device)
    expected = exact_diagonal(h, 0.01).float()
    guarded = GuardedAllocations(monkeypatch)
    result = inverse_diagonal(h, 0.01)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=0)
    guarded.check()


def test_h_is_not_changed(device):
    for h in (gram(65, 8, 2, device=device), fibonacci(19, device)[0]):
        before = h.clone()
        inverse_diagonal(h, 0.0 if h.dim() == 2 else 0.01)
        assert_same_bits(h, before)


def test_float64(device):
    h = gram(65, 8, device=device).double()
    report = inverse_diagonal(h, 1e-6, return_report=True)
    assert report.diagonal.dtype == torch.float64
    assert int(report.precision_bits) == 64
    torch.testing.assert_close(report.diagonal, exact_diagonal(h, 1e-6), rtol=1e-8, atol=0)


def test_not_differentiable(device):
    assert not inverse_diagonal(gram(17, 30, device=device).requires_grad_(), 0.01).requires_grad


def test_report_of_an_easy_matrix(device):
    report = inverse_diagonal(gram(17, 60, device=device), 0.01, return_report=True)
    assert isinstance(report, InverseDiagonal)
    assert report.damping_used.dtype == torch.float64
    assert float(report.damping_used) == 0.01
    assert report.precision_bits.dtype == report.failed_minor.dtype == torch.int32
    assert int(report.precision_bits) == 32
    assert int(report.failed_minor) == 0


# ---------------------------------------------------------------------------------------------------- rescue


@pytest.mark.parametrize("rescue", ["damping", "precision"])
def test_rescue_to_float64(device, rescue):
    block, expected = fibonacci(19, device)  # condition number 2.3e8
    h = torch.eye(65, device=device) * 5000
    h[40:42, 40:42] = block
    report = inverse_diagonal(h, 0.0, rescue=rescue, return_report=True)
    torch.testing.assert_close(report.diagonal[40:42], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(report.diagonal[:40], torch.full((40,), 1 / 5000, device=device))
    assert int(report.precision_bits) == 64
    assert float(report.damping_used) == 0.0
    assert int(report.failed_minor) == 0


def test_dense_matrix_that_needs_float64(device):
    h = gram(65, 8, device=device, spread=0.0)
    report = inverse_diagonal(h, 1e-5, return_report=True)
    assert int(report.precision_bits) == 64
    torch.testing.assert_close(report.diagonal.double(), exact_diagonal(h, 1e-5), rtol=1e-6, atol=0)


def test_what_only_float64_can_factor(device):
    """Pivots of 5e-10, which rounding to float32 loses, in enough blocks that none could survive by luck."""
    block, expected = fibonacci(23, device)
    factors = [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    h = torch.block_diag(*(factor * block for factor in factors))
    report = inverse_diagonal(h, 0.0, rescue="precision", return_report=True)
    assert int(report.precision_bits) == 64
    assert float(report.damping_used) == 0.0
    torch.testing.assert_close(report.diagonal, torch.cat([expected / factor for factor in factors]), rtol=1e-5, atol=0)
    with pytest.raises(NumericalError, match="not positive definite") as caught:
        inverse_diagonal(h, 0.0, rescue="none")
    assert caught.value.failing_minor % 2 == 0
    assert caught.value.failing_minor > 0
    assert caught.value.damping == 0.0


def test_a_weak_matrix_without_rescue_stays_in_float32(device):
    h, expected = fibonacci(11, device)
    report = inverse_diagonal(h, 0.0, rescue="none", return_report=True)
    assert int(report.precision_bits) == 32
    assert int(report.failed_minor) == 0
    torch.testing.assert_close(report.diagonal, expected, rtol=0.02, atol=0)
    better = inverse_diagonal(h, 0.0, rescue="precision", return_report=True)
    assert int(better.precision_bits) == 64
    torch.testing.assert_close(better.diagonal, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("smallest", "damping", "used"),
    [(-0.02, 0.01, 0.1), (-0.5, 0.01, 1.0), (-5e-3, 0.0, 0.01), (-5e-5, 0.0, 1e-4), (-0.02, 0.003, 0.03)],
)
def test_more_damping_for_a_slightly_indefinite_matrix(device, smallest, damping, used):
    h = indefinite(65, smallest, device)
    report = inverse_diagonal(h, damping, return_report=True)
    assert math.isclose(float(report.damping_used), used, rel_tol=1e-12)
    assert int(report.precision_bits) == 64
    assert int(report.failed_minor) == 0
    torch.testing.assert_close(report.diagonal.double(), exact_diagonal(h, used), rtol=2e-4, atol=0)


@pytest.mark.parametrize("rescue", ["none", "precision"])
def test_forbidden_rescue_raises(device, rescue):
    h = torch.eye(65, device=device)
    h[30, 31] = h[31, 30] = 1.1  # the leading minor of order 32 is the first that is negative
    with pytest.raises(NumericalError, match=f"the matrix is not positive definite.*32.*0.01.*{rescue}") as caught:
        inverse_diagonal(h, 0.01, rescue=rescue)
    assert caught.value.failing_minor == 32
    assert caught.value.damping == 0.01
    assert caught.value.module is None


def test_raises_when_the_most_damping_does_not_suffice(device):
    h = torch.eye(65, device=device)
    h[30, 31] = h[31, 30] = 5.0
    with pytest.raises(NumericalError, match="not positive definite") as caught:
        inverse_diagonal(h, 0.01)
    assert caught.value.failing_minor == 32
    assert caught.value.damping == 1.0


def test_a_negative_diagonal_is_not_positive_definite(device):
    h = torch.eye(17, device=device)
    h[4, 4] = -30.0
    with pytest.raises(NumericalError) as caught:
        inverse_diagonal(h, 0.01, rescue="none")
    assert caught.value.failing_minor is not None
    assert caught.value.failing_minor > 0


@pytest.mark.parametrize("rescue", ["damping", "precision", "none"])
def test_zero_matrix(device, rescue):
    with pytest.raises(NumericalError, match="the matrix is zero"):
        inverse_diagonal(torch.zeros(17, 17, device=device), 0.01, rescue=rescue)


def test_one_failing_member_of_a_batch(device):
    h = gram(17, 60, 4, device=device)
    h[2] = indefinite(17, -3.0, device)
    with pytest.raises(NumericalError, match="matrix 2 of the batch is not positive definite"):
        inverse_diagonal(h, 0.01)
    unchecked = inverse_diagonal(h, 0.01, check=False, return_report=True)
    assert unchecked.failed_minor.gt(0).tolist() == [False, False, True, False]
    assert bool(unchecked.diagonal[2].isnan().all())
    for index in (0, 1, 3):
        torch.testing.assert_close(unchecked.diagonal[index], inverse_diagonal(h[index], 0.01), rtol=1e-6, atol=0)


def test_rescue_of_one_member_leaves_the_others(device):
    h = gram(65, 200, 3, device=device)
    h[1] = indefinite(65, -0.02, device)
    before = inverse_diagonal(h[[0, 2]], 0.01)
    report = inverse_diagonal(h, 0.01, return_report=True)
    torch.testing.assert_close(report.diagonal[[0, 2]], before, rtol=1e-6, atol=0)
    assert report.precision_bits.tolist() == [32, 64, 32]
    assert [round(used, 6) for used in report.damping_used.tolist()] == [0.01, 0.1, 0.01]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("places", [[(3, 3)], [(60, 3), (3, 60)]])
@pytest.mark.parametrize("rescue", ["damping", "none"])
def test_values_that_are_not_finite_are_told_from_an_indefinite_matrix(device, value, places, rescue):
    h = gram(65, 100, 2, device=device)
    for row, column in places:
        h[1, row, column] = value
    with pytest.raises(NumericalError, match=r"matrices \[1\] of the batch hold NaN or Inf") as caught:
        inverse_diagonal(h, 0.01, rescue=rescue)
    assert caught.value.failing_minor == -1
    unchecked = inverse_diagonal(h, 0.01, check=False, return_report=True)
    assert unchecked.failed_minor.tolist() == [0, -1]
    assert bool(unchecked.diagonal[1].isnan().all())
    assert bool(torch.isfinite(unchecked.diagonal[0]).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(3, 60), (60, 3)])
def test_values_that_are_not_finite_in_one_triangle_do_not_pass(device, value, place):
    h = gram(65, 100, device=device)
    h[place] = value
    with pytest.raises((NumericalError, ValueError)):
        inverse_diagonal(h, 0.01)


def test_unchecked_failure_is_not_raised(device):
    for h in (-torch.eye(17, device=device), torch.zeros(17, 17, device=device)):
        report = inverse_diagonal(h, 0.01, check=False, return_report=True)
        assert bool(report.diagonal.isnan().all())
        assert int(report.failed_minor) > 0
        assert int(report.precision_bits) == 32
        assert float(report.damping_used) == 0.01


def test_unchecked_success(device):
    h = gram(65, 200, device=device)
    assert_same_bits(inverse_diagonal(h, 0.01, check=False), inverse_diagonal(h, 0.01))


# -------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("place", [(0, 599), (599, 0), (300, 299), (550, 10)])
def test_asymmetric(device, place):
    h = torch.eye(600, device=device)
    h[place] = 0.01
    with pytest.raises(ValueError, match=r"h: expected symmetric matrices, .* differ by up to 0.01 in rows \d+ to \d+"):
        inverse_diagonal(h, 0.01)


def test_rounding_is_not_asymmetry(device):
    h = gram(65, 30, device=device)
    h = h * (1 + 1e-5 * torch.rand(65, 65).to(device))
    inverse_diagonal(h, 0.01)


def test_asymmetry_is_judged_by_the_scale_of_the_columns(device):
    h = torch.diag(torch.tensor([1e6, 1e6, 1e-6, 1e-6], device=device))
    h[0, 1] = 1.0  # 1e-6 of its columns' scale
    inverse_diagonal(h, 0.0)
    h[3, 2] = 1e-7  # a tenth of its columns' scale
    with pytest.raises(ValueError, match="h: expected symmetric"):
        inverse_diagonal(h, 0.0)


BAD = {
    "h is a list": ({"h": [[1.0]]}, TypeError, "h"),
    "h is None": ({"h": None}, TypeError, "h"),
    "h is an array": ({"h": numpy.eye(3, dtype="float32")}, TypeError, "h"),
    "h is bfloat16": ({"h": torch.eye(3, dtype=torch.bfloat16)}, TypeError, "h"),
    "h is float16": ({"h": torch.eye(3, dtype=torch.float16)}, TypeError, "h"),
    "h is of integers": ({"h": torch.eye(3, dtype=torch.int64)}, TypeError, "h"),
    "h is sparse": ({"h": torch.eye(3).to_sparse()}, TypeError, "h"),
    "h is a scalar": ({"h": torch.ones(())}, ValueError, "h"),
    "h is a vector": ({"h": torch.ones(3)}, ValueError, "h"),
    "h is not square": ({"h": torch.ones(3, 4)}, ValueError, "h"),
    "h is a batch of rectangles": ({"h": torch.ones(3, 3, 4)}, ValueError, "h"),
    "damping is negative": ({"damping": -0.01}, ValueError, "damping"),
    "damping is NaN": ({"damping": math.nan}, ValueError, "damping"),
    "damping is infinite": ({"damping": math.inf}, ValueError, "damping"),
    "damping is a string": ({"damping": "0.01"}, ValueError, "damping"),
    "damping is None": ({"damping": None}, ValueError, "damping"),
    "damping is a bool": ({"damping": True}, ValueError, "damping"),
    "damping is a tensor": ({"damping": torch.tensor(0.01)}, ValueError, "damping"),
    "rescue is unknown": ({"rescue": "hope"}, ValueError, "rescue"),
    "rescue is None": ({"rescue": None}, ValueError, "rescue"),
    "rescue is a bool": ({"rescue": True}, ValueError, "rescue"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    changed, exception, name = BAD[bad]
    with refuses(exception, name):
        inverse_diagonal(**{"h": torch.eye(3), "damping": 0.01, **changed})


def test_an_integer_damping_is_a_number(device):
    torch.testing.assert_close(inverse_diagonal(torch.eye(3, device=device), 1), torch.full((3,), 0.5, device=device))


def test_float64_attempts_of_the_native_kernel_are_exact(device):
    """Integers with an integer inverse: L^-1 of a unit lower triangular L, in float64 throughout."""
    if not is_native("inverse_diagonal", device):
        pytest.skip("the native kernel does not serve this device")
    lower = torch.tril(integers(130, 130, dtype=torch.float64).sign() * (torch.rand(130, 130) < 0.02), -1)
    lower = lower + torch.eye(130, dtype=torch.float64)
    h = lower @ lower.mT
    expected = torch.linalg.inv(h).diagonal()
    report = inverse_diagonal(h.float().to(device), 0.0, return_report=True)
    assert torch.equal(h.float().double(), h)
    torch.testing.assert_close(report.diagonal.double().cpu(), expected, rtol=1e-4, atol=0)


def test_symmetry_may_be_taken_on_trust(device):
    h = (torch.eye(5) * 2).to(device)
    h[0, 4] = 1.0  # above the diagonal, which is not read
    torch.testing.assert_close(inverse_diagonal(h, 0.0, assume_symmetric=True), torch.full((5,), 0.5, device=device))
    with pytest.raises(ValueError, match="h: expected symmetric"):
        inverse_diagonal(h, 0.0)
