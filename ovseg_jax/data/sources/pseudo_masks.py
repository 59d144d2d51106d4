"""Pseudo-masks in shards, as the segments of the images of a source.

A shard is a zip archive of consecutive examples: shard.json, and for each image INDEX.png, whose values number its
segments from 1, 0 = void. If shard.json lists classes, the images are label maps, whose values number the classes from
1. `inference.pseudo_masks` and `inference.pseudo_label_maps` write them.
"""

import dataclasses
import functools
import io
import itertools
import json
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ovseg_jax.data.images import Encoded, read_mask
from ovseg_jax.data.source_base import Extent, Source, Wrapped, replaced
from ovseg_jax.data.transforms import segment_boxes
from ovseg_jax.errors import UserError
from ovseg_jax.files import write_whole
from ovseg_jax.reading import array, parse_json, reading, text, texts, whole
from ovseg_jax.vocab.classes import ClassList

FACTS = "shard.json"
BINS = 10  # of the histogram of confidences
KEPT, SMALL, UNSURE, DOUBLE, HIDDEN = range(5)  # what happened to a proposal
ANY_SHARD = "masks-[0-9]*-of-[0-9]*.zip"


class Rules(NamedTuple):
    """The proposals to keep; all rules are ours, OpenSeg's paper gives none.

    Attributes:
      threshold: the lowest probability of a pixel inside a mask.
      min_area: the smallest mask, as a share of the image.
      min_confidence: the lowest confidence of a mask, the mean probability of its pixels. Without it a proposal that
        OpenSeg's mask loss (eq. 1) never trained could become a label.
      max_overlap: the IoU above which the less confident one of two masks is dropped.
      min_visible: the smallest share of a mask that smaller masks, which lie in front, leave uncovered. Without it the
        rims of covered masks would become labels.
    """

    threshold: float = 0.5
    min_area: float = 0.001
    min_confidence: float = 0.8
    max_overlap: float = 0.7
    min_visible: float = 0.5

    def check(self) -> None:
        """Raises a UserError for a number that is not between 0 and 1."""
        for name, value in self._asdict().items():
            if not (isinstance(value, int | float) and 0 <= value <= 1):
                raise UserError(f"{name}={value} is not between 0 and 1")


@dataclasses.dataclass
class Statistics:
    """Counts of kept and dropped proposals of some images.

    Attributes:
      images: number of labelled images.
      masks: number of images by their number of masks, from 0.
      confidence: number of masks by confidence, in `BINS` equal steps from 0 to 1.
      dropped: number of dropped proposals: [small or empty, unsure, duplicate, hidden].
      covered: sum over the images of the share of pixels with a mask.
    """

    images: int = 0
    masks: list[int] = dataclasses.field(default_factory=list)
    confidence: list[int] = dataclasses.field(default_factory=lambda: [0] * BINS)
    dropped: list[int] = dataclasses.field(default_factory=lambda: [0] * HIDDEN)
    covered: float = 0.0

    def __add__(self, other: "Statistics") -> "Statistics":
        """Returns the statistics of both groups of images."""
        add = lambda a, b: [x + y for x, y in itertools.zip_longest(a, b, fillvalue=0)]
        return Statistics(
            self.images + other.images,
            add(self.masks, other.masks),
            add(self.confidence, other.confidence),
            add(self.dropped, other.dropped),
            self.covered + other.covered,
        )

    def __str__(self) -> str:
        total = sum(self.confidence)
        images, (small, unsure, double, hidden) = max(self.images, 1), self.dropped
        found = (
            f"{self.images} images have {total} masks, {total / images:.1f} each, on {self.covered / images:.0%} of "
            f"their pixels; {self.masks[0] if self.masks else 0} have none."
        )
        if not any(self.dropped):
            return found
        return (
            f"{found} Dropped: {small} small or empty proposals, {unsure} unsure ones, {double} duplicates, {hidden} "
            "hidden by others"
        )


class Shard(NamedTuple):
    """The content of a shard's shard.json.

    Attributes:
      request: what its masks depend on, as plain values.
      image_ids: of its images, in order.
      skipped: the indices of the images without a mask, since they could not be read.
      statistics: of its images.
      classes: of label maps; None for masks without classes.
    """

    request: dict[str, Any]
    image_ids: list[str]
    skipped: list[int]
    statistics: Statistics
    classes: ClassList | None = None


def shard_name(number: int, count: int) -> str:
    """Returns the file name of a shard."""
    return f"masks-{number:05d}-of-{count:05d}.zip"


