"""Retrieval between the images of a source and their captions: recall at 1, 5 and 10, both ways."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from ovseg_jax.errors import UserError
from ovseg_jax.evals.base import BatchEvaluator
from ovseg_jax.evals.passes import each_batch
from ovseg_jax.evals.recall import recalls
from ovseg_jax.evals.registry import Setup
from ovseg_jax.parallel.sharding import on_host, replicated
from ovseg_jax.protocols import Classifier, Variables, only
from ovseg_jax.towers.features import embed_in_chunks


class RetrievalEvaluator(BatchEvaluator):
    """An evaluator of retrieval by cosine, in percent.

    Metrics: `image_to_text_R@K`, the share of images with one of their captions among the K nearest texts, and
    `text_to_image_R@K`, the share of texts whose image is among the K nearest, for K of 1, 5 and 10; `R@1`, the mean of
    both (papers/003, Table 7). Images are resized and cropped to a square, as for classification. Images and captions
    are those of the whole source, or of its first `limit` images.
    """

    needs = frozenset({"image", "captions"})
    takes = Classifier
    overrides = ("image_size",)
    options = ("max_captions",)

    def __init__(
        self,
        *common: Any,
        captions: Callable[[], Sequence[Sequence[str]]],
        every: int = 0,
        max_captions: int = 0,
    ):
        """Creates an evaluator.

        Args:
          *common, every: see `BatchEvaluator`.
          captions: returns the captions of each image, in the order of the batches.
          max_captions: the number of captions to take of an image; 0 takes all (COCO's and Flickr30k's: 5).

        Raises:
          UserError: `max_captions` is negative.
        """
        super().__init__(*common, every=every)
        if max_captions < 0:
            raise UserError(f"evals.{self.name}.max_captions={max_captions} is less than 0")
        self._captions, self._most = captions, max_captions or None
        self._step = jax.jit(self._embed, out_shardings=replicated(self._mesh))

    @classmethod
    def arguments(cls, setup: Setup) -> dict[str, Any]:
        """Returns the constructor's keyword arguments."""
        source, limit = setup.source, setup.evaluation.get("limit")
        count = len(source) if limit is None else min(int(limit), len(source))
        captions = lambda: [source[index]["captions"] for index in range(count)]
        return super().arguments(setup) | {"captions": captions}

    def run(self, variables: Variables) -> dict[str, float]:
        """Computes the metrics.

        Raises:
          UserError: no image has a caption.
        """
        captions = [list(own[: self._most]) for own in self._captions()]
        texts = [text for own in captions for text in own]
        if not texts:
            raise UserError(f"evals.{self.name}: no image of the source has a caption")
        owner = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
        with jax.set_mesh(self._mesh):
            step = lambda batch: self._step(variables, batch)
            found = [x[valid] for x, valid in each_batch(self._batches(), step, self._mesh)]
            text = on_host(only(embed_in_chunks(lambda t: self._method.embed_phrases(variables, t), texts)))
        image = np.concatenate(found)
        ways = recalls(
            lambda first, last: image[first:last] @ text.T,
            lambda first, last: text[first:last] @ image.T,
            owner,
            len(image),
        )
        scores = {f"{way.replace(' ', '_')}_{key}": x for way, own in ways.items() for key, x in own.items()}
        return scores | {"R@1": sum(own["R@1"] for own in ways.values()) / 2}

    def _embed(
        self, variables: Variables, batch: dict[str, Array]
    ) -> tuple[Float[Array, "b d"], Bool[Array, "b"]]:
        return self._method.embed_image(variables, batch["image"]), batch["example_mask"]
