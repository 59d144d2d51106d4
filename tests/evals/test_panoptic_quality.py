"""PQ against a loop over masks in float64, against published values, and on cases that are easily got wrong."""

from functools import reduce

import numpy as np
import panoptic_reference as reference
import pytest

from ovseg_jax.evals.panoptic_quality import VOID, Tally, add, overlaps, scores, table, tally
from ovseg_jax.vocab.classes import ClassList
from tests.extras import require


def of(predicted, true, predicted_class, true_class, crowds=(), classes=5, rule="coco"):
    """The tally of one image, in the reference's terms; what has no class counts as K."""
    predicted, true = np.asarray(predicted), np.asarray(true)
    ours, theirs = list(predicted_class), [*true_class, *(set(np.unique(true)) - {0, *true_class})]
    number = lambda ids, x: np.vectorize(lambda i: ids.index(i) + 1 if i else 0)(x)
    return tally(
        overlaps(number(ours, predicted), number(theirs, true)),
        np.array([predicted_class[p] for p in ours], int),
        np.array([true_class.get(t, classes) for t in theirs], int),
        np.array([t in crowds for t in theirs], bool),
        classes,
        rule,
    )


def rows(found, classes=5):
    """Counts of the reference as a `Tally`."""
    return Tally(*np.array([found.get(k, (0.0, 0, 0, 0)) for k in range(classes)]).T)


@pytest.mark.parametrize("rule", ["coco", "bdd100k"])
def test_random_images_are_tallied_as_by_the_loop(rule):
    rng = np.random.default_rng(0)
    total = expected = None
    for _ in range(60):
        image = reference.random_image(rng)
        total, expected = (
            add(total, of(*image, rule=rule)),
            add(expected, rows(reference.counts(*image, rule))),
        )
    assert total.tp.sum() > 20 and total.fp.sum() > 20 and total.fn.sum() > 20
    np.testing.assert_array_equal(total[1:], expected[1:])
    np.testing.assert_allclose(total.iou, expected.iou, rtol=1e-12)
    got = scores(total, (True, True, False, False, False), {"some": (0, 4)})
    found = {k: [x[k] for x in expected] for k in range(5)}
    for suffix, group in (("", range(5)), ("/thing", (0, 1)), ("/stuff", (2, 3, 4)), ("/some", (0, 4))):
        own = [got[f"{metric}{suffix}"] for metric in ("pq", "sq", "rq")]
        np.testing.assert_allclose(own, 100 * reference.means(found, group), rtol=1e-12)


def test_the_rules_differ_in_the_union_and_in_what_is_ignored():
    true = np.array([[1] * 6 + [0] * 4])
    predicted = np.array([[1] * 10])
    coco, bdd = (of(predicted, true, {1: 0}, {1: 0}, classes=1, rule=rule) for rule in ("coco", "bdd100k"))
    assert (coco.iou[0], bdd.iou[0]) == (1.0, 0.6)
    # More than half on a crowd: of another class, only BDD100K ignores it.
    true = np.array([[1] * 6 + [2] * 4])
    for crowd_class, ignored in ((0, {"coco": 0, "bdd100k": 0}), (1, {"coco": 1, "bdd100k": 0})):
        for rule, fp in ignored.items():
            got = of(predicted, true, {1: 0}, {1: crowd_class, 2: 2}, {1}, 3, rule)
            assert (got.fp[0], got.tp.sum(), got.fn[2]) == (fp, 0, 1), (rule, crowd_class)


def test_exactly_half_is_neither_a_match_nor_ignored():
    half = of([[1, 1, 0, 0]], [[1, 1, 1, 1]], {1: 0}, {1: 0}, classes=1)
    assert (half.tp[0], half.fp[0], half.fn[0]) == (0, 1, 1)
    void = of([[1, 1, 1, 1]], [[0, 0, 2, 2]], {1: 0}, {2: 1}, classes=2)
    assert void.fp[0] == 1
    more = of([[1, 1, 1, 1]], [[0, 0, 0, 2]], {1: 0}, {2: 1}, classes=2)
    assert more.fp[0] == 0 and more.fn[1] == 1


def test_of_several_crowds_of_a_class_the_last_counts_as_in_panopticapi():
    predicted, true = [[1] * 9], [[2] * 3 + [1] * 6]
    assert of(predicted, true, {1: 0}, {1: 0, 2: 0}, {1, 2}, 1).fp[0] == 1
    assert of(predicted, true, {1: 0}, {2: 0, 1: 0}, {1, 2}, 1).fp[0] == 0


def test_segments_without_a_label_are_void():
    shared = overlaps(np.array([[1] * 8]), np.array([[1] * 5 + [2] * 3]))
    got = tally(shared, np.array([0]), np.array([0, VOID]), np.array([False, False]), 1)
    assert got.iou[0] == 1.0 and got.fn[0] == 0


