"""Image classification sets of image files, in their official layouts: folders by class, or a list with the classes.

With `pixel_files`, `imagenet` and `coop`, these are the 21 of UMG-CLIP's Table 2 (papers/003) and the 14 of POMP's
Table 2 (papers/000). Where CLIP's data notes (openai/CLIP, data/prompts.md) name the classes, they have those names.
"""

import importlib.resources
import posixpath
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from xml.etree import ElementTree

from etils import epath
from PIL import Image

from ovseg_jax.data.images import encode_image, image_suffixes, read_image
from ovseg_jax.datasets.base import Download, Entry, Option
from ovseg_jax.datasets.packed import MISSING, Packed
from ovseg_jax.errors import UserError
from ovseg_jax.reading import read_text, reading, text
from ovseg_jax.vocab.classes import ClassList

_RESISC45 = (
    "airplane; airport; baseball_diamond; basketball_court; beach; bridge; chaparral; church; circular_farmland; "
    "cloud; commercial_area; dense_residential; desert; forest; freeway; golf_course; ground_track_field; harbor; "
    "industrial_area; intersection; island; lake; meadow; medium_residential; mobile_home_park; mountain; overpass; "
    "palace; parking_lot; railway; railway_station; rectangular_farmland; river; roundabout; runway; sea_ice; ship; "
    "snowberg; sparse_residential; stadium; storage_tank; tennis_court; terrace; thermal_power_station; wetland"
).split("; ")
_VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()


class Labelled(NamedTuple):
    """An image of a list before it is opened.

    Attributes:
      key: its key.
      image: the member that holds it.
      label: the index of its class.
      box: the part of it that is the example, (x0, y0, x1, y1) with exclusive ends; None for all.
    """

    key: str
    image: str
    label: int
    box: tuple[int, int, int, int] | None = None


class ImageFiles(Packed):
    """The base class of readers of image files with one class each.

    A subclass defines `class_folders` and `listed`; each class has the index of its row in the former.
    """

    provides = frozenset({"image", "label"})

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        self.names = self.class_folders()
        self.classes = ClassList.things(self.names.values())

    def class_folders(self) -> dict[str, str]:
        """Returns the class names by the name of their folder, or by that in lists, in the order of their ids."""
        raise NotImplementedError

    def listed(self, split: str) -> Iterator[Labelled]:
        """Yields the images of a split."""
        raise NotImplementedError

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split with their labels."""
        self.check_split(split)
        for key, image, label, box in self.listed(split):
            yield Entry(key, {"image": image, "label": label, "box": box})

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image` and `label` of an image; of an object, the part of its image, as PNG."""
        image = self.members.read(entry.data["image"])
        if entry.data["box"]:
            image = encode_image(
                Image.fromarray(read_image(self.encoded(entry.data["image"]))).crop(entry.data["box"])
            )
        return {"image": image, "label": entry.data["label"]}

    def in_folders(self, *choices: str) -> Iterator[Labelled]:
        """Yields the images in folders of classes, which lie directly in one of the folders `choices`.

        The first of `choices` that holds images counts. Images in other folders there are counted in `notes`.

        Raises:
          UserError: a class has no image.
        """
        index = {folder: k for k, folder in enumerate(self.names)}
        images = [
            name for name in self.members.names() if posixpath.splitext(name)[1].lower() in image_suffixes()
        ]
        seen, surplus = set(), []
        for choice in choices:
            pattern = re.compile(rf"(?:^|/){choice}/(([^/]+)/[^/]+)$")
            for name in images:
                if (found := pattern.search(name)) is None:
                    continue
                if found[2] in index:
                    seen.add(found[2])
                    yield Labelled(found[1], name, index[found[2]])
                else:
                    surplus.append(name)
            if seen:
                break
        missing = [folder for folder in index if folder not in seen]
        if not seen:
            raise UserError(self._missing(f"folder {choices[0]}/{missing[0]} with images"))
        if missing:
            raise UserError(
                f"{self.name}: {len(missing)} of {len(index)} classes have no image in {self.source}, such as "
                f"{choice}/{missing[0]}"
            )
        if surplus:
            self.notes.append(
                f"{choice}: {len(surplus)} images in other folders were left out, such as {surplus[0]}"
            )


class Country211(ImageFiles):
    """Country211: photographs by the country that they were taken in; folders are ISO 3166 codes."""

    name = "country211"
    about = "31,650 training, 10,550 validation and 21,100 test images of 211 countries"
    homepage = "https://github.com/openai/CLIP/blob/main/data/country211.md"
    licence = "images of YFCC100M, each with the Creative Commons licence that its uploader chose"
    download = (Download("country211.tgz", "https://openaipublic.azureedge.net/clip/data/country211.tgz"),)
    splits = ("train", "val", "test")
    archives = ("country211.tgz",)

    def class_folders(self) -> dict[str, str]:
        """Returns the countries by their codes."""
        return _package_names("country211.txt")

    def listed(self, split: str) -> Iterator[Labelled]:
        """Yields the images of a split."""
        return self.in_folders(f"country211/{'valid' if split == 'val' else split}")


