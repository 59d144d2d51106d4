"""Scores of semantic segmentation and mask proposals on images with segments.

One pass over the images computes all metrics: the method predicts on the mesh, each device turns its predictions into
label maps and counts, the counts are summed over all devices of all processes, and the host accumulates them and
divides once. Every process returns the same numbers.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from ovseg_jax.decisions.maps import Mode, vocabulary_of
from ovseg_jax.decisions.published import protocol
from ovseg_jax.decisions.rules import Decision, decide, decision_of
from ovseg_jax.decisions.windows import Windows, decide_windows, predict_windows
from ovseg_jax.errors import UserError
from ovseg_jax.evals import confusion, pixel_counts, proposals
from ovseg_jax.evals.base import BatchEvaluator
from ovseg_jax.evals.passes import each_batch
from ovseg_jax.evals.registry import Setup
from ovseg_jax.parallel.sharding import AXES, replicated
from ovseg_jax.protocols import Prediction, Segmenting, Text, Variables, Vocabulary
from ovseg_jax.towers.features import embed_in_chunks
from ovseg_jax.vocab.classes import with_names

VOID, VOID_BY_NAME = "void", "void by name"


class Sums(NamedTuple):
    """The counts of one pass.

    Attributes:
      every_class: for each mode, the counts with predictions among all classes.
      own_classes: the same with predictions only among the classes in each image's truth.
      recalled: [4] segments matched at each of `proposals.THRESHOLDS`, and segments; None without proposals.
    """

    every_class: dict[str, confusion.Counts]
    own_classes: dict[str, confusion.Counts]
    recalled: Int[Array | np.ndarray, "4"] | None


class SegmentationEvaluator(BatchEvaluator):
    """An evaluator of semantic segmentation and mask proposals, in percent.

    Metrics: those of `confusion.scores` (`miou`, `miou_gt`, `pacc`, `macc`, `fwiou`, groups, chance);
    `grounding_miou`, the mean IoU with predictions only among the classes in each image's truth (OpenSeg, 4.3; not
    comparable with mIoU; absent classes are never predicted, so both divisors agree); `recall@0.5`, `recall@0.7` and
    `recall@0.9` of the proposals over all visible segments that are not crowds. The first of several modes is reported
    under these names, the others with the suffix `@<mode>`. A per-pixel method has no masks: "predicted" then means
    "none", and there is no recall.

    With `windows` (see `data.windows.Sliding`) images are resized and cut into windows of `image_size`, whose scores
    are averaged, and there is no recall. `protocol` names a published combination of windows and decision, see
    `decisions.published`; keys beside it replace its own.
    """

    needs = frozenset({"image", "segments", "class_ids"})
    takes = Segmenting
    overrides = ("image_size", "label_size", "max_segments", "windows")
    options = ("masks", "decision", "background", "ignore", "names", "protocol")

    def __init__(
        self,
        *common: Any,
        masks: str | Sequence[str] = "predicted",
        decision: Any = "argmax",
        background: str | None = None,
        ignore: str | None = None,
        names: Any = None,
        every: int = 0,
    ):
        """Creates an evaluator.

        Args:
          *common, every: see `BatchEvaluator`.
          masks: the origins of the masks, one or several, see `decisions.rules.decide`.
          decision: see `decisions.rules.decision_of`.
          background: the name of a class that is not predicted by its name but given to pixels without a category; or
            "void", which adds such a class, and counts the pixels without a label as its truth; or "void by name", the
            same, but its name "background" is asked for, for a network that learned it as a class.
          ignore: the name of a class that is never predicted and whose pixels are not scored.
          names: other names for some classes, by class, such as those of all things that are background.

        Raises:
          UserError: the method does not support the masks, or there is no class `background` or `ignore`.
        """
        super().__init__(*common, every=every)
        modes = (masks,) if isinstance(masks, str) else tuple(masks)
        unknown = [mode for mode in modes if mode not in self._method.modes]
        if unknown or not modes:
            raise UserError(
                f"evals.{self.name}.masks is {', '.join(unknown) or 'empty'}: {type(self._method).__name__} supports "
                f"{', '.join(self._method.modes)}"
            )
        self._modes = tuple(dict.fromkeys(modes))
        self._decision: Decision = decision_of(decision)
        self._void, self._by_name = background in (VOID, VOID_BY_NAME), background == VOID_BY_NAME
        if self._void:
            self._background: int | None = len(self._classes)
            self._classes = self._classes.and_background()
        else:
            self._background = self._class("background", background)
        self._ignore = self._class("ignore", ignore)
        asked = with_names(self._classes, dict(names or {}))
        if self._void and not self._by_name:  # A method may not know its name.
            asked = dataclasses.replace(asked, names=(*asked.names[:-1], asked.names[0]))
        self._names, _ = asked.flat()
        self._vocabulary = vocabulary_of(asked, self._method.seen_names())
        # JAX compiles the network once for all evaluators of a method.
        self._network = jax.jit(self._method.predict)
        self._windows = jax.jit(partial(predict_windows, self._method.predict))
        self._step = jax.jit(self._counts)

    @classmethod
    def from_config(cls, setup: Setup) -> "SegmentationEvaluator":
        """Creates the evaluator with the options that its section of the config names, and those of a protocol."""
        own = dict(setup.evaluation.items())
        if name := own.pop("protocol", None):
            setup = setup._replace(evaluation=ConfigDict({**protocol(name), **own}))
        evaluator = super().from_config(setup)
        assert isinstance(evaluator, cls)
        return evaluator

    def _class(self, key: str, name: str | None) -> int | None:
        if name is not None and name not in self._classes.index:
            raise UserError(f"evals.{self.name}.{key}={name!r} is not one of the classes")
        return None if name is None else self._classes.index[name]

    def run(self, variables: Variables) -> dict[str, float]:
        """Computes the metrics and fills `tables`.

        Raises:
          UserError: there is no image, or no pixel with a label.
        """
        with jax.set_mesh(self._mesh):
            text = embed_in_chunks(partial(self._method.embed_text, variables), self._names)
        return self.compare(variables, {"": text})[""]

    def compare(self, variables: Variables, texts: Mapping[str, Text]) -> dict[str, dict[str, float]]:
        """Computes the metrics for each of several text embeddings in one pass over the images.

        It fills `tables`, with the suffix `[<key>]` for embeddings under a key that is not "".

        Args:
          variables: the method's variables.
          texts: embeddings of all names of the classes, as the method's `embed_text` returns them.

        Raises:
          UserError: there is no image, or no pixel with a label.
        """
        total: dict[str, Sums] | None = None
        with jax.set_mesh(self._mesh):
            put = jax.device_put(dict(texts), replicated(self._mesh))
            step = lambda batch: self._step(self._predict(variables, batch), put, batch)
            for sums in each_batch(self._batches(), step, self._mesh):
                total = pixel_counts.add(total, sums)
        if total is None or not next(iter(total.values())).every_class[self._modes[0]].truth.sum():
            raise UserError(
                f"evals.{self.name}: the source has no image with a labelled pixel to evaluate on"
            )
        self.tables = {}
        return {key: self._summarise(total[key], f"[{key}]" if key else "") for key in texts}

    def _counts(
        self, prediction: Prediction, texts: dict[str, Text], batch: dict[str, Array]
    ) -> dict[str, Sums]:
        split, whole = PartitionSpec(AXES), PartitionSpec()
        count = jax.shard_map(
            partial(self._count_shard, canvas=batch["image"].shape[-2]),
            mesh=self._mesh,
            in_specs=(split, split, whole, whole),
            out_specs=whole,
            # A scan's constant initial value is not marked as varying between devices, which the check requires.
            check_vma=False,
        )
        rest = {k: v for k, v in batch.items() if k != "image"}
        return count(prediction, rest, texts, self._vocabulary)

    def _predict(self, variables: Variables, batch: dict[str, Array]) -> Prediction:
        if "window_at" in batch:
            return self._windows(variables, batch["image"], batch["image_size"], batch["window_valid"])
        return self._network(variables, batch["image"], batch["image_size"])

    def _count_shard(
        self,
        prediction: Prediction,
        batch: dict[str, Array],
        texts: dict[str, Text],
        vocabulary: Vocabulary,
        *,
        canvas: int,
    ) -> dict[str, Sums]:
        """Counts one device's images, summed over all devices."""
        k, background = len(self._classes), self._background
        label = jnp.where(batch["example_mask"][:, None, None], batch["label"], -1)
        if self._void and background is not None:
            inside = [jnp.arange(n) < batch["label_size"][:, i, None] for i, n in enumerate(label.shape[1:])]
            void = (
                inside[0][:, :, None]
                & inside[1][:, None]
                & batch["example_mask"][:, None, None]
                & (label < 0)
            )
            label = jnp.where(void, background, label)
        if self._ignore is not None:
            label = jnp.where(label == self._ignore, -1, label)
        valid = batch["segment_valid"] & batch["example_mask"][:, None]
        asked = pixel_counts.present_classes(label, k)
        asked = jnp.stack([jnp.ones_like(asked), asked], 1)
        for never in {None if self._by_name else background, self._ignore} - {None}:
            asked = asked.at[:, :, never].set(False)
        views = asked[:, :, vocabulary.owner]
        recalled = None
        if prediction.mask_logits is not None and "window_at" not in batch:
            iou = proposals.best_iou(
                prediction.mask_logits,
                batch["image_size"],
                batch["label_size"],
                batch["segments"],
                valid.shape[1],
                canvas=canvas,
            )
            recalled = proposals.count_recalled(iou, valid)
        sums = {key: Sums({}, {}, recalled) for key in texts}
        for mode, key in itertools.product(self._modes, texts):
            masks: Mode = "none" if mode == "predicted" and prediction.mask_logits is None else mode  # type: ignore[assignment]
            where: dict[str, Any] = dict(
                canvas=canvas, shape=label.shape[1:], decision=self._decision, mode=masks
            )
            given = self._method, prediction, texts[key], vocabulary
            if "window_at" in batch:
                places = Windows.of(batch)
                category = decide_windows(*given, places, batch["label_size"], views, **where).category
            else:
                where |= dict(segments=batch["segments"], max_segments=valid.shape[1])
                sizes = batch["image_size"], batch["label_size"]
                category = decide(*given, sizes[0], sizes[1], views, **where).category
            if background is not None:
                category = jnp.where(category < 0, background, category)
            sums[key].every_class[mode] = pixel_counts.count(label, category[:, 0], k)
            sums[key].own_classes[mode] = pixel_counts.count(label, category[:, 1], k)
        return jax.lax.psum(sums, AXES)

    def _summarise(self, total: Sums, mark: str) -> dict[str, float]:
        result: dict[str, float] = {}
        for mode in self._modes:
            suffix = "" if mode == self._modes[0] else f"@{mode}"
            for metric, value in confusion.scores(total.every_class[mode], self._classes.groups).items():
                if not (suffix and metric.startswith("chance")):  # chance does not depend on the mode
                    result[metric + suffix] = value
            result["grounding_miou" + suffix] = confusion.scores(total.own_classes[mode])["miou"]
            self.tables["iou" + suffix + mark] = confusion.table(total.every_class[mode], self._classes)
        if total.recalled is not None and total.recalled[-1]:
            result |= proposals.recalls(total.recalled.tolist())
        return result
