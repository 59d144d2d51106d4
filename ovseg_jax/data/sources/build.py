"""Creation of sources from configs: a single one, or a mixture of several.

A new kind of data set is one class derived from `source_base.Source`; a config names it "module:Class", or by its
entry in `SOURCES`.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ovseg_jax.config import import_class
from ovseg_jax.data.mixture import Mixture
from ovseg_jax.data.source_base import Example, Extent, Regions, Source, Wrapped, check_provides
from ovseg_jax.data.sources.few_shot import FewShot
from ovseg_jax.data.sources.pseudo_masks import PseudoMasks
from ovseg_jax.errors import UserError

SOURCES = {
    "scenes": "ovseg_jax.data.scenes.source:Scenes",
    "coco": "ovseg_jax.data.sources.coco:Coco",
    "folder": "ovseg_jax.data.sources.folder:Folder",
    "scene_objects": "ovseg_jax.data.scenes.objects:SceneObjects",
    "image_folder": "ovseg_jax.data.sources.image_folder:ImageFolder",
    "tfds": "ovseg_jax.data.sources.tfds_images:TfdsImages",
    "prepared": "ovseg_jax.data.sources.prepared:Prepared",
    "webdataset": "ovseg_jax.data.sources.webdataset:WebDataset",
    "region_json": "ovseg_jax.data.sources.region_json:RegionJson",
    "crops": "ovseg_jax.data.sources.crops:Crops",
    "joined": "ovseg_jax.data.sources.build:Joined",
}
"""The class of each kind of source, imported when it is used."""


def make_source(cfg: Any) -> Source:
    """Creates the source, or the mixture of sources, that a config describes.

    Args:
      cfg: a mapping with `name` (a key of `SOURCES`, or "module:Class"), the arguments of that source, and optionally
        `fields` (the only ones to provide), `masks` (a folder of pseudo-masks for the images without segments, see
        `PseudoMasks`), `cache` (keep decoded examples in memory), `weight` (its share in a mixture), `part` (see
        `PartOf`), and for a classification source `shots`, `seed` and `group` (see `FewShot`); or a list of such
        mappings, for a mixture.

    Raises:
      UserError: a name or argument is unknown, or the data cannot be read.
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
    fields, masks, part = cfg.pop("fields", None), cfg.pop("masks", ""), cfg.pop("part", 1.0)
    kind = import_class(SOURCES.get(name, name), Source, "data source", SOURCES)
    known = inspect.signature(kind).parameters
    few = {}
    if any(key in cfg and key not in known for key in ("shots", "group")):
        few = {key: cfg.pop(key) for key in ("shots", "group", "seed") if key in cfg and key not in known}
    if unknown := sorted(set(cfg) - set(known)):
        raise UserError(
            f"the data source {name!r} has no argument {unknown[0]!r}; its arguments are {', '.join(known)}"
        )
    if missing := [k for k, p in known.items() if p.default is p.empty and k not in cfg]:
        raise UserError(f"the data source {name!r} needs the argument {missing[0]}=")
    source = kind(**cfg)
    if few:
        check_provides(source, ("label",), f"the argument {next(iter(few))!r}")
        source = FewShot(source, **few)
    if part != 1:
        source = PartOf(source, part)
    if fields is not None:
        source = Restricted(source, fields)
    if masks:
        source = PseudoMasks(source, masks)
    return Cached(source) if cache else source


class Joined(Wrapped):
    """Several sources as one, whose examples are equally likely: the parts of Localized Narratives, for example."""

    def __init__(self, sources: Sequence[Any]):
        """Creates the sources.

        Args:
          sources: their configs, see `make_source`; weights have no effect.

        Raises:
          UserError: see `make_source`.
        """
        super().__init__(Mixture([make_source(part) for part in sources]))

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Returns an example of one of them."""
        return self.source[index]

    def texts(self, field: str) -> Iterator[str]:
        """Yields the texts of one source after another."""
        return self.source.texts(field)


class PartOf(Wrapped):
    """A part of a source's examples, drawn at random and always the same.

    Args:
      source: the source.
      share: how much of it, above 0 and at most 1.

    Raises:
      UserError: the share is out of range.
    """

    def __init__(self, source: Source, share: Any):
        super().__init__(source)
        if not (isinstance(share, int | float) and 0 < share <= 1):
            raise UserError(f"part={share} of the source {self.name!r} is not above 0 and at most 1")
        count = max(1, round(share * len(source)))
        self._kept = np.sort(np.random.default_rng(0).permutation(len(source))[:count])
        if source.labels is not None:
            self.labels = source.labels[self._kept]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        self._check_index(index)
        return self.source[int(self._kept[index])]


class Restricted(Wrapped):
    """A source with some of its fields only, such as the images and captions of a data set that has masks as well.

    Raises:
      UserError: it does not provide one of them.
    """

    def __init__(self, source: Source, fields: Sequence[str]):
        super().__init__(source)
        check_provides(source, fields, "the argument 'fields'")
        self.provides = frozenset(fields)
        self._hidden = source.provides - self.provides
        self._hidden |= {"isthing", "iscrowd"} if "class_ids" in self._hidden else set()

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        return Example(**{k: lambda _, k=k: example[k] for k in example if k not in self._hidden})

    def extent(self) -> Extent:
        """Returns the extent of what it provides."""
        return Source.extent(self)


class Cached(Wrapped):
    """A source that keeps the fields of each example in memory after the first read, for slow sources.

    Each worker process has a cache of its own, so memory grows with their number.
    """

    def __init__(self, source: Source):
        super().__init__(source)
        self._examples: dict[int, Mapping[str, Any]] = {}

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        example = self._examples.get(index)
        if example is None:
            # Two threads may both create it; both create the same.
            example = self._examples[index] = self.source[index]
        return example

    def regions(self) -> Regions:
        """Returns the regions of the wrapped source."""
        return self.source.regions()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_examples": {}}  # the cache is not copied to worker processes
