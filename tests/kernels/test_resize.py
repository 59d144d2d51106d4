import evals_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.kernels.resize import coverage, row_block, split_rows, upsampling


@pytest.mark.parametrize(
    "canvas, cells, image, label", [(16, 4, (16, 16), (16, 16)), (16, 4, (13, 9), (21, 15))]
)
def test_upsampling_matches_the_pixelwise_reference(canvas, cells, image, label):
    maps = np.random.default_rng(0).normal(size=(3, cells, cells))
    rows = upsampling(label[0] + 2, cells, canvas, jnp.int32(image[0]), jnp.int32(label[0]))
    cols = upsampling(label[1] + 3, cells, canvas, jnp.int32(image[1]), jnp.int32(label[1]))
    got = np.einsum("Hh,chw,Ww->cHW", rows, maps, cols)[:, : label[0], : label[1]]
    np.testing.assert_allclose(got, reference.upsample(maps, canvas, image, label), atol=1e-5)


def test_upsampling_a_full_canvas_is_jax_image_resize():
    x = np.random.default_rng(1).normal(size=(6, 1)).astype(np.float32)
    want = jax.image.resize(x, (24, 1), "bilinear")
    got = np.asarray(upsampling(24, 6, 24, jnp.int32(24), jnp.int32(24))) @ x
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_upsampling_reads_no_cell_of_pure_padding():
    weights = np.asarray(upsampling(30, 8, 32, jnp.int32(12), jnp.int32(30)))
    assert (weights[:, 3:] == 0).all()  # 12 pixels at stride 4 are three cells
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


def test_coverage_averages_the_area_inside_the_image():
    weights = np.asarray(
        coverage(10, 4, 16, jnp.int32(10), jnp.int32(10))
    )  # one label pixel is one canvas pixel
    np.testing.assert_allclose(weights.sum(1), [1, 1, 0.5, 0])
    np.testing.assert_allclose(weights[0], [0.25] * 4 + [0] * 6)
    scaled = np.asarray(coverage(7, 4, 16, jnp.int32(16), jnp.int32(5)))  # 3.2 canvas pixels per label pixel
    np.testing.assert_allclose(scaled[0], [0.8, 0.2, 0, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(scaled.sum(1), 1, atol=1e-6)


def test_row_blocks_are_even_and_bounded():
    assert row_block(100, 10, 1000) == 100
    assert row_block(101, 10, 1000) == 51
    assert row_block(5, 10**9) == 1
    x = jnp.arange(14).reshape(7, 2)
    assert split_rows(x, 3).shape == (3, 3, 2)
    np.testing.assert_array_equal(split_rows(x, 3).reshape(9, 2)[:7], x)


@pytest.mark.parametrize("patch", [14, 16, 10, 7])
def test_upsampling_ends_at_the_last_cell_of_the_image(patch):
    """Of images of whole cells, compiled too: no pixel sees the cell beyond."""
    cells = 32
    matrix = jax.jit(lambda image: upsampling(patch * cells, cells, patch * cells, image, image))
    for count in range(1, cells + 1):
        found = np.asarray(matrix(jnp.int32(count * patch)))[: count * patch]
        assert not found[:, count:].any(), count
        np.testing.assert_allclose(found[-1, count - 1], 1)
