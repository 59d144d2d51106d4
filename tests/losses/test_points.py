"""Mask2Former's matching and losses at points against transformers' with the same points; padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.losses.points import PAPER, Points, draw, point_losses
from tests import reference
from tests.extras import require

POINTS = Points(number=40)
KEY = jax.random.key(7)
B, L, N, M, C, K = 2, 3, 6, 4, 5, 4


def make(seed=0):
    rng = np.random.default_rng(seed)
    embeddings, pixels = rng.normal(size=(B, L, N, C)), rng.normal(size=(B, 6, 9, C))
    masks = (rng.random((B, M, 24, 36)) < 0.4).astype(np.uint8) * 255
    valid = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], bool)
    names, classes = rng.normal(size=(B, L, N, K + 1)), rng.integers(0, K, (B, M))
    as32 = lambda x: x.astype(np.float32)
    return as32(embeddings), as32(pixels), masks, valid, as32(names), classes


def losses(embeddings, pixels, masks, valid, names, classes, weight=None, filled=None, points=POINTS):
    weight = jnp.ones(len(masks)) if weight is None else jnp.asarray(weight, jnp.float32)
    filled = None if filled is None else jnp.asarray(filled, jnp.float32)
    given = dict(class_logits=jnp.asarray(names), classes=jnp.asarray(classes), filled=filled, points=points)
    inputs = (jnp.asarray(x) for x in (embeddings, pixels, masks, valid))
    return point_losses(*inputs, weight, KEY, **given)


class Rand:
    """`torch.rand` with our draws: of the last layer first, then of the others, as the loss calls it."""

    def __init__(self, torch, query, valid):
        self.answers = []
        for layer in (L - 1, *range(L - 1)):
            found = draw(KEY, jnp.asarray(layer), (B, M), POINTS)
            self.answers += [found.matching[b][None] for b in range(B)]
            # Pairs are in the order of their queries.
            pairs = [
                (b, j)
                for b in range(B)
                for _, j in sorted((query[b, layer, j], j) for j in np.flatnonzero(valid[b]))
            ]
            self.answers += [jnp.stack([x[b, j] for b, j in pairs]) for x in (found.candidates, found.others)]
        self.torch = torch

    def __call__(self, *shape, device=None):
        answer = np.array(self.answers.pop(0))
        assert answer.shape == shape
        return self.torch.from_numpy(answer)


def test_equals_hugging_face(monkeypatch):
    """Matching, all losses, and gradients of embeddings, pixels and classes."""
    torch, transformers = require("torch"), require("transformers")
    from transformers.models.mask2former import modeling_mask2former

    embeddings, pixels, masks, valid, names, classes = make()

    def total(embeddings, pixels, names):
        found = losses(embeddings, pixels, masks, valid, names, classes)
        return found.total(PAPER), found

    gradient, ours = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(embeddings, pixels, names)
    config = transformers.Mask2FormerConfig(num_labels=K, train_num_points=POINTS.number)
    weights = dict(loss_cross_entropy=2.0, loss_mask=5.0, loss_dice=5.0)
    loss = modeling_mask2former.Mask2FormerLoss(config, weights)
    e, p, n = (torch.tensor(x, requires_grad=True) for x in (embeddings, pixels, names))
    logits = torch.einsum("blnc,bhwc->lbnhw", e, p)
    layers = [
        dict(masks_queries_logits=logits[i], class_queries_logits=n[:, i].contiguous()) for i in range(L)
    ]
    labels = [torch.from_numpy(masks[b][valid[b]] / np.float32(255)) for b in range(B)]
    kinds = [torch.from_numpy(classes[b][valid[b]]) for b in range(B)]
    query = np.asarray(ours.query)
    seen, matcher = [], loss.matcher.forward
    monkeypatch.setattr(loss.matcher, "forward", lambda *x: seen.append(matcher(*x)) or seen[-1])
    monkeypatch.setattr(modeling_mask2former.torch, "rand", Rand(torch, query, valid))
    parts = loss(*layers[-1].values(), labels, kinds, layers[:-1])
    monkeypatch.undo()
    for layer, pairs in zip((L - 1, *range(L - 1)), seen, strict=True):
        for b, (rows, columns) in enumerate(pairs):
            np.testing.assert_array_equal(query[b, layer, np.flatnonzero(valid[b])[columns]], rows)
    for i in range(L):
        suffix = "" if i == L - 1 else f"_{i}"
        found = (
            ours.mask / ours.masks,
            ours.dice / ours.masks,
            ours.label / ours.label_weight,
        )
        for name, value in zip(("mask", "dice", "cross_entropy"), found, strict=True):
            np.testing.assert_allclose(value[i], parts[f"loss_{name}{suffix}"].item(), rtol=1e-5)
    whole = sum(weights[name.rstrip("_012")] * value for name, value in parts.items())
    np.testing.assert_allclose(ours.total(PAPER), whole.item(), rtol=1e-5)
    whole.backward()
    errors = [reference.relative_error(a, b.grad.numpy()) for a, b in zip(gradient, (e, p, n), strict=True)]
    print("gradients of embeddings, pixels and class logits:", errors)
    assert max(errors) < 1e-5


def test_padding_changes_nothing():
    """Of the canvas, of the masks and of the batch; an image that ends within a cell."""
    embeddings, pixels, masks, valid, names, classes = make()
    rng = np.random.default_rng(9)
    size = np.array([[23, 36], [24, 33]])
    alone = losses(embeddings, pixels, masks, valid, names, classes, filled=size / [24, 36])
    more = lambda x, *widths: np.pad(x, [*widths, *((0, 0) for _ in range(x.ndim - len(widths)))])
    batch = (0, 1)
    wide = rng.normal(0, 9, (3, 10, 10, C)).astype(np.float32)
    large = rng.integers(0, 256, (3, M + 2, 40, 40), dtype=np.uint8)
    for b, (h, w) in enumerate(size):
        wide[b, :6, : -(-w // 4)] = pixels[b, :, : -(-w // 4)]
        large[b, :M, :h, :w] = np.where(valid[b, :, None, None], masks[b, :, :h, :w], 99)
    padded = losses(
        more(embeddings, batch),
        wide,
        large,
        more(valid, batch, (0, 2)) | (np.arange(3) == 2)[:, None],
        more(names, batch),
        more(classes, batch, (0, 2)),
        weight=(1, 1, 0),
        filled=np.concatenate([size, [[0, 0]]]) / 40,
    )
    real = valid[:, None].repeat(L, 1)
    np.testing.assert_array_equal(padded.query[:B, :, :M][real], alone.query[real])
    for ours, expected in zip(padded[:-1], alone[:-1], strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert alone.masks == 5 and np.isfinite(padded.total(PAPER))


def test_points_are_those_of_an_image_and_its_masks():
    """Whatever else is in the batch; uniform; other ones in each layer."""
    few, many = (draw(KEY, jnp.asarray(1), shape, Points(number=2000)) for shape in ((1, 2), (3, 4)))
    for a, b in ((few.matching, many.matching[:1]), (few.others, many.others[:1, :2])):
        np.testing.assert_array_equal(a, b)
    assert few.candidates.shape == (1, 2, 6000, 2) and few.others.shape == (1, 2, 500, 2)
    flat = np.concatenate([np.asarray(x).reshape(-1, 2) for x in many])
    assert len(np.unique(flat, axis=0)) == len(flat)
    np.testing.assert_allclose(flat.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(np.cov(flat.T), np.eye(2) / 12, atol=0.002)
    assert not np.array_equal(few.matching, draw(KEY, jnp.asarray(2), (1, 2), Points(2000)).matching)


def test_masks_without_a_query_and_images_without_masks():
    embeddings, pixels, masks, valid, names, classes = make()
    found = losses(embeddings[:, :, :2], pixels, masks, valid, names[:, :, :2], classes)
    assert ((np.asarray(found.query[1])[:, :3] == 2).sum(-1) == 1).all()  # one of three has none
    none = losses(embeddings, pixels, masks, np.zeros_like(valid), names, classes)
    assert none.masks == 0 and not none.mask.any() and none.total(PAPER) > 0


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_coverage_between_0_and_1(dtype):
    """A mask of 51 / 255 is one of 0.2."""
    embeddings, pixels, masks, valid, names, classes = make()
    part = np.full_like(masks, 51)
    part = part if dtype == np.uint8 else (part / 255).astype(dtype)
    one = lambda x: x[:, :1]
    found = losses(embeddings, pixels * 0, one(part), one(valid), names, one(classes))
    np.testing.assert_allclose(found.mask, B * np.log(2), rtol=1e-3)
    inner = 1 - (2 * 0.5 * 0.2 * 40 + 1) / (0.5 * 40 + 0.2 * 40 + 1)
    # Points at the border see zeros beyond it.
    np.testing.assert_allclose(found.dice, B * inner, rtol=0.05)
