"""Augmentations that hit a whole batch and take the words that they make untrue out of its captions.

Captions allow shortcuts: where colour predicts which nouns never occur together, a network need not look at
nouns at all. A batch without true colours, whose captions have lost their colour words, closes that way; a
blurred batch that has lost the names of small things does the same for colours. The whole batch must share
the choice, because the grounding loss compares its captions with each other: a caption without colour words
would otherwise be told by that alone.
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
# Probabilities stay as they are for this share of the training, then move linearly to their end.
_HOLD = 0.4


@dataclasses.dataclass(frozen=True)
class BatchAugment:
    """One entry of `data.batch_augment`.

    Attributes:
      name: "channels" (channels permuted and mixed with grey: drawn images), "hue" (hue turned: photographs)
        or "blur".
      probability: share of the batches.
      probability_end: what `probability` moves to, linearly, between 40% and 100% of training; None = it
        stays.
      drop: rules for the words it spoils, see `vocab.words.spoiled`.
      spare: rules for words that stay nevertheless.
      mask_weight: factor for the mask loss of its examples.
      factor: of "blur": detail finer than so many pixels goes.
      degrees: of "hue": the largest turn.
      grey: of "channels" and "hue": the largest share of saturation that is taken away.
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
        """The probability after a share `progress` of the training."""
        end = self.probability if self.probability_end is None else self.probability_end
        moved = min(max((progress - _HOLD) / (1 - _HOLD), 0.0), 1.0)
        return self.probability + (end - self.probability) * moved

    def apply(
        self, image: UInt8[np.ndarray, "s s 3"], image_size: Int[np.ndarray, "2"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "s s 3"]:
        """The image changed; draws of one example."""
        if self.name == "blur":
            return transforms.blur(image, image_size, self.factor)
        if self.name == "hue":
            return transforms.rotate_hue(image, rng, self.degrees, self.grey)
        return transforms.scramble_channels(image, rng, self.grey)


def parse_batch_augments(entries: Sequence[Mapping[str, Any]]) -> tuple[BatchAugment, ...]:
    """Reads `data.batch_augment`.

    Raises:
      UserError: an unknown name, key or word rule, or probabilities that are none.
    """
    known = {field.name for field in dataclasses.fields(BatchAugment)}
    augments = []
    for entry in entries:
        values = {key: _typed(key, value) for key, value in entry.items()}
        if unknown := sorted(set(values) - known):
            raise UserError(
                f"data.batch_augment has no key {unknown[0]!r}; it has {', '.join(sorted(known))}"
            )
        if values.get("name") not in NAMES or "probability" not in values:
            raise UserError(
                f"data.batch_augment: {dict(entry)} needs a name out of {', '.join(NAMES)} and a probability"
            )
        augment = BatchAugment(**values)
        ends = augment.probability_at(0.0), augment.probability_at(1.0)
        if not all(0 <= p <= 1 for p in ends):
            raise UserError(f"data.batch_augment: the probability of {augment.name!r} leaves 0..1: {ends}")
        for rule in augment.drop + augment.spare:
            spoiled("", "noun", rule)
        augments.append(augment)
    return tuple(augments)


@functools.lru_cache(maxsize=64)  # asked for by every example of a batch
def choose(augments: tuple[BatchAugment, ...], seed: int, batch: int, progress: float) -> BatchAugment | None:
    """Which augmentation hits a batch: the first, in order, whose coin falls; none where no coin does.

    So the second one hits a share (1 - p1) * p2 of the batches, and no batch is hit twice.
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


# Keeps a batch's draws apart from those of the example of the same number.
_STREAM = 1
