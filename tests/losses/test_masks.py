"""OpenSeg's mask loss against eq. 1 written out in float64 NumPy, and optax's Dice where the two agree."""

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.losses.masks import best_match_dice_loss as typed_loss
from ovseg_jax.losses.masks import dice_coefficient


def best_match_dice_loss(*arrays):
    return typed_loss(*map(jnp.asarray, arrays))


def reference(logits, masks, valid, weight):
    total, count = 0.0, 0
    for b in range(len(logits)):
        labels = masks[b][valid[b]].astype(np.float64) / 255
        if not len(labels) or weight[b] == 0:
            continue
        soft = 1 / (1 + np.exp(-logits[b].astype(np.float64)))
        best = []
        for t in labels:
            dice = [(2 * (s * t).sum() + 1e-3) / ((s**2).sum() + (t**2).sum() + 1e-3) for s in soft]
            best.append(1 - max(dice))
        total, count = total + weight[b] * np.mean(best), count + 1
    return total, count


def make(seed=0, size=6):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(4, 5, size, size)).astype(np.float32) * 3
    masks = rng.integers(0, 256, (4, 3, size, size)).astype(np.uint8)
    valid = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)
    return logits, masks, valid, np.array([1, 0.1, 1, 0], np.float32)


def test_equals_the_reference():
    data = make()
    out = jax.jit(best_match_dice_loss)(*data)
    np.testing.assert_allclose(out, reference(*data), rtol=1e-5)


def test_padding_masks_change_nothing():
    logits, masks, valid, weight = make()
    changed = np.where(valid[:, :, None, None], masks, 255 - masks)
    a, b = (best_match_dice_loss(logits, m, valid, weight) for m in (masks, changed))
    np.testing.assert_array_equal(a, b)


def test_perfect_masks_lose_nothing_and_only_the_best_proposal_learns():
    target = np.zeros((1, 1, 4, 4), np.uint8)
    target[0, 0, :2] = 255
    logits = np.stack([np.where(target[0, 0], 20.0, -20.0), np.zeros((4, 4))])[None].astype(np.float32)
    ones = (np.ones((1, 1), bool), np.ones(1, np.float32))
    loss = lambda x: best_match_dice_loss(x, target, *ones)[0]
    assert loss(logits) < 1e-5
    grad = jax.grad(loss)(logits - np.sign(logits) * 18)
    assert np.abs(grad[0, 0]).max() > 1e-3
    assert np.all(grad[0, 1] == 0)


def test_logits_are_resized_to_the_labels_grid():
    logits, _, valid, weight = make(size=3)
    masks = make(size=6)[1]
    upsampled = np.asarray(jax.image.resize(logits, (4, 5, 6, 6), "bilinear"))
    a = best_match_dice_loss(jnp.asarray(logits), masks, valid, weight)
    np.testing.assert_allclose(a, reference(upsampled, masks, valid, weight), rtol=1e-5)


def test_two_empty_masks_agree():
    empty = jnp.zeros((1, 1, 9))
    assert dice_coefficient(empty, empty) == 1
