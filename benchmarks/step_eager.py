"""The peer of the step as a whole: HPA as a competent user writes it in eager torch, after llm-compressor and its like.

What it is given, so that the comparison is fair: the same models, prompts, batches and forward (bfloat16, no cache, one
position's logits); in-place sums and dampings, Grams freed one by one, one set of Grams at a time; column sums of the
squared update before they are divided, rather than a score for each element; no masks, since no prompt is padded. What
it does as its models do: a hook on each of the linears that casts its input to float32 and adds the full square of
``x^T x``, so that q/k/v and gate/up count the same input anew; cholesky, cholesky_inverse, and the diagonal of that;
float32 temporaries of each weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

import hpa_ext
from hpa_ext.model_calls import forward_options

from .step_clock import StepClock
from .step_model import layer_of

Linears = dict[str, nn.Linear]


def eager_step(
    old: nn.Module,
    new: nn.Module,
    safety: Sequence[Mapping[str, Tensor]],
    task: Sequence[Mapping[str, Tensor]],
    config: hpa_ext.HPAConfig,
    clock: StepClock,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """HPA of `new` in place with Algorithm 1 of HPA; the retained columns by module name, on the host.

    Args:
        config: damping, bounds of alpha and percentages; everything else as the paper has it.
        dtype: of Grams, factorisations, scores and of the merge before it is rounded; float64 for a reference.
    """
    olds, news = decoder_linears(old), decoder_linears(new)
    with torch.no_grad(), ExitStack() as stack:
        for model in (old, new):
            stack.enter_context(clock.decoder_layers(model))
        stack.enter_context(clock.whole())
        diagonals = []
        for model, linears, batches in ((old, olds, safety), (new, news, task)):
            with clock.span("forward"):
                grams, tokens = _grams(model, linears, batches, clock, dtype)
            diagonals.append(_inverse_diagonals(grams, tokens, config, clock))
        retained = {}
        for name, linear in olds.items():
            depth = (layer_of(name) + 1) / clock.layers
            inverses = [found[name] for found in diagonals]
            retained[name] = _merge(linear.weight, news[name].weight, inverses, depth, layer_of(name), config, clock)
    return {name: mask.cpu() for name, mask in retained.items()}


def decoder_linears(model: nn.Module) -> Linears:
    """The linears of the language model's layers by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".language_model.layers." in f".{name}"
    }


def _grams(
    model: nn.Module, linears: Linears, batches: Sequence[Mapping[str, Tensor]], clock: StepClock, dtype: torch.dtype
) -> tuple[dict[str, Tensor], int]:
    """``sum x^T x`` by linear, and the tokens of the batches."""
    device = next(model.parameters()).device
    grams = {
        name: torch.zeros(linear.in_features, linear.in_features, dtype=dtype, device=device)
        for name, linear in linears.items()
    }
    options, tokens = forward_options(model, all_logits=False), 0
    with _hooks(linears, grams, clock, dtype):
        for batch in batches:
            model(**{key: value.to(device) for key, value in batch.items()}, **options)
            tokens += batch["input_ids"].numel()
    return grams, tokens


@contextmanager
def _hooks(linears: Linears, grams: dict[str, Tensor], clock: StepClock, dtype: torch.dtype) -> Iterator[None]:
    def add(name: str, x: Tensor) -> None:
        with clock.span("Gram", layer_of(name)):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            grams[name].addmm_(rows.T, rows)

    handles = [
        linear.register_forward_pre_hook(lambda module, args, name=name: add(name, args[0]))
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inverse_diagonals(
    grams: dict[str, Tensor], tokens: int, config: hpa_ext.HPAConfig, clock: StepClock
) -> dict[str, Tensor]:
    found = {}
    for name in list(grams):
        with clock.span("inverse diagonals", layer_of(name)):
            h = grams.pop(name).mul_(2 / tokens)
            h.diagonal().add_(config.damping * h.diagonal().mean())
            factor = torch.linalg.cholesky(h)
            del h
            found[name] = torch.cholesky_inverse(factor).diagonal().clone()
            del factor
    return found


def _merge(
    old: Tensor, new: Tensor, inverses: list[Tensor], depth: float, layer: int, config: hpa_ext.HPAConfig,
    clock: StepClock,
) -> Tensor:  # fmt: skip
    """Scores, choice and merge of one linear, in place on `new`; the retained columns."""
    dtype = inverses[0].dtype
    with clock.span("scores", layer):
        before = old.to(dtype)
        update = new.to(dtype).sub_(before)
        squared_update = update.square().mean(0)
        safety, task = (squared_update / inverse for inverse in inverses)
        coefficient = torch.dot(update.flatten(), before.flatten()) / torch.dot(before.flatten(), before.flatten())
    with clock.span("selection", layer):
        retained = _select(safety, task, depth, config)
    with clock.span("merge", layer):
        adjusted = update.add_(before.mul_(1 - coefficient)).to(new.dtype)
        new.copy_(torch.where(retained, old, adjusted))
    return retained


def _select(safety: Tensor, task: Tensor, depth: float, config: hpa_ext.HPAConfig) -> Tensor:
    """Bool ``[in]``: sections 3.1 and 3.2 of HPA."""
    columns, percent = len(safety), config.retain_percent(depth)
    valid = (safety > 0) & (task > 0)
    middle, half = (config.alpha_min + config.alpha_max) / 2, (config.alpha_max - config.alpha_min) / 2
    alpha = middle + half * torch.tanh((safety[valid] / task[valid]).log().mean())
    retain = int(percent * columns / 100 + 0.5)
    focus = min(int(percent * config.focus_multiple * columns / 100 + 0.5), columns)
    everything = torch.ones_like(valid)
    safety_columns, task_columns = _top(safety, focus, everything), _top(task, focus, everything)
    retained = _top(safety, retain, safety_columns & ~task_columns)
    rest = retain - int(retained.sum())
    return retained | _top(safety - alpha * task, rest, safety_columns & task_columns)


def _top(scores: Tensor, count: int, eligible: Tensor) -> Tensor:
    """The `count` largest of the eligible scores, or all of these if they are fewer."""
    count = min(count, int(eligible.sum()))
    chosen = scores.masked_fill(~eligible, -torch.inf).topk(count).indices
    return torch.zeros_like(eligible).index_fill_(0, chosen, True)
