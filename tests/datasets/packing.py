"""Downloads for the tests of readers: files in memory, written unpacked or as archives."""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovseg_jax.datasets.base import Dataset, Entry

Files = dict[str, bytes]


def zipped(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(files: Files, mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def unpacked(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def packed(folder: Path, files: Files, archives: Mapping[str, str]) -> Path:
    """Writes each archive with the files below its prefix (without the archive's own folder), the rest unpacked."""
    left = dict(files)
    for archive, prefix in archives.items():
        where = archive.rpartition("/")[0]
        own = {name: left.pop(name) for name in list(left) if name.startswith(prefix)}
        assert own, prefix
        inside = {name.removeprefix(f"{where}/"): data for name, data in own.items()}
        mode = "w:gz" if archive.endswith(("gz",)) else "w"
        left[archive] = zipped(inside) if archive.endswith(".zip") else tarred(inside, mode)
    return unpacked(folder, left)


def both_forms(tmp_path: Path, files: Files, archives: Mapping[str, str]) -> Iterator[Path]:
    yield unpacked(tmp_path / "unpacked", files)
    yield packed(tmp_path / "packed", files, archives)


def jpeg(height: int, width: int, seed: int = 0, orientation: int = 1) -> bytes:
    out = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values).save(out, "JPEG", exif=exif)
    return out.getvalue()


def png(values: Any, dtype: type = np.uint8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(values, dtype)).save(out, "PNG")
    return out.getvalue()


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def read_all(dataset: Dataset, split: str) -> dict[str, dict[str, Any]]:
    """The examples of a split by key, as workers read them: from a copy of the reader, and entries that were JSON."""
    entries = [Entry(entry.key, json.loads(json.dumps(entry.data))) for entry in dataset.entries(split)]
    assert len({entry.key for entry in entries}) == len(entries)
    copy = pickle.loads(pickle.dumps(dataset))
    return {entry.key: copy.example(split, entry) for entry in entries}


def names_of(dataset: Dataset, example: dict[str, Any]) -> list[str]:
    return [dataset.classes.display(k) for k in example["class_ids"].tolist()]
