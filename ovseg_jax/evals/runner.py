"""The protocol of evaluation: a config names evaluations, each scores variables as {metric: number}.

One pass over the images gives everything: the method predicts on the mesh, each device turns its images into
label maps and counts, the counts are summed over all devices of all processes, and the host adds them up and
divides once. Every process returns the same numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.evals import confusion, proposals
from ovseg_jax.evals.segment import MODES, Mode, view_maps
from ovseg_jax.methods.base import Method, Prediction, Variables
from ovseg_jax.train.sharding import AXES, put_batch, replicated
from ovseg_jax.vocab.classes import ClassList

TEXT_CHUNK = 1024


@runtime_checkable
class Evaluator(Protocol):
    """One named evaluation.

    Attributes:
      name: prefix of its metrics in metrics.jsonl and summary.json.
      every: steps between two runs during training; 0 for the end only.
      tables: after `run`, the rows of each per-class table ("iou", and "iou@<mode>" for further modes).
    """

    name: str
    every: int
    tables: dict[str, list[confusion.ClassRow]]

    def run(self, variables: Variables) -> dict[str, float]:
        """The metrics, without the prefix."""


class Sums(NamedTuple):
    """What one pass counts.

    Attributes:
      every_class: for each mode, the counts when all classes are asked for.
      own_classes: the same when each image is asked only for the classes in its truth.
      recalled: [4] segments matched at each of `proposals.THRESHOLDS`, and segments; None without proposals.
    """

    every_class: dict[str, confusion.Counts]
    own_classes: dict[str, confusion.Counts]
    recalled: Int[Array | np.ndarray, "4"] | None


class SegmentationEvaluator:
    """Semantic segmentation and mask proposals, all scores in percent.

    Metrics: those of `confusion.scores` (`miou`, `miou_gt`, `pacc`, `macc`, `fwiou`, groups, chance);
    `grounding_miou`, the mean IoU when each image is asked only for the classes in its truth (OpenSeg, 4.3:
    never in one column with mIoU; no class is predicted that is absent, so both divisors agree);
    `recall@0.5`, `recall@0.7` and `recall@0.9` of the proposals over all segments that are neither crowd nor
    absent. The first of several modes is reported under these names, the others with the suffix `@<mode>`. A
    per-pixel method has no masks: "predicted" then means "none", and there is no recall.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        classes: ClassList,
        batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
        mesh: Mesh,
        *,
        modes: Sequence[str] = ("predicted",),
        every: int = 0,
    ):
        """Makes an evaluator that compiles once and runs many times.

        Args:
          name: see `Evaluator`.
          method: what to evaluate.
          classes: the classes that `label` indexes.
          batches: starts a pass over this process's share of the images, in equal shapes and numbers on all
            processes.
          mesh: the devices.
          modes: where masks come from, see `segment.label_maps`.
          every: see `Evaluator`.
        """
        unknown = [mode for mode in modes if mode not in MODES]
        if unknown or not modes:
            raise UserError(f"evals.{name}.masks is {', '.join(unknown) or 'empty'}: use {', '.join(MODES)}")
        self.name, self.every = name, every
        self.tables: dict[str, list[confusion.ClassRow]] = {}
        self._method, self._classes, self._batches, self._mesh = method, classes, batches, mesh
        self._modes = tuple(mode for mode in dict.fromkeys(modes) if mode in MODES)
        self._names, self._owner = classes.flat()
        self._step = jax.jit(self._counts)

    def run(self, variables: Variables) -> dict[str, float]:
        """Evaluates; fills `tables`.

        Raises:
          UserError: there is no image, or no pixel with a label.
        """
        total: Sums | None = None
        with jax.set_mesh(self._mesh):
            text = jax.device_put(embed_names(self._method, variables, self._names), replicated(self._mesh))
            waiting: Sums | None = None
            for batch in self._batches():
                rows = _pad_to_multiple(batch, len(self._mesh.local_devices))
                sums = self._step(variables, text, put_batch(rows, self._mesh))
                # The host adds up one batch while the devices work on the next, and never runs further ahead.
                total = total if waiting is None else confusion.add(total, waiting)
                waiting = sums
            total = total if waiting is None else confusion.add(total, waiting)
        if total is None or not total.every_class[self._modes[0]].truth.sum():
            raise UserError(f"evals.{self.name}: there is no image with a labelled pixel to evaluate on")
        return self._summarise(total)

    def _counts(self, variables: Variables, text: Float[Array, "t d"], batch: dict[str, Array]) -> Sums:
        prediction = self._method.predict(variables, batch["image"], batch["image_size"])
        seen = prediction.mask_logits, prediction.region_embed, prediction.pixel_embed
        split, whole = PartitionSpec(AXES), PartitionSpec()
        count = jax.shard_map(
            partial(self._count_shard, canvas=batch["image"].shape[1]),
            mesh=self._mesh,
            in_specs=(split, split, whole),
            out_specs=whole,
            # A scan's constant start is not marked as differing between devices, which the check would
            # demand.
            check_vma=False,
        )
        return count(seen, {k: v for k, v in batch.items() if k != "image"}, text)

    def _count_shard(self, seen, batch, text, *, canvas: int) -> Sums:
        """Counts of one device's images, summed over all devices."""
        prediction = Prediction(*seen)
        k, owner = len(self._classes), jnp.asarray(self._owner)
        label = jnp.where(batch["example_mask"][:, None, None], batch["label"], -1)
        valid = batch["segment_valid"] & batch["example_mask"][:, None]
        asked = confusion.present_classes(label, k)
        views = jnp.stack([jnp.ones_like(asked), asked], 1)[:, :, owner]
        sums = Sums({}, {}, None)
        for mode in self._modes:
            masks: Mode = "none" if mode == "predicted" and prediction.mask_logits is None else mode
            category = view_maps(
                prediction,
                text,
                owner,
                batch["image_size"],
                batch["label_size"],
                views,
                canvas=canvas,
                shape=(label.shape[1], label.shape[2]),
                mode=masks,
                segments=batch["segments"],
                max_segments=valid.shape[1],
            ).category
            sums.every_class[mode] = confusion.count(label, category[:, 0], k)
            sums.own_classes[mode] = confusion.count(label, category[:, 1], k)
        if prediction.mask_logits is not None:
            iou = proposals.best_iou(
                prediction.mask_logits,
                batch["image_size"],
                batch["label_size"],
                batch["segments"],
                valid.shape[1],
                canvas=canvas,
            )
            sums = sums._replace(recalled=proposals.count_recalled(iou, valid))
        return jax.lax.psum(sums, AXES)

    def _summarise(self, total: Sums) -> dict[str, float]:
        result: dict[str, float] = {}
        self.tables = {}
        for mode in self._modes:
            suffix = "" if mode == self._modes[0] else f"@{mode}"
            for metric, value in confusion.scores(total.every_class[mode], self._classes.groups).items():
                if not (suffix and metric.startswith("chance")):  # chance knows no mode
                    result[metric + suffix] = value
            result["grounding_miou" + suffix] = confusion.scores(total.own_classes[mode])["miou"]
            self.tables["iou" + suffix] = confusion.table(total.every_class[mode], self._classes)
        if total.recalled is not None and total.recalled[-1]:
            *hits, segments = total.recalled.tolist()
            for threshold, hit in zip(proposals.THRESHOLDS, hits, strict=True):
                result[f"recall@{threshold}"] = 100.0 * hit / segments
        return result