class RenderedSst2(ImageFiles):
    """Rendered SST2: sentences of film reviews as pictures."""

    name = "rendered_sst2"
    about = "6,920 training, 872 validation and 1,821 test pictures of sentences, negative or positive"
    homepage = "https://github.com/openai/CLIP/blob/main/data/rendered-sst2.md"
    licence = "none stated"
    download = (
        Download("rendered-sst2.tgz", "https://openaipublic.azureedge.net/clip/data/rendered-sst2.tgz"),
    )
    splits = ("train", "val", "test")
    archives = ("rendered-sst2.tgz",)

    def class_folders(self) -> dict[str, str]:
        """Returns the two classes."""
        return {"negative": "negative", "positive": "positive"}

    def listed(self, split: str) -> Iterator[Labelled]:
        """Yields the images of a split."""
        return self.in_folders(f"rendered-sst2/{'valid' if split == 'val' else split}")


class Resisc45(ImageFiles):
    """NWPU-RESISC45: aerial images. It has no official split.

    VTAB, and so CLIP_benchmark, scores a fifth of the images (TFDS: `train[80%:]`), and CLIP 25,200: a list chooses
    them.
    """

    name = "resisc45"
    about = "31,500 aerial images of 45 classes, all of them or those of a list as the split test"
    homepage = "https://gcheng-nwpu.github.io/#Datasets"
    licence = "none stated (Cheng, Han and Lu, Proceedings of the IEEE 2017)"
    download = (Download("NWPU-RESISC45.rar", homepage, "unpacked: a .rar is not read"),)
    options = (
        Option(
            "list", (), "a file with the names of the images to read, such as airplane_001.jpg, a line each"
        ),
    )
    splits = ("test",)
    archives = ("NWPU-RESISC45.zip", "NWPU-RESISC45.tar", "NWPU-RESISC45.tar.gz")

    def class_folders(self) -> dict[str, str]:
        """Returns the 45 classes."""
        return {folder: folder.replace("_", " ") for folder in _RESISC45}

    def listed(self, split: str) -> Iterator[Labelled]:
        """Yields all images, or those of the list."""
        found = self.in_folders("NWPU-RESISC45")
        if not self.chosen["list"]:
            yield from found
            return
        known = {posixpath.basename(row.image): row for row in found}
        wanted = read_text(self.chosen["list"]).split()
        for name in self.present(split, wanted, {name: row.image for name, row in known.items()}):
            yield known[name]


class ObjectNet(ImageFiles):
    """ObjectNet: objects in unusual places and poses; the 113 of its 313 classes that ImageNet has too.

    The red border of one pixel around each image stays, as in CLIP_benchmark.
    """

    name = "objectnet"
    about = "18,574 test images of 113 classes that are ImageNet's too"
    homepage = "https://objectnet.dev"
    licence = "CC BY 4.0; no model is trained on it, and images that are shown on the web keep their border"
    download = (
        Download(
            "objectnet-1.0.zip",
            "https://objectnet.dev/downloads/objectnet-1.0.zip",
            "unpacked with its password, objectnetisatestset",
        ),
    )
    splits = ("test",)
    archives = ()

    def class_folders(self) -> dict[str, str]:
        """Returns the classes that ImageNet has, in lower case, as CLIP_benchmark names them."""
        tables = []
        for file in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"):
            name = self.need(f"mappings/{file}", file)
            table = self.json(name)
            with reading(self.members.where(name)):
                tables.append({key: text(value, f"the entry of {key!r}") for key, value in table.items()})
        labels, shared = tables
        found = {folder: label.lower() for folder, label in sorted(labels.items()) if label in shared}
        if not found:
            raise UserError(
                f"{self.members.where(name)} has none of the labels of folder_to_objectnet_label.json"
            )
        return found

    def listed(self, split: str) -> Iterator[Labelled]:
        """Yields the images of the classes."""
        return self.in_folders("images")


class FgvcAircraft(ImageFiles):
    """FGVC-Aircraft by variant; the banner at the bottom of the images stays, as in CoOp."""

    name = "fgvc_aircraft"
    about = "3,334 training, 3,333 validation and 3,333 test images of 100 variants of aircraft"
    homepage = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"
    licence = "for non-commercial research; each image belongs to its photographer"
    download = (
        Download(
            "fgvc-aircraft-2013b.tar.gz",
            "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
        ),
    )
    options = (MISSING,)
    splits = ("train", "val", "test")
    archives = ("fgvc-aircraft*.tar.gz",)

    def class_folders(self) -> dict[str, str]:
        """Returns the variants."""
        return {name: name for name in self.lines(self.need("variants.txt"))}

    def listed(self, split: str) -> Iterator[Labelled]:
        """Yields the images that the list of a split names."""
        name = self.need(f"images_variant_{split}.txt")
        with reading(self.members.where(name)):
            rows = [line.split(" ", 1) for line in self.lines(name)]
            if wrong := [row for row in rows if len(row) != 2 or row[1] not in self.names]:
                raise ValueError(
                    f"expected a number and a variant of variants.txt, got {' '.join(wrong[0])!r}"
                )
        images = self.files(self.need_folder("images", suffix=".jpg"), ".jpg")
        index, classes = {own: k for k, own in enumerate(self.names)}, dict(rows)
        for key in self.present(split, [key for key, _ in rows], images):
            yield Labelled(key, images[key], index[classes[key]])


