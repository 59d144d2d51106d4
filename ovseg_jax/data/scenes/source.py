"""`scenes`: the embedded data set, drawn from a seed, with every kind of label that the methods use.

An image shows one or two textured backgrounds (stuff) and one to three objects (things) that occlude each other, under
light of varying strength and direction. It has panoptic segments with class and box, captions, tags, region captions
and region tags. Some colour-noun pairs never occur in the training split or its captions: they are the held-out
classes. Nothing is stored: example `i` is a pure function of (seed, split, i).

    source = Scenes(split="train", image_size=64)
    source[0]["captions"]  # ['a green kite lies near a red ball on the grass', ...]
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Int32, UInt8

from ovseg_jax.data.scenes import layout as scenes_layout
from ovseg_jax.data.scenes import render as scenes_render
from ovseg_jax.data.scenes.text import Speaker
from ovseg_jax.data.scenes.world import World
from ovseg_jax.data.source_base import Example, Extent, Source
from ovseg_jax.data.transforms import segment_boxes
from ovseg_jax.errors import UserError

SPLITS = {"train": 0, "validation": 1, "test": 2}
_NUM_EXAMPLES = {"train": 20_000, "validation": 200, "test": 500}
# Separate streams of random numbers of one example, so that text does not depend on pixels, nor pixels on text.
_LAYOUT, _PIXELS, _TEXT = range(3)

# Light and paint, as a factor or in units of the 8-bit range.
GAIN = 0.2  # +-, of the whole image
SLOPE = 0.15  # +-, from the middle to each border, in x and in y
NOISE = 6.0  # standard deviation, of the sensor
PAINT = 10.0  # standard deviation of an object's colour, per channel
SHADE = 0.15  # up to +-, across an object


class Scenes(Source):
    """A source of drawn scenes.

    Args:
      split: "train" (without the held-out classes), "validation" or "test" (with all of them).
      num_examples: number of images; by default 20,000 / 200 / 500 for train / validation / test.
      image_size: side of the square images in pixels; the same scenes appear at every size.
      size: "tiny" (20 classes), "small" (64), "medium" (394) or "large" (2412); see `world`.
      seed: the seed of the whole data set.
      num_captions: number of captions per image.

    Raises:
      UserError: the split or size is unknown, or the image size is under 32.
    """

    provides = frozenset("image segments class_ids boxes captions tags region_captions region_tags".split())

    def __init__(
        self,
        split: str = "train",
        num_examples: int | None = None,
        image_size: int = 64,
        size: str = "small",
        seed: int = 0,
        num_captions: int = 2,
    ):
        self.world = open_world("scenes", split, size, image_size)
        if num_examples is not None and num_examples < 1:
            raise UserError(f"scenes: num_examples {num_examples} is less than 1.")
        self.split = split
        self.image_size = image_size
        self.seed = seed
        self.num_captions = num_captions
        self.name = "scenes"
        self.classes = self.world.class_list()
        self._length = _NUM_EXAMPLES[split] if num_examples is None else num_examples

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        """Returns one example, whose image and texts are made when they are accessed."""
        layout = functools.cache(lambda: self.layout(index))
        drawn = functools.cache(
            lambda: draw(self.world, layout(), self.image_size, self._rng(index, _PIXELS))
        )
        speak = lambda: Speaker(self.world, layout(), self._rng(index, _TEXT))
        spoken = lambda speaker: [speaker.caption() for _ in range(self.num_captions)]

        def region_captions(_: Example) -> list[list[str]]:
            speaker = speak()
            spoken(speaker)  # advances the stream of random numbers past the captions
            return speaker.region_captions()

        return Example(
            image=lambda _: drawn()[0],
            segments=lambda _: drawn()[1],
            class_ids=lambda _: self._class_ids(layout()),
            isthing=lambda e: np.asarray(self.classes.isthing)[e["class_ids"]],
            iscrowd=lambda e: np.zeros(len(e["class_ids"]), bool),
            boxes=lambda e: segment_boxes(drawn()[1], len(e["class_ids"])),
            captions=lambda _: spoken(speak()),
            image_id=f"{self.split}-{self._index(index):06d}",
            tags=lambda _: speak().tags(),
            region_captions=region_captions,
            region_tags=lambda _: speak().region_tags(),
        )

    def _class_ids(self, layout: scenes_layout.Layout) -> Int32[np.ndarray, n]:
        stuff = [self.world.stuff_class(k) for k in layout.stuff]
        things = [self.world.thing_class(t.noun, t.colour, t.pattern) for t in layout.things]
        return np.array(stuff + things, np.int32)

    def extent(self) -> Extent:
        """Returns the size of every image and the largest possible number of segments."""
        return Extent(self.image_size, self.image_size, 2 + scenes_layout.MAX_THINGS)

    def layout(self, index: int) -> scenes_layout.Layout:
        """Returns the layout of an example."""
        return scenes_layout.draw_layout(
            self.world, self._rng(index, _LAYOUT), allow_held_out=self.split != "train"
        )

    def _index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"scenes: example {index} of {len(self)}")
        return int(index) % len(self)

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS[self.split], self._index(index), stream])


def open_world(source: str, split: str, size: str, image_size: int) -> World:
    """Returns the world of `size`, for a source of that name.

    Raises:
      UserError: the split or size is unknown, or the image size is under 32.
    """
    if split not in SPLITS:
        raise UserError(f"{source}: split {split!r} is not one of {', '.join(SPLITS)}.")
    if image_size < 32:
        raise UserError(f"{source}: image_size {image_size} is less than 32, too small to show the patterns.")
    try:
        return World.of_size(size)
    except ValueError as e:
        raise UserError(f"{e}.") from e


def draw(
    world: World, layout: scenes_layout.Layout, size: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "s s 3"], Int32[np.ndarray, "s s"]]:
    """Draws a layout: a square image u8 [S S 3], and its segments i32 [S S] (1-based; backgrounds, then things)."""
    image = scenes_render.background(world.stuff[layout.stuff[0]][0], size, rng)
    segments = np.ones((size, size), np.int32)
    if layout.horizon is not None:
        lower = scenes_layout.lower_part(layout, size)
        image[lower] = scenes_render.background(world.stuff[layout.stuff[1]][0], size, rng)[lower]
        segments[lower] = 2
    for number, thing in enumerate(layout.things, start=len(layout.stuff) + 1):
        window, u, v, mask = scenes_layout.thing_window(world, thing, size)
        noun = world.nouns[thing.noun]
        texture = world.patterns[thing.pattern] if world.patterns else noun
        paint = (world.colours[thing.colour][1] + PAINT * rng.standard_normal(3)).astype(np.float32)
        unit = 32 * thing.radius  # of u and v, in 1/64 of the side
        figure = scenes_render.pattern(texture.pattern, u * unit, v * unit, rng)[..., None]
        tone = scenes_render.tone(texture.tone, paint, rng)
        shade = 1 + SHADE * rng.uniform(-1, 1) * v[..., None]
        image[window][mask] = ((paint + figure * (tone - paint)) * shade)[mask]
        segments[window][mask] = number
    x, y = scenes_render.grid(size)
    gain, across, down = rng.uniform(-1, 1, 3) * (GAIN, SLOPE, SLOPE)
    light = (np.float32(1 + gain) + np.float32(across) * x + np.float32(down) * y)[..., None]
    noise = rng.standard_normal(image.shape, np.float32)
    noise *= np.float32(NOISE)
    image *= light
    image += noise
    return np.clip(image, 0, 255, out=image).astype(np.uint8), segments
