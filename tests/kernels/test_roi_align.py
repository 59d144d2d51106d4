"""RoIAlign against torchvision's, and against a float64 loop over samples where torchvision without its own operators
takes too few of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from extras import require

from ovseg_jax.kernels.roi_align import roi_align

H, W, C = 9, 13, 3
FEATURES = np.random.default_rng(0).normal(size=(2, H, W, C)).astype(np.float32)
INSIDE = [
    [0, 0, W, H],
    [1.3, 2.2, 7.9, 8.4],
    [3, 4, 4, 5],
    [5.25, 1.5, 5.5, 1.75],  # less than a cell
    [0.5, 0.5, 12.5, 3.5],
    [2, 3, 2, 6],  # without width
    [4, 4, 4, 4],  # a point
    [6, 7, 3, 2],  # corners swapped
]
OUTSIDE = [
    [-3, -2.5, 4, 5.5],
    [8, 5, W + 6, H + 2],
    [-9, -9, -4, -4],
    [W + 3, 2, W + 5, 4],
    [-1.5, -1.5, 0.2, 0.3],
    [-4, -3, W + 5, H + 4],
]
HUGE = [[-100, -60.5, 140, 90], [-1e4, -1e4, 1e4, 1e4], [3, -500, 4.5, 800]]


def boxes(rows):
    """The same boxes, moved, for the second image."""
    rows = np.asarray(rows, np.float32)
    return np.stack([rows, rows[::-1] + 0.3])


def by_samples(maps, box, size, sampling, aligned):
    """One box in float64, a sample at a time, by the rules of torchvision's own operator."""
    offset = 0.5 if aligned else 0.0
    x0, y0, x1, y1 = np.float64(box) - offset

    def axis(start, end, cells):
        length = end - start if aligned else max(end - start, 1.0)
        count = sampling if sampling > 0 else int(np.ceil(length / size))
        weights = np.zeros((size, cells))
        for p in range(size):
            for i in range(count):
                at = start + p * length / size + (i + 0.5) * length / size / count
                if not -1 <= at <= cells:
                    continue
                at = min(max(at, 0.0), cells - 1.0)
                low = min(int(at), cells - 1)
                weights[p, low] += 1 - (at - low)
                weights[p, min(low + 1, cells - 1)] += at - low
        return weights, count

    rows, down = axis(y0, y1, maps.shape[0])
    columns, across = axis(x0, x1, maps.shape[1])
    return np.einsum("ph,qw,hwc->pqc", rows, columns, np.float64(maps)) / max(down * across, 1)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("size, sampling", [(1, -1), (1, 2), (7, 0), (7, 3), (14, 2), (14, -1)])
def test_values_and_gradients_are_torchvisions(size, sampling, aligned):
    torch, ops = require("torch"), require("torchvision.ops")
    # Without a swapped box, for which torchvision's Python form divides by a negative number of samples.
    given = boxes([row for row in [*INSIDE, *OUTSIDE] if row[2] >= row[0]])
    maps = torch.from_numpy(FEATURES.transpose(0, 3, 1, 2).copy()).requires_grad_()
    rois = [torch.from_numpy(4 * rows).requires_grad_() for rows in given]
    want = ops.roi_align(maps, rois, size, 0.25, sampling, aligned)
    weights = np.random.default_rng(1).normal(size=(*given.shape[:2], size, size, C)).astype(np.float32)
    (want * torch.from_numpy(weights).flatten(0, 1).permute(0, 3, 1, 2)).sum().backward()
    options = dict(scale=0.25, sampling=sampling, aligned=aligned)

    @jax.jit
    def ours(features, boxes):
        out = roi_align(features, boxes, size, **options)
        return (out * weights).sum(), out

    (_, out), gradients = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(FEATURES, 4 * given)
    want = want.detach().permute(0, 2, 3, 1).unflatten(0, given.shape[:2]).numpy()
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(gradients[0], maps.grad.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    assert not np.asarray(gradients[1]).any()


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("size, sampling", [(1, 0), (7, 0), (14, 0), (1, 4), (7, 1)])
def test_boxes_of_any_length_and_place(size, sampling, aligned):
    given = boxes([*INSIDE, *OUTSIDE, *HUGE])
    out = jax.jit(lambda f, b: roi_align(f, b, size, sampling=sampling, aligned=aligned))(FEATURES, given)
    for i in range(2):
        for got, box in zip(np.asarray(out[i]), given[i], strict=True):
            want = by_samples(FEATURES[i], box, size, sampling, aligned)
            np.testing.assert_allclose(got, want, atol=1e-3 if np.abs(box).max() > 1e3 else 2e-5)


def test_every_number_of_samples():
    """Boxes of all lengths, whose samples are up to 2 cells apart and down to just over half a cell."""
    lengths = np.concatenate([np.linspace(0.05, 12, 240), np.arange(1, 12) + 1e-4, np.arange(1.0, 12)])
    given = np.stack([lengths * 0 + 0.4, lengths * 0 - 0.7, lengths + 0.4, lengths - 0.7], -1)[None]
    given = given.astype(np.float32)
    for size in (1, 2, 3):
        out = jax.jit(lambda f, b: roi_align(f, b, size))(FEATURES[:1], given)  # noqa: B023
        want = [by_samples(FEATURES[0], box, size, 0, True) for box in given[0]]
        np.testing.assert_allclose(out[0], want, atol=2e-5)


def test_padding_has_no_influence():
    given, valid = boxes(INSIDE), np.arange(2 * len(INSIDE)).reshape(2, -1) % 3 > 0
    given_nan = np.where(valid[..., None], given, np.nan)

    def loss(features, boxes, valid):
        out = roi_align(features, boxes, 2, valid=valid)
        return (out**2).sum(), out

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(FEATURES, given_nan, valid)
    whole = np.asarray(roi_align(FEATURES, given, 2))
    np.testing.assert_array_equal(np.asarray(out)[valid], whole[valid])
    assert not np.asarray(out)[~valid].any() and whole[~valid].any()
    of_valid = lambda f: (roi_align(f, given, 2)[valid] ** 2).sum()
    np.testing.assert_allclose(gradient, jax.grad(of_valid)(jnp.asarray(FEATURES)), atol=1e-5)


def test_half_precision_keeps_its_dtype():
    half = jnp.asarray(FEATURES, jnp.bfloat16)
    out = roi_align(half, boxes(INSIDE), 7)
    assert out.dtype == jnp.bfloat16
    want = roi_align(half.astype(jnp.float32), boxes(INSIDE), 7)
    np.testing.assert_allclose(out.astype(np.float32), want, rtol=2**-7, atol=1e-6)
