"""The files of a folder that `prepare` writes, and their readers.

DIR/NAME-SPLIT.array_record-00000-of-00012   examples, as TensorFlow Datasets serialises them
DIR/dataset_info.json, features.json         its metadata
DIR/classes.json                             the classes, as `ClassList.to_json` writes them
DIR/index-SPLIT.npz                          sizes, boxes, classes and texts of all examples, without their images
DIR/manifest.json                            counts, checksums, options and versions; written last
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.source_base import FIELDS, TEXTS
from ovseg_jax.errors import UserError
from ovseg_jax.reading import array, objects, parse_json, read_json, read_npz, reading, text, texts, whole
from ovseg_jax.vocab.classes import ClassList

MANIFEST, CLASSES = "manifest.json", "classes.json"
FORMAT = 1
"""The number in the manifest that a change of this layout increases."""

_CHUNK = 1 << 22
# The columns of an index with their type and row shape: a row for each example, or for each segment.
_BY_EXAMPLE: dict[str, tuple[type, tuple[int, ...]]] = {
    "sizes": (np.int32, (2,)),
    "segments": (np.int32, ()),
    "label": (np.int32, ()),
}
_BY_SEGMENT: dict[str, tuple[type, tuple[int, ...]]] = {
    "class_ids": (np.int32, ()),
    "iscrowd": (np.bool_, ()),
    "boxes": (np.float32, (4,)),
}

Index = dict[str, np.ndarray]
"""Columns of light fields; texts are UTF-8 bytes, one line of JSON for each example."""


def shard_name(dataset: str, split: str, shard: int, count: int) -> str:
    """Returns the file name that TensorFlow Datasets gives a shard."""
    return f"{dataset}-{split}.array_record-{shard:05d}-of-{count:05d}"


def index_name(split: str) -> str:
    """Returns the file name of a split's index."""
    return f"index-{split}.npz"


def make_index(rows: Sequence[dict[str, Any]], provides: frozenset[str]) -> Index:
    """Collects the light fields of examples.

    Args:
      rows: for each example `size`, (height, width) in pixels, and the fields of `provides`.
      provides: the fields that the examples have.
    """
    columns = {
        "sizes": [row["size"] for row in rows],
        "segments": [len(row["class_ids"]) if "class_ids" in row else 0 for row in rows],
    }
    index = {key: np.array(column, np.int32) for key, column in columns.items()}
    if "label" in provides:
        index["label"] = np.array([row["label"] for row in rows], np.int32)
    if "class_ids" in provides:
        for key, (kind, shape) in _BY_SEGMENT.items():
            parts: list[np.ndarray] = [
                np.asarray(row[key], kind).reshape(-1, *shape) for row in rows if key in row
            ]
            if parts:
                index[key] = np.concatenate(parts)
    for key in (key for key in TEXTS if key in provides):
        lines = "".join(json.dumps(row[key], ensure_ascii=False) + "\n" for row in rows)
        index[key] = np.frombuffer(lines.encode(), np.uint8)
    return index


