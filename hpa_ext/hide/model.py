"""HiDe on a model in memory: experts fused below, routed on top."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.hide.anchors import Anchors
from hpa_ext.hide.assembly import (
    Assembly,
    Assignment,
    BaseWeights,
    assign,
    merged_assignments,
    merged_projector,
)
from hpa_ext.hide.checks import check_coefficients, check_config, check_features, check_parts, check_weights
from hpa_ext.hide.config import HiDeConfig
from hpa_ext.hide.expert_sources import read_expert, read_experts
from hpa_ext.hide.experts import Expert, expert_modules
from hpa_ext.hide.features import Features
from hpa_ext.hide.hooks import RoutingHooks
from hpa_ext.hide.layers import trained_experts
from hpa_ext.hide.own_features import own_features
from hpa_ext.hide.prompts import prompt_of
from hpa_ext.hide.router import Router
from hpa_ext.hide.routing_state import RoutingState
from hpa_ext.hide.structure import vision_tower_name, without_weights
from hpa_ext.interrupts import interrupt_held_back
from hpa_ext.models.structure import unwrap


class HiDeModel(nn.Module):
    """A model with the experts of several tasks (HiDe, ACL 2025).

    Below, experts are fused into the weights (no cost at inference); in the top layers they stay apart and are weighted
    for each sample by how close its image and its text are to each task's anchors. The base model is changed in place
    and can be used as before: its own ``forward`` and ``generate`` route as well. `unload` gives it back bit for bit.
    Several threads may run it at once, each with its own prompts, but not while it is changed.

    Args:
        base: a plain transformers model (no PEFT around it), quantised or not.
        adapters: ``{task: adapter}``, or adapters in the order of the anchors' tasks, or a PeftModel whose adapters are
            called like the tasks; each as in `read_expert`.
        anchors: of exactly these tasks; their order is the order of the experts. None if nothing is routed.
        config: settings; None for the paper's.
        features: what prompts and images are routed by; None for the model's own (see `own_features`). Must be what the
            anchors were made of, where these say so.
        expert_dtype: of routed experts; None for the weights' dtype. Training wants float32.
        base_weights: reads a base weight by name when experts are added or removed, instead of keeping a copy of every
            fused weight on the CPU; see `Assembly`.

    Raises:
        TypeError, ValueError: adapters, anchors, config and model do not fit; named. Nothing was changed then.
    """

    def __init__(
        self,
        base: nn.Module,
        adapters: Any,
        anchors: Anchors | None = None,
        config: HiDeConfig | None = None,
        *,
        features: Features | None = None,
        expert_dtype: torch.dtype | None = None,
        base_weights: BaseWeights | None = None,
    ) -> None:
        super().__init__()
        config = HiDeConfig() if config is None else config
        check_config(config)
        if anchors is not None and not isinstance(anchors, Anchors):
            raise TypeError(f"anchors: expected Anchors, got {type(anchors).__name__}")
        if unwrap(base) is not base:
            raise ValueError(f"base: expected a plain transformers model, got {type(base).__name__} around one")
        if isinstance(getattr(getattr(base, "generate", None), "__self__", None), RoutingHooks):
            raise ValueError("base: is part of a HiDeModel already; call its unload() first")
        experts = read_experts(adapters, base, None if anchors is None else anchors.tasks)
        self._linear_names = expert_modules(base)
        check_parts(base, self._linear_names, experts, anchors, config)
        check_coefficients(config, [expert.task for expert in experts])
        self.model = base
        self.config = config
        self.features = own_features(base) if features is None else features
        check_features(anchors, self.features)
        # Names and shapes of the base as it was, to read adapters by after its linears have been replaced.
        self._skeletons = (without_weights(base),)  # in a tuple, or it would become a child of this module
        named = {expert.task: expert for expert in experts}
        self.anchors = None if anchors is None else anchors.select(anchors.tasks)  # a copy
        self._experts = named if anchors is None else {task: named[task] for task in anchors.tasks}
        self._router = Router(self)
        self.state = RoutingState(self._router)
        self._assembly = Assembly(base, self.state, expert_dtype, base_weights)
        self._training_routed = False
        with interrupt_held_back():
            try:
                self._build(self._experts, config)
            except BaseException:
                self._assembly.restore()
                raise
        self._hooks = RoutingHooks(self)

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order of the routing weights."""
        return list(self._experts)

    @property
    def experts(self) -> list[Expert]:
        """The experts, in the order of the tasks; routed ones as they have been trained since, if they were."""
        self._take_in_training()
        return list(self._experts.values())

    @property
    def skeleton(self) -> nn.Module:
        """The base as it was, on the meta device: names and shapes by which adapters are read."""
        return self._skeletons[0]

    @property
    def device(self) -> torch.device:
        """Of the model's first parameter."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's first parameter."""
        return next(self.model.parameters()).dtype

    @property
    def routes(self) -> bool:
        """Whether any part of the model needs routing weights."""
        return self._assembly.routes

    @property
    def routes_by_images(self) -> bool:
        """Whether image features have a part in the weights."""
        return self.features.image is not None and self.config.image_weight > 0

    def parameter_count(self) -> dict[str, int]:
        """Numbers that the experts add, as the paper counts them; see `expert_parameters`."""
        from hpa_ext.hide.parameters import expert_parameters

        return expert_parameters(self.experts, self._assignments(self._experts, self.config))

    def assignments(self) -> dict[str, Assignment]:
        """What becomes of each linear that an expert changes, by name."""
        self._take_in_training()
        return self._assignments(self._experts, self.config)

    # -- running ------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward; prompts are routed as they come, unless `routed` says how."""
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' ``generate``; each prompt is routed once, before its first token, and keeps its weights.

        Beams and several sequences of a prompt share its weights. A prompt that goes on from ``past_key_values`` keeps
        the weights with which that cache was filled.
        """
        return self.model.generate(*args, **kwargs)

    @torch.no_grad()
    def routing(self, **inputs: Any) -> Tensor:
        """The routing weights ``[b, tasks]`` of prompts, in the order of `tasks`.

        Args:
            inputs: as the model takes them: ``input_ids``, ``attention_mask``, ``pixel_values`` (if there are images),
                ``labels`` (if answers are there).
        """
        prompt = prompt_of(self.model, inputs)
        if prompt is None:
            raise ValueError("input_ids: expected token ids to route by, got none")
        pixels = inputs.get("pixel_values")
        images = None
        if pixels is not None and self.routes_by_images:
            tower = self.model.get_submodule(vision_tower_name(self.model))
            parameter = next(tower.parameters())
            images = self.features.image(tower(pixels.to(parameter.device, parameter.dtype)))
        return self._router(prompt, images)

    @contextmanager
    def routed(self, weights: Tensor | str) -> Iterator[HiDeModel]:
        """Within the context these weights hold: ``[b, tasks]``, ``[1, tasks]`` for every row, or one task's name.

        They hold for every thread that runs the model.
        """
        if isinstance(weights, str):
            self._task(weights)
            weights = torch.tensor([[float(task == weights) for task in self.tasks]])
        check_weights(weights, len(self.tasks))
        with self.state.fixed(weights.to(self.device)):
            yield self

    # -- changing -----------------------------------------------------------------------------------------------------

    def add(self, task: str, adapter: Any, anchors: Anchors | None = None, coefficient: float | None = None) -> None:
        """Take in one more task, put last: one merge of its expert's layers. Nothing changes if anything raises.

        Args:
            task: a new name.
            adapter: as in `read_expert`.
            anchors: holding those of the task; others in it are not looked at.
            coefficient: its fusion coefficient; None for that of the settings.
        """
        if task in self._experts:
            raise ValueError(f"task: expected a new one, got {task!r}; remove it first")
        expert = read_expert(task, adapter, self.skeleton)
        self._take_in_training()
        experts = {**self._experts, task: expert}
        together = self.anchors
        if anchors is not None:
            if task not in anchors:
                raise ValueError(f"anchors: expected those of {task!r}, got {', '.join(anchors.tasks) or 'none'}")
            check_features(anchors, self.features)
            together = Anchors(anchors.features) if self.anchors is None else self.anchors.select(self.tasks)
            together.merge_(anchors.select([task]))
        config = self.config
        if coefficient is not None:
            config = config.replace(
                fusion_coefficients={name: config.coefficient(name) for name in experts} | {task: coefficient}
            )
        self._rebuild(experts, together, config)

    def remove(self, task: str) -> None:
        """Take a task out: the model is then, bit for bit, what it would be had the task never come."""
        self._task(task)
        self._take_in_training()
        experts = {name: expert for name, expert in self._experts.items() if name != task}
        together = None if self.anchors is None else self.anchors.select(list(experts))
        config = self.config
        if isinstance(config.fusion_coefficients, Mapping):
            kept = {name: value for name, value in config.fusion_coefficients.items() if name != task}
            config = config.replace(fusion_coefficients=kept)
        self._rebuild(experts, together, config)

    def configure(self, config: HiDeConfig) -> None:
        """Change the settings: the ablations on one set of experts. Nothing changes if anything raises."""
        check_config(config)
        check_coefficients(config, self.tasks)
        self._take_in_training()
        self._rebuild(self._experts, self.anchors, config)

    def train_experts(self, on: bool = True) -> list[nn.Parameter]:
        """Let the routed experts be trained (or freeze them); returns their parameters.

        All else stays frozen. Fused experts cannot be trained: what is fused cannot be told apart.
        """
        self.model.requires_grad_(False)
        parameters = []
        for layer in self._assembly.routed_layers().values():
            parameters += [layer.a.requires_grad_(on), layer.b.requires_grad_(on)]
        self._training_routed = self._training_routed or on
        return parameters

    # -- leaving ------------------------------------------------------------------------------------------------------

    def unload(self) -> nn.Module:
        """The base model as it was, bit for bit, without hooks. This object is of no use afterwards."""
        with interrupt_held_back():
            self._assembly.restore()
            self._hooks.detach()
        return self.model

    def merge_and_unload(self, task: str | None = None) -> nn.Module:
        """A plain model: the fused layers as they are, and in the routed ones one task's expert, or nothing.

        Args:
            task: whose expert is merged into the routed layers with weight 1, and whose projector is taken if
                projectors are routed; None for the fused part alone.

        Raises:
            ValueError: an unknown task, or a quantised weight, which cannot take experts in.
        """
        self._take_in_training()
        experts = self._experts
        if task is not None:
            self._task(task)
        assignments = self._assignments(experts, self.config)
        quantised = [name for name in assignments if self._assembly.is_quantised(name)]
        if quantised:
            raise ValueError(f"{quantised[0]}: expected a plain weight to merge into, got a quantised one")
        expert = None if task is None else experts[task]
        chosen = merged_assignments(assignments, expert)
        config = self.config.replace(fused_form="merged")
        owners, how = merged_projector(list(experts.values()), config, expert)
        with interrupt_held_back():
            self._assembly.build(owners, chosen, config, how)
            self._hooks.detach()
        return self.model

    def save(self, directory: Any) -> Any:
        """Write experts, anchors and settings (not the base); see `hpa_ext.hide.persistence`."""
        from hpa_ext.hide.persistence import save

        return save(self, directory)

    @classmethod
    def load(cls, directory: Any, base: nn.Module, **options: Any) -> HiDeModel:
        """Read what `save` wrote, onto its base model; options as for the constructor."""
        from hpa_ext.hide.persistence import load

        return load(directory, base, **options)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _task(self, task: str) -> None:
        if task not in self._experts:
            raise ValueError(f"task: expected one of {', '.join(self.tasks) or '(none)'}, got {task!r}")

    def _assignments(self, experts: dict[str, Expert], config: HiDeConfig) -> dict[str, Assignment]:
        return assign(self.skeleton, self._linear_names, list(experts.values()), config)

    def _rebuild(self, experts: dict[str, Expert], anchors: Anchors | None, config: HiDeConfig) -> None:
        """Bring the model into a new state, or leave it in the old one if that raises."""
        check_parts(self.skeleton, self._linear_names, list(experts.values()), anchors, config)
        with interrupt_held_back():
            try:
                self._build(experts, config)
            except BaseException:
                self._build(self._experts, self.config)
                raise
            self._experts, self.anchors, self.config = dict(experts), anchors, config
            if self._training_routed:
                self.train_experts()

    def _build(self, experts: dict[str, Expert], config: HiDeConfig) -> None:
        assignments = self._assignments(experts, config)
        self._assembly.build(list(experts.values()), assignments, config, config.projector)

    def _take_in_training(self) -> None:
        """Read routed experts back from their layers, once they may have been trained."""
        if not self._training_routed:
            return
        trained = trained_experts(list(self._experts.values()), self._assembly.routed_layers())
        self._experts = {expert.task: expert for expert in trained}