def embed_names(method: Method, variables: Variables, names: Sequence[str]) -> Float[Array, "t d"]:
    """Embeddings of any number of names, a bounded number at a time and in equal shapes (one compilation)."""
    if len(names) <= TEXT_CHUNK:
        return method.embed_text(variables, list(names))
    padded = [*names, *[names[0]] * (-len(names) % TEXT_CHUNK)]
    chunks = [
        method.embed_text(variables, padded[i : i + TEXT_CHUNK]) for i in range(0, len(padded), TEXT_CHUNK)
    ]
    return jnp.concatenate(chunks)[: len(names)]


def make_evaluators(config: ConfigDict, method: Method, mesh: Mesh, key: str = "evals") -> list[Evaluator]:
    """The evaluators of `config.evals`, or of `config.final_evals` with that `key`, in alphabetical order.

    Each is `name: {type: "segmentation", source: {...}, masks: "predicted" | "none" | "truth" | a tuple of
    them,
    batch_size: images over all processes, every: steps, limit: images or None}`; with `image_size`,
    `label_size` or `max_segments` it differs from what `config.data` says.

    Raises:
      UserError: an unknown type or mode, or a source that cannot be read.
    """
    from ovseg_jax.data.pipeline import eval_batches, make_source  # grain's import takes long

    evaluators: list[Evaluator] = []
    for name, cfg in sorted((config.get(key) or {}).items()):
        if cfg.get("type", "segmentation") != "segmentation":
            raise UserError(f"{key}.{name}.type is {cfg.type!r}: the only type is 'segmentation'")
        processes = jax.process_count()
        if cfg.batch_size % processes:
            raise UserError(
                f"{key}.{name}.batch_size={cfg.batch_size} does not divide by {processes} processes"
            )
        source = make_source(cfg.source)
        own = {k: cfg[k] for k in ("image_size", "label_size", "max_segments") if cfg.get(k)}
        batches = partial(
            eval_batches,
            source,
            {"data": {**config.data, **own}},
            batch_size=cfg.batch_size // processes,
            process_index=jax.process_index(),
            process_count=processes,
            limit=cfg.get("limit"),
        )
        modes = cfg.get("masks", "predicted")
        evaluators.append(
            SegmentationEvaluator(
                name,
                method,
                source.classes,
                batches,
                mesh,
                modes=(modes,) if isinstance(modes, str) else tuple(modes),
                every=int(cfg.get("every", 0) or 0),
            )
        )
    return evaluators


def _pad_to_multiple(batch: Mapping[str, np.ndarray], multiple: int) -> dict[str, np.ndarray]:
    """Adds empty examples (`example_mask` False) until the devices share the batch evenly."""
    batch = {key: np.asarray(value) for key, value in batch.items()}
    extra = -len(batch["example_mask"]) % multiple
    return {key: np.pad(v, [(0, extra)] + [(0, 0)] * (v.ndim - 1)) for key, v in batch.items()}
