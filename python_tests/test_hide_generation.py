"""A HiDe model runs as transformers models do: mixed batches, padding, caches, beams, and what is refused."""

from __future__ import annotations

import copy
import gc

import hide_models as hm
import pytest
import torch
from helpers import refuses
from torch.nn import functional as F

from hpa_ext.hide import HiDeConfig, HiDeModel
from hpa_ext.hide.routing_state import Prompt, RoutingState

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
IMAGES = (1, 0, 2, 1)


@pytest.fixture(scope="module")
def model():
    return hm.hide()


def test_logits_are_those_of_an_exact_sum_over_experts(model):
    """Each row against a plain float64 model that holds ``W + sum_c d_c s_c B_c A_c`` of that row."""
    base = hm.llava_of()
    found = hm.experts(base)
    batch = hm.prompts(IMAGES)
    weights = model.routing(**batch)
    logits = model(**batch).logits
    start = {name: base.state_dict()[name].double() for name in found["alpha"].projector}
    projector = {
        name: value + sum(expert.projector[name].double() - value for expert in found.values())
        for name, value in start.items()
    }
    for row in range(4):
        exact = {}
        for name in found["alpha"].updates:
            d = weights[row].double() if ".layers.2." in name else torch.ones(3)
            exact[name] = base.get_submodule(name).weight.double() + sum(
                d[c] * hm.delta(expert.updates[name]) for c, expert in enumerate(found.values())
            )
        plain = hm.exact_copy(base, exact)
        with torch.no_grad():
            for name, value in projector.items():
                plain.get_parameter(name).copy_(value)
        alone = hm.row_of(batch, row, IMAGES)
        if "pixel_values" in alone:
            alone["pixel_values"] = alone["pixel_values"].double()
        expected = plain(**alone).logits[0, -1]
        torch.testing.assert_close(logits[row, -1].double(), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_mixed_batch_equal_the_rows_alone(model):
    batch = hm.prompts(IMAGES)
    weights = model.routing(**batch)
    assert int(weights.argmax(1).unique().numel()) > 1  # really mixed
    together = model.generate(**batch, **GREEDY)
    width = batch["input_ids"].shape[1]
    for row in range(4):
        alone = hm.row_of(batch, row, IMAGES)
        torch.testing.assert_close(model.routing(**alone)[0], weights[row], rtol=1e-5, atol=1e-6)
        tokens = model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :]
        assert tokens.tolist() == together[row, width:].tolist()


def test_batch_routing_makes_rows_depend_on_each_other():
    """What the authors' code does: right for one row alone."""
    model = hm.hide(config=HiDeConfig(routing="batch"))
    sample = hm.hide()
    batch = hm.prompts()
    alone = hm.row_of(batch, 0, (1, 1, 1, 1))
    torch.testing.assert_close(model.routing(**alone), sample.routing(**alone))
    assert not torch.allclose(model.routing(**batch)[0], sample.routing(**batch)[0], atol=1e-3)
    assert torch.equal(model.routing(**batch)[0], model.routing(**batch)[3])


def test_every_way_to_generate_gives_the_same(model):
    batch = hm.prompts(IMAGES)
    expected = model.generate(**batch, **GREEDY)
    base = model.model
    assert torch.equal(base.generate(**batch, **GREEDY), expected)
    assert torch.equal(type(base).generate(base, **batch, **GREEDY), expected)
    assert torch.equal(model.generate(**batch, **GREEDY, use_cache=False), expected)
    assert torch.equal(model.generate(batch.pop("input_ids"), **batch, **GREEDY), expected)


def test_decoding_by_hand_keeps_the_weights_of_the_prompt(model):
    """Two conversations in turns: each cache has weights of its own, whatever ran in between."""
    batches = [hm.prompts(IMAGES, seed=seed) for seed in (0, 1)]
    expected = [model.generate(**batch, **GREEDY) for batch in batches]
    states = []
    for batch in batches:
        position = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        output = model(**batch, position_ids=position, use_cache=True)
        states.append([output.past_key_values, output.logits[:, -1:].argmax(-1), batch["attention_mask"], []])
    for _ in range(6):
        for state in states:
            cache, token, mask, tokens = state
            tokens.append(token)
            mask = torch.cat([mask, torch.ones(4, 1, dtype=mask.dtype)], 1)
            position = (mask.cumsum(1) - 1)[:, -1:]
            output = model(input_ids=token, attention_mask=mask, past_key_values=cache, position_ids=position)
            state[:3] = [output.past_key_values, output.logits[:, -1:].argmax(-1), mask]
    for batch, state, generated in zip(batches, states, expected, strict=True):
        assert torch.equal(torch.cat(state[3], 1), generated[:, batch["input_ids"].shape[1] :])


