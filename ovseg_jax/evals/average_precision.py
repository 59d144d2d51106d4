"""Average precision and recall of instance masks by COCO's rules (faster-coco-eval).

Detections are matched to the truth from the best score on, each to the free true instance of its class with the highest
IoU of at least the threshold. Precision is averaged over 101 recalls, ten thresholds from 0.5 to 0.95, and the classes
in the truth. Crowds, and instances outside of an area range, count neither as found nor as missed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

NAMES = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
LIMITS = (1, 10, 100)  # of detections per image and class


class Curves(NamedTuple):
    """Precision and recall at T IoU thresholds, R recalls, K classes, A areas (all, s, m, l), M limits; -1 = undefined.

    Attributes:
      precision: the best precision at each recall or a higher one.
      recall: the highest recall.
      categories: the category id of each class.
    """

    precision: Float[np.ndarray, "t r k a m"]
    recall: Float[np.ndarray, "t k a m"]
    categories: list[int]


def curves(truth: Mapping[str, list[dict[str, Any]]], found: Sequence[Mapping[str, Any]]) -> Curves:
    """Matches detections to the truth.

    Args:
      truth: `images` with sizes, `annotations` and `categories` in COCO's form, checked. Annotations have ids from 1,
        `area`, `iscrowd` and `segmentation` in compressed RLE.
      found: detections with `image_id`, `category_id`, `score` and `segmentation` in compressed RLE.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    whole = COCO(
        {part: [dict(row) for row in truth[part]] for part in ("images", "annotations", "categories")}
    )
    judge = COCOeval_faster(whole, whole.loadRes(list(found)), "segm", print_function=_ignore)
    judge.params.maxDets = list(LIMITS)
    judge.evaluate()
    judge.accumulate()
    return Curves(judge.eval["precision"], judge.eval["recall"], [int(k) for k in judge.params.catIds])


def _ignore(*_: Any) -> None:
    """Prints nothing."""


def mean(values: np.ndarray) -> float:
    """Returns the mean in percent of the defined values, NaN if there is none."""
    defined = values[values > -1]
    return 100 * float(defined.mean()) if defined.size else float("nan")


def coco_metrics(found: Curves) -> dict[str, float]:
    """Returns COCO's twelve metrics in percent, `NAMES`; NaN where the truth has no such instance."""
    p, r = found.precision, found.recall
    values = [mean(p[..., 0, -1]), mean(p[0, ..., 0, -1]), mean(p[5, ..., 0, -1])]
    values += [mean(p[..., area, -1]) for area in (1, 2, 3)]
    values += [mean(r[..., 0, limit]) for limit in range(len(LIMITS))]
    values += [mean(r[..., area, -1]) for area in (1, 2, 3)]
    return dict(zip(NAMES, values, strict=True))


def class_precision(found: Curves) -> dict[int, tuple[float, float]]:
    """Returns AP and AP50 of each category in percent, NaN for a category without an instance in the truth."""
    p = found.precision[..., 0, -1]
    return {k: (mean(p[:, :, i]), mean(p[0, :, i])) for i, k in enumerate(found.categories)}
