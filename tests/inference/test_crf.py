"""The CRF against the mean field written the slow way, and pydensecrf's answers."""

import numpy as np
import pytest

from ovseg_jax.inference import crf


def picture(seed=0, height=24, width=31):
    """A disk on a ground with noise, and a label map whose border is wrong."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    disk = (y - 12) ** 2 + (x - 15) ** 2 < 64
    image = np.where(disk[..., None], (180, 60, 40), (60, 120, 160)) + rng.integers(-8, 9, (height, width, 3))
    rough = (abs(y - 11) < 8) & (abs(x - 14) < 8)
    return image.astype(np.uint8), np.where(rough, 3, -1), np.where(disk, 3, -1)


def slow(image, labels):
    """Krähenbühl and Koltun's mean field with all pairs of pixels in float64."""
    own, index = np.unique(labels, return_inverse=True)
    height, width = labels.shape
    y, x = np.mgrid[:height, :width]
    place = np.stack([y, x], -1).reshape(-1, 2).astype(float)
    colour = image.reshape(-1, 3).astype(float)
    pairs = lambda f: ((f[:, None] - f[None]) ** 2).sum(-1)
    kernels = [np.exp(-pairs(place) / 18), np.exp(-pairs(place) / 12800 - pairs(colour) / 338)]
    kernels = [k / np.sqrt(k.sum(0)) / np.sqrt(k.sum(1))[:, None] for k in kernels]
    hot = index.reshape(-1, 1) == np.arange(len(own))
    unary = np.log(np.where(hot, 0.7, 0.3 / (len(own) - 1)))
    q = np.exp(unary)
    for _ in range(5):
        energy = unary + 3 * kernels[0] @ q + 10 * kernels[1] @ q
        q = np.exp(energy - energy.max(1, keepdims=True))
        q /= q.sum(1, keepdims=True)
    return own[q.argmax(1)].reshape(height, width), q.reshape(height, width, -1)


@pytest.mark.parametrize(("senders", "least"), [(4096, 0.999), (100, 0.97)])
def test_the_mean_field_is_the_published_one(senders, least, monkeypatch):
    monkeypatch.setattr(crf, "SENDERS", senders)
    monkeypatch.setattr(crf, "BLOCK", 64)
    crf._mean_field.clear_cache()
    image, rough, disk = picture()
    got, (want, share) = crf.refine(image, rough), slow(image, rough)
    assert got.dtype == rough.dtype and (got == want).mean() >= least
    if senders == 4096:  # more than pixels: nothing is approximated
        found = crf._mean_field(image, (rough == 3).astype(int), 2)
        np.testing.assert_allclose(found, share, atol=1e-4)
    assert (got == disk).mean() > 0.97 > (rough == disk).mean()


def test_three_labels_and_one():
    image, rough, _ = picture(1)
    third = rough.copy()
    third[:, :4] = 9
    assert (crf.refine(image, third) == slow(image, third)[0]).mean() >= 0.999
    np.testing.assert_array_equal(crf.refine(image, np.full_like(rough, 5)), 5)
