"""Reader of class lists in many file formats, for commands that accept any of them.

3:airplane,aeroplane                          OpenSeg's label file: a line for each class, with the data set's own id
airplane, aeroplane                           a line for each class, numbered by the reader; commas separate its names
["airplane", ["car", "automobile"]]           JSON: the same
[{"id": 3, "name": "airplane"}, ...]          JSON: COCO's and LVIS's categories, also as the `categories` of a whole
                                              annotation file; sorted by id
WORKDIR/classes.json                          the classes of a run
ade20k_150                                    a label file of the package, see `classes.LABEL_FILES`
"""

import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from ovseg_jax.errors import UserError
from ovseg_jax.reading import column, flag, objects, read_json, read_lines, reading, short, text, texts, whole
from ovseg_jax.vocab.classes import ClassList, label_file, read_label_file, split_names

_WHAT = "the classes"


def read_class_file(path: epath.PathLike, first: int = 1) -> ClassList:
    """Reads a class list in any of these formats; `_` in the names of categories becomes a space.

    Args:
      path: the file.
      first: the id of the first class in a file without ids.

    Raises:
      UserError: there is no such file, its format is unknown or mixed, or it lists no class.
    """
    path = label_file(path)
    if path.suffix.lower() != ".json":
        return _read_lines(path, first)
    found = read_json(path, _WHAT)
    with reading(path, _WHAT):
        if isinstance(found, dict) and "isthing" in found:
            classes = ClassList.from_fields(found)
            return classes if len(classes) else _numbered(path, [], first)
        entries = found.get("categories") if isinstance(found, dict) else found
        if not isinstance(entries, list):
            raise UserError(f"{path} is neither a list of classes nor an object with 'categories'")
        if any(isinstance(entry, dict) for entry in entries):
            return _categories(path, objects(entries, "the list of classes"))
        return _numbered(path, [texts(entry, f"class {k}") for k, entry in enumerate(entries, 1)], first)


def _read_lines(path: epath.Path, first: int) -> ClassList:
    lines = [(n, line) for n, line in read_lines(path, _WHAT) if not line.lstrip().startswith("#")]
    with_id = [bool(re.match(r"\s*[-+]?\d+\s*:", line)) for _, line in lines]
    if any(with_id):
        if not all(with_id):
            number, line = lines[with_id.index(not with_id[0])]
            raise UserError(
                f"{path}, line {number}: {short(line.strip())} has {'no' if with_id[0] else 'an'} id before its "
                f"names, and the first line has {'one' if with_id[0] else 'none'}"
            )
        return read_label_file(path)
    if lines and all(re.match(r"\s*\d+\s*,\s*\S", line) for _, line in lines):
        raise UserError(f"{path}: an id must be followed by a colon, not a comma, as in 3:airplane,aeroplane")
    return _numbered(path, [split_names(line) for _, line in lines], first)


def _categories(path: epath.Path, entries: Sequence[dict[str, Any]]) -> ClassList:
    ids = column(entries, "id", whole, of="category")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: two categories have the same id")
    names = column(entries, "name", text, of="category")
    others = column(entries, "synonyms", texts, default=[], of="category")
    things = column(entries, "isthing", flag, default=True, of="category")
    rows = sorted(zip(ids, names, others, things, strict=True))
    groups = [[name.replace("_", " ") for name in (first, *more)] for _, first, more, _ in rows]
    numbers, isthing = tuple(row[0] for row in rows), tuple(row[3] for row in rows)
    return ClassList(_checked(path, groups), numbers, isthing).say_shared(path)


def _numbered(path: epath.Path, groups: Sequence[Sequence[str]], first: int) -> ClassList:
    names = _checked(path, groups)
    return ClassList.things(names, range(first, first + len(names))).say_shared(path)


def _checked(path: epath.Path, groups: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Checks the names of each class and removes duplicates."""
    if not groups:
        raise UserError(f"{path} lists no class")
    for k, group in enumerate(groups, 1):
        if not group:
            raise UserError(f"{path}: class {k} has no name")
        if not all(name.strip() for name in group):
            raise UserError(f"{path}: a name of class {k} is empty: {list(group)!r}")
    return tuple(tuple(dict.fromkeys(" ".join(name.split()) for name in group)) for group in groups)
