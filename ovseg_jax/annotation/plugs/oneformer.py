"""OneFormer: `OneFormerForUniversalSegmentation`.

shi-labs/oneformer_coco_swin_large: 0.22 billion parameters, 0.9 GB in float32. MIT.
"""

from ovseg_jax.annotation.plugs.mask2former import Mask2Former


class OneFormer(Mask2Former):
    """The backgrounds of its panoptic task."""

    model_class = "OneFormerForUniversalSegmentation"
    processor_class = "OneFormerProcessor"
    published = "shi-labs/oneformer_coco_swin_large"

    def _task(self, count: int) -> dict[str, list[str]]:
        return {"task_inputs": ["panoptic"] * count}
