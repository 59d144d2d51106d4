"""Class lists as files of many kinds, for commands that take classes from anywhere.

3:airplane,aeroplane                          OpenSeg's label files: a line each, with the data set's own number
airplane, aeroplane                           a line each, numbered from 1; commas between the names of a class
["airplane", ["car", "automobile"]]           JSON: the same
[{"id": 3, "name": "airplane"}, ...]          JSON: COCO's and LVIS's categories, which may be the `categories` of a
                                              whole annotation file; in the order of their ids
WORKDIR/classes.json                          the classes of a run
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList, read_label_file, split_names


def read_class_file(path: epath.PathLike) -> ClassList:
    """Reads a file of any of these kinds. `_` in the names of categories is a space.

    Raises:
      UserError: no such file, one of another kind, or one without a class.
    """
    path = epath.Path(path)
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"the classes {path} cannot be read: {error}") from error
    if path.suffix != ".json":
        lines = [line for line in found if line.strip() and not line.lstrip().startswith("#")]
        if lines and all(re.match(r"\s*\d+\s*:", line) for line in lines):
            return read_label_file(path)
        return _numbered(path, [split_names(line) for line in lines])
    if isinstance(found, dict) and "isthing" in found:
        try:
            classes = ClassList.from_json(text)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no class list of a run: {error}") from error
        return classes if len(classes) else _numbered(path, [])
    entries = found.get("categories") if isinstance(found, dict) else found
    if not isinstance(entries, list):
        raise UserError(f"{path} holds neither a list of classes nor an object with 'categories'")
    if entries and all(isinstance(entry, dict) for entry in entries):
        return _categories(path, entries)
    return _numbered(path, [[entry] if isinstance(entry, str) else entry for entry in entries])


def _categories(path: epath.Path, entries: Sequence[dict[str, Any]]) -> ClassList:
    try:
        entries = sorted(entries, key=lambda entry: int(entry["id"]))
        names = [[entry["name"], *entry.get("synonyms", ())] for entry in entries]
        plain = _checked(path, [[name.replace("_", " ") for name in group] for group in names])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: a category has an 'id' and a 'name': {error!r}") from error
    ids = tuple(int(entry["id"]) for entry in entries)
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: two categories have the same id")
    return ClassList(plain, ids, tuple(bool(entry.get("isthing", True)) for entry in entries))


def _numbered(path: epath.Path, groups: Sequence[Any]) -> ClassList:
    names = _checked(path, groups)
    return ClassList(names, tuple(range(1, len(names) + 1)), (True,) * len(names))


def _checked(path: epath.Path, groups: Sequence[Any]) -> tuple[tuple[str, ...], ...]:
    """The names of each class, without doubles."""
    if not groups:
        raise UserError(f"{path} holds no class")
    for k, group in enumerate(groups, 1):
        if not isinstance(group, list | tuple) or not group:
            raise UserError(f"{path}: class {k} has no name")
        if not all(isinstance(name, str) and name.strip() for name in group):
            raise UserError(f"{path}: a name of class {k} is no text, or an empty one: {list(group)!r}")
    return tuple(tuple(dict.fromkeys(" ".join(name.split()) for name in group)) for group in groups)
