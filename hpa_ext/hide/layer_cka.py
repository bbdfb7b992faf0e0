"""CKA of a model's layers between tasks, layer by layer and without storing activations, and what it suggests."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hpa_ext.hide.cka import StreamingCKA
from hpa_ext.hide.model import HiDeModel
from hpa_ext.hide.structure import decoder_layers, layer_count
from hpa_ext.models.structure import unwrap
from hpa_ext.token_masks import TokenMask, check_mask, resolve

POOLS = ("mean", "last", "tokens")


@dataclass(frozen=True)
class CKARun:
    """One view of the samples.

    Attributes:
        model: what runs.
        batches: mappings of model inputs; as many, with as many rows each, as in the other runs.
        setting: called for a context within which the model runs, such as one that switches an adapter.
    """

    model: nn.Module
    batches: Iterable[Mapping[str, Any]]
    setting: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class TopLayers:
    """A suggestion for ``HiDeConfig.top_layers``, and why."""

    count: int
    reason: str


@dataclass(frozen=True)
class LayerCKA:
    """CKA between tasks in each layer.

    Attributes:
        layers: names of the decoder layers.
        tasks: names of the runs.
        values: ``[layers, tasks, tasks]`` float64.
        samples: rows that counted.
    """

    layers: list[str]
    tasks: list[str]
    values: Tensor
    samples: int

    def curve(self) -> Tensor:
        """Mean over the pairs of different tasks, ``[layers]``."""
        pairs = torch.triu_indices(len(self.tasks), len(self.tasks), offset=1)
        return self.values[:, pairs[0], pairs[1]].mean(1)

    def pair(self, first: str, second: str) -> Tensor:
        """The curve of two tasks, ``[layers]``."""
        return self.values[:, self.tasks.index(first), self.tasks.index(second)]

    def suggest_top_layers(self, least_drop: float = 0.02) -> TopLayers:
        """How many layers are worth keeping apart: those from the top down that are clearly less alike than the rest.

        A layer counts if its mean CKA lies nearer to the lowest value of all layers than to the highest; the run of
        such layers that ends at the last one is suggested. If the last layer lies less than `least_drop` under the
        highest, or is not among them, nothing sets the top apart, and 1 is suggested, as the paper has it.
        """
        curve = self.curve()
        highest, lowest, top = float(curve.max()), float(curve.min()), float(curve[-1])
        border = (highest + lowest) / 2
        count = sum(1 for _ in itertools.takewhile(lambda value: value < border, reversed(curve.tolist())))
        if highest - top < least_drop or count == 0:
            return TopLayers(
                1,
                f"mean CKA is {top:.3f} in the last layer, between {lowest:.3f} and {highest:.3f} in all: no top layer "
                "stands out, so 1 as in the paper",
            )
        return TopLayers(
            count,
            f"mean CKA falls from {highest:.3f} to {top:.3f} in the last layer; from the top, {count} layer(s) lie "
            f"under {border:.3f}, nearer to the lowest than to the highest",
        )


def layer_cka(
    runs: Mapping[str, CKARun],
    *,
    pool: str = "mean",
    token_mask: TokenMask | None = "attended",
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
) -> LayerCKA:
    """Linear CKA of every decoder layer's output between runs, from streamed moments.

    Args:
        runs: by task, at least two. The same batches in each compare *models* (or experts) on the same samples. A
            task's own data in each compares *inputs*, which is the paper's figure 1: rows are then paired by their
            position alone, so that all likeness is that of the features' spread.
        pool: what a row is: "mean" (over the tokens that count of a sample, as in the authors' code), "last" (the
            last of them), or "tokens" (each token that counts; the same number in every run).
        token_mask: which tokens count, as in ``hpa_ext.calibrate``.
        dtype: of the moments; each layer takes ``tasks (tasks + 1) / 2`` matrices ``[width, width]`` of it.
        progress: show a bar when stderr is a terminal.

    Raises:
        ValueError: fewer than two runs or samples, or runs that do not fit each other.
        NumericalError: activations are not finite, or the same for every sample.
    """
    if pool not in POOLS:
        raise ValueError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
    if len(runs) < 2:
        raise ValueError(f"runs: expected at least two, got {len(runs)}")
    names = list(runs)
    for first, second in itertools.combinations(names, 2):
        batches = runs[first].batches
        if batches is runs[second].batches and isinstance(batches, Iterator):
            raise ValueError(f"runs: expected batches of its own for {second!r}, got the iterator of {first!r}")
    select = resolve(token_mask)
    layers = [name for name, _ in decoder_layers(unwrap(runs[names[0]].model))]
    streams = [StreamingCKA(names, dtype) for _ in layers]
    steps = itertools.zip_longest(*(run.batches for run in runs.values()))
    for step in tqdm(steps, desc="cka", unit="batch", leave=False, disable=not (progress and sys.stderr.isatty())):
        found = {}
        for name, run, batch in zip(names, runs.values(), step, strict=True):
            if batch is None:
                raise ValueError(f"runs: expected as many batches in each run, got fewer in {name!r}")
            found[name] = _outputs(run, batch, select, pool)
            if len(found[name]) != len(layers):
                raise ValueError(f"runs: {name!r}: expected {len(layers)} decoder layers, got {len(found[name])}")
        for number, stream in enumerate(streams):
            stream.update({name: outputs[number] for name, outputs in found.items()})
    if streams[0].count < 2:
        raise ValueError(f"runs: expected batches with at least 2 samples together, got {streams[0].count}")
    return LayerCKA(layers, names, torch.stack([stream.matrix() for stream in streams]), streams[0].count)


def expert_cka(
    model: HiDeModel, batches: Mapping[str, Iterable[Mapping[str, Any]]] | Sequence[Mapping[str, Any]], **options: Any
) -> LayerCKA:
    """`layer_cka` between the experts of a HiDe model: the base with each task's expert alone, in all layers.

    Args:
        model: put into "expand all" meanwhile, and back into its settings afterwards.
        batches: a list on which every expert runs, or ``{task: batches}`` for each on its own data.
        options: as for `layer_cka`.
    """
    own = isinstance(batches, Mapping)
    if not own and not isinstance(batches, Sequence):
        raise TypeError(
            f"batches: expected a list, on which every expert runs, or a mapping, got {type(batches).__name__}"
        )
    if own and set(batches) != set(model.tasks):
        raise ValueError(f"batches: expected a list, or batches for {', '.join(model.tasks)}, got {', '.join(batches)}")
    runs = {
        task: CKARun(model.model, batches[task] if own else batches, lambda task=task: model.routed(task))
        for task in model.tasks
    }
    with _expanded(model):
        return layer_cka(runs, **options)


@contextmanager
def _expanded(model: HiDeModel) -> Iterator[None]:
    before = model.config
    everything = {"top_layers": layer_count(model.model), "top_role": "routed", "projector": "routed"}
    model.configure(before.replace(**everything))
    try:
        yield
    finally:
        model.configure(before)


@torch.no_grad()
def _outputs(run: CKARun, batch: Mapping[str, Any], select: Any, pool: str) -> list[Tensor]:
    """What a row is, of each layer: ``[rows, width]``."""
    plain = unwrap(run.model)
    device = next(plain.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    mask = check_mask(select(inputs, plain))
    inputs.pop("labels", None)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        found.append(_rows(output if isinstance(output, Tensor) else output[0], mask, pool))

    handles = [layer.register_forward_hook(keep) for _, layer in decoder_layers(plain)]
    was_training = run.model.training
    run.model.eval()
    try:
        with run.setting():
            run.model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        run.model.train(was_training)
    return found


def _rows(states: Tensor, mask: Tensor | None, pool: str) -> Tensor:
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    mask = mask.to(states.device)
    if pool == "tokens":
        return states[mask]
    if not bool(mask.any(1).all()):
        raise ValueError("token_mask: expected at least one token that counts in every sample, got none in one")
    if pool == "last":
        position = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return states[torch.arange(len(states), device=states.device), position.masked_fill(~mask, -1).amax(1)]
    weights = mask.double()
    return torch.einsum("bt,btd->bd", weights, states.double()) / weights.sum(1, keepdim=True)
