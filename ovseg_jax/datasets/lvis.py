"""LVIS v1: instances of 1,203 classes on COCO's images."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.images import Encoded, read_header
from ovseg_jax.data.transforms import corners
from ovseg_jax.datasets.base import Download, Entry, without_hidden
from ovseg_jax.datasets.packed import Packed
from ovseg_jax.datasets.regions import check_polygons, decode_polygons
from ovseg_jax.errors import UserError
from ovseg_jax.reading import column, number, numbers, objects, reading, text, texts, whole
from ovseg_jax.vocab.classes import ClassList

_COCO = "http://images.cocodataset.org/zips"
_LVIS = "https://dl.fbaipublicfiles.com/LVIS"


class Lvis(Packed):
    """LVIS v1; a class has its name and its synonyms, and the groups "rare", "common" and "frequent" hold the classes.

    Masks may overlap, but a pixel of `segments` has one owner: smaller masks lie over larger ones, and an instance that
    is wholly covered is left out. Boxes are the annotation's. The classes that are known to be absent from an image,
    which LVIS's average precision needs, stay in the annotation file.
    """

    name = "lvis_v1"
    about = "100,170 training and 19,809 validation images of COCO 2017 with instances of 1,203 classes"
    homepage = "https://www.lvisdataset.org"
    licence = "annotations: CC BY 4.0; images: Flickr's terms of use, each with a licence of its own"
    download = (
        Download("lvis_v1_train.json.zip", f"{_LVIS}/lvis_v1_train.json.zip"),
        Download("lvis_v1_val.json.zip", f"{_LVIS}/lvis_v1_val.json.zip"),
        Download("train2017.zip", f"{_COCO}/train2017.zip", "images of train, and some of val"),
        Download("val2017.zip", f"{_COCO}/val2017.zip", "images of val"),
    )
    splits = ("train", "val")
    provides = frozenset({"image", "segments", "class_ids", "boxes"})
    wide = True
    archives = ("lvis_v1_*.json.zip", "train2017.zip", "val2017.zip")

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        name = self.need("lvis_v1_val.json", "lvis_v1_train.json")
        data = self.json(name)
        with reading(self.members.where(name)):
            self.classes = _classes(objects(data["categories"], "'categories'"))

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split with their instances; those with unusable polygons are counted in `notes`."""
        self.check_split(split)
        name = self.need(f"lvis_v1_{split}.json")
        data = self.json(name)
        index = {k: row for row, k in enumerate(self.classes.ids)}
        with reading(self.members.where(name)):
            images = objects(data["images"], "'images'")
            files = ["/".join(url.split("/")[-2:]) for url in column(images, "coco_url", text, of="image")]
            owners = column(images, "id", whole, of="image")
            rows: dict[int, list[Any]] = {owner: [] for owner in owners}
            unusable = 0
            for annotation in objects(data["annotations"], "'annotations'"):
                owner = whole(annotation["image_id"], "'image_id'")
                kind = whole(annotation["category_id"], "'category_id'")
                if owner not in rows or kind not in index:
                    raise ValueError(f"annotation {annotation.get('id')} is of no listed image or category")
                box = numbers(annotation["bbox"], "'bbox'", 4)
                try:
                    check_polygons(annotation["segmentation"])
                except ValueError:
                    unusable += 1
                    continue
                area = number(annotation["area"], "'area'")
                rows[owner].append([index[kind], box, area, annotation["segmentation"]])
        if unusable:
            self.notes.append(f"{split}: {unusable} instances without a usable polygon were left out")
        known: dict[str, str] = {}
        for folder in {file.partition("/")[0] for file in files}:
            inside = self.members.find_folder(folder, suffix=".jpg")
            if inside is not None:
                known |= {f"{folder}/{stem}.jpg": path for stem, path in self.files(inside, ".jpg").items()}
        self.present(split, files, known)
        for file, owner in sorted(zip(files, owners, strict=True)):
            yield Entry(
                file.rpartition("/")[2].removesuffix(".jpg"), {"image": known[file], "rows": rows[owner]}
            )

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image`, `segments`, `class_ids` and `boxes` of an image."""
        image = self.encoded(entry.data["image"])
        size, orientation = read_header(image)
        if orientation != 1:
            raise UserError(
                f"{image} has the EXIF orientation {orientation}, but masks are read for upright ones only"
            )
        rows = sorted(entry.data["rows"], key=lambda row: -row[2])
        segments = np.zeros(size, np.int32)
        with reading(Encoded(f"{self.name}, the masks of {entry.key},", b"")):
            for k, row in enumerate(rows, 1):
                segments[decode_polygons(row[3], size)] = k
        segments, seen = without_hidden(segments, len(rows))
        kept = [row for row, own in zip(rows, seen, strict=True) if own]
        boxes = np.array([row[1] for row in kept], np.float32).reshape(-1, 4)
        return {
            "image": image.data,
            "segments": segments,
            "class_ids": np.array([row[0] for row in kept], np.int32),
            "boxes": corners(boxes),
        }


def _classes(categories: list[dict[str, Any]]) -> ClassList:
    """Converts LVIS's categories, in the order of their ids; `_` in names is a space."""
    ids = column(categories, "id", whole, of="category")
    first = column(categories, "name", text, of="category")
    others = column(categories, "synonyms", texts, of="category")
    often = column(categories, "frequency", text, of="category")
    if not ids or len(set(ids)) < len(ids):
        raise ValueError("two categories have the same id, or there is none")
    rows = sorted(zip(ids, first, others, often, strict=True))
    names = tuple(
        tuple(dict.fromkeys(" ".join(name.replace("_", " ").split()) for name in (own, *more)))
        for _, own, more, _ in rows
    )
    groups = {
        name: tuple(k for k, row in enumerate(rows) if row[3] == letter)
        for letter, name in (("r", "rare"), ("c", "common"), ("f", "frequent"))
    }
    return ClassList(
        names, tuple(row[0] for row in rows), (True,) * len(rows), {k: v for k, v in groups.items() if v}
    )
