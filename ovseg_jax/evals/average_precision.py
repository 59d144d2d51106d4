"""Average precision and recall of instances, boxes and proposals, by COCO's and LVIS's rules (faster-coco-eval).

Detections are matched to the truth from the best score on, each to the free true instance of its class with the highest
IoU of at least the threshold. Precision is averaged over 101 recalls, ten thresholds from 0.5 to 0.95, and the classes
in the truth. Crowds, and instances outside of an area range, count neither as found nor as missed. LVIS's rules differ
(Gupta et al. 2019): an image counts for a class only if it holds it or is known to lack it, false detections of a class
that is not labelled exhaustively in an image do not count, and the best 300 detections of an image count.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Kind = Literal["bbox", "segm"]
"""Whether boxes or masks are compared."""
Rule = Literal["coco", "lvis"]
RULES: tuple[Rule, ...] = ("coco", "lvis")

LIMITS: Mapping[str, tuple[int, ...]] = {"coco": (1, 10, 100), "lvis": (300,), "proposals": (100, 300, 1000)}
"""The numbers of best detections that count: in COCO's rule per image and class, in the others per image."""

NAMES: Mapping[Rule, Sequence[str]] = {
    "coco": "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split(),
    "lvis": "AP AP50 AP75 APs APm APl APr APc APf AR@300 ARs@300 ARm@300 ARl@300".split(),
}
"""The metrics of each rule, in its official order."""

Rows = Sequence[Mapping[str, Any]]


class Part(NamedTuple):
    """A class with its instances and detections, and the images that hold any; classes are scored independently.

    Attributes:
      name: the category id as text.
      category: the category id.
      images: the images, as in the truth.
      truth: the true instances.
      found: the detections.
    """

    name: str
    category: int
    images: Rows
    truth: Rows
    found: Rows


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


def split(truth: Mapping[str, Rows], found: Rows, rule: Rule = "coco") -> list[Part]:
    """Returns a part for each category, in the order of the ids.

    Args:
      truth: `images`, `annotations` and `categories` in COCO's form, checked. Annotations have ids from 1, `area` and
        `iscrowd`, and `bbox` or `segmentation`; images have sizes for masks, and for LVIS's rule `neg_category_ids`
        and `not_exhaustive_category_ids`.
      found: detections with `image_id`, `category_id`, `score`, and `bbox` or `segmentation` in RLE.
      rule: the rule; LVIS's leaves out detections here: those beyond the best of an image, and those of a class that
        the image is not labelled for.
    """
    if rule == "lvis":
        known = labelled(truth)
        best = _best_of_each_image(found, LIMITS["lvis"][0])
        found = [row for row in best if (row["image_id"], row["category_id"]) in known]
    own, guesses = _by(truth["annotations"], "category_id"), _by(found, "category_id")
    parts = []
    for category in sorted(int(row["id"]) for row in truth["categories"]):
        rows, boxes = own[category], guesses[category]
        used = {row["image_id"] for row in rows} | {row["image_id"] for row in boxes}
        images = [image for image in truth["images"] if image["id"] in used] if rows else []
        parts.append(Part(str(category), category, images, rows, boxes))
    return parts


def labelled(truth: Mapping[str, Rows]) -> set[tuple[int, int]]:
    """Returns the pairs of an image and a category that it holds or is known to lack, by LVIS's rule."""
    held = {(row["image_id"], row["category_id"]) for row in truth["annotations"]}
    return held | {(image["id"], k) for image in truth["images"] for k in image["neg_category_ids"]}


def pool(truth: Mapping[str, Rows], found: Rows) -> Part:
    """Returns one part of all classes, for proposals; `found` needs no `category_id`. See `split`."""
    rows = sorted(truth["annotations"], key=lambda row: row["category_id"])
    one = [[{**row, "category_id": 1} for row in side] for side in (rows, found)]
    return Part("", 1, truth["images"], *one)


def _by(rows: Rows, key: str) -> defaultdict[Any, list[Mapping[str, Any]]]:
    found: defaultdict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row[key]].append(row)
    return found


