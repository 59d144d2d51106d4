"""Features of class names, kept in a file between processes: to embed three words in 80 templates takes seconds."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from ovseg_jax.errors import UserError
from ovseg_jax.files import keep_newest
from ovseg_jax.reading import open_binary, read_bytes
from ovseg_jax.vocab.vectors import read_vectors

MOST_BYTES = 256 << 20  # of all files in a folder; 20,000 names of CLIP B/16 take 40 MB
_PART = 1024  # names; with 80 templates a minute or two of a CPU
_HEAD = 1 << 16  # bytes; the names and shapes in a file of weights
_PACKAGE = Path(__file__).parents[1]
_LOG = logging.getLogger(__name__)


class KeptTexts:
    """A function from names to their features [K D], which are those of `embed`, name by name.

    New names are embedded and written `_PART` at a time, so that a command that is stopped among thousands of them goes
    on from there. A file that is damaged or cannot be written only costs time. Beyond `MOST_BYTES` in its folder, the
    files that were read or written longest ago are removed.

    Args:
      file: an .npz in a folder of such files, which is created; one for each `digest`.
      embed: embeds names that the file lacks.
      width: D.
    """

    def __init__(self, file: Path, embed: Callable[[list[str]], Float[Any, "k d"]], width: int):
        self.file, self._embed, self._width = file, embed, width

    def __call__(self, names: Sequence[str]) -> Float[np.ndarray, "k d"]:
        """Returns the features of names."""
        kept = self._read()
        if lacking := [name for name in dict.fromkeys(names) if name not in kept]:
            # The last names are kept longest, see `_write`: the new ones, and those asked for again.
            kept |= {name: kept.pop(name) for name in dict.fromkeys(names) if name in kept}
            parts = [lacking[at : at + _PART] for at in range(0, len(lacking), _PART)]
            for part in tqdm(parts, "embedding words", unit="part", disable=None if len(parts) > 1 else True):
                kept |= dict(zip(part, np.asarray(self._embed(part), np.float32), strict=True))
                with contextlib.suppress(OSError):
                    self._write(kept)
        return np.stack([kept[name] for name in names])

    def _read(self) -> dict[str, Float[np.ndarray, "d"]]:
        if not self.file.exists():
            return {}
        try:
            names, vectors = read_vectors(self.file, "kept features")
            if vectors.shape[1] != self._width:
                raise UserError(f"kept features: {self.file} has vectors of {vectors.shape[1]} numbers")
        except UserError as error:
            _LOG.warning("%s; it is written anew", error)
            return {}
        with contextlib.suppress(OSError):
            os.utime(self.file)
        return dict(zip(names, vectors, strict=True))

    def _write(self, kept: dict[str, Float[np.ndarray, "d"]]) -> None:
        folder = self.file.parent
        folder.mkdir(parents=True, exist_ok=True)
        newest = list(kept)[-(MOST_BYTES // (4 * self._width)) :]
        # Under a name of its own, since two processes may write at once: the file is then that of the last one.
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as part:
            try:
                np.savez(part, words=np.array(newest), vectors=np.stack([kept[name] for name in newest]))
                part.flush()
                os.replace(part.name, self.file)
            except BaseException:
                os.unlink(part.name)
                raise
        keep_newest(folder, "*.npz", MOST_BYTES)


def digest(files: Sequence[Path], *others: Any) -> str:
    """Returns a name for features that depend on files, plain values, the device and the code of this package.

    Of each file, or file of a folder, it counts the path, the size, the time of its last change and its head.
    """
    found = hashlib.sha256(json.dumps([*others, jax.__version__, jax.default_backend()]).encode())
    for path in sorted(_PACKAGE.rglob("*.py")):
        found.update(read_bytes(path))
    for path in files:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                facts = file.stat()
                found.update(f"\n{file.resolve()} {facts.st_size} {facts.st_mtime_ns}\n".encode())
                found.update(_head(file))
    return found.hexdigest()[:32]


def _head(path: Path) -> bytes:
    with open_binary(path) as file:
        return file.read(_HEAD)


__all__ = ["MOST_BYTES", "KeptTexts", "digest"]
