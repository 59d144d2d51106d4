"""SAM, SAM 2 and SAM 3, masks from boxes: `SamModel`, `Sam2Model`, `Sam3TrackerModel`.

    facebook/sam-vit-huge            0.64 billion parameters, 2.6 GB in float32, Apache-2.0 (the paper's SAM)
    facebook/sam2.1-hiera-large      0.22 billion, 0.9 GB, Apache-2.0
    facebook/sam3                    0.85 billion, 3.4 GB, SAM Licence, asks for consent on the hub

An image is encoded once for all of its boxes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from ovseg_jax.annotation.plug import Boxes, Picture
from ovseg_jax.annotation.plugs.hugging_face import HuggingFace

_AT_ONCE = 64  # masks that are resized together


class Sam(HuggingFace):
    """The mask that SAM chooses for each box."""

    model_class = "SamModel"
    processor_class = "SamProcessor"
    published = "facebook/sam-vit-huge"

    def masks(self, pictures: Sequence[Picture], boxes: Sequence[Boxes]) -> list[Bool[np.ndarray, "n h w"]]:
        """Returns one mask for each box."""
        return [self._of_image(*pair) for pair in zip(pictures, boxes, strict=True)]

    def _of_image(self, picture: Picture, boxes: Boxes) -> Bool[np.ndarray, "n h w"]:
        if not len(boxes.boxes):
            return np.zeros((0, *picture.pixels.shape[:2]), bool)
        image = Image.fromarray(picture.pixels)
        inputs = self.inputs(images=[image], input_boxes=[boxes.boxes.tolist()])
        sizes = {key: inputs.pop(key) for key in ("original_sizes", "reshaped_input_sizes") if key in inputs}
        found = self.run(inputs, multimask_output=False).pred_masks.float().cpu()
        # In parts, since masks at the size of the image take much more memory than the model's own.
        parts = [found[:, k : k + _AT_ONCE] for k in range(0, found.shape[1], _AT_ONCE)]
        return np.concatenate([np.asarray(self._full_size(part, sizes)[0][:, 0]) for part in parts])

    def _full_size(self, masks: Any, sizes: dict[str, Any]) -> Any:
        """Resizes the masks of each image to its size, and cuts them at 0."""
        return self.processor.image_processor.post_process_masks(
            masks, sizes["original_sizes"], sizes["reshaped_input_sizes"]
        )


class Sam2(Sam):
    """The mask that SAM 2 chooses for each box."""

    model_class = "Sam2Model"
    processor_class = "Sam2Processor"
    published = "facebook/sam2.1-hiera-large"

    def _full_size(self, masks: Any, sizes: dict[str, Any]) -> Any:
        return self.processor.post_process_masks(masks, sizes["original_sizes"])


class Sam3(Sam2):
    """The mask that SAM 3's tracker chooses for each box, which takes boxes as SAM 2 does."""

    model_class = "Sam3TrackerModel"
    processor_class = "Sam3TrackerProcessor"
    published = "facebook/sam3"
