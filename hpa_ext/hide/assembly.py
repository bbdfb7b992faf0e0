"""Putting experts into a model and taking them out again: the only place that changes the base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpa_ext.hide.config import HiDeConfig
from hpa_ext.hide.experts import Expert, ExpertUpdate, stack
from hpa_ext.hide.fusion import FusedUpdate, fuse, fuse_into, fuse_projectors, require_finite
from hpa_ext.hide.layers import FusedAdapterLinear, RoutedLinear, RoutedProjector
from hpa_ext.hide.routing_state import RoutingState
from hpa_ext.hide.structure import layer_number, projector_name, replace_module
from hpa_ext.models.linears import find_linears

# What can be added to. Float8 cannot: such a weight has a scale beside it, as other quantised ones have.
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Reads a base weight by parameter name, as `hpa_ext.checkpoints.CheckpointWeights.tensor` does.
BaseWeights = Callable[[str], Tensor]


@dataclass(frozen=True)
class Assignment:
    """What becomes of one linear: ``kind`` "fused" (updates with their coefficients) or "routed" (all experts)."""

    kind: str
    updates: tuple[ExpertUpdate, ...] = ()
    coefficients: tuple[float, ...] = ()
    fusion: str = "delta"


def assign(
    model: nn.Module, modules: Sequence[str], experts: Sequence[Expert], config: HiDeConfig
) -> dict[str, Assignment]:
    """The `Assignment` of every linear that an expert changes and that has a role, by name.

    Raises:
        ValueError: ``fusion="factors"`` and experts of unequal rank.
    """
    result = {}
    for name in modules:
        present = [expert for expert in experts if name in expert.updates]
        role = config.role(*layer_number(model, name))
        if not present or role == "none":
            continue
        if role == "routed":
            result[name] = Assignment("routed")
        else:
            ranks = sorted({expert.updates[name].rank for expert in present})
            if config.fusion == "factors" and len(ranks) > 1:
                raise ValueError(
                    f"fusion: expected experts of equal rank for 'factors', got {', '.join(map(str, ranks))} in {name}"
                )
            result[name] = Assignment(
                "fused",
                tuple(expert.updates[name] for expert in present),
                tuple(config.coefficient(expert.task) for expert in present),
                config.fusion,
            )
    return result


def merged_assignments(assignments: Mapping[str, Assignment], expert: Expert | None) -> dict[str, Assignment]:
    """What is left when every routed linear takes in this one expert, with weight 1, or nothing."""
    merged = {}
    for name, found in assignments.items():
        if found.kind == "fused":
            merged[name] = found
        elif expert is not None and name in expert.updates:
            merged[name] = Assignment("fused", (expert.updates[name],), (1.0,))
    return merged


def merged_projector(experts: Sequence[Expert], config: HiDeConfig, expert: Expert | None) -> tuple[list[Expert], str]:
    """Whose projectors act, and how, where every routed part takes in this one expert, or nothing."""
    if config.projector == "routed":
        return ([] if expert is None else [expert]), "last"
    return list(experts), config.projector


class Assembly:
    """A base model and what was done to it.

    Args:
        model: the plain base model; changed in place.
        state: where the layers that route find their weights.
        expert_dtype: of routed experts and fused adapters; None for that of each weight (of the model where a weight
            is quantised).
        base_weights: reads a base weight again when it is needed. None: fused weights are kept as they were, on the
            CPU, which costs as much memory as they take.

    Raises:
        TypeError: expert_dtype is no floating-point dtype that can be computed in.
    """

    def __init__(
        self,
        model: nn.Module,
        state: RoutingState,
        expert_dtype: torch.dtype | None = None,
        base_weights: BaseWeights | None = None,
    ) -> None:
        if expert_dtype is not None and expert_dtype not in PLAIN_DTYPES:
            raise TypeError(f"expert_dtype: expected one of {', '.join(map(str, PLAIN_DTYPES))}, got {expert_dtype!r}")
        self.model, self.state, self.expert_dtype = model, state, expert_dtype
        self._linears = {name: linear for name, linear in find_linears(model, ".*").items()}
        self._base_weights = base_weights
        self._kept: dict[str, Tensor] = {}
        self._fused: dict[str, Assignment] = {}
        self._wrapped: set[str] = set()
        self.projector_name = projector_name(model)
        self._projector = None if self.projector_name is None else model.get_submodule(self.projector_name)
        self._base_projector = (
            {}
            if self._projector is None
            else {name: value.detach().clone() for name, value in self._projector.named_parameters()}
        )

    def build(
        self, experts: Sequence[Expert], assignments: Mapping[str, Assignment], config: HiDeConfig, projector: str
    ) -> None:
        """Bring the model into this state, from whatever state it is in.

        A linear whose fused experts did not change is left alone. ValueError, before anything is changed, for what
        cannot be done: merging into a quantised weight, or a weight that is not loaded. NumericalError, with the
        module, for experts that leave the range of the dtype.
        """
        for name in assignments:
            if self._linears[name].base.weight.device.type == "meta":
                raise ValueError(f"{name}: expected a weight that is loaded, got one on the device meta")
        fused = {name: found for name, found in assignments.items() if found.kind == "fused"}
        merged = {name: self._is_merged(name, config) for name in fused}
        for name in [*self._wrapped]:
            self._unwrap(name)
        for name in [*self._fused]:
            if name not in fused or not merged[name]:
                self._restore(name)
        for name, found in fused.items():
            if merged[name] and self._fused.get(name) == found:
                continue
            update = fuse(found.updates, found.coefficients, found.fusion)
            if merged[name]:
                weight = fuse_into(self._base(name), update)
                require_finite(name, [weight], "fused weights")
                self._merge(name, found, weight)
            else:
                self._wrap(name, self._adapter(name, update))
        for name, found in assignments.items():
            if found.kind == "routed":
                self._wrap(name, self._routed(name, experts))
        self._build_projector(experts, config, projector)

    def restore(self) -> None:
        """The base model again, bit for bit."""
        for name in [*self._wrapped]:
            self._unwrap(name)
        for name in [*self._fused]:
            self._restore(name)
        self._place_projector(self._base_projector)

    def routed_layers(self) -> dict[str, RoutedLinear]:
        """The layers that route, by the name of the linear in each."""
        found = {name: self.model.get_submodule(name) for name in self._linears if name in self._wrapped}
        return {name: module for name, module in found.items() if isinstance(module, RoutedLinear)}

    def base_linear(self, name: str) -> nn.Module:
        """The linear itself, without what was put around it."""
        return self._linears[name].base

    def base_weight(self, name: str) -> Tensor:
        """The weight ``[out, in]`` of the base model, whatever is fused into it now."""
        return self._base(name)

    def is_quantised(self, name: str) -> bool:
        """Whether nothing can be added to the weight of this linear."""
        return self._linears[name].base.weight.dtype not in PLAIN_DTYPES

    @property
    def routes(self) -> bool:
        """Whether any part of the model needs routing weights."""
        projector = None if self.projector_name is None else self.model.get_submodule(self.projector_name)
        return bool(self.routed_layers()) or isinstance(projector, RoutedProjector)

    def _is_merged(self, name: str, config: HiDeConfig) -> bool:
        if config.fused_form == "merged" and self.is_quantised(name):
            raise ValueError(
                f"fused_form: 'merged' expected plain weights, got {name} quantised "
                f"({self._linears[name].base.weight.dtype}); use 'adapter' or 'auto'"
            )
        return config.fused_form == "merged" or (config.fused_form == "auto" and not self.is_quantised(name))

    def _routed(self, name: str, experts: Sequence[Expert]) -> RoutedLinear:
        a, b, scaling = stack(experts, name, self._dtype(name))
        require_finite(name, [a, b], "routed experts")
        device = self._linears[name].base.weight.device
        gains = None
        changes = [expert.updates[name].gain_change if name in expert.updates else None for expert in experts]
        if any(change is not None for change in changes):
            gains = torch.zeros(len(experts), a.shape[2], dtype=torch.float32)
            for row, change in enumerate(changes):
                if change is not None:
                    gains[row] = change
        return RoutedLinear(self._linears[name].base, a.to(device), b.to(device), scaling, self.state, gains)

    def _dtype(self, name: str) -> torch.dtype:
        if self.expert_dtype is not None:
            return self.expert_dtype
        dtype = self._linears[name].base.weight.dtype
        return dtype if dtype in PLAIN_DTYPES else self.model.dtype

    def _adapter(self, name: str, update: FusedUpdate) -> FusedAdapterLinear:
        base = self._linears[name].base
        adapter = FusedAdapterLinear(base, update, self._dtype(name)).to(base.weight.device)
        require_finite(name, [adapter.a, adapter.b], "fused experts")
        return adapter

    def _base(self, name: str) -> Tensor:
        """The base weight ``[out, in]``; the first time it is what the model holds."""
        linear = self._linears[name]
        if name not in self._fused:
            return linear.base_weight()
        if self._base_weights is None:
            kept = self._kept[name].to(linear.base.weight.device)
        else:
            kept = self._base_weights(f"{name}.weight").to(linear.base.weight.device, linear.base.weight.dtype)
        return kept.mT if linear.is_transposed else kept

    def _merge(self, name: str, assignment: Assignment, weight: Tensor) -> None:
        linear = self._linears[name]
        stored = linear.base.weight.detach()
        if name not in self._fused:
            if self._base_weights is None:
                self._kept[name] = stored.to("cpu", copy=True)
            elif not torch.equal(self._base_weights(f"{name}.weight").to(stored.device, stored.dtype), stored):
                raise ValueError(f"base_weights: expected the weight of {name} as the model holds it, got another")
        self._fused[name] = assignment
        linear.base_weight().copy_(weight)

    def _restore(self, name: str) -> None:
        if name in self._fused:
            self._linears[name].base_weight().copy_(self._base(name))
            del self._fused[name]
            self._kept.pop(name, None)

    def _wrap(self, name: str, module: nn.Module) -> None:
        replace_module(self.model, name, module.train(self.model.training))
        self._wrapped.add(name)

    def _unwrap(self, name: str) -> None:
        replace_module(self.model, name, self._linears[name].module)
        self._wrapped.discard(name)

    def _build_projector(self, experts: Sequence[Expert], config: HiDeConfig, how: str) -> None:
        owners = [expert for expert in experts if expert.projector]
        if self.projector_name is None or not owners:
            self._place_projector(self._base_projector)
            return
        prefix = self.projector_name + "."
        found = [{name.removeprefix(prefix): value for name, value in owner.projector.items()} for owner in owners]
        coefficients = [config.coefficient(owner.task) for owner in owners]
        if how != "routed":
            values = fuse_projectors(self._base_projector, found, coefficients, how)
            require_finite(self.projector_name, list(values.values()), "projectors")
            self._place_projector(values)
            return
        own = {owner.task: values for owner, values in zip(owners, found, strict=True)}
        self._place_projector(self._base_projector)
        copies = []
        for expert in experts:
            projector = copy.deepcopy(self._projector)
            _fill(projector, own.get(expert.task, self._base_projector))
            copies.append(projector)
        replace_module(self.model, self.projector_name, RoutedProjector(copies, self.state))

    def _place_projector(self, values: Mapping[str, Tensor]) -> None:
        if self._projector is not None:
            # While another one is in its place it is not moved along with the model.
            current = next(self.model.get_submodule(self.projector_name).parameters())
            self._projector.to(current.device, current.dtype)
            replace_module(self.model, self.projector_name, self._projector)
            _fill(self._projector, values)


def _fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])
