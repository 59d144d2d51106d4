"""Resizing between a model's grid and a label's own pixels, by one small matrix per axis.

An image is scaled, keeping its aspect, to `image` pixels at the top left of a square canvas of `canvas` pixels; the
rest is padding. The model predicts on a grid of `cells` over the whole canvas. A label has the original's size,
`label` pixels. As a matrix per axis, a resize is two matrix products, works on any block of rows, and may differ
between the images of one compiled function.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def upsampling(
    pixels: int, cells: int, canvas: int, image: Int[Array, ""], label: Int[Array, ""]
) -> Float[Array, "pixels cells"]:
    """Returns the matrix of bilinear interpolation from grid cells to label pixels (half-pixel centres) on one axis.

    Positions are clamped to the cells that the image touches, so that padding has no influence and border pixels repeat
    the last cell as usual. Rows past `label` repeat the last one: crop or mask them.

    Args:
      pixels: rows of the matrix, at least `label`.
      cells: grid cells over the canvas.
      canvas: size of the canvas in pixels.
      image: size of the image on the canvas in pixels.
      label: size of the label in pixels.
    """
    stride = canvas / cells
    image, label = jnp.maximum(image, 1), jnp.maximum(label, 1)  # padded examples have size 0
    pixel = jnp.minimum(jnp.arange(pixels), label - 1)
    position = (pixel + 0.5) * image / label / stride - 0.5
    # In whole numbers: XLA multiplies by 1 / stride, and 42 / 14 becomes more than 3.
    last = -(-image * cells // canvas) - 1
    position = jnp.clip(position, 0, last)
    return jnp.maximum(0, 1 - jnp.abs(position[:, None] - jnp.arange(cells)))


def resize_within(
    x: Float[Array, "b h w d"],
    shape: tuple[int, int],
    count: Int[Array, "b 2"],
    new_count: Int[Array, "b 2"],
) -> Float[Array, "b r c d"]:
    """Resizes the part of each map that holds its image, as PyTorch's bilinear `interpolate` does (no antialiasing).

    Args:
      x: maps.
      shape: rows and columns of the new maps.
      count: rows and columns of the image's cells in x.
      new_count: rows and columns of the image's cells in the new maps; those outside repeat the last.
    """
    for axis, cells in enumerate(x.shape[1:3]):
        one = partial(upsampling, shape[axis], cells, cells)
        matrix = jax.vmap(one)(count[:, axis], new_count[:, axis])
        product = "bri,biwd->brwd" if axis == 0 else "bci,brid->brcd"
        x = jnp.einsum(product, matrix.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)
    return x


def coverage(
    pixels: int, cells: int, canvas: int, image: Int[Array, ""], label: Int[Array, ""]
) -> Float[Array, "cells pixels"]:
    """Returns the share of each grid cell that each label pixel covers, on one axis, for area averaging.

    The arguments are those of `upsampling`. Columns past `label` are zero; a row sums to the share of its cell that is
    inside the image.
    """
    stride = canvas / cells
    image, label = jnp.maximum(image, 1), jnp.maximum(label, 1)
    pixel = jnp.arange(pixels)
    start, end = pixel * image / label / stride, (pixel + 1) * image / label / stride
    cell = jnp.arange(cells)[:, None]
    overlap = jnp.maximum(0, jnp.minimum(end, cell + 1) - jnp.maximum(start, cell))
    return jnp.where(pixel < label, overlap, 0)


def row_block(rows: int, floats_per_row: int, budget: int = 1 << 22) -> int:
    """Returns the rows per block, in nearly equal blocks of at most `budget` floats (16 MiB)."""
    most = max(1, budget // max(1, floats_per_row))
    blocks = -(-rows // most)
    return -(-rows // blocks)


def split_rows(x: jax.Array, block: int) -> jax.Array:
    """Reshapes [rows ...] to [blocks block ...], padding the last block with zeros."""
    blocks = -(-x.shape[0] // block)
    x = jnp.pad(x, [(0, blocks * block - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(blocks, block, *x.shape[1:])
