"""Random detections; AP by pycocotools; and AP by LVIS's rules the slow way, one class at a time, in float64."""

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SIDE = 200


def shape(rng):
    return [float(v) for v in (*rng.uniform(0, 60, 2), *rng.uniform(3, 140, 2))]


def rle(box, rng=None):
    """The mask of an ellipse in a box, some of whose pixels are noise."""
    y, x = np.mgrid[:SIDE, :SIDE]
    inside = ((x - box[0] - box[2] / 2) / box[2]) ** 2 + ((y - box[1] - box[3] / 2) / box[3]) ** 2 < 0.25
    if rng is not None:
        inside ^= rng.random(inside.shape) < 0.01
    found = coco_mask.encode(np.asfortranarray(inside, np.uint8))
    return {"size": found["size"], "counts": found["counts"].decode()}


def case(seed, images=9, classes=4, crowds=True, lvis=False):
    """Truth and detections of random boxes and masks; many scores are equal, some detections are of other classes."""
    rng = np.random.default_rng(seed)
    ids = [3 + 2 * k for k in range(classes)]
    truth = {
        "images": [{"id": i + 1, "height": SIDE, "width": SIDE} for i in range(images)],
        "categories": [{"id": k} for k in ids],
        "annotations": [],
    }
    found = []
    for n in range(6 * images):
        box = shape(rng)
        row = {"image_id": n % images + 1, "category_id": int(rng.choice(ids[:-1])), "bbox": box}
        row["segmentation"] = rle(box)
        own = {"id": n + 1, "area": box[2] * box[3] * 0.7, "iscrowd": int(crowds and n % 9 == 0)}
        truth["annotations"].append(row | own)
        for _ in range(3):
            near = [*(box[d] + float(rng.normal(0, 3)) for d in (0, 1)), *box[2:]]
            category = row["category_id"] if rng.random() < 0.7 else int(rng.choice(ids))
            guess = {"image_id": row["image_id"], "category_id": category, "bbox": near}
            score = round(float(rng.random()), 1)
            found.append(guess | {"score": score, "segmentation": rle(near, rng)})
    if lvis:
        for image in truth["images"]:
            held = {a["category_id"] for a in truth["annotations"] if a["image_id"] == image["id"]}
            image["neg_category_ids"] = [k for k in ids if k not in held and rng.random() < 0.5]
            image["not_exhaustive_category_ids"] = [k for k in held if rng.random() < 0.4]
    return truth, found


def percent(stats):
    """The scores of pycocotools in percent, NaN where it has -1."""
    return [100 * x if x >= 0 else np.nan for x in stats]


def official(truth, found, kind, limits=(1, 10, 100), by_class=True):
    """pycocotools on the same rows; without boxes for masks, whose areas it would take."""
    whole = COCO()
    whole.dataset = {part: [dict(row) for row in rows] for part, rows in truth.items()}
    whole.createIndex()
    drop = {"bbox": "segmentation", "segm": "bbox"}[kind]
    results = whole.loadRes([{k: v for k, v in row.items() if k != drop} for row in found])
    judge = COCOeval(whole, results, kind)
    judge.params.maxDets = list(limits)
    judge.params.useCats = int(by_class)
    judge.evaluate()
    judge.accumulate()
    return judge


THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))


def box_iou(a, b):
    """IoU of two boxes [x, y, width, height]."""
    sides = [max(0.0, min(a[d] + a[d + 2], b[d] + b[d + 2]) - max(a[d], b[d])) for d in (0, 1)]
    shared = sides[0] * sides[1]
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def matched(truth, found, threshold, area, lenient):
    """Pairs (score, hit) of the detections of an image and class that count, and the number of instances.

    `truth` and `found` hold (shape, area) and (shape, area, score), with an IoU function as `found[k][3]`.
    """
    inside = [area[0] <= t[1] <= area[1] for t in truth]
    order = sorted(range(len(truth)), key=lambda t: not inside[t])
    free, counted = set(order), []
    for shape, own, score, iou in sorted(found, key=lambda d: -d[2]):
        best, best_iou = None, min(threshold, 1 - 1e-10)
        for t in order:
            if t not in free:
                continue
            if best is not None and inside[best] and not inside[t]:
                break
            if iou(shape, truth[t][0]) >= best_iou:
                best, best_iou = t, iou(shape, truth[t][0])
        if best is None:
            if area[0] <= own <= area[1] and not lenient:
                counted.append((score, False))
            continue
        free.remove(best)
        if inside[best]:
            counted.append((score, True))
    return counted, sum(inside)


def lvis(truth, found, iou=box_iou, shape="bbox", area=lambda box: box[2] * box[3]):
    """AP of each class [T K A] and recall [T K A] by LVIS's rules; NaN where a class has no instance.

    Args:
      truth: LVIS's `images`, `annotations` and `categories`.
      found: detections.
      iou: of two shapes.
      shape: the key of the shapes.
      area: of a detection's shape.
    """
    classes = [c["id"] for c in truth["categories"]]
    kept = []
    for image in truth["images"]:
        own = [d for d in found if d["image_id"] == image["id"]]
        kept += sorted(own, key=lambda d: -d["score"])[:300]
    size = len(THRESHOLDS), len(classes), len(AREAS)
    precision, recall = np.full(size, np.nan), np.full(size, np.nan)
    for (t, threshold), (k, category), (a, limits) in (
        (x, y, z) for x in enumerate(THRESHOLDS) for y in enumerate(classes) for z in enumerate(AREAS)
    ):
        rows, total = [], 0
        for image in truth["images"]:
            here = lambda row, i=image["id"], c=category: row["image_id"] == i and row["category_id"] == c
            own = [(row[shape], row["area"]) for row in truth["annotations"] if here(row)]
            if not own and category not in image["neg_category_ids"]:
                continue
            guesses = [(row[shape], area(row[shape]), row["score"], iou) for row in kept if here(row)]
            lenient = category in image["not_exhaustive_category_ids"]
            counted, instances = matched(own, guesses, threshold, limits, lenient)
            rows, total = rows + counted, total + instances
        if not total:
            continue
        rows.sort(key=lambda row: -row[0])
        hits = np.cumsum([hit for _, hit in rows])
        recalls = hits / total
        precisions = hits / np.arange(1, len(rows) + 1)
        at = [precisions[recalls >= r].max(initial=0) for r in np.linspace(0, 1, 101)]
        precision[t, k, a] = np.mean(at)
        recall[t, k, a] = recalls[-1] if len(rows) else 0
    return precision, recall
