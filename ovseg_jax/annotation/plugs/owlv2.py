"""OWLv2: `Owlv2ForObjectDetection`.

google/owlv2-base-patch16-ensemble: 0.16 billion parameters, 0.6 GB in float32. Apache-2.0.
"""

from collections.abc import Sequence

from PIL import Image

from ovseg_jax.annotation.plug import Boxes, Picture
from ovseg_jax.annotation.plugs.hugging_face import WordDetector, boxes_of


class Owlv2(WordDetector):
    """Boxes of given labels, read as "a photo of a LABEL" (OWLv2's README)."""

    model_class = "Owlv2ForObjectDetection"
    published = "google/owlv2-base-patch16-ensemble"

    def boxes(self, pictures: Sequence[Picture]) -> list[Boxes]:
        """Returns the objects of the labels."""
        images = [Image.fromarray(picture.pixels) for picture in pictures]
        texts = [f"a photo of a {label}" for label in self.labels]
        inputs = self.inputs(images=images, text=[texts] * len(images), truncation=True)
        found = self.processor.post_process_grounded_object_detection(
            self.run(inputs),
            threshold=self.threshold,
            target_sizes=[picture.pixels.shape[:2] for picture in pictures],
            text_labels=[self.labels] * len(images),
        )
        return [boxes_of(own) for own in found]