def join_indices(parts: Sequence[Index]) -> Index:
    """Concatenates the rows of indices that have the same columns."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def read_index(path: epath.PathLike, count: int, provides: frozenset[str]) -> Index:
    """Reads an index and checks that its columns have rows for `count` examples.

    Raises:
      UserError: it cannot be read, lacks a column of `provides`, or columns are of another type or length.
    """
    index = read_npz(path, "the index")
    with reading(path, "the index"):
        needed = {"sizes", "segments"} | (provides & {"label", "class_ids", "boxes", *TEXTS})
        if missing := sorted(needed - index.keys()):
            raise ValueError(f"it has no column {missing[0]!r}")
        for key, (kind, shape) in {**_BY_EXAMPLE, **_BY_SEGMENT}.items():
            if key in index and (index[key].dtype != kind or index[key].shape[1:] != shape):
                raise ValueError(f"its column {key!r} is {index[key].dtype} {list(index[key].shape)}")
        if (index["segments"] < 0).any() or (index["sizes"] < 1).any():
            raise ValueError("it has a negative number of segments, or an image without pixels")
        total = int(index["segments"].sum(dtype=np.int64))
        for key, column in index.items():
            rows = total if key in _BY_SEGMENT else count
            if key not in TEXTS and len(column) != rows:
                raise ValueError(f"its column {key!r} has {len(column)} rows in place of {rows}")
    return index


def read_texts(index: Index, field: str, path: epath.PathLike) -> Iterator[list[Any]]:
    """Yields the texts of each example from an index: a list of texts, or of lists of texts.

    Raises:
      UserError: the column is not as `make_index` writes it.
    """
    with reading(path, "the index"):
        lines = index[field].tobytes().decode().split("\n")[:-1]
        if len(lines) != len(index["sizes"]):
            raise ValueError(f"its column {field!r} has {len(lines)} lines in place of {len(index['sizes'])}")
        for line in lines:
            yield [
                item if isinstance(item, str) else texts(array(item, field), field)
                for item in array(parse_json(line), field)
            ]


def read_manifest(folder: epath.PathLike) -> dict[str, Any]:
    """Reads the manifest of a prepared folder.

    Returns:
      The manifest; `splits` has for each split `examples`, `extent`, `shards` and `index`, whose files have `file`,
      `bytes` and `sha256`, shards `examples` too.

    Raises:
      UserError: the folder was not written by `prepare`, is unfinished, or the manifest is damaged.
    """
    root = epath.Path(folder)
    path = root / MANIFEST
    if not str(folder) or not path.exists():
        raise UserError(
            f"{str(folder)!r} has no {MANIFEST}: it is not a folder that `python -m ovseg_jax.prepare` has finished"
        )
    found = read_json(path)
    with reading(path):
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"it is not a manifest of format {FORMAT}")
        text(found["dataset"], "'dataset'")
        if unknown := sorted(set(texts(array(found["provides"], "'provides'"), "'provides'")) - FIELDS):
            raise ValueError(f"it provides an unknown field {unknown[0]!r}")
        if not isinstance(found["splits"], dict) or not found["splits"]:
            raise ValueError("it lists no split")
        for split, entry in found["splits"].items():
            shards = objects(entry["shards"], f"the shards of {split!r}")
            counts = [whole(shard["examples"], "'examples'") for shard in shards]
            if sum(counts) != whole(entry["examples"], "'examples'"):
                raise ValueError(f"the shards of {split!r} do not have {entry['examples']} examples in all")
            if len(array(entry["extent"], "'extent'")) != 3:
                raise ValueError(f"the extent of {split!r} is not three numbers")
            for side in entry["extent"]:
                whole(side, "'extent'")
            for file in [*shards, entry["index"]]:
                name = text(file["file"], "'file'")
                if name != epath.Path(name).name:
                    raise ValueError(f"the file {name!r} is not in its folder")
                whole(file["bytes"], "'bytes'")
                text(file["sha256"], "'sha256'")
    return found


def read_prepared_classes(folder: epath.PathLike) -> ClassList:
    """Reads the classes of a prepared folder.

    Raises:
      UserError: the file is missing or damaged.
    """
    path = epath.Path(folder) / CLASSES
    found = read_json(path)
    with reading(path):
        return ClassList.from_fields(found)


def check_files(folder: epath.PathLike, split: str, entry: dict[str, Any], sums: bool) -> None:
    """Checks that the files of a split are there and whole.

    Args:
      folder: the prepared folder.
      split: the name of the split, for errors.
      entry: the split's part of the manifest.
      sums: whether to compare checksums, which reads every file; else only sizes are compared.

    Raises:
      UserError: a file is missing or differs; the message names it and the number of such files.
    """
    wrong = []
    for file in [*entry["shards"], entry["index"]]:
        path = epath.Path(folder) / file["file"]
        if not path.exists():
            wrong.append(f"{path} is missing")
        elif path.stat().length != file["bytes"]:
            wrong.append(f"{path} has {path.stat().length} bytes in place of {file['bytes']}")
        elif sums and file_sha256(path) != file["sha256"]:
            wrong.append(f"{path} does not have the checksum of {MANIFEST}")
    if wrong:
        more = f" (and {len(wrong) - 1} more files of the split {split!r})" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}{more}: copy it again, or prepare the data set anew")


def file_sha256(path: epath.PathLike) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits."""
    found = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
