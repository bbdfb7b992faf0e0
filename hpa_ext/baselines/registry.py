"""The methods that can be compared: a new one is a module with one registered function.

`post_training` registers a function of the weights before and after a tuning step; `training` registers a function
that makes an object which changes the tuning itself. The modules of this package register themselves when it is
imported; a file of one's own does when it is given to `load_file`.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METHODS: dict[str, Method] = {}

KINDS = ("bound", "post-training", "training")
NEEDS = ("alignment", "history", "earlier-grams", "sequential")


@dataclass(frozen=True)
class Method:
    """One method under a name.

    Attributes:
        name: as on the command line; lower case with hyphens.
        title: as in tables.
        kind: "bound" (no method: what tuning alone does), "post-training" or "training".
        function: of the weights, or the factory of a `TrainingMethod`; None for a bound.
        source: paper, venue, form.
        settings: what the function is called with beside its fixed arguments.
        strength: name of the setting that is tuned, None if the method has none.
        grid: values of it that are tried, the source's own among them where it has one.
        group: "main", "ablation" or "control": the first stands in the main table, the others in that of HPA's parts.
        needs: what a post-training function wants beside Grams: "alignment"; "history" for `initial` and
            `earlier_updates`, every step then being tuned from the initial weights, as for adding task vectors;
            "earlier-grams" for `earlier`, kept in the form of its settings memory and memory_rank; "sequential" for
            Grams of each decoder layer taken when the layers below it are merged already.
    """

    name: str
    title: str
    kind: str
    function: Callable[..., Any] | None
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    strength: str | None = None
    grid: tuple[Any, ...] = ()
    group: str = "main"
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or self.name != self.name.lower() or " " in self.name or "," in self.name:
            raise ValueError(f"name: expected lower case without blanks or commas, got {self.name!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        unknown = sorted(set(self.needs) - set(NEEDS))
        if unknown:
            raise ValueError(f"{self.name}: needs: expected some of {', '.join(NEEDS)}, got {unknown[0]!r}")
        if (self.strength is None) != (not self.grid):
            raise ValueError(f"{self.name}: strength and grid: expected both or neither")
        if self.function is not None:
            accepted = inspect.signature(self.function).parameters
            unknown = sorted({*self.settings, *([self.strength] if self.strength else [])} - set(accepted))
            if unknown:
                raise ValueError(f"{self.name}: its function has no parameter {', '.join(unknown)}")

    def checked(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The same settings; ValueError for one that its function does not have."""
        known = inspect.signature(self.function).parameters if self.function is not None else {}
        accepted = [name for name, one in known.items() if one.kind is inspect.Parameter.KEYWORD_ONLY]
        unknown = sorted(set(changes) - set(accepted))
        if unknown:
            raise ValueError(
                f"{self.name}: expected settings among {', '.join(accepted) or 'none'}, got {unknown[0]!r}"
            )
        return dict(changes)

    def default_strength(self) -> Any:
        """The function's own default of its strength, None if the method has none."""
        if self.strength is None or self.function is None:
            return None
        return inspect.signature(self.function).parameters[self.strength].default


def register(method: Method) -> Method:
    """Add a method. ValueError if another one has its name."""
    known = METHODS.get(method.name)
    if known is not None and known.function is not method.function:
        raise ValueError(f"name: a method called {method.name!r} is registered already")
    METHODS[method.name] = method
    return method


def post_training(name: str, title: str, source: str, **options: Any) -> Callable[[Callable], Callable]:
    """Decorator for ``method(old [out, in], new [out, in], layer: LayerContext, *, ...) -> [out, in]``.

    ``options`` are attributes of `Method`: settings, strength, grid, group, needs. May be stacked to register variants.
    """
    return _decorator("post-training", name, title, source, options)


def training(name: str, title: str, source: str, **options: Any) -> Callable[[Callable], Callable]:
    """Decorator for ``make(*, ...) -> TrainingMethod``; ``options`` as for `post_training`."""
    return _decorator("training", name, title, source, options)


def _decorator(
    kind: str, name: str, title: str, source: str, options: dict[str, Any]
) -> Callable[[Callable], Callable]:
    def add(function: Callable) -> Callable:
        register(Method(name, title, kind, function, source, **options))
        return function

    return add


def method(name: str) -> Method:
    """The method called `name`. ValueError, with the names there are, for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def load_file(path: str | Path) -> list[Method]:
    """Run a Python file that registers methods, and return those that it added.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it registers nothing new.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"method file: there is no {path}")
    before = set(METHODS)
    spec = importlib.util.spec_from_file_location(f"hpa_ext_method_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    added = [value for key, value in METHODS.items() if key not in before]
    if not added:
        raise ValueError(f"method file: {path} registers no new method; see hpa_ext.baselines.registry")
    return added
