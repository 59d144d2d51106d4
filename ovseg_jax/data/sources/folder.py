"""Your own data: a plain folder of images, and of masks and captions for those that have them.

    DIR/images/NAME.jpg | .png | ...
    DIR/masks/NAME.png       8- or 16-bit, one channel, the size of the image
    DIR/classes.txt          OpenSeg's label format: `id:name,name,...` a line
    DIR/segments.json        {"NAME.jpg": {"1": "dog", "2": "grass"}, ...}
    DIR/captions.json        {"NAME.jpg": ["a caption", "another"], ...}
       or captions.jsonl     {"image_id": "NAME", "caption": "..."} a line, as in Localized Narratives
       or captions.tsv       NAME.jpg <tab> a caption, a line

With `kind="segments"` a mask's values number the segments of that image, 0 = void, and segments.json names
those that have a class (none has to: masks without classes train OpenSeg's proposals). With `kind="semantic"`
its values are ids of classes.txt, of which 255 (65535 in 16 bits) and ids not listed as classes but as
`invalid_class_id` are void.
"""

import functools
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8, UInt16
from PIL import Image

from ovseg_jax.data.images import SUFFIXES, read_image
from ovseg_jax.data.source_base import Example, Extent, Regions, Source, join_regions
from ovseg_jax.data.transforms import segment_boxes
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList, read_label_file

KINDS = ("segments", "semantic")


