"""Methods to compare HPA with, one module each; importing the package registers them all."""

from __future__ import annotations

import importlib
import pkgutil

from .layer import LayerContext
from .registry import METHODS, Method, load_file, method, post_training, training
from .tuning_step import StepContext, TrainingMethod

__all__ = [
    "METHODS",
    "LayerContext",
    "Method",
    "StepContext",
    "TrainingMethod",
    "load_file",
    "method",
    "post_training",
    "training",
]

# Tables follow this order; a module that is not named here comes after them.
_ORDER = ("bounds", "hpa", "safe_delta", "model_tailor", "safe_lora", "interpolation", "ties", "dare", "regmean")
_modules = [found.name for found in pkgutil.iter_modules(__path__)]
for _name in (*_ORDER, *sorted(set(_modules) - set(_ORDER))):
    importlib.import_module(f"{__name__}.{_name}")
