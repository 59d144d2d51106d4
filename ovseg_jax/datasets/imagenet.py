"""ImageNet-S, ImageNet-21K and the test sets beside ImageNet, whose classes are WordNet ids and need names."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.images import read_colours
from ovseg_jax.data.sources.image_folder import WORDNET_FILES, read_names
from ovseg_jax.datasets.base import Download, Entry, Option, segments_of_map
from ovseg_jax.datasets.packed import Packed
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList

_NAMES = Option("names", (), "a file with names of WordNet ids, a line each: n01440764 tench, Tinca tinca")
_WORDS = Download(
    "words.txt",
    "https://image-net.org/data/words.txt",
    "names of all WordNet ids; for ImageNet-1k's, LOC_synset_mapping.txt of Kaggle will do",
)
_CLASSNAMES = Download(
    "classnames.txt",
    "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md",
    "CLIP's names of the 1,000 classes, which POMP and UMG-CLIP use; or LOC_synset_mapping.txt of Kaggle",
)
_LICENCE = "for non-commercial research and education (https://image-net.org/download, where one registers)"
_IGNORED = 1000


class _WordNet(Packed):
    """A reader whose classes are WordNet ids, with names from a file.

    Attributes:
      name_files: the files of names in the download, of which the first that is there is read.
    """

    name_files: tuple[str, ...] = ("words.txt", "LOC_synset_mapping.txt")

    def _named(self, wnids: Iterable[str], first: int = 0) -> ClassList:
        """Returns the classes of WordNet ids in alphabetical order, numbered from `first`.

        The names are those of the option `names`, or of the first of `name_files` in the download.

        Raises:
          UserError: there is no file of names, or it lacks an id.
        """
        path, listed = self._listed()
        chosen = sorted(wnids)
        if missing := [wnid for wnid in chosen if wnid not in listed]:
            raise UserError(f"{path} has no name for {missing[0]} and {len(missing) - 1} other classes")
        ids = range(first, first + len(chosen))
        return ClassList.things([listed[wnid] for wnid in chosen], ids).say_shared(path)

    def _listed(self) -> tuple[epath.PathLike, dict[str, tuple[str, ...]]]:
        """Returns the file of names, and the names of the ids that it lists."""
        path = self.chosen["names"] or self.source / self.need(*self.name_files)
        return path, read_names(path)


class ImageNetS(_WordNet):
    """ImageNet-S: masks of ImageNet's own object in its images; class ids are the masks' values, from 1.

    The data set is what the authors' `data_preparation.sh` makes of ImageNet-1k and their masks.
    """

    name = "imagenet_s"
    about = "9,190 training and 12,419 validation images of ImageNet with masks of 919 classes"
    homepage = "https://lusseg.github.io"
    licence = f"masks: none stated; images: {_LICENCE}"
    download = (
        Download(
            "ImageNetS919",
            "https://github.com/LUSSeg/ImageNet-S",
            "the folder that data_preparation.sh writes, with train-semi, validation and their -segmentation folders",
        ),
        _WORDS,
    )
    options = (Option("size", ("919", "300", "50"), "the number of classes"), _NAMES)
    splits = ("train", "val")
    provides = frozenset({"image", "segments", "class_ids"})
    archives = ("ImageNetS*.zip", "ImageNetS*.tar", "ImageNetS*.tar.gz")

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        size = self.chosen["size"]
        self._folders = {"train": f"ImageNetS{size}/train-semi", "val": f"ImageNetS{size}/validation"}
        wnids = {_class_folder(name) for folder in self._folders.values() for name in self._images(folder)}
        if len(wnids) != int(size):
            raise UserError(
                f"{self.name}: {self.source} holds {len(wnids)} class folders in train-semi and validation, but "
                f"ImageNetS{size} has {size}"
            )
        self.classes = self._named(wnids, 1)

    def _images(self, folder: str) -> list[str]:
        names = self.members.names(suffix=".JPEG")
        pattern = re.compile(rf"(?:^|/){folder}/n\d{{8}}/[^/]+$")
        if not (found := [name for name in names if pattern.search(name)]):
            raise UserError(self._missing(f"folder {folder} with folders of .JPEG files"))
        return found

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split with their masks; train is the authors' train-semi."""
        self.check_split(split)
        folder = self._folders[split]
        images = {_end(name): name for name in self._images(folder)}
        masks = {
            _end(name): name
            for name in self.members.names(suffix=".png")
            if f"/{folder}-segmentation/" in f"/{name}"
        }
        for key, image, mask in self.paired(split, images, masks):
            yield Entry(key.rpartition("/")[2], {"image": image, "mask": mask})

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image`, `segments` and `class_ids` of an image; 0, another class, and 1000, ignored, are void."""
        image, mask = self.encoded(entry.data["image"]), self.encoded(entry.data["mask"])
        colours = self.upright(read_colours(mask, "the mask"), mask, image).astype(np.int32)
        labels = colours[..., 0] + 256 * colours[..., 1]
        segments, ids = segments_of_map(labels, self.classes, (0, _IGNORED), str(mask))
        return {"image": image.data, "segments": segments, "class_ids": ids}


class ImageNet21k(_WordNet):
    """ImageNet-21K, release of winter 2021: the processed form of Ridnik et al., or the publishers' archives.

    Classes are the WordNet ids of all splits that are read, in alphabetical order. An image's class is in its name.
    """

    name = "imagenet21k"
    about = "11,060,223 training and 522,500 validation images of 10,450 classes (processed), or 13 million of 19,167"
    homepage = "https://github.com/Alibaba-MIIL/ImageNet21K"
    licence = _LICENCE
    download = (
        Download(
            "imagenet21k_resized.tar.gz",
            "https://image-net.org/download-images.php",
            "the processed data: imagenet21k_train, imagenet21k_val, imagenet21k_small_classes",
        ),
        Download(
            "winter21_whole.tar.gz",
            "https://image-net.org/download-images.php",
            "for form=whole: a tar a class",
        ),
        _WORDS,
    )
    options = (
        Option(
            "form",
            ("processed", "small_classes", "whole"),
            "small_classes trains on the rare classes, too, which have no validation images; whole is winter21_whole",
        ),
        _NAMES,
    )
    splits = ("train", "val")
    provides = frozenset({"image", "label"})
    archives = ("imagenet21k*.tar.gz", "imagenet21k*.tar", "winter21*.tar.gz", "winter21*.tar", "n*.tar")

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        self._names: dict[str, list[str]] = {"train": [], "val": []}
        parts = {"imagenet21k_train": "train", "imagenet21k_val": "val"}
        if self.chosen["form"] == "small_classes":
            parts["imagenet21k_small_classes"] = "train"
        for name in self.members.names(suffix=".JPEG"):
            if self.chosen["form"] == "whole":
                self._names["train"].append(name)
            elif split := next((own for part, own in parts.items() if f"/{part}/" in f"/{name}"), None):
                self._names[split].append(name)
        self.classes = self._named({_wnid(name) for names in self._names.values() for name in names})

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split."""
        self.check_split(split)
        if not self._names[split]:
            raise UserError(self._missing(f"images of {split} (form={self.chosen['form']})"))
        wnids = sorted({_wnid(name) for names in self._names.values() for name in names})
        index = {wnid: k for k, wnid in enumerate(wnids)}
        for name in self._names[split]:
            yield Entry(_end(name).rpartition("/")[2], {"image": name, "label": index[_wnid(name)]})

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image` and `label` of an image."""
        return {"image": self.members.read(entry.data["image"]), "label": entry.data["label"]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_names": {}}  # Workers get their entries.


class _TestSet(_WordNet):
    """A test set of ImageNet's classes, in folders by class.

    Attributes:
      count: the number of classes.
      folder: a pattern of the names of their folders.
    """

    splits = ("test",)
    provides = frozenset({"image", "label"})
    options = (_NAMES,)
    name_files = WORDNET_FILES
    count: int
    folder = r"n\d{8}"

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        pattern = re.compile(rf"(?:^|/){self.folder}/[^/]+\.(?:jpg|jpeg)$", re.IGNORECASE)
        self._images = [name for name in self.members.names() if pattern.search(name)]
        found = {_class_folder(name) for name in self._images}
        if not found:
            raise UserError(self._missing("folders of WordNet ids with .JPEG or .jpg files"))
        if len(found) != self.count:
            raise UserError(
                f"{self.name}: {self.source} holds {len(found)} class folders with images, but it has {self.count}"
            )
        self._index = self._set_classes(found)

    def _set_classes(self, folders: set[str]) -> dict[str, int]:
        """Sets `classes` and returns the index of each class folder."""
        self.classes = self._named(folders)
        return {folder: k for k, folder in enumerate(sorted(folders))}

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images; their keys are the class folder and the file's name without suffix."""
        self.check_split(split)
        for name in self._images:
            yield Entry(_end(name), {"image": name, "label": self._index[_class_folder(name)]})

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image` and `label` of an image."""
        return {"image": self.members.read(entry.data["image"]), "label": entry.data["label"]}


class ImageNetA(_TestSet):
    """ImageNet-A: photographs that ResNet-50 gets wrong."""

    name = "imagenet_a"
    about = "7,500 test images of 200 classes of ImageNet"
    homepage = "https://github.com/hendrycks/natural-adv-examples"
    licence = "MIT (the list)"
    download = (
        Download("imagenet-a.tar", "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar"),
        _CLASSNAMES,
    )
    archives = ("imagenet-a.tar",)
    count = 200


class ImageNetR(_TestSet):
    """ImageNet-R: drawings, sculptures and other renditions."""

    name = "imagenet_r"
    about = "30,000 test images of 200 classes of ImageNet"
    homepage = "https://github.com/hendrycks/imagenet-r"
    licence = "MIT (the list)"
    download = (
        Download("imagenet-r.tar", "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar"),
        _CLASSNAMES,
    )
    archives = ("imagenet-r.tar",)
    count = 200


class ImageNetSketch(_TestSet):
    """ImageNet-Sketch: drawings in black and white."""

    name = "imagenet_sketch"
    about = "50,889 test images of the 1,000 classes of ImageNet"
    homepage = "https://github.com/HaohanWang/ImageNet-Sketch"
    licence = "MIT (the list)"
    download = (Download("ImageNet-Sketch.zip", homepage, "linked there"), _CLASSNAMES)
    archives = ("ImageNet-Sketch.zip", "imagenet-sketch.zip")
    count = 1000


class ImageNetV2(_TestSet):
    """ImageNet-V2, matched frequency, or another of its variants if the folder holds that.

    The folders are numbers, of the 1,000 WordNet ids in alphabetical order.
    """

    name = "imagenet_v2"
    about = "10,000 test images of the 1,000 classes of ImageNet"
    homepage = "https://github.com/modestyachts/ImageNetV2"
    licence = "MIT (the list)"
    download = (
        Download(
            "imagenetv2-matched-frequency.tar.gz",
            "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz",
        ),
        _CLASSNAMES,
    )
    archives = ("imagenetv2-*.tar.gz",)
    count = 1000
    folder = r"imagenetv2[^/]*/\d{1,3}"

    def _set_classes(self, folders: set[str]) -> dict[str, int]:
        """Sets the classes by the ids that the file of names lists."""
        path, listed = self._listed()
        if len(listed) != self.count:
            raise UserError(
                f"{path} names {len(listed)} ids: {self.name} needs the {self.count} of ImageNet-1k"
            )
        self.classes = self._named(listed)
        return {folder: int(folder) for folder in folders}


def _end(name: str) -> str:
    """Returns the last folder and the base name without suffix."""
    return "/".join(name.split("/")[-2:]).rpartition(".")[0]


def _class_folder(name: str) -> str:
    return name.split("/")[-2]


def _wnid(name: str) -> str:
    base = name.rpartition("/")[2]
    if not (found := re.match(r"(n\d{8})_", base)):
        raise UserError(f"the image {name} has no WordNet id in its name, such as n01440764_10026.JPEG")
    return found[1]
