"""Florence-2: `Florence2ForConditionalGeneration`.

florence-community/Florence-2-base-ft: 0.23 billion parameters, 1 GB in float32. MIT. Its prompt gives a region by the
corners, in thousandths of the sides of the whole image.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ovseg_jax.annotation.plug import Boxes, Picture, Texts
from ovseg_jax.annotation.plugs.hugging_face import Captioner


class Florence2(Captioner):
    """Captions of images and of regions."""

    model_class = "Florence2ForConditionalGeneration"
    published = "florence-community/Florence-2-base-ft"
    prompts = "<CAPTION>;<DETAILED_CAPTION>"
    region_prompts = "<REGION_TO_DESCRIPTION>;<REGION_TO_CATEGORY>"

    def region_captions(self, pictures: Sequence[Picture], boxes: Sequence[Boxes]) -> list[list[Texts]]:
        """Returns the answer to each of the region prompts about each box."""
        jobs = []
        for picture, found in zip(pictures, boxes, strict=True):
            height, width = picture.pixels.shape[:2]
            image = Image.fromarray(picture.pixels)
            corners = np.clip(found.boxes / [width, height, width, height] * 1000, 0, 999).astype(int)
            jobs += [(image, "".join(f"<loc_{x}>" for x in row)) for row in corners]
        answers: list[Texts] = [[] for _ in jobs]
        for prompt in self._region_prompts:
            for k in range(0, len(jobs), self.batch):
                images, places = zip(*jobs[k : k + self.batch], strict=True)
                said = self.describe(images, [prompt + place for place in places])
                for own, text in zip(answers[k:], said, strict=False):
                    own.append(text)
        rows = iter(answers)
        return [[next(rows) for _ in found.labels] for found in boxes]
