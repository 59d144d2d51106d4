"""Your own data: a folder of images, with masks and captions for some or all of them.

    DIR/images/NAME.jpg | .png | ...
    DIR/masks/NAME.png       one channel of 1 to 16 bits, the size of the image; or TIFF or BMP
    DIR/classes.txt          OpenSeg's label format: `id:name,name,...` a line
    DIR/segments.json        {"NAME.jpg": {"1": "dog", "2": "grass"}, ...}
    DIR/captions.json        {"NAME.jpg": ["a caption", "another"], ...}
       or captions.jsonl     {"image_id": "NAME", "caption": "..."} a line, as in Localized Narratives
       or captions.tsv       NAME.jpg <tab> a caption, a line

With `kind="segments"` a mask's values number the segments of that image, 0 = void, and segments.json names those that
have a class (it is optional: masks without classes train OpenSeg's proposals). With `kind="semantic"` the values are
ids of classes.txt; 255 (65535 in 16 bits), 0 if it is not listed, and ids listed as `invalid_class_id` are void.
"""

import functools
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.images import list_images, read_header, read_mask, read_oriented, turn_mask
from ovseg_jax.data.source_base import Example, Extent, Regions, Source, join_regions
from ovseg_jax.data.transforms import segment_boxes
from ovseg_jax.errors import UserError
from ovseg_jax.reading import parse_json, read_json, read_lines, reading, short, text, texts
from ovseg_jax.vocab.classes import ClassList, read_label_file

KINDS = ("segments", "semantic")


