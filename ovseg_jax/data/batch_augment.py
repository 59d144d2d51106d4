"""Augmentations of whole batches, which also remove the words that they make untrue from the captions.

They prevent shortcuts: if colour predicts the noun, a network need not learn the noun's shape. A batch with false
colours, whose captions have lost their colour words, forces it to; a blurred batch whose captions have lost the names
of small objects does the same for colours. A whole batch shares the augmentation, because the grounding loss compares
its captions with each other: a single caption without colour words would be recognised by that alone.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from ovseg_jax.data import transforms
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.words import spoiled

NAMES = ("channels", "hue", "blur")
# Probabilities are constant for this share of the training, then change linearly to their final value.
_HOLD = 0.4


@dataclasses.dataclass(frozen=True)
class BatchAugment:
    """One entry of `data.batch_augment`.

    Attributes:
      name: "channels" (permutes channels and mixes them with grey, for drawn images), "hue" (rotates the hue, for
        photographs) or "blur".
      probability: share of the batches.
      probability_end: the final value of `probability`, reached linearly between 40% and 100% of training; None
        keeps it constant.
      drop: rules for the words to remove, see `vocab.words.spoiled`.
      spare: rules for words that stay nevertheless.
      mask_weight: factor for the mask loss of its examples.
      factor: for "blur": detail finer than this many pixels is removed.
      degrees: for "hue": the largest rotation.
      grey: for "channels" and "hue": the largest share of saturation that is removed.
    """

    name: str
    probability: float
    probability_end: float | None = None
    drop: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    mask_weight: float = 1.0
    factor: float = 8.0
    degrees: float = 180.0
    grey: float = 0.8

    def probability_at(self, progress: float) -> float:
        """Returns the probability after a share `progress` (0..1) of the training."""
        end = self.probability if self.probability_end is None else self.probability_end
        moved = min(max((progress - _HOLD) / (1 - _HOLD), 0.0), 1.0)
        return self.probability + (end - self.probability) * moved

    def apply(
        self, image: UInt8[np.ndarray, "s s 3"], image_size: Int[np.ndarray, "2"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "s s 3"]:
        """Returns the changed image u8 [S S 3] of one example."""
        if self.name == "blur":
            return transforms.blur(image, image_size, self.factor)
        if self.name == "hue":
            return transforms.rotate_hue(image, rng, self.degrees, self.grey)
        return transforms.scramble_channels(image, rng, self.grey)


def parse_batch_augments(entries: Sequence[Mapping[str, Any]]) -> tuple[BatchAugment, ...]:
    """Parses `data.batch_augment`.

    Raises:
      UserError: a name, key or word rule is unknown, or a probability is outside 0..1.
    """
    known = {field.name for field in dataclasses.fields(BatchAugment)}
    augments = []
    for entry in entries:
        values = {key: _typed(key, value) for key, value in entry.items()}
        if unknown := sorted(set(values) - known):
            raise UserError(
                f"data.batch_augment has no key {unknown[0]!r}; known keys: {', '.join(sorted(known))}"
            )
        if values.get("name") not in NAMES or "probability" not in values:
            raise UserError(
                f"data.batch_augment: {dict(entry)} needs a probability and a name, one of {', '.join(NAMES)}"
            )
        augment = BatchAugment(**values)
        ends = augment.probability_at(0.0), augment.probability_at(1.0)
        if not all(0 <= p <= 1 for p in ends):
            raise UserError(
                f"data.batch_augment: the probability of {augment.name!r} is outside 0..1: {ends}"
            )
        for rule in augment.drop + augment.spare:
            spoiled("", "noun", rule)  # raises a UserError for an unknown rule
        augments.append(augment)
    return tuple(augments)


@functools.lru_cache(maxsize=64)  # every example of a batch calls it
def choose(augments: tuple[BatchAugment, ...], seed: int, batch: int, progress: float) -> BatchAugment | None:
    """Draws the augmentation of a batch: the first, in order, whose draw succeeds, or None.

    So the second one applies to a share (1 - p1) * p2 of the batches, and no batch gets two.
    """
    if not augments:
        return None
    coins = np.random.default_rng([seed, batch, _STREAM]).random(len(augments))
    for augment, coin in zip(augments, coins, strict=True):
        if coin < augment.probability_at(progress):
            return augment
    return None


def _typed(key: str, value: Any) -> Any:
    if key in ("drop", "spare"):
        return tuple(value)
    return float(value) if isinstance(value, int) else value


# Separates the random draws of a batch from those of the example with the same number.
_STREAM = 1
