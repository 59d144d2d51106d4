"""Geometric augmentation of a training row: one random flip, scale and crop of image, segments and boxes together.

With `data.augment` it is `RandomCrop`, meant for images of one class; with `data.short_side` `ShortSideCrop`,
mmsegmentation's for scenes; otherwise `ScaleJitter`, meant for scenes, too.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from ovseg_jax.data import transforms
from ovseg_jax.data.rand_augment import rand_augment, rand_augment_dassl
from ovseg_jax.errors import UserError

RATIO = (3 / 4, 4 / 3)  # bounds of a random crop's width / height, as in torchvision
POLICIES = {"torchvision": rand_augment, "dassl": rand_augment_dassl}


@dataclasses.dataclass(frozen=True)
class ScaleJitter:
    """A random flip, then `transforms.scale_jitter`.

    Attributes:
      size: side of the square canvas in pixels.
      jitter: lowest and highest factor of the scale.
      flip: whether half of the images are mirrored.
    """

    size: int
    jitter: tuple[float, float] = (1.0, 1.0)
    flip: bool = True

    @classmethod
    def from_config(cls, data: Any) -> "ScaleJitter":
        """Creates it from `image_size`, `scale_jitter` and `flip` of `config.data`.

        Raises:
          UserError: `scale_jitter` is not (lowest, highest) with 0 < lowest <= highest.
        """
        jitter = tuple(float(f) for f in data.get("scale_jitter", (1.0, 1.0)))
        if len(jitter) != 2 or not 0 < jitter[0] <= jitter[1]:
            raise UserError(f"data.scale_jitter={jitter} is not (lowest, highest) with 0 < lowest <= highest")
        return cls(int(data["image_size"]), jitter, bool(data.get("flip", True)))  # type: ignore[arg-type]

    def __call__(
        self, example: transforms.Example, rng: np.random.Generator, may_flip: bool = True
    ) -> tuple[dict[str, Any], bool]:
        """Returns the example with `image_size` added, and whether it was mirrored."""
        flipped = self.flip and rng.random() < 0.5 and may_flip
        example = transforms.flip(example) if flipped else example
        return transforms.scale_jitter(example, self.size, self.jitter, rng), flipped


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A random crop, resized to a square, then a random flip, then RandAugment of the image.

    Attributes:
      size: side of the square in pixels.
      crop: the smallest and largest share of the image's area.
      flip: whether half of the images are mirrored.
      randaugment: number of RandAugment operations; 0 for none.
      policy: the variant of RandAugment, see `rand_augment`: "torchvision" (magnitude 9) or "dassl".
    """

    size: int
    crop: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    randaugment: int = 2
    policy: str = "torchvision"

    @classmethod
    def from_config(cls, data: Any) -> "RandomCrop":
        """Creates it from `image_size` and `augment` (the attributes above) of `config.data`.

        Raises:
          UserError: `augment` has an unknown key or an invalid value.
        """
        given = _known("augment", data.get("augment") or {}, cls)
        crop = tuple(float(share) for share in given.pop("crop", cls.crop))
        if len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1:
            raise UserError(
                f"data.augment.crop={crop} is not (smallest, largest) with 0 < smallest <= largest <= 1"
            )
        augment = cls(int(data["image_size"]), crop, **given)
        if augment.randaugment < 0:
            raise UserError(f"data.augment.randaugment={augment.randaugment} is less than 0")
        if augment.policy not in POLICIES:
            raise UserError(f"data.augment.policy={augment.policy!r} is not one of {', '.join(POLICIES)}")
        return augment

    def __call__(
        self, example: transforms.Example, rng: np.random.Generator, may_flip: bool = True
    ) -> tuple[dict[str, Any], bool]:
        """Returns the example with `image_size` added, and whether it was mirrored."""
        height, width = example["image"].shape[:2]
        out = transforms.crop_resize(example, random_crop(height, width, self.crop, rng), self.size)
        flipped = self.flip and rng.random() < 0.5 and may_flip
        out = transforms.flip(out) if flipped else out
        if self.randaugment:
            image = np.ascontiguousarray(out["image"])
            out["image"] = POLICIES[self.policy](image, rng, self.randaugment)
        return out, flipped


