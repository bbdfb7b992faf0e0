"""Several adapters as one: ``((W g1 + s1 B1 A1) g2 + s2 B2 A2)`` is ``W g1 g2 + [s1 B1, s2 B2] [A1 * g2; A2]``."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.checkpoints.adapter import EXTRA_FILE, WEIGHTS_FILE, LoraAdapter
from hpa_ext.checkpoints.adapter_config import CONFIG_FILE, read_adapter_config
from hpa_ext.checkpoints.adapter_keys import PREFIX
from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import write_atomically
from hpa_ext.checkpoints.gain_file import GAIN_FILE, GAIN_MARK, gain_bytes, sha256_of
from hpa_ext.checkpoints.harmonized_adapter import new_adapter_directory
from hpa_ext.checkpoints.identity import identity
from hpa_ext.checkpoints.shard_plan import ShardPlan
from hpa_ext.checkpoints.writer import ShardedWriter
from hpa_ext.models.layer_sizes import LayerSizes
from hpa_ext.models.skeleton import skeleton

_BIAS_ORDER = ("none", "lora_only", "all")


def compose_adapters(
    adapters: Sequence[str | Path], out: str | Path, base: str | Path | nn.Module | None = None
) -> Path:
    """Write one adapter that does what several do in order, each trained on the model with the ones before it merged.

    Exact but for float32 rounding of ``A * g`` and ``s B``. The ranks add up; scaling is 1; tensors are float32, under
    the names of today's transformers class. Without any gain among them the result is plain LoRA.

    Args:
        adapters: directories of LoRA adapters, plain or harmonized, the first step first.
        out: directory to make; must not exist, or be empty.
        base: the model that they belong to, or its directory, of which ``config.json`` alone is read. None: the
            directory that the first ``adapter_config.json`` names as ``base_model_name_or_path``.

    Returns:
        `out`.

    Raises:
        ValueError: no adapters, or no base.
        CheckpointError: an adapter with DoRA or ``lora_bias``, or one that replaces the weight of a module on which one
            has a LoRA: their composition is no LoRA.
        OSError: `out` holds something, or a file cannot be read or written.
    """
    if isinstance(adapters, (str, Path)) or not adapters:
        raise ValueError(f"adapters: expected one or more directories, got {adapters!r}")
    paths = [Path(adapter) for adapter in adapters]
    model = base if isinstance(base, nn.Module) else skeleton(_base_directory(paths[0]) if base is None else base)
    opened = [LoraAdapter(path, model) for path in paths]
    try:
        for adapter in opened:
            _refuse(adapter, opened)
        fingerprints = {str(i): adapter.fingerprint() for i, adapter in enumerate(opened)}
        with new_adapter_directory(out, identity("adapter", {"adapters": fingerprints}, {}), paths) as directory:
            write_composed(opened, directory)
    finally:
        for adapter in opened:
            adapter.close()
    return Path(out)


def write_composed(adapters: Sequence[LoraAdapter], directory: Path) -> None:
    """Write the files of the composition into a directory that exists; see `compose_adapters`."""
    modules = list(dict.fromkeys(name for adapter in adapters for name in adapter.updates))
    gain = {name: value for name in modules if (value := _product(adapters, name)) is not None}
    replaced = {name: adapter for adapter in adapters for name in adapter.replaced}
    ranks = {name: sum(_rank(adapter, name) for adapter in adapters) for name in modules}
    planned: list[tuple[str, str, Sequence[int]]] = []
    for name in modules:
        sizes = next(adapter.sizes[name] for adapter in adapters if name in adapter.sizes)
        for key, shape in zip(_keys(adapters, name), _shapes(sizes, ranks[name]), strict=True):
            planned.append((key, "F32", shape))
    beside: list[tuple[str, str, Sequence[int]]] = []
    for name, adapter in replaced.items():
        entry = adapter.replaced_entry(name)
        (beside if name in adapter.extra else planned).append(
            (_replaced_key(name, ranks), entry.dtype_tag, entry.shape)
        )
    contents = gain_bytes(gain)
    mark = {GAIN_MARK: sha256_of(contents)} if gain else {}
    plans = [ShardPlan.sorted(WEIGHTS_FILE, {"format": "pt", **mark}, planned)]
    plans += [ShardPlan.sorted(EXTRA_FILE, {"format": "pt"}, beside)] if beside else []
    with ShardedWriter(directory, plans) as writer:
        writer.create(replace=True)
        for name in modules:
            for key, factor in zip(_keys(adapters, name), _factors(adapters, name), strict=True):
                writer.write(key, factor)
        for name, adapter in replaced.items():
            writer.write(_replaced_key(name, ranks), adapter.replaced[name])
        writer.finish()
    config = _config(adapters, ranks)
    write_atomically(directory / CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("utf-8"))
    if gain:
        write_atomically(directory / GAIN_FILE, contents)


def _product(adapters: Sequence[LoraAdapter], name: str) -> Tensor | None:
    """The gain that all steps together have on a module's columns, float32; None without any."""
    gains = [adapter.gain[name].double() for adapter in adapters if name in adapter.gain]
    return torch.stack(gains).prod(0).float() if gains else None


