"""The tag loss against float64 NumPy, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.losses.tags import tag_loss

D = 6


def make():
    rng = np.random.default_rng(0)
    features, tags = rng.normal(size=(4, 2, D)), rng.normal(size=(4, 2, 3, D))
    # An opposite tag along one axis differs by 2 there, beyond the quadratic zone.
    features[0, 0], tags[0, 0, 0] = 5 * np.eye(D)[2], -3 * np.eye(D)[2]
    valid = rng.random((4, 2, 3)) < 0.6
    valid[0, 0], valid[1, 1], valid[2] = (True, False, False), False, True
    return jnp.float32(features), jnp.float32(tags), jnp.asarray(valid)


def reference(features, tags, valid, reduction):
    """The sum and the number by loops, and the gradients of the sum in features and tags, by the chain rule."""
    total, count = 0.0, 0
    grads = np.zeros(features.shape), np.zeros(tags.shape)
    for place in np.ndindex(features.shape[:-1]):
        own = np.flatnonzero(valid[place])
        count += bool(len(own))
        for t in own:
            x, y = np.float64(features[place]), np.float64(tags[(*place, t)])
            u, v = x / np.linalg.norm(x), y / np.linalg.norm(y)
            difference, weight = u - v, 1 / (len(own) * (D if reduction == "mean" else 1))
            near = np.abs(difference) < 1
            total += weight * np.where(near, difference**2 / 2, np.abs(difference) - 0.5).sum()
            slope = weight * np.clip(difference, -1, 1)
            back = lambda unit, vector, slope: (slope - unit * (unit @ slope)) / np.linalg.norm(vector)
            grads[0][place] += back(u, x, slope)
            grads[1][(*place, t)] += back(v, y, -slope)
    return total, count, grads


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_values_and_gradients_equal_float64(reduction):
    features, tags, valid = make()
    run = lambda features, tags: tag_loss(features, tags, valid, reduction)
    (total, count), grads = jax.value_and_grad(run, (0, 1), has_aux=True)(features, tags)
    want, want_count, want_grads = reference(features, tags, valid, reduction)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert count == want_count < valid[..., 0].size
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_sum_is_one_minus_the_cosine():
    rng = np.random.default_rng(1)
    features, tags = (jnp.float32(rng.normal(size=(50, 64))) for _ in range(2))
    x, y = np.float64(features), np.float64(tags)
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    total, count = tag_loss(features, tags[:, None], jnp.ones((50, 1), bool))
    np.testing.assert_allclose(total, (1 - cosine).sum(), rtol=1e-5)
    assert count == 50


def test_unused_tags_have_no_influence():
    features, tags, valid = make()
    other = jnp.where(valid[..., None], tags, 7.0)
    np.testing.assert_array_equal(tag_loss(features, tags, valid), tag_loss(features, other, valid))
    nothing = tag_loss(features, tags, jnp.zeros_like(valid))
    assert nothing == (0, 0)
