"""Random models, adapters and Gram files of any width and depth, for measuring how cost grows with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from .checkpoint_at_scale import _write_weights

PREFIX = "model.language_model.layers"
VOCABULARY = 256


@dataclass(frozen=True)
class Inputs:
    """Paths of one step's inputs: two checkpoints, adapters by rank, and full Grams of both sets."""

    old: Path
    new: Path
    adapters: dict[int, Path]
    safety: Path
    task: Path


def linears(width: int) -> dict[str, tuple[int, int, str]]:
    """``{name within a layer: (out, in, which of its inputs)}`` of a Llama-like decoder layer."""
    inner = inner_width(width)
    sizes = {name: (width, width, "attention") for name in ("q_proj", "k_proj", "v_proj")}
    attention = {f"self_attn.{name}": value for name, value in sizes.items()}
    return attention | {
        "self_attn.o_proj": (width, width, "o"),
        "mlp.gate_proj": (inner, width, "mlp"),
        "mlp.up_proj": (inner, width, "mlp"),
        "mlp.down_proj": (width, inner, "down"),
    }


def inner_width(width: int) -> int:
    """Of the MLP: 8/3 of the width, to the next multiple of 64."""
    return -(-8 * width // 3 // 64) * 64


def make_inputs(directory: Path, width: int, layers: int, ranks: tuple[int, ...] = ()) -> Inputs:
    """Write a bfloat16 model, a tuned one, adapters on all linears of the decoder, and two files of full Grams."""
    directory.mkdir(parents=True)
    old, new = directory / "old", directory / "new"
    for path, update in ((old, False), (new, True)):
        _write_config(path, width, layers)
        _write_weights(path, seed=0, update=update, drawn=1 << 18)
    adapters = {rank: directory / f"adapter-{rank}" for rank in ranks}
    for rank, path in adapters.items():
        _write_adapter(path, width, layers, rank)
    grams = [directory / f"{name}.safetensors" for name in ("safety", "task")]
    for seed, path in enumerate(grams):
        _write_grams(path, width, layers, seed)
    return Inputs(old, new, adapters, *grams)


def _write_config(directory: Path, width: int, layers: int) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=64,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=inner_width(width), num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )  # fmt: skip
    LlavaConfig(
        vision_config=vision, text_config=text, architectures=["LlavaForConditionalGeneration"], image_token_index=255
    ).save_pretrained(directory)


def _write_adapter(directory: Path, width: int, layers: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns, _) in linears(width).items():
            key = f"base_model.model.{PREFIX}.{layer}.{name}"
            a = torch.randn(rank, columns, generator=generator) / columns**0.5
            tensors[f"{key}.lora_A.weight"] = a.bfloat16()
            tensors[f"{key}.lora_B.weight"] = (0.02 * torch.randn(rows, rank, generator=generator)).bfloat16()
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": r".*language_model.*_proj"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def _write_grams(path: Path, width: int, layers: int, seed: int) -> None:
    """Of random tokens, a quarter as many as features; one of each width, for their numbers do not matter."""
    from hpa_ext import Gram
    from hpa_ext.checkpoints.gram_writer import GramWriter, header_room

    generator = torch.Generator().manual_seed(100 + seed)
    groups: dict[str, list[str]] = {}
    for layer in range(layers):
        for name, (_, _, key) in linears(width).items():
            groups.setdefault(f"{layer} {key}", []).append(f"{PREFIX}.{layer}.{name}")
    provenance = {"made": "at random"}
    made: dict[int, Gram] = {}
    room = header_room([name for names in groups.values() for name in names], provenance)
    with GramWriter(path, "triangle", room) as writer:
        for key, names in groups.items():
            size = inner_width(width) if key.endswith("down") else width
            if size not in made:
                tokens = torch.randn(size // 4, size, generator=generator) * torch.logspace(0, -1.5, size)
                made[size] = Gram(size).update(tokens)
            writer.add(names, made[size])
        writer.finish(provenance)
