"""Several sources as one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ovseg_jax.data.source_base import Example, Extent, Source, Wrapped, replaced
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList, union

# Empty values of the fields that some parts of a mixture may lack.
_EMPTY: dict[str, Any] = {
    "segments": lambda example: np.zeros(example["image"].shape[:2], np.int32),
    "class_ids": np.zeros(0, np.int32),
    "isthing": np.zeros(0, bool),
    "iscrowd": np.zeros(0, bool),
    "boxes": np.zeros((0, 4), np.float32),
    "captions": (),
    "tags": (),
    "region_captions": (),
    "region_tags": (),
}


class Mixture(Source):
    """Several sources as one: their examples in sequence, their classes joined by first name.

    It provides every field that one of its parts provides: examples of the other parts get no segments, captions or
    tags. Images, labels and features have no empty form: the mixture only provides them if all parts do.

    Training draws from the parts by `weights`, independent of their sizes (OpenSeg, 4.1: equal probability).

    Attributes:
      sources: the parts, whose examples have the mixture's class ids.
      weights: the share of each part in training, in any unit.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None):
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if len(weights) != len(sources) or any(not w > 0 for w in weights):
            raise UserError(
                f"a mixture needs a weight above 0 for each of its {len(sources)} sources, not {weights}"
            )
        parts = [source.provides for source in sources]
        self.provides = frozenset.union(*parts).intersection(_EMPTY).union(frozenset.intersection(*parts))
        self.classes = union([source.classes for source in sources])
        self.sources = [_Part(source, self.classes, self.provides) for source in sources]
        labels = [source.labels for source in self.sources]
        if all(own is not None for own in labels):
            self.labels = np.concatenate(labels)  # type: ignore[arg-type]
        self.weights = weights
        self.name = "+".join(source.name for source in sources)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        self._check_index(index)
        k = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[k][index - (int(self._ends[k - 1]) if k else 0)]

    def texts(self, field: str) -> Iterator[str]:
        """Yields the texts of one part after another."""
        for source in self.sources:
            yield from source.texts(field)

    def extent(self) -> Extent:
        """Returns the largest extent over the parts."""
        return Extent(*(max(sizes) for sizes in zip(*(s.extent() for s in self.sources), strict=True)))


class _Part(Wrapped):
    """A part of a mixture, with the mixture's class ids and fields."""

    def __init__(self, source: Source, classes: ClassList, provides: frozenset[str]):
        super().__init__(source)
        index = classes.index
        # The last entry maps -1, unlabelled, to itself.
        self._ids = np.array([*(index[names[0]] for names in source.classes.names), -1], np.int32)
        self.classes, self.provides = classes, provides
        if source.labels is not None:
            self.labels = self._ids[source.labels]

    def __getitem__(self, index: int) -> Example:
        example, ids = self.source[index], self._ids
        fields = {key: empty for key, empty in _EMPTY.items() if key not in example}
        if "class_ids" in example:
            fields["class_ids"] = lambda _: ids[example["class_ids"]]
        if "label" in example:
            fields["label"] = lambda _: int(ids[example["label"]])
        return replaced(example, **fields)
