"""The interface of data sets: `Source`, its lazy examples, and the check that it provides the needed fields.

An example is a mapping with the fields of one image. Each field is only read when it is first accessed:

    image            u8 [H W 3]
    segments         i32 [H W], 0 = void, else the 1-based row of the segment in the fields below
    class_ids        i32 [n], -1 = unlabelled; comes with `isthing` and `iscrowd`, bool [n]
    boxes            f32 [n 4], (x0, y0, x1, y1) in pixels, exclusive ends
    region_captions  for each segment a list of texts
    region_tags      for each segment a list of words
    captions, tags   lists of texts of the whole image, maybe empty
    label            int, if the image has one class; `feature`, f32 [D] or [V D], may replace the image
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
"""The fields that a source may provide; all have `image_id`, and `isthing` and `iscrowd` come with `class_ids`."""

TEXTS = ("captions", "tags", "region_captions", "region_tags")
"""The fields that hold texts."""


class Extent(NamedTuple):
    """The largest height, width (pixels) and number of segments of a source's examples."""

    height: int
    width: int
    segments: int


class Regions(NamedTuple):
    """The segments of a source that have a class and are not crowds, one per row.

    Attributes:
      image: i32 [n], the index of the example.
      segment: i32 [n], the segment's row in the example, from 0.
      class_id: i32 [n], its class.
      box: f32 [n 4], its box as in `boxes` of an example.
    """

    image: np.ndarray
    segment: np.ndarray
    class_id: np.ndarray
    box: np.ndarray


class Example(Mapping[str, Any]):
    """A lazy mapping of the fields of one image; a function given as a field is called at the first access.

    The function takes the example. Two threads may both call it; both get equal values.
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

    def __contains__(self, field: object) -> bool:  # the one of Mapping would read the field
        return field in self._fields


def replaced(example: Mapping[str, Any], **fields: Any) -> Example:
    """Returns the example with some fields replaced or added, without reading any field."""
    kept: dict[str, Any] = {field: _get(example, field) for field in example if field not in fields}
    return Example(**kept, **fields)


def _get(example: Mapping[str, Any], field: str) -> Callable[[Example], Any]:
    return lambda _: example[field]


class Source:
    """The base class of data sets: random access to their examples.

    A subclass sets `name`, `classes` and `provides`, and defines `__len__` and `__getitem__`. The other methods read
    all examples by default; a subclass with an index file overrides `extent` and `regions`.

    Attributes:
      name: the name in messages.
      classes: the classes that `class_ids` and `label` index.
      provides: the fields of `FIELDS` that its examples have.
      labels: i32 [n], the class of every example, or None if examples have no single class.
      counts: i32 [classes], the number of examples of each class in the whole data set, if this is a part of it.
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
        """Yields all captions, one after another, without decoding images."""
        return self.texts("captions")

    def texts(self, field: str) -> Iterator[str]:
        """Yields all texts of a field of `TEXTS`, one after another; none if the source lacks the field."""
        if field in self.provides:
            for index in range(len(self)):
                for text in self[index][field]:
                    yield from [text] if isinstance(text, str) else text

    def extent(self) -> Extent:
        """Returns the largest height, width and number of segments of the examples."""
        sizes = [(1, 1, 1)]
        for index in range(len(self)):
            example = self[index]
            if "segments" in example:
                sizes.append((*example["segments"].shape, len(example["class_ids"])))
            else:
                sizes.append((*example["image"].shape[:2], 0))
        return Extent(*(max(column) for column in zip(*sizes, strict=True)))

    def regions(self) -> Regions:
        """Returns all segments that have a class and are not crowds, without their pixels."""
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
    """A base class for sources that wrap another source."""

    def __init__(self, source: Source):
        self.source = source
        self.name, self.classes, self.provides = source.name, source.classes, source.provides
        self.labels, self.counts = source.labels, source.counts

    def __len__(self) -> int:
        return len(self.source)

    def extent(self) -> Extent:
        """Returns the extent of the wrapped source."""
        return self.source.extent()


def join_regions(parts: Sequence[Regions]) -> Regions:
    """Concatenates the rows of all parts; there may be none."""
    none = np.zeros(0, np.int32)
    columns = zip(Regions(none, none, none, np.zeros((0, 4), np.float32)), *parts, strict=True)
    return Regions(*(np.concatenate(column) for column in columns))


def check_provides(source: Source, needs: Iterable[str], consumer: str, advice: str = "") -> None:
    """Checks that a source provides the fields that a consumer needs.

    Args:
      source: the source.
      needs: names of `FIELDS`.
      consumer: the part that needs them, for the message.
      advice: advice at the end of the message, in parentheses.

    Raises:
      UserError: a field is missing; the message names the source, the consumer and the fields.
    """
    if missing := sorted(set(needs) - source.provides):
        has = ", ".join(sorted(source.provides)) or "nothing"
        raise UserError(
            f"the source {source.name!r} has no {' and no '.join(missing)}, which {consumer} needs; it provides {has}"
            + (f" ({advice})" if advice else "")
        )
