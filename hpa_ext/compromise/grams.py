"""The Grams of one linear's input as the compromise needs them: whole matrices, checked, with their damping apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram, GramPair
from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.ops._checks import describe
from hpa_ext.ops.inverse_diagonal import check_symmetric

FullGram = Gram | Tensor
Lazy = Callable[[], FullGram]


@dataclass(frozen=True)
class CompromiseGrams:
    """The matrices ``H = 2/n sum x^T x`` ``[in, in]`` of one input, float32 or float64, not damped.

    Attributes:
        task: of the task set through the new model.
        safety: of the safety set through the old model.
        earlier: the sum of those of earlier tasks, None without any.
        dead_columns: how many features were zero for every token of the task and of the safety set.
    """

    task: Tensor
    safety: Tensor
    earlier: Tensor | None
    dead_columns: dict[str, int]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.task.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return self.task.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return self.task.dtype

    def scale(self) -> float:
        """``mean diag(H_t) / mean diag(H_s)``: the strength at which both sides weigh alike."""
        return mean_diagonal(self.task) / mean_diagonal(self.safety)


def read_full_grams(
    gram: GramPair | tuple[FullGram | Lazy, FullGram | Lazy],
    in_features: int,
    device: torch.device,
    *,
    earlier: Sequence[FullGram | Lazy] = (),
    float64: bool = False,
    move: bool = False,
) -> CompromiseGrams:
    """Check the Grams of a linear with so many input features, on this device, and take their matrices.

    Args:
        gram: a `GramPair` or ``(safety, task)``; each a `Gram`, its matrix ``[in, in]``, or a function that returns
            such, so that of files no more than one Gram lies in memory beside the matrices.
        earlier: Grams of the same input on earlier tasks' samples, to be protected too.
        float64: whether to compute in float64 whatever the matrices are.
        move: whether to move the matrices to the device, instead of refusing those that are elsewhere.

    Raises:
        TypeError, ValueError: a Gram has a wrong type, width or device, counted no tokens, or is not symmetric; a
            `GramDiagonal`, which does not hold the matrix.
        NumericalError: a Gram holds NaN or Inf (``failing_minor == -1``), or is zero.
    """
    check_sides(gram, earlier)
    named = {"gram.safety": gram[0], "gram.task": gram[1]} | {f"earlier[{i}]": g for i, g in enumerate(earlier)}
    matrices = {name: _matrix(name, value, in_features, device, move) for name, value in named.items()}
    wide = float64 or any(matrix.dtype == torch.float64 for matrix in matrices.values())
    if wide:
        matrices = {name: matrix.double() for name, matrix in matrices.items()}
    safety, task, *others = matrices.values()
    dead = {"safety": int((safety.diagonal() == 0).sum()), "task": int((task.diagonal() == 0).sum())}
    return CompromiseGrams(
        task=task, safety=safety, earlier=sum(others[1:], others[0]) if others else None, dead_columns=dead
    )


def check_sides(gram: Any, earlier: Any) -> None:
    """Raise TypeError unless these are a pair and a sequence."""
    if not isinstance(gram, tuple) or len(gram) != 2:
        raise TypeError(f"gram: expected a GramPair or a tuple (safety, task), got {type(gram).__name__}")
    if isinstance(earlier, (Gram, Tensor)) or not isinstance(earlier, Sequence):
        raise TypeError(f"earlier: expected a sequence of Grams, got {type(earlier).__name__}")


def check_full_gram(name: str, gram: Any) -> None:
    """Raise TypeError for what is no whole Gram, a `GramDiagonal` by name."""
    if isinstance(gram, GramDiagonal):
        raise TypeError(
            f"{name}: a GramDiagonal holds the diagonal of the inverse alone, and the compromise needs the whole Gram; "
            'calibrate again without reduce="diagonal" (--reduce diagonal)'
        )
    if not isinstance(gram, (Gram, Tensor)):
        raise TypeError(f"{name}: expected a Gram or a matrix [in, in], got {describe(gram)}")


def mean_diagonal(matrix: Tensor) -> float:
    """The mean of a matrix's diagonal, on the host."""
    return float(matrix.diagonal().double().mean())


def _matrix(name: str, gram: Any, in_features: int, device: torch.device, move: bool) -> Tensor:
    """H ``[in, in]`` float32 or float64; finite, symmetric and not zero."""
    gram = gram() if callable(gram) else gram
    check_full_gram(name, gram)
    try:
        matrix = gram.detach() if isinstance(gram, Tensor) else gram.matrix()
    except NumericalError as error:
        raise NumericalError(f"{name}: {error.message}", failing_minor=error.failing_minor) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if matrix.dim() != 2 or tuple(matrix.shape) != (in_features, in_features):
        raise ValueError(f"{name}: expected [{in_features}, {in_features}] for these weights, got {describe(matrix)}")
    if matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {describe(matrix)}")
    if move:
        matrix = matrix.to(device)
    if matrix.device != device:
        raise ValueError(f"{name}: expected device {device} like the weights, got {matrix.device}")
    # Looked for first: a Cholesky factorisation fails in the same way for NaN as for an indefinite matrix.
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError(f"{name}: the matrix holds NaN or Inf", failing_minor=-1)
    if isinstance(gram, Tensor):
        try:
            check_symmetric(matrix[None])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    mean = mean_diagonal(matrix)
    if mean < 0:
        raise NumericalError(f"{name}: expected a Gram of activations, got a matrix with a diagonal of mean {mean:.3g}")
    if mean == 0:
        raise NumericalError(f"{name}: the matrix is zero: no activation reached it")
    return matrix
