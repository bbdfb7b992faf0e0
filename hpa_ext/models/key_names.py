"""From the names of tensors on disk, of whatever generation, to the names in today's transformers class."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hpa_ext.models.llava import HUGGING_FACE_NAMES, ORIGINAL_NAMES

# Buffers that older versions saved and the model computes by itself.
_COMPUTED = r"(^|\.)(rotary_emb\.inv_freq|position_ids|attn\.masked_bias)$"


@dataclass(frozen=True)
class KeyMap:
    """Where each tensor on disk belongs.

    Attributes:
        canonical: disk name -> the name in ``model.state_dict()``, for tensors that are stored as the model holds them.
        converted: disk name -> the name of the tensor in the model that transformers builds from it with others (such
            as the stacked weight of a mixture of experts from one weight per expert).
        ignored: disk names that the model has no use for, such as rotary frequencies that it computes itself.
    """

    canonical: dict[str, str]
    converted: dict[str, str]
    ignored: tuple[str, ...]


class KeyNames:
    """The names that a tensor may go by, for one model (a `skeleton` will do).

    Tried in this order, the first that the model has being taken: transformers' own conversion mapping for the class;
    the name as it is; LLaVA's generations; and each of these with the base model's prefix (``model.``,
    ``transformer.``) put before or taken off, and with CLIP's ``vision_model.`` level put in or taken out.

    Args:
        model: the model.
        extra: names to know beside those of ``model.state_dict()``; a quantised layer has no ``weight`` there.
    """

    def __init__(self, model: nn.Module, extra: Iterable[str] = ()) -> None:
        self.model_class = type(model).__name__
        self.known = {*model.state_dict(), *extra}
        self._prefix = str(getattr(model, "base_model_prefix", "") or "")
        patterns = [str(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        self._ignored = re.compile("|".join(f"(?:{pattern})" for pattern in (_COMPUTED, *patterns)))
        self._transformers = _TransformersNames(model)

    def canonical(self, name: str) -> str | None:
        """The model's name for a tensor stored as it is held, None if nothing fits."""
        return next((tried for tried in self.tried(name) if tried in self.known), None)

    def converted(self, name: str) -> str | None:
        """The name of the model's tensor that transformers builds from this one and others, None if it does not."""
        target = self._transformers.converted(name)
        if target is None:
            return None
        return next((tried for tried in self._variants(target) if tried in self.known), None)

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor that fits nowhere may be left out."""
        return self._ignored.search(name) is not None

    def tried(self, name: str) -> list[str]:
        """The names that are looked for, best first."""
        original = _rename(name, ORIGINAL_NAMES)
        forms = [self._transformers.renamed(name), name, _rename(name, HUGGING_FACE_NAMES), original]
        return list(dict.fromkeys(variant for form in dict.fromkeys(forms) for variant in self._variants(form)))

    def _variants(self, name: str) -> Iterable[str]:
        yield name
        if self._prefix:
            start = self._prefix + "."
            yield name.removeprefix(start) if name.startswith(start) else start + name
        if ".vision_tower." in name:
            inside = ".vision_tower.vision_model."
            yield name.replace(inside, ".vision_tower.") if inside in name else name.replace(".vision_tower.", inside)


def map_names(disk_names: Iterable[str], model: nn.Module) -> KeyMap:
    """Find the place in `model` (a `skeleton` will do) of each tensor on disk.

    Raises ValueError when a tensor fits nowhere, with the names that were tried for the first few, and when two fit in
    one place.
    """
    # The order in which transformers loads, on which some of its renamings rely.
    names = sorted(disk_names, key=_natural)
    rules = KeyNames(model)
    canonical: dict[str, str] = {}
    converted: dict[str, str] = {}
    ignored, lost = [], []
    taken: dict[str, str] = {}
    for name in names:
        target = rules.converted(name)
        if target is not None:
            converted[name] = target
            continue
        target = rules.canonical(name)
        if target is None:
            (ignored if rules.is_ignored(name) else lost).append(name)
        elif target in taken:
            raise ValueError(f"tensors {taken[target]!r} and {name!r} both belong to {target!r} of {rules.model_class}")
        else:
            taken[target] = name
            canonical[name] = target
    if lost:
        shown = "".join(f"\n  {name} -> tried {', '.join(rules.tried(name))}" for name in lost[:5])
        more = f"\n  and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ValueError(
            f"{len(lost)} of {len(names)} tensors fit nowhere in {rules.model_class}, which has such as "
            f"{', '.join(sorted(rules.known)[:2])}:{shown}{more}"
        )
    return KeyMap(canonical, converted, tuple(ignored))


class _TransformersNames:
    """transformers' own renamings for a model; none where its version does not offer them."""

    def __init__(self, model: nn.Module) -> None:
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        if not hasattr(model, "base_model_prefix"):
            return
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
        except ImportError:  # the rules of this module stay; a name that needs more is an error, not a guess
            return
        for transform in get_model_conversion_mapping(model):
            if isinstance(transform, WeightConverter):
                self._converters.append(transform)
            elif isinstance(transform, WeightRenaming):
                self._renamings.append(transform)

    def renamed(self, name: str) -> str:
        for renaming in self._renamings:
            name = renaming.rename_source_key(name)[0]
        return name

    def converted(self, name: str) -> str | None:
        name = self.renamed(name)
        for converter in self._converters:
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return target
        return None


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
