"""PASCAL VOC 2012: semantic maps of 20 classes, with the additional images of SBD."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.images import read_mask
from ovseg_jax.datasets.base import Download, Entry, Option, segments_of_map
from ovseg_jax.datasets.matlab import read_label_map
from ovseg_jax.datasets.packed import Packed
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.splits import load_split

NAMES = (
    "aeroplane; bicycle; bird; boat; bottle; bus; car; cat; chair; cow; dining table; dog; horse; motorbike; "
    "person; potted plant; sheep; sofa; train; tv monitor"
).split("; ")
"""The classes in plain words; the official names have no spaces. Ids are 1 to 20, in this order."""

_BORDER = 255


class Voc2012(Packed):
    """VOC 2012; the split trainaug adds the images that SBD annotates (Hariharan et al. 2011).

    trainaug holds the images of VOC's train and of SBD's train and val that are not in VOC's val: 10,582. An image of
    VOC's train has VOC's map, another SBD's, as in mmsegmentation. SegmentationClassAug.zip, which others made, holds
    both as PNG files.
    """

    name = "voc_2012"
    about = "1,464 training (with SBD 10,582) and 1,449 validation images with 20 classes of things"
    homepage = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
    licence = "annotations: none stated; images: Flickr's terms of use, for research"
    download = (
        Download(
            "VOCtrainval_11-May-2012.tar",
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        ),
        Download(
            "benchmark.tgz",
            "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
            "SBD, for the split trainaug only",
        ),
        Download(
            "SegmentationClassAug.zip",
            "https://www.dropbox.com/s/oeu149j8qtbs1x0/SegmentationClassAug.zip",
            "for maps=augmented only",
        ),
    )
    options = (
        Option(
            "background",
            ("void", "class"),
            "what the pixels of no class are: void (PAS-20), or a class of their own, id 0 (PAS-21)",
        ),
        Option(
            "maps",
            ("official", "augmented"),
            "augmented: those of SegmentationClassAug.zip, without images that have no labelled pixel, as CAT-Seg has "
            "them (cvlab-kaist/CAT-Seg, datasets/prepare_voc.py)",
        ),
        Option("zero_shot", ("no", "yes"), "groups the classes: 15 seen and 5 unseen (SPNet, ZS3, ZSSeg)"),
    )
    splits = ("train", "val", "trainaug")
    provides = frozenset({"image", "segments", "class_ids"})
    archives = ("VOCtrainval_11-May-2012.tar", "benchmark.tgz", "SegmentationClassAug.zip")

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        names, first = NAMES, 1
        if self.chosen["background"] == "class":
            names, first = ["background", *NAMES], 0
        things = tuple(name != "background" for name in names)
        self.classes = ClassList(
            tuple((name,) for name in names), tuple(range(first, len(NAMES) + 1)), things
        )
        if self.chosen["zero_shot"] == "yes":
            self.classes = load_split(self.classes, "voc")

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split with their maps."""
        self.check_split(split)
        own = self._listed(f"ImageSets/Segmentation/{'val' if split == 'val' else 'train'}.txt")
        augmented = self.chosen["maps"] == "augmented"
        folder = "SegmentationClassAug" if augmented else "SegmentationClass"
        maps = self.files(self.need_folder(f"VOC2012/{folder}", folder, suffix=".png"), ".png")
        keys: Sequence[str] = own
        if split == "trainaug":
            first, val = set(own), set(self._listed("ImageSets/Segmentation/val.txt"))
            if augmented:
                keys = sorted(maps.keys() - val)
            else:
                more = {key for part in ("train", "val") for key in self._listed(f"dataset/{part}.txt")}
                keys = sorted({*own, *more} - val)
                others = self.files(self.need_folder("dataset/cls", "cls", suffix=".mat"), ".mat")
                maps = {key: (maps if key in first else others).get(key, "") for key in keys}
        images = self.files(self.need_folder("VOC2012/JPEGImages", "JPEGImages", suffix=".jpg"), ".jpg")
        self.present(split, keys, images)
        if missing := [key for key in keys if not maps.get(key)]:
            raise UserError(
                f"{self.name}: {len(missing)} of {len(keys)} images of {split} have no map, such as {missing[0]}"
            )
        empty = [key for key in sorted(keys) if augmented and self._is_empty(maps[key])]
        if empty:
            self.notes.append(
                f"{split}: {len(empty)} images without a labelled pixel were left out, such as {empty[0]}"
            )
        for key in sorted(set(keys).difference(empty)):
            yield Entry(key, {"image": images[key], "mask": maps[key]})

    def _is_empty(self, name: str) -> bool:
        return not set(np.unique(read_mask(self.encoded(name))).tolist()).difference(self._void())

    def _void(self) -> tuple[int, ...]:
        """Returns the values of maps that mean no class."""
        return (_BORDER,) if 0 in self.classes.ids else (0, _BORDER)

    def _listed(self, name: str) -> list[str]:
        return [line.split()[0] for line in self.lines(self.need(f"VOC2012/{name}", name))]

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image`, `segments` and `class_ids` of an image; the borders of objects are void."""
        image, mask = self.encoded(entry.data["image"]), self.encoded(entry.data["mask"])
        sbd = entry.data["mask"].endswith(".mat")
        labels = read_label_map(mask, "GTcls", "Segmentation") if sbd else read_mask(mask)
        labels = self.upright(np.asarray(labels, np.int32), mask, image)
        segments, ids = segments_of_map(labels, self.classes, self._void(), str(mask))
        return {"image": image.data, "segments": segments, "class_ids": ids}
