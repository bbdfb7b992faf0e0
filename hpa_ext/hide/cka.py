"""Linear CKA: how alike two sets of features of the same samples are (Kornblith et al., ICML 2019)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hpa_ext.errors import NumericalError


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """``||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` of the centred features of n samples.

    Args:
        x: ``[n, p]``, y: ``[n, q]``, any float dtype, row i of both of the same sample; n at least 2.

    Returns:
        A scalar float64 in [0, 1] (HiDe, appendix B). Computed in float64, by way of ``[n, n]`` or ``[p, q]``,
        whichever is smaller.

    Raises:
        TypeError, ValueError: not two matrices of equally many rows.
        NumericalError: NaN or Inf, or all rows of one are equal, for which CKA is not defined.

    With fewer samples than features the value is biased upward, towards 1 for unrelated features.
    """
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor [n, features], got {type(value).__name__}")
        if value.dim() != 2 or not value.is_floating_point():
            raise ValueError(f"{name}: expected float [n, features], got {value.dtype} {list(value.shape)}")
    if x.shape[0] != y.shape[0] or x.shape[0] < 2:
        raise ValueError(f"y: expected as many rows as x, at least 2, got {x.shape[0]} and {y.shape[0]}")
    x, y = x.double(), y.double()
    x, y = x - x.mean(0), y - y.mean(0)
    if x.shape[0] <= max(x.shape[1], y.shape[1]):
        kx, ky = x @ x.mT, y @ y.mT
        cross, norm_x, norm_y = (kx * ky).sum(), kx.norm(), ky.norm()
    else:
        cross, norm_x, norm_y = (y.mT @ x).square().sum(), (x.mT @ x).norm(), (y.mT @ y).norm()
    return _ratio(cross, norm_x, norm_y, ("x", "y"))


class StreamingCKA:
    """Linear CKA between views of the same samples, from their second moments: no feature is kept.

    Args:
        names: of the views, at least two.
        dtype: of the moments; float64 agrees with the direct form to rounding.

    The moments of v views of width p take ``v (v + 1) / 2`` matrices ``[p, p]``.
    """

    def __init__(self, names: list[str], dtype: torch.dtype = torch.float64) -> None:
        if len(set(names)) != len(names) or len(names) < 2:
            raise ValueError(f"names: expected at least two different ones, got {names}")
        self.names, self.dtype = list(names), dtype
        self.count = 0
        self._means: dict[str, Tensor] = {}
        self._moments: dict[tuple[str, str], Tensor] = {}

    def update(self, features: Mapping[str, Tensor]) -> StreamingCKA:
        """Add samples: for each view ``[n, width]``, row i of all of them of the same sample.

        Raises:
            ValueError: a view is missing, or numbers of rows or widths differ. Nothing was added then.
        """
        if set(features) != set(self.names):
            raise ValueError(f"features: expected {self.names}, got {sorted(features)}")
        rows = {name: features[name].detach().to(self.dtype) for name in self.names}
        counts = {name: tuple(value.shape) for name, value in rows.items()}
        if any(value.dim() != 2 for value in rows.values()) or len({shape[0] for shape in counts.values()}) != 1:
            raise ValueError(f"features: expected [n, width] with the same n, got {counts}")
        for name, value in rows.items():
            if name in self._means and self._means[name].shape[0] != value.shape[1]:
                raise ValueError(f"features: {name}: expected width {len(self._means[name])}, got {value.shape[1]}")
        added = next(iter(counts.values()))[0]
        if added == 0:
            return self
        means = {name: value.mean(0) for name, value in rows.items()}
        centred = {name: value - means[name] for name, value in rows.items()}
        shift = {name: means[name] - self._means[name] if self.count else means[name] * 0 for name in self.names}
        weight = self.count * added / (self.count + added)
        for i, first in enumerate(self.names):
            for second in self.names[i:]:
                moment = centred[first].mT @ centred[second] + weight * torch.outer(shift[first], shift[second])
                key = (first, second)
                self._moments[key] = self._moments[key] + moment if key in self._moments else moment
        for name in self.names:
            old = self._means.get(name)
            self._means[name] = means[name] if old is None else old + shift[name] * (added / (self.count + added))
        self.count += added
        return self

    def value(self, first: str, second: str) -> Tensor:
        """CKA of two views, a scalar float64; as `linear_cka` of all samples."""
        if self.count < 2:
            raise ValueError(f"cka: expected at least 2 samples, got {self.count}")
        cross = self._moments[(first, second)] if (first, second) in self._moments else self._moments[(second, first)]
        norms = (self._moments[(name, name)].double().norm() for name in (first, second))
        return _ratio(cross.double().square().sum(), *norms, (first, second))

    def matrix(self) -> Tensor:
        """CKA of all pairs, ``[views, views]`` float64 on the CPU, 1 on the diagonal."""
        result = torch.eye(len(self.names), dtype=torch.float64)
        for i, first in enumerate(self.names):
            for j in range(i + 1, len(self.names)):
                result[i, j] = result[j, i] = self.value(first, self.names[j]).cpu()
        return result


def _ratio(cross: Tensor, norm_x: Tensor, norm_y: Tensor, names: tuple[str, str]) -> Tensor:
    for name, norm in zip(names, (norm_x, norm_y), strict=True):
        if not bool(torch.isfinite(norm)):
            raise NumericalError(f"{name}: the features hold NaN or Inf")
        if not bool(norm > 0):
            raise NumericalError(f"{name}: all samples have the same features, for which CKA is not defined")
    return cross / (norm_x * norm_y)
