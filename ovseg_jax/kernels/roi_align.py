"""RoIAlign (He et al., Mask R-CNN, 2017): features of boxes by bilinear samples, averaged in bins.

The samples of a bin are a grid, so a bin's weights are an outer product of one small matrix per axis. Boxes may thus
differ in size and in the number of their samples inside one compiled function. All bins of an image are one matrix
product with its map, [boxes * size**2, h * w] by [h * w, c]. On one core, for 40 boxes on maps of 24 x 24 x 768, this
takes 2.8 ms for size=1 and 29 ms for size=7, forwards and backwards; products with one axis after the other take 8 and
64 ms, gathers of two samples per axis 1.3 and 138 ms.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Up to 4 samples lie within one cell of a cell's centre if their number follows the box, see `_bins`; two more for
# rounding.
_NEAR = 6


def roi_align(
    features: Float[Array, "b h w c"],
    boxes: Float[Array, "b r 4"],
    size: int,
    *,
    scale: float = 1.0,
    sampling: int = 0,
    aligned: bool = True,
    valid: Bool[Array, "b r"] | None = None,
) -> Float[Array, "b r size size c"]:
    """Returns the features of boxes as `torchvision.ops.roi_align` defines them, in the dtype of `features`.

    Samples up to one cell outside of the map repeat its border; those further away are zeros, which count. As in
    torchvision, boxes have no gradient.

    Args:
      features: maps of features.
      boxes: x0, y0, x1, y1 in any unit; NaN where not `valid`, if need be.
      size: rows and columns of bins, by which a box is split.
      scale: cells of the map in one unit of the boxes.
      sampling: samples of a bin on each axis; 0 or less: the bin's length in cells, rounded up (detectron2's 0,
        torchvision's -1), for boxes of any length.
      aligned: whether the centre of the first cell is at 0.5 (detectron2's ROIAlignV2), not at 0; otherwise boxes are
        also widened to one cell.
      valid: False for boxes whose features are zeros and which have no influence.
    """
    if valid is not None:
        boxes = jnp.where(valid[..., None], boxes, 0)
    x0, y0, x1, y1 = jnp.moveaxis(jax.lax.stop_gradient(boxes).astype(jnp.float32) * scale, -1, 0)
    rows, columns = (
        _bins(start, end, cells, size, sampling, aligned)
        for start, end, cells in ((y0, y1, features.shape[1]), (x0, x1, features.shape[2]))
    )
    if valid is not None:
        rows = jnp.where(valid[..., None, None], rows, 0)
    weights = rows[:, :, :, None, :, None] * columns[:, :, None, :, None, :]
    b, r, h, w, c = *boxes.shape[:2], *features.shape[1:]
    out = jnp.einsum(
        "bkn,bnc->bkc",
        weights.reshape(b, r * size**2, h * w),
        features.reshape(b, h * w, c).astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return out.reshape(b, r, size, size, c).astype(features.dtype)


def _bins(
    start: Float[Array, "b r"],
    end: Float[Array, "b r"],
    cells: int,
    size: int,
    sampling: int,
    aligned: bool,
) -> Float[Array, "b r size cells"]:
    """Returns the weight of each cell of an axis in each bin of each box."""
    offset = 0.5 if aligned else 0.0
    length = (end - offset) - (start - offset)
    if not aligned:
        length = jnp.maximum(length, 1)
    bin_ = (length / size)[..., None, None, None]
    first = (start - offset)[..., None, None, None] + jnp.arange(size)[:, None, None] * bin_
    cell = jnp.arange(cells)[:, None]
    if sampling > 0:
        count, sample = jnp.float32(sampling), jnp.arange(sampling, dtype=jnp.float32)
    else:
        # A box has any number of samples, but few are near a cell: a bin with more than one has them more than half a
        # cell apart. Counted from the first that may reach the cell.
        count = jnp.ceil(bin_)
        step = bin_ / jnp.maximum(count, 1)
        reaching = jnp.ceil((cell - 1 - first) / jnp.where(step > 0, step, 1) - 0.5) - 1
        sample = jnp.maximum(reaching, 0) + jnp.arange(_NEAR)
    position = first + (sample + 0.5) * bin_ / jnp.maximum(count, 1)
    weight = jnp.maximum(0, 1 - jnp.abs(jnp.clip(position, 0, cells - 1) - cell))
    counted = (sample < count) & (position >= -1) & (position <= cells)
    return (jnp.where(counted, weight, 0) / jnp.maximum(count, 1)).sum(-1)
