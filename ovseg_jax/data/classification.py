"""Rows of images with one class, or one caption, each: what prompts and small CLIPs are trained and scored on."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ovseg_jax.data.images import centre_square
from ovseg_jax.data.rand_augment import rand_augment, rand_augment_dassl
from ovseg_jax.data.source_base import Source
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.lexicon import LEXICON
from ovseg_jax.vocab.word_tokenizer import WordTokenizer
from ovseg_jax.vocab.words import WordList, split_words

# Keeps an example's draws apart from those of the order of the same number.
_STREAM = 0

RATIO = (3 / 4, 4 / 3)  # width by height of a random crop, as in torchvision
POLICIES = {"torchvision": rand_augment, "dassl": rand_augment_dassl}


@dataclasses.dataclass(frozen=True)
class Augment:
    """A random crop, resized to a square by bicubic interpolation, then a flip, then RandAugment.

    Attributes:
      size: side of the square in pixels.
      crop: the smallest and largest share of the image's area.
      flip: whether half of the images are mirrored.
      randaugment: number of its operations; 0 for none.
      policy: whose RandAugment, see `rand_augment`: "torchvision" (of magnitude 9) or "dassl".
    """

    size: int
    crop: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    randaugment: int = 2
    policy: str = "torchvision"

    @classmethod
    def from_config(cls, data: Any) -> "Augment":
        """Reads `image_size` and `augment` (the attributes above) of `config.data`.

        Raises:
          UserError: a key of `augment` that is none of these, or a value that cannot be.
        """
        given = dict((data.get("augment") or {}).items())
        known = [field.name for field in dataclasses.fields(cls) if field.name != "size"]
        if unknown := sorted(set(given) - set(known)):
            raise UserError(f"data.augment has no key {unknown[0]!r}; it has {', '.join(known)}")
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
        self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, may_flip: bool = True
    ) -> UInt8[np.ndarray, "s s 3"]:
        """An augmented square; without `may_flip` it is not mirrored."""
        top, left, height, width = random_crop(image.shape[0], image.shape[1], self.crop, rng)
        # Cut first: a filter that reaches over the border would show what lies outside.
        part = Image.fromarray(image[top : top + height, left : left + width])
        image = np.asarray(part.resize((self.size, self.size), Image.Resampling.BICUBIC))
        if self.flip and rng.random() < 0.5 and may_flip:
            image = image[:, ::-1]
        if self.randaugment:
            image = POLICIES[self.policy](np.ascontiguousarray(image), rng, self.randaugment)
        return image


def random_crop(
    height: int, width: int, share: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """The (top, left, height, width) of a crop, drawn as by torchvision's `RandomResizedCrop`.

    Its area is a `share` of the image's and its aspect lies in `RATIO`, evenly by logarithm; after ten draws
    that do not fit, it is the largest one in the middle whose aspect lies there.
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


@dataclasses.dataclass(frozen=True)
class ClassifyTransform:
    """Turns example number `index` of the infinite stream into a row: `image`, `label`, `example_mask`.

    An example may hold a `feature` in place of an image, [D], or [V D] of V views, of which one is drawn; consecutive
    rows that show one example get different ones. The row is a function of (seed, index, example) alone.

    Attributes:
      seed: of all draws.
      augment: of images.
      views: how many consecutive rows show one example.
    """

    seed: int
    augment: Augment
    views: int = 1

    @classmethod
    def from_config(cls, config: Any, words: WordList) -> "ClassifyTransform":
        """Reads `seed` and, of `data`, `image_size`, `augment` and `views`; labels need no words."""
        del words
        data = config["data"]
        return cls(int(config["seed"]), Augment.from_config(data), int(data.get("views", 1)))

    def __call__(self, index: int, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Makes row number `index` of the stream."""
        row = {"label": np.int32(example["label"]), "example_mask": np.bool_(True)}
        if "feature" in example:
            feature = np.asarray(example["feature"], np.float32)
            if feature.ndim == 2:
                group, place = divmod(index, self.views)
                order = np.random.default_rng([self.seed, group, _STREAM]).permutation(len(feature))
                feature = feature[order[place % len(order)]]
            return {"feature": feature, **row}  # type: ignore[dict-item]
        rng = np.random.default_rng([self.seed, index, _STREAM])
        return {"image": self.augment(example["image"], rng), **row}  # type: ignore[dict-item]


@dataclasses.dataclass(frozen=True)
class CaptionTransform:
    """Turns example number `index` into a row with a caption: `image`, `ids`, `valid`, `example_mask`.

    The caption is drawn from those of the image. An image is not mirrored where its caption speaks of left or
    right, and has `example_mask` False where it has no caption. RandAugment changes colours and shapes,
    whatever the caption says of them: `data.augment.randaugment=0` leaves it out.
    """

    seed: int
    augment: Augment
    tokenizer: WordTokenizer

    @classmethod
    def from_config(cls, config: Any, words: WordList) -> "CaptionTransform":
        """Reads `seed` and, of `data`, `image_size`, `augment` and `text_length` (tokens, 24 by default)."""
        data = config["data"]
        tokenizer = WordTokenizer(words, int(data.get("text_length", 24)))
        return cls(int(config["seed"]), Augment.from_config(data), tokenizer)

    def __call__(self, index: int, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Makes row number `index` of the stream.

        Raises:
          UserError: the caption holds a word that is not in the vocabulary.
        """
        rng = np.random.default_rng([self.seed, index, _STREAM])
        captions = example.get("captions") or ()
        caption = captions[int(rng.integers(len(captions)))] if captions else ""
        sided = not LEXICON["side"].isdisjoint(split_words(caption))
        ids, valid = self.tokenizer([caption])
        return {
            "image": self.augment(example["image"], rng, may_flip=not sided),
            "ids": ids[0],
            "valid": valid[0],
            "example_mask": np.bool_(len(captions) > 0),  # type: ignore[dict-item]
        }


@dataclasses.dataclass(frozen=True)
class ClassifyEval:
    """Turns a position in a classification source into a row of evaluation; -1 makes a row of padding.

    The row holds `image` (see `centre_square`) or the example's `feature`, `label`, `index` and
    `example_mask`.
    """

    needs: ClassVar = frozenset({"label"})

    source: Source
    image_size: int

    @classmethod
    def from_config(cls, data: Any, source: Source) -> "ClassifyEval":
        """Reads `image_size` of `config.data`."""
        return cls(source, int(data["image_size"]))

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        """Reads example `index` of the source."""
        example = self.source[max(index, 0)]
        if "feature" in example:
            row = {"feature": np.asarray(example["feature"], np.float32)}
        else:
            row = {"image": centre_square(example["image"], self.image_size)}
        row["label"] = np.asarray(example["label"], np.int32)
        if index < 0:
            row = {key: np.zeros_like(value) for key, value in row.items()}
        return {**row, "index": np.int32(index), "example_mask": np.bool_(index >= 0)}  # type: ignore[dict-item]
