"""Errors that the numbers cause; what the caller passed wrongly raises ValueError or TypeError instead."""

from __future__ import annotations


class NumericalError(ArithmeticError):
    """A computation failed because of the values in it.

    Attributes:
        module: name of the layer concerned, None when the operation was called on bare tensors.
        failing_minor: for a factorisation, the leading minor that was not positive; -1 for NaN or Inf; else None.
        damping: the relative damping in force when it failed, else None.
    """

    def __init__(
        self,
        message: str,
        *,
        module: str | None = None,
        failing_minor: int | None = None,
        damping: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.module = module
        self.failing_minor = failing_minor
        self.damping = damping

    def __str__(self) -> str:
        return f"{self.module}: {self.message}" if self.module else self.message

    def in_module(self, name: str | None) -> NumericalError:
        """The same error, with the name of the layer in which it happened."""
        return NumericalError(self.message, module=name, failing_minor=self.failing_minor, damping=self.damping)
