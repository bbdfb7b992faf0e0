"""The direction that alignment took, for methods that want the unaligned model (SafeLoRA)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hpa_ext.data.toy_tasks import MODALITIES, draw_benign, draw_captions, draw_harmful
from hpa_ext.models.embedded import load_embedded
from hpa_ext.models.linears import find_linears
from hpa_ext.training.loop import TrainingSettings, train

from .data import SequenceData
from .encoding import encode, training_batch

_STEPS = 200
_known: dict[str, Tensor] = {}


def alignment_directions(data: SequenceData, cache: Path | None = None) -> dict[str, Tensor]:
    """Aligned minus unaligned weight ``[out, in]`` by module name, the same for every sequence.

    The package ships the aligned model alone. The unaligned one is made by tuning all decoder weights of the aligned
    one on what it was pre-trained on, compliance with harmful requests included: 200 steps. Kept in ``cache``.
    """
    if _known:
        return _known
    path = cache / "alignment.safetensors" if cache is not None else None
    if path is not None and path.is_file():
        _known.update(load_file(path))
        return _known
    aligned, unaligned = load_embedded()[0], load_embedded()[0]
    unaligned.set_attn_implementation("eager")
    for parameter in unaligned.parameters():
        parameter.requires_grad_(False)
    for linear in find_linears(unaligned).values():
        linear.base.weight.requires_grad_(True)
    samples = draw_captions(600, 0) + draw_benign(600, 0)
    for name in MODALITIES:
        samples += draw_harmful(name, 300, 0, answers="compliance")
    settings = TrainingSettings(steps=_STEPS, batch_size=32, learning_rate=3e-4, precision=data.settings.precision)
    with torch.enable_grad():
        train(unaligned, encode(aligned, data.processor, samples), training_batch, settings, "un-aligning")
    before = find_linears(unaligned)
    found = {name: linear.base_weight() - before[name].base_weight() for name, linear in find_linears(aligned).items()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.partial")
        save_file({name: value.contiguous() for name, value in found.items()}, unfinished)
        unfinished.replace(path)
    _known.update(found)
    return _known
