"""Images with captions in tar files, as img2dataset writes CC3M, CC12M, RedCaps, SBU and YFCC15M.

As in WebDataset, consecutive members with the same name up to its first point are one example:

    DIR/00000.tar    000000000.jpg  000000000.txt  000000000.json    the image, its caption, other metadata
                     000000001.jpg  ...
    DIR/00001.tar    ...

Nothing is unpacked or converted: the headers of all tars are read once, then each example at its place in its tar.
"""

import concurrent.futures
import hashlib
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.images import Encoded, image_suffixes, read_header, read_oriented
from ovseg_jax.data.source_base import Example, Extent, Source
from ovseg_jax.errors import UserError
from ovseg_jax.files import file_stamp, write_whole
from ovseg_jax.reading import parse_json, read_npz, reading, short, tar_files, texts
from ovseg_jax.vocab.classes import ClassList

_LOG = logging.getLogger(__name__)
_TARS = "*.tar"
_ROW = np.dtype(
    [
        ("shard", "i4"),
        ("image", "i8"),
        ("image_size", "i8"),
        ("text", "i8"),
        ("text_size", "i8"),
        ("json", "?"),
    ]
)


class WebDataset(Source):
    """All examples of a folder of tars, in the order of tars and members.

    Examples may be read in any order and by any process, so that a run resumes at its step, as with other sources. An
    example without an image or a caption is left out, and counted.

    Attributes:
      name: "webdataset".
      classes: none.
    """

    name = "webdataset"
    classes = ClassList()
    provides = frozenset({"image", "captions"})

    def __init__(
        self,
        data_dir: epath.PathLike,
        pattern: str = _TARS,
        caption: str = "caption",
        index: epath.PathLike = "",
    ):
        """Reads the headers of all tars, or their index.

        Args:
          data_dir: the folder of the tars.
          pattern: their names; a tar may not be compressed.
          caption: the key of the caption, or of a list of captions, in a `.json` member, which is read where an
            example has no `.txt` member.
          index: a file in which the places of the examples are kept; it is written if it is missing, and anew if the
            names, sizes or times of the tars have changed.

        Raises:
          UserError: there is no such folder or tar, a tar is damaged, or no example has an image and a caption.
        """
        root = epath.Path(data_dir)
        if not str(data_dir) or not root.is_dir():
            raise UserError(f"webdataset: data_dir={str(data_dir)!r} is not a folder")
        self._key = caption
        self._shards = sorted(path for path in root.glob(pattern) if path.is_file())
        if not self._shards:
            raise UserError(f"webdataset: {root} holds no tar {pattern!r}")
        if pattern == _TARS:
            _say_left_out(root, {path.name for path in self._shards})
        facts = [(path.name, *file_stamp(path)) for path in self._shards]
        stamp = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        found = self._read_index(epath.Path(index), stamp) if index and epath.Path(index).exists() else None
        if found is None:
            found = self._scan()
            if index:
                _write_index(epath.Path(index), stamp, *found)
        self._rows, self._names = found

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        """Returns one example: `image` u8 [H W 3], `captions`, `image_id` (the tar's name and the member's).

        Raises:
          UserError: a member is damaged or cut off, when its field is accessed.
        """
        self._check_index(index)
        row = self._rows[index]
        name = self._image_id(index)
        return Example(
            image=lambda _: read_oriented(self._image(row, name))[0],
            captions=lambda _: self._captions(row, name),
            image_id=name,
        )

    def texts(self, field: str) -> Iterator[str]:
        """Yields all captions, in the order of the tars."""
        if field == "captions":
            for index, row in enumerate(self._rows):
                yield from self._captions(row, self._image_id(index))

    def extent(self) -> Extent:
        """Returns the largest size, from the header of every image."""
        sizes = [(1, 1)]
        sizes += [read_header(self._image(row, self._image_id(k)))[0] for k, row in enumerate(self._rows)]
        heights, widths = zip(*sizes, strict=True)
        return Extent(max(heights), max(widths), 0)

    def _image_id(self, index: int) -> str:
        shard = self._shards[self._rows[index]["shard"]].name.removesuffix(".tar")
        return f"{shard}/{os.fsdecode(bytes(self._names[index]))}"

    def _image(self, row: np.void, name: str) -> Encoded:
        folder = self._shards[row["shard"]].parent
        return Encoded(f"{name} in the tars of {folder}", self._member(row, "image"))

    def _captions(self, row: np.void, name: str) -> list[str]:
        data = self._member(row, "text")
        with reading(f"the caption of {name} in {self._shards[row['shard']]}"):
            written = data.decode("utf-8-sig")
            if row["json"]:
                fields = parse_json(written)
                if not isinstance(fields, dict) or self._key not in fields:
                    raise ValueError(f"it has no {self._key!r}: {short(fields)}")
                found = texts(fields[self._key], repr(self._key))
            else:
                found = [written]
            return [" ".join(caption.split()) for caption in found if caption.strip()]

    def _member(self, row: np.void, what: str) -> bytes:
        path, size = self._shards[row["shard"]], int(row[f"{what}_size"])
        with reading(path), path.open("rb") as file:
            file.seek(int(row[what]))
            data = file.read(size)
            if len(data) < size:
                raise ValueError("it is cut off")
            return data

    def _scan(self) -> tuple[np.ndarray, np.ndarray]:
        rows, names, lacking = [], [], Counter[str]()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for found, own, missing in pool.map(_scan_tar, range(len(self._shards)), self._shards):
                rows.append(found)
                names.append(own)
                lacking += missing
        for what, count in sorted(lacking.items()):
            _LOG.warning("%s: %d examples have no %s and were left out", self._shards[0].parent, count, what)
        joined = np.concatenate(rows)
        if not len(joined):
            raise UserError(f"webdataset: no example of {self._shards[0].parent} has an image and a caption")
        return joined, np.concatenate(names)

    def _read_index(self, path: epath.Path, stamp: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Reads an index; None if it is of other tars."""
        found = read_npz(path, "the index")
        with reading(path, "the index"):
            if str(found["stamp"]) != stamp:
                return None
            rows, names = found["rows"], found["names"]
            if rows.dtype != _ROW or rows.ndim != 1 or names.dtype.kind != "S" or names.shape != rows.shape:
                raise ValueError("it is not an index of tars")
            known = (rows["shard"] >= 0) & (rows["shard"] < len(self._shards))
            if not len(rows) or not known.all():
                raise ValueError("it is not an index of tars")
            ends = np.array([path.stat().length for path in self._shards])[rows["shard"]]
            for what in ("image", "text"):
                at, size = rows[what], rows[f"{what}_size"]
                if ((at < 0) | (size < 0) | (at > ends) | (size > ends - at)).any():
                    raise ValueError("it holds places that no tar has")
            return rows, names


def _say_left_out(root: epath.Path, taken: set[str]) -> None:
    """Logs which tars of a folder are compressed, or have another suffix than `_TARS`, and are not read."""
    others = [path.name for path in root.iterdir() if path.name not in taken and path.name[0] != "."]
    tars = sorted(name for name in others if re.search(r"\.(tar|tgz|tar\.\w+)$", name, re.IGNORECASE))
    if tars:
        _LOG.warning(
            "%s: ignored %d tars that are not called %s, such as %s: unpack them with gunzip or the like, or rename "
            "them", root, len(tars), _TARS, tars[0],
        )  # fmt: skip


def _scan_tar(shard: int, path: epath.Path) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """Returns the rows and names of a tar's examples, and how many lack an image or a caption."""
    rows, names, lacking = [], [], Counter[str]()
    for name, members in _examples(path):
        image = next((place for suffix, place in members.items() if suffix in image_suffixes()), None)
        plain = members.get(".txt")
        told = plain or members.get(".json")
        if image is None or told is None:
            lacking["image" if image is None else "caption"] += 1
            continue
        rows.append((shard, *image, *told, plain is None))
        names.append(os.fsencode(name))
    return np.array(rows, _ROW), np.array(names, np.bytes_), lacking


def _examples(path: epath.Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yields the name of each example of a tar, and the place and size of its members by their suffix."""
    last: str | None = None
    members: dict[str, tuple[int, int]] = {}
    for member, at, size in _tar_members(path):
        folder, slash, base = member.rpartition("/")
        stem, point, suffix = base.partition(".")
        if not stem or not point:
            continue  # hidden files, and files without a suffix
        if (name := folder + slash + stem) != last:
            if last is not None:
                yield last, members
            last, members = name, {}
        members[f".{suffix.lower()}"] = (at, size)
    if last is not None:
        yield last, members


def _tar_members(path: epath.Path) -> Iterator[tuple[str, int, int]]:
    """Yields the name, place and size of each file of a tar.

    Raises:
      UserError: it is damaged or cut off.
    """
    with reading(path), path.open("rb") as file:
        for entry in tar_files(file):
            yield entry.name, entry.offset_data, entry.size


def _write_index(path: epath.Path, stamp: str, rows: np.ndarray, names: np.ndarray) -> None:
    arrays: dict[str, Any] = {"stamp": np.array(stamp), "rows": rows, "names": names}
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, content.getvalue(), shared=True)  # by each process of a run
