"""Calibration with one decoder layer in memory at a time, for models that do not fit."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hpa_ext.calibrating.add_up import add_up
from hpa_ext.calibrating.front import Front
from hpa_ext.calibrating.loading import prefixes
from hpa_ext.calibrating.run import CalibrationRun, without_head
from hpa_ext.calibrating.spool import Spool
from hpa_ext.gram_collector import GramCollector
from hpa_ext.model_calls import forward_options
from hpa_ext.models.decoder_layers import decoder_layers


def calibrate_layers(run: CalibrationRun) -> None:
    """Calibrate layer by layer and give each layer's Grams to the store.

    Everything before the decoder's layers runs once over all batches; then each layer is loaded alone and runs over the
    hidden states that the one before it left in files. Layers whose Grams are stored already are run again only if the
    hidden states behind them are lost.

    Raises:
        ValueError: the model cannot be taken apart like this, or a module outside of the decoder's layers is asked for.
    """
    try:
        list_name, layers = decoder_layers(run.model.module)
    except ValueError as error:
        raise ValueError(f"mode: cannot be 'layers': {error}; use mode='whole'") from error
    names = _names_by_layer(run, list_name, len(layers))
    pending = [index for index, inside in names.items() if not run.store.finished.issuperset(inside)]
    if not pending:
        return
    with Spool(run.store.directory, f"hidden-states-{run.processes.rank}", run.model.dtype) as spool:
        common = set.intersection(*map(set, run.processes.gather(run.processes.together(spool.available))))
        start = max((layer for layer in common if layer <= pending[0]), default=0)
        keep_states = start == 0 and 0 not in common
        with run.bar((pending[-1] + 1 - start) * len(run.mine()), "batch") as bar:
            bar.set_description("up to the first layer")
            front, masks = run.processes.together(lambda: _run_front(run, list_name, layers, spool, keep_states))
            for index in range(start, pending[-1] + 1):
                bar.set_description(f"layer {index + 1} of {len(layers)}")
                wanted = names[index] if index in pending else []
                goes_on = index < pending[-1]
                if goes_on:
                    run.model.prefetch(f"{list_name}.{index + 1}.")
                passage = _LayerPassage(run, front, masks, spool, index, goes_on, run.collector(wanted), bar)
                run.processes.together(functools.partial(passage.run, list_name, layers[index]))
                if wanted:
                    grams = add_up(passage.collector, run.model.device, run.processes)
                    run.store.add(f"layer {index + 1}", grams)
                    del grams
                del passage


@dataclass(frozen=True)
class _LayerPassage:
    """All batches of this process through one layer."""

    calibration: CalibrationRun
    front: Front
    masks: list[Tensor | None]
    spool: Spool
    index: int
    goes_on: bool
    collector: GramCollector
    bar: tqdm

    def run(self, list_name: str, layer: nn.Module) -> None:
        model, spool, index = self.calibration.model, self.spool, self.index
        model.load(prefixes([f"{list_name}.{index}"]))
        if self.goes_on:
            spool.begin(index + 1)
        with self.collector.hooked(), torch.inference_mode(False), torch.no_grad():
            for batch, mask in enumerate(self.masks):
                states = spool.read(index, batch).to(model.device)
                arguments, keywords = self.front.calls.get(batch, index, model.device)
                with self.collector.listening(mask):
                    leaving = layer(states, *arguments, **keywords)
                if self.goes_on:
                    spool.write(index + 1, _states(leaving))
                self.bar.update()
        model.unload(layer)
        if self.goes_on:
            spool.commit(index + 1)


def _run_front(
    run: CalibrationRun, list_name: str, layers: nn.ModuleList, spool: Spool, keep_states: bool
) -> tuple[Front, list[Tensor | None]]:
    """What the layers are called with, and the tokens that count; with the states that enter the first, if wanted."""
    model = run.model.module
    before_layers = without_head(model)
    run.model.load(lambda name: before_layers(name) and not name.startswith(f"{list_name}."))
    front = Front(model, layers)
    options = forward_options(model, all_logits=False)
    masks: list[Tensor | None] = []
    if keep_states:
        spool.begin(0)
    with torch.inference_mode(False), torch.no_grad():
        for position, number in enumerate(run.mine()):
            keywords, mask = run.inputs(number)
            states = front.run(position, (), {**keywords, **options})
            masks.append(mask)
            if keep_states:
                spool.write(0, states)
    if keep_states:
        spool.commit(0)
    run.model.unload(model)
    return front, masks


def _names_by_layer(run: CalibrationRun, list_name: str, count: int) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name in run.linears:
        if not name.startswith(f"{list_name}."):
            raise ValueError(
                f"modules: {name} is outside of the decoder's layers {list_name}; use mode='whole' or leave it out"
            )
        names.setdefault(int(name[len(list_name) + 1 :].split(".")[0]), []).append(name)
    return {index: names[index] for index in range(count) if index in names}


def _states(leaving: object) -> Tensor:
    states = leaving[0] if isinstance(leaving, tuple) else leaving
    if not isinstance(states, Tensor):
        raise ValueError(f"mode: a layer returns {type(states).__name__} and no hidden states; use mode='whole'")
    return states
