"""The two layers that HiDe puts where a linear was: routed experts on top, or a fused adapter beside the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hpa_ext.hide.experts import Expert, ExpertUpdate
from hpa_ext.hide.fusion import FusedUpdate
from hpa_ext.hide.routing_state import RoutingState
from hpa_ext.ops import routed_lora, routed_lora_add_, routed_lora_list
from hpa_ext.ops._backend import is_traced

_LINEAR_FORWARD = nn.Linear.forward


class RoutedLinear(nn.Module):
    """``O = W h + sum_c d_c E_c(h)``, d being the routing weights of the sample (HiDe, equation 5).

    Attributes:
        base: the linear itself, quantised or not.
        a: ``[tasks, r, in]``, b: ``[tasks, out, r]``: parameters, frozen until somebody trains them.
        state: where the routing weights of the current forward are found.
    """

    def __init__(
        self,
        base: nn.Module,
        a: Tensor,
        b: Tensor,
        scaling: Sequence[float],
        state: RoutingState,
        gain_changes: Tensor | None = None,
    ) -> None:
        """``gain_changes`` ``[tasks, in]``: see `ExpertUpdate.gain_change`; None if no expert has one."""
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a, requires_grad=False)
        self.b = nn.Parameter(b, requires_grad=False)
        self.state = state
        # Not buffers: casting the model to bfloat16 must not round them.
        self._scaling = torch.tensor(list(scaling), dtype=torch.float64)
        self._gain_changes = gain_changes
        self._placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor | None]] = {}

    @property
    def scaling(self) -> list[float]:
        """Alpha / rank of each expert."""
        return self._scaling.tolist()

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, in]`` to ``[batch, tokens, out]``."""
        if x.dim() != 3:
            raise ValueError(f"x: expected [batch, tokens, in], by which samples are told apart, got {list(x.shape)}")
        dtype = torch.float64 if self.a.dtype == torch.float64 else torch.float32
        weights = self.state.weights_for(x.shape[0]).to(x.device, dtype)
        scaling, gain_changes = self._on(x.device, dtype)
        base_input = x
        if gain_changes is not None:
            gain = 1 + weights @ gain_changes  # [batch, in]: W diag(g) x = W (g * x)
            base_input = (x.to(dtype) * gain[:, None, :]).to(x.dtype)
        output = self.base(base_input)
        x = x.to(self.a.dtype)
        if output.dtype != self.a.dtype:
            return output + routed_lora(x, self.a, self.b, weights, scaling).to(output.dtype)
        if self._is_ours(output, x):
            return routed_lora_add_(output, x, self.a, self.b, weights, scaling)
        return routed_lora_list(x, [self.a], [self.b], weights, [scaling], onto=[output])[0]

    def _is_ours(self, output: Tensor, x: Tensor) -> bool:
        """Whether the base's output is new memory that nobody else has seen and no gradient needs."""
        base = self.base
        return (
            type(base) is nn.Linear
            and type(output) is Tensor
            # A mode sees every operation, and may keep what it gave: selective checkpointing does.
            and not is_traced(output)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in (output, x, self.a, self.b)))
            # Hooks may keep it; a forward of somebody's own may give anything.
            and not base._forward_hooks
            and not torch.nn.modules.module._global_forward_hooks
            and "forward" not in vars(base)
            and nn.Linear.forward is _LINEAR_FORWARD
        )

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        found = self._placed.get((device, dtype))
        if found is None:
            with torch.inference_mode(False):  # they outlive this forward, and a later one may train
                gains = None if self._gain_changes is None else self._gain_changes.to(device, dtype)
                found = self._scaling.to(device, dtype), gains
            self._placed = {(device, dtype): found}
        return found

    def extra_repr(self) -> str:
        tasks, rank, _ = self.a.shape
        return f"tasks={tasks}, rank={rank}"


def trained_experts(experts: Sequence[Expert], layers: Mapping[str, RoutedLinear]) -> list[Expert]:
    """The experts with what their routed layers hold now, on the CPU."""
    result = []
    for number, expert in enumerate(experts):
        updates = dict(expert.updates)
        for name, layer in layers.items():
            old = updates.get(name)
            if old is not None:
                a = layer.a.detach()[number, : old.rank].to("cpu", copy=True)
                b = layer.b.detach()[number, :, : old.rank].to("cpu", copy=True)
                updates[name] = ExpertUpdate(a, b, old.scaling, old.gain_change)
        result.append(Expert(expert.task, updates, expert.projector))
    return result


class FusedAdapterLinear(nn.Module):
    """``O = W (g * h) + b a h``: fused experts beside a weight that cannot take them in, because it is quantised."""

    def __init__(self, base: nn.Module, update: FusedUpdate, dtype: torch.dtype) -> None:
        """``dtype``: of the two factors."""
        super().__init__()
        self.base = base
        self.a = nn.Parameter(update.a.to(dtype), requires_grad=False)
        self.b = nn.Parameter(update.b.to(dtype), requires_grad=False)
        self._gain = update.gain

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        base_input = x
        if self._gain is not None:
            if self._gain.device != x.device:
                self._gain = self._gain.to(x.device)
            base_input = (x.to(self._gain.dtype) * self._gain).to(x.dtype)
        output = self.base(base_input)
        branch = nn.functional.linear(nn.functional.linear(x.to(self.a.dtype), self.a), self.b)
        return output + branch.to(output.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.a.shape[0]}"


class RoutedProjector(nn.Module):
    """The tasks' projectors side by side, their outputs mixed with the routing weights of the sample of each image."""

    def __init__(self, projectors: Sequence[nn.Module], state: RoutingState) -> None:
        super().__init__()
        self.projectors = nn.ModuleList(projectors)
        self.state = state

    def forward(self, features: Tensor) -> Tensor:
        """``[images, tokens, in]`` to ``[images, tokens, out]``."""
        weights = self.state.weights_of_images(features.shape[0]).to(features.device, torch.float32)
        outputs = torch.stack([projector(features) for projector in self.projectors], dim=1)
        return torch.einsum("nc,nc...->n...", weights, outputs.to(weights.dtype)).to(outputs.dtype)
