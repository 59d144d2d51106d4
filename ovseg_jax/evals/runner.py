"""The protocol of evaluation: a config names evaluations, each scores variables as {metric: number}.

One pass over the images gives everything: the method predicts on the mesh, each device turns its images into
label maps and counts, the counts are summed over all devices of all processes, and the host adds them up and
divides once. Every process returns the same numbers.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from ovseg_jax.data.source_base import check_provides
from ovseg_jax.decisions.segment import MODES, Mode, cosines, region_scores_of, view_maps
from ovseg_jax.errors import UserError
from ovseg_jax.evals import confusion, proposals
from ovseg_jax.evals.classification import ClassificationEvaluator
from ovseg_jax.evals.passes import each_batch, embed_in_chunks
from ovseg_jax.parallel.sharding import AXES, replicated
from ovseg_jax.protocols import Classifier, Method, Prediction, Segmenting, Trainable, Variables
from ovseg_jax.towers.templates import read_templates
from ovseg_jax.vocab.classes import ClassList


@runtime_checkable
class Evaluator(Protocol):
    """One named evaluation.

    Attributes:
      name: prefix of its metrics in metrics.jsonl and summary.json.
      every: steps between two runs during training; 0 for the end only.
      tables: after `run`, the rows of each per-class table: "accuracy", or "iou" and "iou@<mode>" for further modes.
    """

    name: str
    every: int
    tables: dict[str, list[Any]]

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
        method: Segmenting,
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
        self.tables: dict[str, list[Any]] = {}
        self._method, self._classes, self._batches, self._mesh = method, classes, batches, mesh
        self._modes = tuple(mode for mode in dict.fromkeys(modes) if mode in MODES)
        self._names, self._owner = classes.flat()
        self._region_scores = region_scores_of(method)
        if self._region_scores is not cosines and self._modes != ("predicted",):
            raise UserError(
                f"evals.{name}.masks: {type(method).__name__} scores its own proposals: use predicted"
            )
        self._step = jax.jit(self._counts)

    def run(self, variables: Variables) -> dict[str, float]:
        """Evaluates; fills `tables`.

        Raises:
          UserError: there is no image, or no pixel with a label.
        """
        with jax.set_mesh(self._mesh):
            text = embed_in_chunks(partial(self._method.embed_text, variables), self._names)
        return self.compare(variables, {"": text})[""]

    def compare(
        self, variables: Variables, texts: Mapping[str, Float[Array, "t d"]]
    ) -> dict[str, dict[str, float]]:
        """The metrics under each of several text sides, in one pass over the images.

        Fills `tables`; those of a text side have the suffix `[<its key>]`, if it has a key.

        Args:
          variables: the method's variables.
          texts: embeddings of all names of the classes, as `embed_text` of the method gives them.

        Raises:
          UserError: there is no image, or no pixel with a label.
        """
        total: dict[str, Sums] | None = None
        with jax.set_mesh(self._mesh):
            step = partial(self._step, variables, jax.device_put(dict(texts), replicated(self._mesh)))
            for sums in each_batch(self._batches(), step, self._mesh):
                total = confusion.add(total, sums)
        if total is None or not next(iter(total.values())).every_class[self._modes[0]].truth.sum():
            raise UserError(f"evals.{self.name}: there is no image with a labelled pixel to evaluate on")
        self.tables = {}
        return {key: self._summarise(total[key], f"[{key}]" if key else "") for key in texts}

    def _counts(
        self, variables: Variables, texts: dict[str, Float[Array, "t d"]], batch: dict[str, Array]
    ) -> dict[str, Sums]:
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
        return count(seen, {k: v for k, v in batch.items() if k != "image"}, texts)

    def _count_shard(self, seen, batch, texts, *, canvas: int) -> dict[str, Sums]:
        """Counts of one device's images, summed over all devices."""
        prediction = Prediction(*seen)
        k, owner = len(self._classes), jnp.asarray(self._owner)
        label = jnp.where(batch["example_mask"][:, None, None], batch["label"], -1)
        valid = batch["segment_valid"] & batch["example_mask"][:, None]
        asked = confusion.present_classes(label, k)
        views = jnp.stack([jnp.ones_like(asked), asked], 1)[:, :, owner]
        recalled = None
        if prediction.mask_logits is not None:
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
            masks: Mode = "none" if mode == "predicted" and prediction.mask_logits is None else mode
            category = view_maps(
                prediction,
                texts[key],
                owner,
                batch["image_size"],
                batch["label_size"],
                views,
                canvas=canvas,
                shape=(label.shape[1], label.shape[2]),
                mode=masks,
                segments=batch["segments"],
                max_segments=valid.shape[1],
                region_scores=self._region_scores,
            ).category
            sums[key].every_class[mode] = confusion.count(label, category[:, 0], k)
            sums[key].own_classes[mode] = confusion.count(label, category[:, 1], k)
        return jax.lax.psum(sums, AXES)

    def _summarise(self, total: Sums, mark: str) -> dict[str, float]:
        result: dict[str, float] = {}
        for mode in self._modes:
            suffix = "" if mode == self._modes[0] else f"@{mode}"
            for metric, value in confusion.scores(total.every_class[mode], self._classes.groups).items():
                if not (suffix and metric.startswith("chance")):  # chance knows no mode
                    result[metric + suffix] = value
            result["grounding_miou" + suffix] = confusion.scores(total.own_classes[mode])["miou"]
            self.tables["iou" + suffix + mark] = confusion.table(total.every_class[mode], self._classes)
        if total.recalled is not None and total.recalled[-1]:
            *hits, segments = total.recalled.tolist()
            for threshold, hit in zip(proposals.THRESHOLDS, hits, strict=True):
                result[f"recall@{threshold}"] = 100.0 * hit / segments
        return result