class Gtsrb(ImageFiles):
    """The German Traffic Sign Recognition Benchmark: training images in folders, test images with a table."""

    name = "gtsrb"
    about = "26,640 training (of Final_Training 39,209) and 12,630 test images of 43 traffic signs"
    homepage = "https://benchmark.ini.rub.de/gtsrb_dataset.html"
    licence = "none stated"
    download = tuple(
        Download(file, f"https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/{file}", note)
        for file, note in (
            ("GTSRB-Training_fixed.zip", "for train; or GTSRB_Final_Training_Images.zip"),
            ("GTSRB_Final_Test_Images.zip", "for test"),
            ("GTSRB_Final_Test_GT.zip", "for test"),
        )
    )
    options = (MISSING,)
    splits = ("train", "test")
    archives = ("GTSRB*.zip",)

    def class_folders(self) -> dict[str, str]:
        """Returns CLIP's names of the signs by their numbers."""
        return _package_names("gtsrb.txt")

    def listed(self, split: str) -> Iterator[Labelled]:
        """Yields the images of a split."""
        if split == "train":
            yield from self.in_folders("GTSRB/Training", "GTSRB/Final_Training/Images")
            return
        name = self.need("GT-final_test.csv")
        with reading(self.members.where(name)):
            head, *lines = self.lines(name)
            at = [head.split(";").index(column) for column in ("Filename", "ClassId")]
            rows = [line.split(";") for line in lines]
            labels = {row[at[0]]: int(row[at[1]]) for row in rows}
            if wrong := [label for label in labels.values() if not 0 <= label < len(self.names)]:
                raise ValueError(f"the class {wrong[0]} is none of 0 to {len(self.names) - 1}")
        images = self.files(self.need_folder("GTSRB/Final_Test/Images", suffix=".ppm"), ".ppm")
        known = {f"{key}.ppm": image for key, image in images.items()}
        for file in self.present(split, [row[at[0]] for row in rows], known):
            yield Labelled(file, known[file], labels[file])


class Voc2007(ImageFiles):
    """The objects of VOC 2007, cut out by their boxes: CLIP_benchmark's classification with one class an image.

    The boxes are cut as there: from (xmin, ymin) to (xmax, ymax), exclusive, without the shift of VOC's first pixel,
    which is (1, 1). Difficult objects are included.
    """

    name = "voc2007"
    about = "objects of 2,501 training, 2,510 validation and 4,952 test images, of 20 classes"
    homepage = "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/"
    licence = "annotations: none stated; images: Flickr's terms of use, for research"
    download = tuple(
        Download(file, f"http://host.robots.ox.ac.uk/pascal/VOC/voc2007/{file}", note)
        for file, note in (
            ("VOCtrainval_06-Nov-2007.tar", "for train and val"),
            ("VOCtest_06-Nov-2007.tar", "for test"),
        )
    )
    splits = ("train", "val", "test")
    archives = ("VOC*-2007.tar",)

    def class_folders(self) -> dict[str, str]:
        """Returns the official names, which CLIP's data notes have too."""
        return {name: name for name in _VOC}

    def listed(self, split: str) -> Iterator[Labelled]:
        """Yields the objects of the images of a split; their keys are the image's and their position in it."""
        keys = self.lines(self.need(f"VOC2007/ImageSets/Main/{split}.txt"))
        images = self.files(self.need_folder("VOC2007/JPEGImages", suffix=".jpg"), ".jpg")
        annotations = self.files(self.need_folder("VOC2007/Annotations", suffix=".xml"), ".xml")
        self.present(split, keys, images)
        index = {own: k for k, own in enumerate(self.names)}
        for key in self.present(split, keys, annotations):
            with reading(self.members.where(annotations[key])):
                for k, one in enumerate(
                    ElementTree.fromstring(self.members.read(annotations[key])).findall("object")
                ):
                    x0, y0, x1, y1 = (
                        int(one.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")
                    )
                    if not (0 <= x0 < x1 and 0 <= y0 < y1):
                        raise ValueError(f"the box {x0}, {y0}, {x1}, {y1} of its object {k} is empty")
                    yield Labelled(
                        f"{key}-{k}", images[key], index[one.findtext("name", "")], (x0, y0, x1, y1)
                    )


def _package_names(file: str) -> dict[str, str]:
    """Returns the class names by folder that a file of the package lists."""
    lines = importlib.resources.files("ovseg_jax.datasets").joinpath(file).read_text("utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
