import evals_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.decisions import maps
from ovseg_jax.decisions.maps import MODES
from ovseg_jax.decisions.rules import decide
from ovseg_jax.kernels import resize
from ovseg_jax.protocols import Prediction, Segmenting, Vocabulary

CANVAS, GRID, N, D, M = 20, 5, 6, 7, 4
IMAGES, LABELS, SHAPE = np.array([[20, 20], [17, 9]]), np.array([[23, 19], [11, 8]]), (24, 20)
OWNER = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4], np.int32)


def case(seed=0):
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    prediction = Prediction(
        jnp.asarray(2 * normal((2, N, GRID, GRID)), jnp.float32),
        {"": jnp.asarray(reference.unit(normal((2, N, D))), jnp.float32)},
        {"": jnp.asarray(normal((2, GRID, GRID, D)), jnp.float32)},
    )
    text = reference.unit(normal((len(OWNER), D))).astype(np.float32)
    segments = np.repeat(np.repeat(rng.integers(0, M + 1, (2, 8, 5)), 3, 1), 4, 2).astype(np.int32)
    for s, (h, w) in zip(segments, LABELS, strict=True):
        s[h:], s[:, w:] = 0, 0
    return prediction, text, segments


VOCABULARY = Vocabulary(jnp.asarray(OWNER), jnp.zeros(len(OWNER), bool), jnp.ones(5, bool))


def run(prediction, text, segments, mode, allowed=None):
    allowed = np.ones((2, 5), bool) if allowed is None else allowed
    got = decide(
        Segmenting(),
        prediction,
        {"": jnp.asarray(text)},
        VOCABULARY,
        jnp.asarray(IMAGES),
        jnp.asarray(LABELS),
        jnp.asarray(allowed)[:, None, OWNER],
        canvas=CANVAS,
        shape=SHAPE,
        mode=mode,
        segments=jnp.asarray(segments),
        max_segments=M,
    )
    return jax.tree.map(lambda x: x[:, 0], got)


def reference_logits(prediction, text, segments, mode, i):
    return reference.logits(
        mode,
        prediction.mask_logits[i],
        prediction.regions[""][i],
        prediction.pixels[""][i],
        text,
        CANVAS,
        IMAGES[i],
        LABELS[i],
        segments[i],
    )


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_maps_match_the_float64_reference(mode, small_blocks, monkeypatch):
    if small_blocks:  # several blocks of names and of rows, none of them full at the end
        monkeypatch.setattr(maps, "NAME_BLOCK", 4)
        monkeypatch.setattr(maps, "row_block", lambda rows, floats: resize.row_block(rows, 1, 7))
    prediction, text, segments = case()
    allowed = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]], bool)
    got = run(prediction, text, segments, mode, allowed=allowed)
    for i, (h, w) in enumerate(LABELS):
        y = reference_logits(prediction, text, segments, mode, i)
        y[~allowed[i][OWNER]] = -np.inf
        best = y.max(0)
        found = np.isfinite(best)
        category = np.asarray(got.category[i])[:h, :w]
        np.testing.assert_array_equal(category >= 0, found)
        chosen = np.where(OWNER[:, None, None] == category, y, -np.inf).max(0)
        np.testing.assert_allclose(chosen[found], best[found], atol=2e-5)  # the winner, but for rounding
        if mode == "predicted":
            masks = reference.upsample(prediction.mask_logits[i], CANVAS, IMAGES[i], LABELS[i])
            best = best / np.maximum(reference.sigmoid(masks).sum(0), 1)
        np.testing.assert_allclose(np.asarray(got.confidence[i])[:h, :w][found], best[found], atol=2e-5)
        outside = np.ones(SHAPE, bool)
        outside[:h, :w] = ~found
        assert (np.asarray(got.category[i])[outside] == -1).all()
        assert (np.asarray(got.confidence[i])[outside] == 0).all()


