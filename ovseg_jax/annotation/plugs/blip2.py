"""BLIP-2, the captions of papers/003: `Blip2ForConditionalGeneration`.

Salesforce/blip2-opt-2.7b: 3.7 billion parameters, 15 GB in float32, 7.5 GB in float16. MIT; OPT has a licence of its
own. The paper's nine prompts are not published (appendix D): these are ours.
"""

from ovseg_jax.annotation.plugs.hugging_face import Captioner


class Blip2(Captioner):
    """Captions of images, and of crops of regions."""

    model_class = "Blip2ForConditionalGeneration"
    published = "Salesforce/blip2-opt-2.7b"
    prompts = "a photo of;Question: what does the picture show? Answer:"
    region_prompts = "a photo of;Question: what is this? Answer:"
