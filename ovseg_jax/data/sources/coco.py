"""COCO's official layout, read without its packages: images, panoptic masks and captions.

    DATA_DIR/val2017/*.jpg                      or DATA_DIR/images/val2017/*.jpg
    DATA_DIR/annotations/panoptic_val2017.json  and the folder panoptic_val2017/*.png beside it
    DATA_DIR/annotations/captions_val2017.json  optional

Any data set in this layout (https://cocodataset.org/#format-data) can be read, with any splits and categories.
"""

import functools
import re
from collections import Counter
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Int32, UInt8, UInt32

from ovseg_jax.data.images import read_ids, read_oriented, turn_mask
from ovseg_jax.data.source_base import Example, Extent, Regions, Source
from ovseg_jax.data.transforms import corners, segment_boxes
from ovseg_jax.errors import UserError
from ovseg_jax.reading import column, flag, numbers, objects, read_json, reading, text, whole
from ovseg_jax.vocab.classes import ClassList, rename

# An upper limit of an image's side in pixels.
_LONGEST = 1 << 20


class Coco(Source):
    """A split of COCO, sorted by image id.

    Segments keep the order of the panoptic JSON. Crowds are segments with `iscrowd`; class -1 does not occur.

    Attributes:
      name: "coco".
      classes: the categories of the panoptic JSON in its order (COCO: 133), with groups "thing" and "stuff".
    """

    def __init__(
        self,
        data_dir: epath.PathLike,
        split: str = "train2017",
        labels: epath.PathLike | None = None,
        captions: bool | None = None,
        masks: bool = True,
    ):
        """Reads the JSON files; images and PNGs are read when they are accessed.

        Args:
          data_dir: the folder with `annotations`.
          split: "train2017" or "val2017" in COCO.
          labels: a label file in OpenSeg's format with the names of each category id; by default the JSON's names,
            without "-merged", "-other" and "-stuff" and with spaces in place of other hyphens.
          captions: whether to read the captions file; None reads it if it exists.
          masks: False skips the panoptic files and reads only images and captions.

        Raises:
          UserError: a folder or file is missing or invalid.
        """
        root = epath.Path(data_dir)
        if not str(data_dir) or not root.is_dir():
            raise UserError(
                f"data_dir={str(data_dir)!r} is not a folder: give the folder that holds COCO's annotations/"
            )
        self.name = "coco"
        folders = [root / split, root / "images" / split]
        found = [folder for folder in folders if folder.is_dir()]
        if not found:
            raise UserError(
                f"there are no images of split {split!r}: neither {folders[0]} nor {folders[1]} is a folder"
            )
        self._images = found[0]
        annotations = root / "annotations"
        self._masks = annotations / f"panoptic_{split}"
        caption_file = annotations / f"captions_{split}.json"
        self._json = annotations / f"panoptic_{split}.json" if masks else caption_file
        if not masks and captions is False:
            raise UserError("coco: masks=False and captions=False leave nothing to read: set one to True")
        self.provides = frozenset({"image"})
        caption_data, panoptic = None, None
        if captions or (captions is None and caption_file.exists()) or not masks:
            caption_data = _read_lists(caption_file, ("images", "annotations"))
        if masks:
            self.provides |= {"segments", "class_ids", "boxes"}
            panoptic = _read_lists(self._json, ("images", "annotations", "categories"))
            if not self._masks.is_dir():
                raise UserError(f"the folder {self._masks} with the PNGs of {self._json.name} is missing")
        with reading(self._json):
            self.classes = coco_classes(panoptic["categories"], labels) if panoptic else ClassList()
            self._read_images((panoptic or caption_data or {})["images"])
            self._read_segments(panoptic["annotations"] if panoptic else [])
        with reading(caption_file):
            self._read_captions(caption_data["annotations"] if caption_data else [])
        if self._captions:
            self.provides |= {"captions"}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        """Returns one example, whose image and PNG are decoded when they are accessed.

        Raises:
          UserError: a file is missing or damaged, or image, PNG and JSON disagree.
        """
        self._check_index(index)
        rows = slice(int(self._first[index]), int(self._first[index + 1]))
        classes = self._segment_class[rows]
        first, last = self._first_caption[index], self._first_caption[index + 1]
        image = functools.cache(lambda: self._read_image(index))
        fields: dict[str, Any] = {
            "image": lambda _: image()[0],
            "segments": lambda _: self._read_png(
                index, self._segment_ids[rows], image()[0].shape[:2], image()[1]
            ),
            "class_ids": classes.astype(np.int32),
            "isthing": lambda _: np.asarray(self.classes.isthing, bool)[classes],
            "iscrowd": self._crowd[rows],
            "boxes": lambda example: segment_boxes(example["segments"], len(classes)),
            "captions": self._captions[first:last],
        }
        if "segments" not in self.provides:
            fields = {key: fields[key] for key in self.provides}
        return Example(**fields, image_id=str(self._ids[index]))

    def _read_image(self, index: int) -> tuple[UInt8[np.ndarray, "h w 3"], int]:
        """Reads the image, turned upright, and its EXIF orientation."""
        path = self._images / self._files[index]
        try:
            image, orientation = read_oriented(path)
        except UserError as e:
            if path.exists():
                raise
            raise UserError(f"the image {path}, listed in {self._json.name}, does not exist") from e
        height, width = self._sizes[index]
        if (height, width) != image.shape[:2]:
            exif = f"; it has the EXIF orientation {orientation}" if orientation != 1 else ""
            raise UserError(
                f"{path} is {image.shape[0]} x {image.shape[1]} (height x width) but {self._json.name} says "
                f"{height} x {width}{exif}"
            )
        return image, orientation

    def _read_png(
        self, index: int, ids: Int[np.ndarray, "n"], size: tuple[int, int], orientation: int
    ) -> Int32[np.ndarray, "h w"]:
        if not self._pngs[index]:
            return np.zeros(size, np.int32)
        png, path = self._masks / self._pngs[index], self._images / self._files[index]
        stored = turn_mask(read_ids(png, "the PNG"), png, path, size, orientation)
        return number_segments(stored, ids, png, self._json.name)

    def extent(self) -> Extent:
        """Returns the extent from the JSON, without opening an image."""
        if not len(self):
            return Extent(1, 1, 1)
        height, width = self._sizes.max(0)
        return Extent(int(height), int(width), max(1, int(np.diff(self._first).max())))

    def regions(self) -> Regions:
        """Returns every segment that is not a crowd from the JSON, without opening an image.

        Raises:
          UserError: a segment in the JSON has no box.
        """
        if np.isnan(self._boxes).any():
            wrong = int(self._segment_ids[np.isnan(self._boxes).any(1)][0])
            raise UserError(f"{self._json}: the segment {wrong} has no 'bbox', which is needed to crop it")
        counts = np.diff(self._first)
        image = np.repeat(np.arange(len(self), dtype=np.int32), counts)
        segment = np.arange(len(image), dtype=np.int32) - np.repeat(self._first[:-1], counts).astype(np.int32)
        boxes = corners(self._boxes)
        kept = ~self._crowd
        return Regions(image[kept], segment[kept], self._segment_class[kept], boxes[kept])

    # The JSONs' content is kept in flat arrays: as dicts, the 1.3 million segments of train2017 would take a gigabyte
    # in every worker process.

    def _read_images(self, images: list[dict[str, Any]]) -> None:
        ids = column(images, "id", whole, of="image")
        order = np.argsort(np.array(ids, np.int64), kind="stable")
        self._ids = np.array(ids, np.int64)[order]
        if (double := self._ids[1:][np.diff(self._ids) == 0]).size:
            raise ValueError(f"it lists the image {double[0]} twice")
        files = column(images, "file_name", text, of="image")
        if "" in files:
            raise ValueError(f"entry {files.index('')} of 'images' has an empty 'file_name'")
        self._files = [files[k] for k in order]
        sides = [column(images, key, whole, 1, _LONGEST, of="image") for key in ("height", "width")]
        self._sizes = np.array(sides, np.int32).T.reshape(-1, 2)[order]
        self._position = {int(image): k for k, image in enumerate(self._ids)}

    def _read_segments(self, annotations: list[dict[str, Any]]) -> None:
        index = {category: k for k, category in enumerate(self.classes.ids)}
        files = column(annotations, "file_name", text, of="annotation")
        infos = column(annotations, "segments_info", objects, of="annotation")
        by_image: dict[int, int] = {}
        for row, image in enumerate(column(annotations, "image_id", whole, of="annotation")):
            if image not in self._position:
                raise ValueError(f"an annotation has the image_id {image}, which 'images' does not list")
            if by_image.setdefault(self._position[image], row) != row:
                raise ValueError(f"it has two annotations for the image {image}")
        self._pngs = [files[by_image[k]] if k in by_image else "" for k in range(len(self))]
        rows = [infos[by_image[k]] if k in by_image else [] for k in range(len(self))]
        flat = [segment for segments in rows for segment in segments]
        self._first = np.cumsum([0, *map(len, rows)])
        # In the PNG 0 is void, and ids have three bytes.
        self._segment_ids = np.array(column(flat, "id", whole, 1, (1 << 24) - 1, of="segment"), np.int64)
        for first, last in zip(self._first[:-1], self._first[1:], strict=True):
            found, counts = np.unique(self._segment_ids[first:last], return_counts=True)
            if len(found) < last - first:
                raise ValueError(f"two segments of one image have the id {found[counts > 1][0]}")
        categories = column(flat, "category_id", whole, of="segment")
        if unknown := [category for category in categories if category not in index]:
            raise ValueError(f"a segment has the category_id {unknown[0]}, which 'categories' does not list")
        self._segment_class = np.array([index[category] for category in categories], np.int32)
        self._crowd = np.array(column(flat, "iscrowd", flag, default=False, of="segment"), bool)
        boxes = column(flat, "bbox", numbers, 4, default=[np.nan] * 4, of="segment")
        self._boxes = np.array(boxes, np.float32).reshape(-1, 4)

    def _read_captions(self, annotations: list[dict[str, Any]]) -> None:
        spoken: list[list[str]] = [[] for _ in range(len(self))]
        images, captions = (
            column(annotations, "image_id", whole, of="annotation"),
            column(annotations, "caption", text, of="annotation"),
        )
        for image, caption in zip(images, captions, strict=True):
            k = self._position.get(image)  # panoptic files may cover fewer images
            if k is not None and (words := " ".join(caption.split())):
                spoken[k].append(words)
        self._captions = [caption for captions in spoken for caption in captions]
        self._first_caption = np.cumsum([0, *map(len, spoken)])
        del self._position


