"""Decisions against the published rules written the slow way: NumPy, float64, one proposal and one pixel at a time."""

import evals_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.decisions import rules
from ovseg_jax.decisions.rules import (
    Argmax,
    BackgroundThreshold,
    GroupVit,
    Instances,
    Panoptic,
    decide,
    decision_of,
)
from ovseg_jax.errors import UserError
from ovseg_jax.kernels import resize
from ovseg_jax.protocols import Prediction, RegionScores, Segmenting, Vocabulary

CANVAS, GRID, N, K = 20, 5, 9, 6
IMAGES, LABELS, SHAPE = np.array([[20, 20], [17, 9]]), np.array([[23, 19], [11, 8]]), (24, 20)
OWNER = np.array([0, 0, 1, 2, 2, 3, 4, 5], np.int32)
THING = np.array([True, False, True, False, False, True])
VOCABULARY = Vocabulary(jnp.asarray(OWNER), jnp.zeros(len(OWNER), bool), jnp.asarray(THING))


class Scored(Segmenting):
    """Region scores are given: what a region "is", and of "no object"."""

    def score_regions(self, prediction, text, vocabulary):
        return RegionScores(prediction.regions[""].T, prediction.void)


def case(seed, void=True):
    rng = np.random.default_rng(seed)
    masks = 3 * rng.standard_normal((2, N, GRID, GRID))
    scores = rng.dirichlet(np.ones(len(OWNER) + 1) / 3, (2, N))
    prediction = Prediction(
        jnp.asarray(masks, jnp.float32),
        {"": jnp.asarray(scores[..., :-1], jnp.float32)},
        {"": jnp.zeros((2, GRID, GRID, 1))},
        jnp.asarray(scores[..., -1], jnp.float32) if void else None,
    )
    return prediction, masks, scores


def run(prediction, decision, allowed=None):
    allowed = np.ones((2, 1, K), bool) if allowed is None else allowed
    sizes = jnp.asarray(IMAGES), jnp.asarray(LABELS), jnp.asarray(allowed[:, :, OWNER])
    where = dict(canvas=CANVAS, shape=SHAPE, decision=decision)
    return decide(Scored(), prediction, {"": jnp.zeros((len(OWNER), 1))}, VOCABULARY, *sizes, **where)


def upsampled(masks, i):
    return reference.sigmoid(reference.upsample(masks[i], CANVAS, IMAGES[i], LABELS[i]))


def by_class(scores, allowed=None):
    best = np.stack([scores[:, k == OWNER].max(1) for k in range(K)], 1)  # [N K]
    return best if allowed is None else np.where(allowed, best, -np.inf)


