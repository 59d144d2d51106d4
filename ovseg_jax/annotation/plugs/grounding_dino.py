"""Grounding DINO: `GroundingDinoForObjectDetection` (MM Grounding DINO's weights load by their own class).

IDEA-Research/grounding-dino-tiny: 0.17 billion parameters, 0.7 GB in float32. Apache-2.0. A prompt holds 256 tokens, so
that many labels take several passes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ovseg_jax.annotation.plug import Boxes, Picture, Texts
from ovseg_jax.annotation.plugs.hugging_face import WordDetector
from ovseg_jax.errors import UserError


class GroundingDino(WordDetector):
    """Boxes of given labels; a box has the label with the best token, and that token's probability as score."""

    model_class = "AutoModelForZeroShotObjectDetection"
    published = "IDEA-Research/grounding-dino-tiny"

    def prepare(self) -> None:
        """Makes the prompts of all labels.

        Raises:
          UserError: a label is too long.
        """
        self.passes = self._passes([name.lower().replace(".", " ") for name in self.labels])

    def _passes(self, labels: Texts) -> list[tuple[Texts, str]]:
        """Splits the labels into prompts that the text encoder can take."""
        longest = int(self.model.config.max_text_len)
        count = lambda text: len(self.processor.tokenizer(text)["input_ids"])
        passes: list[tuple[Texts, str]] = []
        for label in labels:
            joined = [*(passes[-1][0] if passes else []), label]
            if passes and count(_prompt(joined)) <= longest:
                passes[-1] = joined, _prompt(joined)
            else:
                passes.append(([label], _prompt([label])))
            if count(passes[-1][1]) > longest:
                raise UserError(
                    f"the label {label!r} is too long for Grounding DINO: a prompt has at most {longest} tokens"
                )
        return passes

    def boxes(self, pictures: Sequence[Picture]) -> list[Boxes]:
        """Returns the objects of the labels."""
        images = [Image.fromarray(picture.pixels) for picture in pictures]
        parts: list[list[Boxes]] = [[] for _ in pictures]
        for labels, prompt in self.passes:
            inputs = self.inputs(images=images, text=[prompt] * len(images))
            out = self.run(inputs)
            spans = self._spans(inputs["input_ids"][0].tolist(), len(labels))
            for own, picture, logits, places in zip(parts, pictures, out.logits, out.pred_boxes, strict=True):
                own.append(self._of_image(picture, logits, places, spans, labels))
        return [_joined(own) for own in parts]

    def _spans(self, tokens: Sequence[int], count: int) -> list[list[int]]:
        """Returns the places of each label's tokens: those in front of its full stop."""
        stop = self.processor.tokenizer.convert_tokens_to_ids(".")
        spans: list[list[int]] = [[]]
        for place, token in enumerate(tokens[1:], 1):
            if token == stop:
                spans.append([])
            elif len(spans) <= count:
                spans[-1].append(place)
        if len(spans) <= count or not all(spans[:count]):
            raise ValueError("the tokeniser has lost a label of the prompt")
        return spans[:count]

    def _of_image(
        self, picture: Picture, logits: Any, places: Any, spans: Sequence[Sequence[int]], labels: Texts
    ) -> Boxes:
        probability = np.asarray(logits.float().sigmoid().cpu(), np.float64)
        scores = np.stack([probability[:, span].max(1) for span in spans], 1)
        kept = np.flatnonzero(scores.max(1) > self.threshold)
        middle, side = np.split(np.asarray(places.float().cpu(), np.float64)[kept], 2, axis=1)
        height, width = picture.pixels.shape[:2]
        corners = np.concatenate([middle - side / 2, middle + side / 2], 1) * [width, height, width, height]
        best = scores[kept].argmax(1)
        return Boxes(corners, [labels[k] for k in best], scores[kept].max(1))


def _prompt(labels: Texts) -> str:
    return " ".join(f"{label} ." for label in labels)


def _joined(parts: Sequence[Boxes]) -> Boxes:
    boxes, labels, scores = zip(*parts, strict=True)
    return Boxes(np.concatenate(boxes), [label for own in labels for label in own], np.concatenate(scores))
