"""Masks of COCO's JSON files: run lengths and polygons."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from ovseg_jax.reading import array, number, short, text, whole


def decode_rle(value: Any, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Decodes a mask in COCO's run-length encoding, compressed or not.

    Args:
      value: {"size": [height, width], "counts": runs}: a list of lengths, or COCO's text form of them. Runs of 0 and 1
        take turns, beginning with 0, and go down one column after another.
      size: the height and width that the mask must have.

    Raises:
      ValueError: it is not of this form, or of another size.
    """
    if not isinstance(value, dict) or "counts" not in value or "size" not in value:
        raise ValueError(f"expected a run-length encoding, got {short(value)}")
    height, width = size
    if array(value["size"], "'size'") != [height, width]:
        raise ValueError(f"a mask has the size {short(value['size'])}, but its image is {[height, width]}")
    counts = value["counts"]
    if isinstance(counts, list):
        runs = [whole(run, "a run") for run in counts]
    else:
        runs = _runs(text(counts, "'counts'"))
    if sum(runs) != height * width or min(runs) < 0:
        raise ValueError(f"the runs of a mask do not fill its {height * width} pixels")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def _runs(written: str) -> list[int]:
    """Parses COCO's text form: 5 bits a character, lowest first; from the fourth on, minus the run two before."""
    runs: list[int] = []
    value = shift = 0
    for character in written:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError(f"'counts': {short(written)} is not COCO's text form")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift or not runs:
        raise ValueError(f"'counts': {short(written)} is not COCO's text form")
    return runs


def decode_polygons(value: Any, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Fills the union of polygons, as `pycocotools` does.

    Args:
      value: a list of polygons, each a list x0, y0, x1, y1, ... in pixels of at least three points.
      size: height and width of the mask.

    Raises:
      ValueError: it is not of this form.
    """
    from pycocotools import mask as coco

    height, width = size
    polygons = check_polygons(value)
    # The time of the C code grows with the distance of a point from the image.
    limits = np.array([width, height] * (max(map(len, polygons)) // 2 + 1), np.float64)
    inside = [np.clip(points, -1, limits[: len(points)] + 1).tolist() for points in polygons]
    return coco.decode(coco.merge(coco.frPyObjects(inside, height, width))).astype(bool)


def check_polygons(value: Any) -> Sequence[Sequence[float]]:
    """Checks that a value is a list of polygons of at least three points, and returns it.

    Raises:
      ValueError: it is not.
    """
    polygons = [
        [number(x, "a point") for x in array(points, "a polygon")]
        for points in array(value, "'segmentation'")
    ]
    if not polygons or any(len(points) < 6 or len(points) % 2 for points in polygons):
        raise ValueError(f"a polygon needs pairs of numbers, at least three, not {short(value)}")
    return polygons
