"""Crops of masked regions at one size, as ZSSeg makes them (Xu et al. 2021).

A box is cropped and resized by one small matrix per axis, so that boxes may differ between masks inside one compiled
function.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from ovseg_jax.kernels.keys import keys


def mask_crops(
    image: UInt8[Array, "b s t 3"],
    inside: Bool[Array, "b n s t"],
    fill: Float[Array, "3"],
    size: int,
    extent: Bool[Array, "b n s t"] | None = None,
) -> UInt8[Array, "b n z z 3"]:
    """Crops the box around each mask, resized to `size` x `size`, with `fill` outside of the mask.

    Interpolation is bicubic without antialiasing, rounded. The crop of an empty mask is all `fill`.

    Args:
      image: the images.
      inside: the masks of each image.
      fill: a colour, 0..255.
      size: the side z of a crop in pixels.
      extent: the areas whose boxes are cropped, by default the masks themselves.
    """
    extent = inside if extent is None else extent
    rows = _of_axis(extent.any(3), size)
    columns = _of_axis(extent.any(2), size)
    # Outside of the mask the difference to `fill` is 0.
    difference = jnp.where(inside[..., None], image[:, None] - fill, 0)
    # At their default precision accelerators would be off by whole levels of 255.
    highest = jax.lax.Precision.HIGHEST
    strips = jnp.einsum("bnzs,bnstc->bnztc", rows, difference, precision=highest)
    crops = jnp.einsum("bnyt,bnztc->bnzyc", columns, strips, precision=highest) + fill
    return jnp.clip(jnp.round(crops), 0, 255).astype(jnp.uint8)


def _of_axis(occupied: Bool[Array, "b n s"], size: int) -> Float[Array, "b n z s"]:
    """Returns the resampling matrix of each mask from its first to its last occupied position on an axis."""
    first = jnp.argmax(occupied, -1)
    length = occupied.shape[-1] - jnp.argmax(occupied[..., ::-1], -1) - first
    matrix = jax.vmap(jax.vmap(lambda start, span: cubic(size, occupied.shape[-1], start, span)))
    return matrix(first, length)


def cubic(
    size: int, pixels: int, start: Int[Array, ""], length: Int[Array, ""]
) -> Float[Array, "size pixels"]:
    """Returns the matrix that interpolates `size` points from `length` pixels from `start` on, bicubically.

    It has half-pixel centres and repeats the border pixels, as `torch.nn.functional.interpolate`, which ZSSeg uses.
    """
    position = (jnp.arange(size) + 0.5) * length / size - 0.5
    taps = jnp.floor(position)[:, None] + jnp.arange(-1, 3)
    weight = keys(position[:, None] - taps)
    at = start + jnp.clip(taps, 0, length - 1).astype(jnp.int32)
    hit = at[..., None] == jnp.arange(pixels)
    return jnp.where(hit, weight[..., None], 0).sum(1)
