"""Bilinear sampling of maps at any places (PyTorch's `grid_sample` with zeros outside), as gathers of plain XLA.

A place is (x, y) in cells: the centre of the first cell is (0, 0). Only the cells of an image, at the top left of the
map, have values; all others count as zero, so that padding has no influence.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num


def corners(
    places: Float[Array, "*n 2"], count: Int[Array, "... 2"], width: int
) -> tuple[Int[Array, "*n 4"], Float[Array, "*n 4"]]:
    """Returns the four cells around each place, by their number in reading order, and their bilinear weights.

    The weight of a cell outside of the image is zero; its number is that of a cell of the map.

    Args:
      places: places in cells.
      count: columns and rows of the image's cells; broadcasts with the places.
      width: columns of the whole map.
    """
    low = jnp.floor(places)
    share = places - low
    number, weight = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            cell = low + jnp.array([dx, dy], low.dtype)
            own = jnp.abs(1 - jnp.array([dx, dy]) - share).prod(-1)
            there = ((cell >= 0) & (cell < count)).all(-1)
            # Clipped before the cast, since a place may be anywhere.
            x, y = jnp.moveaxis(jnp.clip(cell, 0, jnp.maximum(count - 1, 0)).astype(jnp.int32), -1, 0)
            number.append(y * width + x)
            weight.append(jnp.where(there, own, 0))
    return jnp.stack(number, -1), jnp.stack(weight, -1)


def take(x: Num[Array, "*b p d"], number: Int[Array, "*b n"]) -> Num[Array, "*b n d"]:
    """Returns rows of x, for each entry of the leading axes on its own."""
    rows = lambda x, number: x.at[number].get(mode="promise_in_bounds")
    for _ in x.shape[:-2]:
        rows = jax.vmap(rows)
    return rows(x, number)


def sample(
    maps: Num[Array, "*b h w d"], places: Float[Array, "*b n 2"], count: Int[Array, "*b 2"]
) -> Float[Array, "*b n d"]:
    """Samples each map at its own places, in float32 for maps of integers; see `corners` for `count`."""
    *b, h, w, d = maps.shape
    number, weight = corners(places, count[..., None, :], w)
    flat = maps.reshape(*b, h * w, d)
    return sum(take(flat, number[..., i]) * weight[..., i, None] for i in range(4))  # type: ignore[return-value]
