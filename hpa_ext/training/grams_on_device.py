"""Grams on the device of the weights: activations are on another one if weights are offloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from hpa_ext.compromise import CompromiseConfig
from hpa_ext.compromise.earlier import on_device
from hpa_ext.gram import Gram
from hpa_ext.gram_diagonal import AnyGram, GramDiagonal
from hpa_ext.harmonizing import Config
from hpa_ext.models.linear import Linear
from hpa_ext.models.sharding import local


def where_weights_are(
    grams: Mapping[str, AnyGram], linears: Mapping[str, Linear], config: Config
) -> Mapping[str, AnyGram]:
    """The Grams of these linears where their weights are: whole ones for the compromise; for HPA, which needs no more,
    the diagonals of the inverses of those that have to be moved.
    """
    devices = {name: local(linear.base_weight()).device for name, linear in linears.items()}
    if isinstance(config, CompromiseConfig):
        return WholeGramsOnDevice(grams, devices)
    moved: dict[str, AnyGram] = {}
    for name, device in devices.items():
        gram = grams[name]
        if isinstance(gram, Gram) and gram.device != device:
            gram = GramDiagonal.of(gram, config.damping, rescue=config.rescue)
        moved[name] = gram if isinstance(gram, Gram) else gram.to(device)
    return moved


class WholeGramsOnDevice(Mapping[str, AnyGram]):
    """Whole Grams, each moved when it is asked for: names in a row that share one get the same object.

    Args:
        grams: by module name.
        devices: by the names that shall be there.
    """

    def __init__(self, grams: Mapping[str, AnyGram], devices: Mapping[str, torch.device]) -> None:
        self._grams, self._devices = grams, devices
        self._last: tuple[AnyGram, Gram] | None = None

    def __getitem__(self, name: str) -> AnyGram:
        gram, device = self._grams[name], self._devices[name]
        if not isinstance(gram, Gram) or gram.device == device:
            return gram  # what is no whole Gram is refused by the method
        if self._last is None or self._last[0] is not gram or self._last[1].device != device:
            self._last = None  # before the next one is made
            self._last = gram, on_device(gram, device)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._devices)

    def __len__(self) -> int:
        return len(self._devices)

    def __contains__(self, name: object) -> bool:
        return name in self._devices and name in self._grams
