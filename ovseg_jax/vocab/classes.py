"""Lists of categories with their names: the labels that a user asks for, and the classes of a data set.

Two formats are read. In a text, `;` separates categories and `,` the names of one category (as in OpenSeg's demo):
`"bride,woman in white; groom; cake"`. In a label file, each line is `id:name,name,...`, where `id` is the data set's
own number of the class; a line whose name is `invalid_class_id` marks an unused number. Lines that begin with `#` are
comments; `# things: 1 3 4` lists the numbers of the categories that are things. The package holds the label files of
`LABEL_FILES`, whose names are accepted wherever the path of a label file is expected.
"""

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from ovseg_jax.errors import UserError
from ovseg_jax.reading import array, flag, parse_json, read_lines, short, text, texts, whole

UNUSED = "invalid_class_id"
LABEL_FILES = (
    "ade20k_150",
    "coco_panoptic",
    "coco_things",
    "pascal_context_59",
    "voc_2012",
    "voc_2012_background",
)
"""The label files of the package: official ids and order, with synonyms, subcategories, plurals and contexts of our own
in the spirit of papers/004, appendix I. Those of published sets have the names of their readers in `datasets`."""
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ClassList:
    """A list of categories, each with one or more names.

    Attributes:
      names: the names of each category; the first is the one displayed.
      ids: the data set's own number of each category, in the same order.
      isthing: whether each category is countable (a thing) rather than stuff.
      groups: named subsets of class indices over which scores are reported, such as "seen" and "held_out".
      examples: the number of training examples of each category in the whole data set, of which a few-shot run sees
        only some; () if unknown.
    """

    names: tuple[tuple[str, ...], ...] = ()
    ids: tuple[int, ...] = ()
    isthing: tuple[bool, ...] = ()
    groups: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    examples: tuple[int, ...] = ()

    def __post_init__(self):
        if self.examples and len(self.examples) != len(self.names):
            raise ValueError(f"{len(self.examples)} numbers of examples for {len(self.names)} categories")
        if not len(self.names) == len(self.ids) == len(self.isthing):
            raise ValueError(
                f"names, ids and isthing differ in length: {len(self.names)}, {len(self.ids)}, "
                f"{len(self.isthing)}"
            )
        if any(not names for names in self.names):
            raise ValueError("a category without any name")
        for group, members in self.groups.items():
            if any(not 0 <= k < len(self.names) for k in members):
                raise ValueError(f"group {group!r} holds an index outside 0..{len(self.names) - 1}")

    @classmethod
    def things(cls, names: Iterable[str | Sequence[str]], ids: Iterable[int] | None = None) -> "ClassList":
        """Returns countable categories, each with one name or several; without ids, they are numbered from 0."""
        groups = tuple((own,) if isinstance(own, str) else tuple(own) for own in names)
        return cls(groups, tuple(range(len(groups)) if ids is None else ids), (True,) * len(groups))

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, chosen: Sequence[int]) -> "ClassList":
        """Returns the categories of these indices, without groups."""
        pick = lambda values: tuple(values[k] for k in chosen)
        return ClassList(pick(self.names), pick(self.ids), pick(self.isthing))

    def and_background(self) -> "ClassList":
        """Returns the categories and one more, "background", which is stuff."""
        return dataclasses.replace(
            self,
            names=(*self.names, ("background",)),
            ids=(*self.ids, max(self.ids, default=0) + 1),
            isthing=(*self.isthing, False),
            examples=(),
        )

    def display(self, k: int) -> str:
        """Returns the first name of category `k`."""
        return self.names[k][0]

    def flat(self) -> tuple[list[str], Int[np.ndarray, "n"]]:
        """Returns all names in one list, and i32 [n], the category index of each name."""
        flat = [name for names in self.names for name in names]
        owner = np.repeat(np.arange(len(self.names), dtype=np.int32), [len(names) for names in self.names])
        return flat, owner

    def withheld(self) -> tuple[int, ...]:
        """Returns the indices of the categories in the groups "unseen" and "held_out", which training omits."""
        return tuple(sorted({k for group in ("unseen", "held_out") for k in self.groups.get(group, ())}))

    @property
    def index(self) -> dict[str, int]:
        """The category index of each name.

        A name of several categories means the one that has it as its first name, or else the first that lists it.
        """
        index: dict[str, int] = {}
        for k, names in enumerate(self.names):
            index.setdefault(names[0], k)
        for k, names in enumerate(self.names):
            for name in names[1:]:
                index.setdefault(name, k)
        return index

    def distinct(self) -> "ClassList":
        """Returns the categories with each shared name kept only by the category that it means (see `index`).

        First names always stay, even if two are equal.
        """
        index = self.index
        names = tuple(
            tuple(name for name in own if name == own[0] or index[name] == k)
            for k, own in enumerate(self.names)
        )
        return dataclasses.replace(self, names=names)

    def say_shared(self, where: Any) -> "ClassList":
        """Logs a warning if several categories share a name, and returns the list itself.

        Args:
          where: the origin of the names, for the message.
        """
        index = self.index
        if shared := [name for k, own in enumerate(self.names) for name in own if index[name] != k]:
            owners = ", ".join(repr(self.display(k)) for k, own in enumerate(self.names) if shared[0] in own)
            _LOG.warning(
                "%s: names listed by several categories: %d, such as %r by %s; this name means %s",
                where,
                len(set(shared)),
                shared[0],
                owners,
                repr(self.display(index[shared[0]])),
            )
        return self

    def to_json(self) -> str:
        """Returns the list as JSON, which `from_json` reads."""
        fields = {
            "names": self.names,
            "ids": self.ids,
            "isthing": self.isthing,
            "groups": dict(self.groups),
            "examples": self.examples,
        }
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ClassList":
        """Parses the JSON that `to_json` returns.

        Raises:
          ValueError: the text is not of this form.
        """
        return cls.from_fields(parse_json(text))

    @classmethod
    def from_fields(cls, fields: Any) -> "ClassList":
        """Checks the parsed JSON of `to_json` and builds a list from it.

        Raises:
          ValueError: the object is not of this form.
        """
        if not isinstance(fields, dict) or not {"names", "ids", "isthing", "groups"} <= fields.keys():
            raise ValueError("it is not a class list, which has 'names', 'ids', 'isthing' and 'groups'")
        if not isinstance(fields["groups"], dict):
            raise ValueError(f"'groups': expected an object, got {short(fields['groups'])}")
        return cls(
            names=tuple(
                tuple(texts(array(names, "'names'"), "'names'"))
                for names in array(fields["names"], "'names'")
            ),
            ids=tuple(whole(k, "an id") for k in array(fields["ids"], "'ids'")),
            isthing=tuple(
                flag(thing, "an entry of 'isthing'") for thing in array(fields["isthing"], "'isthing'")
            ),
            groups={
                text(group, "a group"): tuple(
                    whole(k, f"an index of {group!r}") for k in array(members, f"{group!r}")
                )
                for group, members in fields["groups"].items()
            },
            examples=tuple(
                whole(n, "an entry of 'examples'") for n in array(fields.get("examples", []), "'examples'")
            ),
        )


