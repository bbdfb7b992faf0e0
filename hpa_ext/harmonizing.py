"""The public functions that harmonize: the settings say by which method, HPA where there are none.

A settings class has the class attribute `method`, a key of `METHODS`, whose module holds that method's functions.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from hpa_ext.compromise import CompromiseConfig, CompromiseLayerReport, CompromiseReport
from hpa_ext.gram_diagonal import AnyGram
from hpa_ext.hpa import HPAConfig, LayerReport, ModelReport
from hpa_ext.hpa.checkpoint.estimate import CheckpointPlan
from hpa_ext.hpa.checkpoint.grams import GramSource
from hpa_ext.hpa.layer import AnyPair, Layer
from hpa_ext.models.remembered import RememberedWeights
from hpa_ext.ops._checks import describe

METHODS = {"hpa": "hpa_ext.hpa", "compromise": "hpa_ext.compromise"}
PLANS = {"hpa_ext.hpa": "hpa_ext.hpa.checkpoint.estimate", "hpa_ext.compromise": "hpa_ext.compromise.estimate"}

Config = HPAConfig | CompromiseConfig
AnyLayerReport = LayerReport | CompromiseLayerReport
AnyReport = ModelReport | CompromiseReport


def method_of(config: Config | None) -> ModuleType:
    """The module with the functions of the settings' method. TypeError for what are no settings."""
    if config is None:
        config = HPAConfig()
    name = getattr(config, "method", None)
    if not isinstance(name, str) or name not in METHODS:
        raise TypeError(f"config: expected an HPAConfig or a CompromiseConfig, got {describe(config)}")
    return importlib.import_module(METHODS[name])


def harmonize(
    layer_old: Layer | Sequence[Layer],
    layer_new: Layer | Sequence[Layer],
    gram: AnyPair | Sequence[AnyPair],
    depth: float | Sequence[float] = 0.5,
    config: Config | None = None,
    *,
    earlier: Sequence[AnyGram] = (),
    return_report: bool = False,
) -> Any:
    """The harmonized weight of a layer before and after a tuning step; by HPA also of a list of layers, together.

    Args:
        layer_old, layer_new: a weight ``[out, in]`` (bfloat16, float16, float32, float64), an ``nn.Linear``, or a
            transformers ``Conv1D`` (whose weight is ``[in, out]``, and so is the result). Neither is changed. With HPA
            also lists of these, of any shapes and dtypes.
        gram: a `GramPair` or ``(safety, task)``, each a `Gram` or a matrix ``[in, in]``, on the weights' device. For
            lists of layers a list of pairs, one for each; a Gram that stands in several is factored once.
        depth: layer / number of layers, 1-based, in [0, 1]: HPA retains less in deeper layers. For lists of layers one
            number for all of them, or a list.
        config: an `HPAConfig` for HPA, a `CompromiseConfig` for the closed-form compromise; None for HPA's defaults.
        earlier: Grams of the layer's input on earlier tasks' samples, for the compromise alone.
        return_report: also return a `LayerReport`, or a `CompromiseLayerReport`.

    Returns:
        A new tensor of the shape, dtype and device of layer_new's weight; with the report if asked for. For lists of
        layers a list of these, and with it a list of reports.

    Raises: see `hpa_ext.hpa.harmonize` and `hpa_ext.compromise.harmonize`, which also say what each computes.
    """
    more = _earlier(config, earlier)
    return method_of(config).harmonize(layer_old, layer_new, gram, depth, config, return_report=return_report, **more)


def harmonize_(
    layer_old: Layer | Sequence[Layer],
    layer_new: Layer | Sequence[Layer],
    gram: AnyPair | Sequence[AnyPair],
    depth: float | Sequence[float] = 0.5,
    config: Config | None = None,
    *,
    earlier: Sequence[AnyGram] = (),
) -> AnyLayerReport | list[AnyLayerReport]:
    """As `harmonize`, written into layer_new; returns the report. If anything raises, no layer is changed."""
    return method_of(config).harmonize_(layer_old, layer_new, gram, depth, config, **_earlier(config, earlier))


