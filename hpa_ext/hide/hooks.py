"""Hooks by which a model's own forward and generate route: prompts in, weights held, caches remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hpa_ext.hide.prompts import bound_inputs, prompt_of
from hpa_ext.hide.structure import vision_tower_name

if TYPE_CHECKING:
    from hpa_ext.hide.model import HiDeModel


class RoutingHooks:
    """Watches the base model of a `HiDeModel`; on from the start, until `detach`."""

    def __init__(self, owner: HiDeModel) -> None:
        self._owner, self._model, self._state = owner, owner.model, owner.state
        self._handles = [
            self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self._model.register_forward_hook(self._after_forward),
        ]
        tower = vision_tower_name(self._model)
        if tower is not None:
            self._handles.append(self._model.get_submodule(tower).register_forward_hook(self._after_tower))
        if hasattr(self._model, "generate"):
            # On the object, so that whoever holds the base alone gets it too: a pipeline, a trainer.
            self._model.generate = self.generate

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._model.__dict__.pop("generate", None)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Transformers' generate, each prompt's weights held from before its first token to its last."""
        plain: Callable[..., Any] = type(self._model).generate
        cache = kwargs.get("past_key_values")
        continued = cache is not None and cache.get_seq_length() > 0
        if self._state.is_generating or continued or not self._owner.routes:
            return plain(self._model, inputs, *args, **kwargs)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        prompt = prompt_of(self._model, {**kwargs, "input_ids": ids})
        if prompt is None and not self._state.is_fixed:
            raise ValueError(
                "input_ids: expected token ids to route by, got none; give the weights with `routed(weights)`"
            )
        with self._state.generating(prompt):
            output = plain(self._model, inputs, *args, **kwargs)
            filled = getattr(output, "past_key_values", None)
            if filled is not None:
                self._state.remember(filled)
        return output

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._owner.routes:
            return
        inputs = bound_inputs(self._model, args, kwargs)
        if self._state.is_generating:
            # Before transformers encoded images ahead of the first forward, it repeated the pixels for its beams.
            if inputs.get("pixel_values") is not None and inputs.get("input_ids") is not None:
                self._state.expect_repeated_images(len(inputs["input_ids"]))
            return
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            if not self._state.is_fixed:
                self._state.continue_with(cache)
            return
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        self._state.begin(prompt_of(self._model, inputs), getattr(encoded, "last_hidden_state", None))

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self._owner.routes and not self._state.is_generating:
            self._state.remember(cache)

    def _after_tower(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._owner.routes and self._owner.routes_by_images:
            self._state.add_images(self._owner.features.image(output), output.last_hidden_state)
