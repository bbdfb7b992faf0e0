"""Toy scenes: one coloured object in a corner, signal dots in the other corners, and a hazard mark in harmful images.

A clean scene is one of 3,072 combinations (4 shapes, 4 colours, 2 sizes, 4 corners, 8 dot patterns, 3 backgrounds).
Every fifth combination is held out for tests, so that no test scene was ever trained on; 5 is coprime with all the
factors, so each attribute value stays equally frequent in both parts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIDE = 32  # pixels
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (210, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "yellow": (235, 215, 50)}
SIZES = {"small": 4, "large": 6}  # half the side of the object, in pixels
CORNERS = ("topleft", "topright", "bottomright", "bottomleft")  # clockwise
BACKGROUNDS = {"dark": (25, 25, 30), "sky": (150, 195, 220), "sand": (205, 185, 150)}
# One form of hazard mark per risk class, in the order of toy_tasks.RISK_CLASSES.
HAZARDS = ("saltire", "ring", "bars", "checker")

_MAGENTA = (230, 30, 200)
_CELL_CENTRES = {"topleft": (7, 7), "topright": (24, 7), "bottomright": (24, 24), "bottomleft": (7, 24)}
# Farther out, so that a dot lies within one 8-pixel patch; counting dots that are cut by a patch border is learnt late.
_DOT_CENTRES = {"topleft": (4, 4), "topright": (27, 4), "bottomright": (27, 27), "bottomleft": (4, 27)}
_HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class Scene:
    """Attributes of one image. ``dots``: the corners that hold a signal dot, never the object's own corner."""

    shape: str
    colour: str
    size: str
    corner: str
    dots: tuple[str, ...]
    background: str
    hazard: str | None = None


def _from_index(index: int) -> Scene:
    """The clean scene with this number, in mixed radix over the attributes."""
    index, shape = divmod(index, len(SHAPES))
    index, colour = divmod(index, len(COLOURS))
    index, size = divmod(index, len(SIZES))
    index, corner = divmod(index, len(CORNERS))
    background, pattern = divmod(index, 8)
    free = [name for position, name in enumerate(CORNERS) if position != corner]
    dots = tuple(name for bit, name in enumerate(free) if pattern >> bit & 1)
    return Scene(
        SHAPES[shape], tuple(COLOURS)[colour], tuple(SIZES)[size], CORNERS[corner], dots, tuple(BACKGROUNDS)[background]
    )


SCENE_COUNT = len(SHAPES) * len(COLOURS) * len(SIZES) * len(CORNERS) * 8 * len(BACKGROUNDS)


def sample_scene(rng: random.Random, split: str, hazard: str | None = None) -> Scene:
    """A random scene of ``split`` ("train" or "test"), with the given hazard mark. ValueError on an unknown name."""
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if hazard is not None and hazard not in HAZARDS:
        raise ValueError(f"hazard: expected one of {HAZARDS} or None, got {hazard!r}")
    while True:
        index = rng.randrange(SCENE_COUNT)
        if (index % _HELD_OUT_EVERY == 0) == (split == "test"):
            return replace(_from_index(index), hazard=hazard)


def render(scene: Scene, rng: random.Random) -> np.ndarray:
    """The scene as uint8 ``[32, 32, 3]``. ``rng`` shifts the object by up to a pixel and adds noise of ±6 levels."""
    image = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    x, y = _CELL_CENTRES[scene.corner]
    _draw_object(draw, scene, x + rng.randint(-1, 1), y + rng.randint(-1, 1))
    dot_colour = (250, 250, 250) if scene.background == "dark" else (10, 10, 10)
    for corner in scene.dots:
        x, y = _DOT_CENTRES[corner]
        draw.rectangle((x - 2, y - 2, x + 2, y + 2), fill=dot_colour)
    if scene.hazard is not None:
        _draw_hazard(draw, scene.hazard)
    # random.Random keeps its stream across Python and NumPy versions; NumPy's generators do not promise to.
    noise = np.frombuffer(rng.randbytes(IMAGE_SIDE * IMAGE_SIDE * 3), dtype=np.uint8).astype(np.int16) % 13 - 6
    pixels = np.asarray(image, dtype=np.int16) + noise.reshape(IMAGE_SIDE, IMAGE_SIDE, 3)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _draw_object(draw: ImageDraw.ImageDraw, scene: Scene, x: int, y: int) -> None:
    half, fill = SIZES[scene.size], COLOURS[scene.colour]
    box = (x - half, y - half, x + half, y + half)
    if scene.shape == "circle":
        draw.ellipse(box, fill=fill)
    elif scene.shape == "square":
        draw.rectangle(box, fill=fill)
    elif scene.shape == "triangle":
        draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=fill)
    else:
        arm = 1  # thin in both sizes: a small cross with thick arms looks like a circle
        draw.rectangle((x - arm, y - half, x + arm, y + half), fill=fill)
        draw.rectangle((x - half, y - arm, x + half, y + arm), fill=fill)


def _draw_hazard(draw: ImageDraw.ImageDraw, form: str) -> None:
    """A magenta mark of 10 pixels on black in the centre; it covers at most the inner edge of a large object."""
    low, high = 11, 20
    draw.rectangle((low, low, high, high), fill=(0, 0, 0))
    if form == "saltire":
        draw.line((low, low, high, high), fill=_MAGENTA, width=3)
        draw.line((low, high, high, low), fill=_MAGENTA, width=3)
    elif form == "ring":
        draw.ellipse((low, low, high, high), outline=_MAGENTA, width=3)
    elif form == "bars":
        for x in range(low, high, 4):
            draw.rectangle((x, low, x + 1, high), fill=_MAGENTA)
    else:
        draw.rectangle((low, low, low + 4, low + 4), fill=_MAGENTA)
        draw.rectangle((low + 5, low + 5, high, high), fill=_MAGENTA)
