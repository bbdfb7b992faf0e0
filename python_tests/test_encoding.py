"""Conversations through a processor's chat template: ids as inference has them, labels on every answer."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from hpa_ext.data.collate import collate_prompts, collate_training
from hpa_ext.data.conversations import Conversation, Picture, Turn, from_sample
from hpa_ext.data.encoding import ConversationEncoder, _spread
from hpa_ext.data.toy_harm import draw_harmful
from hpa_ext.data.toy_tasks import draw_task
from hpa_ext.models.embedded import embedded_path, load_embedded

QUESTION, ANSWER = "which kind is the object", "alpha beta"


@pytest.fixture(scope="module")
def processor():
    return load_embedded()[1]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_path())


def conversation(*turns):
    roles = ("user", "assistant")
    made = [Turn(roles[i % 2], parts if isinstance(parts, tuple) else (parts,)) for i, parts in enumerate(turns)]
    return Conversation("c", tuple(made), "data.json: record 4")


def picture():
    return Picture(draw_task("kind", 1, 0)[0].image, "p")


def test_single_answers_are_as_in_training(processor):
    samples = draw_task("sentence", 3, 0) + draw_harmful("text", 8, 0)
    encoder = ConversationEncoder(processor)
    found = [from_sample(sample, number) for number, sample in enumerate(samples)]
    for side in ("left", "right"):
        ours, expected = encoder.batch(found, labels=True, side=side), collate_training(processor, samples, side)
        assert set(ours) == set(expected)
        for key, value in expected.items():
            assert torch.equal(ours[key], value), key
    ours = encoder.batch([item.prompt() for item in found], answered=False, side="left")
    for key, value in collate_prompts(processor, samples).items():
        assert torch.equal(ours[key], value), key


def test_every_answer_has_labels(processor):
    encoder = ConversationEncoder(processor)
    encoded = encoder.encode(conversation((picture(), QUESTION), ANSWER, (picture(), QUESTION), "gamma"), labels=True)
    assert [token for token, label in zip(encoded.ids, encoded.labels, strict=True) if label != -100] == [
        *processor.tokenizer(ANSWER, add_special_tokens=False)["input_ids"],
        *processor.tokenizer("gamma", add_special_tokens=False)["input_ids"],
        processor.tokenizer.eos_token_id,
    ]
    assert encoded.ids.count(processor.image_token_id) == 32 and len(encoded.images["pixel_values"]) == 2


def test_texts_alone_take_a_tokenizer(tokenizer, processor):
    tokenizer.chat_template = processor.chat_template
    both = conversation(QUESTION, ANSWER)
    ours = ConversationEncoder(tokenizer).encode(both, labels=True)
    assert ours == ConversationEncoder(processor).encode(both, labels=True)
    with pytest.raises(ValueError, match=r"^data\.json: record 4: has images"):
        ConversationEncoder(tokenizer).encode(conversation((picture(), QUESTION)))


def test_a_template_without_end_token_gets_one_and_one_with_it_none(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    encoded = ConversationEncoder(tokenizer).encode(conversation(QUESTION, ANSWER), labels=True)
    end = tokenizer.eos_token_id
    assert encoded.ids.count(end) == 2 and encoded.ids[-1] == end and encoded.labels[-1] == end
    assert encoded.labels.count(-100) == len(encoded.ids) - 3


def test_a_begin_token_in_the_template_is_not_doubled(tokenizer):
    tokenizer.chat_template = "{{ bos_token + ' ' }}{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    encoded = ConversationEncoder(tokenizer).encode(conversation(QUESTION, ANSWER))
    assert encoded.ids.count(tokenizer.bos_token_id) == 1 and encoded.labels is None


def test_a_processor_without_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template.*chat_template\.jinja"):
        ConversationEncoder(tokenizer)


def test_a_template_that_rewrites_earlier_turns_has_no_labels(tokenizer):
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    encoder = ConversationEncoder(tokenizer)
    assert encoder.encode(conversation(QUESTION, ANSWER, QUESTION, ANSWER)).ids
    with pytest.raises(ValueError, match=r"record 4: the chat template writes turn 2 differently"):
        encoder.encode(conversation(QUESTION, ANSWER, QUESTION, ANSWER), labels=True)


def test_marks_follow_tokens_past_images():
    #        text  image ?     answer        image expanded to 9 9 9, with 7 8 around
    plain, marks = [1, 9, 2, 3, 4], [False, False, False, True, True]
    assert _spread(plain, marks, [1, 9, 9, 9, 2, 3, 4], "here") == [False] * 5 + [True, True]
    assert _spread(plain, marks, [1, 7, 9, 9, 8, 2, 3, 4], "here") == [False] * 6 + [True, True]
    assert _spread(plain, marks, plain, "here") == marks
    with pytest.raises(ValueError, match=r"^here: the processor changes the text"):
        _spread(plain, marks, [1, 9, 9, 2, 3], "here")


def test_batches_without_pad_token(tokenizer, processor):
    tokenizer.chat_template, tokenizer.pad_token = processor.chat_template, None
    encoder = ConversationEncoder(tokenizer)
    short, long = conversation(QUESTION, "alpha"), conversation(QUESTION, ANSWER)
    batch = encoder.batch([short, long], labels=True)
    assert batch["attention_mask"].tolist()[0][-1] == 0 and batch["labels"].tolist()[0][-1] == -100
