"""Images with captions, tags and boxes in one JSON file each: the layout of UMG-41M (papers/003, section 3).

    DIR/00012/000123456.json        or the same in zips, DIR/*.zip
    IMAGES/00012/000123456.jpg      or the same in zips, IMAGES/*.zip

An image belongs to the JSON file of the same path up to the suffix, below the folder or in any of its zips. UMG-41M is
published without its images and without a description of its keys: `paths` says where each field is in a file, keys
with points between them; a list on the way stands for all of its items. With the defaults:

    {"captions": ["a dog on grass", ...], "tags": ["dog", "grass"],
     "regions": [{"bbox": [x0, y0, x1, y1], "captions": ["a brown dog", ...], "tags": ["dog"]}, ...]}

A text may stand for a list of one. Zips are read in place: the members of all are listed once. Other archives, such as
UMG-41M's YFCC15M.tar.gz, have to be unpacked.
"""

import logging
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, SupportsIndex

import numpy as np
from etils import epath
from jaxtyping import Int

from ovseg_jax.data.images import Encoded, image_suffixes, read_header, read_oriented
from ovseg_jax.data.source_base import Example, Extent, Source
from ovseg_jax.errors import UserError
from ovseg_jax.reading import number, parse_json, reading, short, texts
from ovseg_jax.vocab.classes import ClassList

PATHS = {
    "captions": "captions",
    "tags": "tags",
    "regions": "regions",
    "box": "bbox",
    "region_captions": "captions",
    "region_tags": "tags",
}
"""The default path of each field; those of a region are below an item of `regions`."""
FIELDS = {
    "captions": "captions",
    "tags": "tags",
    "box": "boxes",
    "region_captions": "region_captions",
    "region_tags": "region_tags",
}
"""The field of an example for each of `PATHS` but `regions`."""
BOXES = ("xyxy", "xywh")
UNITS = ("pixels", "shares")
_TRIED = 100  # files in which each field must occur once
_LOG = logging.getLogger(__name__)
_OTHER_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".7z", ".rar")
_HEADER = 30  # bytes of a zip member's own header before its name


