"""Counts of pixels per class in pairs of label maps, by runs of equal pixels.

Label maps consist of areas, so a row holds few changes. Each run of pixels whose prediction and truth stay the same is
looked up and counted once, with its length, which takes a fifth of the time of a histogram of all pixels.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from ovseg_jax.data.images import read_wide_mask
from ovseg_jax.scoring.files import Fault, Pair

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".pgm")

UNLISTED, VOID, FIRST = 0, 1, 2
"""Slots of pixels: neither a class nor ignored, ignored, and class 0; class k has slot FIRST + k."""

_IGNORED = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535, np.dtype(np.int32): -1}
"""The value that is ignored by default in a truth of each type, unless it is a class."""

_RUNS = 4  # pixels per run; with fewer, a histogram of all pixels is faster


class Values(NamedTuple):
    """The meaning of pixel values.

    Attributes:
      known: the values that mean something, ascending.
      slots: the slot of each.
      rest: the slot of all other values.
      ignore_default: whether 255 in 8 bits, 65535 in 16 and -1 in 32 are ignored where they are not listed.
    """

    known: tuple[int, ...]
    slots: tuple[int, ...]
    rest: int = UNLISTED
    ignore_default: bool = False

    @classmethod
    def of(
        cls,
        classes: Mapping[int, int],
        ignored: Iterable[int] = (),
        *,
        rest: int | None = None,
        ignore_default: bool = False,
    ) -> "Values":
        """Creates the meaning of the values of classes and of ignored ones.

        Args:
          classes: the class of each value that means one.
          ignored: values that are ignored, also where `classes` has them.
          rest: the class of all other values; by default they mean none.
          ignore_default: see above.
        """
        slots = {value: FIRST + k for value, k in classes.items()} | dict.fromkeys(ignored, VOID)
        known = tuple(sorted(slots))
        other = UNLISTED if rest is None else FIRST + rest
        return cls(known, tuple(slots[value] for value in known), other, ignore_default)

    def look_up(self, pixels: Integer[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
        """Returns the slot of each pixel value, as int64."""
        if pixels.dtype.itemsize <= 2:
            return _table(self, pixels.dtype)[pixels]
        return self.search(pixels, pixels.dtype)

    def search(self, pixels: Integer[np.ndarray, "*n"], dtype: np.dtype) -> Int[np.ndarray, "*n"]:
        """Returns the slots without a table, for values in a file of this type."""
        known, slots = np.asarray(self.known, np.int64), np.asarray(self.slots, np.int64)
        at = np.minimum(np.searchsorted(known, pixels), len(known) - 1)
        found = np.where(known[at] == pixels, slots[at], self.rest)
        if self.ignore_default:
            found = np.where((found == UNLISTED) & (pixels == _IGNORED[dtype]), VOID, found)
        return found


@functools.lru_cache(8)
def _table(values: Values, dtype: np.dtype) -> Int[np.ndarray, "size"]:
    return values.search(np.arange(np.iinfo(dtype).max + 1), dtype)


class Rules(NamedTuple):
    """The meaning of the values of truths and predictions.

    Attributes:
      truth: of the truth.
      prediction: of the prediction.
      classes: the number of classes.
    """

    truth: Values
    prediction: Values
    classes: int


class Counted(NamedTuple):
    """The pixels of one image.

    Attributes:
      classes: the classes in truth or prediction, [m].
      pixels: [3 m] for each of them the pixels of intersection, truth and prediction.
      void: pixels that are ignored.
      unlisted: labelled pixels whose prediction is no class; they are wrong.
      miou: the image's own mIoU in percent, over its classes in truth or prediction; None without a labelled pixel.
    """

    classes: Int[np.ndarray, "m"]
    pixels: Int[np.ndarray, "3 m"]
    void: int
    unlisted: int
    miou: float | None


def count_pair(rules: Rules, pair: Pair) -> Counted:
    """Reads and counts one pair of label maps.

    Raises:
      UserError: a file cannot be read, the sizes differ, or the truth has a value that is neither a class nor ignored.
    """
    prediction, truth = _read(pair)
    return count(prediction, truth, rules, pair.truth)


def read_pair(rules: Rules, pair: Pair) -> tuple[Int[np.ndarray, "h w"], Int[np.ndarray, "h w"]]:
    """Returns the classes of prediction and truth of one pair, [H W] each; -1 for none, and for both where ignored.

    Raises:
      UserError: see `count_pair`.
    """
    prediction, truth = _read(pair)
    label, guess = rules.truth.look_up(truth), rules.prediction.look_up(prediction)
    label, guess = (np.maximum(slots - FIRST, -1) for slots in (label, guess))
    return np.where(label < 0, -1, guess), label


def _read(pair: Pair) -> tuple[Integer[np.ndarray, "h w"], Integer[np.ndarray, "h w"]]:
    prediction, truth = read_wide_mask(pair.prediction), read_wide_mask(pair.truth)
    if prediction.shape != truth.shape:
        sizes = [f"{height} x {width}" for height, width in (prediction.shape, truth.shape)]
        raise Fault(
            "another size",
            f"the prediction {pair.prediction} is {sizes[0]} (height x width), but its truth {pair.truth} is "
            f"{sizes[1]}",
        )
    return prediction, truth


def count(
    prediction: Integer[np.ndarray, "h w"],
    truth: Integer[np.ndarray, "h w"],
    rules: Rules,
    name: str = "the truth",
) -> Counted:
    """Counts the pixels of each class.

    Args:
      prediction: pixel values.
      truth: pixel values.
      rules: their meaning.
      name: the truth's file, for errors.

    Raises:
      UserError: the truth has a value that is neither a class nor ignored.
    """
    guessed, labelled = prediction.ravel(), truth.ravel()
    start, length = _runs(guessed, labelled)
    # In noise, runs are too short to gain from.
    weights = length.astype(np.float64) if len(length) < len(labelled) / _RUNS else None
    if weights is not None:
        guessed, labelled = guessed[start], labelled[start]
    label, guess = rules.truth.look_up(labelled), rules.prediction.look_up(guessed)
    guess[label == VOID] = VOID
    # Sums of whole numbers in float64 are exact below 2^53.
    sums = [
        np.bincount(slots, weights, FIRST + rules.classes)
        for slots in (np.where(label == guess, label, UNLISTED), label, guess)
    ]
    if sums[1][UNLISTED]:
        raise Fault(
            "unknown value",
            f"{name} has the value {labelled[label == UNLISTED][0]}, which is neither a class nor ignored: see "
            "--classes, --ignore and --reduce_zero_label",
        )
    classes = np.flatnonzero(sums[1][FIRST:] + sums[2][FIRST:])
    pixels = np.stack([total[FIRST:][classes] for total in sums]).astype(np.int64)
    inside, truths, guesses = pixels
    miou = 100.0 * float(np.mean(inside / (truths + guesses - inside))) if truths.any() else None
    return Counted(classes, pixels, int(sums[1][VOID]), int(sums[2][UNLISTED]), miou)


def _runs(
    first: Integer[np.ndarray, "n"], second: Integer[np.ndarray, "n"]
) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "m"]]:
    """Returns start and length of each run of places in which neither array changes."""
    change = first[1:] != first[:-1]
    change |= second[1:] != second[:-1]
    inner = np.flatnonzero(change)
    bounds = np.empty(len(inner) + 2, np.int64)
    bounds[0], bounds[1:-1], bounds[-1] = 0, inner + 1, len(first)
    return bounds[:-1], np.diff(bounds)