TYPES: dict[str, tuple[type, Any, tuple[str, ...]]] = {
    "segmentation": (Method, SegmentationEvaluator, ("image_size", "label_size", "max_segments")),
    "classification": (Classifier, ClassificationEvaluator, ("image_size",)),
    "transfer": (Classifier, None, ("label_size", "max_segments")),
}
"""For each type of evaluation: what it takes of a method, its class, and keys of `config.data` that it may change."""


def make_evaluators(config: ConfigDict, method: Trainable, mesh: Mesh, key: str = "evals") -> list[Evaluator]:
    """The evaluators of `config.evals`, or of `config.final_evals` with that `key`, in alphabetical order.

    Each is `name: {type: a key of TYPES, source: {...}, batch_size: images over all processes, every: steps, limit:
    images or None}`, with what `TYPES` lists to differ from `config.data`, and

    - of a segmentation `masks: "predicted" | "none" | "truth" | a tuple of them`;
    - of a classification `prompts: {name: what templates.read_templates takes}` and `metric: the one that is "score"`;
    - of a transfer `proposals: the folder of a run that proposes masks`, `prompts`, `split: the unseen classes, see
      vocab.splits.load_split`, and arguments of `experiment.transfer.rules_of`: `ensemble`, `threshold`, `fill`.

    Raises:
      UserError: an unknown type or mode, a type that is not the method's, or a source that cannot be read.
    """
    from ovseg_jax.data.pipeline import eval_batches, make_source  # grain's import takes long

    evaluators: list[Evaluator] = []
    for name, cfg in sorted((config.get(key) or {}).items()):
        kind = cfg.get("type", "segmentation")
        if kind not in TYPES:
            raise UserError(f"{key}.{name}.type is {kind!r}: the types are {', '.join(TYPES)}")
        needed, make, own = TYPES[kind]
        if not isinstance(method, needed):
            raise UserError(
                f"{key}.{name}.type is {kind!r}, which the method {type(method).__name__} cannot do"
            )
        processes = jax.process_count()
        if cfg.batch_size % processes:
            raise UserError(
                f"{key}.{name}.batch_size={cfg.batch_size} does not divide by {processes} processes"
            )
        source = make_source(cfg.source)
        needs = ("image", "label") if kind == "classification" else ("image", "segments", "class_ids")
        check_provides(source, needs, f"{key}.{name} of type {kind!r}")
        data = {**config.data, **{k: cfg[k] for k in own if cfg.get(k)}}
        options: dict[str, Any] = {"every": int(cfg.get("every", 0) or 0)}
        if kind != "segmentation":
            prompts = (cfg.get("prompts") or {}).items()
            options["prompts"] = {k: read_templates(v) for k, v in prompts}
        if kind == "transfer":
            make = partial(_transfer, cfg, config, data)
        batches = partial(
            eval_batches,
            source,
            {"data": data},
            batch_size=cfg.batch_size // processes,
            process_index=jax.process_index(),
            process_count=processes,
            limit=cfg.get("limit"),
        )
        if kind == "classification":
            options["metric"] = cfg.get("metric")
        elif kind == "segmentation":
            modes = cfg.get("masks", "predicted")
            options["modes"] = (modes,) if isinstance(modes, str) else tuple(modes)
        evaluators.append(make(name, method, source.classes, batches, mesh, **options))
    return evaluators


def _transfer(
    cfg: ConfigDict,
    config: ConfigDict,
    data: dict[str, Any],
    name: str,
    method,
    classes,
    batches,
    mesh,
    **options,
) -> Evaluator:
    """An evaluation of type "transfer"; `data` gets the size of the images that the proposals' run knows."""
    from ovseg_jax.experiment.load import load_run
    from ovseg_jax.experiment.transfer import TransferEvaluator, rules_in, rules_of

    if not cfg.get("proposals"):
        raise UserError(f"the evaluation {name!r} of type 'transfer' needs proposals=WORKDIR")
    proposals = load_run(
        cfg.proposals, mesh, kind=Segmenting, key=f"{name}.proposals", lacking="proposes no masks"
    )
    data |= {"task": "segmentation", "image_size": proposals.config.data.image_size}
    chosen, classes = rules_in(cfg, classes)
    rules = rules_of(proposals, config, **chosen)
    options["prompts"] = {"learned": None, **options["prompts"]}
    return TransferEvaluator(name, proposals, method, classes, batches, mesh, rules=rules, **options)
