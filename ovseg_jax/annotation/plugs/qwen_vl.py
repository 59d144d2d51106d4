"""Qwen2-VL to Qwen3-VL, and other chat models that read images: `AutoModelForImageTextToText`.

Qwen/Qwen3-VL-4B-Instruct: 4.4 billion parameters, 9 GB in bfloat16. Apache-2.0. It replaces Shikra and GPT4ROI of
papers/003, which have no class in `transformers`; the prompts are ours but for the two that appendix D shows.
"""

from collections.abc import Sequence

from PIL import Image

from ovseg_jax.annotation.plug import Picture, Texts
from ovseg_jax.annotation.plugs.hugging_face import Captioner

_TAGS = "List the objects and backgrounds in this image, as single words with commas between them."


class QwenVL(Captioner):
    """Captions of images and of crops of regions, and tags."""

    model_class = "AutoModelForImageTextToText"
    published = "Qwen/Qwen3-VL-4B-Instruct"
    prompts = "Provide a concise explanation of this photograph.;Describe this image in one sentence."
    region_prompts = "Please provide a detailed description of the object.;Name this object."

    def describe(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Texts:
        """Returns the answer to a prompt about each image."""
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            for prompt in prompts
        ]
        self.processor.tokenizer.padding_side = "left"  # so that all answers begin at the same place
        texts = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        return self.generate(self.inputs(images=[[image] for image in images], text=texts, padding=True))

    def tags(self, pictures: Sequence[Picture]) -> list[Texts]:
        """Returns the parts between commas of an answer that lists objects."""
        answers = self._answers([Image.fromarray(picture.pixels) for picture in pictures], [_TAGS])
        return [[tag.strip() for tag in answer.split(",") if tag.strip()] for [answer] in answers]
