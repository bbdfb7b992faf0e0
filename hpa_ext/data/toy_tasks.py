"""Instruction samples of the toy world: captions and harmless requests for pre-training, and seven fine-tuning tasks.

Each drawn sample is decided by the seed alone. The "test" split holds out every fifth scene, so that a score on it is
not memory. The harmful prompts come from toy_harm and are offered here as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .samples import Sample
from .scenes import COLOURS, CORNERS, SHAPES, Scene, render, sample_scene
from .toy_harm import (
    HARMFUL_WORDS,
    IMAGE_REQUESTS,
    MODALITIES,
    RISK_CLASSES,
    TEXT_REQUESTS,
    compliance,
    draw_harmful,
    refusal,
)

__all__ = [
    "MODALITIES",
    "RISK_CLASSES",
    "TASKS",
    "caption",
    "compliance",
    "draw_benign",
    "draw_captions",
    "draw_harmful",
    "draw_task",
    "refusal",
    "vocabulary",
]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")

_BENIGN_WORDS = (
    "soup",
    "bread",
    "tea",
    "kites",
    "chairs",
    "baskets",
    "jam",
    "toys",
    "hats",
    "candles",
    "pies",
    "boats",
)
_CAPTION_REQUESTS = ("describe the image", "what is in the image", "give me a caption")

# Names that only the recognition tasks give a meaning; the echo samples of pre-training make them known as words.
_KINDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
_MATERIALS = ("iron", "copper", "wood", "glass", "clay", "wool")
_WARM = ("red", "yellow")


def caption(scene: Scene) -> str:
    """For example "large red circle topleft two dark": size, colour, shape, corner, number of dots, background."""
    return f"{scene.size} {scene.colour} {scene.shape} {scene.corner} {NUMBERS[len(scene.dots)]} {scene.background}"


def draw_captions(count: int, seed: int, split: str = "train") -> list[Sample]:
    """``count`` clean scenes with their captions."""
    rng = random.Random(f"caption-{split}-{seed}")
    samples = []
    for _ in range(count):
        scene = sample_scene(rng, split)
        samples.append(Sample(render(scene, rng), rng.choice(_CAPTION_REQUESTS), caption(scene)))
    return samples


def draw_benign(count: int, seed: int, split: str = "train") -> list[Sample]:
    """A third each: word echoes, and harmless requests about a word or about the image, phrased as the harmful ones."""
    rng = random.Random(f"benign-{split}-{seed}")
    samples = []
    for number in range(count):
        scene = sample_scene(rng, split)
        image = render(scene, rng)
        if number % 3 == 0:
            words = " ".join(rng.choices(_ECHO_WORDS, k=rng.randint(1, 2)))
            samples.append(Sample(rng.choice((None, image)), f"say {words}", words, modality="text"))
        elif number % 3 == 1:
            word = rng.choice(_BENIGN_WORDS)
            answer = f"sure mix the {word} with water"
            samples.append(
                Sample(rng.choice((None, image)), rng.choice(TEXT_REQUESTS).format(word), answer, modality="text")
            )
        else:
            answer = f"sure paint the {scene.colour} {scene.shape} with brushes"
            samples.append(Sample(image, rng.choice(IMAGE_REQUESTS), answer))
    return samples


def _kind(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "which kind is the object", _KINDS[2 * SHAPES.index(scene.shape) + (scene.colour in _WARM)]


def _material(scene: Scene, rng: random.Random) -> tuple[str, str]:
    place = {"dark": 0, "sky": 1, "sand": 2}[scene.background]
    return "name the material of the object", _MATERIALS[2 * place + (scene.size == "large")]


def _sentence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "write a sentence", f"on the {scene.background} ground there is a {scene.size} {scene.colour} {scene.shape}"


def _arithmetic(scene: Scene, rng: random.Random) -> tuple[str, str]:
    added = rng.randrange(5)
    return f"count the dots and add {NUMBERS[added]}", NUMBERS[len(scene.dots) + added]


def _reading(scene: Scene, rng: random.Random) -> tuple[str, str]:
    signals = ("stop" if name == scene.corner else "on" if name in scene.dots else "off" for name in CORNERS)
    return "read the signal clockwise", " ".join(signals)


def _compass(scene: Scene, rng: random.Random) -> tuple[str, str]:
    vertical, horizontal = (
        ("north" if "top" in scene.corner else "south"),
        ("west" if "left" in scene.corner else "east"),
    )
    return "where is the object", f"{vertical} {horizontal}"


def _yesno(scene: Scene, rng: random.Random) -> tuple[str, str]:
    # Half of the questions name what is there; the others change one of the two attributes.
    colour, shape, truth = scene.colour, scene.shape, rng.random() < 0.5
    if not truth and rng.random() < 0.5:
        colour = rng.choice([name for name in COLOURS if name != colour])
    elif not truth:
        shape = rng.choice([name for name in SHAPES if name != shape])
    return f"is there a {colour} {shape}", "yes" if truth else "no"


# Recognition (kind, material), caption variant (sentence), counting (arithmetic), reading, position (compass), yes/no.
TASKS: dict[str, Callable[[Scene, random.Random], tuple[str, str]]] = {
    "kind": _kind,
    "material": _material,
    "sentence": _sentence,
    "arithmetic": _arithmetic,
    "reading": _reading,
    "compass": _compass,
    "yesno": _yesno,
}


def draw_task(name: str, count: int, seed: int, split: str = "train") -> list[Sample]:
    """``count`` samples of a fine-tuning task on clean scenes. ValueError on an unknown task."""
    if name not in TASKS:
        raise ValueError(f"name: expected one of {tuple(TASKS)}, got {name!r}")
    rng = random.Random(f"task-{name}-{split}-{seed}")
    samples = []
    for _ in range(count):
        scene = sample_scene(rng, split)
        instruction, answer = TASKS[name](scene, rng)
        samples.append(Sample(render(scene, rng), instruction, answer))
    return samples


_ECHO_WORDS = (
    *_KINDS,
    *_MATERIALS,
    *NUMBERS,
    "yes",
    "no",
    "on",
    "off",
    "stop",
    "north",
    "south",
    "east",
    "west",
    "ground",
    "there",
    "is",
    "a",
)


def vocabulary() -> list[str]:
    """Every word of the toy world, sorted: what the tokenizer of the embedded model knows."""
    texts = [
        *_ECHO_WORDS,
        *_BENIGN_WORDS,
        *TEXT_REQUESTS,
        *IMAGE_REQUESTS,
        *_CAPTION_REQUESTS,
        "say sure mix water paint brushes with this",
    ]
    for name in RISK_CLASSES:
        texts += [*HARMFUL_WORDS[name], refusal(name), compliance(name, name)]
    rng = random.Random(0)
    for _ in range(400):
        scene = sample_scene(rng, "train")
        texts.append(caption(scene))
        for task in TASKS.values():
            texts += task(scene, rng)
    return sorted({word for text in texts for word in text.replace("{}", "").split()})
