"""Semantic segmentation scores from three exact counts per class: pixels of its truth, its prediction and both.

IoU, pixel accuracy and frequency-weighted IoU do not need the K x K confusion matrix, which would have 400 million
entries for 20,000 classes. This module computes on the host; `pixel_counts` counts on devices.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from ovseg_jax.vocab.classes import ClassList


class Counts(NamedTuple):
    """Pixel counts per class, [K] each, in arrays of NumPy or JAX; pixels without a label are not counted.

    Attributes:
      intersection: pixels labelled and predicted as the class.
      truth: pixels labelled as the class.
      prediction: labelled pixels predicted as the class.
    """

    intersection: Int[Any, "k"]
    truth: Int[Any, "k"]
    prediction: Int[Any, "k"]


class ClassRow(NamedTuple):
    """A line of the per-class table; `iou` in percent, None for a class in neither truth nor prediction."""

    name: str
    pixels: int
    iou: float | None


def iou(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Returns the IoU of each class in percent, and whether it occurs in truth or prediction (else it is undefined)."""
    intersection, truth, prediction = map(np.asarray, counts)
    union = truth + prediction - intersection
    return 100.0 * intersection / np.maximum(union, 1), union > 0


def scores(counts: Counts, groups: Mapping[str, Sequence[int]] | None = None) -> dict[str, float]:
    """Computes the scores of a data set, all in percent.

    - `miou`: mean IoU over the classes that occur in truth or prediction (mmsegmentation, old detectron2).
    - `miou_gt`: mean IoU over the classes that occur in the truth (detectron2 since July 2022). It differs from `miou`
      by several points if many absent classes are predicted, so the two must not be compared.
    - `pacc`: share of labelled pixels that are correct. `macc`: mean over classes in the truth of the share of
      their pixels that are correct. `fwiou`: IoU weighted by pixels of truth.
    - `chance_miou`: the expected `miou` if every pixel gets one of the K classes at random. With t the share of a
      class's pixels in the truth, its expected intersection is t/K and its prediction 1/K, so its IoU is
      (t/K) / (t + 1/K - t/K) = t / (1 + (K-1) t); the mean is over all K classes, since all are predicted.
      `chance_miou_gt` is the mean over the classes in the truth.
    - for each group, `miou/<group>`, `miou_gt/<group>` and the chance levels: the mean over the group's classes, with
      predictions among all classes.
    - `hiou`, `hiou_gt`: the harmonic mean of `miou/seen` and `miou/unseen` (or `miou/held_out`), and of their
      `miou_gt` (papers/000, appendix C).

    A score whose divisor is zero (a group that never occurs, no labelled pixel) is omitted.
    """
    total = int(counts.truth.sum())
    if not total:
        return {}
    each, either = iou(counts)
    k, truth = len(each), counts.truth > 0
    share = counts.truth / total
    chance = 100.0 * share / (1 + (k - 1) * share)
    result = {
        "pacc": 100.0 * float(counts.intersection.sum() / total),
        "macc": 100.0 * float((counts.intersection[truth] / counts.truth[truth]).mean()),
        "fwiou": float((share * each).sum()),
    }
    everything = {"": np.ones(k, bool)}
    for name, members in (groups or {}).items():
        everything[f"/{name}"] = np.isin(np.arange(k), np.asarray(members, np.int64))
    for suffix, member in everything.items():
        if (member & either).any():
            result[f"miou{suffix}"] = float(each[member & either].mean())
        if (member & truth).any():
            result[f"miou_gt{suffix}"] = float(each[member & truth].mean())
            result[f"chance_miou{suffix}"] = float(chance[member].mean())
            result[f"chance_miou_gt{suffix}"] = float(chance[member & truth].mean())
    for divisor in ("", "_gt"):
        other = next((g for g in ("unseen", "held_out") if f"miou{divisor}/{g}" in result), "")
        both = [result[name] for g in ("seen", other) if (name := f"miou{divisor}/{g}") in result]
        if len(both) == 2:
            result[f"hiou{divisor}"] = 2 * both[0] * both[1] / sum(both) if sum(both) else 0.0
    return result


def table(counts: Counts, classes: ClassList) -> list[ClassRow]:
    """Returns a row for each class: its first name, its pixels in the truth, its IoU."""
    each, either = iou(counts)
    return [
        ClassRow(classes.display(k), int(counts.truth[k]), float(each[k]) if either[k] else None)
        for k in range(len(classes))
    ]