@dataclasses.dataclass(frozen=True)
class ShortSideCrop:
    """A random flip, then `transforms.short_side_crop`, then `transforms.distort_colours`.

    Attributes:
      size: side of the square in pixels.
      ratio: lowest and highest short side, in units of `size`.
      long_side: the highest long side, in pixels, at the ratio 1.
      category_share: the share of a crop's labelled pixels that one category may not reach.
      flip: whether half of the images are mirrored.
      colours: whether colours change.
    """

    size: int
    ratio: tuple[float, float] = (0.5, 2.0)
    long_side: int = 2048
    category_share: float = 0.75
    flip: bool = True
    colours: bool = True

    @classmethod
    def from_config(cls, data: Any) -> "ShortSideCrop":
        """Creates it from `image_size` and `short_side` (the attributes above) of `config.data`.

        Raises:
          UserError: `short_side` has an unknown key or an invalid value.
        """
        given = _known("short_side", data["short_side"], cls)
        ratio = tuple(float(share) for share in given.pop("ratio", cls.ratio))
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise UserError(
                f"data.short_side.ratio={ratio} is not (lowest, highest) with 0 < lowest <= highest"
            )
        share = float(given.pop("category_share", cls.category_share))
        made = cls(int(data["image_size"]), ratio, category_share=share, **given)
        for name, valid in (
            ("long_side", made.long_side >= 1),
            ("category_share", 0 < made.category_share <= 1),
        ):
            if not valid:
                raise UserError(f"data.short_side.{name}={getattr(made, name)} is out of range")
        return made

    def __call__(
        self, example: transforms.Example, rng: np.random.Generator, may_flip: bool = True
    ) -> tuple[dict[str, Any], bool]:
        """Returns the example with `image_size` added, and whether it was mirrored."""
        # mmsegmentation mirrors after the crop: the distribution is the same.
        flipped = self.flip and rng.random() < 0.5 and may_flip
        out = transforms.short_side_crop(
            transforms.flip(example) if flipped else example,
            self.size,
            self.ratio,
            rng,
            long_side=self.long_side,
            category_share=self.category_share,
        )
        if self.colours:
            out["image"] = transforms.distort_colours(out["image"], rng)
        return out, flipped


Geometry = ScaleJitter | RandomCrop | ShortSideCrop


def geometry_of(data: Any, moves_regions: bool) -> Geometry:
    """Creates the geometric augmentation that `config.data` describes.

    Args:
      data: `config.data`, with `augment` for `RandomCrop`, `short_side` for `ShortSideCrop`, or else the keys of
        `ScaleJitter`.
      moves_regions: whether masks or boxes are transformed with the image.

    Raises:
      UserError: the keys of several are given, or RandAugment, which transforms only the image, with masks or boxes.
    """
    if data.get("short_side") is not None:
        if other := [key for key in ("augment", "scale_jitter", "flip") if data.get(key) is not None]:
            raise UserError(f"data.short_side has its own scale and flip: leave out data.{other[0]}")
        return ShortSideCrop.from_config(data)
    if data.get("augment") is None:
        return ScaleJitter.from_config(data)
    if "scale_jitter" in data or "flip" in data:
        raise UserError(
            "data.augment has its own crop and flip (data.augment.crop, data.augment.flip): leave out "
            "data.scale_jitter and data.flip"
        )
    crop = RandomCrop.from_config(data)
    if moves_regions and crop.randaugment:
        raise UserError(
            f"data.augment.randaugment={crop.randaugment} transforms images without their masks and boxes: set it to 0"
        )
    return crop


def _known(key: str, given: Any, kind: Any) -> dict[str, Any]:
    """Returns the given attributes of a kind of augmentation; raises a UserError for an unknown one."""
    values = dict(given.items())
    known = [field.name for field in dataclasses.fields(kind) if field.name != "size"]
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"data.{key} has no key {unknown[0]!r}; known keys: {', '.join(known)}")
    return values


def random_crop(
    height: int, width: int, share: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws the (top, left, height, width) of a crop as torchvision's `RandomResizedCrop` does.

    Its area is a random share of the image's, within `share`, and its aspect is log-uniform within `RATIO`. If ten
    draws do not fit, it is the largest central crop with an aspect within `RATIO`.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*share)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w
