"""Evaluators by name, as the `evals` and `final_evals` sections of a config describe them.

Each entry is `name: {type: ..., source: {...}, batch_size: images over all processes, every: steps, limit: images or
None, ...}`. `type` is a key of `EVALUATORS`, or "module:Class" for any class that derives from `protocols.Evaluator`;
the class defines which further keys it has (`options`) and which keys of `config.data` it may override (`overrides`).
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ovseg_jax.config import import_class
from ovseg_jax.data.source_base import check_provides
from ovseg_jax.errors import UserError
from ovseg_jax.protocols import Evaluator, Trainable
from ovseg_jax.towers.prompt_file import Prompt
from ovseg_jax.towers.templates import read_templates

EVALUATORS = {
    "segmentation": "ovseg_jax.evals.segmentation:SegmentationEvaluator",
    "proposals": "ovseg_jax.evals.proposals:ProposalsEvaluator",
    "panoptic": "ovseg_jax.evals.panoptic:PanopticEvaluator",
    "instances": "ovseg_jax.evals.instances:InstancesEvaluator",
    "classification": "ovseg_jax.evals.classification:ClassificationEvaluator",
    "retrieval": "ovseg_jax.evals.retrieval:RetrievalEvaluator",
    "transfer": "ovseg_jax.experiment.transfer:TransferEvaluator",
}
"""The class of each type, imported when it is used."""
COMMON = ("type", "source", "batch_size", "every", "limit")


class Setup(NamedTuple):
    """The arguments for creating an evaluator.

    Attributes:
      name: the name of the evaluation.
      evaluation: its section of the config.
      config: the config of the run.
      method: the method to evaluate.
      mesh: the devices.
      source: the source of the images.
    """

    name: str
    evaluation: ConfigDict
    config: ConfigDict
    method: Any
    mesh: Mesh
    source: Any

    @property
    def every(self) -> int:
        """Steps between two runs during training; 0 for the end only."""
        return int(self.evaluation.get("every", 0) or 0)

    def batches(self, **data: Any) -> Callable[[], Iterable[Mapping[str, np.ndarray]]]:
        """Returns a function that starts a pass over this process's share of the images.

        Args:
          **data: values that replace those of `config.data`; the evaluation's own values take precedence.
        """
        from ovseg_jax.data.pipeline import eval_batches  # grain's import takes long

        evaluator = evaluator_type(self.evaluation.get("type", "segmentation"))
        own = {k: self.evaluation[k] for k in evaluator.overrides if self.evaluation.get(k)}
        return partial(
            eval_batches,
            self.source,
            evaluator.needs,
            {"data": {**self.config.data, **data, **own}},
            batch_size=self.evaluation.batch_size // jax.process_count(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            limit=self.evaluation.get("limit"),
        )

    def prompts(self) -> dict[str, tuple[str, ...] | Prompt]:
        """Returns the `prompts` of the evaluation by name, read by `towers.templates.read_templates`."""
        return {k: read_templates(v) for k, v in (self.evaluation.get("prompts") or {}).items()}


def evaluator_type(name: str) -> type[Evaluator]:
    """Returns the evaluator class of a `type`.

    Raises:
      UserError: there is no such class, or it is not an evaluator.
    """
    return import_class(EVALUATORS.get(name, name), Evaluator, "evaluator", EVALUATORS)


def make_evaluators(config: ConfigDict, method: Trainable, mesh: Mesh, key: str = "evals") -> list[Evaluator]:
    """Creates the evaluators of the section `key` of a config, in alphabetical order.

    Raises:
      UserError: the type is unknown or does not fit the method, or the source cannot be read or lacks a field that
        the evaluator needs.
    """
    from ovseg_jax.data.sources.build import make_source

    evaluators: list[Evaluator] = []
    for name, evaluation in sorted((config.get(key) or {}).items()):
        where = f"{key}.{name}"
        kind = evaluation.get("type", "segmentation")
        evaluator = evaluator_type(kind)
        if not isinstance(method, evaluator.takes):
            raise UserError(f"{where}.type={kind!r} does not support the method {type(method).__name__}")
        if evaluation.batch_size % jax.process_count():
            raise UserError(
                f"{where}.batch_size={evaluation.batch_size} is not a multiple of the {jax.process_count()} processes"
            )
        source = make_source(evaluation.source)
        check_provides(source, evaluator.needs, f"{where} of type {kind!r}")
        evaluators.append(evaluator.from_config(Setup(name, evaluation, config, method, mesh, source)))
    return evaluators
