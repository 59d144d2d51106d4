"""Recall of mask proposals (OpenSeg, Table 1): whether any proposal matches a true segment, ignoring classes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.kernels.resize import row_block, split_rows, upsampling

THRESHOLDS = (0.5, 0.7, 0.9)


def best_iou(
    mask_logits: Float[Array, "b n h w"],
    image_size: Int[Array, "b 2"],
    label_size: Int[Array, "b 2"],
    segments: Int[Array, "b height width"],
    max_segments: int,
    *,
    canvas: int,
) -> Float[Array, "b m"]:
    """Computes the IoU of the best proposal for each segment, at the label's own size. Jittable.

    A proposal covers the pixels where its upsampled logit is positive. Areas count inside the label, including void; a
    segment without pixels has IoU 0. Rows are processed in blocks, so that [N H W] is never stored.

    Args:
      mask_logits: logits of the proposals.
      image_size: height and width of each image on the canvas, in pixels.
      label_size: height and width of each label.
      segments: the segment of every label pixel, from 1; 0 is void.
      max_segments: the number M of segments; entry m of the result is segment m + 1.
      canvas: size of the model's square input in pixels.
    """
    height, width = segments.shape[1:]
    n, *grid = mask_logits.shape[1:]
    strip = row_block(height, width * (n + max_segments))

    def one_image(inputs):
        logits, size, label, segments = inputs
        rows = upsampling(height, grid[0], canvas, size[0], label[0])
        cols = upsampling(width, grid[1], canvas, size[1], label[1])
        inside = (jnp.arange(height) < label[0])[:, None] & (jnp.arange(width) < label[1])
        high = jax.lax.Precision.HIGHEST

        def add(sums, block):
            segments, inside, rows = block
            x = jnp.einsum("rh,nhw->nrw", rows, logits, precision=high)
            x = jnp.einsum("nrw,Ww->nrW", x, cols, precision=high)
            ours = ((x > 0) & inside).astype(jnp.float32)
            true = (segments == jnp.arange(1, max_segments + 1)[:, None, None]) & inside
            true = true.astype(jnp.float32)
            # Sums of zeros and ones in float32 are exact up to 2^24 pixels per segment.
            inter = jnp.einsum("mrw,nrw->mn", true, ours)
            return (sums[0] + inter, sums[1] + true.sum((1, 2)), sums[2] + ours.sum((1, 2))), None

        empty = jnp.zeros((max_segments, n)), jnp.zeros(max_segments), jnp.zeros(n)
        blocks = split_rows(segments, strip), split_rows(inside, strip), split_rows(rows, strip)
        (inter, true, ours), _ = jax.lax.scan(add, empty, blocks)
        union = true[:, None] + ours - inter
        return (inter / jnp.maximum(union, 1)).max(1)

    return jax.lax.map(one_image, (mask_logits, image_size, label_size, segments))


def count_recalled(iou: Float[Array, "b m"], valid: Bool[Array, "b m"]) -> Int[Array, "4"]:
    """Counts the valid segments with an IoU of at least 0.5, 0.7 and 0.9, and all valid segments."""
    hits = [(valid & (iou >= threshold)).sum() for threshold in THRESHOLDS]
    return jnp.stack([*hits, valid.sum()]).astype(jnp.int32)
