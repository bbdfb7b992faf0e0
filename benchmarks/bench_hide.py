"""HiDe: a routed layer against a loop over experts and the authors' scheme, and a whole model against its base."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hpa_ext import ops
from hpa_ext.hide import Anchors, HiDeConfig, HiDeModel
from hpa_ext.hide.experts import Expert, ExpertUpdate, expert_modules
from hpa_ext.hide.layers import RoutedLinear
from hpa_ext.hide.routing_state import RoutingState

from .rows import Check, Row, Setting, make_row, relative_error, rounding_limit

_TASKS = 6
_RANK = 8
_SCALING = 2.0


def rows(setting: Setting) -> Iterator[Row]:
    """``hide_layer_vs_...``, ``hide_fused_vs_authors``, ``hide_prefill``, ``hide_decode``.

    ``hide_layer_vs_base`` is a routed layer against the linear in it, and the last two are the whole model against its
    base: their ratio is base / HiDe, so that 0.97 is an overhead of 3 %.
    """
    bf16 = torch.bfloat16
    for batch, tokens, width, height in setting.cases(
        quick=[(2, 12, 64, 48)], default=[(1, 640, 4096, 4096), (4, 1, 4096, 4096)], full=[(4, 640, 4096, 11008)]
    ):
        yield from _layers(setting, batch, tokens, width, height, bf16)
    for layers, width, prompt in setting.cases(quick=[(2, 64, 16)], default=[(32, 1024, 320)], full=[(32, 2048, 640)]):
        yield from _models(setting, layers, width, prompt, bf16)


def loop(linear: nn.Module, x: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """The experts one after the other, each weighted for its sample."""
    output = linear(x)
    for task in range(a.shape[0]):
        gate = (weights[:, task] * _SCALING).to(x.dtype)[:, None, None]
        output = output + gate * (x @ a[task].mT @ b[task].mT)
    return output


def authors_top(linear: nn.Module, x: Tensor, a: Tensor, b: Tensor, weights: list[float]) -> Tensor:
    """The scheme of the authors' top layer: a loop with one weight for the whole batch, as a Python number.

    As they have it, every expert computes all experts' A: A returns a list, of which one is taken.
    """
    result = linear(x)
    for task in range(a.shape[0]):
        result += (x @ a[task].mT @ b[task].mT) * _SCALING * weights[task]
    return result


def authors_fused(linear: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The scheme of the authors' lower layers: A and B are summed into new layers at every forward."""
    result = linear(x)
    summed_a = torch.zeros(a.shape[1:], dtype=x.dtype, device=x.device)
    summed_b = torch.zeros(b.shape[1:], dtype=x.dtype, device=x.device)
    down = nn.Linear(a.shape[2], a.shape[1], bias=False, device=x.device, dtype=x.dtype)
    up = nn.Linear(b.shape[2], b.shape[1], bias=False, device=x.device, dtype=x.dtype)
    for task in range(a.shape[0]):
        summed_a += 1.0 * a[task]
        summed_b += 1.0 * b[task]
    with torch.no_grad():
        down.weight.copy_(summed_a)
        up.weight.copy_(summed_b)
    result += up(down(x)) * _SCALING
    return result


