"""Sources: random access to examples. A config names one, or several that are mixed.

A source has `len()`, `source[i]` (an example, see DESIGN in the README), `name`, `classes` and `captions()`;
the folder of a new data set is one class of that form and one entry in `SOURCES`.
"""

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList, union

SOURCES = {
    "scenes": "ovseg_jax.data.scenes.source:Scenes",
    "coco": "ovseg_jax.data.sources.coco:Coco",
    "folder": "ovseg_jax.data.sources.folder:Folder",
    "scene_objects": "ovseg_jax.data.scenes.objects:SceneObjects",
    "image_folder": "ovseg_jax.data.sources.image_folder:ImageFolder",
    "tfds": "ovseg_jax.data.sources.tfds_images:TfdsImages",
    "crops": "ovseg_jax.data.sources.crops:Crops",
}
"""Where each kind of source lives; it is imported when it is asked for."""


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of a data set.

    An example is a dict of `image` u8 [H W 3]; `segments` i32 [H W] (0 = void, else 1-based into the rest);
    `class_ids` i32 [n] (-1 = unlabelled); `isthing`, `iscrowd` bool [n]; `boxes` f32 [n 4] (x0, y0, x1, y1 in
    pixels, exclusive ends); `captions` list of str, maybe empty; `image_id` str.

    A source may also have `extent() -> Extent`, what the largest of its examples needs, and
    `regions() -> Regions`, its segments without their pixels.

    A classification source has examples of one class each: `image` (or `feature`, f32 [D], in its place),
    `label` (int), `image_id`, maybe `captions`; and the attribute `labels`, i32 [n], the class of every
    example. One that is a part of another may have `counts`, how many examples of each class that has.
    """

    name: str
    classes: ClassList

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def captions(self) -> Iterator[str]:
        """All captions, without decoding an image."""


class Extent(NamedTuple):
    """The largest height, width (pixels) and number of segments of a source's examples."""

    height: int
    width: int
    segments: int


class Regions(NamedTuple):
    """The segments of a source that have a class and are no crowds, one a row.

    `image` i32 [n] and `segment` i32 [n] (from 0) say where, `class_id` i32 [n] what, `box` f32 [n 4] how
    large (as `boxes` of an example).
    """

    image: np.ndarray
    segment: np.ndarray
    class_id: np.ndarray
    box: np.ndarray


def join_regions(parts: Sequence[Regions]) -> Regions:
    """The rows of all parts, of which there may be none."""
    none = np.zeros(0, np.int32)
    columns = zip(Regions(none, none, none, np.zeros((0, 4), np.float32)), *parts, strict=True)
    return Regions(*(np.concatenate(column) for column in columns))


def make_source(cfg: Any) -> Source:
    """Makes what a config asks for.

    Args:
      cfg: a mapping with `name` (a key of `SOURCES`), the arguments of that source, and optionally `cache`
        (keep decoded examples in memory), `weight` (its share in a mixture), and for a classification source
        `shots`, `seed` and `group` (see `FewShot`); or a list of such, which is a mixture.

    Raises:
      UserError: an unknown name or argument, or data that cannot be read.
    """
    if isinstance(cfg, Mapping) or hasattr(cfg, "items"):
        return _make_one(dict(cfg.items()))
    parts = [dict(part.items()) for part in cfg]
    if not parts:
        raise UserError(
            "data.train names no source: give at least one, such as {name: 'scenes', split: 'train'}"
        )
    if len(parts) == 1:
        return _make_one(parts[0])
    return Mixture([_make_one(part) for part in parts], [float(part.get("weight", 1.0)) for part in parts])


