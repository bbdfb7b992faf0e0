"""Grams of a checkpoint on disk: from a model, adapters and samples to a Gram file."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from hpa_ext.calibrating.batches import calibration_batches
from hpa_ext.calibrating.layers import calibrate_layers
from hpa_ext.calibrating.loading import LoadableModel, missing_tensors
from hpa_ext.calibrating.run import Batches, CalibrationRun, in_device_memory, without_head
from hpa_ext.calibrating.store import GramStore
from hpa_ext.calibrating.whole import calibrate_whole
from hpa_ext.checkpoints.gram_file import GramFile, check_gram_path, check_reduce
from hpa_ext.checkpoints.gram_writer import header_room
from hpa_ext.checkpoints.identity import identity, refuse_difference
from hpa_ext.checkpoints.output import partial_directory
from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.data.encoding import ConversationEncoder
from hpa_ext.model_calls import head_names
from hpa_ext.models.decoder_layers import decoder_layers
from hpa_ext.models.linears import find_linears
from hpa_ext.processes import Processes
from hpa_ext.token_masks import TokenMask, resolve

MODES = ("auto", "whole", "layers")

# Of the free memory, what a whole model with the Grams of one layer may take, and what Grams may take beside it.
_WHOLE_SHARE = 0.7
_GRAM_SHARE = 0.25


def calibrate_checkpoint(
    model: str | os.PathLike[str],
    samples: Any,
    out: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]] = (),
    *,
    modules: str | Iterable[str] | None = None,
    mode: str = "auto",
    token_mask: TokenMask | None = "attended",
    batch_size: int = 1,
    reduce: str | None = None,
    damping: float = 0.01,
    processor: Any = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    gram_memory: int | None = None,
    resume: bool = False,
    progress: bool = True,
) -> GramFile:
    """Write the Grams of a model on disk, with LoRA adapters if given, over samples.

    Args:
        model: directory of a checkpoint in safetensors; nothing else is loaded from it but its configuration and, by
            default, its processor.
        samples: a `ConversationSet` from `load_conversations`, a sequence of `Conversation` or `Sample`, or a sequence
            of ready batches (mappings of model inputs).
        out: the Gram file, ending in ``.safetensors``, which must not exist; read it with `GramFile`.
        adapters: directories of PEFT LoRA adapters, applied in order.
        modules: a regular expression that must match a whole module name, or names; None for every linear of the
            language model's decoder.
        mode: "whole" loads the model onto the device and runs it as often as `gram_memory` asks for; "layers" holds one
            decoder layer at a time and keeps hidden states in files beside the output; "auto" takes the first if the
            model and a layer's Grams fit into 70 % of the free memory. Both give the same Grams.
        token_mask: which tokens count, see `calibrate`. "prompt", "response" and functions get labels.
        batch_size: conversations a batch. With 1 there is no padding.
        reduce: None writes Grams, "diagonal" the diagonals of their inverses, which is all that HPA needs: megabytes
            instead of gigabytes.
        damping: of the inverses; HPA must then be run with the same.
        processor: of samples that are not batches; None for the checkpoint's own. Images and text go through its chat
            template.
        device, dtype: where and in what precision the model runs; the dtype on disk if None.
        gram_memory: "whole" mode: bytes for Grams in a pass; a quarter of the free memory if None.
        resume: go on with a calibration that was interrupted. Everything but `mode`, `gram_memory` and `progress` must
            be the same; otherwise the differences are listed.
        progress: show a bar when stderr is a terminal.

    Returns:
        The Gram file, opened.

    Raises:
        ValueError, TypeError: an argument is off, a sample does not fit, or the model cannot be run in this mode.
        CheckpointError: the model or an adapter is broken; or `resume` with something else than before.
        NumericalError: an activation is not finite, or a Gram cannot be factored; `module` names where.
        OSError: a file is absent, there already, or cannot be written.
        RuntimeError: another process of torch.distributed failed; says which, and with what.

    Under torch.distributed every process takes every n-th batch, and the Grams are summed once for each: equal to one
    process up to the rounding of float32 sums. `out` must then be on a filesystem that all of them see.

    Until it is finished everything lies in ``<out>.partial``, and stays there if the run is interrupted.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected an int of at least 1, got {batch_size!r}")
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected None, float32, float16 or bfloat16, got {dtype!r}")
    if gram_memory is not None and gram_memory < 1:
        raise ValueError(f"gram_memory: expected bytes, at least 1, got {gram_memory!r}")
    form = check_reduce(reduce)
    path = check_gram_path(out)
    select_tokens = resolve(token_mask)
    processes = Processes.current()
    with_labels = token_mask in ("prompt", "response") or callable(token_mask)

    def prepare() -> tuple[CheckpointWeights, LoadableModel, Batches, dict[str, Any]]:
        weights = CheckpointWeights(model, [Path(adapter) for adapter in adapters])
        encoder = None if _are_batches(samples) else ConversationEncoder(processor or load_processor(model))
        batches, data = calibration_batches(samples, encoder, batch_size, with_labels, _most_tokens(weights))
        loadable = LoadableModel(weights, torch.device(device), dtype)
        return weights, loadable, batches, data

    weights, loadable, batches, data = processes.together(prepare)
    linears = find_linears(loadable.module, modules)
    mode = _choose_mode(mode, loadable, list(linears))
    head = head_names(loadable.module, linears)
    missing_tensors(weights, (lambda name: True) if head else without_head(loadable.module))
    inputs = {"model": weights.reader.fingerprint(), "adapters": [one.fingerprint() for one in weights.adapters]}
    settings = {
        "data": {key: value for key, value in data.items() if key != "ids"},
        "modules": _digest_of_names(list(linears)),
        "token_mask": _mask_name(token_mask),
        "batch_size": batch_size,
        "form": form,
        "damping": float(damping) if form == "inverse_diagonal" else None,
        "dtype": str(loadable.dtype),
        "device": torch.device(device).type,
        "processes": processes.count,
    }
    whole_identity = processes.gather(identity("grams", inputs, settings))[0]
    provenance = {**whole_identity, "ids": data.get("ids")}
    if resume and processes.once(lambda: _is_finished(path, whole_identity)):
        return GramFile(path)
    room = header_room(linears, provenance)
    with GramStore(path, whole_identity, form, damping, room, resume, processes) as store:
        run = CalibrationRun(
            model=loadable,
            linears=linears,
            head=head,
            batches=batches,
            select_tokens=select_tokens,
            processes=processes,
            store=store,
            progress=progress,
        )
        if mode == "layers":
            calibrate_layers(run)
        else:
            available = processes.gather(gram_memory or int(_GRAM_SHARE * in_device_memory(loadable.device)))
            calibrate_whole(run, min(available))
        store.finish(provenance)
    weights.close()
    return GramFile(path)


