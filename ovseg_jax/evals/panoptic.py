"""Panoptic quality on images with segments, inside training and `--mode=eval`."""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ovseg_jax.decisions.rules import Decided
from ovseg_jax.evals import panoptic_quality as quality
from ovseg_jax.evals.segments import SegmentsEvaluator


class PanopticEvaluator(SegmentsEvaluator):
    """An evaluator of panoptic segmentation, in percent, by COCO's rule (`panoptic_quality`).

    Metrics: `pq`, `sq`, `rq`, and the same over things, stuff and each group of classes, as `pq/thing`. The default
    decision is `panoptic`; with a decision that does not separate instances, all pixels of a class are one segment.
    """

    decision = "panoptic"

    def _count(self, decided: Decided, example: dict[str, Array]) -> dict[str, Array]:
        true = len(example["segment_classes"]) + 1
        if decided.segments is None:
            number, category = decided.category + 1, jnp.arange(len(self._classes))
        else:
            number, category = decided.segments.number, decided.segments.category
        place = (number * true + example["segments"]).ravel()
        pixels = jnp.zeros((len(category) + 1) * true, jnp.int32).at[place].add(1)
        return {"category": category, "pixels": pixels.reshape(-1, true)}

    def _summarise(self, images: Iterable[dict[str, np.ndarray]]) -> dict[str, float] | None:
        total, k = None, len(self._classes)
        for image in images:
            predicted, true = np.nonzero(image["pixels"])
            shared = quality.Overlaps(predicted, true, image["pixels"][predicted, true].astype(np.int64))
            visible = image["pixels"].sum(0)[1:] > 0
            found = quality.tally(
                shared,
                image["category"],
                np.where(visible, image["segment_classes"], k),
                image["segment_iscrowd"],
                k,
            )
            total = quality.add(total, found)
        if total is None or not (total.tp + total.fn).any():
            return None
        self.tables["pq"] = quality.table(total, self._classes)
        return quality.scores(total, self._classes.isthing, self._classes.groups)
