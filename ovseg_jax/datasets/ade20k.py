"""ADE20K: the 150 classes of the scene parsing benchmark, and the full data set with 847 classes."""

import importlib.resources
import io
import pickle
import posixpath
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int32, UInt8

from ovseg_jax.data.images import encode_image, read_colours, read_image, read_mask
from ovseg_jax.datasets.base import Download, Entry, Option, segments_of_map, without_hidden
from ovseg_jax.datasets.packed import Packed
from ovseg_jax.errors import UserError
from ovseg_jax.reading import reading
from ovseg_jax.vocab.classes import ClassList, split_names

THINGS = tuple(
    int(k)
    for k in (
        "8 9 11 13 15 16 19 20 21 23 24 25 28 31 32 33 34 36 37 38 39 40 42 43 44 45 46 48 50 51 54 56 57 58 "
        "59 63 65 66 67 68 70 71 72 73 74 75 76 77 79 81 82 83 84 86 87 88 89 90 91 93 94 96 98 99 103 104 "
        "105 108 109 111 112 113 116 117 119 120 121 122 124 125 126 127 128 130 131 133 134 135 136 137 138 "
        "139 140 143 144 145 147 148 149 150"
    ).split()
)
"""The 100 classes of the 150 that have instances: the k-th is class k, from 1, of the instance annotations."""

_FOLDERS = {"train": "training", "val": "validation"}
_SHORT_SIDE = 512
# The numbers of wall, building and sky, which show whether an index counts from 0 or from 1.
_PROOF = {2978: "wall", 312: "building", 2420: "sky"}


class Ade20k150(Packed):
    """The scene parsing benchmark: 150 classes, as semantic, panoptic or instance annotation.

    A panoptic segment of stuff is the semantic map's; instances are laid over it, as in Mask2Former's preparation. Of
    stuff that they cover its JSON keeps the area, and the segment where nothing is left, which moves published PQ a
    little: `score panoptic` on that JSON counts so, an evaluation of these files counts visible pixels.
    """

    name = "ade20k_150"
    about = (
        "20,210 training and 2,000 validation images of scenes with 150 classes, of which 100 have instances"
    )
    homepage = "http://sceneparsing.csail.mit.edu"
    licence = (
        "annotations: BSD 3-Clause; images: for non-commercial research and education only (see the homepage)"
    )
    download = (
        Download(
            "ADEChallengeData2016.zip",
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            "images, semantic maps, objectInfo150.txt",
        ),
        Download(
            "annotations_instance.tar",
            "http://sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar",
            "for kind=panoptic and kind=instances",
        ),
    )
    options = (
        Option("kind", ("semantic", "panoptic", "instances"), "which annotation becomes the segments"),
    )
    splits = ("train", "val")
    provides = frozenset({"image", "segments", "class_ids"})
    archives = ("ADEChallengeData2016*.zip", "annotations_instance*.tar")

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        classes = self._read_classes()
        if self.chosen["kind"] == "instances":
            names = dict(zip(classes.ids, classes.names, strict=True))
            classes = ClassList.things([names[k] for k in THINGS], THINGS)
        self.classes = classes

    def _read_classes(self) -> ClassList:
        name = self.need("objectInfo150.txt")
        rows = [re.split(r"\s*\t\s*", line) for line in self.lines(name)]
        rows = [row for row in rows if row[0].isdecimal()]
        if [row[0] for row in rows] != [str(k) for k in range(1, 151)] or any(len(row) < 5 for row in rows):
            raise UserError(
                f"{self.members.where(name)} cannot be read: expected a table of 150 classes, numbered from 1"
            )
        names = tuple(split_names(row[-1].replace(";", ",")) for row in rows)
        if not all(names):
            raise UserError(f"{self.members.where(name)} cannot be read: a class has no name")
        return ClassList(names, tuple(range(1, 151)), tuple(k in THINGS for k in range(1, 151)))

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images with their semantic map and, if it is needed, their instance map."""
        self.check_split(split)
        folder = _FOLDERS[split]
        images = self.files(self.need_folder(f"images/{folder}", suffix=".jpg"), ".jpg")
        maps = []
        if self.chosen["kind"] != "instances":
            maps.append(self.files(self.need_folder(f"annotations/{folder}", suffix=".png"), ".png"))
        if self.chosen["kind"] != "semantic":
            maps.append(self.files(self.need_folder(f"annotations_instance/{folder}", suffix=".png"), ".png"))
        columns = [self.paired(split, images, own) for own in maps]
        for rows in zip(*columns, strict=True):
            key, image, _ = rows[0]
            yield Entry(key, {"image": image, "maps": [row[2] for row in rows]})

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image`, `segments` and `class_ids` of an image."""
        image = self.encoded(entry.data["image"])
        maps = [self.encoded(name) for name in entry.data["maps"]]
        if self.chosen["kind"] == "instances":
            segments, ids = self._instances(read_colours(maps[0], "the instance map"), maps[0].name)
        else:
            semantic = read_mask(maps[0])
            segments, ids = segments_of_map(semantic, self.classes, (0,), str(maps[0]))
            if len(maps) > 1:
                colours = read_colours(maps[1], "the instance map")
                segments, ids = self._panoptic(segments, ids, colours, maps[1].name)
        segments = self.upright(segments, maps[-1], image)
        return {"image": image.data, "segments": segments, "class_ids": ids}

    def _instances(
        self, colours: UInt8[np.ndarray, "h w 3"], where: str
    ) -> tuple[Int32[np.ndarray, "h w"], Int32[np.ndarray, "n"]]:
        """Converts an instance map: red is the class of `THINGS`, green the instance, 0 = none."""
        index = {k: row for row, k in enumerate(self.classes.ids)}
        segments, ids = np.zeros(colours.shape[:2], np.int32), []
        for number in np.unique(colours[..., 1]).tolist():
            if not number:
                continue
            mask = colours[..., 1] == number
            kinds = np.unique(colours[..., 0][mask]).tolist()
            if len(kinds) > 1 or not 1 <= kinds[0] <= len(THINGS):
                raise UserError(
                    f"{where}: instance {number} has the classes {kinds}, but needs one of 1..100"
                )
            ids.append(index[THINGS[kinds[0] - 1]])
            segments[mask] = len(ids)
        return segments, np.array(ids, np.int32)

    def _panoptic(
        self, semantic: np.ndarray, semantic_ids: np.ndarray, colours: np.ndarray, where: str
    ) -> tuple[np.ndarray, np.ndarray]:
        if semantic.shape != colours.shape[:2]:
            raise UserError(
                f"{where} has {colours.shape[:2]} pixels, but the semantic map has {semantic.shape}"
            )
        stuff = [row for row, k in enumerate(semantic_ids.tolist()) if not self.classes.isthing[k]]
        number = np.zeros(len(semantic_ids) + 1, np.int32)
        number[np.array(stuff, int) + 1] = np.arange(1, len(stuff) + 1)
        things, thing_ids = self._instances(colours, where)
        segments = np.where(things > 0, things + len(stuff), number[semantic])
        ids = np.concatenate([semantic_ids[stuff], thing_ids]).astype(np.int32)
        segments, seen = without_hidden(segments, len(ids))
        return segments, ids[seen]


