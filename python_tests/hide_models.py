"""Tiny models with experts, anchors and prompts for the tests of HiDe."""

from __future__ import annotations

import copy

import torch
from tiny_models import IMAGE_TOKEN, IMAGE_TOKENS, VOCABULARY, llama, llava

from hpa_ext.hide import Anchors, Features, HiDeModel, own_features
from hpa_ext.hide.experts import Expert, ExpertUpdate, expert_modules
from hpa_ext.hide.structure import projector_name

TASKS = ("alpha", "beta", "gamma")


def llava_of(dtype=torch.float32):
    """The tiny LLaVA whose configuration says how long an image is."""
    model = llava().to(dtype)
    model.config.image_seq_length = IMAGE_TOKENS
    return model


def llama_of(dtype=torch.float32):
    return llama().to(dtype)


def expert(model, task, rank=4, scale=0.3, seed=0, scaling=2.0, projector=True, modules=None):
    """An expert that changes every linear of the decoder by a good part, and the projector."""
    generator = torch.Generator().manual_seed(seed)
    linears = {name: model.get_submodule(name) for name in expert_modules(model) if name != "lm_head"}
    updates = {}
    for name, linear in linears.items():
        if modules is not None and name not in modules:
            continue
        out_features, in_features = linear.weight.shape
        a = torch.randn(rank, in_features, generator=generator) * in_features**-0.5
        b = torch.randn(out_features, rank, generator=generator) * scale * rank**-0.5
        updates[name] = ExpertUpdate(a, b, scaling)
    tensors = {}
    parent = projector_name(model)
    if projector and parent is not None:
        for name, value in model.get_submodule(parent).named_parameters():
            noise = 0.1 * torch.randn(value.shape, generator=generator)
            tensors[f"{parent}.{name}"] = value.detach() + noise.to(value.dtype)
    return Expert(task, updates, tensors)


def experts(model, tasks=TASKS, **options):
    return {task: expert(model, task, seed=10 + number, **options) for number, task in enumerate(tasks)}


def anchors_of(model, tasks=TASKS, features: Features | None = None):
    """Anchors far enough apart for weights that differ from row to row."""
    features = own_features(model) if features is None else features
    generator = torch.Generator().manual_seed(3)
    anchors = Anchors(features.describe())
    for task in tasks:
        image = torch.randn(2, 32, generator=generator) if features.image is not None else None
        anchors.update(task, image, torch.randn(2, 32, generator=generator))
    return anchors


def hide(make=llava_of, config=None, tasks=TASKS, dtype=torch.float32, **options):
    """A HiDe model on a base of its own."""
    base = make(dtype)
    return HiDeModel(base, experts(base, tasks), anchors_of(base, tasks), config, **options)


def prompts(images=(1, 1, 1, 1), lengths=(12, 9, 14, 7), seed=0):
    """Left-padded prompts with this many images each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for count, length in zip(images, lengths, strict=True):
        text = torch.randint(3, VOCABULARY - 2, (length,), generator=generator).tolist()
        rows.append([1, *([IMAGE_TOKEN] * (IMAGE_TOKENS * count)), *text])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask}
    if sum(images):
        batch["pixel_values"] = torch.randn(sum(images), 3, 32, 32, generator=generator)
    return batch


def row_of(batch, row, images):
    """One prompt of a batch alone, without padding."""
    keep = batch["attention_mask"][row].bool()
    alone = {key: batch[key][row : row + 1, keep] for key in ("input_ids", "attention_mask")}
    start = sum(images[:row])
    if images[row]:
        alone["pixel_values"] = batch["pixel_values"][start : start + images[row]]
    return alone


def exact_copy(model, weights):
    """The plain model in float64 whose linears are these ``{name: [out, in]}``."""
    result = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, weight in weights.items():
            result.get_submodule(name).weight.copy_(weight)
    return result


def delta(update):
    """``s B A`` in float64."""
    return update.scaling * update.b.double() @ update.a.double()


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_state(model, state):
    """The same names, and the same bits."""
    now = model.state_dict()
    assert list(now) == list(state)
    different = [name for name, value in now.items() if not torch.equal(value, state[name])]
    assert different == []


def same_expert(first, second):
    assert set(first.updates) == set(second.updates)
    for name, update in first.updates.items():
        other = second.updates[name]
        assert torch.equal(update.a, other.a)
        assert torch.equal(update.b, other.b)
        assert update.scaling == other.scaling
    assert set(first.projector) == set(second.projector)
    assert all(torch.equal(value, second.projector[name]) for name, value in first.projector.items())
