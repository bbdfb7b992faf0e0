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


def test_the_head_sees_one_contiguous_position_of_each_sample():
    """Of a slice torch would multiply each sample by a copy of the head's weight."""
    model = tiny_models.llava()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append((list(args[0].shape), args[0].is_contiguous())))
    calibrate(model, tiny_models.batches(model, count=1), progress=False)
    assert seen == [([4, 1, 32], True)]


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


def test_only_the_models_own_run_over_a_batch_counts():
    """An iterable may run the model itself (to write its safety answers); so may the function that marks tokens."""
    model = tiny_models.llama()
    batches = tiny_models.batches(model)
    expected = calibrate(model, batches, progress=False)

    def written_on_the_way():
        for batch in batches:
            tiny_models.logits(model, batch)
            yield batch

    def marked(batch):
        tiny_models.logits(model, batch)
        return batch["attention_mask"].bool()

    for grams in (
        calibrate(model, written_on_the_way(), progress=False),
        calibrate(model, batches, token_mask=marked, progress=False),
    ):
        for name, gram in expected.items():
            assert gram.token_count == grams[name].token_count
            assert torch.equal(gram.matrix(), grams[name].matrix())


def test_in_inference_mode():
    model = tiny_models.llama()
    batches = tiny_models.batches(model)
    expected = calibrate(model, batches, progress=False)
    with torch.inference_mode():
        grams = calibrate(model, batches, progress=False)
    for name, gram in expected.items():
        assert torch.equal(gram.matrix(), grams[name].matrix())
    grams[name].merge_(gram)  # outside of inference mode

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.first(x) + self.second(x)

    with torch.inference_mode():
        x = torch.randn(5, 4)
    grams = calibrate(Two(), [x], progress=False)
    assert grams["first"].token_count == grams["second"].token_count == 5


@pytest.mark.parametrize(("token_mask", "key"), [("attended", "attention_mask"), ("response", "labels")])
def test_the_output_head_counts_the_same_tokens_as_the_decoder(token_mask, key):
    model = tiny_models.llama()
    batches = tiny_models.batches(model)
    for batch in batches:  # padding on the right: the last position, whose logits a model gives, is none that counts
        batch["attention_mask"] = batch["attention_mask"].flip(1)
        batch["labels"] = batch["labels"].flip(1)
    name = "lm_head"
    modules = r"lm_head|.*layers\.2\.mlp\.down_proj"
    grams = calibrate(model, batches, modules=modules, token_mask=token_mask, progress=False)
    xs = activations_of(model, name, batches)
    marks = [
        batch["attention_mask"].bool() & (True if key == "attention_mask" else batch["labels"] != -100)
        for batch in batches
    ]
    x = torch.cat([x[mark] for x, mark in zip(xs, marks, strict=True)]).double()
    assert grams[name].token_count == len(x) == grams["model.layers.2.mlp.down_proj"].token_count
    torch.testing.assert_close(grams[name].matrix().double(), 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-6)


def test_inputs_with_a_dimension_of_one_more():
    """DeepSeek's kv_b_proj receives [batch, 1, tokens, rank]."""

    class Latent(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask):
            return self.linear(input_ids[:, None, :, None].float().expand(-1, -1, -1, 4))

    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    grams = calibrate(Latent(), [{"input_ids": ids, "attention_mask": mask}], progress=False)
    x = ids[mask.bool()].float()
    assert grams["linear"].token_count == 10
    torch.testing.assert_close(grams["linear"].matrix(), torch.full((4, 4), float(2 / 10 * x.square().sum())))


def test_a_compiled_model_has_the_plain_names():
    model = tiny_models.llama()
    batches = tiny_models.batches(model, count=1)
    expected = calibrate(model, batches, progress=False)
    grams = calibrate(torch.compile(model, backend="eager"), batches, progress=False)
    assert list(grams) == list(expected)


