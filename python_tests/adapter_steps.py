"""Steps of HPA as adapters: tiny models, plain and harmonized adapters, and when two results are the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import adapter_models
import tiny_models
import torch
from adapter_models import LANGUAGE, assert_equal_to_rounding

from hpa_ext.checkpoints.adapter import LoraAdapter
from hpa_ext.checkpoints.harmonized_adapter import write_harmonized_adapter
from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.hpa.low_rank import gain_of
from hpa_ext.models.skeleton import skeleton

FAMILIES = {
    "llava": (tiny_models.llava, {"target_modules": LANGUAGE}),
    "gpt2": (tiny_models.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}
KINDS = ("llava fp32", "llava bf16", "gpt2 fp32")


@dataclass(frozen=True)
class Steps:
    """A base, the adapters of two steps, and the same harmonized; directories."""

    base: Path
    plain: list[Path]
    harmonized: list[Path]

    @property
    def skeleton(self):
        return skeleton(self.base)

    def load(self):
        return adapter_models.load(self.base)


def make_steps(kind, directory):
    """The files of two steps for one of `KINDS`."""
    family, dtype = kind.split()
    make, options = FAMILIES[family]
    base = adapter_models.save(make(), directory / "base", torch.bfloat16 if dtype == "bf16" else torch.float32)
    plain = [
        adapter_models.adapter(
            adapter_models.load(base), directory / f"plain{i}", seed=i, r=i + 2, use_rslora=i == 1, **options
        )
        for i in (0, 1)
    ]
    model = skeleton(base)
    return Steps(base, plain, [harmonized(path, model, directory / f"step{i}", i) for i, path in enumerate(plain)])


def decisions(adapter, seed):
    """Masks and gains such as a step of HPA decides on, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    retained, gain = {}, {}
    for name in adapter.updates:
        mask = torch.rand(adapter.sizes[name].in_features, generator=generator) < 0.2
        retained[name] = mask
        gain[name] = gain_of(mask, 0.05 * torch.randn((), generator=generator))
    return retained, gain


def harmonized(source, model, directory, seed):
    adapter = LoraAdapter(source, model)
    retained, gain = decisions(adapter, seed)
    directory.mkdir()
    write_harmonized_adapter(adapter, retained, gain, directory)
    return directory


def weights_of(base, adapters):
    weights = CheckpointWeights(base, adapters=adapters)
    return {name: weights.tensor(name) for name in weights.model.state_dict()}


def assert_same_weights(ours, theirs):
    for name, value in theirs.items():
        assert_equal_to_rounding(ours[name], value, name)


def first_batch(model):
    batch = tiny_models.batches(model, 1)[0]
    dtype = next(model.parameters()).dtype
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def assert_same_outputs(ours, theirs, dtype):
    """fp32: 1e-5 of the largest logit. bf16: merged weights are rounded, scaled inputs are, so a few 2**-8."""
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else 0.02), float(error)
