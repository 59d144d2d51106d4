"""COCO's masks, held to pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as coco

from ovseg_jax.datasets.regions import decode_polygons, decode_rle


def encoded(mask: np.ndarray) -> dict:
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (40, 70), (233, 3)])
def test_run_lengths_are_those_of_pycocotools(shape, share):
    mask = np.random.default_rng(0).random(shape) < share
    assert (decode_rle(encoded(mask), shape) == mask).all()
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    plain = {"size": list(shape), "counts": ([0] if flat[0] else []) + runs}
    assert (decode_rle(plain, shape) == mask).all()


def test_polygons_are_those_of_pycocotools():
    polygons = [[1.5, 1, 9, 2, 5, 8.2], [10, 10, 18, 10, 18, 15, 10, 15]]
    expected = coco.decode(coco.merge(coco.frPyObjects(polygons, 20, 30)))
    assert (decode_polygons(polygons, (20, 30)) == expected).all() and expected.sum() > 30
    assert decode_polygons([[-1e6, -1e6, 1e6, -1e6, 1e6, 1e6, -1e6, 1e6]], (20, 30)).mean() > 0.9


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "expected a run-length encoding"),
        ([[1, 2, 3, 4, 5, 6]], "expected a run-length encoding"),
        ({"size": [2, 3]}, "expected a run-length encoding"),
        ({"size": [3, 2], "counts": [6]}, r"a mask has the size \[3, 2\], but its image is \[2, 3\]"),
        ({"size": [2, 3], "counts": [7]}, "the runs of a mask do not fill its 6 pixels"),
        ({"size": [2, 3], "counts": [3, -1, 4]}, "a run: expected a whole number"),
        ({"size": [2, 3], "counts": []}, "the runs of a mask do not fill"),
        ({"size": [2, 3], "counts": ""}, "is not COCO's text form"),
        ({"size": [2, 3], "counts": "\u00ff"}, "is not COCO's text form"),
        ({"size": [2, 3], "counts": "o" * 40}, "is not COCO's text form"),
        ({"size": [2, 3], "counts": "P"}, "is not COCO's text form"),
        ({"size": [2, 3], "counts": 6}, "'counts': expected a text"),
    ],
)
def test_other_run_lengths_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        decode_rle(value, (2, 3))


@pytest.mark.parametrize(
    "value", [None, [], [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [["a"] * 6], [[1e39] * 6]]
)
def test_other_polygons_are_refused(value):
    with pytest.raises(ValueError, match=r"expected|needs pairs"):
        decode_polygons(value, (2, 3))
