"""The Gram accumulator: the second moment of a linear layer's input over calibration tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.errors import NumericalError
from hpa_ext.gram_exchange import check_alike, exchange_triangle, initialised
from hpa_ext.gram_rows import KeptRows
from hpa_ext.gram_sum import GramSum
from hpa_ext.models.sharding import local_tokens
from hpa_ext.ops._checks import is_number
from hpa_ext.ops.gram import check_gram
from hpa_ext.ops.inverse_diagonal import RESCUES, check_symmetric

NORMALIZATIONS = ("mean", "sum")


def normalization_factor(normalization: str, token_count: int) -> float:
    """What ``sum x^T x`` is multiplied with to give ``H``: 2/n for "mean", 2 for "sum"; ValueError without tokens."""
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization: expected one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    if token_count == 0:
        raise ValueError("the Gram has counted no tokens: update it with activations first")
    return 2.0 / token_count if normalization == "mean" else 2.0


class Gram:
    """A float32 accumulator of ``sum x^T x`` over the tokens that count, and its count of tokens.

    Args:
        in_features: width of the layer's input.
        device: where the accumulator lives; activations must be there.

    ``H = (2/n) sum x^T x`` of HPA is `matrix()`. The factor makes H the Hessian of the layer's squared output error.

    On the CPU calls of fewer than 64 tokens are added together, so that the sum of 100,000 tokens is within 2e-6 of
    float64 (Frobenius norm) however they are cut into calls. On a device each call is an addition in float32, and one
    token a call costs up to 6e-5.

    On the CPU the tokens of a wide layer are kept as they came while they are few (up to 0.6 of `in_features`, from 512
    features on), because the diagonal of the inverse then costs a fraction of the time. They become the sum, with the
    same bits, as soon as somebody asks for it, or more tokens come.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        if isinstance(in_features, bool) or not isinstance(in_features, int) or in_features < 1:
            raise ValueError(f"in_features: expected an int of at least 1, got {in_features!r}")
        # A tensor to learn the device from: "cuda" stands for the current one.
        device = torch.empty(0, device=device).device
        self._in_features, self._device = in_features, device
        # Either rows are kept, or there is a sum.
        self._rows = KeptRows(in_features) if KeptRows.serve(in_features, device) else None
        self._total = GramSum(self._zeros()) if self._rows is None else None
        # Two counters, because the size of a mask on a device is only known there until somebody asks.
        self._host_tokens = 0
        self._device_tokens: Tensor | None = None
        self._inverse: dict[tuple[float, str, str], ops.InverseDiagonal] = {}

    @property
    def in_features(self) -> int:
        """Width of the layer's input."""
        return self._in_features

    @property
    def device(self) -> torch.device:
        """Where the accumulator lives."""
        return self._device

    def _summed(self) -> GramSum:
        """The sum; from here on rows are no longer kept."""
        if self._total is None:
            total = GramSum(self._zeros())
            self._rows.add_to(total)
            self._total, self._rows = total, None  # not before all are added: memory may run out in between
        return self._total

    @property
    def _sum(self) -> Tensor:
        """``sum x^T x`` of all tokens; from here on rows are no longer kept."""
        return self._summed().total

    def _zeros(self) -> Tensor:
        with torch.inference_mode(False):  # or it could not be added to outside of inference mode
            return torch.zeros((self._in_features, self._in_features), dtype=torch.float32, device=self._device)

    @property
    def token_count(self) -> int:
        """Tokens that counted so far. Synchronises with a device if masks were given there."""
        if self._device_tokens is not None:
            self._host_tokens += int(self._device_tokens)
            self._device_tokens = None
        return self._host_tokens

    def update(self, x: Tensor, token_mask: Tensor | None = None) -> Gram:
        """Add the tokens of x ``[..., in]`` (bfloat16, float16, float32); with a mask ``[...]`` bool, those marked.

        Returns:
            The Gram itself.

        Of a DTensor this process's tokens are added: those of its part where x is sharded over tokens or samples (the
        whole is then `all_reduce_` over the groups of these mesh dimensions), all of them where x is replicated (do not
        reduce over those). A mask for it is a DTensor with the same placements, or that of this process's tokens.

        Raises:
            TypeError, ValueError: x or the mask has a wrong type, shape, dtype or device, or x is a DTensor that is
                sharded over features or partial. The Gram is then unchanged.
            NumericalError: on the CPU, a token that counts holds NaN or Inf, or overflows float32. The Gram is then
                spoilt, and says so whenever it is asked. On a device this is found when the Gram is first used.
        """
        x, token_mask = local_tokens(x, token_mask)
        if not self._keep(x, token_mask):
            self._summed().add_(x, token_mask)
        self._inverse.clear()
        if token_mask is None:
            self._host_tokens += x.numel() // self.in_features
        elif token_mask.device.type == "cpu":
            self._host_tokens += int(token_mask.sum())
        else:
            counted = token_mask.sum()
            self._device_tokens = counted if self._device_tokens is None else self._device_tokens + counted
        if self.device.type == "cpu" and self._total is not None:
            self._check_diagonal(self._total.without_waiting)
        return self

    def _keep(self, x: Tensor, token_mask: Tensor | None) -> bool:
        """Whether the tokens were kept as rows."""
        if self._rows is None:
            return False
        # The checks of the operation that would add them, for which a matrix of the sum's shape without memory will do.
        check_gram(torch.empty((), dtype=torch.float32).expand(self._in_features, self._in_features), x, token_mask)
        return self._rows.add(x, token_mask)

    def is_finite(self) -> Tensor:
        """A bool scalar on the device: no NaN, Inf or overflow so far. Such a value always shows on the diagonal."""
        if self._rows is not None:
            return torch.ones((), dtype=torch.bool)  # others are not kept
        return torch.isfinite(self._sum.diagonal()).all()

    def check_finite(self) -> None:
        """Raise NumericalError if an activation was not finite. Synchronises with a device."""
        if self._rows is None:
            self._check_diagonal(self._sum)

    def _check_diagonal(self, total: Tensor) -> None:
        finite = torch.isfinite(total.diagonal())
        if not bool(finite.all()):
            columns = (~finite).nonzero().flatten().tolist()
            shown = ", ".join(map(str, columns[:5])) + (", ..." if len(columns) > 5 else "")
            raise NumericalError(
                f"activations hold NaN, Inf or values too large for float32 in {len(columns)} of {self.in_features} "
                f"features ({shown})",
                failing_minor=-1,
            )

    def matrix(self, normalization: str = "mean") -> Tensor:
        """``H`` ``[in, in]`` float32: ``2/n sum x^T x`` for "mean", ``2 sum x^T x`` for "sum". A new tensor.

        Raises:
            ValueError: no token was counted, or an unknown normalization.
            NumericalError: an activation was not finite.
        """
        return self._sum * self._factor(normalization)

    def inverse_diagonal(self, damping: float = 0.01, *, normalization: str = "mean") -> Tensor:
        """``diag((H + damping mean(diag H) I)^-1)`` ``[in]`` float32. Computed once and kept until the Gram changes.

        Raises:
            ValueError: no token was counted; damping is negative.
            NumericalError: the factorisation failed even after the rescue (see ``ops.inverse_diagonal``).
        """
        return self.inverse_diagonal_report(damping, normalization=normalization).diagonal.clone()

    def inverse_diagonal_report(
        self, damping: float = 0.01, *, normalization: str = "mean", rescue: str = "damping"
    ) -> ops.InverseDiagonal:
        """As `inverse_diagonal`, with the damping and precision that it took. Its tensors are the kept ones."""
        if not is_number(damping):
            raise ValueError(f"damping: expected a finite number, at least 0, got {damping!r}")
        key = (float(damping), normalization, rescue)
        if key not in self._inverse:  # what is kept was checked then, and is returned without synchronising
            factor = self._factor(normalization)
            # The inverse scales with 1/H, so the sum itself is factored and no normalised copy is made.
            found = self._inverse_from_rows(damping, rescue)
            if found is None:
                found = ops.inverse_diagonal(
                    self._sum, damping, rescue=rescue, assume_symmetric=True, return_report=True
                )
            self._inverse[key] = replace(found, diagonal=found.diagonal / factor)
        return self._inverse[key]

    def _inverse_from_rows(self, damping: float, rescue: str) -> ops.InverseDiagonal | None:
        """None where no rows are kept or they do not suffice; wrong arguments are for the operation to refuse."""
        if self._rows is None or not 0 < damping < math.inf or rescue not in RESCUES:
            return None
        return self._rows.inverse_diagonal(float(damping))

    def dead_columns(self) -> Tensor:
        """Bool ``[in]``: features that were zero for every token."""
        return self._sum.diagonal() == 0 if self._rows is None else self._rows.dead_columns()

    def merge_(self, other: Gram) -> Gram:
        """Add another Gram's tokens: both together are as if one had seen all."""
        if not isinstance(other, Gram):
            raise TypeError(f"other: expected a Gram, got {type(other).__name__}")
        if other.in_features != self.in_features:
            raise ValueError(f"other: expected a Gram of {self.in_features} features, got {other.in_features}")
        if other.device != self.device:
            raise ValueError(f"other: expected a Gram on {self.device}, got one on {other.device}")
        rows, count = other._rows, other.token_count
        if rows is None:
            self._sum.add_(other._sum)
        elif self._rows is None or not self._rows.join(rows):
            rows.add_to(self._summed())
        self._host_tokens += count
        self._inverse.clear()
        return self

    def all_reduce_(self, group: Any = None) -> Gram:
        """Add the Grams of all processes of a torch.distributed group; every process then holds the total.

        One triangle travels, some rows at a time. Every process must call this; a Gram that is not finite on one of
        them is then so, and says so, on all.
        """
        dist = initialised("all_reduce_")
        count = torch.tensor(self.token_count, dtype=torch.int64, device=self.device)
        dist.all_reduce(count, group=group)
        exchange_triangle(self._sum, lambda strip: dist.all_reduce(strip, group=group))
        self._host_tokens = int(count)
        self._inverse.clear()
        return self

    def reduce_(self, owner: int, token_count: int, group: Any = None) -> None:
        """Add the Grams of all processes of a group on the one with the global rank `owner`; others keep their own.

        `token_count` is that of all together.
        """
        dist = initialised("reduce_")
        is_owner = dist.get_rank() == owner
        exchange_triangle(self._sum, lambda strip: dist.reduce(strip, dst=owner, group=group), keep=is_owner)
        if is_owner:
            self._host_tokens, self._device_tokens = token_count, None
            self._inverse.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """``{"sum": [in, in] float32, "token_count": [] int64}``; the sum is not a copy."""
        return {"sum": self._sum, "token_count": torch.tensor(self.token_count, dtype=torch.int64, device="cpu")}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Gram:
        """The Gram that `state_dict` described, on the device of its sum. The sum is copied."""
        if not isinstance(state, dict) or not {"sum", "token_count"} <= set(state):
            keys = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state: expected the keys sum and token_count, got {keys}")
        total = state["sum"]
        if not isinstance(total, Tensor):
            raise TypeError(f"state['sum']: expected float32 [in, in], got {type(total).__name__}")
        if total.dim() != 2 or total.shape[0] != total.shape[1] or total.dtype != torch.float32:
            raise ValueError(f"state['sum']: expected float32 [in, in], got {total.dtype} {list(total.shape)}")
        try:
            count = int(state["token_count"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"state['token_count']: expected an int, got {state['token_count']!r}") from error
        if count < 0:
            raise ValueError(f"state['token_count']: expected at least 0, got {count}")
        gram = cls(total.shape[0], device=total.device)
        gram._sum.copy_(total)
        gram._host_tokens = count
        if bool(gram.is_finite()):  # one that is not says so when it is used
            try:
                check_symmetric(gram._sum[None])
            except ValueError as error:
                raise ValueError(f"state['sum']: {error}") from error
        return gram

    @classmethod
    def of_sum(cls, total: Tensor, token_count: int) -> Gram:
        """The Gram of a sum ``[in, in]`` float32, taken over without a copy and without a look at its values."""
        gram = cls(1, device=total.device)
        gram._in_features = total.shape[0]
        gram._total, gram._rows = GramSum(total), None
        gram._host_tokens = token_count
        return gram

    def _factor(self, normalization: str) -> float:
        factor = normalization_factor(normalization, self.token_count)
        self.check_finite()
        return factor

    def __repr__(self) -> str:
        return f"Gram(in_features={self.in_features}, device={str(self.device)!r}, token_count={self.token_count})"


class GramCollection(dict[str, Gram]):
    """Grams by module name, as `calibrate` returns them. Modules with one input share one Gram object.

    What adds to Grams must therefore go over the distinct ones: adding name by name would count shared ones again.
    """

    def distinct(self) -> dict[str, Gram]:
        """Each Gram once, under the first of its names."""
        first: dict[int, str] = {}
        for name, gram in self.items():
            first.setdefault(id(gram), name)
        return {name: self[name] for name in first.values()}

    def merge_(self, other: GramCollection) -> GramCollection:
        """Add another calibration of the same modules.

        Raises:
            TypeError, ValueError: `other` is no collection, or has other names or shares other inputs;
                nothing is then added.
        """
        if not isinstance(other, GramCollection):
            raise TypeError(f"other: expected a GramCollection, got {type(other).__name__}")
        if list(self) != list(other) or list(self.distinct()) != list(other.distinct()):
            raise ValueError("other: expected Grams of the same modules with the same inputs shared")
        for name, gram in self.distinct().items():
            gram.merge_(other[name])
        return self

    def all_reduce_(self, group: Any = None) -> GramCollection:
        """Add the Grams of all processes of a torch.distributed group, each Gram once.

        Raises:
            ValueError: on every process, if one has other modules, or modules that share inputs otherwise, than the
                first; nothing is then added.
        """
        initialised("all_reduce_")
        check_alike(self, group)
        for gram in self.distinct().values():
            gram.all_reduce_(group)
        return self


class GramPair(NamedTuple):
    """The two Grams of a layer: of the safety set through the old model, of the task set through the new one.

    Each is a `Gram`, a `GramDiagonal`, or a matrix H ``[in, in]`` (float32 or float64), taken as it is.
    """

    safety: Any
    task: Any
