"""PASCAL Context: its 59 most frequent classes, and all 459."""

import posixpath
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.images import Encoded, read_header
from ovseg_jax.datasets.base import Download, Entry, segments_of_map
from ovseg_jax.datasets.matlab import read_label_map
from ovseg_jax.datasets.packed import Packed
from ovseg_jax.datasets.regions import decode_rle
from ovseg_jax.errors import UserError
from ovseg_jax.reading import column, objects, reading, text, whole
from ovseg_jax.vocab.classes import ClassList

_HOMEPAGE = "https://cs.stanford.edu/~roozbeh/pascal-context/"
_LICENCE = "annotations: none stated; images: Flickr's terms of use, for research"
_VOC2010 = Download(
    "VOCtrainval_03-May-2010.tar",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
    "images",
)
# The number of each class among the 459 and its name there.
_FREQUENT = (
    "2 aeroplane; 9 bag; 18 bed; 19 bedclothes; 22 bench; 23 bicycle; 25 bird; 31 boat; 33 book; 34 bottle; "
    "44 building; 45 bus; 46 cabinet; 59 car; 65 cat; 68 ceiling; 72 chair; 80 cloth; 85 computer; 98 cow; "
    "104 cup; 105 curtain; 113 dog; 115 door; 144 fence; 158 floor; 159 flower; 162 food; 187 grass; 189 "
    "ground; 207 horse; 220 keyboard; 232 light; 258 motorbike; 259 mountain; 260 mouse; 284 person; 295 "
    "plate; 296 platform; 308 pottedplant; 324 road; 326 rock; 347 sheep; 349 shelves; 354 sidewalk; 355 "
    "sign; 360 sky; 366 snow; 368 sofa; 397 table; 415 track; 416 train; 420 tree; 424 truck; 427 tvmonitor; "
    "440 wall; 445 water; 454 window; 458 wood"
)
# Ours: those that can be counted.
_THINGS = (
    "aeroplane bag bed bench bicycle bird boat book bottle bus cabinet car cat chair computer cow cup dog "
    "door flower horse keyboard light motorbike mouse person plate pottedplant sheep shelves sign sofa table "
    "train truck tvmonitor window"
).split()


def frequent_classes() -> tuple[ClassList, dict[int, int]]:
    """Returns the 59 classes with the ids 1 to 59, and the id of each of their numbers among the 459."""
    pairs = [entry.split(" ", 1) for entry in _FREQUENT.split("; ")]
    names = tuple((name,) for _, name in pairs)
    ids = tuple(range(1, len(pairs) + 1))
    classes = ClassList(names, ids, tuple(name in _THINGS for (name,) in names))
    return classes, {int(number): k for k, (number, _) in zip(ids, pairs, strict=True)}