def coco_classes(categories: list[dict[str, Any]], labels: epath.PathLike | None = None) -> ClassList:
    """Returns the categories of a panoptic JSON in its order, with the groups "thing" and "stuff".

    Args:
      categories: its list of categories.
      labels: a label file with other names for them; by default the JSON's, simplified where that is unambiguous.

    Raises:
      ValueError: an entry is not a category, or two have the same id.
      UserError: the label file cannot be read, or lacks a category.
    """
    ids, raw = column(categories, "id", whole, of="category"), column(categories, "name", text, of="category")
    if double := [k for k, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"it lists the category {double[0]} twice")
    if labels:
        names = [(r,) for r in raw]
    else:
        if not all(name.strip() for name in raw):
            raise ValueError("a category has an empty name")
        plain = Counter(map(_plain_name, raw))
        names = [(p,) if plain[p] == 1 and p else (r,) for r in raw for p in [_plain_name(r)]]
    isthing = column(categories, "isthing", flag, default=True, of="category")
    groups = {
        "thing": tuple(k for k, thing in enumerate(isthing) if thing),
        "stuff": tuple(k for k, thing in enumerate(isthing) if not thing),
    }
    classes = ClassList(tuple(names), tuple(ids), tuple(isthing), {g: m for g, m in groups.items() if m})
    return rename(classes, labels) if labels else classes