def write_shard(path: epath.PathLike, shard: Shard, masks: Mapping[int, bytes]) -> None:
    """Writes a shard with the PNG of each image, by its index in the source."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        facts = {**shard._asdict(), "statistics": dataclasses.asdict(shard.statistics)}
        facts["classes"] = None if shard.classes is None else shard.classes.to_json()
        archive.writestr(FACTS, json.dumps(facts))
        for index, png in masks.items():
            archive.writestr(f"{index}.png", png)
    write_whole(path, content.getvalue())


def read_shard(path: epath.PathLike) -> Shard:
    """Reads shard.json of a shard.

    Raises:
      UserError: the file is damaged.
    """
    with reading(path, "the pseudo-masks"), epath.Path(path).open("rb") as file:
        with zipfile.ZipFile(file) as archive:
            facts = parse_json(archive.read(FACTS).decode())
        ids, count = texts(facts["image_ids"], "image_ids"), facts["statistics"]
        if not ids or not isinstance(facts["request"], dict):
            raise ValueError(f"{FACTS} has no image_ids, or no request")
        integers = lambda key: [whole(number, key) for number in array(count[key], key)]
        statistics = Statistics(
            images=whole(count["images"], "images"),
            masks=integers("masks"),
            confidence=integers("confidence"),
            dropped=integers("dropped"),
            covered=float(count["covered"]),
        )
        skipped = [whole(index, "skipped") for index in facts["skipped"]]
        named = facts.get("classes")
        classes = None if named is None else ClassList.from_json(text(named, "classes"))
    return Shard(facts["request"], ids, skipped, statistics, classes)


class PseudoMasks(Wrapped):
    """A source with the segments of pseudo-masks, without classes, for the images that have none of their own.

    With label maps, segments and classes come from the maps alone, one segment for each class in an image; those of the
    wrapped source are not read. An image that the teacher could not read has no segments.

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
        shards = [read_shard(path) for path in self._shards]
        if not shards:
            raise UserError(f"masks={str(masks)!r} holds no pseudo-masks, such as {shard_name(0, 1)}")
        self._firsts = np.cumsum([0, *(len(shard.image_ids) for shard in shards)])
        if len(self._shards) != int(self._shards[0].stem[-5:]) or self._firsts[-1] != len(source):
            raise UserError(
                f"the {len(shards)} shards in {folder} hold {self._firsts[-1]} images, but {source.name} has "
                f"{len(source)}: they are of another source, or some are missing"
            )
        self._ids = [name for shard in shards for name in shard.image_ids]
        self._skipped = {index for shard in shards for index in shard.skipped}
        self._labelled = shards[0].classes is not None
        if shards[0].classes is not None:
            if any(shard.classes != shards[0].classes for shard in shards):
                raise UserError(f"the shards in {folder} have different classes: label them anew")
            self.classes = shards[0].classes
            self.provides -= {"region_captions", "region_tags"}  # of other segments

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
        if self._labelled:
            return self._with_label_map(example, index)
        # A function, so that captions alone never open a mask.
        has_own = functools.cache(lambda: len(example.get("class_ids", ())) > 0)
        made: dict[str, Callable[[Any], Any]] = {
            "segments": lambda e: self._read(index, e["image"].shape[:2]),
            "class_ids": lambda e: np.full(int(e["segments"].max(initial=0)), -1, np.int32),
            "isthing": lambda e: np.ones(len(e["class_ids"]), bool),
            "iscrowd": lambda e: np.zeros(len(e["class_ids"]), bool),
            "boxes": lambda e: segment_boxes(e["segments"], len(e["class_ids"])),
        }
        either = lambda field: lambda e: example[field] if has_own() else made[field](e)
        return replaced(example, **{field: either(field) for field in made})

    def _with_label_map(self, example: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        """Returns the example with one segment for each class of its label map."""

        @functools.cache
        def split() -> tuple[np.ndarray, np.ndarray]:
            label_map = self._read(index, example["image"].shape[:2])
            if (top := int(label_map.max(initial=0))) > len(self.classes):
                raise UserError(
                    f"{self._shards[0].parent}: label map {index} has the class {top}, of only {len(self.classes)}"
                )
            found = np.unique(label_map[label_map > 0])
            number = np.zeros(len(self.classes) + 1, np.int32)
            number[found] = np.arange(1, len(found) + 1)
            return number[label_map], (found - 1).astype(np.int32)

        isthing = np.asarray(self.classes.isthing, bool)
        return replaced(
            example,
            segments=lambda _: split()[0],
            class_ids=lambda _: split()[1],
            isthing=lambda _: isthing[split()[1]],
            iscrowd=lambda _: np.zeros(len(split()[1]), bool),
            boxes=lambda _: segment_boxes(split()[0], len(split()[1])),
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
