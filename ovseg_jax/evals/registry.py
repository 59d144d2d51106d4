"""Evaluators by name: what a config's `evals` and `final_evals` sections mean.

Each entry is `name: {type: ..., source: {...}, batch_size: images over all processes, every: steps, limit: images or
None, ...}`. `type` is a key of `EVALUATORS` or "module:Class" of any class that derives from `protocols.Evaluator`; the
class says which further keys it has (`options`) and which of `config.data` it may set (`overrides`).
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
    "classification": "ovseg_jax.evals.classification:ClassificationEvaluator",
    "transfer": "ovseg_jax.experiment.transfer:TransferEvaluator",
}
"""Where each type lives; it is imported when it is asked for."""
COMMON = ("type", "source", "batch_size", "every", "limit")


class Setup(NamedTuple):
    """The parts that an evaluator is made of.

    Attributes:
      name: of the evaluation.
      evaluation: its section of the config.
      config: of the run.
      method: what is evaluated.
      mesh: the devices.
      source: the images.
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
        """Returns what starts a pass over this process's share of the images.

        Args:
          **data: values in place of those of `config.data`; the evaluation's own come first.
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
        """Returns `prompts` of the evaluation: {name: what `towers.templates.read_templates` takes}."""
        return {k: read_templates(v) for k, v in (self.evaluation.get("prompts") or {}).items()}


def evaluator_type(name: str) -> type[Evaluator]:
    """Imports the evaluator of a `type`.

    Raises:
      UserError: there is none of this name, or it is no evaluator.
    """
    return import_class(EVALUATORS.get(name, name), Evaluator, "evaluator", EVALUATORS)


def make_evaluators(config: ConfigDict, method: Trainable, mesh: Mesh, key: str = "evals") -> list[Evaluator]:
    """Makes the evaluators of `config.evals`, or of `config.final_evals` with that `key`, in alphabetical order.

    Raises:
      UserError: an unknown type, a type that is not the method's, or a source that cannot be read or lacks what
        the evaluator needs.
    """
    from ovseg_jax.data.pipeline import make_source  # grain's import takes long

    evaluators: list[Evaluator] = []
    for name, evaluation in sorted((config.get(key) or {}).items()):
        where = f"{key}.{name}"
        kind = evaluation.get("type", "segmentation")
        evaluator = evaluator_type(kind)
        if not isinstance(method, evaluator.takes):
            raise UserError(f"{where}.type is {kind!r}, which the method {type(method).__name__} cannot do")
        if evaluation.batch_size % jax.process_count():
            raise UserError(
                f"{where}.batch_size={evaluation.batch_size} does not divide by {jax.process_count()} processes"
            )
        source = make_source(evaluation.source)
        check_provides(source, evaluator.needs, f"{where} of type {kind!r}")
        evaluators.append(evaluator.from_config(Setup(name, evaluation, config, method, mesh, source)))
    return evaluators