def harmonize_model(
    model_old: nn.Module | RememberedWeights,
    model_new: nn.Module,
    safety: Mapping[str, AnyGram],
    task: Mapping[str, AnyGram],
    config: Config | None = None,
    *,
    earlier: Sequence[Mapping[str, AnyGram]] = (),
    modules: str | Iterable[str] | None = None,
    progress: bool = True,
) -> AnyReport:
    """Harmonize the linears of `model_new` with those of `model_old`, in place on `model_new`.

    Args:
        model_old: the model before the tuning step, or `RememberedWeights` of it.
        model_new: the model after it, in place; a PeftModel with LoRA needs no merging first.
        safety, task: Grams (or matrices) by module name, as `calibrate` returns them.
        config: an `HPAConfig`, or a `CompromiseConfig`; None for HPA's defaults.
        earlier: Grams by module name of earlier tasks, for the compromise alone.
        modules: a regular expression that must match a whole module name, or names; None for every linear of the
            language model's decoder.
        progress: show a bar when stderr is a terminal.

    Returns:
        A `ModelReport`, or a `CompromiseReport`; both print as a table.

    Raises: see `hpa_ext.hpa.harmonize_model` and `hpa_ext.compromise.harmonize_model`, which have the details.
    """
    more = _earlier(config, earlier)
    return method_of(config).harmonize_model(
        model_old, model_new, safety, task, config, modules=modules, progress=progress, **more
    )


def harmonize_checkpoint(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    safety: GramSource,
    task: GramSource,
    out: str | os.PathLike[str],
    config: Config | None = None,
    *,
    earlier: Sequence[GramSource] = (),
    output: str = "checkpoint",
    old_adapters: Sequence[str | os.PathLike[str]] = (),
    modules: str | Iterable[str] | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> AnyReport:
    """Harmonize a model on disk with the one before a tuning step, into a new directory, a weight at a time.

    Args:
        old: directory of the model before the tuning step, in safetensors, of any generation of tensor names.
        new: directory of the tuned model, or of a PEFT LoRA adapter that was trained on `old`.
        safety, task: the path of a Gram file, or Grams by module name. Whole ones for the compromise.
        out: directory to make; must not exist, or be empty. Until it is complete its contents are in ``<out>.partial``.
        config: an `HPAConfig`, or a `CompromiseConfig`; None for HPA's defaults.
        earlier: Grams of earlier tasks, for the compromise alone.
        output: "checkpoint" for a whole model with the files and names of the input; "adapter" for an adapter: HPA's
            with a column gain, the compromise's an ordinary one.
        old_adapters: adapters that make `old` the model before the step, in the order in which they were trained.
        modules: as in `calibrate`; None for every linear of the language model's decoder.
        resume: go on with what an interrupted run left in ``<out>.partial``; if there is nothing, begin.
        device: where the arithmetic is done.
        progress: show bars when stderr is a terminal.

    Returns:
        A `ModelReport`, or a `CompromiseReport`.

    Raises: see `hpa_ext.hpa.checkpoint.harmonize_checkpoint` and `hpa_ext.compromise.checkpoint.harmonize_checkpoint`,
    which have the details.
    """
    more = _earlier(config, earlier)
    module = importlib.import_module(f"{method_of(config).__name__}.checkpoint")
    return module.harmonize_checkpoint(
        old, new, safety, task, out, config,
        output=output, old_adapters=old_adapters, modules=modules, resume=resume, device=device, progress=progress,
        **more,
    )  # fmt: skip


def plan_checkpoint(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    safety: GramSource,
    task: GramSource,
    out: str | os.PathLike[str],
    config: Config | None = None,
    *,
    earlier: Sequence[GramSource] = (),
    output: str = "checkpoint",
    old_adapters: Sequence[str | os.PathLike[str]] = (),
    modules: str | Iterable[str] | None = None,
    device: torch.device | str = "cpu",
) -> CheckpointPlan:
    """What `harmonize_checkpoint` with the same arguments would cost in bytes, memory and time.

    Raises what it would raise before its work. Nothing is left on the disk.
    """
    module = importlib.import_module(PLANS[method_of(config).__name__])
    return module.plan_checkpoint(
        old, new, safety, task, out, config,
        output=output, old_adapters=old_adapters, modules=modules, device=device, **_earlier(config, earlier),
    )  # fmt: skip


def _earlier(config: Config | None, earlier: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """The argument for a method that takes Grams of earlier tasks; ValueError where there are some and it does not."""
    if method_of(config).TAKES_EARLIER_GRAMS:
        return {"earlier": earlier}
    if not isinstance(earlier, Sequence) or len(earlier):
        raise ValueError("earlier: HPA has no place for Grams of earlier tasks; expected none, or a CompromiseConfig")
    return {}