class Ade20kFull(Packed):
    """The full data set with the 847 classes that A-847 is evaluated on.

    Image and label map are resized to a short side of 512 pixels where both sides are longer, as MaskFormer's
    preparation does: the image bilinearly, then written as JPEG of quality 75, and the map by the nearest pixel. Class
    ids are the benchmark's numbers plus one, 1 to 847.
    """

    name = "ade20k_847"
    about = (
        "the full ADE20K, release 2021_17_01: 25,574 training and 2,000 validation images with 847 classes"
    )
    homepage = "https://groups.csail.mit.edu/vision/datasets/ADE20K/"
    licence = "for non-commercial research and education only (terms on the homepage, where one registers)"
    download = (
        Download(
            "NAME_HASH.zip",
            "https://groups.csail.mit.edu/vision/datasets/ADE20K/request_data/",
            "after registration; it unpacks to ADE20K_2021_17_01",
        ),
    )
    splits = ("train", "val")
    provides = frozenset({"image", "segments", "class_ids"})
    archives = ("*.zip",)

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        name = self.need("index_ade20k.pkl")
        where = self.members.where(name)
        index = _read_index(self.members.read(name), where)
        numbers = full_ids()
        names = index["objectnames"]
        first = next(
            (
                start
                for start in (1, 0)
                if all(
                    0 <= k - start < len(names) and names[k - start].split(",")[0] == own
                    for k, own in _PROOF.items()
                )
            ),
            None,
        )
        if first is None or max(numbers) - first >= len(names):
            raise UserError(
                f"{where} lists other objects than release 2021_17_01, which the 847 classes belong to"
            )
        groups = tuple(split_names(names[k - first]) for k in numbers)
        self.classes = ClassList.things(groups, range(1, len(groups) + 1))
        # The first part of a folder is that of the release, which holds the index.
        root = posixpath.dirname(name)
        self._images = [
            posixpath.join(root, folder.strip("/").partition("/")[2], file)
            for folder, file in zip(index["folder"], index["filename"], strict=True)
        ]

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of the index, whose names tell the split."""
        self.check_split(split)
        chosen = {
            posixpath.splitext(posixpath.basename(name))[0]: name
            for name in self._images
            if ("_val_" in posixpath.basename(name)) == (split == "val")
        }
        if not chosen:
            raise UserError(f"{self.name}: the index lists no images of {split}")
        there = {name: name for name in self.members.names(suffix=".jpg")}
        self.present(split, chosen.values(), there)
        masks = {key: _mask_of(name) for key, name in chosen.items() if _mask_of(name) in self.members}
        for key, image, mask in self.paired(split, chosen, masks):
            yield Entry(key, {"image": image, "mask": mask})

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image`, `segments` and `class_ids` of an image, resized."""
        image, mask = self.encoded(entry.data["image"]), self.encoded(entry.data["mask"])
        colours = self.upright(read_colours(mask, "the mask"), mask, image).astype(np.int32)
        labels = colours[..., 0] // 10 * 256 + colours[..., 1]
        height, width = labels.shape
        data = image.data
        if min(height, width) > _SHORT_SIDE:
            size = _resized(height, width)
            pixels = resize_linear(read_image(image), *size)
            data, labels = encode_image(pixels, "JPEG"), resize_nearest(labels, *size)
        number = np.zeros(26 * 256, np.int32)
        number[list(full_ids())] = np.arange(1, len(self.classes) + 1)
        segments, ids = segments_of_map(number[labels], self.classes, (0,), str(mask))
        return {"image": data, "segments": segments, "class_ids": ids}