def _make_one(cfg: dict[str, Any]) -> Source:
    cfg = {key: value for key, value in cfg.items() if key != "weight"}
    name, cache = cfg.pop("name", None), cfg.pop("cache", False)
    if name not in SOURCES:
        raise UserError(f"the data source {name!r} is not one of {', '.join(SOURCES)}")
    module, _, attribute = SOURCES[name].partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    known = inspect.signature(kind).parameters
    few = {}
    if any(key in cfg and key not in known for key in ("shots", "group")):
        few = {key: cfg.pop(key) for key in ("shots", "group", "seed") if key in cfg and key not in known}
    if unknown := sorted(set(cfg) - set(known)):
        raise UserError(f"the data source {name!r} has no argument {unknown[0]!r}; it has {', '.join(known)}")
    if missing := [k for k, p in known.items() if p.default is p.empty and k not in cfg]:
        raise UserError(f"the data source {name!r} needs {missing[0]}=")
    source = kind(**cfg)
    if few:
        from ovseg_jax.data.sources.few_shot import FewShot  # which is built on this module

        if not hasattr(source, "labels"):
            raise UserError(
                f"the data source {name!r} has no argument {next(iter(few))!r}: its images have no labels"
            )
        source = FewShot(source, **few)
    return Cached(source) if cache else source


class Mixture:
    """Several sources as one: their examples one after another, their classes joined by first name.

    All are classification sources, or none is.

    Training draws from the parts by `weights`, whatever their sizes (OpenSeg, 4.1: equal probability).

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
        labelled = [hasattr(source, "labels") for source in sources]
        if len(set(labelled)) > 1:
            one, other = sources[labelled.index(True)], sources[labelled.index(False)]
            raise UserError(
                f"{one.name!r} and {other.name!r} cannot be mixed: one has images with a label each, the other segments"
            )
        self.classes = union([source.classes for source in sources])
        self.sources = [_Relabelled(source, self.classes) for source in sources]
        if all(labelled):
            self.labels = np.concatenate([source.labels for source in self.sources])
        self.weights = weights
        self.name = "+".join(source.name for source in sources)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: example {index} of {len(self)}")
        k = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[k][index - (int(self._ends[k - 1]) if k else 0)]

    def captions(self) -> Iterator[str]:
        """The captions of one part after another."""
        for source in self.sources:
            yield from source.captions()

    def extent(self) -> Extent:
        """The largest over the parts."""
        return Extent(*(max(sizes) for sizes in zip(*(extent_of(s) for s in self.sources), strict=True)))


class Wrapped:
    """A source that stands before another and answers for it."""

    def __init__(self, source: Source):
        self.source = source
        self.name, self.classes = source.name, source.classes
        if hasattr(source, "labels"):
            self.labels = source.labels
        if hasattr(source, "counts"):
            self.counts = source.counts

    def __len__(self) -> int:
        return len(self.source)

    def captions(self) -> Iterator[str]:
        """The captions of the source behind."""
        return self.source.captions()

    def extent(self) -> Extent:
        """The extent of the source behind."""
        return extent_of(self.source)


class _Relabelled(Wrapped):
    """A part of a mixture, with the mixture's class ids."""

    def __init__(self, source: Source, classes: ClassList):
        super().__init__(source)
        index = classes.index
        # The last entry answers for -1, unlabelled.
        self._ids = np.array([*(index[names[0]] for names in source.classes.names), -1], np.int32)
        self.classes = classes
        if hasattr(source, "labels"):
            self.labels = self._ids[source.labels]

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        if "label" in example:
            return {**example, "label": int(self._ids[example["label"]])}
        return {**example, "class_ids": self._ids[example["class_ids"]]}


class Cached(Wrapped):
    """Keeps each example in memory once it was made: for sources that draw or decode slowly and fit into
    memory.

    Worker processes have a cache each, so memory grows with their number.
    """

    def __init__(self, source: Source):
        super().__init__(source)
        self._examples: dict[int, dict[str, Any]] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples.get(index)
        if example is None:
            # Two threads may both make it; both make the same.
            example = self._examples[index] = self.source[index]
        return example

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_examples": {}}  # a worker process starts empty rather than be sent a copy


def extent_of(source: Source) -> Extent:
    """What the largest example of a source needs; asks the source, or else looks at all its examples."""
    if hasattr(source, "extent"):
        return source.extent()
    sizes = [(1, 1, 1)]
    for index in range(len(source)):
        example = source[index]
        sizes.append((*example["segments"].shape, len(example["class_ids"])))
    return Extent(*(max(column) for column in zip(*sizes, strict=True)))
