"""Few-shot parts of classification sources: a few examples of each class, of some classes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ovseg_jax.data.source_base import Source, Wrapped
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList

BOTH = "base+new"


class FewShot(Wrapped):
    """A part of a classification source; `classes`, and so the labels, stay those of the whole source.

    Args:
      source: a source with `labels`.
      shots: the maximum number of examples of each class; 0 takes all.
      seed: the seed for drawing the examples.
      group: a group of the source's `ClassList`, or "base" or "new", the first and the second half of the
        classes (CoCoOp, 4.1; with an odd number the middle one is a base class); "" takes all classes, and so does
        "base+new", which adds the halves as groups of `classes`, so that they are also scored separately.

    Attributes:
      counts: i32 [classes], the number of examples of each class in the whole source, which class frequencies need
        (papers/000, eq. 8); 0 for classes outside the group.

    Raises:
      UserError: the group is unknown or has no example, or `shots` is negative.
    """

    def __init__(self, source: Source, shots: int = 0, seed: int = 0, group: str = ""):
        super().__init__(source)
        if shots < 0:
            raise UserError(
                f"shots={shots} of the source {self.name!r} is less than 0 (0 takes all examples)"
            )
        labels = np.asarray(source.labels)
        by_class = np.argsort(labels, kind="stable")
        ends = np.searchsorted(labels[by_class], np.arange(len(self.classes) + 1))
        kept, self.counts = [], np.zeros(len(self.classes), np.int32)
        groups = _groups(self.classes)
        if group not in groups:
            known = ", ".join(name for name in groups if name)
            raise UserError(f"group={group!r} of the source {self.name!r} is not one of {known}")
        if group == BOTH:
            halves = {half: tuple(groups[half]) for half in BOTH.split("+")}
            self.classes = dataclasses.replace(self.classes, groups={**self.classes.groups, **halves})
        for k in groups[group]:
            own = by_class[ends[k] : ends[k + 1]]
            self.counts[k] = len(own)
            if shots and len(own) > shots:
                own = np.random.default_rng([seed, k]).choice(own, shots, replace=False)
            kept.append(own)
        self._kept = np.sort(np.concatenate([np.zeros(0, np.int64), *kept]))
        if not len(self._kept):
            raise UserError(f"the source {self.name!r} has no example of group={group!r}")
        self.labels = labels[self._kept]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Returns example `index` of those that were kept, in the source's order."""
        self._check_index(index)
        return self.source[int(self._kept[index])]


def _groups(classes: ClassList) -> dict[str, Sequence[int]]:
    """Returns the classes of each possible value of `group`."""
    everything, half = range(len(classes)), math.ceil(len(classes) / 2)
    halves = {"base": everything[:half], "new": everything[half:], BOTH: everything}
    return {"": everything, **halves, **classes.groups}
