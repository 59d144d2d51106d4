"""Files of class vectors: an .npz of `words` [C], `vectors` [C D] and optionally `ids` [C]."""

import os
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from ovseg_jax.errors import UserError
from ovseg_jax.reading import read_npz, reading, text
from ovseg_jax.vocab.classes import ClassList


def read_vectors(path: epath.PathLike, key: str) -> tuple[list[str], Float[np.ndarray, "c d"]]:
    """Reads the names and their vectors f32 [C D], which are not normalised.

    Args:
      path: a file that `python -m ovseg_jax.prompts --out=FILE.npz` wrote.
      key: the config key or flag that named the file, for errors.

    Raises:
      UserError: there is no such file, or it is not of this form.
    """
    with reading(path, f"{key}:"):
        arrays = read_npz(path, f"{key}:")
        if not {"words", "vectors"} <= arrays.keys():
            raise ValueError(
                f"expected the arrays 'words' and 'vectors', found {', '.join(arrays) or 'none'}"
            )
        names, vectors = arrays["words"], arrays["vectors"]
        if names.dtype.kind != "U" or vectors.dtype.kind not in "fiu" or vectors.dtype.itemsize > 8:
            raise ValueError(
                f"'words' has the dtype {names.dtype} and 'vectors' {vectors.dtype}, not text and numbers"
            )
        if vectors.ndim != 2 or names.shape != vectors.shape[:1]:
            raise ValueError(
                f"'vectors' has the shape {vectors.shape}, which does not fit 'words' {names.shape}"
            )
        if not np.isfinite(vectors := vectors.astype(np.float32)).all():
            raise ValueError("'vectors' holds numbers that are not finite")
        return [text(str(name), "a word") for name in names], vectors


class ClassVectors(NamedTuple):
    """Classes with their unit vectors, as labels for a model of the same text tower.

    Attributes:
      classes: one category for each name.
      vectors: their unit vectors.
    """

    classes: ClassList
    vectors: Float[np.ndarray, "c d"]

    @classmethod
    def of(cls, labels: Any) -> "ClassVectors | None":
        """Returns labels that are class vectors, or the path of an .npz file, as ClassVectors; else None.

        Raises:
          UserError: see `read_vectors`; also if there are no vectors, or one has no direction.
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
            raise UserError(f"labels: {path} holds no vectors, or one that is zero or not finite")
        return cls(ClassList.things(names, _ids(path, len(names))), vectors / length)


def _ids(path: str, count: int) -> tuple[int, ...]:
    """Reads the data set's own class ids; without any, they count from 0."""
    with reading(path, "labels:"):
        ids = read_npz(path, "labels:").get("ids", np.arange(count))
        if ids.dtype.kind not in "iu" or ids.shape != (count,):
            raise ValueError(
                f"'ids' has the dtype {ids.dtype} and the shape {ids.shape}, not {count} whole numbers"
            )
        return tuple(ids.tolist())
