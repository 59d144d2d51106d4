"""Vectors of names in a file, written once by any text tower: an .npz of `words` [C] and `vectors` [C D], with or
without `ids` [C]."""

import os
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from ovseg_jax.errors import UserError
from ovseg_jax.reading import read_npz, reading, text
from ovseg_jax.vocab.classes import ClassList


def read_vectors(path: epath.PathLike, key: str) -> tuple[list[str], Float[np.ndarray, "c d"]]:
    """The names and their vectors, as they stand.

    Args:
      path: what `python -m ovseg_jax.prompts --out=FILE.npz` writes.
      key: what named the file, for errors.

    Raises:
      UserError: no such file, or one that holds something else.
    """
    with reading(path, f"{key}:"):
        arrays = read_npz(path, f"{key}:")
        if not {"words", "vectors"} <= arrays.keys():
            raise ValueError(
                f"it is no .npz with 'words' and 'vectors', but with {', '.join(arrays) or 'nothing'}"
            )
        names, vectors = arrays["words"], arrays["vectors"]
        if names.dtype.kind != "U" or vectors.dtype.kind not in "fiu" or vectors.dtype.itemsize > 8:
            raise ValueError(
                f"'words' are {names.dtype} and 'vectors' {vectors.dtype}, not texts and numbers"
            )
        if vectors.ndim != 2 or names.shape != vectors.shape[:1]:
            raise ValueError(f"it holds {vectors.shape} vectors for {names.shape} words")
        if not np.isfinite(vectors := vectors.astype(np.float32)).all():
            raise ValueError("it holds vectors of numbers that are not finite")
        return [text(str(name), "a word") for name in names], vectors


class ClassVectors(NamedTuple):
    """Classes that come with their vectors: labels for a model whose features lie in the same space.

    Attributes:
      classes: a category for each name.
      vectors: of unit length.
    """

    classes: ClassList
    vectors: Float[np.ndarray, "c d"]

    @classmethod
    def of(cls, labels: Any) -> "ClassVectors | None":
        """Labels that are such, or the path of an .npz of them; None for labels in words.

        Raises:
          UserError: as `read_vectors` does, and for no vectors, and for one that has no direction.
        """
        if isinstance(labels, cls):
            return labels
        if not isinstance(labels, str | os.PathLike) or not os.fspath(labels).strip().lower().endswith(
            ".npz"
        ):
            return None
        path = os.fspath(labels).strip()
        names, vectors = read_vectors(path, "labels")
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not len(names) or not (np.isfinite(length) & (length > 0)).all():
            raise UserError(f"labels: {path} holds no vectors, or some that are zero or no finite numbers")
        classes = ClassList(tuple((name,) for name in names), _ids(path, len(names)), (True,) * len(names))
        return cls(classes, vectors / length)


def _ids(path: str, count: int) -> tuple[int, ...]:
    """The data set's own numbers of the classes; those from 0 where the file has none."""
    with reading(path, "labels:"):
        ids = read_npz(path, "labels:").get("ids", np.arange(count))
        if ids.dtype.kind not in "iu" or ids.shape != (count,):
            raise ValueError(f"'ids' are {ids.dtype} {ids.shape}, not {count} whole numbers")
        return tuple(ids.tolist())