def parse_labels(text: str) -> ClassList:
    """Parses categories from a text: `;` or a line break separates categories, `,` the names of one.

    Raises:
      UserError: there is no category, or a category has no name.
    """
    lines = text.replace("\r", "\n").removeprefix("\ufeff").split("\n")
    # A ";" at the end of a line or of the text does not start an empty category.
    parts = [part for line in lines if line.strip() for part in line.strip().removesuffix(";").split(";")]
    categories = [split_names(part) for part in parts]
    if not any(categories):
        raise UserError(f'no labels in {text!r}: write them as "bride,woman in white; groom; cake"')
    if all(re.match(r"\d+:", names[0]) for names in categories if names):
        raise UserError(
            f"the labels {short(text)} have ids like the lines of a label file: leave the ids out"
        )
    for position, names in enumerate(categories, 1):
        if not names:
            raise UserError(f"category {position} of the labels {text!r} has no name")
    return ClassList.things(categories)


def read_label_file(path: epath.PathLike) -> ClassList:
    """Reads a label file in OpenSeg's format: one `id:name,name,...` a line, UTF-8.

    Args:
      path: the file, or one of `LABEL_FILES`. Without a line `# things: ...` all its categories are things.

    Raises:
      UserError: the file cannot be read, a line is not of that form, an id occurs twice, no category is left, or a
        thing is none of the categories.
    """
    path = label_file(path)
    categories: dict[int, tuple[str, ...]] = {}
    things: set[str] | None = None
    for number, line in read_lines(path, "the label file"):
        if line.lstrip().startswith("#"):
            if found := re.match(r"\s*#\s*things:(.*)", line):
                things = {*(things or ()), *found[1].split()}
            continue
        head, colon, tail = line.partition(":")
        names = split_names(tail)
        # isdecimal(), since isdigit() accepts digits that int() refuses; 18 digits fit int64.
        if not colon or not head.strip().isdecimal() or len(head.strip()) > 18 or not names:
            raise UserError(f'{path}, line {number}: expected "id:name,name,...", got {short(line.strip())}')
        if names[0] == UNUSED:
            continue
        if int(head) in categories:
            raise UserError(f"{path}, line {number}: the id {int(head)} occurs twice")
        categories[int(head)] = names
    if not categories:
        raise UserError(f"the label file {path} lists no category")
    if things is not None and (unknown := sorted(things - {str(k) for k in categories})):
        raise UserError(f"{path}: the thing {short(unknown[0])} is the id of no category")
    isthing = tuple(things is None or str(k) in things for k in categories)
    return ClassList(tuple(categories.values()), tuple(categories), isthing).say_shared(path)