def _best_of_each_image(found: Rows, limit: int) -> Rows:
    best = (sorted(rows, key=lambda row: -row["score"])[:limit] for rows in _by(found, "image_id").values())
    return [row for rows in best for row in rows]


def curve(part: Part, kind: Kind, limits: tuple[int, ...], federated: bool = False) -> Curves:
    """Matches the detections of a part to its truth.

    Args:
      part: the part.
      kind: see `Kind`. The area of a mask is its pixels, also where the detection has a box.
      limits: numbers of detections per image that count, ascending.
      federated: whether LVIS's rules hold.
    """
    if not part.truth:
        return Curves(
            np.full((10, 101, 1, 4, len(limits)), -1.0),
            np.full((10, 1, 4, len(limits)), -1.0),
            [part.category],
        )
    from faster_coco_eval import COCO, COCOeval_faster

    key = {"bbox": "bbox", "segm": "segmentation"}[kind]
    category = {"id": part.category, "name": part.name, "frequency": "f"}
    # The package writes into its rows.
    rows = [[dict(row) for row in side] for side in (part.images, part.truth)]
    whole = COCO({"images": rows[0], "annotations": rows[1], "categories": [category]})
    results = whole.loadRes(
        [{name: row[name] for name in ("image_id", "category_id", "score", key)} for row in part.found]
    )
    evaluation = COCOeval_faster(whole, results, kind, lvis_style=federated, print_function=_ignore)
    evaluation.params.maxDets = list(limits)
    evaluation.evaluate()
    evaluation.accumulate()
    return Curves(evaluation.eval["precision"], evaluation.eval["recall"], [part.category])


def _ignore(*_: Any) -> None:
    """Prints nothing."""


def joined(found: Iterable[Curves]) -> Curves:
    """Returns the curves of several parts as one."""
    precision, recall, categories = zip(*found, strict=True)
    return Curves(
        np.concatenate(precision, 2), np.concatenate(recall, 1), [k for own in categories for k in own]
    )


def curves(truth: Mapping[str, Rows], found: Rows, kind: Kind, rule: Rule = "coco") -> Curves:
    """Matches detections to the truth, class by class; see `split` and `curve`."""
    return joined(curve(part, kind, LIMITS[rule], rule == "lvis") for part in split(truth, found, rule))


def mean(values: np.ndarray) -> float:
    """Returns the mean in percent of the defined values, NaN if there is none."""
    defined = values[values > -1]
    return 100 * float(defined.mean()) if defined.size else float("nan")


def metrics(
    found: Curves, rule: Rule = "coco", frequencies: Mapping[int, str] | None = None
) -> dict[str, float]:
    """Returns the metrics of `NAMES` in percent; NaN where the truth has no such instance.

    Args:
      found: the curves at the rule's `LIMITS`.
      rule: the rule.
      frequencies: "r", "c" or "f" for each category id, for LVIS's rule.
    """
    p, r = found.precision, found.recall
    values = [mean(p[..., 0, -1]), mean(p[0, ..., 0, -1]), mean(p[5, ..., 0, -1])]
    values += [mean(p[..., area, -1]) for area in (1, 2, 3)]
    for frequency in "rcf" if rule == "lvis" else "":
        members = [i for i, k in enumerate(found.categories) if (frequencies or {}).get(k) == frequency]
        values.append(mean(p[:, :, members, 0, -1]))
    values += [mean(r[..., 0, limit]) for limit in range(len(LIMITS[rule]))]
    values += [mean(r[..., area, -1]) for area in (1, 2, 3)]
    return dict(zip(NAMES[rule], values, strict=True))


def class_precision(found: Curves) -> dict[int, tuple[float, float]]:
    """Returns AP and AP50 of each category in percent, NaN for a category without an instance in the truth."""
    p = found.precision[..., 0, -1]
    return {k: (mean(p[:, :, i]), mean(p[0, :, i])) for i, k in enumerate(found.categories)}