def load_processor(model: str | os.PathLike[str]) -> Any:
    """The processor that lies with a checkpoint, or for text alone its tokenizer. Nothing is downloaded.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"processor: none can be loaded from {model} ({error}); give the directory of one that fits the model"
        ) from error


def _are_batches(samples: Any) -> bool:
    return isinstance(samples, Sequence) and len(samples) > 0 and hasattr(samples[0], "keys")


def _most_tokens(weights: CheckpointWeights) -> int | None:
    text = weights.model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def _choose_mode(mode: str, model: LoadableModel, names: list[str]) -> str:
    if mode != "auto":
        return mode
    try:
        list_name, layers = decoder_layers(model.module)
    except ValueError:
        return "whole"
    if not all(name.startswith(f"{list_name}.") for name in names):
        return "whole"
    widths = [model.module.get_submodule(name).weight.shape[-1] for name in names]
    grams = 4 * sum(width * width for width in widths) // len(layers)
    return "whole" if model.nbytes() + grams < _WHOLE_SHARE * in_device_memory(model.device) else "layers"


def _digest_of_names(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _mask_name(token_mask: TokenMask | None) -> str:
    """A function is known by its name only."""
    if callable(token_mask):
        return f"{getattr(token_mask, '__module__', '')}.{getattr(token_mask, '__qualname__', repr(token_mask))}"
    return str(token_mask)


def _is_finished(path: Path, expected: dict[str, Any]) -> bool:
    """Whether an earlier run has published this output already; clears what it may have left."""
    if not path.exists():
        return False
    with GramFile(path) as stored:
        found = {key: value for key, value in stored.provenance.items() if key != "ids"}
    refuse_difference(found, expected, str(path))
    directory = partial_directory(path)
    if directory.exists():
        shutil.rmtree(directory)
    return True