class RegionJson(Source):
    """All images that have a JSON file, in the order of their paths.

    Attributes:
      name: "region_json".
      classes: none.
    """

    name = "region_json"
    classes = ClassList()

    def __init__(
        self,
        data_dir: epath.PathLike,
        images: epath.PathLike = "",
        paths: Mapping[str, str] | None = None,
        boxes: str = "xyxy",
        unit: str = "pixels",
    ):
        """Lists the files; they are read when an example's field is accessed.

        Args:
          data_dir: DIR.
          images: IMAGES; by default DIR.
          paths: paths that replace those of `PATHS`; "" for a field that the files lack.
          boxes: "xyxy" for corners, "xywh" for corner and size.
          unit: of the boxes: "pixels", or "shares" of width and height.

        Raises:
          UserError: an argument is invalid, a folder or zip cannot be read, no JSON file has an image, or one of the
            fields occurs in none of the first files.
        """
        chosen = {**PATHS, **(paths or {})}
        if unknown := sorted(chosen.keys() - PATHS.keys()):
            raise UserError(f"region_json: paths has no key {unknown[0]!r}; known keys: {', '.join(PATHS)}")
        for key, value, known in (("boxes", boxes, BOXES), ("unit", unit, UNITS)):
            if value not in known:
                raise UserError(f"region_json: {key}={value!r} is not one of {', '.join(known)}")
        self._keys = {key: path for key, path in chosen.items() if path}
        if "regions" not in self._keys:
            self._keys = {key: p for key, p in self._keys.items() if key in ("captions", "tags")}
        self._sized, self._shares = boxes == "xywh", unit == "shares"
        self.provides = frozenset({"image"} | {FIELDS[key] for key in self._keys if key in FIELDS})
        self._json = _Files(data_dir, (".json",))
        self._images = _Files(images or data_dir, image_suffixes())
        self._json_at, self._image_at = _pairs(self._json, self._images)
        self._check_fields()

    def __len__(self) -> int:
        return len(self._json_at)

    def __getitem__(self, index: int) -> Example:
        """Returns one example: `image` u8 [H W 3], the fields of `paths`, `image_id` (its path up to the suffix).

        Raises:
          UserError: a file is damaged, or a field has another form, when the field is accessed.
        """
        self._check_index(index)
        found: dict[str, Any] = {}

        def fields(example: Example) -> dict[str, Any]:
            if not found:
                found.update(self._fields(index, example))
            return found

        make = {name: lambda e, name=name: fields(e)[name] for name in self.provides - {"image"}}
        name = self._images.name(self._image_at[index])
        image = lambda _: read_oriented(self._images.read(self._image_at[index]))[0]
        return Example(image=image, image_id=os.path.splitext(name)[0], **make)

    def texts(self, field: str) -> Iterator[str]:
        """Yields all texts of a field, in the order of the examples, without decoding images."""
        key = next((key for key, own in FIELDS.items() if own == field and field in self.provides), "box")
        for index in range(len(self)) if key != "box" else ():
            for own in self._read(index, {key} | ({"regions"} if key.startswith("region") else set()))[key]:
                yield from [own] if isinstance(own, str) else own

    def extent(self) -> Extent:
        """Returns the largest size, from the header of every image."""
        sizes = [read_header(self._images.read(place))[0] for place in self._image_at]
        heights, widths = zip(*sizes, strict=True)
        return Extent(max(heights), max(widths), 0)

    def _fields(self, index: int, example: Example) -> dict[str, Any]:
        """Returns all fields of an example but its image."""
        found = self._read(index, self._keys.keys())
        fields = {FIELDS[key]: value for key, value in found.items() if key in FIELDS}
        if "boxes" in fields:
            if [] in fields["boxes"]:
                raise UserError(f"{self._content(index)[1]}: a region has no {self._keys['box']!r}")
            boxes = np.array(fields["boxes"], np.float32).reshape(-1, 4)
            if self._shares:
                height, width = example["image"].shape[:2]
                boxes *= np.array([width, height] * 2, np.float32)
            if self._sized:
                boxes[:, 2:] += boxes[:, :2]
            # Corners in another order are an empty box, which no row shows.
            boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
            fields["boxes"] = boxes
        return fields

    def _read(self, index: int, keys: Collection[str]) -> dict[str, Any]:
        """Reads some fields of an example: lists of texts, for regions one for each, and boxes."""
        content, name = self._content(index)
        with reading(name, "the annotations"):
            found: dict[str, Any] = {}
            for key in ("captions", "tags"):
                if key in keys and key in self._keys:
                    found[key] = _texts_at(content, self._keys[key])
            if "regions" not in self._keys:
                return found
            regions = list(_at(content, self._keys["regions"]))
            for key in ("region_captions", "region_tags"):
                if key in keys and key in self._keys:
                    found[key] = [_texts_at(region, self._keys[key]) for region in regions]
            if "box" in keys and "box" in self._keys:
                found["box"] = [_box(region, self._keys["box"]) for region in regions]
            return found

    def _content(self, index: int) -> tuple[Any, str]:
        """Returns the parsed JSON file of an example, and its name."""
        file = self._json.read(self._json_at[index])
        with reading(file.name, "the annotations"):
            return parse_json(file.data.decode("utf-8-sig")), file.name

    def _check_fields(self) -> None:
        """Checks that each field occurs in one of the first files, since their keys are not described anywhere."""
        absent = set(self._keys) - {"regions"}
        for index in range(min(_TRIED, len(self))):
            found = self._read(index, absent)
            absent -= {key for key, own in found.items() if any(own)}
            if not absent:
                return
        content, name = self._content(0)
        key = min(absent)
        where = (
            f"{self._keys['regions']}.{self._keys[key]}"
            if key not in ("captions", "tags")
            else self._keys[key]
        )
        has = (
            f"has the keys {', '.join(map(short, content))}"
            if isinstance(content, dict)
            else f"is {short(content)}"
        )
        raise UserError(
            f"region_json: none of the first {min(_TRIED, len(self))} files of {self._json.root} has {key!r} at "
            f"{where!r} ({name} {has}): set paths.{key} to its path, or to '' if there is none"
        )


