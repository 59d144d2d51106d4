"""A fully connected CRF that moves the borders of a label map to those of its image, for pictures.

Mean field of Krähenbühl and Koltun (2011) with the settings of its examples, as papers/002, C.1 use it for pictures
only: never for scores.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

CONFIDENCE = 0.7  # probability of a pixel's own label; the image's other labels share the rest
NEAR, NEAR_WEIGHT = 3.0, 3.0  # pixels, and weight, of the smoothing kernel
# Pixels, grey values and weight of the kernel of position and colour.
FAR, COLOUR, FAR_WEIGHT = 80.0, 13.0, 10.0
STEPS = 5
SENDERS = 4096  # pixels on a regular grid that stand for all in the kernel of position and colour: ours
BLOCK = 2048  # receiving pixels computed at once


def refine(image: UInt8[np.ndarray, "h w 3"], labels: Int[np.ndarray, "h w"]) -> Int[np.ndarray, "h w"]:
    """Returns a label map whose borders follow those of the image; labels may be any integers, -1 included.

    The smoothing kernel is exact. In the kernel of position and colour every pixel receives from `SENDERS` pixels on a
    regular grid, where pydensecrf interpolates on a permutohedral lattice. On six drawn pictures of disks, up to 240 by
    320 pixels, both gave the same label to at least 99.99 % of the pixels; on six that noise makes hard to tell apart,
    to 95.4 to 99.0 %, and with all pixels as senders, on the three smallest, to 98.3 to 99.8 % (pydensecrf2 1.1).
    """
    own, index = np.unique(labels, return_inverse=True)
    if len(own) == 1:
        return labels
    share = _mean_field(jnp.asarray(image), jnp.asarray(index.reshape(labels.shape)), len(own))
    return own[np.asarray(share.argmax(-1))].astype(labels.dtype)


@partial(jax.jit, static_argnames="count")
def _mean_field(
    image: UInt8[Array, "h w 3"], index: Int[Array, "h w"], count: int
) -> Float[Array, "h w count"]:
    """Returns the share of each of `count` labels in each pixel, whose label before is `index`."""
    height, width = index.shape
    hot = jax.nn.one_hot(index, count)
    unary = jnp.log(jnp.where(hot > 0, CONFIDENCE, (1 - CONFIDENCE) / (count - 1)))
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    features = jnp.concatenate([jnp.stack([rows, columns], -1) / FAR, image / COLOUR], -1)
    step = max(1, round((height * width / SENDERS) ** 0.5 + 0.499))
    grid = np.s_[step // 2 :: step, step // 2 :: step]
    senders = features[grid].reshape(-1, 5)
    receivers = features.reshape(-1, 5)
    padded = jnp.pad(receivers, ((0, -len(receivers) % BLOCK), (0, 0))).reshape(-1, BLOCK, 5)

    def far(x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        sent = x[grid].reshape(-1, x.shape[-1])

        def block(f: Float[Array, "n 5"]) -> Float[Array, "n c"]:
            square = lambda y: (y * y).sum(-1)
            distance = square(f)[:, None] + square(senders) - 2 * f @ senders.T
            return jnp.exp(-0.5 * jnp.maximum(distance, 0)) @ sent

        out = jax.lax.map(block, padded).reshape(-1, x.shape[-1])[: height * width]
        return step**2 * out.reshape(x.shape)

    down, across = (_smoothing(n) for n in (height, width))

    def near(x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        return jnp.einsum("yh,hwc,xw->yxc", down, x, across)

    one = jnp.ones((height, width, 1))
    scales = [1 / jnp.sqrt(kernel(one) + 1e-20) for kernel in (near, far)]
    q = jax.nn.softmax(unary, -1)
    for _ in range(STEPS):
        messages = [s * kernel(s * q) for s, kernel in zip(scales, (near, far), strict=True)]
        q = jax.nn.softmax(unary + NEAR_WEIGHT * messages[0] + FAR_WEIGHT * messages[1], -1)
    return q


def _smoothing(size: int) -> Float[Array, "n n"]:
    """Returns the smoothing kernel between the pixels of one axis."""
    at = jnp.arange(size) / NEAR
    return jnp.exp(-0.5 * (at[:, None] - at) ** 2)