def slow_panoptic(mask, scores, void, object_threshold, overlap_threshold, allowed=None):
    """panoptic_inference of Mask2Former, with the scores of FC-CLIP: (number [h w], [(category, score)])."""
    classes = by_class(scores, allowed)
    every = np.concatenate([classes, void[:, None]], 1) if void is not None else classes
    score, label = every.max(1), every.argmax(1)
    keep = [n for n in range(len(mask)) if label[n] < K and score[n] > object_threshold]
    number, found, stuff = np.zeros(mask.shape[1:], int), [], {}
    if not keep:
        return number, found
    winner = np.array(keep)[(score[keep][:, None, None] * mask[keep]).argmax(0)]
    for n in keep:
        own, half = winner == n, mask[n] >= 0.5
        inside = own & half
        if not (own.sum() and half.sum() and inside.sum()) or own.sum() / half.sum() < overlap_threshold:
            continue
        if not THING[label[n]] and label[n] in stuff:
            number[inside] = stuff[label[n]]
            continue
        found.append((label[n], score[n]))
        number[inside] = len(found)
        if not THING[label[n]]:
            stuff[label[n]] = len(found)
    return number, found


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize(("seed", "void", "overlap"), [(0, True, 0.8), (1, False, 0.5), (2, True, 0.3)])
def test_panoptic_is_mask2formers(seed, void, overlap, small_blocks, monkeypatch):
    if small_blocks:
        monkeypatch.setattr(rules, "row_block", lambda rows, floats: resize.row_block(rows, 1, 7))
    prediction, masks, scores = case(seed, void)
    got = run(prediction, Panoptic(object_threshold=0.1, overlap_threshold=overlap))
    segments = 0
    for i, (h, w) in enumerate(LABELS):
        mask = upsampled(masks, i)
        number, found = slow_panoptic(
            mask, scores[i][:, :-1], scores[i][:, -1] if void else None, 0.1, overlap
        )
        segments += len(found)
        assert (np.asarray(got.segments.number[i, 0])[:h, :w] == number).mean() > 0.995  # ties at 0.5
        category = np.array([-1, *(k for k, _ in found)])
        assert (np.asarray(got.category[i, 0])[:h, :w] == category[number]).mean() > 0.995
        assert np.asarray(got.segments.category[i, 0])[: len(found)].tolist() == [k for k, _ in found]
        np.testing.assert_allclose(got.segments.score[i, 0][: len(found)], [s for _, s in found], rtol=1e-5)
        assert (np.asarray(got.segments.category[i, 0])[len(found) :] == -1).all()
        outside = np.ones(SHAPE, bool)
        outside[:h, :w] = False
        assert (np.asarray(got.category[i, 0])[outside] == -1).all()
        assert (np.asarray(got.segments.number[i, 0])[outside] == 0).all()
    assert segments >= 2


def test_views_choose_among_their_own_classes():
    prediction, masks, scores = case(4)
    allowed = np.ones((2, 2, K), bool)
    allowed[:, 1, [0, 3]] = False
    got = run(prediction, Panoptic(), allowed)
    for i, (h, w) in enumerate(LABELS):
        for v in range(2):
            number, _ = slow_panoptic(
                upsampled(masks, i), scores[i][:, :-1], scores[i][:, -1], 0.0, 0.8, allowed[i, v]
            )
            assert (np.asarray(got.segments.number[i, v])[:h, :w] == number).mean() > 0.995
    assert not np.isin(np.asarray(got.category[:, 1]), [0, 3]).any()


@pytest.mark.parametrize("top", [4, 100])
def test_instances_are_mask2formers(top):
    prediction, masks, scores = case(5)
    got = run(prediction, Instances(top=top))
    for i, (h, w) in enumerate(LABELS):
        logits = reference.upsample(masks[i], CANVAS, IMAGES[i], LABELS[i])
        classes = np.where(THING, by_class(scores[i][:, :-1]), -np.inf)
        order = np.argsort(-classes.T.ravel(), kind="stable")[:top]
        want = []
        for at in order:
            k, n = divmod(int(at), N)
            inside = logits[n] > 0
            if np.isfinite(classes[n, k]) and inside.any():
                mean = (reference.sigmoid(logits[n]) * inside).sum() / (inside.sum() + 1e-6)
                want.append((classes[n, k] * mean, k, inside))
        want.sort(key=lambda row: -row[0])
        found = np.asarray(got.segments.category[i, 0]) >= 0
        assert found.sum() == len(want)
        np.testing.assert_allclose(got.segments.score[i, 0][found], [s for s, _, _ in want], rtol=1e-4)
        assert np.asarray(got.segments.category[i, 0])[found].tolist() == [k for _, k, _ in want]
        for mask, (_, _, inside) in zip(np.asarray(got.segments.masks[i, 0])[found], want, strict=True):
            assert (mask[:h, :w] == inside).mean() > 0.99 and mask.sum() == mask[:h, :w].sum()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 2.0])