@torch.no_grad()
def _layers(setting: Setting, batch: int, tokens: int, width: int, height: int, dtype: torch.dtype) -> Iterator[Row]:
    def make() -> tuple[RoutedLinear, Tensor, Tensor, nn.Linear]:
        base = nn.Linear(width, height, bias=False, device=setting.device, dtype=dtype)
        base.weight.copy_(setting.randn(height, width, dtype=dtype, scale=width**-0.5))
        a = setting.randn(_TASKS, _RANK, width, dtype=dtype, scale=width**-0.5)
        b = setting.randn(_TASKS, height, _RANK, dtype=dtype, scale=_RANK**-0.5)
        layer = RoutedLinear(base, a, b, [_SCALING] * _TASKS, RoutingState(lambda prompt, images: None))
        weights = torch.softmax(setting.randn(batch, _TASKS), -1)
        fused = nn.Linear(width, height, bias=False, device=setting.device, dtype=dtype)
        fused.weight.copy_(base.weight.float() + _SCALING * torch.einsum("cor,cri->oi", b.float(), a.float()))
        return layer, setting.randn(batch, tokens, width, dtype=dtype), weights, fused

    sets = setting.sets(batch * tokens * width * dtype.itemsize + 2 * width * height * dtype.itemsize, make)
    pick = lambda index: sets[index % len(sets)]  # noqa: E731

    def ours(index: int) -> Tensor:
        layer, x, weights, _ = pick(index)
        with layer.state.fixed(weights):
            return layer(x)

    def by_loop(index: int) -> Tensor:
        layer, x, weights, _ = pick(index)
        return loop(layer.base, x, layer.a, layer.b, weights)

    def base(index: int) -> Tensor:
        layer, x, _, _ = pick(index)
        return layer.base(x)

    def by_authors(index: int) -> Tensor:
        layer, x, weights, _ = pick(index)
        return authors_top(layer.base, x, layer.a, layer.b, weights[0].tolist())

    def fused(index: int) -> Tensor:
        return pick(index)[3](pick(index)[1])

    def fused_by_authors(index: int) -> Tensor:
        layer, x, _, _ = pick(index)
        return authors_fused(layer.base, x, layer.a, layer.b)

    layer, x, weights, _ = sets[0]
    exact = x.double() @ layer.base.weight.double().mT + torch.einsum(
        "bti,cri,cor,bc->bto", x.double(), layer.a.double(), layer.b.double(), weights.double() * _SCALING
    )
    check = Check(relative_error(ours(0), exact), rounding_limit(dtype), relative_error(by_loop(0), exact))
    whole = torch.einsum("bti,cri,cor->bto", x.double(), layer.a.double(), layer.b.double()) * _SCALING
    exact_fused = x.double() @ layer.base.weight.double().mT + whole
    # The weight itself is rounded, once.
    fused_check = Check(
        relative_error(fused(0), exact_fused),
        2 * rounding_limit(dtype),
        relative_error(fused_by_authors(0), exact_fused),
    )
    shape, names = (batch, tokens, width, height, _TASKS, _RANK), "batch, tokens, in, out, tasks, rank"
    work = setting.operations(2 * batch * tokens * (width * height + _TASKS * _RANK * (width + height)), dtype)
    backend = ops.backend_of("routed_lora", x)
    for metric, peer, call, other, checked in (
        ("hide_layer_vs_loop", "loop over experts", ours, by_loop, check),
        ("hide_layer_vs_authors", "authors' top layer, one weight per batch", ours, by_authors, check),
        ("hide_layer_vs_base", "the linear itself", ours, base, Check(check.error, check.limit, None)),
        ("hide_fused_vs_authors", "authors' fusion at every forward", fused, fused_by_authors, fused_check),
    ):
        yield make_row(metric, names, shape, dtype, peer, setting.pair(call, other), work, checked, backend)


@torch.no_grad()
def _models(setting: Setting, layers: int, width: int, prompt: int, dtype: torch.dtype) -> Iterator[Row]:
    base, model = _model_pair(setting, layers, width, dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (1, prompt), generator=generator).to(setting.device)
    mask = torch.ones_like(ids)

    def prefill(of: nn.Module) -> Callable[[int], Tensor]:
        return lambda index: of(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1).logits

    def decode(of: nn.Module) -> Callable[[int], Tensor]:
        cache = of(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values

        def step(index: int) -> Tensor:
            logits = of(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return logits

        return step

    # The two sides are different functions; what is checked is that decoding keeps the prompt's weights.
    with model.routed(model.routing(input_ids=ids, attention_mask=mask)):
        whole = model(input_ids=torch.cat([ids, ids[:, :1]], 1), logits_to_keep=1).logits
    check = Check(relative_error(decode(model)(0), whole.double()), 5 * rounding_limit(dtype), None)
    backend = ops.backend_of("routed_lora", whole)
    names, shape = "layers, width, prompt, tasks, rank", (layers, width, prompt, _TASKS, _RANK)
    for metric, make, tokens in (("hide_prefill", prefill, prompt), ("hide_decode", decode, 1)):
        parameters = sum(value.numel() for value in base.parameters())
        work = setting.operations(2 * tokens * parameters, dtype)
        paired = setting.pair(make(model), make(base))
        yield make_row(metric, names, shape, dtype, "the base model", paired, work, check, backend)


def _model_pair(setting: Setting, layers: int, width: int, dtype: torch.dtype) -> tuple[nn.Module, HiDeModel]:
    """A Llama and a HiDe model of the same sizes with six tasks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, vocab_size=1000,
        num_attention_heads=max(2, width // 128), max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    first, second = (LlamaForCausalLM(config).to(setting.device, dtype).eval() for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    adapters, anchors = {}, Anchors()
    for task in range(_TASKS):
        updates = {}
        for name in expert_modules(first):
            if name == "lm_head":
                continue
            out_features, in_features = first.get_submodule(name).weight.shape
            a = torch.randn(_RANK, in_features, generator=generator) * in_features**-0.5
            updates[name] = ExpertUpdate(a, 0.01 * torch.randn(out_features, _RANK, generator=generator), _SCALING)
        adapters[f"task {task}"] = Expert(f"task {task}", updates)
        anchors.update(f"task {task}", text_features=torch.randn(4, width, generator=generator))
    return first, HiDeModel(second, adapters, anchors, HiDeConfig())
