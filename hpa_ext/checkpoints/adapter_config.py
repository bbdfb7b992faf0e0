"""The options of a LoRA adapter: which are honoured, which change nothing here, and which are refused by name."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import read_json

CONFIG_FILE = "adapter_config.json"

_HONOURED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias",
    "init_lora_weights", "ensure_weight_tying", "modules_to_save", "bias",
}  # fmt: skip
# They decide which modules were tuned and how, and the names and shapes of the tensors say that already.
_WITHOUT_EFFECT = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size",
}  # fmt: skip
_REASONS = {
    "target_parameters": "it tunes parameters that are not weights of linear modules",
    "layer_replication": "the tuned model has more layers than the base model",
    "alora_invocation_tokens": "it acts on some tokens only, so that there is no tuned weight",
    "arrow_config": "it chooses among adapters for each token, so that there is no tuned weight",
    "trainable_token_indices": "it tunes single rows of the embedding",
    "use_qalora": "its A acts on groups of columns",
    "use_bdlora": "its factors are block diagonal",
}
# What these subtract from the base weights is in neither the adapter nor the base checkpoint.
_CHANGED_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "lora-ga")
_INITIALISATIONS = ("true", "false", "gaussian", "eva", "orthogonal")


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The parsed ``adapter_config.json`` of a LoRA adapter whose options are all understood.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is another kind of adapter, or has an option that is refused or unknown.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the directory of a PEFT adapter")
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}; expected 'LORA', the only kind that is understood")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGED_THE_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changed the base weights too; save "
            "it as plain LoRA with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if start not in _INITIALISATIONS:
        raise CheckpointError(f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which is not understood")
    for key, value in config.items():
        if key in _HONOURED or key in _WITHOUT_EFFECT or value in (None, False, [], {}, "", 0):
            continue
        reason = _REASONS.get(key, "it is not known here, and may change what the tensors mean")
        raise CheckpointError(f"{path}: {key} is {value!r}, which is refused: {reason}")
    for key in ("r", "lora_alpha"):
        value = config.get(key, 8)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise CheckpointError(f"{path}: {key}: expected a positive number, got {value!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(path, key, config.get(key) or {})
    return config


def rank_of(config: dict[str, Any], module: str) -> int:
    """The rank that the configuration gives a module, called as in the tuned model."""
    return int(_lookup(config, "rank_pattern", module, config.get("r", 8)))


def scaling_of(config: dict[str, Any], module: str) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora`` (Kalajdzievski, 2023); `module` as in `rank_of`."""
    rank = rank_of(config, module)
    alpha = float(_lookup(config, "alpha_pattern", module, config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _lookup(config: dict[str, Any], key: str, module: str, default: float) -> float:
    """PEFT's rule: the first pattern, in the file's order, that matches the end of the name from a dot on."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_pattern(path: Path, key: str, patterns: object) -> None:
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {key}: expected an object, got {type(patterns).__name__}")
    for pattern, value in patterns.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise CheckpointError(f"{path}: {key}[{pattern!r}]: expected a positive number, got {value!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{path}: {key}: {pattern!r} is not a regular expression ({error})") from error
