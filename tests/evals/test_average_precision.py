"""AP of boxes and masks against pycocotools, and by LVIS's rules against a loop, on random detections."""

import detection_reference as reference
import numpy as np
import pytest
from detection_reference import case, official, percent
from pycocotools import mask as coco_mask

from ovseg_jax.evals import average_precision as ap


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_cocos_metrics_are_those_of_pycocotools(kind):
    for seed in range(3):
        truth, found = case(seed)
        judge = official(truth, found, kind)
        judge.summarize()
        got = ap.curves(truth, found, kind)
        # pycocotools adds 2^-52 to the number of detections.
        np.testing.assert_allclose(got.precision, judge.eval["precision"], rtol=1e-14)
        np.testing.assert_array_equal(got.recall, judge.eval["recall"])
        np.testing.assert_allclose(list(ap.metrics(got).values()), percent(judge.stats), rtol=1e-14)
        assert 5 < ap.metrics(got)["AP"] < 95 and got.categories == [3, 5, 7, 9]
        assert np.isnan(ap.class_precision(got)[9]).all()  # nothing is of that class
        own = judge.eval["precision"][:, :, 1, 0, 2]
        assert ap.class_precision(got)[5] == pytest.approx((100 * own.mean(), 100 * own[0].mean()))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_only_the_best_detections_of_an_image_and_class_count(kind):
    truth, found = case(3, images=2, classes=2, crowds=False)
    found = [row | {"score": row["score"] + n / 1000} for n in range(8) for row in found]
    judge = official(truth, found, kind)
    judge.summarize()
    got = ap.metrics(ap.curves(truth, found, kind))
    np.testing.assert_allclose(list(got.values()), percent(judge.stats), rtol=1e-14)


def of_masks(a, b):
    return coco_mask.iou([a], [b], [0])[0, 0]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_lviss_metrics_are_those_of_the_loop(kind):
    truth, found = case(4, images=7, crowds=False, lvis=True)
    shapes = dict(iou=of_masks, shape="segmentation", area=lambda m: float(coco_mask.area(m)))
    precision, recall = reference.lvis(truth, found, **(shapes if kind == "segm" else {}))
    frequencies = {3: "r", 5: "c", 7: "c", 9: "f"}
    got = ap.metrics(ap.curves(truth, found, kind, "lvis"), "lvis", frequencies)
    at = lambda values, *index: (
        100 * np.nanmean(values[index]) if (~np.isnan(values[index])).any() else np.nan
    )
    all_ = slice(None)
    expected = [at(precision, all_, all_, 0), at(precision, 0, all_, 0), at(precision, 5, all_, 0)]
    expected += [at(precision, all_, all_, area) for area in (1, 2, 3)]
    expected += [at(precision, all_, members, 0) for members in ([0], [1, 2], [3])]
    expected += [at(recall, all_, all_, area) for area in range(4)]
    assert list(got) == list(ap.NAMES["lvis"])
    np.testing.assert_allclose(list(got.values()), expected, rtol=1e-12)
    assert 5 < got["AP"] < 95 and np.isnan(got["APf"])
    plain = ap.metrics(ap.curves(truth, found, kind))
    assert plain["AP"] < got["AP"] - 1  # both rules forgive false detections


def test_lvis_counts_the_best_300_of_an_image():
    truth, found = case(5, images=2, classes=2, crowds=False, lvis=True)
    many = [row | {"score": row["score"] - n / 100} for n in range(20) for row in found]
    assert len(many) > 600
    got = ap.curves(truth, many, "bbox", "lvis")
    precision, recall = reference.lvis(truth, many)
    np.testing.assert_allclose(got.recall[..., 0], np.nan_to_num(recall, nan=-1), rtol=1e-12)
    np.testing.assert_allclose(got.precision.mean(1)[..., 0], np.nan_to_num(precision, nan=-1), rtol=1e-12)


def test_a_class_without_detections_is_missed():
    truth, _ = case(6, lvis=True)
    for rule in ap.RULES:
        got = ap.metrics(ap.curves(truth, [], "bbox", rule), rule)
        assert got["AP"] == 0 and {
            got[name] for name in got if name.startswith("AR") and got[name] == got[name]
        } == {0}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_proposals_are_matched_across_classes(kind):
    truth, found = case(7)
    limits = (1, 4, 8)
    found.sort(key=lambda row: row["category_id"])  # which decides between equal scores there
    judge = official(truth, found, kind, limits, by_class=False)
    blind = [{k: v for k, v in row.items() if k != "category_id"} for row in found]
    got = ap.curve(ap.pool(truth, blind), kind, limits)
    np.testing.assert_array_equal(got.recall, judge.eval["recall"])
    assert 0.05 < got.recall[0, 0, 0, 0] < got.recall[0, 0, 0, 2] < 1
