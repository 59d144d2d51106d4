"""The base class of the evaluators of panoptic and instance segmentation: a decision on each image, and counts.

The mesh predicts, decides at the labels' own size and counts the pixels that segments share. Only these counts, small
tables, go to the host, gathered from all devices of all processes, so that every process computes the same numbers.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from ovseg_jax.decisions.maps import vocabulary_of
from ovseg_jax.decisions.rules import Decided, Decision, decide, decision_of
from ovseg_jax.errors import UserError
from ovseg_jax.evals.base import BatchEvaluator
from ovseg_jax.evals.passes import each_batch
from ovseg_jax.parallel.sharding import AXES, replicated
from ovseg_jax.protocols import Prediction, Segmenting, Text, Variables, Vocabulary
from ovseg_jax.towers.features import embed_in_chunks

_TRUTH = ("index", "example_mask", "segment_classes", "segment_iscrowd")


class SegmentsEvaluator(BatchEvaluator):
    """A base class of evaluators that compare predicted segments with true ones.

    A subclass defines `_count` and `_summarise`.

    Attributes:
      decision: the decision that applies if the config names none.
    """

    decision: ClassVar[str]
    needs = frozenset({"image", "segments", "class_ids"})
    takes = Segmenting
    overrides = ("image_size", "label_size", "max_segments")
    options = ("decision",)

    def __init__(self, *common: Any, decision: Any = None, every: int = 0):
        """Creates an evaluator.

        Args:
          *common, every: see `BatchEvaluator`; batches have the `segment_classes` of their segments.
          decision: see `decisions.rules.decision_of`.
        """
        super().__init__(*common, every=every)
        self._decision: Decision = decision_of(self.decision if decision is None else decision)
        self._names, _ = self._classes.flat()
        self._vocabulary = vocabulary_of(self._classes, self._method.seen_names())
        # JAX compiles the network once for all evaluators of a method.
        self._predict = jax.jit(self._method.predict)
        self._step = jax.jit(self._gathered)

    def run(self, variables: Variables) -> dict[str, float]:
        """Computes the metrics and fills `tables`.

        Raises:
          UserError: there is no image with a segment.
        """
        self.tables = {}
        with jax.set_mesh(self._mesh):
            text = embed_in_chunks(partial(self._method.embed_text, variables), self._names)
            text = jax.device_put(text, replicated(self._mesh))

            def step(batch: dict[str, Array]) -> dict[str, Array]:
                prediction = self._predict(variables, batch["image"], batch["image_size"])
                return self._step(prediction, text, batch)

            scores = self._summarise(self._images(step))
        if scores is None:
            raise UserError(f"evals.{self.name}: the source has no image with a segment to evaluate on")
        return scores

    def _images(self, step: Callable[[dict[str, Array]], Any]) -> Iterator[dict[str, np.ndarray]]:
        """Yields the counts of each image once, in the order of the source."""
        for batch in each_batch(self._batches(), step, self._mesh):
            for row in np.argsort(batch["index"], kind="stable"):
                if batch["example_mask"][row]:
                    yield {key: value[row] for key, value in batch.items()}

    def _gathered(self, prediction: Prediction, text: Text, batch: dict[str, Array]) -> dict[str, Array]:
        split, whole = PartitionSpec(AXES), PartitionSpec()
        count = jax.shard_map(
            partial(self._count_shard, canvas=batch["image"].shape[1]),
            mesh=self._mesh,
            in_specs=(split, split, whole, whole),
            out_specs=whole,
            check_vma=False,  # as in `SegmentationEvaluator`
        )
        rest = {k: v for k, v in batch.items() if k not in ("image", "label")}
        return count(prediction, rest, text, self._vocabulary)

    def _count_shard(
        self,
        prediction: Prediction,
        batch: dict[str, Array],
        text: Text,
        vocabulary: Vocabulary,
        *,
        canvas: int,
    ) -> dict[str, Array]:
        """Counts one device's images, one at a time, and gathers the counts of all devices."""
        views = jnp.ones((1, 1, len(self._names)), bool)
        height, width = batch["segments"].shape[1:]
        pixels = prediction.mask_logits is None and not self._decision.needs_masks

        def one_image(inputs: tuple[Prediction, dict[str, Array]]) -> dict[str, Array]:
            seen, example = inputs
            decided = decide(
                self._method,
                jax.tree.map(lambda x: x[None], seen),
                text,
                vocabulary,
                example["image_size"][None],
                example["label_size"][None],
                views,
                canvas=canvas,
                shape=(height, width),
                decision=self._decision,
                mode="none" if pixels else "predicted",
            )
            return self._count(jax.tree.map(lambda x: x[0, 0], decided), example)

        found = jax.lax.map(one_image, (prediction, batch)) | {key: batch[key] for key in _TRUTH}
        return jax.lax.all_gather(found, AXES, tiled=True)

    def _count(self, decided: Decided, example: dict[str, Array]) -> dict[str, Array]:
        """Counts one image; `segments` [H W] of the example are numbered from 1, 0 is void. Jittable."""
        raise NotImplementedError

    def _summarise(self, images: Iterable[dict[str, np.ndarray]]) -> dict[str, float] | None:
        """Computes the metrics from the counts of all images, and fills `tables`; None without a true segment."""
        raise NotImplementedError