def test_going_on_from_a_returned_cache(model):
    """The next turn keeps the first one's routing, though its own text would be routed otherwise."""
    batch = hm.prompts((1,), (9,))
    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
    mask = torch.ones_like(more)
    with model.routed(model.routing(**batch)):
        expected = model.generate(input_ids=more, attention_mask=mask, pixel_values=batch["pixel_values"], **GREEDY)
    second = model.generate(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second, expected)
    foreign = copy.deepcopy(hm.hide())(**batch, use_cache=True).past_key_values
    with refuses(ValueError, "past_key_values"):
        model(input_ids=torch.tensor([[5]]), past_key_values=foreign)


def test_beams_and_several_sequences_share_a_prompts_weights(model):
    batch = hm.prompts(IMAGES)
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**batch, **beams)
    assert together.shape[0] == 8
    assert torch.equal(type(model.model).generate(model.model, **batch, **beams), together)
    width = batch["input_ids"].shape[1]
    for row in range(4):
        alone = hm.row_of(batch, row, IMAGES)
        own = model.generate(**alone, **beams)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(own, together[2 * row : 2 * row + 2, width:])
    torch.manual_seed(0)
    sampled = model.generate(**batch, **{**GREEDY, "do_sample": True, "num_return_sequences": 3})
    assert sampled.shape[0] == 12


def test_text_only_prompts_and_text_only_models():
    llama = hm.hide(hm.llama_of)
    assert llama.features.image is None
    batch = hm.prompts((0, 0), (5, 9))
    weights = llama.routing(**batch)
    text = llama.features.text(batch["input_ids"], batch["attention_mask"].bool())
    torch.testing.assert_close(weights, llama.anchors.route(None, text, llama.config))
    together = llama.generate(**batch, **GREEDY)
    for row in range(2):
        alone = hm.row_of(batch, row, (0, 0))
        own = llama.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(own, together[row, batch["input_ids"].shape[1] :])
    llava = hm.hide()
    assert llava.generate(**batch, **GREEDY).shape[0] == 2


def test_chunked_prefill_is_routed_by_the_whole_prompt():
    model = hm.hide(hm.llama_of)
    batch = hm.prompts((0, 0), (19, 19))
    assert torch.equal(model.generate(**batch, **GREEDY, prefill_chunk_size=8), model.generate(**batch, **GREEDY))


def test_several_images_count_with_their_mean(model):
    batch = hm.prompts((2, 1), (6, 8))
    pooled = model.features.image(model.model.model.vision_tower(batch["pixel_values"]))
    rows = torch.stack([pooled[:2].mean(0), pooled[2]])
    counted = batch["attention_mask"].bool() & (batch["input_ids"] != hm.IMAGE_TOKEN)
    text = model.features.text(batch["input_ids"], counted)
    torch.testing.assert_close(model.routing(**batch), model.anchors.route(rows, text, model.config))


