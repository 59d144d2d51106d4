"""The matching and its losses against float64 NumPy and scipy; padding; a sharded batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from ovseg_jax.losses import matching
from ovseg_jax.losses.matching import Weights, matched_losses
from ovseg_jax.parallel.sharding import AXES, make_mesh, put_batch


def match(cost, valid, axes=()):
    return jax.jit(lambda c, v: matching.match(c, v, axes))(jnp.asarray(cost), jnp.asarray(valid))


def of_scipy(cost, valid):
    """The query of each mask, -1 for none."""
    found = np.full(cost.shape[:2] + cost.shape[3:], -1)
    for b, layer in np.ndindex(cost.shape[:2]):
        columns = np.flatnonzero(valid[b])
        rows, picked = linear_sum_assignment(cost[b, layer][:, columns])
        found[b, layer, columns[picked]] = rows
    return found


@pytest.mark.parametrize("queries,masks", [(9, 5), (4, 6), (5, 5)])
def test_matches_as_scipy_does(queries, masks):
    rng = np.random.default_rng(0)
    cost = rng.normal(0, 3, (6, 2, queries, masks)).astype(np.float32)
    valid = np.arange(masks) < np.array([[0], [1], [2], [masks - 1], [masks], [3]])
    cost[:3] -= np.where(valid[:3, None, None], 0, 100)  # padding would be chosen first
    query, matched = match(cost, valid)
    np.testing.assert_array_equal(np.where(matched, query, -1), of_scipy(cost, valid))


def test_undefined_costs_are_the_last_choice():
    cost = np.array([[np.nan, 1.0], [5.0, np.inf], [7.0, 9.0]], np.float32)[None, None]
    query, matched = match(cost, np.ones((1, 2), bool))
    assert matched.all() and query.tolist() == [[[1, 0]]]


def test_a_sharded_batch_matches_the_same_without_communication():
    rng = np.random.default_rng(1)
    cost, valid = rng.normal(size=(16, 3, 12, 6)).astype(np.float32), rng.random((16, 6)) < 0.7
    expected = match(cost, valid)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    batch = put_batch({"cost": cost, "valid": valid}, mesh)
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(lambda c, v: matching.match(c, v, AXES)).lower(batch["cost"], batch["valid"]).compile()
        )
        found = compiled(batch["cost"], batch["valid"])
    for ours, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, other)
    text = compiled.as_text()
    assert "while" in text and not any(
        name in text for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    )


def logistic(x):
    return 1 / (1 + np.exp(-x))


def pair_losses(x, t, inside):
    """Focal and Dice loss of one mask in float64; `inside` are the pixels that count."""
    x, t, p = x[inside].astype(np.float64), t[inside], logistic(x[inside].astype(np.float64))
    entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p))
    right = p * t + (1 - p) * (1 - t)
    focal = np.mean((0.25 * t + 0.75 * (1 - t)) * (1 - right) ** 2 * entropy)
    return focal, 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def upsampled(x, size):
    """Bilinear with half-pixel centres and repeated borders."""
    for axis, new in zip((-2, -1), size, strict=True):
        old = x.shape[axis]
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        weight = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(old)))
        x = np.moveaxis(np.tensordot(weight, x, (1, axis)), 0, axis)
    return x


def make(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (3, 2, 5, 4, 6)).astype(np.float32)
    masks = (rng.random((3, 4, 8, 12)) < 0.4).astype(np.uint8) * 255
    valid = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    names, classes = rng.normal(size=(3, 2, 5, 4)).astype(np.float32), rng.integers(0, 3, (3, 4))
    inside = np.arange(8)[None, :, None] < np.array([6, 8, 8])[:, None, None]
    inside = inside & (np.arange(12) < np.array([12, 8, 12])[:, None])[:, None]
    return logits, masks, valid, names, classes, inside


def losses(logits, masks, valid, names=None, classes=None, inside=None, weight=(1, 1, 1), **options):
    arrays = dict(class_logits=names, classes=classes, inside=inside)
    arrays = {k: jnp.asarray(v) for k, v in arrays.items() if v is not None}
    return matched_losses(
        *map(jnp.asarray, (logits, masks, valid)), jnp.asarray(weight, jnp.float32), **arrays, **options
    )


@pytest.mark.parametrize("named", [False, True])
def test_equals_the_reference(named):
    logits, masks, valid, names, classes, inside = make()
    weight = (1, 0.5, 1)
    ours = losses(logits, masks, valid, *((names, classes) if named else (None, None)), inside, weight)
    small, near = logits.astype(np.float64), masks[:, :, ::2, ::2] / 255
    large = upsampled(small, (8, 12))
    focal, dice, entropy, share = np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(2)
    for b, layer in np.ndindex(3, 2):
        columns = np.flatnonzero(valid[b])
        pairs = [[pair_losses(x, t, inside[b, ::2, ::2]) for t in near[b, columns]] for x in small[b, layer]]
        cost = np.array(pairs).reshape(5, -1, 2) @ [20, 1]
        probability = np.exp(names[b, layer]) / np.exp(names[b, layer]).sum(-1, keepdims=True)
        if named:
            cost = cost - probability[:, classes[b, columns]]
        rows, picked = linear_sum_assignment(cost)
        np.testing.assert_array_equal(ours.query[b, layer, columns[picked]], rows)
        label = np.full(5, 3)
        for row, column in zip(rows, columns[picked], strict=True):
            f, d = pair_losses(large[b, layer, row], masks[b, column] / 255, inside[b])
            focal[layer] += weight[b] * f
            dice[layer] += weight[b] * d
            label[row] = classes[b, column]
        each = weight[b] * np.where(label == 3, 0.1, 1)
        entropy[layer] -= (each * np.log(probability[np.arange(5), label])).sum()
        share[layer] += each.sum()
    np.testing.assert_allclose(ours.mask, focal, rtol=1e-5)
    np.testing.assert_allclose(ours.dice, dice, rtol=1e-5)
    assert ours.masks == 4
    total = (20 * focal + dice).sum() / 4
    if named:
        np.testing.assert_allclose(ours.label, entropy, rtol=1e-5)
        np.testing.assert_allclose(ours.label_weight, share, rtol=1e-5)
        total += 2 * (entropy / share).sum()
    np.testing.assert_allclose(ours.total(Weights(label=2)), total, rtol=1e-5)


def test_only_matched_queries_learn_without_classes_and_padding_changes_nothing():
    logits, masks, valid, *_ = make()

    def gradient(masks):
        return jax.grad(lambda x: losses(x, masks, valid).total())(jnp.asarray(logits))

    learns = np.abs(gradient(masks)).max((3, 4)) > 0
    np.testing.assert_array_equal(learns.sum(2), [[3, 3], [1, 1], [0, 0]])
    changed = np.where(valid[:, :, None, None], masks, 255 - masks)
    np.testing.assert_array_equal(gradient(changed), gradient(masks))


def test_pixels_outside_change_nothing():
    logits, masks, valid, names, classes, inside = make()
    rng = np.random.default_rng(5)
    outside = ~inside[:, ::2, ::2][:, None, None]
    other = np.where(outside, rng.normal(0, 9, logits.shape).astype(np.float32), logits)
    noise = np.where(inside[:, None], masks, rng.integers(0, 2, masks.shape, np.uint8) * 255)
    # Interpolated at the border, only whole cells within it do not see the others.
    a, b = (losses(x, t, valid, names, classes, inside) for x, t in ((logits, masks), (logits, noise)))
    for ours, expected in zip(b, a, strict=True):
        np.testing.assert_array_equal(ours, expected)
    small = losses(other, masks[:, :, ::2, ::2], valid, names, classes, inside[:, ::2, ::2])
    plain = losses(logits, masks[:, :, ::2, ::2], valid, names, classes, inside[:, ::2, ::2])
    for ours, expected in zip(small, plain, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_a_batch_without_masks_has_no_mask_loss():
    logits, masks, valid, names, classes, _ = make()
    none = np.zeros_like(valid)
    out = losses(logits, masks, none)
    assert out.total() == 0 and out.masks == 0
    gradient = jax.grad(lambda x: losses(x, masks, none).total())(jnp.asarray(logits))
    assert not gradient.any()
    named = losses(logits, masks, none, names, classes)
    assert named.total() > 0  # every query learns "no object"
