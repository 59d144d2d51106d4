"""Average precision of instances on images with segments, inside training and `--mode=eval`."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ovseg_jax.decisions import rules
from ovseg_jax.decisions.rules import Decided
from ovseg_jax.errors import UserError
from ovseg_jax.evals import average_precision as ap
from ovseg_jax.evals.segments import SegmentsEvaluator
from ovseg_jax.kernels.resize import row_block, split_rows


class ClassRow(NamedTuple):
    """A line of the per-class table; percentages are None for a class without an instance in the truth."""

    name: str
    instances: int
    ap: float | None
    ap50: float | None


class InstancesEvaluator(SegmentsEvaluator):
    """An evaluator of the masks of things, in percent, by COCO's rules (`average_precision`).

    Metrics: `ap`, `ap50`, `ap75`, `aps`, `apm`, `apl` (areas in pixels of the labels), `ar1`, `ar10`, `ar100`, and
    `ap/<group>` for each group of classes, such as LVIS's rare, common and frequent ones. The true instances are the
    visible segments of countable classes. Sources do not say which classes an image is known to lack, so that LVIS's
    federated rule does not apply here.
    """

    decision = "instances"

    def __init__(self, name: str, *args: Any, **options: Any):
        """Creates an evaluator, see `SegmentsEvaluator`.

        Raises:
          UserError: the decision is not `instances`.
        """
        super().__init__(name, *args, **options)
        if not isinstance(self._decision, rules.Instances):
            raise UserError(f"evals.{name}.decision must be 'instances', which ranks masks by their scores")

    def _count(self, decided: Decided, example: dict[str, Array]) -> dict[str, Array]:
        segments = decided.segments
        assert segments is not None and segments.masks is not None
        pixels = shared_pixels(segments.masks, example["segments"], len(example["segment_classes"]))
        area = jnp.zeros(pixels.shape[1], jnp.int32).at[example["segments"].ravel()].add(1)
        return {"category": segments.category, "score": segments.score, "pixels": pixels, "area": area}

    def _summarise(self, images: Iterable[dict[str, np.ndarray]]) -> dict[str, float] | None:
        truth: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
        truth["categories"] = [
            {"id": k, "name": self._classes.display(k)}
            for k, thing in enumerate(self._classes.isthing)
            if thing
        ]
        isthing = np.asarray(self._classes.isthing, bool)
        found: list[dict[str, Any]] = []
        for number, image in enumerate(images, 1):
            area, pixels = image["area"], image["pixels"]
            classes = image["segment_classes"]
            true = np.flatnonzero((area[1:] > 0) & (classes >= 0) & isthing[classes])
            size = [int(area.sum()), 1]
            truth["images"].append({"id": number, "height": size[0], "width": 1})
            for m in true:
                truth["annotations"].append(
                    {
                        "id": len(truth["annotations"]) + 1,
                        "image_id": number,
                        "category_id": int(classes[m]),
                        "iscrowd": int(image["segment_iscrowd"][m]),
                        "area": int(area[m + 1]),
                        "segmentation": stand_in(np.where(np.arange(len(area)) == m + 1, area, 0), area),
                    }
                )
            for s in np.flatnonzero(image["category"] >= 0):
                found.append(
                    {
                        "image_id": number,
                        "category_id": int(image["category"][s]),
                        "score": float(image["score"][s]),
                        "segmentation": stand_in(pixels[s], area),
                    }
                )
        if not truth["annotations"]:
            return None
        result = ap.curves(truth, found, "segm")
        self._fill_table(truth["annotations"], result)
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
        scores = {name.lower(): value for name, value in ap.metrics(result).items() if name in names}
        for group, members in self._classes.groups.items():
            own = [i for i, k in enumerate(result.categories) if k in members]
            scores[f"ap/{group}"] = ap.mean(result.precision[:, :, own, 0, -1])
        return {name: value for name, value in scores.items() if not np.isnan(value)}

    def _fill_table(self, annotations: list[dict[str, Any]], result: ap.Curves) -> None:
        counts = np.bincount(
            [a["category_id"] for a in annotations if not a["iscrowd"]], minlength=len(self._classes)
        )
        self.tables["ap"] = [
            ClassRow(self._classes.display(k), int(counts[k]), *(None if np.isnan(x) else x for x in pair))
            for k, pair in ap.class_precision(result).items()
        ]


def shared_pixels(
    masks: Bool[Array, "s h w"], segments: Int[Array, "h w"], max_segments: int
) -> Int[Array, "s {max_segments}+1"]:
    """Counts the pixels that each mask shares with each segment, of which 0 is void. Jittable.

    Rows are processed in blocks; sums of zeros and ones in float32 are exact up to 2^24 pixels per segment.
    """
    count, height, width = masks.shape
    strip = row_block(height, width * (count + max_segments + 1))

    def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        masks, segments = block
        true = segments == jnp.arange(max_segments + 1)[:, None, None]
        return total + jnp.einsum("rsw,mrw->sm", masks.astype(jnp.float32), true.astype(jnp.float32)), None

    # The padding of the last block has empty masks.
    blocks = split_rows(jnp.moveaxis(masks, 0, 1), strip), split_rows(segments, strip)
    start = jnp.zeros((count, max_segments + 1), jnp.float32)
    return jax.lax.scan(add, start, blocks)[0].astype(jnp.int32)


def stand_in(pixels: Int[np.ndarray, "m"], area: Int[np.ndarray, "m"]) -> dict[str, Any]:
    """Returns the RLE of a mask that shares as many pixels with each segment as the real one.

    IoU and areas depend on these counts alone, so that the masks stay on the device. In the image of one column, the
    segments lie below one another, each with the pixels that the mask shares at its top.

    Args:
      pixels: the pixels that the mask shares with each segment, of which 0 is void.
      area: the pixels of each segment.
    """
    from pycocotools import mask as coco

    counts = np.stack([pixels, area - pixels], 1).ravel()
    # Runs begin with one of zeros. Runs of no pixel are allowed only there.
    runs, value = [0], False
    for length, covered in zip(counts.tolist(), [True, False] * len(area), strict=True):
        if length and covered == value:
            runs[-1] += length
        elif length:
            runs.append(length)
            value = covered
    return coco.frPyObjects({"size": [int(area.sum()), 1], "counts": runs}, int(area.sum()), 1)