def test_the_decoder_of_blip2_is_without_its_output_head():
    import transformers

    from hpa_ext.models.linears import find_linears

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.Blip2Config(
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        qformer_config={**sizes, "encoder_hidden_size": 32, "vocab_size": 100},
        text_config={
            "model_type": "opt", "vocab_size": 100, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "word_embed_proj_dim": 32,
        },
    )  # fmt: skip
    names = find_linears(transformers.Blip2ForConditionalGeneration(config))
    assert len(names) == 3 * 6 and all(".decoder.layers." in name for name in names)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": None}, TypeError, "batches: expected an iterable of batches .*NoneType"),
        ({"batches": {"input_ids": torch.ones(1, 3)}}, TypeError, "batches: expected an iterable .*got dict"),
        ({"batches": torch.ones(2, 3)}, TypeError, "batches: expected an iterable .*got Tensor"),
        ({"model": "a/path"}, TypeError, r"model: expected an nn\.Module, got str"),
        ({"modules": 5}, TypeError, "modules: expected a regular expression or names, got int"),
        (
            {"batches": [{"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 1, 3, 3)}]},
            ValueError,
            r"attention_mask: expected \[batch, tokens\].*\[1, 1, 3, 3\]",
        ),
        (
            {"batches": [{"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": {"full": None}}]},
            ValueError,
            r"attention_mask: expected \[batch, tokens\].*dict",
        ),
        (
            {"batches": [torch.ones(1, 3, dtype=torch.long)], "token_mask": "image"},
            ValueError,
            "needs batches that are",
        ),
    ],
)
def test_arguments_of_another_kind(arguments, error, message):
    model = tiny_models.llama()
    settings = {"model": model, "batches": tiny_models.batches(model, count=1), **arguments}
    with pytest.raises(error, match=message):
        calibrate(progress=False, **settings)


def test_the_model_runs_without_gradients_or_dropout():
    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.seen = nn.Linear(4, 4), []

        def forward(self, x):
            self.seen.append((self.training, torch.is_grad_enabled()))
            return self.linear(x)

    model = Probe().train()
    calibrate(model, [torch.randn(5, 4)], progress=False)
    assert model.seen == [(False, False)] and model.training


def test_modes_are_restored_one_by_one():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)).train()
    model[0].eval()
    model[0][0].train()  # training inside of a module that is not
    calibrate(model, [torch.randn(5, 4)], progress=False)
    assert [module.training for module in model.modules()] == [True, False, True, True]


def test_an_input_by_keyword_and_flattened_tokens():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask):
            return self.linear(input=input_ids[..., None].float().expand(-1, -1, 4).reshape(-1, 4))

    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    grams = calibrate(Flat(), [{"input_ids": ids, "attention_mask": mask}], progress=False)
    x = ids[mask.bool()].float()
    torch.testing.assert_close(grams["linear"].matrix(), torch.full((4, 4), float(2 / 10 * x.square().sum())))


def test_inputs_shared_in_one_batch_and_not_in_another_are_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.first(x) + self.second(x if len(x) == 3 else x + 1)

    with pytest.raises(ValueError, match="second: received the input of first in earlier batches"):
        calibrate(Fickle(), [torch.randn(3, 4), torch.randn(5, 4)], progress=False)


def test_no_token_mask_is_all_tokens_and_a_missing_attention_mask_excludes_none():
    model = tiny_models.llama()
    batch = tiny_models.batches(model, count=1)[0]
    name = "model.layers.0.self_attn.q_proj"
    assert calibrate(model, [batch], token_mask=None, progress=False)[name].token_count == batch["labels"].numel()
    unpadded = {key: value for key, value in batch.items() if key != "attention_mask"}
    grams = calibrate(model, [unpadded], token_mask="response", progress=False)
    assert grams[name].token_count == int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_marks_of_another_dtype_are_refused(dtype):
    model = tiny_models.llama()
    with pytest.raises(ValueError, match=r"token_mask: expected a bool tensor \[batch, tokens\], got torch\."):
        calibrate(model, tiny_models.batches(model), token_mask=lambda b: b["attention_mask"].to(dtype), progress=False)
