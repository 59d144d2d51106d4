"""Files of classifications: the class of each image, or a score for each class."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from ovseg_jax.errors import UserError
from ovseg_jax.reading import first_twice, read_json, read_npz, read_text, reading, short

SUFFIXES = (".json", ".csv", ".npz")

Class = int | str
"""A class as files name it: its number, or its name."""


class Answers(NamedTuple):
    """The content of a file.

    Attributes:
      names: the images; None if their order counts.
      classes: the class of each image, [N]; [] if there are scores.
      scores: [N K]; None if there are classes.
      columns: the class of each column of the scores; None if the file does not name them.
    """

    names: list[str] | None
    classes: list[Class]
    scores: Float[np.ndarray, "n k"] | None = None
    columns: list[Class] | None = None

    def __len__(self) -> int:
        return len(self.classes) if self.scores is None else len(self.scores)


def read_answers(path: epath.PathLike, what: str) -> Answers:
    """Reads a file of one of these forms; a class is a whole number or a name.

    FILE.json   {"NAME": class, ...} or {"NAME": [score, ...], ...}; or a list of classes, or of lists of scores
    FILE.csv    a line of titles, then lines `NAME,class`; or the titles are `image,CLASS,CLASS,...` and the lines
                `NAME,score,score,...`
    FILE.npz    `classes` [N] or `scores` [N K]; optionally `names` [N], and `columns` [K], the class of each column

    Args:
      path: the file.
      what: its flag, for errors.

    Raises:
      UserError: it cannot be read, is not of these forms, names an image twice, or holds no image.
    """
    with reading(path, what):
        kind = epath.Path(path).suffix.lower()
        if kind == ".json":
            found = _of_json(read_json(path, what))
        elif kind == ".csv":
            found = _of_csv(_rows(read_text(path, what)))
        elif kind == ".npz":
            found = _of_arrays(read_npz(path, what))
        else:
            raise UserError(f"{what} {path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
        if not len(found):
            raise ValueError("it holds no image")
        for names, of in ((found.names, "image"), (found.columns, "class")):
            if names is not None and (twice := first_twice(names)) is not None:
                raise ValueError(f"it names the {of} {twice!r} twice")
        if found.scores is not None and not np.isfinite(found.scores).all():
            raise ValueError("it holds scores that are not finite")
        return found


def _of_json(found: Any) -> Answers:
    if not isinstance(found, dict | list):
        raise ValueError(f"expected an object or a list, got {short(found)}")
    names = list(found) if isinstance(found, dict) else None
    values = list(found.values()) if isinstance(found, dict) else found
    if values and all(isinstance(value, list) for value in values):
        return Answers(names, [], _scores(values))
    return Answers(names, [_class(value) for value in values])


def _rows(content: str) -> list[list[str]]:
    """Returns the lines of a CSV file that are not empty, and checks that all have as many cells."""
    try:
        rows = [row for row in csv.reader(io.StringIO(content), strict=True) if row]
    except csv.Error as error:
        raise ValueError(f"it is not valid CSV: {error}") from None
    for k, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"its titles are {len(rows[0])} cells, and its line {k + 1} has {len(row)}")
    return rows


def _of_csv(rows: Sequence[Sequence[str]]) -> Answers:
    titles, lines = (rows[0], rows[1:]) if rows else ([], [])
    if len(titles) < 2:
        raise ValueError("expected a line of titles, such as image,class")
    names = [line[0] for line in lines]
    if len(titles) == 2:
        return Answers(names, _numbers([line[1] for line in lines]))
    return Answers(
        names, [], _scores([[_score(cell) for cell in line[1:]] for line in lines]), _numbers(titles[1:])
    )


def _of_arrays(arrays: Mapping[str, np.ndarray]) -> Answers:
    if ("classes" in arrays) == ("scores" in arrays):
        raise ValueError(f"expected either 'classes' or 'scores', found {', '.join(arrays) or 'no array'}")
    key = "classes" if "classes" in arrays else "scores"
    values = arrays[key]
    if values.ndim != (1 if key == "classes" else 2) or values.dtype.kind not in (
        "iuU" if key == "classes" else "fiu"
    ):
        raise ValueError(f"{key!r} has the dtype {values.dtype} and the shape {values.shape}")
    names = _list(arrays, "names", len(values))
    names = None if names is None else [str(name) for name in names]
    if key == "classes":
        return Answers(names, values.tolist())
    return Answers(names, [], values.astype(np.float64), _list(arrays, "columns", values.shape[1]))


def _list(arrays: Mapping[str, np.ndarray], key: str, count: int) -> list[Any] | None:
    found = arrays.get(key)
    if found is not None and (found.shape != (count,) or found.dtype.kind not in "iuU"):
        raise ValueError(
            f"{key!r} has the dtype {found.dtype} and the shape {found.shape}, not {count} texts or whole numbers"
        )
    return None if found is None else found.tolist()


def _class(value: Any) -> Class:
    if type(value) not in (int, str):
        raise ValueError(f"expected a class, a text or a whole number, got {short(value)}")
    return value


def _numbers(cells: Sequence[str]) -> list[Class]:
    """Returns the cells as whole numbers if all of them are, else as they are: 01 and 1 may be two names."""
    cells = [cell.strip() for cell in cells]
    numbers = all(re.fullmatch("0|-?[1-9][0-9]*", cell) for cell in cells)
    return [int(cell) for cell in cells] if numbers else list(cells)


def _score(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"expected a score, got {short(cell)}") from None


def _scores(rows: Sequence[Sequence[Any]]) -> Float[np.ndarray, "n k"]:
    width = len(rows[0]) if rows else 0
    for row in rows:
        if len(row) != width or not width:
            raise ValueError(f"its images have {width} and {len(row)} scores")
        if wrong := [value for value in row if type(value) not in (int, float)]:
            raise ValueError(f"expected a score, got {short(wrong[0])}")
    return np.array(rows, np.float64)
