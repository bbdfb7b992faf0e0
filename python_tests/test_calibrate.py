"""calibrate: the right Grams for the right tokens, shared where inputs are shared, and no trace left on the model."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

import hpa_ext
from hpa_ext import NumericalError, calibrate

DECODER = "model.language_model."


def activations_of(model, name, batches):
    """Inputs of a module, recorded by a hook of the test's own."""
    module = dict(model.named_modules())[name]
    recorded = []
    handle = module.register_forward_pre_hook(lambda module, args: recorded.append(args[0].detach().clone()))
    for batch in batches:
        tiny_models.logits(model, batch)
    handle.remove()
    return recorded


@pytest.mark.parametrize("token_mask", ["all", "attended", "prompt", "image", "response"])
def test_grams_are_those_of_the_marked_tokens(token_mask):
    model = tiny_models.llava()
    batches = tiny_models.batches(model)
    grams = calibrate(model, batches, token_mask=token_mask, progress=False)
    name = f"{DECODER}layers.1.mlp.down_proj"
    rows = []
    for x, batch in zip(activations_of(model, name, batches), batches, strict=True):
        attended, labelled = batch["attention_mask"].bool(), batch["labels"] != -100
        is_image = batch["input_ids"] == tiny_models.IMAGE_TOKEN
        marks = {
            "all": torch.ones_like(attended),
            "attended": attended,
            "prompt": attended & ~labelled,
            "image": attended & is_image,
            "response": attended & labelled,
        }
        rows.append(x[marks[token_mask]])
    x = torch.cat(rows).double()
    assert grams[name].token_count == len(x)
    torch.testing.assert_close(grams[name].matrix().double(), 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-6)


def test_a_function_of_the_batch_marks_tokens():
    model = tiny_models.llama()
    batches = tiny_models.batches(model)
    grams = calibrate(model, batches, token_mask=lambda batch: batch["input_ids"] < 50, progress=False)
    expected = sum(int((batch["input_ids"] < 50).sum()) for batch in batches)
    assert {gram.token_count for gram in grams.values()} == {expected}


def test_linears_with_one_input_share_one_gram():
    model = tiny_models.llava()
    grams = calibrate(model, tiny_models.batches(model), progress=False)
    assert len(grams) == 3 * 7 and len({id(gram) for gram in grams.values()}) == 3 * 4
    layer = f"{DECODER}layers.0."
    assert grams[layer + "self_attn.q_proj"] is grams[layer + "self_attn.k_proj"] is grams[layer + "self_attn.v_proj"]
    assert grams[layer + "mlp.gate_proj"] is grams[layer + "mlp.up_proj"]
    assert grams[layer + "self_attn.q_proj"] is not grams[layer + "self_attn.o_proj"]
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and DECODER in name}
    assert set(grams) == linears


def test_an_input_changed_in_place_is_not_shared():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            y = self.first(x) + self.second(x)
            x.mul_(2)
            return y + self.third(x)

    grams = calibrate(Changing(), [torch.randn(5, 4)], progress=False)
    assert grams["first"] is grams["second"]
    torch.testing.assert_close(grams["third"].matrix(), 4 * grams["first"].matrix())


@pytest.mark.parametrize(
    ("make", "targets"),
    [(tiny_models.llama, ["q_proj"]), (tiny_models.gpt2, ["c_attn"]), (tiny_models.llava, r".*language.*q_proj")],
)
def test_names_and_grams_are_the_same_through_peft(make, targets):
    model = make()
    batches = tiny_models.batches(model)
    adapted = tiny_models.with_lora(model, targets)
    merged = tiny_models.with_lora(model, targets).merge_and_unload()
    ours, expected = calibrate(adapted, batches, progress=False), calibrate(merged, batches, progress=False)
    assert list(ours) == list(expected) == list(calibrate(model, batches, progress=False))
    for name, gram in expected.items():
        torch.testing.assert_close(ours[name].matrix(), gram.matrix(), rtol=1e-3, atol=1e-4)


