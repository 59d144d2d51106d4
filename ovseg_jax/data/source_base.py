"""The contract of a data set: `Source`, its lazy examples, and the check that it has the fields that a consumer needs.

An example is a mapping of one image's fields. Each field is read when it is first asked for, and never otherwise:

    image            u8 [H W 3]
    segments         i32 [H W], 0 = void, else 1-based into the rows of the five below
    class_ids        i32 [n], -1 = unlabelled; with it `isthing` and `iscrowd`, bool [n]
    boxes            f32 [n 4], (x0, y0, x1, y1) in pixels, exclusive ends
    region_captions  for each segment a list of texts
    region_tags      for each segment a list of words
    captions, tags   lists of texts of the whole image, maybe empty
    label            int, where the image has one class; `feature`, f32 [D] or [V D], may stand for the image
    image_id         str
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList

FIELDS = frozenset(
    "image segments class_ids boxes captions tags region_captions region_tags label feature".split()
)
"""The fields that a source may provide; `image_id` is always there, `isthing` and `iscrowd` with `class_ids`."""

TEXTS = ("captions", "tags", "region_captions", "region_tags")
"""Those that are texts."""


class Extent(NamedTuple):
    """The largest height, width (pixels) and number of segments of a source's examples."""

    height: int
    width: int
    segments: int


class Regions(NamedTuple):
    """The segments of a source that have a class and are no crowds, one a row.

    `image` i32 [n] and `segment` i32 [n] (from 0) say where, `class_id` i32 [n] which class, `box` f32 [n 4] how
    large (as `boxes` of an example).
    """

    image: np.ndarray
    segment: np.ndarray
    class_id: np.ndarray
    box: np.ndarray


class Example(Mapping[str, Any]):
    """The fields of one image. A function in a field's place is called with the example when it is first read.

    Two threads may both call it; both get equal values.
    """

    def __init__(self, **fields: Any):
        self._fields = fields

    def __getitem__(self, field: str) -> Any:
        value = self._fields[field]
        if callable(value):
            value = self._fields[field] = value(self)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, field: object) -> bool:  # Mapping's own would read the field
        return field in self._fields


def replaced(example: Mapping[str, Any], **fields: Any) -> Example:
    """Returns the example with some fields replaced or added, and reads none."""
    kept: dict[str, Any] = {field: _get(example, field) for field in example if field not in fields}
    return Example(**kept, **fields)


def _get(example: Mapping[str, Any], field: str) -> Callable[[Example], Any]:
    return lambda _: example[field]


class Source:
    """Random access to the examples of a data set; the base class of all.

    A subclass sets `name`, `classes` and `provides`, and defines `__len__` and `__getitem__`. The other methods look
    through all examples; a subclass that has an index file overrides `extent` and `regions`.

    Attributes:
      name: for messages.
      classes: the classes that `class_ids` and `label` index.
      provides: the fields of `FIELDS` that its examples have.
      labels: i32 [n], the class of every example, where each has one.
      counts: i32 [classes], how many examples of each class the whole data set has, where this is a part of it.
    """

    name: str
    classes: ClassList
    provides: frozenset[str]
    labels: np.ndarray | None = None
    counts: np.ndarray | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        raise NotImplementedError

    def captions(self) -> Iterator[str]:
        """Returns all captions, one after another; no image is decoded."""
        return self.texts("captions")

    def texts(self, field: str) -> Iterator[str]:
        """Returns all texts of a field of `TEXTS`, one after another; none where the source lacks it."""
        if field in self.provides:
            for index in range(len(self)):
                for text in self[index][field]:
                    yield from [text] if isinstance(text, str) else text

    def extent(self) -> Extent:
        """Returns the size of the canvas and the number of segments that the largest examples need."""
        sizes = [(1, 1, 1)]
        for index in range(len(self)):
            example = self[index]
            if "segments" in example:
                sizes.append((*example["segments"].shape, len(example["class_ids"])))
            else:
                sizes.append((*example["image"].shape[:2], 0))
        return Extent(*(max(column) for column in zip(*sizes, strict=True)))

    def regions(self) -> Regions:
        """Returns all segments that have a class and are no crowds, without their pixels."""
        found = []
        for index in range(len(self)):
            example = self[index]
            kept = np.flatnonzero((example["class_ids"] >= 0) & ~example["iscrowd"])
            image = np.full(len(kept), index, np.int32)
            found.append(
                Regions(image, kept.astype(np.int32), example["class_ids"][kept], example["boxes"][kept])
            )
        return join_regions(found)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: example {index} of {len(self)}")


class Wrapped(Source):
    """A source that stands before another and answers for it."""

    def __init__(self, source: Source):
        self.source = source
        self.name, self.classes, self.provides = source.name, source.classes, source.provides
        self.labels, self.counts = source.labels, source.counts

    def __len__(self) -> int:
        return len(self.source)

    def extent(self) -> Extent:
        """Returns the extent of the source behind."""
        return self.source.extent()


def join_regions(parts: Sequence[Regions]) -> Regions:
    """Returns the rows of all parts, of which there may be none."""
    none = np.zeros(0, np.int32)
    columns = zip(Regions(none, none, none, np.zeros((0, 4), np.float32)), *parts, strict=True)
    return Regions(*(np.concatenate(column) for column in columns))


def check_provides(source: Source, needs: Iterable[str], consumer: str, advice: str = "") -> None:
    """Checks that a source has the fields that a consumer needs.

    Args:
      source: the source.
      needs: of `FIELDS`.
      consumer: who needs them, for the message.
      advice: the end of the message, in brackets.

    Raises:
      UserError: naming the source, the consumer and the fields that are missing.
    """
    if missing := sorted(set(needs) - source.provides):
        has = ", ".join(sorted(source.provides)) or "nothing"
        raise UserError(
            f"the source {source.name!r} has no {' and no '.join(missing)}, which {consumer} needs; it has {has}"
            + (f" ({advice})" if advice else "")
        )