class _Files:
    """The files with some suffixes below a folder and in its zips, sorted by their path up to the suffix.

    Attributes:
      root: the folder.
      stems: bytes [n], the paths up to the suffix, in ascending order.
    """

    def __init__(self, root: epath.PathLike, suffixes: Collection[str]):
        self.root = epath.Path(root)
        if not str(root) or not self.root.is_dir():
            raise UserError(f"region_json: {str(root)!r} is not a folder")
        self._zips: list[str] = []
        packed: list[str] = []
        rows: list[tuple[bytes, bytes, int, int, int, int, int]] = []
        take = lambda path: os.path.splitext(path)[1].lower() in suffixes
        for folder, folders, files in os.walk(root, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
            for name in sorted(files):
                path = os.path.relpath(os.path.join(folder, name), root)
                if name.lower().endswith(".zip"):
                    rows += self._members(os.path.join(folder, name), take)
                elif take(name) and not name.startswith("."):
                    rows.append((*_split(path), -1, 0, 0, 0, 0))
                elif name.lower().endswith(_OTHER_ARCHIVES):
                    packed.append(path)
        if packed:
            _LOG.warning(
                "%s: archives that are not read: %d, such as %s: unpack them", root, len(packed), packed[0]
            )
        columns = list(zip(*rows, strict=True)) or [()] * 7
        stems = np.array(columns[0], np.bytes_)
        order = np.argsort(stems, kind="stable")
        self.stems, self._suffixes = stems[order], np.array(columns[1], np.bytes_)[order]
        self._zip, self._offset, self._packed, self._size, self._sum = (
            np.array(column, np.int64)[order] for column in columns[2:]
        )

    def __len__(self) -> int:
        return len(self.stems)

    def name(self, place: SupportsIndex) -> str:
        """Returns the path of a file below the folder, or in its zip."""
        return os.fsdecode(bytes(self.stems[place])) + os.fsdecode(bytes(self._suffixes[place]))

    def read(self, place: SupportsIndex) -> Encoded:
        """Reads a file.

        Raises:
          UserError: it is damaged, or cannot be read.
        """
        name = self.name(place)
        if self._zip[place] < 0:
            path = self.root / name
            with reading(path), path.open("rb") as file:
                return Encoded(str(path), file.read())
        archive = self._zips[self._zip[place]]
        with reading(archive), open(archive, "rb") as file:
            file.seek(int(self._offset[place]))
            header = file.read(_HEADER)
            if header[:4] != b"PK\x03\x04":
                raise ValueError(f"{name} is not where the list of members has it")
            file.seek(
                int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR
            )
            data = file.read(int(self._packed[place]))
            if self._size[place] >= 0:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, int(self._size[place]) + 1)
            if zlib.crc32(data) != self._sum[place]:
                raise ValueError(f"{name} is damaged")
            return Encoded(f"{name} in {archive}", data)

    def _members(self, path: str, take: Any) -> list[tuple[bytes, bytes, int, int, int, int, int]]:
        number, rows = len(self._zips), []
        self._zips.append(path)
        with reading(path), zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                base = entry.filename.rpartition("/")[2]
                if entry.is_dir() or base.startswith(".") or not take(base) or "__MACOSX" in entry.filename:
                    continue
                if entry.flag_bits & 1 or entry.compress_type not in (
                    zipfile.ZIP_STORED,
                    zipfile.ZIP_DEFLATED,
                ):
                    raise ValueError(f"{entry.filename} is encrypted, or packed in another way than deflate")
                # The unpacked size of a member that is packed, else -1.
                size = entry.file_size if entry.compress_type == zipfile.ZIP_DEFLATED else -1
                place = entry.header_offset, entry.compress_size, size, entry.CRC
                rows.append((*_split(entry.filename), number, *place))
        return rows


def _split(path: str) -> tuple[bytes, bytes]:
    stem, suffix = os.path.splitext(path)
    return os.fsencode(stem), os.fsencode(suffix)


def _pairs(files: _Files, images: _Files) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Returns the places of the JSON files that have an image, and of their images; logs how many files are left out.

    Raises:
      UserError: there are none.
    """
    if not len(files):
        raise UserError(f"region_json: {files.root} and its zips hold no JSON file")
    if not len(images):
        raise UserError(f"region_json: {images.root} and its zips hold no image")
    place = np.minimum(np.searchsorted(images.stems, files.stems), len(images) - 1)
    has = images.stems[place] == files.stems
    lost = np.flatnonzero(~has)
    if len(lost) == len(has):
        raise UserError(
            f"region_json: none of the {len(files)} JSON files of {files.root} has an image in {images.root}: the "
            f"first are {files.name(0)} and {images.name(0)}, whose paths up to the suffix have to be the same"
        )
    if len(lost):
        _LOG.warning(
            "%s: %d of %d JSON files have no image in %s and are left out, such as %s",
            files.root, len(lost), len(files), images.root, files.name(int(lost[0])),
        )  # fmt: skip
    if spare := len(images) - len(np.unique(place[has])):
        _LOG.warning("%s: %d images have no JSON file and are left out", images.root, spare)
    return np.flatnonzero(has), place[has]


def _at(content: Any, path: str) -> Iterator[Any]:
    """Yields the values at a path of keys; a list on the way, or at the end, stands for its items."""
    values = [content]
    for key in (*path.split("."), None):
        flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
        if key is None:
            values = flat
        else:
            if wrong := [item for item in flat if not isinstance(item, dict)]:
                raise ValueError(f"{path!r}: expected an object with the key {key!r}, got {short(wrong[0])}")
            values = [item[key] for item in flat if item.get(key) is not None]
    yield from values


def _texts_at(content: Any, path: str) -> list[str]:
    """Returns the texts at a path, without surplus spaces and empty ones."""
    found = [" ".join(text.split()) for text in texts(list(_at(content, path)), repr(path))]
    return [text for text in found if text]


def _box(region: Any, path: str) -> list[float]:
    """Returns the four numbers at a path, or an empty list if there is nothing."""
    found = list(_at(region, path))
    if len(found) not in (0, 4):
        raise ValueError(f"{path!r}: expected four numbers, got {short(found)}")
    return [number(value, repr(path)) for value in found]
