"""Features by which prompts are routed: CLIP's own, the authors' choice of text, and the model's own parts."""

from __future__ import annotations

import hide_models as hm
import pytest
import torch
from helpers import refuses

from hpa_ext.hide import ClipText, EmbeddingText, Features, HiDeModel, ImageFeature, clip_features, own_features
from hpa_ext.hide.parameters import layer_parameters, table_3

WORDS = [
    "A",
    "chat",
    "USER:",
    "ASSISTANT:",
    "Question:",
    "what",
    "is",
    "this",
    "?",
    "Answer",
    "with",
    "one",
    "word",
    "and",
    "more",
]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<image>", "\n", " ", *WORDS]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[ \n]|[^ \n]+"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=77,
        additional_special_tokens=["<image>"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    config = CLIPConfig(
        text_config={
            "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 40, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8,
        },
        projection_dim=16,
    )  # fmt: skip
    return CLIPModel(config).eval()


def llava_with(clip):
    """A LLaVA whose vision tower is this CLIP's."""
    model = hm.llava_of()
    missing = model.model.vision_tower.load_state_dict(clip.vision_model.state_dict(), strict=False)
    assert not missing.missing_keys
    return model


def ids_of(tokenizer, texts):
    return tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)


@torch.no_grad()
def test_image_features_are_clips_own(clip):
    model = llava_with(clip)
    pixels = torch.randn(3, 32, 32, 3).movedim(-1, 1)
    output = model.model.vision_tower(pixels)
    projected = ImageFeature("projected", clip.visual_projection.weight)(output)
    torch.testing.assert_close(projected, clip.get_image_features(pixels).pooler_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ImageFeature("pooled")(output), clip.vision_model(pixels).pooler_output)
    torch.testing.assert_close(ImageFeature("mean")(output), output.last_hidden_state.mean(1))


@torch.no_grad()
@pytest.mark.parametrize("projected", [False, True])
def test_text_features_are_clips_own(clip, tokenizer, projected):
    features = clip_features(clip, tokenizer, tokenizer, image="pooled", projected_text=projected, part="prompt")
    encoded = ids_of(tokenizer, ["what is this ?", "one word"])
    feature = features.text(encoded["input_ids"], encoded["attention_mask"].bool())
    own = clip.get_text_features(**encoded).pooler_output if projected else clip.text_model(**encoded).pooler_output
    torch.testing.assert_close(feature, own, rtol=1e-5, atol=1e-5)
    assert feature.shape == (2, 16 if projected else 24)
    assert features.describe()["text"] == ("clip, projected" if projected else "clip, pooled")


@torch.no_grad()
def test_a_model_with_projection_gives_both_forms(clip, tokenizer):
    from transformers import CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection(clip.config.text_config).eval()
    encoded = ids_of(tokenizer, ["what is this ?", "one word"])
    mask = encoded["attention_mask"].bool()
    pooled = ClipText(model, tokenizer, tokenizer, part="prompt")(encoded["input_ids"], mask)
    projected = ClipText(model, tokenizer, tokenizer, part="prompt", projected=True)(encoded["input_ids"], mask)
    torch.testing.assert_close(model.text_projection(pooled), projected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(projected, model(**encoded).text_embeds, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "instruction"),
    [
        ("A chat USER: <image>\nwhat is this ? ASSISTANT:", "what is this ?"),
        (
            "A chat USER: <image>\nwhat is this ?\nAnswer with one word ASSISTANT: this",
            "what is this ?\nAnswer with one word",
        ),
        ("A chat USER: what is this ? ASSISTANT:", "what is this ?"),
        ("what is this ?", "what is this ?"),
    ],
)
def test_the_instruction_is_what_the_authors_take(clip, tokenizer, prompt, instruction):
    text = ClipText(clip.text_model, tokenizer, tokenizer)
    encoded = ids_of(tokenizer, ["<s> " + prompt])
    counted = encoded["attention_mask"].bool() & (encoded["input_ids"] != 3)
    assert text.texts(encoded["input_ids"], counted) == [instruction]


