"""What lies under a mask as an image of its own, as ZSSeg cuts it out (Xu et al. 2021): boxes of any size, one shape.

A box is cut and resized by one small matrix per axis, so that it may differ from mask to mask inside one compiled
function.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from ovseg_jax.kernels.keys import keys


def mask_crops(
    image: UInt8[Array, "b s t 3"], inside: Bool[Array, "b n s t"], fill: Float[Array, "3"], size: int
) -> UInt8[Array, "b n z z 3"]:
    """The box around each mask, stretched to `size` x `size`, with `fill` wherever the mask is not.

    Bicubic without antialiasing, and rounded. An empty mask gives nothing but `fill`.

    Args:
      image: the images.
      inside: the masks of each.
      fill: a colour, 0..255.
      size: z, in pixels.
    """
    rows = _of_axis(inside.any(3), size)
    columns = _of_axis(inside.any(2), size)
    # Where the mask is not, nothing remains of the difference to `fill`.
    difference = jnp.where(inside[..., None], image[:, None] - fill, 0)
    # Sums of four products: the accelerators' default precision would lose whole levels of 255.
    highest = jax.lax.Precision.HIGHEST
    strips = jnp.einsum("bnzs,bnstc->bnztc", rows, difference, precision=highest)
    crops = jnp.einsum("bnyt,bnztc->bnzyc", columns, strips, precision=highest) + fill
    return jnp.clip(jnp.round(crops), 0, 255).astype(jnp.uint8)


def _of_axis(occupied: Bool[Array, "b n s"], size: int) -> Float[Array, "b n z s"]:
    """For each mask the resampling of the axis between its first and its last occupied pixel."""
    first = jnp.argmax(occupied, -1)
    length = occupied.shape[-1] - jnp.argmax(occupied[..., ::-1], -1) - first
    matrix = jax.vmap(jax.vmap(lambda start, span: cubic(size, occupied.shape[-1], start, span)))
    return matrix(first, length)


def cubic(
    size: int, pixels: int, start: Int[Array, ""], length: Int[Array, ""]
) -> Float[Array, "size pixels"]:
    """Cubic interpolation of `size` points from the `length` pixels from `start` on (half-pixel centres), as
    `torch.nn.functional.interpolate` does it, which ZSSeg uses.

    Beyond the ends the first and the last of these pixels go on.
    """
    position = (jnp.arange(size) + 0.5) * length / size - 0.5
    taps = jnp.floor(position)[:, None] + jnp.arange(-1, 3)
    weight = keys(position[:, None] - taps)
    at = start + jnp.clip(taps, 0, length - 1).astype(jnp.int32)
    hit = at[..., None] == jnp.arange(pixels)
    return jnp.where(hit, weight[..., None], 0).sum(1)
