"""Panoptic quality (Kirillov et al. 2019) from the overlaps of segments: exact counts, divided once, in float64.

A predicted and a true segment of one class match if their IoU is above 0.5, so that every segment has at most one
match. For each class, with TP matches, FP other predictions and FN other true segments,

    SQ = sum of IoU / TP        RQ = TP / (TP + FP / 2 + FN / 2)        PQ = SQ * RQ

and each is averaged over the classes with a segment in truth or prediction; SQ is 0 for a class without a match.

The rules for pixels without a true segment differ between data sets:

    coco      (panopticapi, detectron2; ADE20K, Cityscapes, Mapillary) Void pixels do not count in a union. A prediction
              without a match is no FP if more than half of it is void or on a crowd of its class (of several crowds of
              a class, the last).
    bdd100k   (bdd100k.eval.pan_seg) Void pixels count in unions. A prediction without a match is no FP if more than
              half of it is on no true segment that is not a crowd.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt64

from ovseg_jax.vocab.classes import ClassList

Rule = Literal["coco", "bdd100k"]
RULES: tuple[Rule, ...] = ("coco", "bdd100k")

VOID = -1
"""The class of true segments that are treated as void: those without a label."""


class Overlaps(NamedTuple):
    """The pairs of a predicted and a true segment that share pixels; number 0 means none, in the truth void.

    Attributes:
      predicted: the number of the predicted segment of each pair.
      true: the number of the true segment of each pair.
      pixels: the number of pixels that they share.
    """

    predicted: Int[np.ndarray, "n"]
    true: Int[np.ndarray, "n"]
    pixels: Int[np.ndarray, "n"]


class Tally(NamedTuple):
    """The sums from which PQ is computed, per class, [K] each.

    Attributes:
      iou: the sum of the IoU of all matches.
      tp: the matches.
      fp: the other predicted segments, without those that the rule ignores.
      fn: the other true segments.
    """

    iou: Float[np.ndarray, "k"]
    tp: Int[np.ndarray, "k"]
    fp: Int[np.ndarray, "k"]
    fn: Int[np.ndarray, "k"]


class ClassRow(NamedTuple):
    """A line of the per-class table; percentages are None for a class in neither truth nor prediction."""

    name: str
    kind: str
    pq: float | None
    sq: float | None
    rq: float | None
    tp: int
    fp: int
    fn: int


def overlaps(predicted: Integer[np.ndarray, "h w *c"], true: Integer[np.ndarray, "h w *c"]) -> Overlaps:
    """Counts the shared pixels of two maps of ids, in one pass over runs of equal pixels.

    Args:
      predicted: ids below 2^32, [H W]; or u8 [H W 3], colours whose ids are R + 256 G + 65536 B. Of colours, only those
        at the ends of runs are made ids, which takes a third of the time.
      true: the same, of the same shape.
    """
    count = math.prod(predicted.shape[:2])
    if not count:
        return Overlaps(*(np.zeros(0, np.int64) for _ in range(3)))
    step = predicted.size // count
    first, second = predicted.reshape(-1), true.reshape(-1)
    change = first[step:] != first[:-step]
    change |= second[step:] != second[:-step]
    last = np.append(np.flatnonzero(change), first.size - 1)
    if step > 1:  # a pixel may change in several colours
        last //= step
        last = last[np.append(last[1:] != last[:-1], True)]
    bits = 24 if step > 1 else 32
    pair, pixels = _sums(
        _ids(first, last, step) << bits | _ids(second, last, step), np.diff(last, prepend=-1), bits
    )
    return Overlaps((pair >> bits).astype(np.int64), (pair & (1 << bits) - 1).astype(np.int64), pixels)


def _ids(pixels: Integer[np.ndarray, " m"], at: Int[np.ndarray, " n"], step: int) -> UInt64[np.ndarray, " n"]:
    """Returns the ids of some pixels, of which the last is the last one of all; `step` is the number of colours."""
    if step == 1:
        return pixels[at].astype(np.uint64)
    found = np.empty(len(at), np.uint64)
    # Reads four bytes at each pixel of three; the fourth, of the next pixel, is masked out.
    four = np.ndarray(len(pixels) // 3 - 1, "<u4", np.ascontiguousarray(pixels).data, 0, (3,))
    np.bitwise_and(four[at[:-1]], 0xFFFFFF, out=found[:-1])
    found[-1] = int.from_bytes(pixels[-3:].tobytes(), "little")
    return found


def _sums(
    keys: UInt64[np.ndarray, " n"], values: Int[np.ndarray, " n"], bits: int
) -> tuple[UInt64[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Returns the keys, ascending and once each, and the sum of the values of each; they have twice `bits` bits."""
    places = len(keys).bit_length()
    if 2 * bits + places > 64:
        order = np.argsort(keys)
        keys = keys[order]
    else:  # Keys and places in one number are sorted in a fourth of the time of argsort.
        both = np.sort(keys << places | np.arange(len(keys), dtype=np.uint64))
        keys, order = both >> places, both & (1 << places) - 1
    new = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    return keys[new], np.add.reduceat(values[order], new)