class Folder(Source):
    """A source of a folder in the layout above, sorted by file name.

    Attributes:
      name: "folder".
      classes: the classes of classes.txt, or the names in segments.json in alphabetical order; may be empty.
    """

    def __init__(
        self,
        data_dir: epath.PathLike,
        kind: str = "segments",
        labels: epath.PathLike | None = None,
    ):
        """Lists the files and reads the texts; images and masks are read when they are accessed.

        Args:
          data_dir: DIR.
          kind: the meaning of a mask's values, "segments" or "semantic".
          labels: a label file in place of DIR/classes.txt.

        Raises:
          UserError: the layout is not as above: there are no images, a mask or caption belongs to no image, or a class
            name is unknown.
        """
        if kind not in KINDS:
            raise UserError(f"folder: kind={kind!r} is not one of {', '.join(KINDS)}")
        self.name, self._kind = "folder", kind
        self._root = epath.Path(data_dir)
        images = self._root / "images"
        if not str(data_dir) or not images.is_dir():
            raise UserError(f"data_dir={str(data_dir)!r} has no folder images/: put your images there")
        self._files = [path.name for path in list_images(images)]
        if not self._files:
            raise UserError(f"{images} holds no readable image, such as NAME.jpg or NAME.png")
        self._by_name = _names(self._files, images)
        own = self._root / "masks"
        self._masks = self._list_masks(own) if own.is_dir() else {}
        self._segment_names = self._read_segment_names()
        self.classes = self._read_classes(labels)
        self._class_of = self.classes.index
        self._class_by_id = {c: k for k, c in enumerate(self.classes.ids)}
        self._check_segment_names()
        self._captions = self._read_captions()
        self._extent: Extent | None = None
        self.provides = frozenset({"image"})
        if self._masks:
            self.provides |= {"segments", "class_ids", "boxes"}
        if any(self._captions):
            self.provides |= {"captions"}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        """Returns one example, whose image and mask are decoded when they are accessed.

        Raises:
          UserError: a file is damaged, or image, mask and classes disagree.
        """
        self._check_index(index)
        file = self._files[index]
        image = functools.cache(lambda: read_oriented(self._root / "images" / file))
        numbered = functools.cache(lambda: self._read_segments(file, image()[0].shape[:2], image()[1]))
        class_of = lambda value: self._class_of_value(file, int(value))
        fields: dict[str, Any] = {
            "image": lambda _: image()[0],
            "segments": lambda _: numbered()[0],
            "class_ids": lambda _: np.array([class_of(value) for value in numbered()[1]], np.int32),
            "isthing": lambda e: np.array([*self.classes.isthing, True], bool)[e["class_ids"]],
            "iscrowd": lambda _: np.zeros(len(numbered()[1]), bool),
            "boxes": lambda _: segment_boxes(numbered()[0], len(numbered()[1])),
            "captions": self._captions[index],
        }
        if "segments" not in self.provides:
            fields = {key: fields[key] for key in self.provides}
        return Example(**fields, image_id=epath.Path(file).stem)

    def _read_segments(
        self, file: str, size: tuple[int, int], orientation: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads the mask of an image; returns segments numbered 1.. and the mask's value of each."""
        mask = self._masks.get(file)
        if mask is None:
            return np.zeros(size, np.int32), np.zeros(0, np.int64)
        path = self._root / "images" / file
        return self._number(turn_mask(read_mask(mask), mask, path, size, orientation), mask)

    def extent(self) -> Extent:
        """Returns the extent, reading every mask, and the header of every image without one, once."""
        if self._extent is None:
            sizes = [(1, 1, 1)]
            for file in self._files:
                if file in self._masks:
                    pixels = self._upright_mask(file)
                    sizes.append((*pixels.shape, len(self._number(pixels, self._masks[file])[1])))
                else:
                    sizes.append((*read_header(self._root / "images" / file)[0], 0))
            self._extent = Extent(*(max(column) for column in zip(*sizes, strict=True)))
        return self._extent

    def regions(self) -> Regions:
        """Returns the segments that have a class, reading every mask and the header of its image."""
        found = []
        for index, file in enumerate(self._files):
            if file in self._masks:
                segments, values = self._number(self._upright_mask(file), self._masks[file])
                class_ids = np.array([self._class_of_value(file, int(v)) for v in values], np.int32)
                kept = np.flatnonzero(class_ids >= 0).astype(np.int32)
                boxes = segment_boxes(segments, len(values))
                found.append(Regions(np.full(len(kept), index, np.int32), kept, class_ids[kept], boxes[kept]))
        return join_regions(found)

    def _upright_mask(self, file: str) -> np.ndarray:
        path, mask = self._root / "images" / file, self._masks[file]
        pixels = read_mask(mask)
        try:
            size, orientation = read_header(path)
        except UserError:  # It is reported when the image itself is read.
            return pixels
        return turn_mask(pixels, mask, path, size, orientation)

    def _list_masks(self, folder: epath.Path) -> dict[str, epath.Path]:
        """Returns the mask's path of each image that has one."""
        stems = {_stem(file): file for file in self._files}
        masks: dict[str, epath.Path] = {}
        for path in list_images(folder):
            file = stems.get(_stem(path.name))
            if file is None:
                raise UserError(f"the mask {path} belongs to no image in {self._root / 'images'}")
            if file in masks:
                raise UserError(
                    f"{folder} holds both {masks[file].name} and {path.name}: which is the mask of {file}?"
                )
            masks[file] = path
        if not masks and not all(path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"{folder} holds no readable mask, such as NAME.png")
        return masks

    def _number(self, pixels: np.ndarray, path: epath.Path) -> tuple[np.ndarray, np.ndarray]:
        """Numbers the segments of a mask from 1 without gaps, and returns the mask's value of each."""
        counts = np.bincount(pixels.ravel())
        present = np.flatnonzero(counts)
        if self._kind == "segments":
            values = present[present != 0]
        else:
            void = 255 if pixels.dtype == np.uint8 else 65535
            if void in self._class_by_id and void in present:
                raise UserError(
                    f"the mask {path} holds {void}, which means void in a mask of {pixels.dtype.itemsize * 8} bits but "
                    "is also a class of classes.txt"
                )
            values = present[present != void]
            if len(self.classes):
                # In many data sets (ADE20K) 0 means void and is not in the list.
                unknown = [int(v) for v in values if v not in self._class_by_id and v != 0]
                if unknown:
                    raise UserError(
                        f"the mask {path} holds the value {unknown[0]}, which classes.txt does not list"
                    )
                values = np.array([v for v in values if v in self._class_by_id], np.int64)
        number = np.zeros(len(counts), np.int32)
        number[values] = np.arange(1, len(values) + 1)
        return number[pixels], values

    def _class_of_value(self, file: str, value: int) -> int:
        if self._kind == "semantic":
            return self._class_by_id.get(value, -1)
        name = self._segment_names.get(file, {}).get(value)
        return -1 if name is None else self._class_of[name]

    def _read_segment_names(self) -> dict[str, dict[int, str]]:
        path = self._root / "segments.json"
        if self._kind == "semantic" or not path.exists():
            return {}
        named: dict[str, dict[int, str]] = {}
        for key, names in _read_entries(path).items():
            file = self._image_of(key, path)
            with reading(path):
                if file in named:
                    raise ValueError(f"it names the segments of {file} twice")
                if not isinstance(names, dict):
                    raise ValueError(f'the entry of {key!r} is not of the form {{"1": "dog", ...}}')
                own = {
                    _value(value): " ".join(text(name, f"a name in {key!r}").split())
                    for value, name in names.items()
                }
                if len(own) < len(names) or not all(own.values()):
                    raise ValueError(f"the entry of {key!r} has an empty name, or names a segment twice")
            named[file] = own
        return named

    def _read_classes(self, labels: epath.PathLike | None) -> ClassList:
        path = epath.Path(labels) if labels else self._root / "classes.txt"
        if labels or path.exists():
            return read_label_file(path).distinct()
        return ClassList.things(
            sorted({name for names in self._segment_names.values() for name in names.values()})
        )

    def _check_segment_names(self) -> None:
        for file, names in self._segment_names.items():
            if unknown := [name for name in names.values() if name not in self._class_of]:
                raise UserError(
                    f"{self._root / 'segments.json'}: the name {unknown[0]!r} of {file} is not in classes.txt"
                )

    def _read_captions(self) -> list[list[str]]:
        paths = [self._root / f"captions.{suffix}" for suffix in ("json", "jsonl", "tsv")]
        found = [path for path in paths if path.exists()]
        if len(found) > 1:
            raise UserError(f"{self._root} has both {found[0].name} and {found[1].name}: keep one")
        captions: dict[str, list[str]] = {file: [] for file in self._files}
        readers: dict[str, Callable[[epath.Path], Iterator[tuple[str, str]]]]
        readers = {".json": _from_json, ".jsonl": _from_lines, ".tsv": _from_table}
        for path in found:
            pairs = readers[path.suffix](path)
            # A narratives file covers a whole data set, but the folder may hold only a part of it.
            partial = path.suffix == ".jsonl"
            matched = False
            for key, caption in pairs:
                if partial and _nfc(key) not in self._by_name:
                    continue
                matched = True
                file = self._image_of(key, path)
                if spoken := " ".join(caption.split()):
                    captions[file].append(spoken)
            if partial and not matched:
                raise UserError(f"{path} has no caption for any image in {self._root / 'images'}")
        return [captions[file] for file in self._files]

    def _image_of(self, key: str, path: epath.Path) -> str:
        if _nfc(key) not in self._by_name:
            raise UserError(
                f"{path} refers to {short(key)}, but there is no such image in {self._root / 'images'}"
            )
        return self._by_name[_nfc(key)]


def _nfc(name: str) -> str:
    """Returns one spelling (NFC) of a name with accents, since macOS and others write different ones."""
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    return _nfc(epath.Path(name).stem)


def _names(files: list[str], folder: epath.Path) -> dict[str, str]:
    """Returns the file of each spelling: with and without suffix, and without leading zeros (COCO's image ids)."""
    names: dict[str, str] = {}
    for file in files:
        stem = _stem(file)
        if stem in names:
            raise UserError(
                f"{folder} holds both {names[stem]} and {file}: masks and captions could belong to either"
            )
        names[_nfc(file)] = names[stem] = file
    short_names: dict[str, list[str]] = {}
    for file in files:
        short_names.setdefault(_stem(file).lstrip("0") or "0", []).append(file)
    # If both 01.jpg and 001.jpg exist, "1" is ambiguous and is left out.
    unique = {name: found[0] for name, found in short_names.items() if len(found) == 1}
    return {**unique, **names}


def _value(written: str) -> int:
    """Parses a mask's value from a key of segments.json."""
    if not written.isdecimal() or not 1 <= int(written[:6]) <= 65535 or len(written) > 5:
        raise ValueError(f'the value of a segment: expected "1" to "65535", got {short(written)}')
    return int(written)


def _read_entries(path: epath.Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f'{path} is not of the form {{"NAME.jpg": ...}}')
    return data


def _from_json(path: epath.Path) -> Iterator[tuple[str, str]]:
    with reading(path):
        for key, captions in _read_entries(path).items():
            yield from ((key, caption) for caption in texts(captions, f"the captions of {short(key)}"))


def _from_lines(path: epath.Path) -> Iterator[tuple[str, str]]:
    for number, line in read_lines(path):
        with reading(f"{path}, line {number},"):
            entry = parse_json(line)
            keys = ("image_id", "file", "file_name")
            if not isinstance(entry, dict) or not (named := [entry[key] for key in keys if key in entry]):
                raise ValueError(f'expected {{"image_id": ..., "caption": ...}}, got {short(line)}')
            if not {"caption", "captions"} & entry.keys():
                raise ValueError(f"it has no 'caption': {short(line)}")
            # COCO's image ids are numbers.
            key = str(named[0]) if type(named[0]) is int else text(named[0], "the image's name")
            captions = texts(entry.get("captions", entry.get("caption")), "the caption")
        yield from ((key, caption) for caption in captions)


def _from_table(path: epath.Path) -> Iterator[tuple[str, str]]:
    for number, line in read_lines(path):
        key, tab, caption = line.partition("\t")
        if not tab:
            raise UserError(f"{path}, line {number}: expected NAME<tab>caption, got {short(line)}")
        yield key.strip(), caption
