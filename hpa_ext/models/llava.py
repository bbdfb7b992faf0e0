"""LLaVA: the generations of its tensor names, and the original repository's configuration in transformers' terms."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# What a name on disk may start with, and the name in transformers' class today. A name goes through all of a list.
# Hugging Face before 4.52 kept three models side by side; today all but the head lies under `model`.
HUGGING_FACE_NAMES = (
    (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^model\.language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector|language_model)\.", r"model.\1."),
    (r"^image_newline$", "model.image_newline"),
)
# haotian-liu/LLaVA derives its class from LlamaModel, so the language model has no name of its own there.
ORIGINAL_NAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
)

_ORIGINAL_ARCHITECTURES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
}
# Keys of the original configuration that are not of the language model.
_ORIGINAL_ONLY = re.compile(
    r"^(mm_.*|.*_mm_.*|image_(aspect_ratio|grid_pinpoints|crop_resolution|split_resolution)|unfreeze_mm_vision_tower|"
    r"freeze_mm_.*|use_mm_proj|tokenizer_.*|pretrain_.*|architectures|model_type|_name_or_path|auto_map|"
    r"transformers_version)$"
)
_CLIP_LARGE = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
_VISION_TOWERS = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}


def is_original(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` was written by the original LLaVA repository, and not by transformers."""
    return architecture(config) in _ORIGINAL_ARCHITECTURES


def architecture(config: dict[str, Any]) -> str | None:
    """The first entry of ``architectures``, None if there is none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def from_original(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The configuration of transformers' LLaVA that holds the same tensors as an original LLaVA's ``config.json``.

    Args:
        config: the parsed file; ``is_original(config)`` must hold.
        directory: where it lies; a relative ``mm_vision_tower`` that names a folder is looked up from here.

    The vision tower's sizes come from ``mm_vision_tower``: CLIP ViT-L/14 at 224 or 336 pixels by name, anything else by
    the ``config.json`` of the local folder that it names. ``image_token_index`` becomes the first id that the
    embedding does not have: the original keeps its placeholder (-200) out of the vocabulary as well.

    Raises:
        ValueError: a projector other than ``mlp2x_gelu``, an unknown vision tower, or image tokens that transformers'
            class has no tensors for.
    """
    projector = config.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise ValueError(
            f"config.json: mm_projector_type {projector!r} has no counterpart in transformers' LLaVA; "
            "expected 'mlp2x_gelu' (LLaVA-1.5 and 1.6)"
        )
    if config.get("mm_use_im_start_end") or config.get("mm_use_im_patch_token"):
        raise ValueError(
            "config.json: mm_use_im_start_end and mm_use_im_patch_token mark images with tokens of their own, "
            "which transformers' LLaVA does not; only checkpoints with both false are understood"
        )
    kind = _ORIGINAL_ARCHITECTURES[str(architecture(config))]
    text = {key: value for key, value in config.items() if not _ORIGINAL_ONLY.match(key)}
    spatial = str(config.get("mm_patch_merge_type", "flat")).startswith("spatial")
    select = {"patch": "default", "cls_patch": "full"}[config.get("mm_vision_select_feature", "patch")]
    result = {
        "model_type": "llava_next" if spatial else "llava",
        "architectures": ["LlavaNextForConditionalGeneration" if spatial else "LlavaForConditionalGeneration"],
        "text_config": {**text, "model_type": kind},
        "vision_config": _vision_config(str(config.get("mm_vision_tower")), directory),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": select,
        "image_token_index": config.get("vocab_size", 32000),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }
    if spatial and "image_grid_pinpoints" in config:
        result["image_grid_pinpoints"] = config["image_grid_pinpoints"]
    for key in ("torch_dtype", "dtype"):
        if config.get(key) is not None:
            result["dtype"] = config[key]
    return result


def _vision_config(tower: str, directory: Path) -> dict[str, Any]:
    if tower in _VISION_TOWERS:
        return dict(_VISION_TOWERS[tower])
    path = directory / tower / "config.json"  # an absolute tower replaces the directory
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"config.json: mm_vision_tower {tower!r} is neither one of {', '.join(sorted(_VISION_TOWERS))} nor a local "
            "folder with the vision tower's config.json"
        ) from None
    found = found.get("vision_config", found)
    return {**found, "model_type": "clip_vision_model" if found.get("model_type") == "clip" else found["model_type"]}
