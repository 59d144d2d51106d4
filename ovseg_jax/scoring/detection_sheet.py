"""The worst images of `score instances` and `boxes`: each by its own AP50, and a picture sheet of them."""

import functools
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ovseg_jax.data.images import read_header
from ovseg_jax.evals import average_precision as ap
from ovseg_jax.evals.average_precision import Kind, Rows, Rule
from ovseg_jax.evals.box_files import Annotations
from ovseg_jax.scoring.files import Skips, results
from ovseg_jax.scoring.sheet import find_photographs, parted, sheet_row, write_sheet


class ImageResults(NamedTuple):
    """An image with its true instances and its results.

    Attributes:
      name: its id in the files.
      file: its file name, or its address, or "".
      image: its row in `Annotations.data`.
      truth: its true instances.
      found: its results.
    """

    name: str
    file: str
    image: Mapping[str, Any]
    truth: Rows
    found: Rows


def worst_images(
    truth: Annotations, found: Rows, kind: Kind, rule: Rule, workers: int, count: int
) -> list[tuple[ImageResults, float]]:
    """Returns the images with the lowest AP50 of their own, the lowest first; at equal AP50, more instances come first.

    AP50 is the mean over the classes that an image holds; images without an instance have none.

    Args:
      truth: the annotations.
      found: the results.
      kind: boxes or masks.
      rule: COCO's or LVIS's.
      workers: the number of processes.
      count: the number of images to return.
    """
    sides: tuple[defaultdict[int, list[Any]], ...] = defaultdict(list), defaultdict(list)
    for rows, side in zip((truth.data["annotations"], found), sides, strict=True):
        for row in rows:
            side[row["image_id"]].append(row)
    images = [
        ImageResults(str(name), file, image, sides[0][image["id"]], sides[1][image["id"]])
        for name, file, image in zip(truth.ids, truth.files, truth.data["images"], strict=True)
        if any(not row["iscrowd"] for row in sides[0][image["id"]])
    ]
    own = functools.partial(_precision, kind=kind, rule=rule)
    scored = list(results(own, images, Skips(), workers=workers))
    return sorted(scored, key=lambda pair: (pair[1], -len(pair[0].truth), pair[0].name))[:count]


def _precision(entry: ImageResults, *, kind: Kind, rule: Rule) -> float:
    """Returns an image's own AP50 in percent."""
    categories = [{"id": k} for k in {row["category_id"] for row in entry.truth}]
    truth = {"images": [entry.image], "annotations": entry.truth, "categories": categories}
    return ap.mean(ap.curves(truth, entry.found, kind, rule).precision[0, ..., 0, -1])


def draw_sheet(
    path: str, images: str | None, worst: Sequence[tuple[ImageResults, float]], truth: Annotations, kind: Kind
) -> None:
    """Draws images with their true instances, and with as many of their best results.

    Args:
      path: the PNG file to write.
      images: the folder of the photographs, which boxes need; or None.
      worst: see `worst_images`.
      truth: the annotations.
      kind: boxes or masks. Boxes are drawn as areas, smaller ones in front.

    Raises:
      UserError: a photograph is missing or has another size, or the file cannot be written.
    """
    stems = [os.path.splitext(entry.file)[0] or entry.name for entry, _ in worst]
    photographs = find_photographs(images, stems)
    index = {category: k for k, category in enumerate(truth.classes.ids)}
    rows = []
    for (entry, value), stem in zip(worst, stems, strict=True):
        photograph = photographs.get(stem)
        size = (entry.image.get("height", 0), entry.image.get("width", 0))
        if kind == "bbox" and photograph is not None:
            size = read_header(photograph)[0]
        instances = [row for row in entry.truth if not row["iscrowd"]]
        best = sorted(entry.found, key=lambda row: -row["score"])[: len(instances)]
        (label, first), (guess, second) = (_maps(own, index, size, kind) for own in (instances, best))
        caption = f"{entry.name}: AP50 {value:.1f}"
        either = np.maximum(label, guess)  # a result outside of all true instances is wrong
        row = sheet_row(caption, guess, either, guess == label, photograph, entry.file)
        rows.append(row._replace(truth=parted(label, first), prediction=parted(guess, second)))
    write_sheet(path, rows, truth.classes, photographs)


def _maps(
    rows: Rows, index: Mapping[int, int], size: tuple[int, int], kind: Kind
) -> tuple[Int[np.ndarray, "h w"], Int[np.ndarray, "h w"]]:
    """Returns the class of each pixel, -1 for none, and the number of its instance; smaller ones are in front."""
    masks = [_mask(row, size, kind) for row in rows]
    classes, numbers = np.full(size, -1), np.zeros(size, int)
    for k in sorted(range(len(rows)), key=lambda k: -int(masks[k].sum())):
        classes[masks[k]], numbers[masks[k]] = index[rows[k]["category_id"]], k + 1
    return classes, numbers


def _mask(row: Mapping[str, Any], size: tuple[int, int], kind: Kind) -> Bool[np.ndarray, "h w"]:
    if kind == "segm":
        from pycocotools import mask as coco

        rle = row["segmentation"]
        return coco.decode({**rle, "counts": rle["counts"].encode()}).astype(bool)
    mask = np.zeros(size, bool)
    left, top, width, height = row["bbox"]
    x0, y0, x1, y1 = (max(0, round(x)) for x in (left, top, left + width, top + height))
    mask[y0:y1, x0:x1] = True
    return mask