def read_words(path: epath.PathLike) -> ClassList:
    """Reads a label file, or one without ids: a category a line, `name,name,...`, as long lists of words have it.

    Raises:
      UserError: see `read_label_file` and `parse_labels`.
    """
    lines = [line for _, line in read_lines(label_file(path), "the label file")]
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not lines or any(":" in line for line in lines):
        return read_label_file(path)
    return parse_labels("\n".join(lines))


def label_file(path: epath.PathLike) -> epath.Path:
    """Returns the path of a label file that is given by its path, or by its name in `LABEL_FILES`."""
    return epath.Path(__file__).parent / "labels" / f"{path}.txt" if is_built_in(path) else epath.Path(path)


def is_built_in(path: epath.PathLike) -> bool:
    """Tells whether this is a name of `LABEL_FILES`; `./NAME` means a file of that name."""
    return os.fspath(path) in LABEL_FILES


def rename(classes: ClassList, labels: epath.PathLike) -> ClassList:
    """Returns the classes with the names that a label file gives their ids.

    Raises:
      UserError: the file cannot be read, or lacks an id.
    """
    listed = read_label_file(labels)
    by_id = dict(zip(listed.ids, listed.names, strict=True))
    if missing := [k for k, own in enumerate(classes.ids) if own not in by_id]:
        raise UserError(
            f"labels={labels} has no line for category {classes.ids[missing[0]]} "
            f"({classes.display(missing[0])!r})"
        )
    return dataclasses.replace(classes, names=tuple(by_id[own] for own in classes.ids))


def with_names(classes: ClassList, names: Mapping[str, Sequence[str]]) -> ClassList:
    """Returns the classes with other names for some of them.

    Args:
      classes: the classes.
      names: the new names by a class's first name.

    Raises:
      UserError: there is no such class, or no new name for it.
    """
    first = [own[0] for own in classes.names]
    for name, new in names.items():
        if name not in first:
            raise UserError(
                f"there is no class {name!r} to give other names: the classes are {', '.join(first)}"
            )
        if not new:
            raise UserError(f"the class {name!r} would have no name: give at least one")
    return dataclasses.replace(classes, names=tuple(tuple(names.get(own[0], own)) for own in classes.names))


def load_labels(text_or_path: str) -> ClassList:
    """Reads a label file if the text is the path of one or in `LABEL_FILES`, and otherwise parses it as labels.

    Raises:
      UserError: see `read_label_file` and `parse_labels`.
    """
    text = str(text_or_path).strip()
    ending = r"(?i)\.(txt|csv|tsv|json|names)$|^[\w+.-]+://"
    if is_built_in(text) or (re.search(ending, text) and ";" not in text):
        return read_words(text)
    # A long list of labels is not a file name: looking for such a file would fail with "file name too long".
    short_enough = len(text.encode("utf-8", "surrogatepass")) < 256
    if text and short_enough and not re.search(r"[;\n\0]", text):
        if epath.Path(text).is_file():
            return read_words(text)
        if os.sep in text and epath.Path(text).is_dir():
            raise UserError(f"the labels {text} are a folder: give a label file, or words")
    return parse_labels(text)


