"""The first tuning step, which is the same for every method that leaves it plain, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hpa_ext.baselines.tuning_step import lora_factors

from .data import SequenceData


class FirstStep:
    """Reads and writes the adapter after the first step of a sequence, under a name that its settings decide."""

    def __init__(self, directory: Path, data: SequenceData) -> None:
        settings = {**data.settings.to_dict(), "steps": None}  # how many steps follow does not matter
        identity = [data.seed, data.condition, data.order, settings]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = directory / f"first-step-{data.seed}-{data.condition}-{data.order}-{digest}.safetensors"

    def load(self, model: nn.Module) -> dict[str, Any] | None:
        """Fill the model's fresh LoRA; what training reported, or None if nothing is kept."""
        if not self.path.is_file():
            return None
        with safe_open(self.path, "pt") as file, torch.no_grad():
            for name, factors in lora_factors(model):
                factors.a.copy_(file.get_tensor(f"{name}.a"))
                factors.b.copy_(file.get_tensor(f"{name}.b"))
            return json.loads(file.metadata()["training"])

    def save(self, model: nn.Module, training: dict[str, Any]) -> None:
        """Keep the model's LoRA and what training reported."""
        tensors = {}
        for name, factors in lora_factors(model):
            tensors[f"{name}.a"] = factors.a.detach().contiguous()
            tensors[f"{name}.b"] = factors.b.detach().contiguous()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, unfinished, metadata={"training": json.dumps(training)})
        unfinished.replace(self.path)
