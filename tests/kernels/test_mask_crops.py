"""Crops under masks against torch's own resize of each box."""

import jax
import jax.numpy as jnp
import numpy as np
from extras import require

from ovseg_jax.kernels.mask_crops import cubic, mask_crops

S, T, Z = 40, 33, 16
FILL = np.array([123.0, 4.5, 250.0])


def masks(seed=0):
    """[2 5 S T]: rectangles with holes, from one pixel to everything, and an empty one."""
    rng = np.random.default_rng(seed)
    boxes = [(0, S, 0, T), (3, 4, 7, 8), (10, 31, 5, 9), (S - 2, S, 0, T)]
    inside = np.zeros((2, 5, S, T), bool)
    for b in range(2):
        for n, (top, bottom, left, right) in enumerate(boxes):
            inside[b, n, top:bottom, left:right] = rng.random((bottom - top, right - left)) < 0.8
            inside[b, n, top, left] = inside[b, n, bottom - 1, right - 1] = True
    return inside


def test_boxes_are_cut_filled_and_resized_as_torch_does():
    torch = require("torch")
    image = np.random.default_rng(1).integers(0, 256, (2, S, T, 3), np.uint8)
    inside = masks()
    crop = jax.jit(mask_crops, static_argnums=3)
    got = np.asarray(crop(jnp.asarray(image), jnp.asarray(inside), jnp.asarray(FILL, jnp.float32), Z))
    assert got.shape == (2, 5, Z, Z, 3) and got.dtype == np.uint8
    for b in range(2):
        for n in range(4):
            rows, columns = np.nonzero(inside[b, n].any(1))[0], np.nonzero(inside[b, n].any(0))[0]
            box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            region = np.where(inside[b, n][..., None], image[b].astype(np.float64), FILL)[box]
            region = torch.from_numpy(region).permute(2, 0, 1)[None]
            want = (
                torch.nn.functional.interpolate(region, size=(Z, Z), mode="bicubic")[0]
                .permute(1, 2, 0)
                .numpy()
            )
            np.testing.assert_allclose(got[b, n], np.clip(want, 0, 255), atol=0.502)
    assert (got[:, 4] == np.round(FILL)).all()  # an empty mask


def test_resampling_keeps_a_constant_and_a_box_of_its_own_size():
    matrix = np.asarray(cubic(Z, S, jnp.asarray(5), jnp.asarray(9)))
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    assert not matrix[:, :5].any() and not matrix[:, 14:].any()
    np.testing.assert_allclose(cubic(Z, S, jnp.asarray(7), jnp.asarray(Z)), np.eye(Z, S, 7), atol=1e-6)
