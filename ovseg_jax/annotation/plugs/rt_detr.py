"""RT-DETR and other detectors of fixed classes: `AutoModelForObjectDetection`.

PekingU/rtdetr_v2_r50vd: 43 million parameters, 0.2 GB in float32. Apache-2.0. It replaces the two ViTDet of
papers/003, whose detection heads have no class in `transformers`.
"""

from collections.abc import Sequence

from PIL import Image

from ovseg_jax.annotation.plug import Boxes, Picture
from ovseg_jax.annotation.plugs.hugging_face import HuggingFace, boxes_of


class RTDetr(HuggingFace):
    """Boxes of the classes that the model knows."""

    model_class = "AutoModelForObjectDetection"
    processor_class = "AutoImageProcessor"
    published = "PekingU/rtdetr_v2_r50vd"

    def __init__(self, model: str = "", device: str = "", dtype: str = "", threshold: float = 0.3):
        """Loads the model, see `HuggingFace`; `threshold` is the least score of a box."""
        super().__init__(model, device, dtype)
        self.threshold = threshold

    def boxes(self, pictures: Sequence[Picture]) -> list[Boxes]:
        """Returns the objects of the model's classes."""
        inputs = self.inputs(images=[Image.fromarray(picture.pixels) for picture in pictures])
        found = self.processor.post_process_object_detection(
            self.run(inputs),
            threshold=self.threshold,
            target_sizes=[picture.pixels.shape[:2] for picture in pictures],
        )
        names = self.model.config.id2label
        return [boxes_of(own, [names[k] for k in range(len(names))]) for own in found]
