"""The base class of evaluators that run a method on batches of images."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ovseg_jax.evals.registry import Setup
from ovseg_jax.protocols import Evaluator
from ovseg_jax.vocab.classes import ClassList


class BatchEvaluator(Evaluator):
    """A base class of evaluators that compile once and run many times on the batches of a source.

    A subclass adds its options as keyword arguments of its constructor; `from_config` passes those of the config.
    """

    def __init__(
        self,
        name: str,
        method: Any,
        classes: ClassList,
        batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
        mesh: Mesh,
        *,
        every: int = 0,
    ):
        """Creates an evaluator.

        Args:
          name: see `Evaluator`.
          method: the method to evaluate, of the class `takes`.
          classes: the classes of the source, which the labels of a batch index.
          batches: starts a pass over this process's share of the images, with equal shapes and numbers of batches on
            all processes.
          mesh: the devices.
          every: see `Evaluator`.
        """
        self.name, self.every = name, every
        self.tables: dict[str, list[Any]] = {}
        self._method, self._classes, self._batches, self._mesh = method, classes, batches, mesh

    @classmethod
    def from_config(cls, setup: Setup) -> "BatchEvaluator":
        """Creates the evaluator with the options that its section of the config names."""
        return cls(
            setup.name,
            setup.method,
            setup.source.classes,
            setup.batches(),
            setup.mesh,
            every=setup.every,
            **cls.arguments(setup),
        )

    @classmethod
    def arguments(cls, setup: Setup) -> dict[str, Any]:
        """Returns the keyword arguments of the constructor for the options that a config names."""
        return {key: setup.evaluation[key] for key in cls.options if key in setup.evaluation}