def _plain_name(name: str) -> str:
    """Returns a COCO name in plain words: "wall-other-merged" becomes "wall", "floor-wood" "floor wood"."""
    return re.sub(r"(-(merged|other|stuff))+$", "", name).replace("-", " ")


def number_segments(
    stored: UInt32[np.ndarray, "h w"], ids: Int[np.ndarray, "n"], path: Any, json_name: str
) -> Int32[np.ndarray, "h w"]:
    """Converts stored ids to segment numbers 1.. in the order of `ids`; 0 is void.

    Args:
      stored: the ids of the PNG.
      ids: the ids of the segments in the JSON.
      path: the PNG's name in messages.
      json_name: the JSON's.

    Raises:
      UserError: the PNG does not hold the segments `ids`.
    """
    flat = stored.astype(np.int32).ravel()
    # One lookup for each run of equal pixels instead of each pixel.
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    runs = flat[starts]
    order = np.argsort(ids)
    known = np.concatenate([[0], ids[order]])
    place = np.minimum(np.searchsorted(known, runs), len(known) - 1)
    if (wrong := runs[known[place] != runs]).size:
        raise UserError(
            f"{path} and {json_name} disagree: the PNG has a segment {int(wrong[0])} that the JSON lacks"
        )
    if (absent := np.setdiff1d(ids, runs)).size:
        raise UserError(
            f"{path} and {json_name} disagree: the JSON has a segment {int(absent[0])} that the PNG lacks"
        )
    number = np.concatenate([[0], order + 1]).astype(np.int32)
    return np.repeat(number[place], np.diff(starts, append=flat.size)).reshape(stored.shape)


def _read_lists(path: epath.Path, keys: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    if not path.exists():
        raise UserError(f"the file {path} is missing")
    data = read_json(path)
    if missing := [key for key in keys if not isinstance(data, dict) or not isinstance(data.get(key), list)]:
        raise UserError(f"{path} is not in COCO's format: it has no list {missing[0]!r}")
    with reading(path):
        return {key: objects(data[key], repr(key)) for key in keys}