def test_padding_and_neighbours_have_no_part_in_a_text_feature(clip, tokenizer):
    text = ClipText(clip.text_model, tokenizer, tokenizer, max_tokens=5)
    embedding = own_features(hm.llava_of(), tokenizer).text
    ids = torch.tensor([[0, 0, 1, 14, 5, 15], [18, 5, 12, 5, 16, 17]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    for feature in (text, embedding):
        together = feature(ids, mask)
        alone = feature(ids[:1, 2:], mask[:1, 2:])
        torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_embedding_text_is_the_mean_of_the_tokens_that_count():
    table = torch.nn.Embedding(10, 4)
    feature = EmbeddingText(table, skip_ids=[1, 2])
    ids, counted = torch.tensor([[1, 3, 4, 99], [1, 2, 2, 1]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    result = feature(ids, counted)
    torch.testing.assert_close(result[0], table.weight[[3, 4]].mean(0).detach())
    assert torch.equal(result[1], torch.zeros(4))
    assert feature.describe() == {"text": "embedding", "skip_ids": [1, 2]}


@torch.no_grad()
def test_a_model_routed_by_clip(clip, tokenizer):
    """End to end: anchors of CLIP features, prompts through the language model's tokenizer."""
    base = llava_with(clip)
    base.config.image_token_id = 3
    features = clip_features(clip, tokenizer, tokenizer)
    assert features.describe() == {
        "image": "projected", "text": "clip, pooled", "part": "instruction", "max_tokens": 77,
    }  # fmt: skip
    texts = ["USER: " + "<image> " * 16 + "\nwhat is this ? ASSISTANT:", "USER: one word ASSISTANT:"]
    tokenizer.padding_side = "left"
    batch = dict(ids_of(tokenizer, texts))
    tokenizer.padding_side = "right"
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    batch["pixel_values"] = torch.randn(1, 3, 32, 32)
    anchors = hm.Anchors(features.describe())
    for number, task in enumerate(hm.TASKS):
        generator = torch.Generator().manual_seed(number)
        anchors.update(task, torch.randn(1, 16, generator=generator), torch.randn(1, 24, generator=generator))
    model = HiDeModel(base, hm.experts(base), anchors, features=features)
    image = clip.get_image_features(batch["pixel_values"]).pooler_output
    encoded = ids_of(tokenizer, ["what is this ?", "one word"])
    text = clip.text_model(**encoded).pooler_output
    weights = model.routing(**batch)
    torch.testing.assert_close(weights[:1], anchors.route(image, text[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[1:], anchors.route(None, text[1:]), rtol=1e-4, atol=1e-5)
    assert model.generate(**batch, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[0] == 2


def test_what_features_cannot_be_is_refused(clip, tokenizer):
    with refuses(ValueError, "kind"):
        ImageFeature("cls")
    with pytest.raises(ValueError, match="projection: expected CLIP's visual projection"):
        ImageFeature("projected")
    with pytest.raises(ValueError, match="projection: expected CLIP's visual projection"):
        ImageFeature("pooled", torch.ones(2, 2))
    with refuses(ValueError, "part"):
        ClipText(clip.text_model, tokenizer, tokenizer, part="question")
    with refuses(ValueError, "projected"):
        ClipText(clip.text_model, tokenizer, tokenizer, projected=True)
    with refuses(ValueError, "image, text"):
        Features(None, None)


def test_parameter_counts_of_llava_7b_beside_the_papers():
    rows = {row.name: row for row in table_3()}
    assert {name: row.experts for name, row in rows.items()} == {
        "HiDe": 37, "merge all": 32, "merge 1-31": 31, "expand all": 192, "expand 1-31": 186,
    }  # fmt: skip
    assert layer_parameters(8) == 624_640
    # The ratios are the paper's; its absolute numbers are 1.91 times ours, so not of rank 8.
    for name in ("HiDe", "merge all", "expand all", "expand 1-31"):
        assert abs(rows[name].paper_millions / rows[name].millions - 1.914) < 0.003
    model = hm.hide()
    counts = model.parameter_count()
    one = sum(u.parameter_count for name, u in model.experts[0].updates.items() if ".layers.2." in name)
    assert counts["routed"] == 3 * one
    assert counts["fused"] == 2 * one
    assert counts["total"] == 5 * one
