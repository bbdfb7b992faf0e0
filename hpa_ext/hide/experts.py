"""An expert: what one task's adapter does to the linears of the decoder, and the projector that belongs to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hpa_ext.errors import NumericalError
from hpa_ext.hide.structure import output_head_name, projector_name
from hpa_ext.models.linears import find_linears
from hpa_ext.models.structure import in_module, unwrap


@dataclass(frozen=True, eq=False)
class ExpertUpdate:
    """``E(h) = scaling * B A h``, the change that an expert makes to one linear ``[out, in]``.

    Attributes:
        a: ``[r, in]``.
        b: ``[out, r]``.
        scaling: LoRA's alpha / rank.
        gain_change: float32 ``[in]`` or None: the expert of a harmonized adapter also adds
            ``W diag(gain_change)``, with gain_change = -c (1 - m) (HPA's orthogonal adjustment).
    """

    a: Tensor
    b: Tensor
    scaling: float
    gain_change: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def parameter_count(self) -> int:
        """Numbers in A and B."""
        return self.a.numel() + self.b.numel()


@dataclass(frozen=True, eq=False)
class Expert:
    """The expert of one task.

    Attributes:
        task: its name.
        updates: by the linear's name in the plain transformers model.
        projector: the task's projector, ``{parameter name in the plain model: tensor}``; empty if it has none.
    """

    task: str
    updates: Mapping[str, ExpertUpdate]
    projector: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def parameter_count(self) -> int:
        """Numbers in all A and B, without the projector."""
        return sum(update.parameter_count for update in self.updates.values())


def check_expert(expert: Expert, model: nn.Module) -> None:
    """Refuse what does not fit the model, before anything is changed.

    Raises:
        ValueError: an update of a module that is no linear of the decoder (or the output head), a wrong shape or dtype,
            a scaling that is not finite, a replaced parameter that is not of the projector, or an expert with no update
            at all. Named.
        NumericalError: NaN or Inf.
    """
    plain = unwrap(model)
    linears = find_linears(plain, expert_modules(plain))
    if not expert.updates:
        raise ValueError(f"adapter of task {expert.task!r}: expected LoRA updates, got none")
    for name, update in expert.updates.items():
        where = f"adapter of task {expert.task!r}: {name}"
        if name not in linears:
            raise ValueError(
                f"{where}: expected linears of the language model's decoder, such as {next(iter(linears))}, got this"
            )
        layer = linears[name].base
        if name == output_head_name(plain) and _is_tied(plain, layer):
            raise ValueError(f"{where}: expected a weight of its own, got one tied to the input embedding")
        out_features, in_features = _features(layer, linears[name].is_transposed)
        if tuple(update.a.shape) != (update.a.shape[0], in_features) or update.a.shape[0] < 1:
            raise ValueError(f"{where}: A: expected [rank, {in_features}], got {list(update.a.shape)}")
        if tuple(update.b.shape) != (out_features, update.rank):
            raise ValueError(f"{where}: B: expected [{out_features}, {update.rank}], got {list(update.b.shape)}")
        if update.gain_change is not None and tuple(update.gain_change.shape) != (in_features,):
            raise ValueError(f"{where}: gain_change: expected [{in_features}], got {list(update.gain_change.shape)}")
        if not math.isfinite(update.scaling):
            raise ValueError(f"{where}: scaling: expected a finite number, got {update.scaling}")
        for part, tensor in (("A", update.a), ("B", update.b), ("gain_change", update.gain_change)):
            if tensor is not None and not tensor.is_floating_point():
                raise ValueError(f"{where}: {part}: expected floats, got {tensor.dtype}")
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise NumericalError(f"{part} of task {expert.task!r} holds NaN or Inf", module=name)
    _check_projector(expert, plain)


def expert_modules(model: nn.Module) -> list[str]:
    """Names of the linears that experts may change: those of the decoder, and the output head."""
    names = list(find_linears(model))
    head = output_head_name(model)
    return [*names, head] if head is not None and head not in names else names


def updates_of(experts: Sequence[Expert], module: str) -> list[tuple[Expert, ExpertUpdate]]:
    """The experts that change a module, in order, each with its update."""
    return [(expert, expert.updates[module]) for expert in experts if module in expert.updates]


def stack(experts: Sequence[Expert], module: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[float]]:
    """The experts of one module side by side, as ``ops.routed_lora`` takes them.

    Returns:
        a ``[tasks, r, in]``, b ``[tasks, out, r]`` in `dtype`, and the scaling of each task. Ranks that differ are
        filled with zeros up to the largest, and so is an expert without an update here: exact.

    Raises:
        ValueError: no expert changes this module.
    """
    present = updates_of(experts, module)
    if not present:
        raise ValueError(f"{module}: expected an expert with an update here, got none")
    first = present[0][1]
    rank = max(update.rank for _, update in present)
    a = torch.zeros(len(experts), rank, first.a.shape[1], dtype=dtype)
    b = torch.zeros(len(experts), first.b.shape[0], rank, dtype=dtype)
    scaling = [0.0] * len(experts)
    for number, expert in enumerate(experts):
        update = expert.updates.get(module)
        if update is not None:
            a[number, : update.rank] = update.a
            b[number, :, : update.rank] = update.b
            scaling[number] = float(update.scaling)
    return a, b, scaling


def _features(layer: nn.Module, transposed: bool) -> tuple[int, int]:
    """``(out, in)``; asked of the layer, because a quantised weight is packed."""
    if hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    rows, columns = layer.weight.shape
    return (columns, rows) if transposed else (rows, columns)


def _is_tied(model: nn.Module, head: nn.Module) -> bool:
    return getattr(model.get_input_embeddings(), "weight", None) is head.weight


def _check_projector(expert: Expert, model: nn.Module) -> None:
    if not expert.projector:
        return
    parent = projector_name(model)
    parameters = dict(model.named_parameters())
    for name, tensor in expert.projector.items():
        where = f"adapter of task {expert.task!r}: {name}"
        if parent is None or not in_module(name, parent):
            raise ValueError(f"{where}: expected parameters of the projector ({parent}) alone to be replaced, got this")
        if name not in parameters:
            raise ValueError(f"{where}: expected a parameter of the model, got none of this name")
        if tensor.shape != parameters[name].shape or not tensor.is_floating_point():
            raise ValueError(
                f"{where}: expected floats {list(parameters[name].shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise NumericalError(f"the projector of task {expert.task!r} holds NaN or Inf", module=name)
    whole = {name for name in parameters if in_module(name, parent)}
    missing = sorted(whole - set(expert.projector))
    if missing:
        raise ValueError(f"adapter of task {expert.task!r}: its projector lacks {missing[0]}")