def test_answers_have_no_part_in_the_routing(model):
    batch = hm.prompts((1,), (8,))
    answer = torch.tensor([[40, 41, 42]])
    ids = torch.cat([batch["input_ids"], answer], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = answer
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": batch["pixel_values"]}
    torch.testing.assert_close(model.routing(**whole, labels=labels), model.routing(**batch))
    assert not torch.allclose(model.routing(**whole), model.routing(**batch))


def test_the_vision_tower_runs_once():
    model = hm.hide()
    calls = []
    handle = model.model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    model.generate(**hm.prompts(), **GREEDY)
    model(**hm.prompts())
    handle.remove()
    assert len(calls) == 2


def test_given_weights_hold(model):
    batch = hm.prompts()
    weights = F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    with model.routed(weights):
        mixed = model(**batch).logits
    for task, rows in (("alpha", [0, 3]), ("beta", [1]), ("gamma", [2])):
        with model.routed(task):
            torch.testing.assert_close(model(**batch).logits[rows], mixed[rows], rtol=1e-5, atol=1e-5)
    with refuses(ValueError, "weights"):
        model.routed(torch.ones(4, 2)).__enter__()
    with refuses(ValueError, "task"):
        model.routed("none").__enter__()
    with model.routed(weights[:3]), pytest.raises(ValueError, match="routing: expected a batch of 3 rows"):
        model(**batch)


def test_what_cannot_be_routed_is_refused(model):
    batch = hm.prompts()
    language = model.model.model.language_model
    with refuses(ValueError, "input_ids"):
        model.routing(pixel_values=batch["pixel_values"])
    with refuses(ValueError, "attention_mask"):
        model(input_ids=batch["input_ids"], attention_mask=torch.ones(4, 1, 5, 5))
    embeds = model.model.get_input_embeddings()(hm.prompts((0, 0), (4, 4))["input_ids"])
    with pytest.raises(ValueError, match="routing: expected a forward of the whole model with input_ids"):
        model(inputs_embeds=embeds)
    fresh = hm.hide()
    with pytest.raises(ValueError, match="routing: expected a forward of the whole model"):
        fresh.model.model.language_model(inputs_embeds=embeds)
    with model.routed("alpha"):
        assert torch.isfinite(language(inputs_embeds=embeds).last_hidden_state).all()
    images_alone = hm.hide(config=HiDeConfig(image_weight=1.0, text_weight=0.0))
    assert images_alone.routing(**batch).shape == (4, 3)
    with pytest.raises(ValueError, match="has nothing to be routed by"):
        images_alone(**hm.prompts((0, 1), (4, 4)))


def test_copies_and_casts_work():
    model = hm.hide()
    batch = hm.prompts()
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    model.unload()
    assert torch.equal(twin(**batch).logits, expected)
    assert torch.equal(twin.generate(**batch, **GREEDY), twin.model.generate(**batch, **GREEDY))
    lower = twin.to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert torch.isfinite(lower(**batch).logits).all()


def test_caches_are_not_kept_alive():
    model = hm.hide()
    output = model(**hm.prompts(), use_cache=True)
    assert len(model.state._of_cache) == 1
    del output
    gc.collect()
    assert len(model.state._of_cache) == 0


def test_a_base_with_peft_or_with_experts_is_refused():
    from tiny_models import with_lora

    from hpa_ext.training.lora import LANGUAGE_LINEARS

    base = hm.llava_of()
    anchors = hm.anchors_of(base)
    with refuses(ValueError, "base"):
        HiDeModel(with_lora(base, LANGUAGE_LINEARS), hm.experts(base), anchors)
    HiDeModel(base, hm.experts(base), anchors)
    with pytest.raises(ValueError, match="base: is part of a HiDeModel already"):
        HiDeModel(base, hm.experts(hm.llava_of()), anchors)


def test_given_weights_of_another_kind_and_short_masks_are_refused(model):
    for wrong, kind in (
        ([[1.0, 0.0, 0.0]], TypeError), (torch.ones(4, 3, dtype=torch.int64), ValueError),
        (torch.full((1, 3), torch.nan), ValueError),
    ):  # fmt: skip
        with refuses(kind, "weights"):
            model.routed(wrong).__enter__()
    batch = hm.prompts()
    with refuses(ValueError, "attention_mask"):
        model(**{**batch, "attention_mask": batch["attention_mask"][:, 1:]})


def test_placeholders_without_pixels_are_refused(model):
    batch = hm.prompts()
    del batch["pixel_values"]
    with refuses(ValueError, "pixel_values"):
        model.routing(**batch)


def test_pixels_that_generate_repeated_for_its_beams_are_counted_once():
    """As transformers did before it encoded images ahead of the first forward."""
    asked = []
    state = RoutingState(lambda prompt, images: asked.append(images) or torch.eye(2))
    ids = torch.tensor([[7, 7, 3], [7, 7, 4]])
    prompt = Prompt(ids, ids < 7, torch.tensor([2, 2]), 2)
    features = torch.randn(2, 5)
    with state.generating(prompt):
        state.expect_repeated_images(6)
        state.add_images(features.repeat_interleave(3, 0), torch.zeros(6))
        assert torch.equal(state.weights_for(6), torch.eye(2).repeat_interleave(3, 0))
        assert torch.equal(state.weights_of_images(6), torch.eye(2).repeat_interleave(3, 0))
    assert len(asked) == 1
    assert torch.equal(asked[0], features)
