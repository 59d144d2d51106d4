"""The parts that annotators over Hugging Face's models share: loading, devices, captions, boxes, backgrounds."""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ovseg_jax.annotation.plug import Boxes, Picture, Plug, Stuff, Texts, crop
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import load_labels


class HuggingFace(Plug):
    """A model and its processor, from the hub or a local folder, on a GPU where there is one.

    Attributes:
      model_class: the name of the model's class in `transformers`.
      processor_class: that of its processor.
      published: the name on the hub of the weights that are the default.
    """

    model_class = ""
    processor_class = "AutoProcessor"
    published = ""

    def __init__(self, model: str = "", device: str = "", dtype: str = ""):
        """Loads the model.

        Args:
          model: its name on the hub, or a local folder; by default `published`.
          device: of PyTorch, such as "cuda:1"; by default "cuda" if there is one.
          dtype: of PyTorch, such as "bfloat16"; by default "float32".

        Raises:
          UserError: a package is missing, or the model cannot be loaded.
        """
        try:
            import torch

            library = importlib.import_module("transformers")
            library.logging.disable_progress_bar()
            own = getattr(library, self.model_class)
            processor = getattr(library, self.processor_class)
        except (ImportError, AttributeError) as error:
            first: BaseException = (
                error  # transformers hides what failed, such as a torchvision for another PyTorch
            )
            while first.__cause__ is not None:
                first = first.__cause__
            raise UserError(
                f"{type(self).__name__} needs transformers with {self.model_class}: pip install -e '.[torch]' ({first})"
            ) from error
        name = model or self.published
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self.dtype = getattr(torch, dtype or "float32")
            self.processor = processor.from_pretrained(name)
            self.model = own.from_pretrained(name, dtype=self.dtype).to(self.device).eval()
        except (OSError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{name!r} cannot be loaded as {self.model_class}: {' '.join(str(error).split())[:300]}"
            ) from error

    def inputs(self, **given: Any) -> Any:
        """Calls the processor, and returns its tensors on the device in the type of the model."""
        made = self.processor(**given, return_tensors="pt").to(self.device)
        for key, value in made.items():
            if hasattr(value, "is_floating_point") and value.is_floating_point():
                made[key] = value.to(self.dtype)
        return made

    def run(self, inputs: Any, **more: Any) -> Any:
        """Calls the model without gradients."""
        import torch

        with torch.inference_mode():
            return self.model(**inputs, **more)


class WordDetector(HuggingFace):
    """A model that finds boxes of given labels."""

    def __init__(
        self, labels: str, model: str = "", device: str = "", dtype: str = "", threshold: float = 0.3
    ):
        """Loads the model, see `HuggingFace`.

        Args:
          labels: a label file, one of the package, or "dog; red ball".
          model: see `HuggingFace`.
          device: see `HuggingFace`.
          dtype: see `HuggingFace`.
          threshold: the least score of a box.
        """
        super().__init__(model, device, dtype)
        self.threshold, self.labels = threshold, class_names(labels)
        self.prepare()

    def prepare(self) -> None:
        """Prepares the labels, once; does nothing unless overridden."""


class Captioner(HuggingFace):
    """A model that answers prompts about images; a region is shown to it as a crop."""

    prompts = ""
    region_prompts = ""

    def __init__(
        self,
        model: str = "",
        device: str = "",
        dtype: str = "",
        prompts: str = "",
        region_prompts: str = "",
        batch: int = 8,
        longest: int = 40,
    ):
        """Loads the model, see `HuggingFace`.

        Args:
          model: see `HuggingFace`.
          device: see `HuggingFace`.
          dtype: see `HuggingFace`.
          prompts: prompts for an image, with ";" between them; each gives one caption.
          region_prompts: prompts for a region.
          batch: images or crops at once.
          longest: the most tokens of a caption.
        """
        super().__init__(model, device, dtype)
        self._prompts = (prompts or self.prompts).split(";")
        self._region_prompts = (region_prompts or self.region_prompts).split(";")
        self.batch, self.longest = batch, longest

    def describe(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Texts:
        """Returns the answer to a prompt about each image."""
        inputs = self.inputs(images=list(images), text=list(prompts), padding=True)
        return self.generate(inputs)

    def generate(self, inputs: Any) -> Texts:
        """Generates an answer for each row, without the prompt in front of it."""
        import torch

        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=self.longest, do_sample=False)
        given = inputs["input_ids"].shape[1]
        # Decoders repeat the prompt, models with an encoder do not.
        if tokens.shape[1] > given and torch.equal(tokens[:, :given], inputs["input_ids"]):
            tokens = tokens[:, given:]
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def captions(self, pictures: Sequence[Picture]) -> list[Texts]:
        """Returns the answer to each of the prompts."""
        images = [Image.fromarray(picture.pixels) for picture in pictures]
        return self._answers(images, self._prompts)

    def region_captions(self, pictures: Sequence[Picture], boxes: Sequence[Boxes]) -> list[list[Texts]]:
        """Returns the answer to each of the region prompts about the crop of each box."""
        crops = [
            Image.fromarray(crop(picture, box).pixels)
            for picture, found in zip(pictures, boxes, strict=True)
            for box in found.boxes
        ]
        answers = iter(self._answers(crops, self._region_prompts))
        return [[next(answers) for _ in found.labels] for found in boxes]

    def _answers(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Texts]:
        found: list[Texts] = [[] for _ in images]
        for prompt in prompts:
            for k in range(0, len(images), self.batch):
                part = images[k : k + self.batch]
                for own, text in zip(found[k:], self.describe(part, [prompt] * len(part)), strict=False):
                    own.append(text)
        return found


def class_names(labels: str) -> Texts:
    """Returns the first name of each class of a label file, of a built-in one, or of "dog; grass".

    Raises:
      UserError: there are none.
    """
    return [names[0] for names in load_labels(labels).names]


def boxes_of(found: Any, labels: Texts | None = None) -> Boxes:
    """Converts what `post_process_object_detection` returns for an image; `labels` are the names of its ids."""
    numbers = [int(k) for k in found["labels"]] if labels is not None else []
    names = [labels[k] for k in numbers] if labels is not None else list(found["text_labels"])
    values = (np.asarray(found[key].float().cpu(), np.float64) for key in ("boxes", "scores"))
    boxes, scores = values
    return Boxes(boxes, names, scores)


def stuff_of(found: Any, names: Any, things: int, size: tuple[int, int]) -> Stuff:
    """Converts the backgrounds of what `post_process_panoptic_segmentation` returns for an image.

    Args:
      found: `segmentation` and `segments_info`.
      names: the name of each label id.
      things: label ids below this are things and left out.
      size: height and width of the image.
    """
    # A fused segment is listed once for each of its masks.
    listed = [row for row in found["segments_info"] if row["label_id"] >= things]
    rows = [*{row["id"]: row for row in sorted(listed, key=lambda row: row["score"])}.values()]
    drawn = np.asarray(found["segmentation"].cpu()) if rows else np.zeros(size, int)
    masks = np.stack([drawn == row["id"] for row in rows]) if rows else np.zeros((0, *size), bool)
    labels = [str(names[row["label_id"]]) for row in rows]
    return Stuff(masks, labels, np.array([row["score"] for row in rows], np.float64))