def full_ids() -> tuple[int, ...]:
    """Returns the number of each of the 847 classes in the masks of the full ADE20K."""
    text = importlib.resources.files("ovseg_jax.datasets").joinpath("ade20k_full_ids.txt").read_text("utf-8")
    return tuple(int(k) for line in text.splitlines() if not line.startswith("#") for k in line.split())


def resize_nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a map [H W] by OpenCV's nearest neighbour: the source pixel of x is floor(x * W / width)."""
    rows, columns = (
        np.minimum(np.floor(np.arange(new) * (1 / (new / old))).astype(int), old - 1)
        for new, old in zip((height, width), labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def resize_linear(image: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[np.ndarray, "k l 3"]:
    """Resizes an image bilinearly between the two nearest pixels, without averaging over more, as OpenCV does."""
    found = image.astype(np.float32)
    for axis, new in ((0, height), (1, width)):
        old = found.shape[axis]
        at = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
        low = np.minimum(np.floor(at).astype(int), max(old - 2, 0))
        share = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, old - 1)
        found = found.take(low, axis) * (1 - share) + found.take(high, axis) * share
    return np.rint(found).astype(np.uint8)


def _resized(height: int, width: int) -> tuple[int, int]:
    if width >= height:
        return _SHORT_SIDE, round(width / height * _SHORT_SIDE)
    return round(height / width * _SHORT_SIDE), _SHORT_SIDE


def _mask_of(image: str) -> str:
    return f"{posixpath.splitext(image)[0]}_seg.png"


class _Plain(pickle.Unpickler):
    """An unpickler that only builds arrays and plain values: any other class of a pickle could run a program."""

    def find_class(self, module: str, name: str) -> Any:
        # Protocols below 3 store bytes as text, which `encode` undoes.
        known = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        for core in ("numpy.core", "numpy._core"):
            known |= {(f"{core}.multiarray", own) for own in ("_reconstruct", "scalar")}
            known.add((f"{core}.numeric", "_frombuffer"))  # protocol 5
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"it holds {module}.{name}, which is neither an array nor a plain value"
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_index(data: bytes, where: str) -> dict[str, list[str]]:
    with reading(where):
        index = _Plain(io.BytesIO(data), encoding="latin1").load()
        found = {}
        for key in ("filename", "folder", "objectnames"):
            found[key] = np.asarray(index[key]).ravel().tolist()
            if not all(isinstance(value, str) for value in found[key]):
                raise ValueError(f"'{key}' does not only hold texts")
        if len(found["filename"]) != len(found["folder"]):
            raise ValueError("'filename' and 'folder' differ in length")
        if any(not name.strip() for name in found["objectnames"]):
            raise ValueError("an object has no name")
        return found