def union(class_lists: Sequence[ClassList]) -> ClassList:
    """Joins several lists: categories with the same first name become one, with all their names.

    Shared names are kept only by the category that they mean, see `ClassList.distinct`. The ids are new (0, 1, ...),
    since the lists' own may clash; groups of the same name are joined.
    """
    names: dict[str, list[str]] = {}
    isthing: dict[str, bool] = {}
    groups: dict[str, list[int]] = {}
    for classes in class_lists:
        for k in range(len(classes)):
            first = classes.display(k)
            known = names.setdefault(first, [first])
            known.extend(name for name in classes.names[k] if name not in known)
            isthing.setdefault(first, classes.isthing[k])
    position = {first: k for k, first in enumerate(names)}
    for classes in class_lists:
        for group, members in classes.groups.items():
            joined = groups.setdefault(group, [])
            joined.extend(position[classes.display(k)] for k in members)
    joined_names = tuple(tuple(n) for n in names.values())
    joined_groups = {group: tuple(sorted(set(members))) for group, members in groups.items()}
    ids, things = tuple(range(len(names))), tuple(isthing.values())
    return ClassList(joined_names, ids, things, joined_groups).say_shared("the mixture").distinct()


def split_names(text: str) -> tuple[str, ...]:
    """Splits a text at its commas and removes duplicates; commas inside parentheses do not separate."""
    parts: Iterable[str] = re.split(r",(?![^(]*\))", text)
    return tuple(dict.fromkeys(name for part in parts if (name := " ".join(part.split()))))


# Every form of labels that `as_classes` accepts.
Labels = str | os.PathLike | ClassList | Sequence[str | Sequence[str]]


def as_classes(labels: Labels) -> ClassList:
    """Converts labels in any accepted form to a ClassList; see `Segmenter.segment` for the forms.

    Raises:
      UserError: there are no labels, one is empty, or a label file cannot be read.
    """
    if isinstance(labels, ClassList):
        return labels
    if isinstance(labels, os.PathLike):
        return read_words(labels)
    if isinstance(labels, str):
        return load_labels(labels)
    names: list[tuple[str, ...]] = []
    for category in labels if isinstance(labels, Iterable) else [None]:
        if isinstance(category, str):
            names.extend(parse_labels(category).names)
        else:
            names.append(tuple(category) if isinstance(category, Iterable) else ())
    if not all(names) or not all(isinstance(name, str) and name.strip() for group in names for name in group):
        raise UserError(f"the labels {short(labels)} hold an empty category: each needs at least one name")
    if not names:
        raise UserError("no labels were given: name at least one category")
    return ClassList.things(names)


def rows_of_names(
    classes: Sequence[Sequence[str]], asked: Sequence[str], knows: str
) -> Int[np.ndarray, " k"]:
    """Maps each requested name to a class index, for models with parameters per class and no text tower.

    Classes may share a name (1,415 of ImageNet-21K's do). If all names, or all first names, are requested in the order
    of the classes, their positions tell them apart.

    Args:
      classes: the names of each class.
      asked: the requested names.
      knows: the model's description, for errors.

    Raises:
      UserError: no class has the name, or several classes have it.
    """
    owner = [k for k, names in enumerate(classes) for _ in names]
    flat = [name for names in classes for name in names]
    if list(asked) == flat:
        return np.array(owner, np.int32)
    if list(asked) == [names[0] for names in classes]:
        return np.arange(len(classes), dtype=np.int32)
    found: dict[str, set[int]] = {}
    for k, name in zip(owner, flat, strict=True):
        found.setdefault(name, set()).add(k)
    if unknown := [name for name in asked if name not in found]:
        raise UserError(f"{knows} knows {len(classes)} classes, but none is called {unknown[0]!r}")
    if several := [name for name in asked if len(found[name]) > 1]:
        count = len(found[several[0]])
        raise UserError(f"{knows} knows {count} classes called {several[0]!r}: the name is ambiguous")
    return np.array([k for name in asked for k in found[name]], np.int32)