class PascalContext59(Packed):
    """The 59 most frequent classes, from the merged annotation of the Detail API; other pixels are void.

    Class ids are 1 to 59, in the order of the classes' numbers among the 459, as in mmsegmentation's label maps, where
    0 is background.
    """

    name = "pascal_context_59"
    about = "4,998 training and 5,105 validation images of PASCAL VOC 2010 with 59 classes"
    homepage, licence = _HOMEPAGE, _LICENCE
    download = (
        _VOC2010,
        Download(
            "trainval_merged.json",
            "https://codalabuser.blob.core.windows.net/public/trainval_merged.json",
            "annotations and the split; the Wayback Machine keeps copies",
        ),
    )
    splits = ("train", "val")
    provides = frozenset({"image", "segments", "class_ids"})
    archives = ("VOCtrainval_03-May-2010.tar", "trainval_merged*.zip")

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        self.classes, self._ids = frequent_classes()

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split with their masks in COCO's run-length encoding."""
        self.check_split(split)
        name = self.need("trainval_merged.json")
        images = self.files(self.need_folder("VOC2010/JPEGImages", "JPEGImages", suffix=".jpg"), ".jpg")
        data = self.json(name)
        with reading(self.members.where(name)):
            rows = [row for row in objects(data["images"], "'images'") if row.get("phase") == split]
            files = column(rows, "file_name", text, of="image")
            numbers = column(rows, "image_id", whole, of="image")
            masks: dict[int, list[Any]] = {number: [] for number in numbers}
            annotations = objects(data["annos_segmentation"], "'annos_segmentation'")
            owners = column(annotations, "image_id", whole, of="annotation")
            kinds = column(annotations, "category_id", whole, of="annotation")
            for owner, kind, row in zip(owners, kinds, annotations, strict=True):
                if owner in masks:
                    masks[owner].append([kind, row["segmentation"]])
        stems = [posixpath.splitext(file)[0] for file in files]
        self.present(split, stems, images)
        for stem, number in sorted(zip(stems, numbers, strict=True)):
            yield Entry(stem, {"image": images[stem], "masks": masks[number]})

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image`, `segments` and `class_ids` of an image; later masks cover earlier ones."""
        image = self.encoded(entry.data["image"])
        size, orientation = read_header(image)
        stored = size[::-1] if orientation > 4 else size
        where = f"trainval_merged.json, the masks of {entry.key},"
        labels = np.zeros(stored, np.int32)
        with reading(where):
            for kind, mask in entry.data["masks"]:
                labels[decode_rle(mask, stored)] = self._ids.get(kind, 0)
        labels = self.upright(labels, Encoded(where, b""), image)
        segments, ids = segments_of_map(labels, self.classes, (0,), where)
        return {"image": image.data, "segments": segments, "class_ids": ids}


class PascalContext459(Packed):
    """All 459 classes, from MATLAB files; class ids are those of labels.txt, and 0 is void."""

    name = "pascal_context_459"
    about = "4,998 training and 5,105 validation images of PASCAL VOC 2010 with 459 classes"
    homepage, licence = _HOMEPAGE, _LICENCE
    download = (
        _VOC2010,
        Download("trainval.tar.gz", f"{_HOMEPAGE}trainval.tar.gz", "label maps"),
        Download("labels.txt", f"{_HOMEPAGE}labels.txt", "names of the classes"),
    )
    splits = ("train", "val")
    provides = frozenset({"image", "segments", "class_ids"})
    archives = ("VOCtrainval_03-May-2010.tar", "trainval*.tar.gz", "trainval*.tar")

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        name = self.need("labels.txt")
        rows = [re.fullmatch(r"(\d{1,6})\s*:\s*(\S.*)", line) for line in self.lines(name)]
        found = {int(row[1]): row[2] for row in rows if row}
        if len(found) < len(rows) or not found or 0 in found:
            raise UserError(
                f"{self.members.where(name)} cannot be read: expected lines such as '2: aeroplane', each number once"
            )
        # Number 431 of the published list is "unknown", which stays a class, as in the published evaluations.
        self.classes = ClassList.things([found[k] for k in sorted(found)], sorted(found))

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of ImageSets/Main/SPLIT.txt of VOC 2010, which is the split of the 459 classes."""
        self.check_split(split)
        listing = self.need(f"VOC2010/ImageSets/Main/{split}.txt", f"ImageSets/Main/{split}.txt")
        stems = [line.split()[0] for line in self.lines(listing)]
        images = self.files(self.need_folder("VOC2010/JPEGImages", "JPEGImages", suffix=".jpg"), ".jpg")
        maps = self.files(self.need_folder("trainval", "", suffix=".mat"), ".mat")
        self.present(split, stems, images)
        if missing := [stem for stem in stems if stem not in maps]:
            raise UserError(
                f"{self.name}: {len(missing)} of {len(stems)} images of {split} have no label map, such as {missing[0]}"
            )
        for stem in sorted(stems):
            yield Entry(stem, {"image": images[stem], "map": maps[stem]})

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image`, `segments` and `class_ids` of an image."""
        image, file = self.encoded(entry.data["image"]), self.encoded(entry.data["map"])
        labels = self.upright(read_label_map(file, "LabelMap"), file, image)
        segments, ids = segments_of_map(labels, self.classes, (0,), str(file))
        return {"image": image.data, "segments": segments, "class_ids": ids}
