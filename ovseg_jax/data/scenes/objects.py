"""`scene_objects`: the classes of `scenes`, one per image, for classification and for training a small CLIP.

An example shows a thing, large in the middle, over a random background; a stuff class fills the image. Drawing and
words are those of `scenes`; nothing is stored. Held-out classes never occur in the training split or its captions.

    source = SceneObjects("train", shots=16)
    source[0]["label"], source.classes.display(source[0]["label"])
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from ovseg_jax.data.images import colour
from ovseg_jax.data.scenes.layout import Layout, place
from ovseg_jax.data.scenes.source import SPLITS, draw, open_world
from ovseg_jax.data.scenes.text import ObjectSpeaker
from ovseg_jax.data.source_base import Example, Source
from ovseg_jax.errors import UserError

CAPTIONS = 3  # per image
RADIUS = (0.7, 0.95)  # of half the image's side
CENTRE = 0.1  # centres lie within +-0.1

# Separate streams of random numbers of one example, as in `scenes`.
_LAYOUT, _PIXELS, _TEXT = range(3)


class SceneObjects(Source):
    """A source of images of one class each: `shots` images of the first class, then of the next.

    An image depends only on (seed, split, class, number of the shot): a larger `shots` or another `group` keeps the
    common images.

    Args:
      split: "train" (without the held-out classes), "validation" or "test" (with all of them).
      shots: images of each class.
      image_size: side of the square images in pixels.
      size: the size of the world: "tiny", "small", "medium" or "large"; see `world`.
      seed: the seed of the whole data set.
      group: shows only the classes of this group: "seen", "held_out" or "stuff"; "" shows all that the split may show.
      count: shows only so many of these classes, spread evenly over their list; 0 shows all.
      fill: colour (red, green, blue; 0..255) in place of the background of things, so that images differ from those
        that a CLIP was trained on.

    Attributes:
      classes: all classes of the world, whatever is shown.
      labels: i32 [n], the class of every example.

    Raises:
      UserError: a split, size or group is unknown, the split does not show the group, the image size is under 32,
        `shots` is under 1, or `fill` is not a colour.
    """

    provides = frozenset({"image", "label", "captions"})
    labels: np.ndarray

    def __init__(
        self,
        split: str = "train",
        shots: int = 16,
        image_size: int = 32,
        size: str = "large",
        seed: int = 0,
        group: str = "",
        count: int = 0,
        fill: Sequence[float] | None = None,
    ):
        self.name = "scene_objects"
        self.world = open_world(self.name, split, size, image_size)
        self.classes = self.world.class_list()
        groups = self.classes.groups
        if group and group not in groups:
            raise UserError(f"{self.name}: group {group!r} is not one of {', '.join(groups)}.")
        if group == "held_out" and split == "train":
            raise UserError(f"{self.name}: split 'train' shows no class of group 'held_out'.")
        if shots < 1:
            raise UserError(f"{self.name}: shots {shots} is less than 1.")
        hidden = set(groups["held_out"]) if split == "train" else set()
        shown = [k for k in groups.get(group, range(len(self.classes))) if k not in hidden]
        if not 0 <= count <= len(shown):
            raise UserError(
                f"{self.name}: count {count} is not between 0 and {len(shown)}, the number of classes."
            )
        some = np.linspace(0, len(shown) - 1, count or len(shown)).round().astype(int)
        self.labels = np.repeat(np.array(shown, np.int32)[some], shots)
        self.split, self.shots, self.image_size, self.seed = split, shots, image_size, seed
        self._fill = None if fill is None else colour(self.name, fill)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        """Returns one example: `image` u8 [S S 3], `label`, `captions`, `image_id`."""
        self._check_index(index)
        label, shot = int(self.labels[index]), index % self.shots
        return Example(
            image=lambda _: self._draw(index),
            label=label,
            captions=lambda _: self._captions(index),
            image_id=f"{self.split}-{label:04d}-{shot:04d}",
        )

    def _draw(self, index: int) -> UInt8[np.ndarray, "s s 3"]:
        layout = self.layout(index)
        image, segments = draw(self.world, layout, self.image_size, self._rng(index, _PIXELS))
        if self._fill is not None and layout.things:
            image[segments == 1] = self._fill
        return image

    def layout(self, index: int) -> Layout:
        """Returns the layout of an example."""
        world, rng, label = self.world, self._rng(index, _LAYOUT), int(self.labels[index])
        if label >= world.num_things:
            return Layout((label - world.num_things,), None, ())
        stuff = int(rng.integers(len(world.stuff)))
        return Layout((stuff,), None, (place(world.thing_of(label), rng, CENTRE, RADIUS),))

    def _captions(self, index: int) -> list[str]:
        names = self.classes.names[int(self.labels[index])]
        speaker = ObjectSpeaker(self.world, self.layout(index), names, self._rng(index, _TEXT))
        return [speaker.caption() for _ in range(CAPTIONS)]

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        label, shot = int(self.labels[index]), index % self.shots
        return np.random.default_rng([self.seed, SPLITS[self.split], label, shot, stream])