def test_classes_of_false_predictions_alone_count_as_zero_and_others_are_left_out():
    false = of([[1, 2]], [[1, 3]], {1: 0, 2: 1}, {1: 0, 3: 0}, classes=4)
    assert scores(false, (True,) * 4)["pq"] == pytest.approx(100 * (1 / 1.5 + 0) / 2)
    names = ClassList((("a",), ("b",), ("c",), ("d",)), (1, 2, 3, 4), (True, True, True, False))
    lines = table(false, names)
    assert [(row.name, row.kind, row.tp, row.fp, row.fn) for row in lines[:2]] == [
        ("a", "thing", 1, 0, 1),
        ("b", "thing", 0, 1, 0),
    ]
    assert lines[1].pq == 0 and lines[2].pq is None
    assert not scores(Tally(*np.zeros((4, 3))), (True,) * 3)
    assert "pq/stuff" not in scores(false, (True,) * 4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (30, 40), (300, 250)])
@pytest.mark.parametrize("highest", [3, 2**24])
def test_overlaps_of_noise(shape, highest):
    """Of the largest, colours and ids have more runs than are sorted with their places."""
    predicted, true = np.random.default_rng(0).integers(0, highest, (2, *shape))
    pairs, counts = np.unique(predicted << 32 | true, return_counts=True)
    colours = [np.stack([x & 255, x >> 8 & 255, x >> 16], -1).astype(np.uint8) for x in (predicted, true)]
    for found in (overlaps(predicted, true), overlaps(*colours), overlaps(colours[0], colours[1].copy("F"))):
        for values, expected in zip(found, (pairs >> 32, pairs & 2**32 - 1, counts), strict=True):
            np.testing.assert_array_equal(values, expected)


def test_overlaps_of_ids_of_four_bytes_and_of_nothing():
    top = 2**32 - 1
    found = overlaps(np.array([[top, top, 0, top]], np.uint32), np.array([[7, 7, 7, 0]], np.uint32))
    assert list(zip(*(x.tolist() for x in found), strict=True)) == [(0, 7, 1), (top, 0, 1), (top, 7, 2)]
    assert all(len(x) == 0 for x in overlaps(np.zeros((0, 4), int), np.zeros((0, 4), int)))
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (2, 9, 11))
    for p, t, n in zip(*overlaps(a, b), strict=True):
        assert ((a == p) & (b == t)).sum() == n


@pytest.mark.skipif(not reference.PUBLISHED.is_dir(), reason="no published scenes beside the repository")
def test_published_scenes_have_the_published_scores():
    team = of(*reference.published_scene("team"), classes=7)
    one = scores(team, (True,) * 7)
    assert [one[m] / 100 for m in ("pq", "sq", "rq")] == pytest.approx(
        [0.62156284, 0.64664984, 0.96666670], abs=5e-7
    )
    assert (team.tp.sum(), team.fn.sum(), team.fp.sum()) == (8, 1, 0)
    every = reduce(add, [of(*reference.published_scene(name), classes=7) for name in reference.SCENES])
    assert scores(every, (True,) * 7)["pq"] / 100 == pytest.approx(0.76855499, abs=5e-7)


def test_torchmetrics_agrees():
    """Without crowds, with instances of stuff joined, and predicted everywhere.

    torchmetrics also leaves out of a union where nothing is predicted, which panopticapi does not.
    """
    torch, detection = require("torch"), require("torchmetrics.detection")
    rng = np.random.default_rng(3)
    metric = detection.PanopticQuality(
        things={0, 1, 2}, stuffs={3, 4}, return_sq_and_rq=True, return_per_class=True
    )
    total = None
    for _ in range(20):
        predicted, true, predicted_class, true_class, _ = reference.random_image(rng)
        true_class.setdefault(8, 1)
        predicted_class[0] = 4
        maps = []
        for ids, classes in ((predicted, predicted_class), (true, true_class)):
            category = np.vectorize(lambda i, classes=classes: classes.get(i, 9))(ids)  # 9: void
            maps.append(np.stack([category, np.where(category < 3, ids, 0)], -1))
        metric.update(*(torch.as_tensor(x)[None] for x in maps))
        joined = [np.where(x[..., 0] == 9, 0, x[..., 0] * 16 + x[..., 1] + 1) for x in maps]
        kinds = [{int(i): int(i - 1) // 16 for i in np.unique(x) if i} for x in joined]
        total = add(total, of(*joined, *kinds))
    names = ClassList(tuple((str(k),) for k in range(5)), tuple(range(5)), (True,) * 5)
    ours = np.array([[row.pq, row.sq, row.rq] for row in table(total, names)]) / 100
    np.testing.assert_allclose(ours, metric.compute().numpy(), atol=1e-6)
