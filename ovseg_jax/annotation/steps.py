"""The steps between the annotators, as pure functions of one image: papers/003, section 3 and appendix C."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Int32


def clean_texts(texts: Sequence[str]) -> list[str]:
    """Removes extra spaces, empty texts and duplicates; the order stays.

    Texts that differ in case, or in a full stop at the end, are duplicates; the first stays.
    """
    kept: dict[str, str] = {}
    for text in (" ".join(text.split()) for text in texts):
        if key := text.casefold().rstrip(" ."):
            kept.setdefault(key, text)
    return list(kept.values())


def vote_tags(found: Sequence[Sequence[str]], votes: int) -> list[str]:
    """Returns the tags that at least `votes` annotators gave, in the order of their first occurrence."""
    cleaned = [clean_texts(tags) for tags in found]
    count = Counter(tag.casefold() for tags in cleaned for tag in tags)
    return clean_texts([tag for tags in cleaned for tag in tags if count[tag.casefold()] >= votes])


def score_floor(scores: Float[np.ndarray, "n"], quantile: float, lowest: float) -> float:
    """Returns the lowest score of a text that stays.

    Args:
      scores: of all texts of the data set.
      quantile: the share of them to drop.
      lowest: a score below which a text is dropped in any case.
    """
    return max(lowest, float(np.quantile(scores, quantile))) if len(scores) else lowest


def box_iou(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Computes the IoU of boxes x0, y0, x1, y1; 0 where both are empty."""
    inside = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    shared = np.maximum(inside, 0).prod(-1)
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b))
    union = area_a[:, None] + area_b - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def nms(boxes: Float[np.ndarray, "n 4"], scores: Float[np.ndarray, "n"], iou: float) -> Int[np.ndarray, "k"]:
    """Returns the indices of the boxes that stay, best first: each has an IoU of at most `iou` with every better one.

    Boxes of all classes and detectors compete, since two detectors name one object by two words.
    """
    order = np.argsort(-scores, kind="stable")
    overlap = box_iou(boxes, boxes)
    kept: list[int] = []
    for k in order:
        if not (overlap[k, kept] > iou).any():
            kept.append(int(k))
    return np.array(kept, np.int64)


def jitter_boxes(
    boxes: Float[np.ndarray, "n 4"], shifts: Sequence[float], size: tuple[int, int]
) -> Float[np.ndarray, "s n 4"]:
    """Moves boxes along their diagonal (appendix C).

    Args:
      boxes: x0, y0, x1, y1 in pixels.
      shifts: in shares of the width and height of a box.
      size: height and width of the image, in which they stay.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    moved = boxes + np.asarray(shifts, np.float64)[:, None, None] * np.tile(sides, 2)
    height, width = size
    return np.clip(moved, 0, [width, height, width, height])


def stability(
    masks: Bool[np.ndarray, "n h w"], others: Bool[np.ndarray, "s n h w"]
) -> Float[np.ndarray, "n"]:
    """Computes the mean IoU of each mask with those of its moved boxes (appendix C); 0 for two empty masks."""
    both = (masks & others).sum((2, 3), dtype=np.float64)
    either = (masks | others).sum((2, 3), dtype=np.float64)
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0).mean(0)


def merge_panoptic(
    things: Bool[np.ndarray, "n h w"],
    thing_scores: Float[np.ndarray, "n"],
    stuff: Bool[np.ndarray, "m h w"],
    stuff_scores: Float[np.ndarray, "m"],
    size: tuple[int, int],
    min_visible: float,
    min_stuff_area: int,
) -> tuple[Int32[np.ndarray, "h w"], list[int]]:
    """Merges masks to segments that do not overlap: things by their scores, then backgrounds in what is left.

    As in Panoptic FPN (Kirillov et al. 2019): a thing of which better ones hide more than 1 - `min_visible` is dropped,
    and so is a background with fewer than `min_stuff_area` free pixels. A label should have one background at most.

    Args:
      things: masks of things.
      thing_scores: a better one is in front.
      stuff: masks of backgrounds.
      stuff_scores: a better one is in front.
      size: height and width of the image.
      min_visible: the least visible share of a thing.
      min_stuff_area: the least visible pixels of a background.

    Returns:
      (segments, 0 = void, numbered from 1; for each the index of its mask, those of stuff after those of things).
    """
    segments, chosen = np.zeros(size, np.int32), list[int]()
    for masks, scores, least in (
        (things, thing_scores, lambda area: max(1, min_visible * area)),
        (stuff, stuff_scores, lambda area: max(1, min_stuff_area)),
    ):
        first = 0 if masks is things else len(things)
        for k in np.argsort(-scores, kind="stable"):
            free = masks[k] & (segments == 0)
            if free.sum() >= least(masks[k].sum()):
                chosen.append(first + int(k))
                segments[free] = len(chosen)
    return segments, chosen
