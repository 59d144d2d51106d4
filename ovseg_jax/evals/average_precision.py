"""Average precision and recall of instances, boxes and proposals, by COCO's and LVIS's rules (faster-coco-eval).

Detections are matched to the truth from the best score on, each to the free true instance of its class with the highest
IoU of at least the threshold. Precision is averaged over 101 recalls, ten thresholds from 0.5 to 0.95, and the classes
in the truth. Crowds, and instances outside of an area range, count neither as found nor as missed. LVIS's rules differ
(Gupta et al. 2019): an image counts for a class only if it holds it or is known to lack it, false detections of a class
that is not labelled exhaustively in an image do not count, and the best 300 detections of an image count.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Kind = Literal["bbox", "segm"]

LIMITS = {False: 100, True: 300}
"""The number of detections of an image that count in COCO's AP and in LVIS's."""

COCO_NAMES = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
LVIS_NAMES = "AP AP50 AP75 APs APm APl APr APc APf AR@300 ARs@300 ARm@300 ARl@300".split()
FREQUENCIES = ("r", "c", "f")


class Curves(NamedTuple):
    """Precision and recall at T IoU thresholds, R recalls, K classes, A areas (all, s, m, l), M limits; -1 = undefined.

    Attributes:
      precision: the best precision at each recall or a higher one.
      recall: the highest recall.
      categories: the category id of each class.
      limits: the limits of detections per image and class.
    """

    precision: Float[np.ndarray, "t r k a m"]
    recall: Float[np.ndarray, "t k a m"]
    categories: list[int]
    limits: tuple[int, ...]


def curves(
    truth: Mapping[str, list[dict[str, Any]]],
    found: Sequence[Mapping[str, Any]],
    kind: Kind,
    *,
    limits: tuple[int, ...] = (1, 10, 100),
    federated: bool = False,
    by_class: bool = True,
) -> Curves:
    """Matches detections to the truth.

    Args:
      truth: `images`, `annotations` and `categories` in COCO's form, checked. Annotations have ids from 1, `area` and
        `iscrowd`, and for "segm" images have sizes.
      found: detections with `image_id`, `category_id`, `score`, and `bbox` or `segmentation` in compressed RLE. The
        area of a mask is its pixels, also where the detection has a box.
      kind: whether boxes or masks are compared.
      limits: numbers of detections per image and class that count, ascending.
      federated: whether LVIS's rules hold; images have `neg_category_ids` and `not_exhaustive_category_ids`.
      by_class: False compares all classes with each other, for proposals.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    if federated:
        found = _best_of_each_image(found, limits[-1])
    key = {"bbox": "bbox", "segm": "segmentation"}[kind]
    whole = COCO(
        {part: [dict(row) for row in truth[part]] for part in ("images", "annotations", "categories")}
    )
    results = whole.loadRes([{k: row[k] for k in ("image_id", "category_id", "score", key)} for row in found])
    judge = COCOeval_faster(whole, results, kind, lvis_style=federated, print_function=_ignore)
    judge.params.maxDets = list(limits)
    judge.params.useCats = int(by_class)
    judge.evaluate()
    judge.accumulate()
    categories = [int(k) for k in judge.params.catIds] if by_class else [-1]
    return Curves(judge.eval["precision"], judge.eval["recall"], categories, limits)


def _ignore(*_: Any) -> None:
    """Prints nothing."""


def _best_of_each_image(found: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    images: dict[Any, list[Mapping[str, Any]]] = {}
    for row in found:
        images.setdefault(row["image_id"], []).append(row)
    best = (sorted(rows, key=lambda row: -row["score"])[:limit] for rows in images.values())
    return [row for rows in best for row in rows]


def mean(values: np.ndarray) -> float:
    """Returns the mean in percent of the defined values, NaN if there is none."""
    defined = values[values > -1]
    return 100 * float(defined.mean()) if defined.size else float("nan")


def coco_metrics(found: Curves) -> dict[str, float]:
    """Returns COCO's twelve metrics in percent, `COCO_NAMES`; NaN where the truth has no such instance."""
    p, r = found.precision, found.recall
    values = [mean(p[..., 0, -1]), mean(p[0, ..., 0, -1]), mean(p[5, ..., 0, -1])]
    values += [mean(p[..., area, -1]) for area in (1, 2, 3)]
    values += [mean(r[..., 0, limit]) for limit in range(len(found.limits))]
    values += [mean(r[..., area, -1]) for area in (1, 2, 3)]
    return dict(zip(COCO_NAMES, values, strict=True))


def lvis_metrics(found: Curves, frequencies: Mapping[int, str]) -> dict[str, float]:
    """Returns LVIS's metrics in percent, `LVIS_NAMES`; `frequencies` gives "r", "c" or "f" for each category id."""
    p, r = found.precision, found.recall
    values = [mean(p[..., 0, -1]), mean(p[0, ..., 0, -1]), mean(p[5, ..., 0, -1])]
    values += [mean(p[..., area, -1]) for area in (1, 2, 3)]
    for frequency in FREQUENCIES:
        members = [i for i, k in enumerate(found.categories) if frequencies.get(k) == frequency]
        values.append(mean(p[:, :, members, 0, -1]))
    values += [mean(r[..., area, -1]) for area in range(4)]
    return dict(zip(LVIS_NAMES, values, strict=True))


def class_precision(found: Curves) -> dict[int, tuple[float, float]]:
    """Returns AP and AP50 of each category in percent, NaN for a category without an instance in the truth."""
    p = found.precision[..., 0, -1]
    return {k: (mean(p[:, :, i]), mean(p[0, :, i])) for i, k in enumerate(found.categories)}
