"""Boxes with names: crops and features against plain indexing, the choice of boxes against one class at a time."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask

from ovseg_jax.evals.box_files import Proposals
from ovseg_jax.evals.boxes import class_probability, crop, detect, region_features
from ovseg_jax.parallel.sharding import make_mesh
from tests.extras import require
from tests.fake_method import ColourClassifier, blocks

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.mark.parametrize(
    ("box", "context", "rows", "columns"),
    [
        ((4, 6, 8, 8), 1.0, (6, 14), (4, 12)),
        ((8, 6, 4, 4), 1.5, (5, 11), (7, 13)),
        ((-3, 14, 9, 12), 1.0, (14, 20), (0, 6)),  # cut to the image
        ((26, 0, 4, 4), 1.5, (0, 5), (25, 30)),
        ((0, 0, 30, 20), 1.5, (0, 20), (0, 30)),
    ],
)
def test_a_crop_is_what_lies_under_the_box(box, context, rows, columns):
    part = Image.fromarray(NOISE[slice(*rows), slice(*columns)])
    size = part.height
    expected = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(crop(Image.fromarray(NOISE), np.array(box, float), context, size), expected)


def test_boxes_of_nothing_and_beside_the_image_have_a_pixel():
    for box in ((3.2, 4.1, 1e-3, 1e-3), (50, 60, 4, 4), (-9, -9, 2, 2)):
        assert crop(Image.fromarray(NOISE), np.array(box, float), 1.0, 4).shape == (4, 4, 3)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_features_are_the_mean_of_both_crops(tmp_path, batch):
    classifier, size = ColourClassifier(), 8
    variables = classifier.init(None)
    images = [blocks(16, 24, ["red", "blue"], ["green", "white"]), blocks(9, 9, ["yellow"]), NOISE]
    boxes = [np.array(x, float) for x in ([[0, 0, 9, 9], [8, 4, 8, 8]], [[2, 2, 4, 4]], [[1, 2, 20, 10]] * 3)]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    pairs = list(zip(paths, boxes, strict=True))
    found = list(
        region_features(classifier.embed_image, variables, pairs, make_mesh(), size=size, batch=batch)
    )
    assert [len(x) for x in found] == [2, 1, 3]
    for image, own, features in zip(images, boxes, found, strict=True):
        for box, feature in zip(own, features, strict=True):
            crops = np.stack([crop(Image.fromarray(image), box, context, size) for context in (1.0, 1.5)])
            total = np.asarray(classifier.embed_image(variables, crops)).sum(0)
            np.testing.assert_allclose(feature, total / np.linalg.norm(total), atol=1e-6)


def test_probability_is_a_softmax_even_far_from_every_class():
    torch = require("torch")
    rng = np.random.default_rng(1)
    regions, text = (rng.normal(size=(n, 6)).astype(np.float32) for n in (5, 3))
    expected = torch.softmax(torch.from_numpy(9 * regions @ text.T), 1).numpy()
    np.testing.assert_allclose(class_probability(regions, text, 9.0), expected, atol=1e-6)
    far = class_probability(-np.ones((1, 1), np.float32), np.ones((2, 1), np.float32), 1000.0)
    np.testing.assert_allclose(far, [[0.5, 0.5]])


@pytest.mark.parametrize("limit", [10, 10_000])
def test_the_best_boxes_are_those_of_a_suppression_class_by_class(limit):
    rng = np.random.default_rng(2)
    n, c = 40, 3
    boxes = np.concatenate([rng.uniform(0, 30, (n, 2)), rng.uniform(5, 40, (n, 2))], 1)
    proposals, probability = Proposals(boxes, rng.uniform(size=n)), rng.dirichlet(np.ones(c), n)
    found = detect(proposals, probability, limit)
    iou = mask.iou(boxes, boxes, [False] * n)
    kept = []
    for k in range(c):
        score = np.sqrt(proposals.objectness * probability[:, k])
        left = list(np.argsort(-score))
        while left:
            best = left.pop(0)
            kept.append((score[best], best, k))
            left = [other for other in left if iou[best, other] <= 0.5]
    assert len(kept) < n * c
    kept = sorted(kept, reverse=True)[:limit]
    assert [(d.box, d.category) for d in found] == [(box, k) for _, box, k in kept]
    np.testing.assert_allclose([d.score for d in found], [score for score, _, _ in kept])


def test_a_box_of_no_objectness_is_none():
    boxes = np.array([[0, 0, 4, 4], [8, 8, 4, 4]], float)
    (only,) = detect(Proposals(boxes, np.array([0.0, 0.25])), np.array([[1.0, 0.0], [0.0, 1.0]]), 5)
    assert only == (1, 1, 0.5)
