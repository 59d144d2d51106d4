import evals_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.evals import confusion, pixel_counts
from ovseg_jax.evals.confusion import Counts
from ovseg_jax.vocab.classes import ClassList


def counted(label, predicted, k):
    return pixel_counts.add(None, jax.jit(pixel_counts.count, static_argnums=2)(label, predicted, k))


def test_counts_and_scores_match_the_confusion_matrix():
    rng = np.random.default_rng(0)
    k = 9
    label = rng.integers(-1, k - 2, (3, 17, 13))  # the two last classes never occur, -1 is void
    label[0, :3] = 255
    predicted = np.where(rng.random(label.shape) < 0.5, label, rng.integers(-1, k - 1, label.shape))
    predicted = np.where(predicted == 255, 3, predicted)
    counts = counted(label, predicted, k)
    m = reference.confusion_matrix(label, predicted, k)
    np.testing.assert_array_equal(counts.intersection, np.diag(m))
    np.testing.assert_array_equal(counts.truth, m.sum(1))
    np.testing.assert_array_equal(counts.prediction, m.sum(0)[:k])

    inter, truth, guess = np.diag(m).astype(float), m.sum(1).astype(float), m.sum(0)[:k].astype(float)
    either, present = truth + guess > 0, truth > 0
    iou = inter / np.maximum(truth + guess - inter, 1)
    got = confusion.scores(counts)
    assert got["miou"] == pytest.approx(100 * iou[either].mean())
    assert got["miou_gt"] == pytest.approx(100 * iou[present].mean())
    assert either.sum() == 8 and present.sum() == 7
    assert got["pacc"] == pytest.approx(100 * inter.sum() / truth.sum())
    assert got["macc"] == pytest.approx(100 * (inter[present] / truth[present]).mean())
    assert got["fwiou"] == pytest.approx(100 * (truth * iou).sum() / truth.sum())


def test_both_divisors_by_hand():
    label = np.array([[[0, 0, 0, 0], [1, 1, -1, -1]]])
    predicted = np.array([[[0, 0, 0, 2], [1, 0, 2, 2]]])
    got = confusion.scores(counted(label, predicted, 4))
    # IoU: class 0 3/5, class 1 1/2, class 2 0/1 (predicted once on a labelled pixel), class 3 nowhere.
    assert got["miou_gt"] == pytest.approx(100 * (0.6 + 0.5) / 2)
    assert got["miou"] == pytest.approx(100 * (0.6 + 0.5 + 0) / 3)
    assert got["pacc"] == pytest.approx(100 * 4 / 6)
    assert got["macc"] == pytest.approx(100 * (3 / 4 + 1 / 2) / 2)


def test_groups_average_their_own_classes():
    counts = Counts(np.array([4, 1, 0, 0]), np.array([4, 2, 2, 0]), np.array([5, 1, 2, 0]))
    got = confusion.scores(counts, {"seen": (0, 1), "held_out": (2,), "absent": (3,)})
    assert got["miou/seen"] == pytest.approx(100 * (4 / 5 + 1 / 2) / 2)
    assert got["miou/held_out"] == 0
    assert "miou/absent" not in got and "chance_miou/absent" not in got
    assert confusion.scores(Counts(*[np.zeros(4, np.int64)] * 3)) == {}


@pytest.mark.parametrize("novel", ["unseen", "held_out"])
def test_harmonic_mean_of_seen_and_unseen_under_both_divisors(novel):
    rng = np.random.default_rng(4)
    k, groups = 8, {"seen": (0, 1, 4, 6), novel: (2, 3, 5, 7), "stuff": (1, 2)}
    label = rng.integers(0, k - 2, (2, 30, 20))  # one class of each group occurs in predictions only
    predicted = np.where(rng.random(label.shape) < 0.6, label, rng.integers(0, k, label.shape))
    got = confusion.scores(counted(label, predicted, k), groups)
    for name, divisor in (("hiou", lambda t, g: t | g), ("hiou_gt", lambda t, g: t)):
        means = []
        for members in (groups["seen"], groups[novel]):
            ious = []
            for c in members:
                t, g = label == c, predicted == c
                if divisor(t.any(), g.any()):
                    ious.append(np.float64((t & g).sum()) / (t | g).sum())
            means.append(100 * np.mean(ious))
        assert got[name] == pytest.approx(2 / (1 / means[0] + 1 / means[1]), rel=1e-12)
    assert got["hiou"] < got["hiou_gt"]


def test_the_harmonic_mean_with_nothing_right_on_one_side():
    counts = Counts(np.array([4, 0]), np.array([4, 2]), np.array([6, 0]))
    assert confusion.scores(counts, {"seen": (0,), "unseen": (1,)})["hiou"] == 0
    assert "hiou" not in confusion.scores(counts, {"seen": (0, 1)})
    # A split laid over data that holds out classes of its own.
    three = Counts(np.array([4, 2, 0]), np.array([4, 4, 2]), np.array([4, 2, 4]))
    groups = {"seen": (0,), "unseen": (1,), "held_out": (2,)}
    assert confusion.scores(three, groups)["hiou"] == pytest.approx(2 * 100 * 50 / 150)
    absent = Counts(np.array([4, 0]), np.array([4, 0]), np.array([4, 0]))
    assert "hiou" not in confusion.scores(absent, {"seen": (0,), "unseen": (1,)})


def test_chance_level_is_what_random_predictions_get():
    rng = np.random.default_rng(0)
    label = rng.choice(5, (4, 300, 300), p=[0.6, 0.25, 0.1, 0.05, 0.0])
    counts = counted(label, rng.integers(0, 5, label.shape), 5)
    got = confusion.scores(counts, {"rare": (2, 3)})
    for name in ("miou", "miou_gt", "miou/rare"):
        assert got[f"chance_{name}"] == pytest.approx(got[name], abs=0.15)


def test_sums_over_a_data_set_do_not_overflow():
    batch = Counts(*[np.full(2, 2**31 - 1, np.int32)] * 3)
    total = None
    for _ in range(5):
        total = pixel_counts.add(total, batch)
    assert total.truth.tolist() == [5 * (2**31 - 1)] * 2


def test_present_classes_are_the_queries_of_grounding():
    label = jnp.array([[[0, 2], [-1, 255]], [[1, 1], [1, 1]]])
    got = np.asarray(pixel_counts.present_classes(label, 4))
    np.testing.assert_array_equal(got, [[1, 0, 1, 0], [0, 1, 0, 0]])


def test_table_names_each_class_and_leaves_absent_ones_open():
    classes = ClassList((("cat", "kitten"), ("dog",), ("emu",)), (1, 2, 3), (True,) * 3)
    rows = confusion.table(Counts(np.array([3, 0, 0]), np.array([4, 1, 0]), np.array([4, 1, 0])), classes)
    assert [tuple(r) for r in rows] == [("cat", 4, 60.0), ("dog", 1, 0.0), ("emu", 0, None)]
