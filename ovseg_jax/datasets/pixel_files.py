"""Image classification sets whose images are numbers in a few large files: records, a table, or arrays.

The images become PNG files. Class names are those of CLIP's data notes, as in `classification`.
"""

import functools
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.images import Encoded, encode_image
from ovseg_jax.datasets.base import Download, Entry, Option
from ovseg_jax.datasets.matlab import read_array
from ovseg_jax.datasets.members import Members
from ovseg_jax.datasets.packed import Packed
from ovseg_jax.errors import UserError, optional
from ovseg_jax.reading import reading
from ovseg_jax.vocab.classes import ClassList, parse_labels

_DIGITS = "zero one two three four five six seven eight nine".split()


class PixelFiles(Packed):
    """The base class of readers of images that lie in one file one after another.

    A subclass defines `entries`, whose data has the file, the place of the image in it and its label, and `pixels`.
    """

    provides = frozenset({"image", "label"})
    splits: tuple[str, ...] = ("train", "test")

    def pixels(self, split: str, data: Mapping[str, Any]) -> np.ndarray:
        """Returns an image, u8 [H W] or [H W 3].

        Raises:
          UserError: the file is missing or damaged.
        """
        raise NotImplementedError

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image` as PNG, and `label`."""
        image = encode_image(self.pixels(split, entry.data))
        return {"image": image, "label": entry.data["label"]}

    def checked(self, labels: np.ndarray, name: str) -> list[int]:
        """Returns labels [n] as indices of classes, or raises a UserError that names their file."""
        if wrong := np.flatnonzero((labels < 0) | (labels >= len(self.classes))).tolist():
            raise UserError(
                f"{self.members.where(name)} gives image {wrong[0]} the label {labels[wrong[0]]}, which is none of "
                f"0 to {len(self.classes) - 1}"
            )
        return labels.tolist()


class _Records(PixelFiles):
    """Images of equal size as bytes, each after its label, or with labels in a second file.

    Attributes:
      parts: the files of each split: of images, and of labels ("" if they are with the images).
      stored: the shape in which an image is stored.
      axes: those of its dimensions that are height, width and colours.
      before: bytes before an image, of which the last is its label; 0 if the labels are in the second file.
      heads: the numbers at the beginning of both files, as four bytes each; -1 stands for the number of images.
      first: the label of the first class.
    """

    parts: Mapping[str, tuple[tuple[str, str], ...]]
    stored: tuple[int, ...] = (3, 32, 32)
    axes: tuple[int, ...] = (1, 2, 0)
    before: int = 0
    heads: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    first: int = 0

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split; their keys are the file's name and their position in it."""
        self.check_split(split)
        size = self.before + math.prod(self.stored)
        for images, labels in self.parts[split]:
            name = self.need(images)
            start = 4 * len(self.heads[0])
            with self.members.open(name) as file:
                count, rest = divmod(file.seek(0, 2) - start, size)
                file.seek(0)
                self._check_head(file.read(start), self.heads[0], count)
                if rest or count < 1:
                    raise ValueError(f"its size is not that of whole images of {size} bytes: it is damaged")
            owner = self.need(labels) if labels else name
            data = self.members.read(owner)
            with reading(self.members.where(owner)):
                if labels:
                    head = 4 * len(self.heads[1])
                    self._check_head(data[:head], self.heads[1], count)
                    values = np.frombuffer(data, np.uint8)[head:]
                    if len(values) != count:
                        raise ValueError(f"it has {len(values)} labels for the {count} images of {images}")
                else:
                    values = np.frombuffer(data, np.uint8).reshape(count, size)[:, self.before - 1]
            stem = images.partition(".")[0]
            for k, label in enumerate(self.checked(values.astype(int) - self.first, owner)):
                yield Entry(
                    f"{stem}-{k}", {"file": name, "at": start + k * size + self.before, "label": label}
                )

    @staticmethod
    def _check_head(data: bytes, expected: tuple[int, ...], count: int) -> None:
        whole = struct.pack(f">{len(expected)}I", *(count if number < 0 else number for number in expected))
        if data != whole:
            raise ValueError(
                f"it begins with {data.hex()}, not with {whole.hex()}: it is damaged, or of another format"
            )

    def pixels(self, split: str, data: Mapping[str, Any]) -> np.ndarray:
        """Returns an image."""
        with self.members.open(data["file"]) as file:
            file.seek(data["at"])
            content = file.read(math.prod(self.stored))
            return np.frombuffer(content, np.uint8).reshape(self.stored).transpose(self.axes)


class Cifar10(_Records):
    """CIFAR-10, the binary version."""

    name = "cifar10"
    about = "50,000 training and 10,000 test images of 32 x 32 pixels, of 10 classes"
    homepage = "https://www.cs.toronto.edu/~kriz/cifar.html"
    licence = "none stated (Krizhevsky, 2009)"
    download = (
        Download("cifar-10-binary.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"),
    )
    archives = ("cifar-10-binary.tar.gz",)
    parts: Mapping[str, tuple[tuple[str, str], ...]] = {
        "train": tuple((f"cifar-10-batches-bin/data_batch_{k}.bin", "") for k in range(1, 6)),
        "test": (("cifar-10-batches-bin/test_batch.bin", ""),),
    }
    before = 1
    listing = "cifar-10-batches-bin/batches.meta.txt"

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        self.classes = ClassList.things(
            [line.replace("_", " ") for line in self.lines(self.need(self.listing))]
        )


class Cifar100(Cifar10):
    """CIFAR-100, the binary version, by its fine labels."""

    name = "cifar100"
    about = "50,000 training and 10,000 test images of 32 x 32 pixels, of 100 classes"
    download = (
        Download("cifar-100-binary.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"),
    )
    archives = ("cifar-100-binary.tar.gz",)
    parts: Mapping[str, tuple[tuple[str, str], ...]] = {
        split: ((f"cifar-100-binary/{split}.bin", ""),) for split in ("train", "test")
    }
    before = 2  # the coarse label, then the fine one
    listing = "cifar-100-binary/fine_label_names.txt"


class Stl10(_Records):
    """STL-10, without its unlabelled images."""

    name = "stl10"
    about = "5,000 training and 8,000 test images of 96 x 96 pixels, of 10 classes"
    homepage = "https://cs.stanford.edu/~acoates/stl10/"
    licence = "images of ImageNet: for non-commercial research and education"
    download = (Download("stl10_binary.tar.gz", "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"),)
    archives = ("stl10_binary.tar.gz",)
    parts: Mapping[str, tuple[tuple[str, str], ...]] = {
        split: ((f"{split}_X.bin", f"{split}_y.bin"),) for split in ("train", "test")
    }
    stored, axes, first = (3, 96, 96), (2, 1, 0), 1  # MATLAB's order, column by column

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        self.classes = ClassList.things(self.lines(self.need("class_names.txt")))


class Mnist(_Records):
    """MNIST; CLIP's data notes name its classes by the digits."""

    name = "mnist"
    about = "60,000 training and 10,000 test images of 28 x 28 pixels, of 10 handwritten digits"
    homepage = "http://yann.lecun.com/exdb/mnist/"
    licence = "CC BY-SA 3.0"
    download = tuple(
        Download(f"{part}-{kind}.gz", f"https://ossci-datasets.s3.amazonaws.com/mnist/{part}-{kind}.gz")
        for part in ("train", "t10k")
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    archives = ("*-ubyte.gz",)
    parts: Mapping[str, tuple[tuple[str, str], ...]] = {
        split: ((f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"),)
        for split, part in (("train", "train"), ("test", "t10k"))
    }
    stored, axes = (28, 28), (0, 1)
    heads = ((2051, -1, 28, 28), (2049, -1))
    classes = ClassList.things([str(k) for k in range(10)])


class Fer2013(PixelFiles):
    """FER2013: faces by their expression, with the several names for it that CLIP's data notes have."""

    name = "fer2013"
    about = "28,709 training, 3,589 validation and 3,589 test images of 48 x 48 pixels, of 7 expressions"
    homepage = "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge"
    licence = "the rules of the challenge on Kaggle"
    download = (Download("fer2013.tar.gz", f"{homepage}/data", "fer2013.csv; or icml_face_data.csv.zip"),)
    options = (
        Option(
            "test",
            ("both", "private"),
            "the split test is PublicTest and PrivateTest, as CLIP_benchmark has it, or PrivateTest, as CLIP",
        ),
    )
    splits = ("train", "val", "test")
    archives = ("fer2013*.tar.gz", "fer2013*.zip", "icml_face_data.csv.zip", "challenges-in-*.zip")
    classes = parse_labels(
        "angry; disgusted; fearful; happy, smiling; sad, depressed; surprised, shocked, spooked; neutral, bored"
    )

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the rows of a split; their keys are the numbers of their lines. val is PublicTest."""
        self.check_split(split)
        tests = ("PublicTest", "PrivateTest") if self.chosen["test"] == "both" else ("PrivateTest",)
        usages = {"train": ("Training",), "val": ("PublicTest",), "test": tests}[split]
        name = self.need("fer2013.csv", "icml_face_data.csv")
        with self.members.open(name) as file:
            head = [cell.strip() for cell in file.readline().decode().split(",")]
            emotion, usage, pixels = (head.index(key) for key in ("emotion", "Usage", "pixels"))
            at, number, labels, places = file.tell(), 1, [], []
            for line in file:
                number += 1
                cells = line.split(b",")
                if line.strip() and cells[usage].strip().decode() in usages:
                    start = at + sum(len(cell) + 1 for cell in cells[:pixels])
                    labels.append(int(cells[emotion]))
                    places.append((number, start, len(cells[pixels])))
                at += len(line)
        for label, (number, start, size) in zip(self.checked(np.array(labels), name), places, strict=True):
            yield Entry(str(number), {"file": name, "at": start, "size": size, "label": label})

    def pixels(self, split: str, data: Mapping[str, Any]) -> np.ndarray:
        """Returns an image of grey values."""
        with self.members.open(data["file"]) as file:
            file.seek(data["at"])
            return np.array([int(value) for value in file.read(data["size"]).split()], np.uint8).reshape(
                48, 48
            )


class Svhn(PixelFiles):
    """SVHN, house numbers cropped to a digit (format 2); names are CLIP_benchmark's, since CLIP's notes lack it."""

    name = "svhn"
    about = "73,257 training and 26,032 test images of 32 x 32 pixels, of 10 digits on houses"
    homepage = "http://ufldl.stanford.edu/housenumbers/"
    licence = "for non-commercial use"
    download = tuple(
        Download(f"{split}_32x32.mat", f"http://ufldl.stanford.edu/housenumbers/{split}_32x32.mat")
        for split in ("train", "test")
    )
    archives = ()
    classes = ClassList.things(_DIGITS)

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split; the label 10 is the digit 0."""
        self.check_split(split)
        name = self.need(f"{split}_32x32.mat")
        images, labels = _svhn(self.members, name)
        if len(images) != len(labels):
            raise UserError(f"{self.members.where(name)} has {len(images)} images and {len(labels)} labels")
        for k, label in enumerate(self.checked(np.where(labels == 10, 0, labels), name)):
            yield Entry(f"{split}-{k}", {"file": name, "row": k, "label": label})

    def pixels(self, split: str, data: Mapping[str, Any]) -> np.ndarray:
        """Returns an image."""
        return _svhn(self.members, data["file"])[0][data["row"]]


@functools.lru_cache(maxsize=1)  # a file is one compressed piece
def _svhn(members: Members, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns u8 [N 32 32 3] and the labels [N] of a file of SVHN."""
    file = members.read(name)
    images, labels = (read_array(Encoded(members.where(name), file), key) for key in "Xy")
    with reading(members.where(name)):
        if images.dtype != np.uint8 or images.shape[:3] != (32, 32, 3) or images.ndim != 4:
            raise ValueError(f"'X' is an array of {images.dtype} {images.shape}, not of uint8 (32, 32, 3, N)")
    return np.moveaxis(images, 3, 0), labels.reshape(-1).astype(int)


class Pcam(PixelFiles):
    """PatchCamelyon: tissue with or without metastases; reading it needs h5py."""

    name = "pcam"
    about = "262,144 training, 32,768 validation and 32,768 test images of 96 x 96 pixels, of 2 classes"
    homepage = "https://github.com/basveeling/pcam"
    licence = "CC0"
    download = tuple(
        Download(
            f"camelyonpatch_level_2_split_{part}_{kind}.h5.gz",
            f"https://zenodo.org/records/2546921/files/camelyonpatch_level_2_split_{part}_{kind}.h5.gz",
        )
        for part in ("train", "valid", "test")
        for kind in "xy"
    )
    splits = ("train", "val", "test")
    archives = ("camelyonpatch*.h5.gz",)
    classes = ClassList.things(["lymph node", "lymph node containing metastatic tumor tissue"])

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split."""
        self.check_split(split)
        part = "valid" if split == "val" else split
        images, labels = (self.need(f"camelyonpatch_level_2_split_{part}_{kind}.h5") for kind in "xy")
        with self.members.open(images) as file, _hdf5(file) as content:
            count = len(content["x"])
            if content["x"].shape[1:] != (96, 96, 3) or content["x"].dtype != np.uint8:
                raise ValueError(f"'x' is {content['x']!r}, not of uint8 (N, 96, 96, 3)")
        with self.members.open(labels) as file, _hdf5(file) as content:
            values = np.asarray(content["y"]).reshape(-1).astype(int)
            if len(values) != count:
                raise ValueError(f"it has {len(values)} labels for {count} images")
        for k, label in enumerate(self.checked(values, labels)):
            yield Entry(f"{split}-{k}", {"file": images, "row": k, "label": label})

    def pixels(self, split: str, data: Mapping[str, Any]) -> np.ndarray:
        """Returns an image."""
        with self.members.open(data["file"]) as file, _hdf5(file) as content:
            return np.asarray(content["x"][data["row"]])


def _hdf5(file: Any) -> Any:
    """Opens an HDF5 file for reading."""
    return optional("h5py", "pcam needs the package h5py: pip install -e '.[prepare]'").File(file, "r")
