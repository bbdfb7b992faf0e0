"""Grams of a running model: hooks on its linears, filled by calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hpa_ext.agreement import Agreement
from hpa_ext.gram import GramCollection
from hpa_ext.gram_collector import GramCollector
from hpa_ext.model_calls import evaluating, forward_options, head_names, model_inputs
from hpa_ext.models.linears import find_linears
from hpa_ext.models.sharding import reshard
from hpa_ext.models.structure import decoder_name, unwrap, without_data_parallel
from hpa_ext.token_masks import TokenMask, check_mask, resolve


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    modules: str | Iterable[str] | None = None,
    token_mask: TokenMask | None = "attended",
    progress: bool = True,
) -> GramCollection:
    """Run the batches through the model and accumulate the Gram of every linear's input.

    Args:
        model: a transformers model, a PeftModel around one, or any ``nn.Module``. Runs in evaluation mode without
            gradients or a cache; its mode is restored.
        batches: an iterable of model inputs, such as a DataLoader: mappings (processor output; `labels` are used for
            the token mask and not given to the model), tensors or tuples (positional arguments). Moved to the model's
            device.
        modules: a regular expression that must match a whole module name, or names; None for every linear of the
            language model's decoder.
        token_mask: which tokens count. "attended" (default: no padding), "all", "prompt" (attended, without label),
            "image" (positions of image features), "response" (attended, with label), or a function of the batch that
            returns bool ``[batch, tokens]``. Outside the decoder and the output head (a vision tower) every row counts.
        progress: show a bar when stderr is a terminal.

    Returns:
        ``{module name: Gram}`` in the model's order, keyed by the name in the plain transformers model. Linears that
        receive the same tensor (q/k/v; gate/up) share one Gram object; `GramCollection.merge_` and `all_reduce_` count
        it once. The Grams are where the activations were.

    Raises:
        TypeError, ValueError: no batch; a batch or mask does not fit; nothing matches `modules`.
        NumericalError: an activation is not finite; `module` names where.

    Hooks are removed whatever happens.

    Under DistributedDataParallel or FSDP2 each process is given its own batches and has then counted those;
    ``grams.all_reduce_()`` adds them up. Every process of a sharded model must call this, as the model's forward
    gathers its weights; the processes agree before each batch, so one with fewer batches runs its last one again,
    uncounted, until the others are done, and what is wrong with a batch on one raises on all.
    """
    select_tokens = resolve(token_mask)
    if not isinstance(batches, Iterable) or isinstance(batches, (str, Mapping, Tensor)):
        raise TypeError(
            f"batches: expected an iterable of batches (for one, a list of it), got {type(batches).__name__}"
        )
    linears = find_linears(model, modules)
    reshard(model)
    processes = Agreement.of_model(model)
    plain, model = unwrap(model), without_data_parallel(model)
    head = head_names(plain, linears)
    collector = GramCollector(linears, decoder_name(plain), head)
    options = forward_options(plain, all_logits=bool(head))
    device = next((p.device for p in plain.parameters()), torch.device("cpu"))
    waiting = iter(tqdm(batches, desc="calibrate", unit="batch", leave=False, disable=None if progress else True))
    call = None
    # Tensors of inference mode have no version, by which a change in place is seen.
    with _resharded(model), evaluating(model), collector.hooked(), torch.inference_mode(False), torch.no_grad():
        while True:
            with processes.together():
                batch = next(waiting, None)
                mine = batch is not None
                if mine:
                    arguments, keywords = model_inputs(batch, device)
                    mask = check_mask(select_tokens(keywords, plain)) if keywords else _mask_without_names(token_mask)
                    keywords.pop("labels", None)
                    call = arguments, {**keywords, **options}
                elif call is None:
                    raise ValueError("batches: expected at least one batch, got none")
            if processes.highest([mine]) == [0]:
                break
            with collector.noting(mask) if mine else nullcontext():
                model(*call[0], **call[1])
            with processes.together():
                collector.check()
    return collector.grams()


@contextmanager
def _resharded(model: nn.Module) -> Iterator[None]:
    """After the context an FSDP2 model holds its shards, of the root too: an optimizer made then finds these."""
    try:
        yield
    finally:
        reshard(model)


def _mask_without_names(token_mask: TokenMask | None) -> None:
    """A batch of positional arguments has no attention_mask or labels to make a mask from."""
    if token_mask not in (None, "all", "attended"):
        raise ValueError(f"token_mask: {token_mask!r} needs batches that are mappings with names")
