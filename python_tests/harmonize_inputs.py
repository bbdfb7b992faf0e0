"""A tuned tiny model on disk with everything that `harmonize_checkpoint` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
import torch

import hpa_ext
from hpa_ext.checkpoints.gram_file import save_grams
from hpa_ext.gram import GramCollection

DECODER = r".*(language_model|layers|h)\.\d*.*(q_proj|v_proj|down_proj|c_attn|c_fc)"


@dataclass
class Inputs:
    """Directories and files, and the models in memory that they were saved from."""

    old: Path
    new: Path
    adapter: Path
    safety: Path
    task: Path
    models: dict[str, Any]
    grams: dict[str, GramCollection]

    def arguments(self, new: str = "new") -> dict[str, Path]:
        return {"old": self.old, "new": getattr(self, new), "safety": self.safety, "task": self.task}


def make_inputs(root: Path, make=tiny_models.llava, dtype=torch.bfloat16, shard="100KB", **lora) -> Inputs:
    """Save the model before and after, and an adapter; calibrate on random batches."""
    old = make().to(dtype)
    new = tiny_models.tuned(make().to(dtype))
    adapted = tiny_models.with_lora(make().to(dtype), lora.pop("targets", DECODER), **lora)
    old.save_pretrained(root / "old", max_shard_size=shard)
    new.save_pretrained(root / "new", max_shard_size=shard)
    adapted.save_pretrained(root / "adapter")
    safety = hpa_ext.calibrate(old, tiny_models.batches(old), progress=False)
    task = hpa_ext.calibrate(new, tiny_models.batches(old, seed=5), progress=False)
    save_grams(safety, root / "safety.safetensors")
    save_grams(task, root / "task.safetensors")
    (root / "old" / "tokenizer.json").write_text("{}")
    (root / "old" / "optimizer.pt").write_bytes(b"not to be copied")
    return Inputs(
        root / "old", root / "new", root / "adapter", root / "safety.safetensors", root / "task.safetensors",
        {"old": old, "new": new, "adapted": adapted}, {"safety": safety, "task": task},
    )  # fmt: skip