def test_the_model_is_left_as_it_was():
    model = tiny_models.llava()
    model.train()
    model.model.vision_tower.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    batches = tiny_models.batches(model)
    calibrate(model, batches, progress=False)
    broken = [batches[0], {**batches[1], "pixel_values": torch.ones(1, 2)}]
    with pytest.raises((ValueError, RuntimeError)):  # whatever transformers makes of it
        calibrate(model, broken, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_cache_and_no_labels_reach_the_model():
    model = tiny_models.llama()
    seen = {}
    original = model.forward

    def spy(input_ids=None, attention_mask=None, labels=None, use_cache=None, logits_to_keep=0, **rest):
        seen.update(labels=labels, use_cache=use_cache)
        return original(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **rest)

    model.forward = spy
    calibrate(model, tiny_models.batches(model, count=1), progress=False)
    assert seen == {"labels": None, "use_cache": False}


def test_data_loaders_tensors_and_tuples():
    model = tiny_models.llama()
    batches = tiny_models.batches(model, count=2)
    expected = calibrate(model, [{"input_ids": b["input_ids"]} for b in batches], progress=False)
    name = "model.layers.0.self_attn.q_proj"
    loader = torch.utils.data.DataLoader(torch.cat([b["input_ids"] for b in batches]), batch_size=4)
    for other in (loader, [b["input_ids"] for b in batches], [(b["input_ids"],) for b in batches]):
        grams = calibrate(model, other, progress=False)
        torch.testing.assert_close(grams[name].matrix(), expected[name].matrix())


def test_modules_by_expression_and_by_name():
    model = tiny_models.llava()
    batches = tiny_models.batches(model, count=1)
    by_expression = calibrate(model, batches, modules=r".*layers\.\d+\.mlp\.down_proj", progress=False)
    assert len(by_expression) == 3
    by_name = calibrate(model, batches, modules=list(by_expression)[:1], progress=False)
    assert list(by_name) == list(by_expression)[:1]
    vision = calibrate(model, batches, modules=r"model\.vision_tower\..*fc1", progress=False)
    assert len(vision) == 2 and all(g.token_count == 4 * (16 + 1) for g in vision.values())


def test_a_module_that_is_not_reached_has_an_empty_gram():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(6, 4)

        def forward(self, x):
            return self.used(x)

    grams = calibrate(Branch(), [torch.randn(3, 4)], progress=False)
    assert grams["unused"].token_count == 0 and grams["unused"].in_features == 6


def test_a_bad_activation_names_its_module():
    model = tiny_models.llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.inf
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.gate_proj: activations hold NaN, Inf") as caught:
        calibrate(model, tiny_models.batches(model), progress=False)
    assert caught.value.module == "model.layers.1.mlp.gate_proj"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nan_in_padding_does_no_harm():
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask):
            x = input_ids[..., None].float().expand(-1, -1, 4).clone()
            x[attention_mask == 0] = torch.nan
            return self.linear(x)

    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    grams = calibrate(Poisoned(), [{"input_ids": ids, "attention_mask": mask}], progress=False)
    assert grams["linear"].token_count == 10
    assert torch.isfinite(grams["linear"].matrix()).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches: expected at least one batch"),
        ({"batches": [3]}, TypeError, "batches: expected mappings"),
        ({"token_mask": "answers"}, ValueError, "token_mask: expected one of all, attended"),
        ({"token_mask": "image"}, ValueError, "names no image token"),
        (
            {"token_mask": lambda batch: torch.ones(2)},
            ValueError,
            r"token_mask: expected a bool tensor \[batch, tokens\]",
        ),
        ({"token_mask": lambda batch: torch.ones(4, 9) > 0}, ValueError, r"q_proj: token_mask of shape \[4, 9\]"),
        ({"modules": "nothing"}, ValueError, "modules: no linear layer of LlamaForCausalLM matches 'nothing'; it has"),
        ({"modules": "(["}, ValueError, "modules: not a regular expression"),
        ({"modules": ["model.absent"]}, ValueError, "modules: no linear layer is called 'model.absent'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    model = tiny_models.llama()
    settings = {"batches": tiny_models.batches(model, count=1), **arguments}
    with pytest.raises(error, match=message):
        calibrate(model, progress=False, **settings)


def test_response_tokens_need_labels():
    model = tiny_models.llama()
    batches = [{key: value for key, value in b.items() if key != "labels"} for b in tiny_models.batches(model)]
    with pytest.raises(ValueError, match="token_mask: the batch has no tensor 'labels'"):
        calibrate(model, batches, token_mask="response", progress=False)
    assert hpa_ext.calibrate(model, batches, progress=False)
