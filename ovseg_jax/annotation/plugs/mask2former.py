"""Mask2Former: `Mask2FormerForUniversalSegmentation`.

facebook/mask2former-swin-large-coco-panoptic: 0.22 billion parameters, 0.9 GB in float32. The code's licence is MIT. It
replaces Mask DINO of papers/003, which has no class in `transformers`.
"""

from collections.abc import Sequence

from PIL import Image

from ovseg_jax.annotation.plug import Picture, Stuff
from ovseg_jax.annotation.plugs.hugging_face import HuggingFace, stuff_of


class Mask2Former(HuggingFace):
    """The backgrounds of a panoptic model."""

    model_class = "Mask2FormerForUniversalSegmentation"
    processor_class = "AutoImageProcessor"
    published = "facebook/mask2former-swin-large-coco-panoptic"

    def __init__(
        self, model: str = "", device: str = "", dtype: str = "", threshold: float = 0.5, things: int = 80
    ):
        """Loads the model, see `HuggingFace`.

        Args:
          model: see `HuggingFace`.
          device: see `HuggingFace`.
          dtype: see `HuggingFace`.
          threshold: the least score of a background.
          things: label ids below this are things, as COCO's 80 in its panoptic models.
        """
        super().__init__(model, device, dtype)
        self.threshold, self.things = threshold, things

    def stuff(self, pictures: Sequence[Picture]) -> list[Stuff]:
        """Returns the segments whose label is no thing."""
        images = [Image.fromarray(picture.pixels) for picture in pictures]
        sizes = [picture.pixels.shape[:2] for picture in pictures]
        names = self.model.config.id2label
        inputs = self.inputs(images=images, **self._task(len(images)))
        found = self.processor.post_process_panoptic_segmentation(
            self.run({key: inputs[key] for key in inputs if key != "pixel_mask"}),
            threshold=self.threshold,
            label_ids_to_fuse=set(range(self.things, len(names))),
            target_sizes=sizes,
        )
        return [stuff_of(own, names, self.things, size) for own, size in zip(found, sizes, strict=True)]

    def _task(self, count: int) -> dict[str, list[str]]:
        """Returns the inputs of the processor other than the images."""
        del count
        return {}