def _factors(adapters: Sequence[LoraAdapter], name: str) -> tuple[Tensor, Tensor]:
    """``[A1 * g2 * g3 ...; A2 * g3 ...; ...]`` and ``[s1 B1, s2 B2, ...]``, float32, rounded once."""
    rows, columns = [], []
    for place, adapter in enumerate(adapters):
        if name not in adapter.updates:
            continue
        update = adapter.updates[name]
        later = _product(adapters[place + 1 :], name)
        a = update.a.double() if later is None else update.a.double() * later.double()
        rows.append(a.float())
        columns.append((update.b.double() * update.scaling).float())
    return torch.cat(rows), torch.cat(columns, dim=1).contiguous()


def _rank(adapter: LoraAdapter, name: str) -> int:
    return adapter.entries(name)["a"].shape[0] if name in adapter.updates else 0


def _keys(adapters: Sequence[LoraAdapter], name: str) -> tuple[str, str]:
    entry = next(adapter.entries(name)["a"] for adapter in adapters if name in adapter.updates)
    if "lora_embedding" in entry.name:
        return f"{PREFIX}{name}.lora_embedding_A", f"{PREFIX}{name}.lora_embedding_B"
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def _replaced_key(name: str, modules: Collection[str]) -> str:
    """PEFT's key of a parameter; one of a layer with a LoRA is that of the layer inside."""
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in modules else PREFIX + name


def _shapes(sizes: LayerSizes, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (rank, sizes.in_features), (sizes.out_features, rank)


def _config(adapters: Sequence[LoraAdapter], ranks: dict[str, int]) -> dict[str, Any]:
    """That of the last step, with the ranks and modules of the composition spelled out and scaling 1."""
    config = dict(adapters[-1].config)
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    unusual = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    saved = {name for adapter in adapters for name in adapter.config.get("modules_to_save") or ()}
    bias = max((adapter.config.get("bias", "none") for adapter in adapters), key=_BIAS_ORDER.index)
    config.update(
        r=usual, lora_alpha=usual, use_rslora=False, rank_pattern=unusual, alpha_pattern=dict(unusual), bias=bias,
        target_modules=list(ranks), exclude_modules=None, layers_to_transform=None, layers_pattern=None,
        modules_to_save=sorted(saved) or None, init_lora_weights=True,
    )  # fmt: skip
    return config


def _refuse(adapter: LoraAdapter, others: Sequence[LoraAdapter]) -> None:
    if adapter.is_dora:
        raise CheckpointError(f"{adapter.directory}: DoRA's update is not s B A, so it cannot be composed")
    if adapter.config.get("lora_bias"):
        raise CheckpointError(f"{adapter.directory}: lora_bias cannot be composed")
    for name in adapter.replaced:
        module, _, leaf = name.rpartition(".")
        other = next((one for one in others if leaf == "weight" and module in one.updates), None)
        if other is not None:
            raise CheckpointError(
                f"{adapter.directory}: replaces {name}, on which {other.directory} has a LoRA; their composition is no "
                "LoRA. Merge the steps into a checkpoint instead (an embedding that PEFT saved along with its LoRA is "
                "left out by save_pretrained(..., save_embedding_layers=False))"
            )


def _base_directory(adapter: Path) -> Path:
    named = read_adapter_config(adapter).get("base_model_name_or_path")
    if not named or not (Path(named) / "config.json").is_file():
        raise ValueError(
            f"base: {adapter / CONFIG_FILE} names {named!r} as the base model, which is no directory with a "
            "config.json here; pass the directory of the base model"
        )
    return Path(named)
