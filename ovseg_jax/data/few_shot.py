"""A few examples of each class, of some classes: few-shot training, and scores of base and new classes."""

import math
from typing import Any

import numpy as np
from jaxtyping import Int

from ovseg_jax.data.sources import Wrapped
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList


class FewShot(Wrapped):
    """A part of a classification source; `classes`, and so the meaning of labels, stay the whole source's.

    Args:
      source: with `labels`.
      shots: at most so many examples of each class, drawn by `seed`; 0 takes all.
      seed: another one draws other examples.
      group: a group of the source's `ClassList`, or "base" or "new", the first and the second half of the
        classes (CoCoOp, 4.1; the odd one is a base class); "" takes all classes.

    Raises:
      UserError: the group is unknown or has no example, or `shots` is negative.
    """

    def __init__(self, source: Any, shots: int = 0, seed: int = 0, group: str = ""):
        super().__init__(source)
        if shots < 0:
            raise UserError(
                f"shots={shots} of the source {self.name!r} is less than 0 (0 takes all examples)"
            )
        labels = np.asarray(source.labels)
        by_class = np.argsort(labels, kind="stable")
        ends = np.searchsorted(labels[by_class], np.arange(len(self.classes) + 1))
        kept = []
        for k in _members(self.classes, group, self.name):
            own = by_class[ends[k] : ends[k + 1]]
            if shots and len(own) > shots:
                own = np.random.default_rng([seed, k]).choice(own, shots, replace=False)
            kept.append(own)
        self._kept = np.sort(np.concatenate([np.zeros(0, np.int64), *kept]))
        if not len(self._kept):
            raise UserError(f"the source {self.name!r} has no example of group={group!r}")
        self.labels: Int[np.ndarray, " n"] = labels[self._kept]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Example `index` of those that were kept, in the source's order."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: example {index} of {len(self)}")
        return self.source[int(self._kept[index])]


def _members(classes: ClassList, group: str, name: str) -> tuple[int, ...]:
    half = math.ceil(len(classes) / 2)
    halves = {"base": range(half), "new": range(half, len(classes))}
    groups = {"": range(len(classes)), **halves, **classes.groups}
    if group not in groups:
        raise UserError(f"group={group!r} of the source {name!r} is not one of {', '.join(list(groups)[1:])}")
    return tuple(groups[group])
