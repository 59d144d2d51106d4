"""Segmentation with a classifier's prompts and the masks of another run (`methods.zsseg`)."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from ovseg_jax.data.source_base import Source
from ovseg_jax.errors import UserError
from ovseg_jax.evals.registry import Setup
from ovseg_jax.evals.segmentation import SegmentationEvaluator
from ovseg_jax.experiment.load import Run, load_run
from ovseg_jax.experiment.mask_files import MaskFiles, is_mask_file, stage_of
from ovseg_jax.methods.zsseg import FILLS, Rules, TwoStage
from ovseg_jax.protocols import Classifier, Evaluator, Prediction, Segmenting, Variables
from ovseg_jax.towers.clip import MEAN
from ovseg_jax.towers.features import embed_in_chunks
from ovseg_jax.towers.prompt_file import Prompt
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.splits import load_split


class TransferEvaluator(Evaluator):
    """An evaluator of segmentation with the masks of one run and the classifier of another, for several prompts.

    Metrics: those of `SegmentationEvaluator`, without a suffix for the classifier's own prompt, with `[<prompt>]` for
    the others. A prompt with words that the classifier does not know is skipped with a message on stderr.
    """

    needs = frozenset({"image", "segments", "class_ids"})
    takes = Classifier
    overrides = ("label_size", "max_segments")
    options = ("proposals", "prompts", "split", "ensemble", "threshold", "fill")

    def __init__(
        self,
        name: str,
        proposals: Run,
        classifier: Classifier,
        classes: ClassList,
        batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
        mesh: Mesh,
        *,
        rules: Rules,
        prompts: Mapping[str, Sequence[str] | Prompt | None],
        every: int = 0,
    ):
        """Creates an evaluator that compiles once and runs many times.

        Args:
          name: see `Evaluator`.
          proposals: the run that proposes masks.
          classifier: the method that classifies them; `run` takes its variables.
          classes: the classes that `label` indexes; those not in the groups "unseen" and "held_out" are seen.
          batches: see `SegmentationEvaluator`.
          mesh: the devices.
          rules: the rules for joining the two stages.
          prompts: templates, or a learned prompt, by name; None is the classifier's own prompt.
          every: see `Evaluator`.
        """
        self.name, self.every = name, every
        self.tables: dict[str, list[Any]] = {}
        self._proposals, self._classes, self._mesh, self._prompts = proposals, classes, mesh, dict(prompts)
        self._join = partial(TwoStage, proposals.method, classifier, rules, seen=seen_names(classes))
        kind = _GivenMasks if isinstance(proposals.method, MaskFiles) else SegmentationEvaluator
        self._evaluator = kind(name, self._join(), classes, batches, mesh)

    @classmethod
    def from_config(cls, setup: Setup) -> "TransferEvaluator":
        """Creates the evaluator from its section of the config.

        - `proposals`: the folder of a run that proposes masks, whose image size is used, or masks in files, see
          `mask_files`;
        - `split`: the unseen classes, see `vocab.splits.load_split`;
        - `prompts`: further prompts beside the classifier's own, see `Setup.prompts`;
        - `ensemble`, `threshold` and `fill`: see `rules_of`.
        """
        if not setup.evaluation.get("proposals"):
            raise UserError(
                f"the evaluation {setup.name!r} of type 'transfer' needs the key proposals=WORKDIR"
            )
        proposals = load_proposals(setup.evaluation.proposals, setup.mesh, f"{setup.name}.proposals")
        chosen, classes = rules_in(setup.evaluation, setup.source.classes)
        batches = setup.batches(image_size=proposals.config.data.image_size)
        return cls(
            setup.name,
            proposals,
            setup.method,
            classes,
            with_masks(proposals, batches, setup.source, setup.evaluation.get("limit")),
            setup.mesh,
            rules=rules_of(proposals, setup.config, **chosen),
            prompts={"learned": None, **setup.prompts()},
            every=setup.every,
        )

    def run(self, variables: Variables) -> dict[str, float]:
        """Computes the metrics of all prompts and fills `tables`."""
        result = {}
        for prompt, scores in self.compare(variables).items():
            suffix = f"[{prompt}]" if self._prompts[prompt] is not None else ""
            # Chance and recall do not depend on the prompt.
            for metric, value in scores.items():
                if not (suffix and metric.startswith(("chance", "recall"))):
                    result[metric + suffix] = value
        return result

    def compare(self, variables: Variables) -> dict[str, dict[str, float]]:
        """Computes the metrics by prompt.

        Raises:
          UserError: there is no image with a label, or the classifier's own or only prompt cannot be used.
        """
        both = {"proposals": self._proposals.variables, "classifier": variables}
        texts: dict[str, Any] = {}
        for prompt, templates in self._prompts.items():
            try:
                with jax.set_mesh(self._mesh):
                    embed = partial(self._join(templates=templates).embed_text, both)
                    texts[prompt] = embed_in_chunks(embed, self._classes.flat()[0])
            except UserError as error:  # A small tower may not know the words of every template.
                if len(self._prompts) == 1 or templates is None:
                    raise
                print(f"{self.name}: the prompt {prompt!r} is skipped: {error}", file=sys.stderr)
        found = self._evaluator.compare(both, texts)
        self.tables = self._evaluator.tables
        return found


class _GivenMasks(SegmentationEvaluator):
    """An evaluator of masks that come with the batches."""

    def _predict(self, variables: Variables, batch: dict[str, Array]) -> Prediction:
        given = {**variables, "proposals": {"mask_logits": batch["mask_logits"]}}
        return self._network(given, batch["image"], batch["image_size"])


def load_proposals(where: str, mesh: Mesh, key: str) -> Run:
    """Loads the run of a first stage, or masks in files as one.

    Raises:
      UserError: it is neither, or proposes no masks.
    """
    if is_mask_file(where):
        return stage_of(where)
    return load_run(where, mesh, kind=Segmenting, key=key, lacking="does not propose masks")


def with_masks(
    proposals: Run,
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    source: Source,
    limit: int | None,
) -> Callable[[], Iterable[Mapping[str, np.ndarray]]]:
    """Returns the batches with the masks of files, if the first stage is one of files.

    Raises:
      UserError: an image has no masks.
    """
    if not isinstance(proposals.method, MaskFiles):
        return batches
    if (said := proposals.method.check(source, limit)) and jax.process_index() == 0:
        print(said, file=sys.stderr)
    return proposals.method.batches(batches, source)


def rules_of(
    proposals: Run, config: ConfigDict, ensemble: float = 0.8, threshold: float = 0.5, fill: str = "mean"
) -> Rules:
    """Returns the rules for joining the run of the proposals with the classifier of `config`.

    Each stage uses its learned temperature; crops have the size of the classifier's images. As in ZSSeg's code, pixels
    outside of the mask get the colour `fill`: the "mean" of the classifier's images, or "zero", black.

    Raises:
      UserError: `fill` is unknown, or `ensemble` is not 0 with masks in files; and see `Rules`.
    """
    if ensemble and isinstance(proposals.method, MaskFiles):
        raise UserError(
            f"ensemble={ensemble}: masks in files have no scores of classes, so that only ensemble=0 is possible"
        )
    if fill not in FILLS:
        raise UserError(f"fill={fill!r} is not one of {', '.join(FILLS)}")
    scale = proposals.method.region_scale(proposals.variables)
    return Rules(
        crop_size=int(config.data.image_size),
        ensemble=float(ensemble),
        threshold=float(threshold),
        scale=Rules.scale if scale is None else scale,
        fill=tuple(FILLS[fill] * channel for channel in config.get("towers", {}).get("mean", MEAN)),
    )


def rules_in(evaluation: ConfigDict, classes: ClassList) -> tuple[dict[str, Any], ClassList]:
    """Returns the arguments for `rules_of` of an evaluation of type "transfer", and the classes with its split."""
    rules = {key: evaluation[key] for key in ("ensemble", "threshold", "fill") if key in evaluation}
    return rules, load_split(classes, evaluation["split"]) if evaluation.get("split") else classes


def seen_names(classes: ClassList) -> list[str]:
    """Returns the names of the classes outside of the groups "unseen" and "held_out"; [] without such groups."""
    unseen = classes.withheld()
    return [name for k, names in enumerate(classes.names) if unseen and k not in unseen for name in names]
