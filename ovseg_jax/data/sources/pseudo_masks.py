"""Pseudo-masks in shards, as the segments of the images of a source.

A shard is a zip archive of consecutive examples: shard.json, and for each image INDEX.png, whose values number its
segments from 1, 0 = void. `inference.pseudo_masks` writes them.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ovseg_jax.data.images import Encoded, read_mask
from ovseg_jax.data.source_base import Extent, Source, Wrapped, replaced
from ovseg_jax.data.transforms import segment_boxes
from ovseg_jax.errors import UserError
from ovseg_jax.reading import reading, texts

FACTS = "shard.json"
ANY_SHARD = "masks-[0-9]*-of-[0-9]*.zip"


class Rules(NamedTuple):
    """The proposals to keep; all rules are ours, the paper gives none.

    Attributes:
      threshold: the lowest probability of a pixel inside a mask.
      min_area: the smallest mask, as a share of the image.
      min_confidence: the lowest confidence of a mask, the mean probability of its pixels. Without it a proposal that
        eq. 1 never trained could become a label.
      max_overlap: the IoU above which the less confident one of two masks is dropped.
    """

    threshold: float = 0.5
    min_area: float = 0.001
    min_confidence: float = 0.8
    max_overlap: float = 0.7

    def check(self) -> None:
        """Raises a UserError for a number that is not between 0 and 1."""
        for name, value in self._asdict().items():
            if not (isinstance(value, int | float) and 0 <= value <= 1):
                raise UserError(f"{name}={value} is not between 0 and 1")


def shard_name(number: int, count: int) -> str:
    """Returns the file name of a shard."""
    return f"masks-{number:05d}-of-{count:05d}.zip"


def shard_content(masks: Mapping[int, bytes], facts: Mapping[str, Any]) -> bytes:
    """Returns the content of a shard.

    Args:
      masks: the PNG of each image by its index in the source.
      facts: plain values, among them `image_ids` of all images, and `skipped`, the indices of those without a mask.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(FACTS, json.dumps(facts))
        for index, png in masks.items():
            archive.writestr(f"{index}.png", png)
    return content.getvalue()


def read_facts(path: epath.PathLike) -> dict[str, Any]:
    """Reads shard.json of a shard.

    Raises:
      UserError: the file is damaged.
    """
    with reading(path, "the pseudo-masks"), epath.Path(path).open("rb") as file:
        with zipfile.ZipFile(file) as archive:
            facts = json.loads(archive.read(FACTS))
        ids, skipped = texts(facts["image_ids"], "image_ids"), facts["skipped"]
        if not ids or not isinstance(facts["request"], dict):
            raise ValueError(f"{FACTS} has no image_ids, or no request")
        if not isinstance(skipped, list) or not all(type(index) is int for index in skipped):
            raise ValueError(f"skipped in {FACTS} is not a list of numbers")
    return facts


class PseudoMasks(Wrapped):
    """A source with the segments of pseudo-masks, without classes, for the images that have none of their own.

    An image that the teacher could not read has no segments.

    Args:
      source: a source of images, in the order in which they were labelled.
      masks: the folder of the shards.

    Raises:
      UserError: the folder does not hold the shards of this source, or one is damaged.
    """

    def __init__(self, source: Source, masks: epath.PathLike):
        super().__init__(source)
        self.provides |= {"segments", "class_ids", "boxes"}
        folder = epath.Path(masks)
        self._shards = sorted(folder.glob(ANY_SHARD))
        facts = [read_facts(path) for path in self._shards]
        if not facts:
            raise UserError(f"masks={str(masks)!r} holds no pseudo-masks, such as {shard_name(0, 1)}")
        self._firsts = np.cumsum([0, *(len(fact["image_ids"]) for fact in facts)])
        if len(self._shards) != int(self._shards[0].stem[-5:]) or self._firsts[-1] != len(source):
            raise UserError(
                f"the {len(facts)} shards in {folder} hold {self._firsts[-1]} images, but {source.name} has "
                f"{len(source)}: they are of another source, or some are missing"
            )
        self._ids = [name for fact in facts for name in fact["image_ids"]]
        self._skipped = {index for fact in facts for index in fact["skipped"]}

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Returns one example, whose mask is decoded when it is accessed.

        Raises:
          UserError: the mask is damaged, of another size, or of an image with another name.
        """
        self._check_index(index)
        example = self.source[index]
        if str(example["image_id"]) != self._ids[index]:
            raise UserError(
                f"the pseudo-masks in {self._shards[0].parent} were made of other images: image {index} was "
                f"{self._ids[index]!r} and is now {example['image_id']!r}; label them anew"
            )
        if len(example.get("class_ids", ())):
            return example
        numbers = lambda e: np.full(int(e["segments"].max(initial=0)), -1, np.int32)
        return replaced(
            example,
            segments=lambda e: self._read(index, e["image"].shape[:2]),
            class_ids=numbers,
            isthing=lambda e: np.ones(len(e["class_ids"]), bool),
            iscrowd=lambda e: np.zeros(len(e["class_ids"]), bool),
            boxes=lambda e: segment_boxes(e["segments"], len(e["class_ids"])),
        )

    def extent(self) -> Extent:
        """Returns the extent, reading every mask."""
        return Source.extent(self)

    def _read(self, index: int, size: tuple[int, ...]) -> np.ndarray:
        if index in self._skipped:
            return np.zeros(size, np.int32)
        path = self._shards[int(np.searchsorted(self._firsts, index, "right")) - 1]
        with reading(path, "the pseudo-masks"), path.open("rb") as file, zipfile.ZipFile(file) as archive:
            content = archive.read(f"{index}.png")
        mask = read_mask(Encoded(f"{path}/{index}.png", content))
        if mask.shape != size:
            raise UserError(f"{path}: mask {index} has the size {mask.shape}, but its image {size}")
        return mask.astype(np.int32)