class Folder(Source):
    """A folder in the layout above, sorted by file name.

    Attributes:
      name: "folder".
      classes: those of classes.txt, or of the names in segments.json in alphabetical order; maybe none.
    """

    def __init__(
        self, data_dir: epath.PathLike, kind: str = "segments", labels: epath.PathLike | None = None
    ):
        """Lists the files and reads the texts; images and masks are read when they are asked for.

        Args:
          data_dir: DIR.
          kind: what a mask's values are, "segments" or "semantic".
          labels: a label file in place of DIR/classes.txt.

        Raises:
          UserError: the layout is not as above: no images, a mask or caption of no image, an unknown class
            name.
        """
        if kind not in KINDS:
            raise UserError(f"folder: kind={kind!r} is not one of {', '.join(KINDS)}")
        self.name, self._kind = "folder", kind
        self._root = epath.Path(data_dir)
        images = self._root / "images"
        if not str(data_dir) or not images.is_dir():
            raise UserError(f"data_dir={str(data_dir)!r} has no folder images/: put your images there")
        self._files = sorted(path.name for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
        if not self._files:
            raise UserError(f"{images} holds no image ({', '.join(sorted(SUFFIXES))})")
        self._by_name = _names(self._files, images)
        masks = self._root / "masks"
        self._masks = {p.stem: p for p in masks.iterdir() if p.suffix == ".png"} if masks.is_dir() else {}
        if stray := sorted(set(self._masks) - {epath.Path(f).stem for f in self._files}):
            raise UserError(f"the mask {self._masks[stray[0]]} belongs to no image in {images}")
        self._segment_names = self._read_segment_names()
        self.classes = self._read_classes(labels)
        self._class_of = {name: k for k, names in enumerate(self.classes.names) for name in names}
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
        """Returns one example, whose image and mask are decoded when they are asked for.

        Raises:
          UserError: a file is damaged, or image, mask and classes disagree.
        """
        self._check_index(index)
        file = self._files[index]
        image = functools.cache(lambda: read_image(self._root / "images" / file))
        numbered = functools.cache(lambda: self._read_segments(file, image().shape[:2]))
        class_of = lambda value: self._class_of_value(file, int(value))
        fields: dict[str, Any] = {
            "image": lambda _: image(),
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

    def _read_segments(self, file: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Segments numbered 1.. of an image of that size, and the mask's value of each."""
        mask = self._masks.get(epath.Path(file).stem)
        if mask is None:
            return np.zeros(size, np.int32), np.zeros(0, np.int64)
        pixels = read_mask(mask)
        if pixels.shape != size:
            raise UserError(
                f"the mask {mask} is {pixels.shape[0]} x {pixels.shape[1]} (height x width) but its "
                f"image is {size[0]} x {size[1]}"
            )
        return self._number(pixels, mask)

    def extent(self) -> Extent:
        """Reads every mask, and the images that have none; once."""
        if self._extent is not None:
            return self._extent
        sizes = [(1, 1, 1)]
        for file in self._files:
            mask = self._masks.get(epath.Path(file).stem)
            pixels = read_mask(mask) if mask else read_image(self._root / "images" / file)[..., 0]
            count = len(self._number(pixels, mask)[1]) if mask else 0
            sizes.append((*pixels.shape, count))
        self._extent = Extent(*(max(column) for column in zip(*sizes, strict=True)))
        return self._extent

    def regions(self) -> Regions:
        """The segments that have a class, one a row; reads every mask and no image."""
        found = []
        for index, file in enumerate(self._files):
            if mask := self._masks.get(epath.Path(file).stem):
                segments, values = self._number(read_mask(mask), mask)
                class_ids = np.array([self._class_of_value(file, int(v)) for v in values], np.int32)
                kept = np.flatnonzero(class_ids >= 0).astype(np.int32)
                boxes = segment_boxes(segments, len(values))
                found.append(Regions(np.full(len(kept), index, np.int32), kept, class_ids[kept], boxes[kept]))
        return join_regions(found)

    def _number(self, pixels: np.ndarray, path: epath.Path) -> tuple[np.ndarray, np.ndarray]:
        """Segments numbered 1.. without gaps, and the mask's value of each."""
        counts = np.bincount(pixels.ravel())
        present = np.flatnonzero(counts)
        if self._kind == "segments":
            values = present[present != 0]
        else:
            void = 255 if pixels.dtype == np.uint8 else 65535
            values = present[present != void]
            if len(self.classes):
                # 0 is void in many data sets (ADE20K), and then no class of the list.
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
        data, named = _read_json(path), {}
        for key, names in data.items():
            try:
                named[self._image_of(key, path)] = {int(k): str(v) for k, v in names.items()}
            except (AttributeError, ValueError):
                raise UserError(
                    f'{path}: the entry of {key!r} is not of the form {{"1": "dog", ...}}'
                ) from None
        return named

    def _read_classes(self, labels: epath.PathLike | None) -> ClassList:
        path = epath.Path(labels) if labels else self._root / "classes.txt"
        if labels or path.exists():
            return read_label_file(path)
        names = sorted({name for names in self._segment_names.values() for name in names.values()})
        return ClassList(tuple((n,) for n in names), tuple(range(len(names))), (True,) * len(names))

    def _check_segment_names(self) -> None:
        for file, names in self._segment_names.items():
            if unknown := [name for name in names.values() if name not in self._class_of]:
                raise UserError(
                    f"{self._root / 'segments.json'}: {unknown[0]!r} of {file} is no name in classes.txt"
                )

    def _read_captions(self) -> list[list[str]]:
        paths = [self._root / f"captions.{suffix}" for suffix in ("json", "jsonl", "tsv")]
        found = [path for path in paths if path.exists()]
        if len(found) > 1:
            raise UserError(f"{self._root} has both {found[0].name} and {found[1].name}: keep one")
        captions: dict[str, list[str]] = {file: [] for file in self._files}
        readers = {".json": _from_json, ".jsonl": _from_lines, ".tsv": _from_table}
        for path in found:
            pairs = readers[path.suffix](path)
            # A narratives file covers a whole data set, of which the folder may hold a part.
            partial = path.suffix == ".jsonl"
            matched = False
            for key, caption in pairs:
                if partial and key not in self._by_name:
                    continue
                matched = True
                if text := " ".join(caption.split()):
                    captions[self._image_of(key, path)].append(text)
            if partial and not matched:
                raise UserError(f"{path} has no caption of any image in {self._root / 'images'}")
        return [captions[file] for file in self._files]

    def _image_of(self, key: str, path: epath.Path) -> str:
        if key not in self._by_name:
            raise UserError(
                f"{path} speaks of {key!r}, but there is no such image in {self._root / 'images'}"
            )
        return self._by_name[key]


def read_mask(path: epath.Path) -> UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"]:
    """The values of a one-channel PNG: uint8, or uint16 where it has 16 bits.

    Raises:
      UserError: the file is damaged, or a colour picture.
    """
    try:
        image = Image.open(io.BytesIO(path.read_bytes()))
        pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as e:
        raise UserError(f"the mask {path} is damaged or truncated: {e}") from e
    if pixels.ndim != 2:
        raise UserError(
            f"the mask {path} is a colour picture ({image.mode}): save it with one channel, 8 or 16 bits"
        )
    if pixels.dtype == bool or image.mode in ("L", "P"):
        return pixels.astype(np.uint8)
    return pixels.astype(np.uint16)


def _names(files: list[str], folder: epath.Path) -> dict[str, str]:
    """The file of each spelling: with and without ending, and without leading zeros (COCO's image ids)."""
    names: dict[str, str] = {}
    for file in files:
        stem = epath.Path(file).stem
        if stem in names:
            raise UserError(
                f"{folder} holds both {names[stem]} and {file}: masks and captions could mean either"
            )
        names[file] = names[stem] = file
    for file in files:
        names.setdefault(epath.Path(file).stem.lstrip("0"), file)
    return names


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(data, dict):
        raise UserError(f'{path} is not of the form {{"NAME.jpg": ...}}')
    return data


def _from_json(path: epath.Path) -> Iterator[tuple[str, str]]:
    for key, captions in _read_json(path).items():
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise UserError(f"{path}: the captions of {key!r} are not a list of texts")
        yield from ((key, caption) for caption in captions)


def _from_lines(path: epath.Path) -> Iterator[tuple[str, str]]:
    with path.open("r") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                key = next(str(entry[k]) for k in ("image_id", "file", "file_name") if k in entry)
                captions = entry["captions"] if "captions" in entry else [entry["caption"]]
                yield from ((key, str(caption)) for caption in captions)
            except (ValueError, TypeError, KeyError, StopIteration, RuntimeError):
                raise UserError(
                    f'{path}, line {number}: expected {{"image_id": ..., "caption": ...}}, '
                    f"got {line.strip()[:60]!r}"
                ) from None


def _from_table(path: epath.Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            key, tab, caption = line.partition("\t")
            if not tab:
                raise UserError(f"{path}, line {number}: expected NAME<tab>caption, got {line[:60]!r}")
            yield key.strip(), caption
