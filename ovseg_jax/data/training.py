"""From an example of a source to a row of a training batch: augment, cut to size, masks, words."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ovseg_jax.data import transforms
from ovseg_jax.data.batch_augment import BatchAugment, choose, parse_batch_augments
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.words import FILTERS, Tagged, WordList, extract_words, keep_of, without_spoiled

# Keeps an example's draws apart from those of the batch of the same number.
_STREAM = 0

# A mirrored image makes them untrue.
FLIP_DROP = ("lexicon:side",)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Turns example number `index` of the infinite stream into a row of its batch.

    The row is a function of (seed, index, example) alone, whichever process or thread makes it. `word_valid`
    may be all False (a caption whose words were all spoiled, or none at all): the grounding loss leaves such
    a row out. `mask_weight` is 0 for an image without masks.
    """

    words: WordList
    seed: int
    steps: int
    batch_size: int
    image_size: int
    mask_stride: int
    max_masks: int
    max_words: int
    keep: tuple[str, ...]
    keep_prob: Mapping[str, float]
    tagger: str
    jitter: tuple[float, float]
    flip: bool
    augments: tuple[BatchAugment, ...]

    @classmethod
    def from_config(cls, config: Any, words: WordList) -> "TrainTransform":
        """Reads `seed`, `steps`, `batch_size` and `data` of a config.

        Raises:
          UserError: a value that cannot be.
        """
        data = config["data"]
        size, stride = int(data["image_size"]), int(data.get("mask_stride", 4))
        if size % stride:
            raise UserError(f"data.image_size={size} does not divide by data.mask_stride={stride}")
        jitter = tuple(float(f) for f in data.get("scale_jitter", (1.0, 1.0)))
        if len(jitter) != 2 or not 0 < jitter[0] <= jitter[1]:
            raise UserError(f"data.scale_jitter={jitter} is not (lowest, highest) with 0 < lowest <= highest")
        return cls(
            words=words,
            seed=int(config["seed"]),
            steps=int(config["steps"]),
            batch_size=int(config["batch_size"]),
            image_size=size,
            mask_stride=stride,
            max_masks=int(data.get("max_masks", 64)),
            max_words=int(data.get("max_words", 24)),
            keep=keep_of(data.get("caption_filter", "noun+adj")),
            keep_prob=_keep_prob(data.get("keep_prob", 0.5)),
            tagger=data.get("tagger", "pattern"),
            jitter=jitter,  # type: ignore[arg-type]
            flip=bool(data.get("flip", True)),
            augments=parse_batch_augments(data.get("batch_augment") or ()),
        )

    def __call__(self, index: int, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Makes the row `index % batch_size` of batch `index // batch_size`."""
        batch = index // self.batch_size
        augment = choose(self.augments, self.seed, batch, batch / max(self.steps, 1))
        rng = np.random.default_rng([self.seed, index, _STREAM])
        words = self._spoken(example["captions"], rng)
        if self.flip and rng.random() < 0.5:
            example = transforms.flip(example)
            words = without_spoiled(words, FLIP_DROP)
        example = transforms.scale_jitter(example, self.image_size, self.jitter, rng)
        image = example["image"]
        if augment is not None:
            image = augment.apply(image, example["image_size"], rng)
            words = without_spoiled(words, augment.drop, augment.spare)
        word_ids, word_valid = self._pad(self._kept(words, rng))
        ids = transforms.chosen_segments(example["segments"], example["iscrowd"], self.max_masks)
        mask_weight = (augment.mask_weight if augment else 1.0) if len(ids) else 0.0
        return {
            "image": image,
            "image_size": example["image_size"],
            "masks": transforms.segment_masks(example["segments"], ids, self.max_masks, self.mask_stride),
            "mask_valid": np.arange(self.max_masks) < len(ids),
            "mask_weight": np.float32(mask_weight),
            "word_ids": word_ids,
            "word_valid": word_valid,
            "pixel_classes": transforms.class_map(
                example["segments"], example["class_ids"], self.mask_stride
            ),
            "example_mask": np.bool_(True),
        }

    def _spoken(self, captions: Sequence[str], rng: np.random.Generator) -> list[Tagged]:
        """The known words of one caption, drawn from those of the image."""
        if not captions:
            return []
        caption = captions[int(rng.integers(len(captions)))]
        tagged = extract_words(caption, self.keep, self.tagger)
        return [(word, pos) for word, pos in tagged if word in self.words]

    def _kept(self, words: list[Tagged], rng: np.random.Generator) -> list[str]:
        """Keeps each word with its probability kp (section 3.2); the luckiest stays if all would go."""
        if not words:
            return []
        draws = rng.random(len(words))
        kept = [w for (w, pos), u in zip(words, draws, strict=True) if u < self.keep_prob[pos]]
        return kept or [words[int(draws.argmin())][0]]

    def _pad(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        words = words[: self.max_words]
        ids = np.zeros(self.max_words, np.int32)
        ids[: len(words)] = self.words.ids(words)
        return ids, np.arange(self.max_words) < len(words)


def _keep_prob(value: Any) -> dict[str, float]:
    """kp for each part of speech: one number for all, or a mapping with a "default" for the unnamed."""
    parts = FILTERS["all"]
    if hasattr(value, "items"):
        given = {key: float(p) for key, p in value.items()}
        if unknown := sorted(set(given) - {*parts, "default"}):
            raise UserError(
                f"data.keep_prob has no key {unknown[0]!r}; it has {', '.join(parts)} and default"
            )
        keep = {pos: given.get(pos, given.get("default", 1.0)) for pos in parts}
    else:
        keep = dict.fromkeys(parts, float(value))
    if not all(0 <= p <= 1 for p in keep.values()):
        raise UserError(f"data.keep_prob={value} leaves 0..1")
    return keep