def test_a_category_scores_as_its_best_name():
    prediction, text, segments = case(3)
    got = run(prediction, text, segments, "none")
    y = reference_logits(prediction, text, segments, "none", 0)
    by_category = np.stack([y[k == OWNER].max(0) for k in range(OWNER.max() + 1)])
    want = by_category.argmax(0)
    assert (np.asarray(got.category[0])[: LABELS[0][0], : LABELS[0][1]] == want).mean() > 0.99


def test_truth_paints_segments_with_their_own_word():
    h = w = GRID * 4
    segments = np.ones((1, h, w), np.int32)
    segments[:, :, w // 2 + 3 :] = 2  # not on the grid's lines
    segments[:, :2] = 0
    features = np.zeros((1, GRID, GRID, 2), np.float32)
    features[..., :3, 0] = 1
    features[..., 3:, 1] = 1
    got = decide(
        Segmenting(),
        Prediction(None, {}, {"": jnp.asarray(features)}),
        {"": jnp.eye(2)},
        Vocabulary(jnp.arange(2), jnp.zeros(2, bool), jnp.ones(2, bool)),
        jnp.array([[h, w]]),
        jnp.array([[h, w]]),
        jnp.ones((1, 1, 2), bool),
        canvas=h,
        shape=(h, w),
        mode="truth",
        segments=jnp.asarray(segments),
        max_segments=3,
    )
    np.testing.assert_array_equal(got.category[:, 0], segments - 1)


@pytest.mark.parametrize("mode", MODES)
def test_canvas_padding_and_batch_padding_change_nothing(mode):
    prediction, text, segments = case(5)
    base = run(prediction, text, segments, mode)
    rows, cols = -(-IMAGES[1] // 4)  # the cells that image 1 touches
    masks, regions, pixels = map(np.array, jax.tree.leaves(prediction))
    masks[1, :, rows:], masks[1, :, :, cols:] = 50, 50
    pixels[1, rows:], pixels[1, :, cols:] = -9, 9
    for field in (masks, regions, pixels):
        field[0] = 0  # what stands beside it in the batch
    masks, regions, pixels = map(jnp.asarray, (masks, regions, pixels))
    got = run(Prediction(masks, {"": regions}, {"": pixels}), text, segments, mode)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), base, got)


def test_no_allowed_category_predicts_nothing():
    prediction, text, segments = case()
    got = run(prediction, text, segments, "predicted", allowed=np.zeros((2, 5), bool))
    assert (np.asarray(got.category) == -1).all()


def test_a_per_pixel_prediction_has_no_predicted_masks():
    prediction, text, segments = case()
    with pytest.raises(ValueError, match="none"):
        run(Prediction(None, {}, prediction.pixels), text, segments, "predicted")


@pytest.mark.parametrize("mode", ["predicted", "none"])
def test_memory_does_not_grow_with_the_vocabulary(mode):
    """640 x 640, 128 proposals: [K H W] would be 1.4 GB at 847 classes and 33 GB at 20,000."""
    dim, batch = 256, 2

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    @jax.jit
    def run_maps(masks, regions, pixels, text, owner, sizes):
        vocabulary = Vocabulary(owner, jnp.zeros(len(owner), bool), jnp.ones(len(owner), bool))
        prediction = Prediction(masks, {"": regions}, {"": pixels})
        views = jnp.ones((batch, 1, len(owner)), bool)
        where = dict(canvas=640, shape=(640, 640), mode=mode)
        return decide(Segmenting(), prediction, {"": text}, vocabulary, sizes, sizes, views, **where)

    def bytes_needed(names):
        seen = shape(batch, 128, 160, 160), shape(batch, 128, dim), shape(batch, 160, 160, dim)
        sizes = shape(batch, 2, dtype=jnp.int32)
        text, owner = shape(names, dim), shape(names, dtype=jnp.int32)
        return run_maps.lower(*seen, text, owner, sizes).compile().memory_analysis().temp_size_in_bytes

    small, large = bytes_needed(847), bytes_needed(20_000)
    table = (20_000 - 847) * dim * 4
    assert small < 100e6
    scores = (20_000 - 847) * 128 * 4
    assert large - small < 1.1 * (table + scores)  # the table in blocks, and the names' scores for masks
