import evals_reference as reference
import jax.numpy as jnp
import numpy as np

from ovseg_jax.evals import proposals
from ovseg_jax.kernels import resize


def test_best_iou_matches_the_float64_reference(monkeypatch):
    monkeypatch.setattr(proposals, "row_block", lambda rows, floats: resize.row_block(rows, 1, 4))
    rng = np.random.default_rng(0)
    canvas, grid, n, m = 16, 4, 6, 5
    images, labels, shape = np.array([[16, 16], [9, 14]]), np.array([[19, 15], [10, 17]]), (20, 18)
    logits = 3 * rng.normal(size=(2, n, grid, grid)).astype(np.float32)
    segments = np.zeros((2, *shape), np.int32)
    for s, (h, w) in zip(segments, labels, strict=True):
        s[:h, :w] = np.repeat(np.repeat(rng.integers(0, m, (5, 5)), 4, 0), 4, 1)[
            :h, :w
        ]  # number m never occurs
    got = proposals.best_iou(
        jnp.asarray(logits), jnp.asarray(images), jnp.asarray(labels), jnp.asarray(segments), m, canvas=canvas
    )
    for i, (h, w) in enumerate(labels):
        masks = reference.upsample(logits[i], canvas, images[i], labels[i]) > 0
        for j in range(m):
            true = segments[i, :h, :w] == j + 1
            best = max(((true & p).sum() / max((true | p).sum(), 1)) for p in masks)
            np.testing.assert_allclose(got[i, j], best, atol=1e-6)


def test_known_recall():
    """Proposals: the left half, and the top quarter; segments: the left half less a row, the right half."""
    logits = np.full((1, 2, 8, 8), -9, np.float32)
    logits[0, 0, :, :4] = 9
    logits[0, 1, :2] = 9
    segments = np.zeros((1, 8, 8), np.int32)
    segments[0, 1:, :4] = 1  # best IoU 28/32
    segments[0, :, 4:] = 2  # best IoU 8 / (32 + 8) with the top quarter
    size = jnp.array([[8, 8]])
    iou = proposals.best_iou(jnp.asarray(logits), size, size, jnp.asarray(segments), 3, canvas=8)
    np.testing.assert_allclose(iou[0], [28 / 32, 8 / 40, 0], atol=1e-6)
    counts = proposals.count_recalled(iou, jnp.array([[True, True, False]]))
    assert counts.tolist() == [1, 1, 0, 2]
    crowd = proposals.count_recalled(iou, jnp.array([[True, False, False]]))
    assert crowd.tolist() == [1, 1, 0, 1]