def test_groupvit_merges_as_published(threshold):
    prediction, masks, scores = case(6)
    got = run(prediction, GroupVit(threshold=threshold, scale=5.0, top=3))
    for i, (h, w) in enumerate(LABELS):
        classes = by_class(scores[i][:, :-1])
        softmax = lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)
        top = np.argsort(-classes.mean(0))[:3]
        within = np.full_like(classes, -np.inf)
        within[:, top] = 5 * classes[:, top]
        affinity = softmax(5 * classes) * softmax(within)
        winner = reference.upsample(masks[i], CANVAS, IMAGES[i], LABELS[i]).argmax(0)
        best = affinity.max(1)[winner]
        want = np.where(best >= min(threshold, affinity.max()), affinity.argmax(1)[winner], -1)
        if threshold > 1:  # the best of the image stays
            want = np.where(best >= affinity.max() * (1 - 1e-6), affinity.argmax(1)[winner], -1)
        assert (np.asarray(got.category[i, 0])[:h, :w] == want).mean() > 0.995
        np.testing.assert_allclose(
            np.where(want >= 0, got.confidence[i, 0][:h, :w], 0), np.where(want >= 0, best, 0), atol=1e-5
        )


def test_a_background_is_what_falls_below_the_threshold():
    prediction, *_ = case(7)
    plain, cut = run(prediction, Argmax()), run(prediction, BackgroundThreshold(threshold=0.2))
    low = np.asarray(plain.confidence) < 0.2
    assert 0 < low[0, 0, :23, :19].mean() < 1
    np.testing.assert_array_equal(cut.category, np.where(low, -1, plain.category))


def test_nothing_allowed_gives_nothing():
    prediction, *_ = case(8)
    for decision in ("argmax", "groupvit", "panoptic", "instances"):
        got = run(prediction, decision_of(decision), np.zeros((2, 1, K), bool))
        assert (np.asarray(got.category) == -1).all() and (np.asarray(got.confidence) == 0).all()
        if got.segments is not None:
            assert (np.asarray(got.segments.category) == -1).all()


def test_settings_are_checked():
    assert decision_of("argmax") == Argmax()
    assert decision_of({"type": "panoptic", "overlap_threshold": 1}) == Panoptic(0.0, 1.0)
    assert decision_of(ConfigDict({"type": "instances", "top": 5})) == Instances(5)
    for value, said in (
        ("best", "'best' is not one of argmax"),
        ({"overlap": 1}, "None is not one of"),
        (
            {"type": "panoptic", "overlap": 1},
            "no setting 'overlap'; known settings: object_threshold, overlap_threshold",
        ),
        ({"type": "panoptic", "overlap_threshold": "half"}, "must be a number, not 'half'"),
        ({"type": "groupvit", "scale": float("nan")}, "must be a number"),
        ({"type": "instances", "top": 0}, "is less than 1"),
        ({"type": "argmax", "threshold": 1}, "has no setting .threshold.; known settings: none"),
    ):
        with pytest.raises(UserError, match=said):
            decision_of(value)
    pixels = Prediction(None, {}, {"": jnp.zeros((1, 2, 2, 1))})
    where = dict(canvas=4, shape=(4, 4), decision=Panoptic(), mode="none")
    size = jnp.full((1, 2), 4)
    with pytest.raises(UserError, match="Panoptic needs predicted masks"):
        decide(Scored(), pixels, {}, VOCABULARY, size, size, jnp.ones((1, 1, 8), bool), **where)


def test_memory_of_panoptic_does_not_grow_with_the_image():
    """250 masks of 1024 x 1024 would be a gigabyte."""

    def bytes_needed(side):
        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)

        def of(masks, scores):
            prediction = Prediction(masks, {"": scores}, {"": jnp.zeros((1, 64, 64, 1))})
            size = jnp.full((1, 2), side)
            views = jnp.ones((1, 1, len(OWNER)), bool)
            where = dict(canvas=side, shape=(side, side), decision=Panoptic())
            text = {"": jnp.zeros((len(OWNER), 1))}
            return decide(Scored(), prediction, text, VOCABULARY, size, size, views, **where)

        lowered = jax.jit(of).lower(shape(1, 250, 64, 64), shape(1, 250, len(OWNER)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert bytes_needed(1024) < 200e6
