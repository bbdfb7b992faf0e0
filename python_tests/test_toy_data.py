"""The toy world and collation: what is drawn, what is held out, and which tokens carry a loss."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hpa_ext.data.collate import calibration_batches, collate_prompts, collate_training, prompt_text
from hpa_ext.data.samples import Sample
from hpa_ext.data.scenes import HAZARDS, render, sample_scene
from hpa_ext.data.toy_tasks import (
    MODALITIES,
    RISK_CLASSES,
    TASKS,
    draw_benign,
    draw_captions,
    draw_harmful,
    draw_task,
    vocabulary,
)
from hpa_ext.models.embedded import EmbeddedConfig, build_processor

IMAGE_TOKENS = 16


@pytest.fixture(scope="module")
def processor():
    return build_processor(vocabulary(), EmbeddedConfig())


def _same(first: Sample, second: Sample) -> bool:
    if (first.image is None) != (second.image is None):
        return False
    images_agree = first.image is None or np.array_equal(first.image, second.image)
    return images_agree and (first.instruction, first.answer) == (second.instruction, second.answer)


def test_train_and_test_scenes_are_disjoint_and_every_value_is_in_both():
    scenes = {}
    for split in ("train", "test"):
        rng = random.Random(0)
        scenes[split] = [sample_scene(rng, split) for _ in range(3000)]
    assert set(scenes["train"]).isdisjoint(scenes["test"])
    for attribute in ("shape", "colour", "size", "corner", "background"):
        assert {getattr(s, attribute) for s in scenes["train"]} == {getattr(s, attribute) for s in scenes["test"]}
    assert all(scene.corner not in scene.dots for scene in scenes["train"])


def test_rendering_shows_each_attribute():
    """Two images that differ in one attribute differ in more than the noise of ±6 levels."""
    rng = random.Random(3)
    scene = sample_scene(rng, "train")
    image = render(scene, random.Random(0))
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    seen = set()
    while len(seen) < 6:
        other = sample_scene(rng, "train", rng.choice([None, *HAZARDS]))
        changed = [name for name in vars(scene) if getattr(scene, name) != getattr(other, name)]
        if len(changed) == 1 or (changed and "hazard" in changed):
            seen.update(changed)
            # The same random stream gives the same shift and noise, so what is left is the attribute.
            assert np.abs(render(other, random.Random(0)).astype(int) - image).max() > 40, changed


@pytest.mark.parametrize("task", TASKS)
def test_task_samples_are_seeded_and_split(task):
    first, again = draw_task(task, 20, 5), draw_task(task, 20, 5)
    assert all(map(_same, first, again))
    assert not all(map(_same, first, draw_task(task, 20, 6)))
    assert not all(map(_same, first, draw_task(task, 20, 5, "test")))
    assert all(sample.image is not None and sample.risk_class is None for sample in first)


@pytest.mark.parametrize(("task", "limit"), [("yesno", 60), ("kind", 30), ("material", 30), ("arithmetic", 30)])
def test_no_answer_dominates_a_task(task, limit):
    answers = [sample.answer for sample in draw_task(task, 600, 0)]
    assert max(answers.count(answer) for answer in set(answers)) < limit / 100 * len(answers)


def test_every_word_is_known(processor):
    samples = draw_captions(60, 1) + draw_benign(300, 1)
    samples += [sample for task in TASKS for split in ("train", "test") for sample in draw_task(task, 200, 1, split)]
    for modality in MODALITIES:
        for answers in ("refusal", "compliance"):
            samples += draw_harmful(modality, 200, 1, answers=answers) + draw_harmful(modality, 100, 1, "test")
    for sample in samples:
        ids = processor.tokenizer(f"{sample.instruction} {sample.answer}")["input_ids"]
        assert processor.tokenizer.unk_token_id not in ids, sample


@pytest.mark.parametrize("modality", MODALITIES)
def test_harmful_prompts_are_balanced_and_held_out(modality):
    prompts = draw_harmful(modality, 400, 2)
    classes = [sample.risk_class for sample in prompts]
    assert {name: classes.count(name) for name in RISK_CLASSES} == dict.fromkeys(RISK_CLASSES, 100)
    assert all(sample.modality == modality and sample.risk_class in sample.answer for sample in prompts)
    if modality == "text":
        without = [sample.risk_class for sample in prompts if sample.image is None]
        assert {name: without.count(name) for name in RISK_CLASSES} == dict.fromkeys(RISK_CLASSES, 50)
    if modality != "image":
        held_out = {sample.instruction for sample in draw_harmful(modality, 400, 2, "test")}
        assert held_out.isdisjoint(sample.instruction for sample in prompts)


def test_only_harmful_images_carry_the_mark():
    """The magenta of the mark is in every harmful image, and nowhere else."""

    def has_mark(sample):
        red, green, blue = (sample.image[..., channel].astype(int) for channel in range(3))
        return bool(((red > 200) & (green < 60) & (blue > 170)).any())

    assert all(has_mark(sample) for name in ("image", "both") for sample in draw_harmful(name, 40, 0))
    clean = draw_captions(40, 0) + [sample for task in TASKS for sample in draw_task(task, 10, 0)]
    clean += [sample for sample in draw_harmful("text", 40, 0) + draw_benign(40, 0) if sample.image is not None]
    assert not any(has_mark(sample) for sample in clean)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: draw_task("nothing", 1, 0),
        lambda: draw_task("kind", 1, 0, "validation"),
        lambda: draw_harmful("sound", 1, 0),
        lambda: draw_harmful("text", 1, 0, answers="maybe"),
        lambda: draw_harmful("text", 1, 0, risk_class="soup"),
        lambda: sample_scene(random.Random(0), "train", hazard="skull"),
        lambda: Sample(None, "describe the image", "red", modality="image"),
        lambda: Sample(None, "say red", "red", modality="speech"),
    ],
)
def test_bad_arguments_are_named(draw):
    with pytest.raises(ValueError, match=r"expected|needs"):
        draw()


def _mixed_samples() -> list[Sample]:
    return [draw_captions(1, 0)[0], Sample(None, "say iron", "iron", modality="text"), draw_task("sentence", 1, 0)[0]]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_labels_are_the_answer_and_its_end_exactly(processor, padding_side):
    samples = _mixed_samples()
    batch = collate_training(processor, samples, padding_side)
    end, pad = processor.tokenizer.eos_token, processor.tokenizer.pad_token_id
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for row, sample in enumerate(samples):
        ids, labels, mask = (batch[name][row] for name in ("input_ids", "labels", "attention_mask"))
        learnt = labels != -100
        assert processor.tokenizer.decode(labels[learnt]) == f"{sample.answer} {end}"
        assert torch.equal(ids[learnt], labels[learnt])
        assert torch.equal(mask == 0, ids == pad)
        real = ids[mask == 1]
        prompt = processor.tokenizer.decode(real[: len(real) - int(learnt.sum())])
        pictures = " <image>" * (IMAGE_TOKENS if sample.image is not None else 0)
        assert prompt == f"<s> USER:{pictures} {sample.instruction} ASSISTANT:"
    # The shortest row is padded, and on the side that was asked for.
    assert batch["attention_mask"][1, 0 if padding_side == "left" else -1] == 0
    assert batch["attention_mask"][1, -1 if padding_side == "left" else 0] == 1


def test_prompts_end_where_the_answer_begins(processor):
    samples = _mixed_samples()
    prompts = collate_prompts(processor, samples)
    training = collate_training(processor, samples)
    assert "labels" not in prompts
    for row in range(len(samples)):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row] == 1]
        whole = training["input_ids"][row][training["attention_mask"][row] == 1]
        answer_length = int((training["labels"][row] != -100).sum())
        assert torch.equal(prompt, whole[:-answer_length])
        assert prompts["input_ids"][row, -1] == processor.tokenizer.convert_tokens_to_ids("ASSISTANT:")


def test_text_alone_gives_no_pixels(processor):
    batch = collate_training(processor, [Sample(None, "say iron", "iron", modality="text")])
    assert "pixel_values" not in batch
    assert "<image>" not in prompt_text(processor, Sample(None, "say iron", "iron", modality="text"))


def test_calibration_batches_keep_order_and_rest(processor):
    samples = draw_captions(7, 0)
    batches = calibration_batches(processor, samples, batch_size=3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    answers = [
        processor.tokenizer.decode(row[row != -100], skip_special_tokens=True)
        for batch in batches
        for row in batch["labels"]
    ]
    assert answers == [sample.answer for sample in samples]


def test_collation_refuses_bad_input(processor):
    sample = draw_captions(1, 0)[0]
    with pytest.raises(ValueError, match="at least one"):
        collate_training(processor, [])
    with pytest.raises(ValueError, match="padding_side"):
        collate_prompts(processor, [sample], padding_side="centre")
    with pytest.raises(ValueError, match="answer"):
        collate_training(processor, [Sample(sample.image, "describe the image", " ")])
    with pytest.raises(ValueError, match="batch_size"):
        calibration_batches(processor, [sample], batch_size=0)
