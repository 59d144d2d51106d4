"""COCO's official layout, read directly: images, panoptic masks and captions, by random access.

    DATA_DIR/val2017/*.jpg                      or DATA_DIR/images/val2017/*.jpg
    DATA_DIR/annotations/panoptic_val2017.json  and the folder panoptic_val2017/*.png beside it
    DATA_DIR/annotations/captions_val2017.json  optional

https://cocodataset.org/#format-data. Any data set in this layout is read, whatever its split and categories.
"""

import io
import json
import re
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Int32, UInt8
from PIL import Image

from ovseg_jax.data.images import read_image
from ovseg_jax.data.source_base import Example, Extent, Regions, Source
from ovseg_jax.data.transforms import segment_boxes
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList, read_label_file


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
        """Reads the JSON files; images and PNGs are read when they are asked for.

        Args:
          data_dir: the folder with `annotations`.
          split: "train2017" or "val2017" in COCO.
          labels: a label file of OpenSeg's format with the names of each category id; otherwise the JSON's
            names, of which "-merged", "-other" and "-stuff" are cut and other hyphens become spaces.
          captions: whether to read the captions file; None reads it where there is one.
          masks: False reads no panoptic files: images and captions alone.

        Raises:
          UserError: a folder or file is missing or is not what it should be.
        """
        root = epath.Path(data_dir)
        if not str(data_dir) or not root.is_dir():
            raise UserError(
                f"data_dir={str(data_dir)!r} is not a folder: give the one that holds COCO's annotations/"
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
        self._json = annotations / f"panoptic_{split}.json"
        self._masks = annotations / f"panoptic_{split}"
        caption_file = annotations / f"captions_{split}.json"
        if not masks and captions is False:
            raise UserError("coco: with masks=False and captions=False nothing would be read")
        self.provides = frozenset({"image"})
        caption_data = None
        if captions or (captions is None and caption_file.exists()) or not masks:
            caption_data = _read_json(caption_file, ("images", "annotations"))
            self.provides |= {"captions"}
        panoptic = None
        if masks:
            self.provides |= {"segments", "class_ids", "boxes"}
            panoptic = _read_json(self._json, ("images", "annotations", "categories"))
            if not self._masks.is_dir():
                raise UserError(f"the folder {self._masks} with the PNGs of {self._json.name} is missing")
        try:
            self.classes = _classes(panoptic["categories"], labels) if panoptic else ClassList((), (), ())
            self._read_images(panoptic or caption_data or {})
            self._read_segments(panoptic["annotations"] if panoptic else [])
            self._read_captions(caption_data["annotations"] if caption_data else [])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise UserError(
                f"{self._json if panoptic else caption_file} is not in COCO's form: {_reason(e)}"
            ) from e

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        """Returns one example, whose image and PNG are decoded when they are asked for.

        Raises:
          UserError: a file is missing or damaged, or image, PNG and JSON disagree.
        """
        self._check_index(index)
        rows = slice(int(self._first[index]), int(self._first[index + 1]))
        classes = self._segment_class[rows]
        first, last = self._first_caption[index], self._first_caption[index + 1]
        fields: dict[str, Any] = {
            "image": lambda _: self._read_image(index),
            "segments": lambda _: self._read_png(index, self._segment_ids[rows]),
            "class_ids": classes.astype(np.int32),
            "isthing": lambda _: np.asarray(self.classes.isthing, bool)[classes],
            "iscrowd": self._crowd[rows],
            "boxes": lambda example: segment_boxes(example["segments"], len(classes)),
            "captions": self._captions[first:last],
        }
        if "segments" not in self.provides:
            fields = {key: fields[key] for key in self.provides}
        return Example(**fields, image_id=str(self._ids[index]))

    def _read_image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        path = self._images / self._files[index]
        try:
            image = read_image(path)
        except UserError as e:
            if path.exists():
                raise
            raise UserError(f"the image {path} is named in {self._json.name} but is not there") from e
        if tuple(self._sizes[index]) != image.shape[:2]:
            height, width = self._sizes[index]
            raise UserError(
                f"{path} is {image.shape[0]} x {image.shape[1]} (height x width) but {self._json.name} says "
                f"{height} x {width}"
            )
        return image

    def _read_png(self, index: int, ids: Int[np.ndarray, "n"]) -> Int32[np.ndarray, "h w"]:
        height, width = (int(n) for n in self._sizes[index])
        if not self._pngs[index]:
            return np.zeros((height, width), np.int32)
        return _read_panoptic_png(self._masks / self._pngs[index], (height, width), ids, self._json.name)

    def extent(self) -> Extent:
        """From the JSON, without opening an image."""
        if not len(self):
            return Extent(1, 1, 1)
        height, width = self._sizes.max(0)
        return Extent(int(height), int(width), max(1, int(np.diff(self._first).max())))

    def regions(self) -> Regions:
        """Every segment that is no crowd, from the JSON, without opening an image.

        Raises:
          UserError: a segment in the JSON has no box.
        """
        if np.isnan(self._boxes).any():
            wrong = int(self._segment_ids[np.isnan(self._boxes).any(1)][0])
            raise UserError(f"{self._json}: the segment {wrong} has no 'bbox', by which it would be cut out")
        counts = np.diff(self._first)
        image = np.repeat(np.arange(len(self), dtype=np.int32), counts)
        segment = np.arange(len(image), dtype=np.int32) - np.repeat(self._first[:-1], counts).astype(np.int32)
        boxes = np.concatenate([self._boxes[:, :2], self._boxes[:, :2] + self._boxes[:, 2:]], 1)
        kept = ~self._crowd
        return Regions(image[kept], segment[kept], self._segment_class[kept], boxes[kept])

    # What the JSONs say is kept in flat arrays: as dicts, the 1.3 million segments of train2017 would take a
    # gigabyte, and every worker process gets a copy.

    def _read_images(self, data: dict[str, Any]) -> None:
        images = sorted(data["images"], key=lambda image: image["id"])
        self._files = [str(image["file_name"]) for image in images]
        self._ids = np.array([image["id"] for image in images], np.int64)
        self._sizes = np.array([(i["height"], i["width"]) for i in images], np.int32).reshape(-1, 2)
        self._position = {image["id"]: k for k, image in enumerate(images)}

    def _read_segments(self, annotations: list[dict[str, Any]]) -> None:
        index = {category: k for k, category in enumerate(self.classes.ids)}
        by_image = {self._at(a["image_id"], "an annotation"): a for a in annotations}
        self._pngs = [str(by_image[k]["file_name"]) if k in by_image else "" for k in range(len(self))]
        rows = [by_image[k]["segments_info"] if k in by_image else [] for k in range(len(self))]
        flat = [segment for segments in rows for segment in segments]
        self._first = np.cumsum([0, *map(len, rows)])
        self._segment_ids = np.array([s["id"] for s in flat], np.int64)
        self._segment_class = np.array([index[s["category_id"]] for s in flat], np.int32)
        self._crowd = np.array([s.get("iscrowd", 0) for s in flat], bool)
        self._boxes = np.array([s.get("bbox", [np.nan] * 4) for s in flat], np.float32).reshape(-1, 4)

    def _read_captions(self, annotations: list[dict[str, Any]]) -> None:
        spoken: list[list[str]] = [[] for _ in range(len(self))]
        for annotation in annotations:
            k = self._position.get(annotation["image_id"])  # panoptic files may cover fewer images
            if k is not None and (text := " ".join(annotation["caption"].split())):
                spoken[k].append(text)
        self._captions = [caption for captions in spoken for caption in captions]
        self._first_caption = np.cumsum([0, *map(len, spoken)])
        del self._position

    def _at(self, image_id: int, what: str) -> int:
        if image_id not in self._position:
            raise ValueError(f"{what} is of the image {image_id}, which is not listed under images")
        return self._position[image_id]


def _classes(categories: list[dict[str, Any]], labels: epath.PathLike | None) -> ClassList:
    """Categories in the JSON's order, named by a label file or by themselves."""
    ids = [int(category["id"]) for category in categories]
    if labels:
        listed = read_label_file(labels)
        by_id = dict(zip(listed.ids, listed.names, strict=True))
        if missing := [c for c in categories if c["id"] not in by_id]:
            raise UserError(
                f"labels={labels} has no line for category {missing[0]['id']} ({missing[0]['name']!r})"
            )
        names = [by_id[k] for k in ids]
    else:
        raw = [str(category["name"]) for category in categories]
        plain = [_plain_name(name) for name in raw]
        names = [(p,) if plain.count(p) == 1 else (r,) for p, r in zip(plain, raw, strict=True)]
    isthing = [bool(category.get("isthing", 1)) for category in categories]
    groups = {
        "thing": tuple(k for k, thing in enumerate(isthing) if thing),
        "stuff": tuple(k for k, thing in enumerate(isthing) if not thing),
    }
    return ClassList(tuple(names), tuple(ids), tuple(isthing), {g: m for g, m in groups.items() if m})


def _plain_name(name: str) -> str:
    """ "wall-other-merged" -> "wall", "floor-wood" -> "floor wood"."""
    return re.sub(r"(-(merged|other|stuff))+$", "", name).replace("-", " ")


def _read_panoptic_png(
    path: epath.Path, size: tuple[int, int], ids: Int[np.ndarray, "n"], json_name: str
) -> Int32[np.ndarray, "h w"]:
    """Segment numbers 1.. in the order of `ids` from a PNG of R + 256 G + 65536 B; 0 = void.

    Raises:
      UserError: the PNG is missing, damaged, of another size, or does not hold the segments `ids`.
    """
    try:
        image = Image.open(io.BytesIO(path.read_bytes()))
        colours = np.asarray(image.convert("RGB"), np.int32)
    except FileNotFoundError:
        raise UserError(f"the PNG {path} is named in {json_name} but is not there") from None
    except (OSError, SyntaxError, ValueError) as e:
        raise UserError(f"{path} is damaged or truncated: {e}") from e
    if colours.shape[:2] != size:
        raise UserError(
            f"{path} is {colours.shape[0]} x {colours.shape[1]} (height x width) but its image is "
            f"{size[0]} x {size[1]}"
        )
    flat = (colours @ np.array([1, 256, 65536], np.int32)).ravel()
    # Neighbours mostly agree: one look-up for each run of equal pixels instead of each pixel.
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    runs = flat[starts]
    order = np.argsort(ids)
    known = np.concatenate([[0], ids[order]])
    place = np.minimum(np.searchsorted(known, runs), len(known) - 1)
    if (wrong := runs[known[place] != runs]).size:
        raise UserError(
            f"{path} and {json_name} disagree: the PNG has a segment {int(wrong[0])} that the JSON has not"
        )
    if (absent := np.setdiff1d(ids, runs)).size:
        raise UserError(
            f"{path} and {json_name} disagree: the JSON has a segment {int(absent[0])} that the PNG has not"
        )
    number = np.concatenate([[0], order + 1]).astype(np.int32)
    return np.repeat(number[place], np.diff(starts, append=flat.size)).reshape(size)


def _read_json(path: epath.Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"the file {path} is missing") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not valid JSON: {e}") from e
    if missing := [key for key in keys if not isinstance(data, dict) or not isinstance(data.get(key), list)]:
        raise UserError(f"{path} is not in COCO's form: it has no list {missing[0]!r}")
    return data


def _reason(error: Exception) -> str:
    return f"an entry has no {error}" if isinstance(error, KeyError) else str(error)
