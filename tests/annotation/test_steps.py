"""The steps between annotators, held to torchvision and to cases made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from ovseg_jax.annotation import steps
from tests.extras import require


def test_texts_are_cleaned_and_doubles_dropped():
    assert steps.clean_texts(["A  dog.", "a dog", " ", ".", "A cat", "a DOG ."]) == ["A dog.", "A cat"]


def test_tags_need_as_many_votes():
    found = [["dog", "Grass", "dog"], ["grass", "sky"], ["sky", "dog"]]
    assert steps.vote_tags(found, 1) == ["dog", "Grass", "sky"]
    assert steps.vote_tags(found, 2) == ["dog", "Grass", "sky"]
    assert steps.vote_tags([["dog", "dog"], ["sky"]], 2) == []


def test_scores_are_cut_by_quantile_and_by_value():
    scores = np.arange(11) / 10
    assert steps.score_floor(scores, 0.3, -1.0) == pytest.approx(0.3)
    assert steps.score_floor(scores, 0.3, 0.45) == 0.45
    assert steps.score_floor(np.zeros(0), 0.3, 0.1) == 0.1


def reference_nms(boxes, scores, most):
    """torchvision's, or transformers' where torchvision has no operators for this PyTorch; sorted indices."""
    torch, extension = require("torch"), require("torchvision.extension")
    given = torch.from_numpy(boxes), torch.from_numpy(scores)
    if extension._has_ops():
        return sorted(require("torchvision.ops").nms(*given, most).tolist())
    owlv2 = require("transformers.models.owlv2.image_processing_owlv2").Owlv2ImageProcessor
    low, high = given[0][:, :2], given[0][:, 2:]
    out = SimpleNamespace(
        logits=torch.logit(given[1])[None, :, None],
        target_pred_boxes=torch.cat([(low + high) / 2, high - low], 1)[None],
    )
    found = owlv2().post_process_image_guided_detection(out, threshold=-1.0, nms_threshold=most)[0]["boxes"]
    return sorted(np.flatnonzero(steps.box_iou(boxes, found.numpy()).max(1, initial=0) > 1 - 1e-9).tolist())


def test_nms_is_that_of_torchvision():
    torch, box_iou = require("torch"), require("torchvision.ops").box_iou
    rng = np.random.default_rng(0)
    dropped = 0
    for count in (1, 2, 40, 120):
        low = rng.uniform(0, 80, (count, 2))
        boxes = np.concatenate([low, low + rng.uniform(1, 40, (count, 2))], 1)
        scores = rng.uniform(0.5, 1, count)  # transformers drops those far below the best
        given = torch.from_numpy(boxes)
        np.testing.assert_allclose(steps.box_iou(boxes, boxes), box_iou(given, given), atol=1e-12)
        for most in (0.2, 0.5, 0.7):
            kept = steps.nms(boxes, scores, most)
            assert sorted(kept.tolist()) == reference_nms(boxes, scores, most)
            assert (np.diff(scores[kept]) <= 0).all()
            dropped += count - len(kept)
    assert dropped > 50
    assert steps.nms(np.zeros((0, 4)), np.zeros(0), 0.5).tolist() == []
    assert steps.box_iou(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0.0]]


def test_boxes_move_along_their_diagonal_inside_the_image():
    moved = steps.jitter_boxes(np.array([[10.0, 20, 30, 60], [0, 0, 10, 10]]), (-0.1, 0.1), (60, 40))
    assert moved.tolist() == [[[8, 16, 28, 56], [0, 0, 9, 9]], [[12, 24, 32, 60], [1, 1, 11, 11]]]


def masker(boxes, size, leans):
    """A masker of known instability: with `leans` it fills the box, else what it knows, wherever the box is."""
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x0, y0, x1, y1), leaning in zip(masks, boxes.astype(int), leans, strict=True):
        if leaning:
            mask[y0:y1, x0:x1] = True
        else:
            mask[20:40, 20:40] = True
    return masks


def test_stability_of_a_masker_that_is_unstable_by_a_known_amount():
    boxes, size, leans = np.array([[20.0, 20, 40, 40], [20, 20, 40, 40]]), (64, 64), (False, True)
    shifts = (-0.2, -0.1, 0.1, 0.2)
    others = np.stack([masker(moved, size, leans) for moved in steps.jitter_boxes(boxes, shifts, size)])
    found = steps.stability(masker(boxes, size, leans), others)
    share = lambda shift: (1 - shift) ** 2 / (2 - (1 - shift) ** 2)  # of two squares, one moved by a share
    assert found[0] == 1 and found[1] == pytest.approx((share(0.1) + share(0.2)) / 2, abs=1e-12)
    nothing = np.zeros((1, 4, 4), bool)
    assert steps.stability(nothing, nothing[None]).tolist() == [0.0]


def strip(*columns, width=10):
    masks = np.zeros((len(columns), 1, width), bool)
    for mask, (start, end) in zip(masks, columns, strict=True):
        mask[0, start:end] = True
    return masks


@pytest.mark.parametrize(
    ("things", "scores", "stuff", "stuff_scores", "segments", "chosen"),
    [
        # The better thing is in front, and a background fills the rest.
        ([(0, 4), (2, 6)], [0.5, 0.9], [(0, 10)], [1.0], "2211113333"[:2] + "11113333", [1, 0, 2]),
        # A thing of which a quarter is visible is dropped; of a half, it stays.
        ([(0, 4), (1, 5)], [0.9, 0.5], [], [], "1111000000", [0]),
        ([(0, 4), (2, 6)], [0.9, 0.5], [], [], "1111220000", [0, 1]),
        # A background needs two free pixels; of two backgrounds the better is in front.
        ([(0, 9)], [0.4], [(0, 10)], [1.0], "1111111110", [0]),
        ([], [], [(0, 6), (4, 10)], [0.3, 0.6], "2222111111", [1, 0]),
        # Empty masks are dropped.
        ([(3, 3)], [1.0], [(5, 5)], [1.0], "0000000000", []),
    ],
)
def test_panoptic_merge(things, scores, stuff, stuff_scores, segments, chosen):
    found, order = steps.merge_panoptic(
        strip(*things), np.array(scores), strip(*stuff), np.array(stuff_scores), (1, 10), 0.5, 2
    )
    assert "".join(map(str, found[0])) == segments
    assert order == chosen and found.dtype == np.int32
