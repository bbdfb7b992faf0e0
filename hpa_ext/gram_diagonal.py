"""What HPA needs of a Gram once all tokens are counted: the diagonal of its inverse, 16,000 times smaller at 7B."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.gram import Gram, normalization_factor


@dataclass(frozen=True)
class GramDiagonal:
    """The diagonal of a damped Gram's inverse, without the Gram. Takes its place wherever a Gram is only read.

    Attributes:
        sum_inverse: ``[in]`` float32, ``diag((S + damping_used mean(diag S) I)^-1)`` with ``S = sum x^T x``.
        dead: bool ``[in]``, features that were zero for every token.
        token_count: tokens that were counted, at least 1.
        damping: the damping that was asked for.
        damping_used, precision_bits: what the factorisation took, see ``ops.inverse_diagonal``.
    """

    sum_inverse: Tensor
    dead: Tensor
    token_count: int
    damping: float
    damping_used: float
    precision_bits: int

    def __post_init__(self) -> None:
        for name, dtype in (("sum_inverse", torch.float32), ("dead", torch.bool)):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype != dtype:
                came = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}: expected {dtype} [in], got {came}")
        if self.sum_inverse.shape != self.dead.shape or len(self.dead) == 0:
            raise ValueError(f"dead: expected [{len(self.sum_inverse)}], at least 1, got {list(self.dead.shape)}")
        if self.token_count < 1:
            raise ValueError(f"token_count: expected at least 1, got {self.token_count!r}")
        if not bool((torch.isfinite(self.sum_inverse) & (self.sum_inverse > 0)).all()):
            raise ValueError("sum_inverse: expected finite positive numbers")

    @classmethod
    def of(cls, gram: Gram, damping: float = 0.01, *, rescue: str = "damping") -> GramDiagonal:
        """Reduce a Gram.

        Raises:
            ValueError: no token was counted; damping is negative.
            NumericalError: an activation was not finite; the factorisation failed even after the rescue.
        """
        found = gram.inverse_diagonal_report(damping, normalization="sum", rescue=rescue)
        return cls(
            sum_inverse=found.diagonal * normalization_factor("sum", gram.token_count),
            dead=gram.dead_columns(),
            token_count=gram.token_count,
            damping=float(damping),
            damping_used=float(found.damping_used),
            precision_bits=int(found.precision_bits),
        )

    @property
    def in_features(self) -> int:
        """Width of the layer's input."""
        return len(self.sum_inverse)

    @property
    def device(self) -> torch.device:
        """Where the diagonal lives."""
        return self.sum_inverse.device

    def to(self, device: torch.device | str) -> GramDiagonal:
        """The same on another device."""
        return GramDiagonal(
            self.sum_inverse.to(device), self.dead.to(device), self.token_count, self.damping, self.damping_used,
            self.precision_bits,
        )  # fmt: skip

    def inverse_diagonal(self, damping: float = 0.01, *, normalization: str = "mean") -> Tensor:
        """As `Gram.inverse_diagonal`; ValueError for another damping than that of the diagonal."""
        return self.inverse_diagonal_report(damping, normalization=normalization).diagonal

    def inverse_diagonal_report(
        self, damping: float = 0.01, *, normalization: str = "mean", rescue: str = "damping"
    ) -> ops.InverseDiagonal:
        """As `Gram.inverse_diagonal_report`.

        Raises:
            ValueError: another damping than the one that the diagonal was computed with, or a rescue that had been
                needed is not allowed by `rescue`.
        """
        if float(damping) != self.damping:
            raise ValueError(
                f"damping: this Gram was reduced to the diagonal of its inverse with damping {self.damping!r}, "
                f"got {damping!r}; reduce it again from the full Gram"
            )
        if (self.damping_used > self.damping and rescue != "damping") or (
            self.precision_bits > 32 and rescue == "none"
        ):
            raise ValueError(
                f"rescue: this Gram was reduced with damping {self.damping_used!r} in {self.precision_bits} bits, "
                f"which rescue={rescue!r} does not allow"
            )
        device = self.device
        return ops.InverseDiagonal(
            self.sum_inverse / normalization_factor(normalization, self.token_count),
            torch.tensor(self.damping_used, dtype=torch.float64, device=device),
            torch.tensor(self.precision_bits, dtype=torch.int32, device=device),
            torch.zeros((), dtype=torch.int32, device=device),
        )

    def dead_columns(self) -> Tensor:
        """Bool ``[in]``: features that were zero for every token."""
        return self.dead

    def __repr__(self) -> str:
        return (
            f"GramDiagonal(in_features={self.in_features}, device={str(self.device)!r}, "
            f"token_count={self.token_count}, damping={self.damping!r})"
        )


# What stands for a Gram where it is only read; a matrix is H ``[in, in]`` as it is.
AnyGram = Gram | GramDiagonal | Tensor
