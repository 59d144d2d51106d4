"""Objects365 v2: boxes of 365 classes."""

import posixpath
from array import array as Column
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.images import read_header
from ovseg_jax.data.transforms import corners
from ovseg_jax.datasets.base import Download, Entry
from ovseg_jax.datasets.packed import MISSING, Packed
from ovseg_jax.reading import array, column, flag, numbers, objects, reading, text, whole
from ovseg_jax.vocab.classes import ClassList

TYPOS = {
    "Bakset": "Basket",
    "Ballon": "Balloon",
    "Billards": "Billiards",
    "Buttefly": "Butterfly",
    "Campel": "Camel",
    "Dinning Table": "Dining Table",
    "Extention Cord": "Extension Cord",
    "Hamimelon": "Hami melon",
    "Hotair ballon": "Hot air balloon",
    "Meat ball": "Meatball",
    "Moniter": "Monitor",
    "Mushroon": "Mushroom",
    "Noddles": "Noodles",
    "Table Teniis paddle": "Table Tennis paddle",
    "Tape Measur": "Tape Measure",
    "Tea pot": "Teapot",
}
"""Misspelt names of the annotation file and how they are read."""

_HOMEPAGE = "https://www.objects365.org"


class Objects365(Packed):
    """Objects365 v2; names are read in lower case, without misspellings, and "A/B" as two names of a class.

    The annotations of a split are parsed at once, which takes memory of about two and a half times the file's size.
    """

    name = "objects365_v2"
    about = "1,742,289 training and 80,000 validation images with boxes of 365 classes"
    homepage = _HOMEPAGE
    licence = "annotations: CC BY 4.0; images: Flickr's terms of use, for research"
    download = (
        Download(
            "zhiyuan_objv2_train.json",
            f"{_HOMEPAGE}/download.html",
            "annotations; or as .tar.gz; reading takes 2.5 times their size of memory",
        ),
        Download("zhiyuan_objv2_val.json", f"{_HOMEPAGE}/download.html"),
        Download(
            "patch0.tar.gz to patch50.tar.gz", f"{_HOMEPAGE}/download.html", "images, below train and val"
        ),
    )
    options = (MISSING,)
    splits = ("train", "val")
    provides = frozenset({"image", "class_ids", "boxes"})
    archives = ("zhiyuan_objv2_*.tar.gz", "patch*.tar.gz", "patch*.tar")

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        name = self.need("zhiyuan_objv2_val.json", "zhiyuan_objv2_train.json")
        data = self.json(name)
        with reading(self.members.where(name)):
            self.classes = _classes(objects(data["categories"], "'categories'"))

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split with their boxes; boxes without area are counted in `notes`."""
        self.check_split(split)
        name = self.need(f"zhiyuan_objv2_{split}.json")
        index = {k: row for row, k in enumerate(self.classes.ids)}
        boxes = _Boxes()
        data = self.json(name, boxes.take)
        with reading(self.members.where(name)):
            images = objects(data["images"], "'images'")
            files = [posixpath.basename(file) for file in column(images, "file_name", text, of="image")]
            owners = column(images, "id", whole, of="image")
            if array(data["annotations"], "'annotations'") != [None] * len(boxes.kinds):
                raise ValueError("an annotation has no 'bbox', or something else has one")
            kinds, sides = np.array(boxes.kinds), np.array(boxes.sides).reshape(-1, 4)
            for values, listed, what in ((boxes.owners, owners, "image"), (kinds, list(index), "category")):
                if not (valid := np.isin(values, np.array(listed, np.int64))).all():
                    raise ValueError(f"annotation {np.argmin(valid)}, counted from 0, is of no listed {what}")
        area = (sides[:, 2:] > 0).all(1)
        empty = int((~area).sum())
        order = np.flatnonzero(area)[np.argsort(np.array(boxes.owners)[area], kind="stable")]
        sorted_owners = np.array(boxes.owners)[order]
        if empty:
            self.notes.append(f"{split}: {empty} boxes without area were left out")
        # Images lie in patch folders, below train or val where both splits are downloaded; their names are unique.
        known = {posixpath.basename(path): path for path in self.members.names(suffix=".jpg")}
        there = set(self.present(split, files, known))
        for file, owner in sorted(zip(files, owners, strict=True)):
            if file in there:
                first, last = np.searchsorted(sorted_owners, (owner, owner + 1))
                rows = [
                    [index[int(kinds[k])], sides[k].tolist(), bool(boxes.crowds[k])]
                    for k in order[first:last]
                ]
                yield Entry(file.removesuffix(".jpg"), {"image": known[file], "rows": rows})

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image`, `class_ids`, `iscrowd` and `boxes` of an image; boxes are cut at its edges."""
        image = self.encoded(entry.data["image"])
        (height, width), _ = read_header(image)
        rows = entry.data["rows"]
        boxes = np.array([row[1] for row in rows], np.float32).reshape(-1, 4)
        boxes = corners(boxes)
        boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return {
            "image": image.data,
            "class_ids": np.array([row[0] for row in rows], np.int32)[kept],
            "iscrowd": np.array([row[2] for row in rows], bool)[kept],
            "boxes": boxes[kept],
        }


class _Boxes:
    """The boxes of a file of annotations, as columns: 49 bytes a box."""

    def __init__(self) -> None:
        self.owners, self.kinds = Column("q"), Column("q")
        self.sides, self.crowds = Column("d"), Column("b")

    def take(self, value: dict[str, Any]) -> dict[str, Any] | None:
        """Stores an object that has a box and returns None; returns any other as it is.

        Raises:
          ValueError: it has no image, no category, or another kind of box.
        """
        if "bbox" not in value:
            return value
        box = numbers(value["bbox"], "'bbox'", 4)
        crowd = flag(value.get("iscrowd", 0), "'iscrowd'")
        self.owners.append(whole(value["image_id"], "'image_id'"))
        self.kinds.append(whole(value["category_id"], "'category_id'"))
        self.sides.extend(box)
        self.crowds.append(crowd)
        return None


def _classes(categories: list[dict[str, Any]]) -> ClassList:
    ids = column(categories, "id", whole, of="category")
    names = column(categories, "name", text, of="category")
    if not ids or len(set(ids)) < len(ids):
        raise ValueError("two categories have the same id, or there is none")
    rows = sorted(zip(ids, names, strict=True))
    groups = []
    for _, name in rows:
        # A name such as "Moniter/TV" lists two.
        parts = [" ".join(part.split()) for part in name.split("/") if part.strip()]
        if not parts:
            raise ValueError(f"the name {name!r} is empty")
        groups.append(tuple(dict.fromkeys(TYPOS.get(part, part).lower() for part in parts)))
    return ClassList.things(groups, (k for k, _ in rows))
