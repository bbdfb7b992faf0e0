"""HPA on one layer, or on a list of layers together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hpa_ext.agreement import Agreement
from hpa_ext.gram import GramPair
from hpa_ext.gram_diagonal import AnyGram
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.layer_plan import merge_layers, reports_of
from hpa_ext.hpa.naming import naming
from hpa_ext.hpa.plan import plan_layers
from hpa_ext.hpa.report import LayerReport
from hpa_ext.models.sharding import local
from hpa_ext.models.structure import is_conv1d
from hpa_ext.ops._checks import describe
from hpa_ext.ops._lists import Place, first_overlap, repeats_elements

Layer = Tensor | nn.Module
AnyPair = GramPair | tuple[AnyGram, AnyGram]


def harmonize(
    layer_old: Layer | Sequence[Layer],
    layer_new: Layer | Sequence[Layer],
    gram: AnyPair | Sequence[AnyPair],
    depth: float | Sequence[float] = 0.5,
    config: HPAConfig | None = None,
    *,
    return_report: bool = False,
) -> Any:
    """The harmonized weight of a layer before and after a tuning step; or those of a list of layers, together.

    Args:
        layer_old, layer_new: a weight ``[out, in]`` (bfloat16, float16, float32, float64), an ``nn.Linear``, or a
            transformers ``Conv1D`` (whose weight is ``[in, out]``, and so is the result). Neither is changed. Or lists
            of these, as long as each other, of any shapes and dtypes.
        gram: a `GramPair` or ``(safety, task)``, each a `Gram` or a matrix ``[in, in]``, on the weights' device. For
            lists of layers a list of pairs, one for each; a Gram that stands in several is factored once.
        depth: layer / number of layers, 1-based, in [0, 1]: deeper layers retain less. For lists of layers one number
            for all of them, or a list.
        config: settings; None for the paper's.
        return_report: also return a `LayerReport`.

    Returns:
        A new tensor of the shape, dtype and device of layer_new's weight; with the report if asked for. For lists of
        layers a list of these, and with it a list of reports.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or a Gram has counted no tokens.
        NumericalError: a weight or Gram holds NaN or Inf, or a Gram cannot be factored.
        For lists of layers the message starts with the layer's place in the list, such as ``layers[3]``.

    Layers of a list are summed, chosen for and merged by one operation each, and get bit for bit what each gets alone.
    On a CUDA device nothing synchronises with the host unless a report is asked for or a `Gram` is used for the first
    time (matrices can be captured in a CUDA graph); what would have raised NumericalError then shows as NaN in the
    result. Source: HPA (CVPR 2026), Algorithm 1.

    Weights may be DTensors as FSDP2's ``fully_shard`` makes them (Shard(0), Shard(1), Replicate, on any mesh), both
    with the same mesh and placements, which the result has too; every process of the mesh must then call this, with
    Grams of all samples (``gram.all_reduce_()``). No weight is gathered, all processes retain the same columns, and
    what raises on one raises on all. A layer whose weight FSDP2 holds gathered (its root after a forward) needs
    ``reshard()`` first.
    """
    config = _settings(config)
    layers = Layers.of(layer_old, layer_new, gram, depth)
    check = return_report or any(old.device.type != "cuda" for old in layers.olds)
    plans = plan_layers(
        layers.olds, layers.news, layers.grams, layers.depths, config, naming=layers.naming, check=check
    )
    merged = [
        weight.mT.contiguous() if is_conv1d(layer) else weight
        for weight, layer in zip(merge_layers(plans, layers.olds, layers.news), layers.given, strict=True)
    ]
    if not return_report:
        return merged if layers.is_list else merged[0]
    reports = reports_of(plans, [None] * len(plans))
    return (merged, reports) if layers.is_list else (merged[0], reports[0])


def harmonize_(
    layer_old: Layer | Sequence[Layer],
    layer_new: Layer | Sequence[Layer],
    gram: AnyPair | Sequence[AnyPair],
    depth: float | Sequence[float] = 0.5,
    config: HPAConfig | None = None,
) -> LayerReport | list[LayerReport]:
    """As `harmonize`, written into layer_new; returns the report. If anything raises, no layer is changed."""
    config = _settings(config)
    layers = Layers.of(layer_old, layer_new, gram, depth)
    shared = layers.shared_memory()
    for index, new in enumerate(layers.news):
        with layers.naming(index), Agreement.of_tensor(new).together():
            if index in shared:
                raise ValueError(shared[index])
    plans = plan_layers(layers.olds, layers.news, layers.grams, layers.depths, config, naming=layers.naming)
    reports = reports_of(plans, [None] * len(plans))
    merge_layers(plans, layers.olds, layers.news, layers.news)
    return reports if layers.is_list else reports[0]


@dataclass(frozen=True)
class Layers:
    """What was given for one layer or a list of them, as lists.

    Attributes:
        given: the layers after the tuning step, as they were given.
        olds, news: their weights ``[out, in]``.
        grams, depths: one for each.
        is_list: whether lists were given.
    """

    given: list[Layer]
    olds: list[Tensor]
    news: list[Tensor]
    grams: list[AnyPair]
    depths: list[float]
    is_list: bool

    @classmethod
    def of(
        cls,
        layer_old: Layer | Sequence[Layer],
        layer_new: Layer | Sequence[Layer],
        gram: AnyPair | Sequence[AnyPair],
        depth: float | Sequence[float],
    ) -> Layers:
        """Raises TypeError or ValueError for what is no layer, and for lists that differ in length."""
        if not isinstance(layer_old, (list, tuple)):
            if isinstance(layer_new, (list, tuple)):
                raise TypeError(f"layer_new: expected one layer like layer_old, got a list of {len(layer_new)}")
            old, new = weight_of("layer_old", layer_old), weight_of("layer_new", layer_new)
            return cls([layer_new], [old], [new], [gram], [depth], is_list=False)
        count = len(layer_old)
        depths = depth if isinstance(depth, (list, tuple)) else [depth] * count
        for name, values in (("layer_new", layer_new), ("gram", gram), ("depth", depths)):
            if not isinstance(values, (list, tuple)) or isinstance(values, GramPair):
                raise TypeError(f"{name}: expected a list of {count}, one for each layer, got {type(values).__name__}")
            if len(values) != count:
                raise ValueError(f"{name}: expected {count}, one for each of layer_old, got {len(values)}")
        return cls(
            list(layer_new),
            [weight_of(f"layer_old[{index}]", layer) for index, layer in enumerate(layer_old)],
            [weight_of(f"layer_new[{index}]", layer) for index, layer in enumerate(layer_new)],
            list(gram),
            list(depths),
            is_list=True,
        )

    def shared_memory(self) -> dict[int, str]:
        """What keeps layer_new from being written, if anything does, by the layer: all before the first is written."""
        for index, part in enumerate(map(local, self.news)):
            if repeats_elements(part):
                return {index: f"layer_new: expected elements apart from each other, got strides {part.stride()}"}
        places = [
            Place(name, index, local(matrix), name == "layer_new")
            for name, matrices in (("layer_old", self.olds), ("layer_new", self.news))
            for index, matrix in enumerate(matrices)
        ]
        found = first_overlap(places, within_layers=True)
        if found is None:
            return {}
        new, other = found
        if new.layer == other.layer:
            return {new.layer: "layer_new: is the same memory as layer_old, so the weight before tuning is lost"}
        return {new.layer: f"layer_new: overlaps {other.name} of layers[{other.layer}]"}

    def naming(self, index: int) -> AbstractContextManager[None]:
        """Within the context errors name the layer's place in the list, if there is one."""
        return naming(f"layers[{index}]") if self.is_list else nullcontext()


def _settings(config: HPAConfig | None) -> HPAConfig:
    if config is None:
        return HPAConfig()
    if not isinstance(config, HPAConfig):
        raise TypeError(f"config: expected an HPAConfig, got {describe(config)}")
    return config


def weight_of(name: str, layer: Tensor | nn.Module) -> Tensor:
    """The layer's weight as ``[out, in]``, detached: a view, so that writing to it writes to the layer."""
    if isinstance(layer, Tensor):
        return layer.detach()
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()
    if is_conv1d(layer):
        return layer.weight.detach().mT
    raise TypeError(
        f"{name}: expected a Tensor [out, in], an nn.Linear or a transformers Conv1D, got {type(layer).__name__}"
    )
