"""Data sets that `python -m ovseg_jax.prepare` has written, read by TensorFlow Datasets without TensorFlow."""

import functools
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.images import Encoded, read_mask, read_oriented
from ovseg_jax.data.prepared_files import (
    check_files,
    index_name,
    read_index,
    read_manifest,
    read_prepared_classes,
    read_texts,
)
from ovseg_jax.data.source_base import TEXTS, Example, Extent, Regions, Source
from ovseg_jax.errors import UserError, optional
from ovseg_jax.reading import reading
from ovseg_jax.vocab.classes import rename


class Prepared(Source):
    """A split of a prepared data set.

    A record is read when a field of its example is first accessed; its image and its segments are only decoded when
    they are accessed themselves. Extent, regions, labels and texts of all examples come from the index.

    Attributes:
      name: the name of the data set.
      classes: its classes with the publishers' ids.
      labels: i32 [n], the class of each example, if examples have one.
    """

    def __init__(
        self,
        data_dir: epath.PathLike,
        split: str = "train",
        labels: epath.PathLike | None = None,
        verify: bool = False,
        num_classes: int = 0,
    ):
        """Reads the manifest and compares the sizes of all files; shards are opened when they are read from.

        Args:
          data_dir: the folder that `prepare` wrote.
          split: one of its splits.
          labels: a label file in OpenSeg's format with other names for the classes, by their ids.
          verify: whether to compare the checksums of all files, which reads them once.
          num_classes: the required number of classes; 0 takes any number. A config that computes its steps from epochs
            sets it, since the steps depend on it.

        Raises:
          UserError: the folder is not a prepared one, lacks the split, a file is missing or damaged, or the number of
            classes is not `num_classes`.
        """
        self._root = epath.Path(data_dir)
        manifest = read_manifest(data_dir)
        self.name = manifest["dataset"]
        if split not in manifest["splits"]:
            raise UserError(
                f"{data_dir} has no split {split!r}: it holds {', '.join(manifest['splits'])} of {self.name}"
            )
        self._split, entry = split, manifest["splits"][split]
        check_files(data_dir, split, entry, verify)
        self.provides = frozenset(manifest["provides"])
        classes = read_prepared_classes(data_dir)
        self.classes = rename(classes, labels) if labels else classes
        if num_classes and len(classes) != num_classes:
            raise UserError(
                f"{data_dir} holds {self.name} with {len(classes)} classes, but num_classes={num_classes} "
                f"(configs/pomp.py computes its steps from it, so set it there: classes={len(classes)})"
            )
        self._length, self._extent = entry["examples"], Extent(*entry["extent"])
        self._records: Any = None
        if "label" in self.provides:
            self.labels = self._index()["label"]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        """Returns one example, whose record is read when a field is accessed.

        Raises:
          UserError: a record is damaged.
        """
        self._check_index(index)
        record = functools.cache(lambda: self._read(index))
        place = f"{self._root}: {self.name}, split {self._split}, example {index}"
        fields: dict[str, Any] = {
            "image": lambda _: read_oriented(Encoded(f"of {place}", record()["image"]))[0],
            "segments": lambda _: read_mask(Encoded(f"of {place}", record()["segments"])).astype(np.int32),
            "label": lambda _: int(record()["label"]),
        }
        kinds = {"class_ids": np.int32, "isthing": bool, "iscrowd": bool}
        fields["boxes"] = lambda _: np.asarray(record()["boxes"], np.float32).reshape(-1, 4)
        for key, kind in kinds.items():
            fields[key] = lambda _, key=key, kind=kind: np.asarray(record()[key], kind)
        for key in TEXTS:
            fields[key] = lambda _, key=key: _texts(record(), key)
        kept = {*self.provides, *(("isthing", "iscrowd") if "class_ids" in self.provides else ())}
        image_id = lambda _: bytes(record()["image_id"]).decode()
        return Example(**{key: fields[key] for key in kept}, image_id=image_id)

    def extent(self) -> Extent:
        """Returns the extent from the manifest."""
        return self._extent

    def regions(self) -> Regions:
        """Returns the segments that have a class and are not crowds, from the index."""
        index = self._index()
        counts = index["segments"]
        image = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        first = np.cumsum(counts) - counts
        segment = np.arange(len(image), dtype=np.int32) - np.repeat(first, counts).astype(np.int32)
        kept = (index["class_ids"] >= 0) & ~index["iscrowd"]
        return Regions(image[kept], segment[kept], index["class_ids"][kept], index["boxes"][kept])

    def texts(self, field: str) -> Iterator[str]:
        """Yields all texts of a field from the index, without reading records."""
        if field in self.provides:
            for own in read_texts(self._index(), field, self._root / index_name(self._split)):
                for item in own:
                    yield from [item] if isinstance(item, str) else item

    def _index(self) -> dict[str, np.ndarray]:
        return read_index(self._root / index_name(self._split), self._length, self.provides)

    def _read(self, index: int) -> Any:
        with reading(f"{self._root}: example {index} of {self.name}, split {self._split},"):
            if self._records is None:
                self._records = self._open()
            return self._records[index]

    def _open(self) -> Any:
        tfds = _tfds()
        skip = tfds.decode.SkipDecoding()
        builder = tfds.builder_from_directory(str(self._root))
        decoders = {key: skip for key in ("image", "segments") if key in builder.info.features}
        records = builder.as_data_source(self._split, decoders=decoders)
        if len(records) != self._length:
            raise ValueError(f"its metadata lists {len(records)} examples in place of {self._length}")
        return records

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}  # each worker opens the files itself


def _texts(record: Any, key: str) -> list[Any]:
    flat = [bytes(item).decode() for item in record[key]]
    if not key.startswith("region_"):
        return flat
    ends = np.cumsum([0, *record[f"{key}_count"]])
    return [flat[first:last] for first, last in itertools.pairwise(ends)]


def _tfds() -> Any:
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of its own deprecations
    return optional(
        "tensorflow_datasets",
        "the data source 'prepared' needs a package: pip install tensorflow-datasets ({error})",
    )