class _Pairs(NamedTuple):
    """The pairs of a predicted and a true segment that is not void, and the areas of predicted segments, from 1 on."""

    predicted: Int[np.ndarray, "n"]
    true: Int[np.ndarray, "n"]
    pixels: Float[np.ndarray, "n"]
    iou: Float[np.ndarray, "n"]
    same: Bool[np.ndarray, "n"]
    area: Float[np.ndarray, "p1"]
    on_void: Float[np.ndarray, "p1"]


def _pairs(
    shared: Overlaps,
    predicted_class: np.ndarray,
    true_class: np.ndarray,
    num_classes: int,
    rule: Rule,
    stated: np.ndarray | None,
) -> _Pairs:
    count = len(predicted_class)
    void = np.concatenate([[True], true_class == VOID])
    area = np.bincount(shared.predicted, shared.pixels, count + 1)
    true_area = np.bincount(shared.true, shared.pixels, len(true_class) + 1).astype(np.float64)
    if stated is not None:
        true_area[1:] = np.where(stated > 0, stated, true_area[1:])
    on_void = np.bincount(shared.predicted, np.where(void[shared.true], shared.pixels, 0), count + 1)
    real = (shared.predicted > 0) & ~void[shared.true]
    p, t = shared.predicted[real] - 1, shared.true[real] - 1
    pixels = shared.pixels[real].astype(np.float64)
    guess = predicted_class[p]
    union = area[p + 1] + true_area[t + 1] - pixels
    if rule == "coco":
        union = union - on_void[p + 1]
    same = (guess == true_class[t]) & (guess >= 0) & (guess < num_classes)
    return _Pairs(p, t, pixels, pixels / union, same, area, on_void)


def matches(
    shared: Overlaps,
    predicted_class: Int[np.ndarray, "p"],
    true_class: Int[np.ndarray, "t"],
    true_crowd: Bool[np.ndarray, "t"],
    num_classes: int,
    rule: Rule = "coco",
    stated: Float[np.ndarray, "t"] | None = None,
) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "m"]]:
    """Returns the predicted and the true segment of each match, numbered from 1, by the arguments of `tally`."""
    found = _pairs(shared, predicted_class, true_class, num_classes, rule, stated)
    hit = found.same & ~true_crowd[found.true] & (found.iou > 0.5)
    return found.predicted[hit] + 1, found.true[hit] + 1


