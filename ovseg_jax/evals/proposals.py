"""Recall of mask proposals (OpenSeg, Table 1): whether any proposal matches a true segment, ignoring classes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.errors import UserError
from ovseg_jax.evals.base import BatchEvaluator
from ovseg_jax.evals.passes import each_batch
from ovseg_jax.kernels.resize import row_block, split_rows, upsampling
from ovseg_jax.parallel.sharding import AXES
from ovseg_jax.protocols import Prediction, Segmenting, Variables

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


def recalls(counts: Sequence[int]) -> dict[str, float]:
    """Returns `recall@0.5`, `recall@0.7` and `recall@0.9` in percent from the sums of `count_recalled`."""
    *hits, segments = counts
    return {f"recall@{t}": 100.0 * hit / segments for t, hit in zip(THRESHOLDS, hits, strict=True)}


class ProposalsEvaluator(BatchEvaluator):
    """An evaluator of mask proposals alone: the recall of visible segments that are not crowds, in percent.

    It needs no class and embeds no text, so that it also scores a teacher, which has learned masks only (OpenSeg,
    Tables 1 and 6).
    """

    needs = frozenset({"image", "segments"})
    takes = Segmenting
    overrides = ("image_size", "label_size", "max_segments")

    def __init__(self, *common: Any, every: int = 0):
        """Creates an evaluator; for the arguments see `BatchEvaluator`."""
        super().__init__(*common, every=every)
        self._step = jax.jit(self._recalled)

    def run(self, variables: Variables) -> dict[str, float]:
        """Computes `recall@0.5`, `recall@0.7` and `recall@0.9`.

        Raises:
          UserError: the method predicts no masks, or no image has a segment.
        """
        total = np.zeros(len(THRESHOLDS) + 1, np.int64)
        with jax.set_mesh(self._mesh):
            for counts in each_batch(self._batches(), partial(self._step, variables), self._mesh):
                total += counts
        if not total[-1]:
            raise UserError(f"evals.{self.name}: the source has no image with a segment to evaluate on")
        return recalls(total.tolist())

    def _recalled(self, variables: Variables, batch: dict[str, Array]) -> Int[Array, "4"]:
        prediction = self._method.predict(variables, batch["image"], batch["image_size"])
        if prediction.mask_logits is None:
            raise UserError(f"evals.{self.name}: {type(self._method).__name__} predicts no masks")
        split, whole = PartitionSpec(AXES), PartitionSpec()
        count = jax.shard_map(
            partial(self._count_shard, canvas=batch["image"].shape[1]),
            mesh=self._mesh,
            in_specs=(split, split),
            out_specs=whole,
            check_vma=False,  # as in `SegmentationEvaluator`
        )
        return count(prediction, {k: v for k, v in batch.items() if k != "image"})

    def _count_shard(
        self, prediction: Prediction, batch: dict[str, Array], *, canvas: int
    ) -> Int[Array, "4"]:
        """Counts one device's images, summed over all devices."""
        assert prediction.mask_logits is not None  # `_recalled` has checked it
        valid = batch["segment_valid"] & batch["example_mask"][:, None]
        iou = best_iou(
            prediction.mask_logits,
            batch["image_size"],
            batch["label_size"],
            batch["segments"],
            valid.shape[1],
            canvas=canvas,
        )
        return jax.lax.psum(count_recalled(iou, valid), AXES)
