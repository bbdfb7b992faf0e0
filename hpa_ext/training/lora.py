"""LoRA by PEFT on the linears of the language model, and on nothing else."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model

# By regex: a list of names such as "q_proj", and "all-linear" too, would also hit the vision tower.
LANGUAGE_LINEARS = r".*language_model\.(model\.)?layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"


def add_lora(
    model: torch.nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    seed: int = 0,
    targets: str = LANGUAGE_LINEARS,
) -> PeftModel:
    """Put a LoRA of ``rank`` and scaling ``alpha / rank`` on the modules whose full name matches the regex ``targets``.

    Wraps ``model`` itself (no copy) and freezes all but the adapter. ``seed`` decides the initial A; B starts at
    zero, so outputs do not change yet. ValueError when no module matches (from PEFT) or ``rank`` is not positive.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)
