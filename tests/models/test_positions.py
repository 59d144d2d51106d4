"""Resized tables of positions against PyTorch, SciPy and a hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.positions import RESIZES, axis_weights, resize_positions
from tests import reference
from tests.extras import require

TABLES = [(4, 4, 7, 9), (7, 5, 3, 4), (6, 6, 6, 13), (14, 14, 1, 2), (1, 3, 5, 3)]


@pytest.mark.parametrize("rows,columns,height,width", TABLES)
def test_position_tables_equal_pytorch(rows, columns, height, width):
    torch = require("torch")
    table = np.random.default_rng(0).normal(size=(rows, columns, 5)).astype(np.float32)
    grid = torch.from_numpy(table).permute(2, 0, 1)[None]
    resize = torch.nn.functional.interpolate
    expected = {
        "bicubic": resize(grid, size=(height, width), mode="bicubic", align_corners=False),
        # vision_transformer.py of DINO: sizes and a tenth, as factors.
        "dino": resize(grid, scale_factor=((height + 0.1) / rows, (width + 0.1) / columns), mode="bicubic"),
        "bilinear": resize(grid, size=(height, width), mode="bilinear", align_corners=True),
        "antialias": resize(grid, size=(height, width), mode="bicubic", antialias=True),
        "triangle": resize(grid, size=(height, width), mode="bilinear", antialias=True),
    }
    results = {}
    for method in RESIZES:
        results[method] = resize_positions(jnp.asarray(table), (height, width), method)
        value = expected[method][0].permute(1, 2, 0).numpy()
        assert reference.relative_error(results[method], value) < 1e-5, method
    assert reference.relative_error(results["dino"], results["bicubic"]) > 1e-4


@pytest.mark.parametrize("rows,columns,height,width", TABLES)
def test_bilinear_is_big_visions_zoom(rows, columns, height, width):
    ndimage = require("scipy.ndimage")
    table = np.random.default_rng(0).normal(size=(rows, columns, 5)).astype(np.float32)
    expected = ndimage.zoom(table, (height / rows, width / columns, 1), order=1)
    ours = resize_positions(jnp.asarray(table), (height, width), "bilinear")
    assert reference.relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize("method", RESIZES)
def test_a_table_of_the_right_size_is_not_touched(method):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 5)), jnp.float32)
    np.testing.assert_array_equal(resize_positions(table, (4, 3), method), table)


def test_bicubic_weights():
    # By hand for a = -0.75, a quarter of a sample from its neighbours.
    quarter = [-0.03515625, 0.26171875, 0.87890625, -0.10546875]
    np.testing.assert_allclose(axis_weights(8, 16)[6, 1:5], quarter, atol=1e-7)
    np.testing.assert_allclose(axis_weights(7, 7), np.eye(7), atol=1e-7)
    for new, old in ((9, 4), (3, 8), (5, 2)):
        weights = axis_weights(old, new)
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)


def test_an_unknown_method_is_named():
    with pytest.raises(UserError, match=r"resize='area' of a position table is not one of bicubic, dino"):
        resize_positions(jnp.zeros((2, 2, 1)), (3, 3), "area")