def tally(
    shared: Overlaps,
    predicted_class: Int[np.ndarray, "p"],
    true_class: Int[np.ndarray, "t"],
    true_crowd: Bool[np.ndarray, "t"],
    num_classes: int,
    rule: Rule = "coco",
    stated: Float[np.ndarray, "t"] | None = None,
) -> Tally:
    """Matches the segments of one image.

    Args:
      shared: the overlaps, of segments numbered from 1.
      predicted_class: the class of each predicted segment; segments outside 0..K-1 or without pixels do not count.
      true_class: the class of each true segment; `VOID` is treated as void, and K or more neither as void nor as a
        segment that could be missed.
      true_crowd: whether a true segment is a crowd.
      num_classes: the number K of classes.
      rule: how void and crowds count, see the module.
      stated: the area of each true segment that takes the place of its pixels in unions, as in panopticapi, where it is
        above 0.
    """
    count, k = len(predicted_class), num_classes
    p, t, pixels, iou, same, area, on_void = _pairs(shared, predicted_class, true_class, k, rule, stated)
    crowd = true_crowd[t]
    hit = same & ~crowd & (iou > 0.5)

    if rule == "coco":
        # panopticapi keeps one crowd for each class.
        last = np.full(k, -1)
        where = np.flatnonzero(true_crowd & (true_class >= 0) & (true_class < k))
        last[true_class[where]] = where
        on_crowd = crowd & same & (last[np.clip(true_class[t], 0, k - 1)] == t)
        ignored = on_void[1:] + np.bincount(p, np.where(on_crowd, pixels, 0), count)
    else:
        ignored = area[1:] - np.bincount(p, np.where(crowd | (true_class[t] >= k), 0, pixels), count)
    counts = (area[1:] > 0) & (predicted_class >= 0) & (predicted_class < k) & (2 * ignored <= area[1:])
    counts[p[hit]] = False
    missed = ~true_crowd & (true_class >= 0) & (true_class < k)
    missed[t[hit]] = False
    matched = true_class[t[hit]]
    return Tally(
        np.bincount(matched, iou[hit], k),
        np.bincount(matched, minlength=k),
        np.bincount(predicted_class[counts], minlength=k),
        np.bincount(true_class[missed], minlength=k),
    )


def add(total: Tally | None, image: Tally) -> Tally:
    """Adds an image's tally to the total, or to None."""
    return image if total is None else Tally(*(a + b for a, b in zip(total, image, strict=True)))


def by_class(total: Tally) -> tuple[np.ndarray, np.ndarray]:
    """Returns PQ, SQ and RQ of each class in percent, [3 K], and whether the class occurs (else they are undefined)."""
    iou, tp, fp, fn = (np.asarray(x, np.float64) for x in total)
    weight = tp + fp / 2 + fn / 2
    some = np.maximum(weight, 0.5)
    return 100 * np.stack([iou / some, iou / np.maximum(tp, 1), tp / some]), weight > 0


def scores(
    total: Tally, isthing: Sequence[bool], groups: Mapping[str, Sequence[int]] | None = None
) -> dict[str, float]:
    """Computes `pq`, `sq` and `rq` in percent: means over the classes that occur in truth or prediction.

    The same for each group as `pq/<group>` and so on, and for `thing` and `stuff`. A mean over no class is left out.
    """
    each, occurs = by_class(total)
    members = {"": np.ones(len(occurs), bool), "thing": np.asarray(isthing, bool)}
    members["stuff"] = ~members["thing"]
    members |= {
        name: np.isin(np.arange(len(occurs)), np.asarray(own, np.int64))
        for name, own in (groups or {}).items()
    }
    result = {}
    for name, own in members.items():
        if (own & occurs).any():
            for metric, value in zip(("pq", "sq", "rq"), each[:, own & occurs].mean(1), strict=True):
                result[f"{metric}/{name}".rstrip("/")] = float(value)
    return result


def table(total: Tally, classes: ClassList) -> list[ClassRow]:
    """Returns a row for each class: its first name, "thing" or "stuff", its scores and counts."""
    each, occurs = by_class(total)
    rows = []
    for k in range(len(classes)):
        pq, sq, rq = each[:, k].tolist() if occurs[k] else (None, None, None)
        kind = "thing" if classes.isthing[k] else "stuff"
        rows.append(ClassRow(classes.display(k), kind, pq, sq, rq, *(int(x[k]) for x in total[1:])))
    return rows
